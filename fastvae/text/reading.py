"""How a text file becomes samples, recorded in a run so that all commands read alike."""

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from fastvae.atomic_files import read_json, write_json
from fastvae.names import suggestion
from fastvae.text import tweets

FILE = "text.json"
WINDOWS, LINES = "windows", "lines"
NORMALIZATIONS = {"tweets": "tweets: links become url, @handles @userid"}
NORMALIZERS: dict[str, Callable[[str], str] | None] = {
    "none": None,
    "tweets": tweets.normalize_tweet,
}


@dataclass(frozen=True)
class Reading:
    """How a text becomes samples.

    Args:
        kind: "windows" of a stream, "lines", or the class name of a corpus made in Python.
        normalization: what each line goes through: "none", "tweets", or the name of a Python
            function.
    """

    kind: str
    normalization: str = "none"

    @property
    def is_known(self) -> bool:
        """Whether this package can read text this way without code of the user."""
        return self.kind in (WINDOWS, LINES) and self.normalization in NORMALIZERS

    def normalized_by(self, name: str) -> Self:
        """Name of a normalization -> the same reading with this normalization.

        Raises:
            ValueError: the normalization is unknown, or windows are to be normalized.
        """
        if name not in NORMALIZERS:
            raise ValueError(f"no normalization {name!r}: {suggestion(name, NORMALIZERS)}")
        if self.kind == WINDOWS and name != "none":
            raise ValueError(f"windows are read as they are: normalization {name} is for lines")
        return replace(self, normalization=name)


def normalization_name(function: Callable[[str], str] | None) -> str:
    """Function -> its name in a `Reading`: "none", "tweets", or "module.function"."""
    for name, known in NORMALIZERS.items():
        if function is known:
            return name
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None) or 'builtins'}.{name}"


def normalization_source(name: str) -> str | None:
    """Name -> source text that determines the normalization, for cache keys; None if unknown."""
    if name == "none":
        return ""
    return inspect.getsource(tweets) if name == "tweets" else None


def load_reading(folder: Path) -> Reading | None:
    """Run directory -> the recorded reading, or None without a text.json, as in older runs.

    Raises:
        ValueError: the file is not a text.json.
    """
    path = folder / FILE
    if not path.exists():
        return None
    match read_json(path):
        case {"kind": str(kind), "normalization": str(normalization), **more} if not more:
            if kind == WINDOWS and normalization != "none":
                raise ValueError(f"{path}: windows are read as they are, not by {normalization}")
            return Reading(kind, normalization)
    raise ValueError(f"{path} needs exactly kind and normalization, two strings")


def save_reading(folder: Path, reading: Reading) -> None:
    """Write text.json, for `load_reading`.

    Args:
        folder: the run directory.
        reading: what to record.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(folder / FILE, asdict(reading))


def record_reading(folder: Path, corpus) -> None:
    """Record how a run's corpus reads text, or compare it with what is recorded.

    Readings of other classes and functions are not compared: a run compares the digests of all ids
    too.

    Args:
        folder: the run directory.
        corpus: the corpus; without a `reading`, the name of its class is recorded.

    Raises:
        ValueError: the run was started with a known reading, and the corpus has another one.
    """
    now = getattr(corpus, "reading", None) or Reading(type(corpus).__name__)
    before = load_reading(folder)
    if before is None:
        save_reading(folder, now)
    elif now != before and now.is_known and before.is_known:
        raise ValueError(
            f"{folder} was started with text read as {json.dumps(asdict(before))}, "
            f"got {json.dumps(asdict(now))}: read it as before, or choose another directory"
        )
