"""Windows of a convolution of kernel 3, stride 2 and padding 1: `linear` makes it of them."""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.autograd import register_autograd
from fastvae.ops.checks import check_fold, check_unfold
from fastvae.ops.fallback import register_fallback
from fastvae.ops.precision import accumulate_dtype


def unfold(x: Tensor) -> Tensor:
    """x [2T, B, C] -> windows [T, B, C, 3]: what each output of a strided convolution reads.

        windowsₜ = x₂ₜ₋₁, x₂ₜ, x₂ₜ₊₁,   x₋₁ = 0

    With a weight [N, C, 3] of `torch.nn.Conv1d`, of stride 2 and padding 1, the convolution is a
    linear layer of windows.flatten(2) with weight.flatten(1).

    Args:
        x: the convolution's input, [2T, B, C].

    Returns:
        the windows, [T, B, C, 3].

    Raises:
        RuntimeError: x has a wrong shape or dtype, or an odd number of steps.
    """
    if not x.numel():  # no kernel starts for nothing
        check_unfold(x, empty=True)
        return unfold_reference(x) if len(x) else x.unsqueeze(-1).expand(-1, -1, -1, 3)
    return torch.ops.fastvae.unfold(x)


def fold(windows: Tensor, bias: Tensor | None = None) -> Tensor:
    """windows [T, B, C, 3], bias [C] -> x [2T, B, C]: the transpose of `unfold`, and a bias.

        x₂ₜ = windowsₜ[1] + b,   x₂ₜ₊₁ = windowsₜ[2] + windowsₜ₊₁[0] + b,   windows_T = 0

    With a weight [K, C, 3] of `torch.nn.ConvTranspose1d`, of stride 2, padding 1 and output padding
    1, the transposed convolution folds the outputs of a linear layer with weight.flatten(1).T.

    Args:
        windows: what each input of a transposed convolution adds to three outputs, [T, B, C, 3].
        bias: b, [C], or None for none.

    Returns:
        the outputs, [2T, B, C].

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device; the message names it.
    """
    if not windows.numel():  # no kernel starts for nothing
        check_fold(windows, bias, empty=True)
        return fold_reference(windows, bias)
    return torch.ops.fastvae.fold(windows, bias)


def unfold_reference(x: Tensor) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    return F.pad(x, (0, 0, 0, 0, 1, 0)).unfold(0, 3, 2)


def fold_reference(windows: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    late, even, odd = windows.unbind(-1)
    x = torch.stack([even, odd + F.pad(late[1:], (0, 0, 0, 0, 0, 1))], 1).flatten(0, 1)
    return x if bias is None else x + bias


@torch.library.register_fake("fastvae::unfold")
def _fake_unfold(x):
    steps, B, C = check_unfold(x)
    return x.new_empty(steps // 2, B, C, 3)


@torch.library.register_fake("fastvae::fold")
def _fake_fold(windows, bias=None):
    T, B, C = check_fold(windows, bias)
    return windows.new_empty(2 * T, B, C)


def _unfold_on_any_device(x):
    check_unfold(x)
    return unfold_reference(x).contiguous()


def _fold_on_any_device(windows, bias=None):
    check_fold(windows, bias)
    return fold_reference(windows, bias)


def _unfold_setup(ctx, inputs, output):
    pass


def _unfold_backward(ctx, dwindows):
    return torch.ops.fastvae.fold(dwindows)


def _fold_setup(ctx, inputs, output):
    ctx.biased = inputs[1] is not None


def _fold_backward(ctx, dx):
    dbias = None
    if ctx.biased:  # over T in double: rounding grows with B and not with B · T
        dbias = dx.sum(1, dtype=accumulate_dtype(dx.dtype)).sum(0, dtype=torch.float64).to(dx.dtype)
    return torch.ops.fastvae.unfold(dx), dbias


register_fallback("unfold", _unfold_on_any_device)
register_fallback("fold", _fold_on_any_device)
# Each is in the other's derivative, as often as is asked.
register_autograd("unfold", _unfold_backward, _unfold_setup)
register_autograd("fold", _fold_backward, _fold_setup)
