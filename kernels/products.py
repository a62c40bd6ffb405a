"""Operands as the matrix units like them: rows that begin at multiples of 16 bytes."""

from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def aligned(columns: int, dtype: torch.dtype) -> int:
    """`columns` and those past the end that make a row of 16-byte words."""
    each = 16 // dtype.itemsize
    return -(-columns // each) * each


def padded(t: Tensor) -> Tensor:
    """t [..., K] -> [..., aligned(K)], zeros past the end; t itself where it is aligned."""
    more = aligned(t.shape[-1], t.dtype) - t.shape[-1]
    return F.pad(t, (0, more)) if more else t


def joined(tensors: Iterable[Tensor]) -> Tensor:
    """Tensors -> their bytes, uint8 [·], each from a multiple of 16 on."""
    return torch.cat([padded(t.contiguous().flatten().view(torch.uint8)) for t in tensors])


def parted(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """What `joined` gave -> views of the tensors, given others of their shapes and dtypes.

    Raises RuntimeError where the bytes are not as many.
    """
    sizes = [aligned(t.nbytes, torch.uint8) for t in like]
    if sum(sizes) != len(packed):
        raise RuntimeError(
            f"packed must have {sum(sizes)} bytes, got {len(packed)}: pack these weights"
        )
    parts = zip(packed.split(sizes), like, strict=True)
    return [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in parts]


def precision() -> str:
    """How Triton multiplies float32, by torch's own switch: as numbers of 24 bits, or of 11."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
