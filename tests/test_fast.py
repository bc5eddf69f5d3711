"""common/fast.py: the faster forms are the same function, of the same parameters, and plain where they do not apply."""

import copy
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import dawm_td3bc as script
from common import fast

EPS = torch.finfo(torch.float64).eps
POINTS = torch.cat([torch.linspace(-100, 100, 4001), torch.tensor([0.0, -0.0, 1e-12, -1e-12, 1e4, -1e4])]).double()


def test_mish_is_mish():
    """Values and gradients, in units of rounding: sums of at most ten operations of relative error eps each."""
    x, grad = POINTS.clone().requires_grad_(), torch.randn(len(POINTS), dtype=torch.float64)
    plain = F.mish(x)
    (expected,) = torch.autograd.grad(plain, x, grad)
    found = fast.MishFunction.apply(x)
    (found_grad,) = torch.autograd.grad(found, x, grad)
    # Far left, where both are some e^x times x, torch's own tanh(log1p(e^x)) keeps the relative error too.
    assert ((found - plain).abs() <= 16 * EPS * (plain.abs() + x.detach().abs() * x.detach().exp().clamp(max=1))).all()
    assert ((found_grad - expected).abs() <= 64 * EPS * grad.abs() * (1 + expected.abs())).all()
    single = fast.MishFunction.apply(POINTS.float())
    assert single.isfinite().all() and (single - plain.float()).abs().max() <= 1e4 * torch.finfo(torch.float32).eps


def test_gradcheck():
    x = torch.linspace(-5, 5, 21, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fast.MishFunction.apply, x)


@pytest.mark.parametrize("length", [1, 2, 5, 9, 12])
def test_the_denoiser_is_the_same_function_of_the_same_parameters(length):
    plain = script.TemporalUNet(12, 3, 16, (1, 2)).double()
    quick = fast.on_cpu(copy.deepcopy(plain))
    assert plain.state_dict().keys() == quick.state_dict().keys() and type(plain.mish) is nn.Mish
    batch = 3
    x, k = torch.randn(batch, length, 12, dtype=torch.float64), torch.randint(1, 6, (batch,))
    given = torch.randn(batch, 3).double(), torch.rand(batch, 1).double(), torch.ones(batch, 1).double()
    for net in (plain, quick):
        net(x, k, *given).square().sum().backward()
    found = quick(x, k, *given)
    assert (found - plain(x, k, *given)).abs().max() <= 1e4 * EPS * found.abs().max()
    for a, b in zip(plain.parameters(), quick.parameters(), strict=True):
        assert (a.grad - b.grad).abs().max() <= 1e5 * EPS * (a.grad.abs().max() + 1)


def test_only_mish_changes_and_only_on_a_cpu():
    class OwnMish(nn.Mish):
        pass

    net = fast.on_cpu(nn.Sequential(nn.Conv1d(2, 2, 5), nn.GroupNorm(1, 2), nn.Mish(), OwnMish(), nn.ReLU()))
    assert [type(part) for part in net] == [nn.Conv1d, nn.GroupNorm, fast.Mish, OwnMish, nn.ReLU]
    assert type(copy.deepcopy(net)[2]) is fast.Mish
    assert net[2](torch.empty(3, device="meta")).device.type == "meta"  # not a CPU: torch's own


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_a_compiled_denoiser_is_the_same_function():
    plain = script.TemporalUNet(12, 3, 16, (1, 2))
    quick = fast.on_cpu(copy.deepcopy(plain), compiled=True)
    x, k = torch.randn(4, 9, 12), torch.randint(1, 6, (4,))
    given = torch.randn(4, 3), torch.rand(4, 1), torch.ones(4, 1)
    expected = plain(x, k, *given)
    assert (quick(x, k, *given) - expected).abs().max() <= 1e4 * torch.finfo(torch.float32).eps * expected.abs().max()
    assert quick.state_dict().keys() == plain.state_dict().keys()
