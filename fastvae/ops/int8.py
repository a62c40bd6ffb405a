"""Products of weights and activations rounded to 8-bit integers, with a scale for each row.

    x ≈ s q,   q = round(x / s) in [−127, 127],   s = max |x| / 127 of the row
    W x ≈ s_w s_x (q_w · q_x)                     the product in brackets is exact

A finite number loses at most s / 2; a NaN or an infinity makes all products with its row NaN.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.precision import accumulate_dtype

# Numbers of a row: their products fit in an int32, and so do 128 times the weights, which the CPU
# kernels subtract, because they multiply by unsigned bytes.
WIDEST = (2**31 - 1) // (127 * 128)


def check_int8(int8: bool, **weights: Tensor) -> None:
    """Raise RuntimeError if a row of these weights is too wide for exact products."""
    for name, weight in weights.items() if int8 else ():
        if weight.dim() and weight.shape[-1] > WIDEST:
            raise RuntimeError(
                f"{name} has rows of {weight.shape[-1]}, more than the {WIDEST} whose products "
                "are exact as int8: use int8=False"
            )


def round_rows(x: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """x [..., K] -> q [..., K] in float64, s [..., 1] in the dtype that x accumulates in.

    With a fixed `scale`, q is clipped, and s is NaN where the row has one.
    """
    x = x.to(accumulate_dtype(x.dtype))
    if scale is None:
        zero = x.new_zeros(*x.shape[:-1], 1)
        largest = torch.cat([x.abs(), zero], -1).amax(-1, keepdim=True)
        scales = (largest / 127).clamp_min(torch.finfo(x.dtype).tiny)
        divisor = scales
    else:
        divisor = torch.full_like(x[..., :1], scale)
        scales = divisor.masked_fill(x.isnan().any(-1, keepdim=True), torch.nan)
    return (x / divisor).clamp(-127, 127).nan_to_num(0.0).round().double(), scales


def float_linear(weight: Tensor, bias: Tensor | None = None, **_) -> Callable[[Tensor], Tensor]:
    """`torch.nn.functional.linear` of weight [N, K] and bias [N], as a function of x [..., K]."""
    return lambda x: F.linear(x, weight, bias)


def int8_linear(
    weight: Tensor, bias: Tensor | None = None, *, scale: float | None = None
) -> Callable[[Tensor], Tensor]:
    """The same with weight and x rounded, x by `scale` where it is given; the result is upcast."""
    w, w_scale = round_rows(weight)

    def product(x: Tensor) -> Tensor:
        q, x_scale = round_rows(x, scale)
        y = F.linear(q, w).to(x_scale.dtype) * (w_scale.squeeze(-1) * x_scale)
        return y if bias is None else y + bias

    return product
