"""How a text file becomes samples, recorded in a run so that all commands read alike."""

import inspect
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Self

from fastvae.atomic_files import read_json, write_json
from fastvae.names import suggestion
from fastvae.text import tweets

FILE = "text.json"
WINDOWS, LINES = "windows", "lines"
TRAIN, VALID = "train", "valid"  # parts of lines
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
        column: the column of a tab- or comma-separated file that holds the texts: its number from
            1 on, or its name in the file's first line. None is the whole line.
        field: the field of JSON lines that holds the texts; None is the whole line.
        part: "train" or "valid": the part of a split by a hash of each text that holds out 5 %;
            None is all texts.

    Raises:
        ValueError: a normalization, column, field or part is given for windows, both column and
            field are given, or there is no such part.
    """

    kind: str
    normalization: str = "none"
    column: str | None = None
    field: str | None = None
    part: str | None = None

    def __post_init__(self) -> None:
        if self.column is not None and self.field is not None:
            raise ValueError("a file has columns or JSON fields, not both: give one of them")
        if self.part not in (None, TRAIN, VALID):
            raise ValueError(f"part must be {TRAIN}, {VALID} or None, got {self.part!r}")
        if self.kind == WINDOWS:
            if self.normalization != "none":
                raise ValueError(
                    f"windows are read as they are: normalization {self.normalization} is for lines"
                )
            if (self.column, self.field, self.part) != (None, None, None):
                raise ValueError("windows are read as they are: columns and parts are for lines")

    def to_dict(self) -> dict[str, str]:
        """The fields that are not None, by name, as JSON values."""
        return {name: value for name, value in asdict(self).items() if value is not None}

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
    values = read_json(path)
    names = [field.name for field in fields(Reading)]
    if not (
        isinstance(values, dict)
        and {"kind", "normalization"} <= values.keys() <= set(names)
        and all(isinstance(value, str) for value in values.values())
    ):
        raise ValueError(f"{path} needs kind and normalization, and takes {', '.join(names[2:])}")
    try:
        return Reading(**values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def save_reading(folder: Path, reading: Reading) -> None:
    """Write text.json, for `load_reading`.

    Args:
        folder: the run directory.
        reading: what to record.

    Raises:
        OSError: the file cannot be written.
    """
    write_json(folder / FILE, reading.to_dict())


def reading_of(corpus) -> Reading:
    """Corpus -> how it reads text; for a corpus that does not tell, the name of its class."""
    return getattr(corpus, "reading", None) or Reading(type(corpus).__name__)


def check_reading(folder: Path, corpus) -> Reading:
    """Compare how a corpus reads text with what a run recorded -> what the run recorded.

    Readings of other classes and functions are not compared: a run compares the digests of all ids
    too.

    Args:
        folder: the run directory; older runs recorded nothing.
        corpus: the corpus.

    Raises:
        ValueError: the run was started with a known reading, and the corpus has another one.
    """
    now, before = reading_of(corpus), load_reading(folder)
    if before and now != before and now.is_known and before.is_known:
        raise ValueError(
            f"{folder} was started with text read as {json.dumps(before.to_dict())}, "
            f"got {json.dumps(now.to_dict())}: read it as before, or choose another directory"
        )
    return before or now
