"""Operands as the matrix units like them: rows that begin at multiples of 16 bytes."""

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


def precision() -> str:
    """How Triton multiplies float32, by torch's own switch: as numbers of 24 bits, or of 11."""
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
