"""Checks of what the GPU kernels are given, where the pointers are taken, as the C++ ones make."""

import torch
from torch import Tensor

from fastvae.ops.precision import accumulate_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shapes(
    *, empty: bool = False, **wanted: tuple[Tensor, int | tuple[int, ...]]
) -> list[torch.Size]:
    """Tensors by name, each with its shape or its number of dimensions -> their shapes.

    Raises RuntimeError naming the tensor whose shape is another, or unless `empty` has no element.
    """
    for name, (tensor, shape) in wanted.items():
        if isinstance(shape, int):
            if tensor.dim() != shape:
                raise RuntimeError(f"{name} must have {shape} dimensions, got {list(tensor.shape)}")
        elif tensor.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if not (tensor.numel() or empty):
            raise RuntimeError(f"{name} must have no empty dimension")
    return [tensor.shape for tensor, _ in wanted.values()]


def check_like(tensors: dict[str, Tensor]) -> None:
    """Raises RuntimeError unless all have the dtype and device of the first, and a known dtype."""
    first, like = next(iter(tensors.items()))
    if like.dtype not in DTYPES:
        raise RuntimeError(f"{first} must have dtype float32, bfloat16, float16 or float64")
    for name, tensor in tensors.items():
        if tensor.dtype != like.dtype:
            raise RuntimeError(f"{name} must have the dtype of {first}")
        if tensor.device != like.device:
            raise RuntimeError(f"{name} must be on the device of {first}")


def check_wide(tensors: dict[str, Tensor], like: Tensor) -> None:
    """Raises RuntimeError unless all have the dtype of the sums of `like`, and its device."""
    wide = accumulate_dtype(like.dtype)
    for name, tensor in tensors.items():
        if tensor.dtype != wide:
            raise RuntimeError(f"{name} must have dtype {str(wide).removeprefix('torch.')}")
        if tensor.device != like.device:
            raise RuntimeError(f"{name} must be on the device of the other tensors")


def check_decode(
    features: Tensor,
    feature_weight: Tensor,
    symbol_rows: Tensor,
    *,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    noise: Tensor | None,
    end_id: int,
    pad_id: int,
    hidden: int,
    gates: int,
    **layers: Tensor,
) -> tuple[int, int, int]:
    """What every decoder is given -> T, B, V. Raises RuntimeError naming what is wrong.

    The classifier reads [hidden], the inputs are [gates · hidden]. Of `layers`, its weights by
    name, dtypes and devices are checked here, shapes are not.
    """
    weights = {"feature_weight": feature_weight, "symbol_rows": symbol_rows, **layers}
    weights |= {"classifier_weight": classifier_weight, "classifier_bias": classifier_bias}
    check_like({"features": features, **weights})
    ((T, B, D),) = check_shapes(empty=True, features=(features, 3))
    if not T * B:
        raise RuntimeError("features must have at least one step and one sequence")
    ((V, _),) = check_shapes(classifier_weight=(classifier_weight, 2))
    width = gates * hidden
    check_shapes(classifier_weight=(classifier_weight, (V, hidden)))
    check_shapes(symbol_rows=(symbol_rows, (V + 1, width)), classifier_bias=(classifier_bias, (V,)))
    check_shapes(empty=True, feature_weight=(feature_weight, (width, D)))
    if noise is not None:
        check_wide({"noise": noise}, features)
        check_shapes(noise=(noise, (T, B, V)))
    if end_id >= V:
        raise RuntimeError(f"end_id must be below V = {V}")
    if end_id >= 0 > pad_id:
        raise RuntimeError("pad_id must be given where end_id is")
    return T, B, V
