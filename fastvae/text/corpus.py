"""Corpora: random batches for training and one fixed pass, memory-mapped from a cache on disk."""

import hashlib
import operator
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvae.text.files import CHUNK, MappedArray, byte_chunks, lines, stored, text_chunks
from fastvae.text.reading import (
    LINES,
    NORMALIZATIONS,
    WINDOWS,
    Reading,
    normalization_name,
    normalization_source,
)
from fastvae.text.vocabulary import ByteVocabulary, CharVocabulary, Vocabulary

PathLike = str | os.PathLike


@dataclass
class LineCounts:
    """What became of the lines of a text; `empty` and `too_long` are those left out."""

    lines: int = 0
    empty: int = 0
    too_long: int = 0
    normalized: int = 0  # changed by the normalization

    def notes(self, name: str, room: int, unit: str, normalization: str) -> list[str]:
        """A sentence about lines left out and one about lines changed, where there are any."""
        found = []
        of = f"of {self.lines:,} lines"
        if left := self.empty + self.too_long:
            found.append(
                f"{name}: {left:,} {of} left out: {self.empty:,} empty, {self.too_long:,} too long "
                f"(over {room} {unit}s)"
            )
        if self.normalized:
            how = NORMALIZATIONS.get(normalization, normalization)
            found.append(f"{name}: {self.normalized:,} {of} changed by normalization ({how})")
        return found


class Corpus:
    """Base of all corpora: samples are rows of `length` ids of `vocabulary`.

    A corpus is a map-style dataset too: `len`, an index and pickling serve torch's DataLoader.
    """

    vocabulary: Vocabulary
    length: int
    reading: Reading | None = None
    name: str = "the text"

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """Random samples -> [count, L] int64.

        Args:
            count: how many.
            generator: on the CPU; its state alone decides what is drawn.
        """
        raise NotImplementedError

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The fixed pass in order -> [<= batch_size, L] int64 each.

        Args:
            batch_size: samples at a time.
            limit: samples in all; None the whole pass.
        """
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        count = len(self) if limit is None else min(limit, len(self))
        return (
            self._samples(torch.arange(i, min(i + batch_size, count), device="cpu"))
            for i in range(0, count, batch_size)
        )

    def __len__(self) -> int:
        """Samples in the fixed pass."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        """Sample [L] int64 of the fixed pass. Raises IndexError where there is none."""
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Samples of the fixed pass, as a DataLoader asks for them: a batch at once."""
        count = len(self)
        wanted = [operator.index(i) for i in indices]
        for i in wanted:
            if not -count <= i < count:
                raise IndexError(f"index {i} is out of range: the corpus has {count} samples")
        return list(self._samples(torch.tensor([i % count for i in wanted], device="cpu")))

    def digest(self) -> str:
        """Of all ids that samples are made of: another text has another one."""
        return digest(batch.numpy() for batch in self.batches(1024))

    def counts(self) -> dict[str, int]:
        """How much of the text the fixed pass leaves out or changes, by name."""
        return {}

    def notes(self) -> list[str]:
        """Sentences about what of the text the corpus leaves out or changes."""
        return []

    def _samples(self, index: Tensor) -> Tensor:
        """Samples of the fixed pass [n, L] at index [n]."""
        raise NotImplementedError

    def _set_length(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length

    def _cache_folder(self, cache: PathLike | None) -> Path:
        if cache is not None:
            return Path(cache)
        folder = Path(tempfile.mkdtemp(prefix="fastvae-"))
        weakref.finalize(self, _remove, folder, os.getpid())  # at exit at the latest
        return folder


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Of the arrays' bytes, one after the other."""
    found = hashlib.blake2b(digest_size=16)
    for array_ in arrays:
        found.update(np.ascontiguousarray(array_))
    return found.hexdigest()


def _parts(values, dtype: str) -> Iterator[np.ndarray]:
    """An array, or a mapped one, a MiB at a time."""
    for start in range(0, len(values), CHUNK):
        row = np.arange(start, min(start + CHUNK, len(values)))[None]  # one: see MappedArray
        yield values[row].astype(dtype)


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked worker must not remove what its parent reads
        shutil.rmtree(folder, ignore_errors=True)


class WindowCorpus(Corpus):
    """Windows of L tokens of one stream; they cross lines, and line ends are ordinary tokens.

    The fixed pass is the windows that follow each other without overlap. What remains after the
    last whole one is not in it; `counts` tells how much.

    Args:
        source: a path (gzip is unpacked), or the text itself if it is a `str` with a newline in it;
            `from_text` takes any text.
        length: L.
        vocabulary: None is the file's characters in order of first appearance; a `ByteVocabulary`
            reads any file.
        cache: directory that keeps the ids for the next run; None is a temporary one.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the text is empty, shorter than one window, not UTF-8, holds a character that
            the vocabulary lacks, or is a file of a known format that is no text.
    """

    reading = Reading(WINDOWS)

    def __init__(
        self,
        source: PathLike,
        length: int,
        *,
        vocabulary: Vocabulary | None = None,
        cache: PathLike | None = None,
    ):
        self._set_length(length)
        if isinstance(source, str) and "\n" in source:
            self._open_text(source, vocabulary)
        else:
            self._open_file(Path(source), vocabulary, cache)

    @classmethod
    def from_text(
        cls, text: str, length: int, *, vocabulary: Vocabulary | None = None
    ) -> "WindowCorpus":
        """A corpus of a text in memory.

        Args:
            text: of any length above `length`.
            length: L.
            vocabulary: None is the text's characters in order of first appearance.
        """
        corpus = cls.__new__(cls)
        corpus._set_length(length)
        corpus._open_text(text, vocabulary)
        return corpus

    def _open_text(self, text: str, vocabulary: Vocabulary | None) -> None:
        if not text:
            raise ValueError("the text is empty")
        vocabulary = vocabulary or CharVocabulary.from_text(text)
        self._open(vocabulary.encode_array(text), vocabulary, "the text")

    def _open_file(self, path: Path, vocabulary: Vocabulary | None, cache: PathLike | None) -> None:
        def write(folder: Path) -> dict:
            used = vocabulary or CharVocabulary.from_file(path)
            dtype = np.min_scalar_type(used.size - 1).newbyteorder("<")
            with open(folder / "ids", "wb") as file:
                for ids in _encoded(path, used):
                    file.write(ids.astype(dtype).tobytes())
                if not file.tell():
                    raise ValueError(f"{path} is empty")
            return {"vocabulary": used.to_dict(), "dtype": dtype.str}

        settings = {"windows": vocabulary and vocabulary.to_dict()}
        locate, notes = stored(path, self._cache_folder(cache), settings, write)
        ids = MappedArray(locate("ids"), notes["dtype"])
        self._open(ids, Vocabulary.from_dict(notes["vocabulary"]), str(path))

    def _open(self, ids: np.ndarray | MappedArray, vocabulary: Vocabulary, name: str) -> None:
        if len(ids) < self.length:
            raise ValueError(
                f"{name} has {len(ids)} {vocabulary.unit}s, fewer than one window of {self.length}"
            )
        self.vocabulary, self._ids, self.name = vocabulary, ids, name

    def digest(self) -> str:
        return digest(_parts(self._ids, "<i4"))

    def counts(self) -> dict[str, int]:
        return {f"{self.vocabulary.unit}s_left_over": len(self._ids) % self.length}

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        starts = len(self._ids) - self.length + 1
        return self._windows(torch.randint(starts, (count,), generator=generator, device="cpu"))

    def __len__(self) -> int:
        return len(self._ids) // self.length

    def _samples(self, index: Tensor) -> Tensor:
        return self._windows(index * self.length)

    def _windows(self, starts: Tensor) -> Tensor:
        index = starts.numpy()[:, None] + np.arange(self.length)
        return torch.from_numpy(self._ids[index].astype(np.int64))


class LineCorpus(Corpus):
    """Lines as bytes: a sample is the bytes of a line, the end token, and pads up to L.

    Empty lines and lines of more than L − 1 bytes are left out; `counts` tells how many.

    Args:
        path: of the file; gzip is unpacked.
        length: L.
        vocabulary: None is a `ByteVocabulary`.
        normalize: applied to each line first, such as `normalize_tweet`; bytes that are not UTF-8
            reach it as surrogate escapes.
        cache: directory that keeps lines and their index for the next run, where `normalize` is
            None or `normalize_tweet`: whether another function still does the same cannot be known.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is empty, no line fits, or it is of a known format that is no text.
    """

    def __init__(
        self,
        path: PathLike,
        length: int,
        *,
        vocabulary: Vocabulary | None = None,
        normalize: Callable[[str], str] | None = None,
        cache: PathLike | None = None,
    ):
        self.vocabulary = ByteVocabulary() if vocabulary is None else vocabulary
        if not isinstance(self.vocabulary, ByteVocabulary):
            raise ValueError("LineCorpus reads bytes: its vocabulary must be a ByteVocabulary")
        self._set_length(length)
        path = Path(path)
        self.name = str(path)
        self.reading = Reading(LINES, normalization_name(normalize))
        source = normalization_source(self.reading.normalization)
        locate, notes = stored(
            path,
            self._cache_folder(None if source is None else cache),
            {"lines": length, "normalize": source},
            lambda folder: _write_lines(path, length - 1, normalize, folder),
        )
        self._counts = LineCounts(**notes)
        self._bytes = MappedArray(locate("bytes"), "u1")
        self._offsets = MappedArray(locate("offsets"), "<i8")

    @property
    def left_out(self) -> int:
        """Lines left out as too long."""
        return self._counts.too_long

    def digest(self) -> str:
        return digest(chain(_parts(self._offsets, "<i8"), _parts(self._bytes, "u1")))

    def counts(self) -> dict[str, int]:
        return asdict(self._counts)

    def notes(self) -> list[str]:
        room, unit = self.length - 1, self.vocabulary.unit
        return self._counts.notes(self.name, room, unit, self.reading.normalization)

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        return self._samples(torch.randint(len(self), (count,), generator=generator, device="cpu"))

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def _samples(self, index: Tensor) -> Tensor:
        columns = np.arange(self.length)
        starts, ends = np.split(self._offsets[index.numpy()[:, None] + np.arange(2)], 2, axis=1)
        sizes = ends - starts
        # Columns past a line's end are overwritten below; the minimum keeps them inside the file.
        index = np.minimum(starts + columns, len(self._bytes) - 1)
        ids = self._bytes[index].astype(np.int64) + self.vocabulary.first_byte_id
        ids = np.where(columns < sizes, ids, self.vocabulary.pad_id)
        ids[columns == sizes] = self.vocabulary.end_id
        return torch.from_numpy(ids)


def _encoded(path: Path, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """Ids of the file, a chunk at a time."""
    if isinstance(vocabulary, ByteVocabulary):
        yield from map(vocabulary.encode_bytes, byte_chunks(path))
        return
    offset = 0
    for text in text_chunks(path):
        yield vocabulary.encode_array(text, offset=offset, source=str(path))
        offset += len(text)


def normalized_lines(
    chunks: Iterable[bytes], normalize: Callable[[str], str] | None, counts: LineCounts
) -> Iterator[bytes]:
    """Each line, normalized unless it is over a MiB; counts lines and those that changed."""
    for line in lines(chunks):
        counts.lines += 1
        if normalize and len(line) < CHUNK:
            text = normalize(line.decode("utf-8", "surrogateescape"))
            before, line = line, text.encode("utf-8", "surrogateescape")
            counts.normalized += line != before
        yield line


def _write_lines(
    path: Path, longest: int, normalize: Callable[[str], str] | None, folder: Path
) -> dict:
    """Write the kept lines' bytes end to end, and the offsets of their ends after a 0."""
    counts, position, ends = LineCounts(), 0, array("q", [0])
    with open(folder / "bytes", "wb") as data, open(folder / "offsets", "wb") as offsets:
        for line in normalized_lines(byte_chunks(path), normalize, counts):
            if not line:
                counts.empty += 1
            elif len(line) > longest or len(line) >= CHUNK:
                counts.too_long += 1
            else:
                position += data.write(line)
                ends.append(position)
                if len(ends) >= CHUNK:
                    offsets.write(np.array(ends, "<i8").tobytes())
                    ends = array("q")
        offsets.write(np.array(ends, "<i8").tobytes())
    if not position:
        if not counts.too_long:
            raise ValueError(f"{path} " + ("has only empty lines" if counts.lines else "is empty"))
        raise ValueError(
            f"{path}: no line fits the length: all {counts.too_long} have more than {longest} "
            f"bytes (length {longest + 1} less the end token)"
        )
    return asdict(counts)
