"""Plain torch modules, run faster on a CPU: the same parameters, the same state_dict, the same function."""

import torch
from torch import nn
from torch.autograd.function import once_differentiable


def on_cpu(module: nn.Module, compiled: bool = False) -> nn.Module:
    """`module`, in which each nn.Mish takes the form below wherever its input is on a CPU; nothing else changes.

    `compiled`: torch.compile it too, for a GPU as CUDA graphs.
    """
    for part in module.modules():
        if type(part) is nn.Mish:
            part.__class__ = Mish
    if compiled:
        module.compile(mode="reduce-overhead" if torch.cuda.is_available() else "default")
    return module


class Mish(nn.Mish):
    def forward(self, x):
        plain = x.device.type != "cpu" or torch.compiler.is_compiling()
        return super().forward(x) if plain else MishFunction.apply(x)


class MishFunction(torch.autograd.Function):
    """x tanh(ln(1 + e^x)) = x / (1 + 1 / h) with h = e^x + e^2x / 2: one transcendental where torch takes three.

    It is a quarter of a denoiser's time in torch's own form (docs/speed.md).
    """

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
