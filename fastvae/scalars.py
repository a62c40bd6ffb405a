"""NumPy's scalars as Python's numbers."""

import operator
from typing import Any

import numpy as np
import torch


def plain(value: Any) -> Any:
    """A NumPy scalar as Python's number, also inside a tuple; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value


def is_whole(value: Any) -> bool:
    """Whether a value is a whole number, NumPy's and PyTorch's included; True and False are not."""
    if isinstance(value, bool | torch.SymInt):
        return not isinstance(value, bool)
    try:
        operator.index(value)
    except TypeError:
        return False
    return True
