"""How a corpus reads a text, recorded in a run so that every command reads others the same way."""

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
        kind: "windows" of a stream, "lines", or the class of a corpus that only Python can make.
        normalization: what each line goes through: "none", "tweets", or the name of a function.
    """

    kind: str
    normalization: str = "none"

    @property
    def is_known(self) -> bool:
        """Whether this package can read so by itself."""
        return self.kind in (WINDOWS, LINES) and self.normalization in NORMALIZERS

    def normalized_by(self, name: str) -> Self:
        """The same with this normalization. Raises ValueError where there is none to apply."""
        if name not in NORMALIZERS:
            raise ValueError(f"no normalization {name!r}: {suggestion(name, NORMALIZERS)}")
        if self.kind == WINDOWS and name != "none":
            raise ValueError(f"windows are read as they are: normalization {name} is for lines")
        return replace(self, normalization=name)


def normalization_name(function: Callable[[str], str] | None) -> str:
    """What a function is called in a `Reading`."""
    for name, known in NORMALIZERS.items():
        if function is known:
            return name
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{getattr(function, '__module__', None) or 'builtins'}.{name}"


def normalization_source(name: str) -> str | None:
    """All the source text that decides what a normalization does; None where that is not known."""
    if name == "none":
        return ""
    return inspect.getsource(tweets) if name == "tweets" else None


def load_reading(folder: Path) -> Reading | None:
    """What a run's folder records; None where it holds no text.json, as runs made before.

    Raises ValueError where the file is not what `record_reading` wrote.
    """
    path = folder / FILE
    if not path.exists():
        return None
    match read_json(path):
        case {"kind": str(kind), "normalization": str(normalization), **more} if not more:
            return Reading(kind, normalization)
    raise ValueError(f"{path} needs exactly kind and normalization, two strings")


def save_reading(folder: Path, reading: Reading) -> None:
    """Write what `load_reading` reads."""
    write_json(folder / FILE, asdict(reading))


def record_reading(folder: Path, corpus) -> None:
    """Write how a run's corpus reads, or check it against what is there.

    Raises ValueError where the run was started with a corpus that reads otherwise. Of classes and
    functions of one's own only the ids tell whether they do, and a run checks those.
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
