"""NumPy's scalars as Python's numbers."""

from typing import Any

import numpy as np


def plain(value: Any) -> Any:
    """A NumPy scalar as Python's number, also inside a tuple; anything else as it is."""
    if isinstance(value, tuple):
        return tuple(map(plain, value))
    return value.item() if isinstance(value, np.generic) else value
