"""Forms of the same step that were tried for speed: microseconds of forward and backward pass, medians, one thread.

    python benchmarks/forms.py

Convolutions of 5 taps and of stride 2, group norm and Mish on windows of L tokens, batch 64, as in the U-Net; Adam on
the parameters of two critics; the product of their hidden layers. Within a group the forms take turns.
"""

import argparse
import functools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import nn

from dawm_td3bc import TemporalConv, TemporalNorm, mish


class Shifts(nn.Module):
    """Five shifted copies side by side, then one product; x [L, B, C]."""

    def __init__(self, channels: int):
        super().__init__()
        self.linear = nn.Linear(5 * channels, channels)

    def forward(self, x):
        padded = F.pad(x, (0, 0, 0, 0, 2, 2))
        return self.linear(torch.cat([padded[tap : tap + len(x)] for tap in range(5)], dim=-1))


class Slices(TemporalConv):
    """A product for each tap, added in place to its tokens; autograd finds the backward pass."""

    def forward(self, x):
        out = x @ self.weight[2] + self.bias
        for shift in (-2, -1, 1, 2):
            if abs(shift) < len(x):
                read = slice(max(0, shift), len(x) + min(0, shift))
                out[max(0, -shift) : len(x) - max(0, shift)] += x[read] @ self.weight[shift + 2]
        return out


@functools.cache
def tap_between(length: int) -> torch.Tensor:
    """Of each pair (input token, output token) the tap that joins them, 5 where none does."""
    tap = torch.arange(length)[:, None] - torch.arange(length) + 2
    return tap.where((tap >= 0) & (tap < 5), 5).flatten()


class AllTokens(TemporalConv):
    """One product of all tokens with all tokens, its matrix put together from the taps."""

    def forward(self, x):
        length, batch, channels = x.shape
        taps = F.pad(self.weight, (0, 0, 0, 0, 0, 1))  # the sixth is 0
        blocks = taps.index_select(0, tap_between(length)).view(length, length, channels, -1)
        matrix = blocks.transpose(1, 2).reshape(length * channels, -1)
        out = torch.addmm(self.bias.repeat(length), x.transpose(0, 1).reshape(batch, -1), matrix)
        return out.view(batch, length, -1).transpose(0, 1)


class Shorten(nn.Conv1d):
    """The U-Net's convolution of stride 2 as one product, x [L, B, C]."""

    def forward(self, x):
        windows = F.pad(x, (0, 0, 0, 0, 1, 1)).unfold(0, 3, 2)
        return F.linear(windows.flatten(2), self.weight.flatten(1), self.bias)


class Strided(nn.Conv1d):
    """The same as it stands in the U-Net."""

    def forward(self, x):
        return super().forward(x.permute(1, 2, 0)).permute(2, 0, 1)


@functools.cache
def group_matrices(shape: torch.Size, groups: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    length, _, channels = shape
    spread = torch.eye(groups, dtype=dtype).repeat_interleave(channels // groups, 1)
    return spread, spread.T / (length * channels / groups)


class NormMishFunction(torch.autograd.Function):
    """Group norm and Mish in one, both passes by hand; `spread` [groups, C] is 1 where a channel is in a group.

    `average` [C, groups] sums over a group's channels and divides by its size, L channels.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, spread, average):
        centred = x - (x.sum(0) @ average) @ spread
        inverse = (centred.square().sum(0) @ average).add_(1e-5).rsqrt_() @ spread
        y = torch.addcmul(bias, centred, inverse * weight)
        root = y.clamp(max=20).exp_().add_(1)
        z = root.square().add_(1).reciprocal_().mul_(2)
        ctx.save_for_backward(centred, inverse, weight, spread, average, y, root, z)
        return torch.addcmul(y, y, z, value=-1)

    @staticmethod
    def backward(ctx, grad):
        centred, inverse, weight, spread, average, y, root, z = ctx.saved_tensors
        grad_y = (root * z).add_(z).neg_().add_(2).mul_(y).sub_(1).mul_(z).add_(1).mul_(grad)
        total, along = grad_y.sum(0), (grad_y * centred).sum(0) * inverse
        mean, slope = ((total * weight) @ average) @ spread, ((along * weight) @ average) @ spread
        grad_x = torch.addcmul(mean * -inverse, grad_y, inverse * weight)
        return grad_x.addcmul_(centred, slope * inverse.square(), value=-1), along.sum(0), total.sum(0), None, None


class NormMish(nn.GroupNorm):
    def forward(self, x):
        return NormMishFunction.apply(x, self.weight, self.bias, *group_matrices(x.shape, self.num_groups, x.dtype))


class NormThenMish(TemporalNorm):
    def forward(self, x):
        return mish(super().forward(x))


class BatchNormView(nn.GroupNorm):
    def forward(self, x):
        groups = x.reshape(len(x), -1, x.shape[2] // self.num_groups)
        groups = F.batch_norm(groups, None, None, training=True, eps=self.eps)
        return torch.addcmul(self.bias, groups.view(x.shape), self.weight)


def both_ways(function, x):
    """A call of forward and backward pass."""
    x = x.clone().requires_grad_()
    direction = torch.randn_like(function(x))

    def call():
        x.grad = None
        function(x).backward(direction)

    return call


def groups():
    """(title, {form: call}) one after another."""
    for length, channels in ((9, 32), (5, 64), (4, 128), (2, 256), (2, 1024)):
        x = torch.randn(length, 64, channels)
        usual, wide = x.permute(1, 2, 0).contiguous(), channels >= 64
        shape = f"{length} tokens, {channels} channels"
        yield (
            f"convolution, {shape}",
            {
                "nn.Conv1d": both_ways(nn.Conv1d(channels, channels, 5, padding=2), usual),
                "shifts side by side": both_ways(Shifts(channels), x),
                "all tokens to all tokens": both_ways(AllTokens(channels, channels), x),
                "taps, autograd": both_ways(Slices(channels, channels), x),
                "taps (ours)": both_ways(TemporalConv(channels, channels), x),
            },
        )
        yield (
            f"group norm, {shape}",
            {
                "nn.GroupNorm on its own layout": both_ways(nn.GroupNorm(8, channels), usual),
                "batch norm over a view" + (" (ours)" if wide else ""): both_ways(BatchNormView(8, channels), x),
                **({} if wide else {"nn.GroupNorm, permuted (ours)": both_ways(TemporalNorm(8, channels), x)}),
            },
        )
        yield f"Mish, {shape}", {"F.mish": both_ways(F.mish, x), "ours": both_ways(mish, x)}
        yield (
            f"group norm and Mish, {shape}",
            {
                "one after the other (ours)": both_ways(NormThenMish(8, channels), x),
                "in one function": both_ways(NormMish(8, channels), x),
            },
        )
        yield (
            f"convolution of stride 2, {shape}",
            {
                "nn.Conv1d, permuted (ours)": both_ways(Strided(channels, channels, 3, stride=2, padding=1), x),
                "one product": both_ways(Shorten(channels, channels, 3), x),
            },
        )
    sizes = [(256, 14), (256,), (256, 256), (256,), (1, 256), (1,)] * 2

    def adam(parameters, **kind):
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        return torch.optim.Adam(parameters, lr=1e-4, **kind).step

    def parameters():
        return [torch.randn(size, requires_grad=True) for size in sizes]

    flat = torch.randn(sum(p.numel() for p in parameters()), requires_grad=True)
    yield (
        "Adam, two critics",
        {
            "a tensor at a time": adam(parameters(), foreach=False),
            "default": adam(parameters()),
            "fused (ours)": adam(parameters(), fused=True),
            "fused, one flat tensor": adam([flat], fused=True),
        },
    )
    x, weight, bias = torch.randn(256, 256), torch.randn(2, 256, 256), torch.randn(2, 1, 256)
    yield (
        "hidden layer of two critics, forward",
        {
            "two products (ours)": lambda: [torch.addmm(b, x, w) for b, w in zip(bias, weight, strict=True)],
            "one batched product": lambda: torch.baddbmm(bias, x.expand(2, -1, -1), weight),
        },
    )
    x, weight = torch.randn(256, 1024), torch.randn(1024, 1024)
    yield (
        "product of 256 rows, 1,024 channels",
        {
            "float32 (ours)": lambda: x @ weight,
            "bfloat16": lambda half=(x.bfloat16(), weight.bfloat16()): half[0] @ half[1],
            "bfloat16, cast before and after": lambda: (x.bfloat16() @ weight.bfloat16()).float(),
        },
    )
    rows = torch.randn(200_000, 27)
    yield (
        "drawing 256 of 200,000 rows",
        {
            "rows[index]": lambda: rows[torch.randint(len(rows), (256,))],
            "index_select (ours)": lambda: rows.index_select(0, torch.randint(len(rows), (256,))),
        },
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=50)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    print("| step | form | microseconds |\n|---|---|---|")
    for title, forms in groups():
        seconds = {name: [] for name in forms}
        for _ in range(options.rounds + 3):
            for name, call in forms.items():
                start = time.perf_counter()
                call()
                seconds[name].append(time.perf_counter() - start)
        for i, (name, values) in enumerate(seconds.items()):
            print(f"| {'' if i else title} | {name} | {1e6 * statistics.median(values[3:]):,.0f} |")


if __name__ == "__main__":
    main()
