"""Words in messages: names that a person typed and that do not exist, and counted things."""

import difflib
from collections.abc import Iterable


def suggestion(name: str, known: Iterable[str]) -> str:
    """What to do instead, to end an error with: the closest of the known names, or all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, 1)
    return f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}"


def counted(count: int, noun: str) -> str:
    """Number and noun, such as "1 line" and "2,000 lines"."""
    return f"{count:,} {noun}{'s' * (count != 1)}"
