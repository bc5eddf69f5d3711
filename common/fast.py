"""Plain torch modules, run faster on a CPU: the same parameters, the same state_dict, the same function.

Windows are short, so that a third to a half of what a convolution of 5 taps multiplies are zeros beyond their ends. The
convolution below leaves them out, and gives its result as a [B, C, L] view of memory in which time comes first and the
channels lie together; all that follows keeps that order.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable

LONGEST = 12  # tokens: beyond, little of what torch's own convolution multiplies is zeros


def on_cpu(module: nn.Module, compiled: bool = False) -> nn.Module:
    """`module`, in which each part that has a form below takes it, wherever its input is on a CPU.

    A part on another device, of a class of its own or with options that a form does not know stays as it is.
    `compiled`: torch.compile it too, for a GPU as CUDA graphs.
    """
    for part in module.modules():
        if any(parameter.device.type != "cpu" for parameter in part.parameters(recurse=False)):
            continue
        if type(part) is nn.Conv1d:
            usual = (part.stride, part.dilation, part.groups, part.padding_mode) == ((1,), (1,), 1, "zeros")
            if usual and part.bias is not None and (part.kernel_size, part.padding) in (((5,), (2,)), ((1,), (0,))):
                part.__class__ = Conv
        elif type(part) is nn.GroupNorm and part.affine:
            part.__class__ = Norm
        elif type(part) is nn.Mish and not part.inplace:
            part.__class__ = Mish
    if compiled:
        module.compile(mode="reduce-overhead" if torch.cuda.is_available() else "default")
    return module


def known(x: torch.Tensor) -> bool:
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


class Conv(nn.Conv1d):
    def forward(self, x):
        if not known(x) or x.dim() != 3 or x.shape[2] > LONGEST:
            return super().forward(x)
        (batch, _, length), reach = x.shape, []
        for shift in range(-self.padding[0], self.padding[0] + 1):  # from an output token to the one that a tap reads
            tokens, read, add = max(0, length - abs(shift)), max(0, shift), max(0, -shift)
            reach.append((slice(read * batch, (read + tokens) * batch), slice(add * batch, (add + tokens) * batch)))
        rows, taps = x.permute(2, 0, 1).flatten(0, 1).contiguous(), self.weight.permute(2, 0, 1).contiguous()
        return TapProducts.apply(rows, taps, self.bias, reach).view(length, batch, -1).permute(1, 2, 0)


class TapProducts(torch.autograd.Function):
    """A product for each tap: x [L * B, in], taps [5, out, in]; `reach`: the rows that each tap reads and adds to."""

    @staticmethod
    def forward(ctx, x, taps, bias, reach):
        ctx.save_for_backward(x, taps)
        ctx.reach, out = reach, x.new_empty(len(x), len(bias)).copy_(bias)
        for tap, (read, add) in zip(taps, reach, strict=True):
            out[add].addmm_(x[read], tap.T)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, taps = ctx.saved_tensors
        grad_x, grad_taps = torch.zeros_like(x), torch.empty_like(taps)
        for tap, grad_tap, (read, add) in zip(taps, grad_taps, ctx.reach, strict=True):
            grad_x[read].addmm_(grad[add], tap)
            torch.mm(grad[add].T, x[read], out=grad_tap)  # zeros where a tap reads nothing
        return grad_x, grad_taps, grad.sum(0), None


class Norm(nn.GroupNorm):
    """Of wide groups whose channels lie together it is a batch norm over a view: torch's own would move them first."""

    def forward(self, x):
        size = self.num_channels // self.num_groups
        if not known(x) or x.dim() != 3 or x.stride(1) != 1 or size < 8:
            return super().forward(x)
        x = x.permute(2, 0, 1)
        groups = F.batch_norm(x.reshape(len(x), -1, size), None, None, training=True, eps=self.eps)
        return torch.addcmul(self.bias, groups.view(x.shape), self.weight).permute(1, 2, 0)


class Mish(nn.Mish):
    def forward(self, x):
        return MishFunction.apply(x) if known(x) and not torch.compiler.is_compiling() else super().forward(x)


class MishFunction(torch.autograd.Function):
    """x tanh(ln(1 + e^x)) = x / (1 + 1 / h) with h = e^x + e^2x / 2: one transcendental where torch takes three."""

    @staticmethod
    def forward(ctx, x):
        e = x.clamp(max=40).exp_()  # beyond 40 the result is x
        ctx.save_for_backward(x, e)
        h = torch.addcmul(e, e, e, value=0.5)
        return torch.div(x, h.reciprocal_().add_(1), out=h)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        x, e = ctx.saved_tensors
        h = torch.addcmul(e, e, e, value=0.5)
        k = h + 1
        return torch.addcmul(e, e, e).div_(k).mul_(x).add_(h).div_(k).mul_(grad)
