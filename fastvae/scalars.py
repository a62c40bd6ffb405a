"""Scalars of NumPy and PyTorch as Python's numbers."""

import operator
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """A scalar of NumPy or PyTorch as Python's, also inside a tuple; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    scalar = isinstance(value, torch.Tensor) and not value.dim()
    return value.item() if scalar or isinstance(value, np.generic) else value


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, NumPy's and PyTorch's included; True and False are not."""
    if isinstance(value, bool | torch.SymInt):
        return not isinstance(value, bool)
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
