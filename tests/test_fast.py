"""common/fast.py: the faster forms are the same function of the same parameters, and plain where they do not apply."""

import copy
import shutil

import dawm_td3bc as script
from common import fast

import pytest
import torch
from torch import nn

EPS = torch.finfo(torch.float64).eps


def both_ways(net: nn.Module, x: torch.Tensor, direction: torch.Tensor) -> list[torch.Tensor]:
    """The output and the gradients of input and parameters."""
    x = x.detach().requires_grad_()
    found = net(x)
    return [found, *torch.autograd.grad(found, [x, *net.parameters()], direction)]


def close(ours: list, theirs: list, units: float) -> None:
    """To `units` of rounding of the largest number; a sum of n terms of that size may err by n of them."""
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == b.shape and (a - b).abs().max() <= units * EPS * max(1, b.abs().max())


def layouts(x: torch.Tensor) -> list[torch.Tensor]:
    """x [B, C, L] in torch's order, with time first, and as every other channel of a wider tensor."""
    wide = torch.zeros(len(x), 2 * x.shape[1], x.shape[2], dtype=x.dtype)
    wide[:, ::2] = x
    return [x, x.permute(2, 0, 1).contiguous().permute(1, 2, 0), wide[:, ::2]]


@pytest.mark.parametrize("channels", [8, 32, 64, 128])
@pytest.mark.parametrize("make", [
    lambda c: nn.Conv1d(c, 8, 5, padding=2), lambda c: nn.Conv1d(12, c, 5, padding=2), lambda c: nn.Conv1d(c, 16, 1),
    lambda c: nn.GroupNorm(8, c), lambda c: nn.GroupNorm(1, c),
])  # fmt: skip
def test_a_form_is_the_module(make, channels):
    plain = make(channels).double()
    for parameter in plain.parameters():
        nn.init.normal_(parameter)
    quick = fast.on_cpu(copy.deepcopy(plain))
    assert type(quick) is not type(plain)
    assert {k: v.shape for k, v in quick.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    conv = isinstance(plain, nn.Conv1d)
    for length in (1, 2, 3, 4, 8, 12, 13)[not conv :]:  # a norm of one value is refused by both
        for batch in (1, 3):
            given = torch.randn(batch, plain.in_channels if conv else channels, length, dtype=torch.float64)
            direction = torch.randn_like(plain(given))
            for x in layouts(given):
                before = x.clone()
                # A norm of a few alike values divides by little: what errs in them grows by as much.
                close(both_ways(quick, x, direction), both_ways(plain, given, direction), 1e3 if conv else 1e5)
                assert torch.equal(x, before)  # nothing is written into what came in
    if conv:
        close([quick(given[0])], [plain(given[0])], 1e3)  # without a batch


def test_mish_is_mish():
    x = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-12, -1e-12, 1e4, -1e4])]).double()
    ours, theirs = both_ways(fast.on_cpu(nn.Mish()), x, torch.ones_like(x)), both_ways(nn.Mish(), x, torch.ones_like(x))
    # Few operations, each to half a unit, and none that cancels; e^x errs by |x| units.
    small = 8 * EPS * (1 + x.abs().clamp(max=100)) * theirs[0].abs()
    assert ((ours[0] - theirs[0]).abs() <= small + torch.finfo(torch.float64).tiny).all()
    assert ((ours[1] - theirs[1]).abs() <= 64 * EPS).all()  # torch's own cancels, x (1 - tanh^2), for x up to 20
    # In single precision the same, but for x below -88, where 1 / h overflows and the result, some 1e-37, becomes 0.
    single = fast.MishFunction.apply(x.float()).double()
    assert ((single - theirs[0]).abs() <= 1e3 * torch.finfo(torch.float32).eps * theirs[0].abs() + 1e-36).all()
    with pytest.raises(RuntimeError, match="does not require grad"):  # rather than a wrong second derivative
        (slope,) = torch.autograd.grad(fast.MishFunction.apply(x.requires_grad_()).sum(), x, create_graph=True)
        torch.autograd.grad(slope.sum(), x)


def same_function(plain: nn.Module, quick: nn.Module, length: int) -> None:
    """Of the same parameters: outputs and gradients of two denoisers."""
    assert plain.state_dict().keys() == quick.state_dict().keys()
    x, k = torch.randn(3, length, 12, dtype=torch.float64), torch.randint(1, 6, (3,))
    given = torch.randn(3, 3).double(), torch.rand(3, 1).double(), torch.ones(3, 1).double()
    for net in (plain, quick):
        net(x, k, *given).square().sum().backward()
    close([quick(x, k, *given)], [plain(x, k, *given)], 1e4)  # 25 layers
    close([p.grad for p in quick.parameters()], [p.grad for p in plain.parameters()], 1e5)


@pytest.mark.parametrize("length", [1, 8, 9])
def test_the_denoiser_is_the_same_function_of_the_same_parameters(length):
    plain = script.TemporalUNet(12, 3, 16, (1, 4)).double()
    quick = copy.deepcopy(fast.on_cpu(copy.deepcopy(plain)))  # a copy keeps its forms
    assert {type(part) for part in quick.modules()} >= {fast.Conv, fast.Norm, fast.Mish}
    same_function(plain, quick, length)


def test_what_is_not_known_is_left_alone():
    class OwnMish(nn.Mish):
        pass

    unknown = [
        OwnMish(), nn.Mish(inplace=True), nn.GroupNorm(2, 8, affine=False), nn.ReLU(), nn.ConvTranspose1d(8, 8, 4),
        *(nn.Conv1d(8, 8, 5, padding=2, **other) for other in (
            {"stride": 2}, {"dilation": 2}, {"groups": 2}, {"bias": False}, {"padding_mode": "circular"},
        )),
        nn.Conv1d(8, 8, 3, padding=1), nn.Conv1d(8, 8, 5), nn.Conv1d(8, 8, 5, padding="same"),
        nn.Conv2d(8, 8, 5, padding=2),
    ]  # fmt: skip
    before = [type(part) for part in unknown]
    assert [type(part) for part in fast.on_cpu(nn.Sequential(*unknown))] == before


def test_another_device_gets_the_plain_modules():
    parts = nn.Conv1d(8, 64, 5, padding=2), nn.GroupNorm(8, 64), nn.Mish()
    elsewhere = fast.on_cpu(nn.Sequential(*parts).to("meta"))
    assert [type(part) for part in elsewhere] == [nn.Conv1d, nn.GroupNorm, fast.Mish]  # no parameter tells
    assert elsewhere(torch.empty(2, 8, 9, device="meta")).shape == (2, 64, 9)
    moved = fast.on_cpu(nn.Sequential(nn.Conv1d(8, 64, 5, padding=2), nn.GroupNorm(8, 64), nn.Mish())).to("meta")
    assert [type(part) for part in moved] == [fast.Conv, fast.Norm, fast.Mish]
    found = moved(torch.empty(2, 8, 9, device="meta"))
    assert found.shape == (2, 64, 9) and found.is_contiguous()  # the forms would have put time first


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_denoiser_is_the_same_function():
    plain = script.TemporalUNet(12, 3, 16, (1, 2)).double()
    same_function(plain, fast.on_cpu(copy.deepcopy(plain), compiled=True), 9)
