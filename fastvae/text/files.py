"""Reading text files as a stream; what was read is kept in a cache and memory-mapped from there."""

import codecs
import gzip
import hashlib
import json
import mmap
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np

CHUNK = 1 << 20  # bytes read at once
FORMAT = 1  # of the cache's files: part of every key
RESIDENT = 128 << 20  # bytes of a mapped file that may stay in this process's memory
ROWS_AT_ONCE = 64  # from a larger file: a page fault may map as much as 2 MiB around a row


@contextmanager
def reading(path: Path) -> Iterator[BinaryIO]:
    """The file's bytes, unpacked if its name ends in .gz.

    Raises FileNotFoundError, or ValueError if it is no regular file or a damaged gzip file.
    """
    check_exists(path)
    with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        try:
            yield file
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged gzip file: {error}") from error


def check_exists(path: Path) -> None:
    """Raises FileNotFoundError or ValueError unless path is a regular file."""
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")


def byte_chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, a MiB at a time."""
    with reading(path) as file:
        while chunk := file.read(CHUNK):
            yield chunk


def text_chunks(path: Path) -> Iterator[str]:
    """The file's characters, line ends untouched. Raises ValueError naming the first bad byte."""
    offset, pending = 0, b""
    for chunk in chain(byte_chunks(path), [b""]):  # b"" comes last: nothing may be pending then
        data = pending + chunk
        try:
            text, used = codecs.utf_8_decode(data, "strict", not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {offset + error.start} ({error.reason}): "
                "convert it, or read it as bytes"
            ) from None
        offset, pending = offset + used, data[used:]
        if text:
            yield text


def lines(path: Path) -> Iterator[bytes]:
    """The file's lines without their ends (\\n or \\r\\n); a line of over a MiB is cut there."""
    with reading(path) as file:
        starts = True
        while line := file.readline(CHUNK):
            if starts:
                yield line.removesuffix(b"\n").removesuffix(b"\r")
            starts = line.endswith(b"\n")


def stored(
    path: Path, cache: Path, settings: dict, write: Callable[[Path], dict]
) -> tuple[Callable[[str], Path], dict]:
    """What `write(folder)` makes of the file at `path`: a function name -> its file, and its notes.

    `write` puts files into the folder and returns JSON-able notes about them. Both are reused while
    the source (path, size, time of change) and the settings stay as they are. Several processes may
    do this at once: each file appears whole, the notes last, and all of them write the same bytes.
    """
    check_exists(path)
    status = path.stat()
    source = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    key = json.dumps([FORMAT, source, settings], sort_keys=True)
    stem = f"{path.name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def locate(name: str) -> Path:
        return cache / f"{stem}.{name}"

    notes = _read_notes(locate)
    if notes is None:
        cache.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix="partial-", dir=cache) as partial:
            folder = Path(partial)
            notes = write(folder)
            sizes = {file.name: file.stat().st_size for file in folder.iterdir()}
            (folder / "json").write_text(json.dumps({"notes": notes, "sizes": sizes}))
            for name in (*sizes, "json"):
                os.replace(folder / name, locate(name))
    return locate, notes


def _read_notes(locate: Callable[[str], Path]) -> dict | None:
    try:
        content = json.loads(locate("json").read_text())
        whole = all(locate(n).stat().st_size == size for n, size in content["sizes"].items())
    except (OSError, ValueError, KeyError):
        return None
    return content["notes"] if whole else None


class MappedArray:
    """A file of numbers, read by index arrays [n, ...]; the memory that it takes stays bounded.

    The pages of a large file are let go of after every few rows, or random reads would in time map
    all of it into this process. They stay in the system's cache as long as it has room.
    """

    def __init__(self, path: Path, dtype: str):
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._values = np.frombuffer(self._map, dtype)
        self._drops = len(self._map) > RESIDENT and hasattr(mmap, "MADV_DONTNEED")

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        if not self._drops:
            return self._values[index]
        values = np.empty(index.shape, self._values.dtype)
        for i in range(0, len(index), ROWS_AT_ONCE):
            values[i : i + ROWS_AT_ONCE] = self._values[index[i : i + ROWS_AT_ONCE]]
            self._map.madvise(mmap.MADV_DONTNEED)
        return values
