"""Checks of what the GPU kernels are given, where the pointers are taken, as the C++ ones make."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_shapes(**wanted: tuple[Tensor, int | tuple[int, ...]]) -> list[torch.Size]:
    """Tensors by name, each with its shape or its number of dimensions -> their shapes.

    Raises RuntimeError naming the tensor whose shape is another, or has no element.
    """
    for name, (tensor, shape) in wanted.items():
        if isinstance(shape, int):
            if tensor.dim() != shape:
                raise RuntimeError(f"{name} must have {shape} dimensions, got {list(tensor.shape)}")
        elif tensor.shape != shape:
            raise RuntimeError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
        if not tensor.numel():
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
