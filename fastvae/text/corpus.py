"""Corpora: random batches for training and one fixed pass, memory-mapped from a cache on disk."""

import hashlib
import operator
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvae.names import counted
from fastvae.text.files import CHUNK, MappedArray, byte_chunks, stored, text_chunks
from fastvae.text.lines import LineCounts, encode_fitting, no_lines, read_texts
from fastvae.text.reading import (
    LINES,
    WINDOWS,
    Reading,
    normalization_name,
    normalization_source,
)
from fastvae.text.vocabulary import ByteVocabulary, CharVocabulary, Vocabulary

PathLike = str | os.PathLike


class Corpus:
    """Base class of all corpora: samples are rows of `length` token ids of `vocabulary`.

    A corpus is also a map-style dataset: `len`, indexing and pickling work with torch's DataLoader.
    A subclass sets `vocabulary` and `length` and implements `batch`, `__len__` and `_samples`.
    """

    vocabulary: Vocabulary
    length: int
    reading: Reading | None = None
    name: str = "the text"

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """Draw random samples -> [count, L] int64.

        Args:
            count: number of samples.
            generator: random source, on the CPU; it alone determines the result.

        Returns:
            tokens, [count, L] int64, on the CPU.
        """
        raise NotImplementedError

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """Iterate over the fixed pass in order -> batches [≤ batch_size, L] int64.

        Args:
            batch_size: samples per batch.
            limit: number of samples; None is the whole pass.

        Returns:
            an iterator of tokens, int64, on the CPU.

        Raises:
            ValueError: `batch_size` or `limit` is below 1.
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
        """Number of samples in the fixed pass."""
        raise NotImplementedError

    def __getitem__(self, index: int) -> Tensor:
        """Index -> sample [L] int64 of the fixed pass.

        Raises:
            IndexError: there is no such sample.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Indices -> samples [L] int64 of the fixed pass: a batch of a DataLoader at once.

        Raises:
            IndexError: there is no such sample.
        """
        count = len(self)
        wanted = [operator.index(i) for i in indices]
        for i in wanted:
            if not -count <= i < count:
                raise IndexError(f"index {i} is out of range: the corpus has {count} samples")
        return list(self._samples(torch.tensor([i % count for i in wanted], device="cpu")))

    def digest(self) -> str:
        """Hex digest of all ids that samples are made of; a run compares it on resume."""
        return digest(batch.numpy() for batch in self.batches(1024))

    def counts(self) -> dict[str, int]:
        """Amounts of text that the fixed pass leaves out or changes, by name."""
        return {}

    def notes(self) -> list[str]:
        """Sentences about text that the corpus leaves out or changes."""
        return []

    def _samples(self, index: Tensor) -> Tensor:
        """index [n] -> samples [n, L] of the fixed pass."""
        raise NotImplementedError

    def _set_length(self, length: int) -> None:
        """Set `length`; raises ValueError unless it is a whole number of at least 1."""
        if not hasattr(length, "__index__") or length < 1:
            raise ValueError(f"length must be a whole number of at least 1, got {length!r}")
        self.length = operator.index(length)

    def _cache_folder(self, cache: PathLike | None) -> Path:
        """The given cache directory; for None a temporary one, removed with the corpus."""
        if cache is not None:
            return Path(cache)
        folder = Path(tempfile.mkdtemp(prefix="fastvae-"))
        weakref.finalize(self, _remove, folder, os.getpid())  # at exit at the latest
        return folder


def digest(arrays: Iterable[np.ndarray]) -> str:
    """Arrays -> hex digest of their bytes in sequence."""
    found = hashlib.blake2b(digest_size=16)
    for array_ in arrays:
        found.update(np.ascontiguousarray(array_))
    return found.hexdigest()


def _parts(values, dtype: str) -> Iterator[np.ndarray]:
    """An array, or a mapped one -> parts of a MiB of entries, as `dtype`."""
    for start in range(0, len(values), CHUNK):
        row = np.arange(start, min(start + CHUNK, len(values)))[None]  # one: see MappedArray
        yield values[row].astype(dtype)


def _remove(folder: Path, owner: int) -> None:
    """Remove a temporary cache, in the process that made it only."""
    if os.getpid() == owner:  # a forked worker must not remove what its parent reads
        shutil.rmtree(folder, ignore_errors=True)


class WindowCorpus(Corpus):
    """Windows of L tokens of one stream; they cross lines, and newlines are ordinary tokens.

    The fixed pass consists of consecutive windows without overlap. The rest after the last whole
    window is left out; `counts` tells its size. Random windows start anywhere.

    Args:
        source: a path (gzip is unpacked), or the text itself if it is a `str` with a newline in it;
            `from_text` takes any text.
        length: L, tokens of a window.
        vocabulary: None is the text's characters in order of first appearance; a `ByteVocabulary`
            reads any file. Other vocabularies than of characters and bytes read the file at once.
        cache: directory that keeps the ids for the next run; None is a temporary one.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the text is empty, shorter than one window or not UTF-8, has a character that
            the vocabulary lacks, or is a file of a known format that is not text.
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
        """Make a corpus of a text in memory.

        Args:
            text: at least `length` tokens.
            length: L, tokens of a window.
            vocabulary: None is the text's characters in order of first appearance.

        Returns:
            the corpus.

        Raises:
            ValueError: the text is empty, shorter than one window, or has a character that the
                vocabulary lacks.
        """
        corpus = cls.__new__(cls)
        corpus._set_length(length)
        corpus._open_text(text, vocabulary)
        return corpus

    def _open_text(self, text: str, vocabulary: Vocabulary | None) -> None:
        """Encode a text in memory."""
        if not text:
            raise ValueError("the text is empty")
        vocabulary = vocabulary or CharVocabulary.from_text(text)
        self._open(vocabulary.encode_array(text), vocabulary, "the text")

    def _open_file(self, path: Path, vocabulary: Vocabulary | None, cache: PathLike | None) -> None:
        """Encode a file into the cache, or map the ids that are cached."""

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
        """Set vocabulary, ids and name; raises ValueError for less than one window."""
        if len(ids) < self.length:
            raise ValueError(
                f"{name} has {len(ids)} {vocabulary.unit}s, fewer than one window of {self.length}"
            )
        self.vocabulary, self._ids, self.name = vocabulary, ids, name

    def digest(self) -> str:
        return digest(_parts(self._ids, "<i4"))

    def counts(self) -> dict[str, int]:
        """Size of the rest after the last whole window: {"characters_left_over": n}, or bytes."""
        return {f"{self.vocabulary.unit}s_left_over": len(self._ids) % self.length}

    def notes(self) -> list[str]:
        if not (rest := len(self._ids) % self.length):
            return []
        rest = counted(rest, self.vocabulary.unit)
        return [f"{self.name}: the last {rest} left out: they fill no window of {self.length}"]

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        starts = len(self._ids) - self.length + 1
        return self._windows(torch.randint(starts, (count,), generator=generator, device="cpu"))

    def __len__(self) -> int:
        return len(self._ids) // self.length

    def _samples(self, index: Tensor) -> Tensor:
        return self._windows(index * self.length)

    def _windows(self, starts: Tensor) -> Tensor:
        """starts [n] -> windows [n, L] int64."""
        index = starts.numpy()[:, None] + np.arange(self.length)
        return torch.from_numpy(self._ids[index].astype(np.int64))


class LineCorpus(Corpus):
    """Lines: a sample is the tokens of a line, the end token, and pads up to L.

    Empty lines, lines of more than L − 1 tokens and lines with a character or token that the
    vocabulary lacks are left out; `counts` tells how many. The fixed pass consists of all other
    lines in order.

    Args:
        path: path of the file; gzip is unpacked.
        length: L, tokens of a sample.
        vocabulary: a vocabulary with an end token, such as that of a `survey`; None is a
            `ByteVocabulary`.
        normalize: function applied to each text first, such as `normalize_tweet`; bytes that are
            not UTF-8 reach it as surrogate escapes. None changes nothing.
        column: the column of a tab- or comma-separated file that holds the texts: its number from
            1 on, or its name in the file's first line. Tabs, commas or semicolons separate,
            whichever the first line has; quotes are those of RFC 4180, where tabs do not separate.
            None is the whole line.
        field: the field of JSON lines that holds the texts; None is the whole line.
        part: "train" or "valid": only the lines of this part of a split by a hash of each text,
            which holds out 5 %; copies of a text are in the same part. None is all lines.
        cache: directory that keeps lines and their index for the next run; None is a temporary one.
            Lines normalized by any function other than `normalize_tweet` are not kept, because it
            cannot be known whether the function still does the same.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, no line fits, it is of a known format that is not text, a
            line lacks the column or field or, except for bytes, is not UTF-8, or the vocabulary has
            no end token.
    """

    def __init__(
        self,
        path: PathLike,
        length: int,
        *,
        vocabulary: Vocabulary | None = None,
        normalize: Callable[[str], str] | None = None,
        column: str | int | None = None,
        field: str | None = None,
        part: str | None = None,
        cache: PathLike | None = None,
    ):
        self.vocabulary = ByteVocabulary() if vocabulary is None else vocabulary
        if self.vocabulary.end_id is None:
            raise ValueError("lines need a vocabulary with an end token, as a survey has")
        self._set_length(length)
        path = Path(path)
        self.name = f"{path}, {part} part" if part else str(path)
        column = None if column is None else str(column)
        self.reading = Reading(LINES, normalization_name(normalize), column, field, part)
        source = normalization_source(self.reading.normalization)
        settings = {**self.reading.to_dict(), "normalize": source}
        locate, notes = stored(
            path,
            self._cache_folder(None if source is None else cache),
            {"lines": self.length, "vocabulary": self.vocabulary.to_dict(), **settings},
            lambda folder: self._write(path, normalize, folder),
        )
        self._counts = LineCounts(**notes)
        self._ids = MappedArray(locate("ids"), self._dtype)
        self._offsets = MappedArray(locate("offsets"), "<i8")

    @property
    def left_out(self) -> int:
        """Number of lines left out as too long."""
        return self._counts.too_long

    @property
    def _dtype(self) -> np.dtype:
        """What holds an id in the cache, counted from the first that stands for text."""
        return np.min_scalar_type(len(self.vocabulary.text_ids) - 1).newbyteorder("<")

    def digest(self) -> str:
        return digest(chain(_parts(self._offsets, "<i8"), _parts(self._ids, self._dtype)))

    def counts(self) -> dict[str, int]:
        """Numbers of lines by name; see `LineCounts`."""
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
        index = np.minimum(starts + columns, len(self._ids) - 1)
        ids = self._ids[index].astype(np.int64) + self.vocabulary.text_ids.start
        ids = np.where(columns < sizes, ids, self.vocabulary.pad_id)
        ids[columns == sizes] = self.vocabulary.end_id
        return torch.from_numpy(ids)

    def _write(self, path: Path, normalize: Callable[[str], str] | None, folder: Path) -> dict:
        """Write the fitting lines' ids end to end, and offsets: 0, then each line's end."""
        counts, start, room = LineCounts(), self.vocabulary.text_ids.start, self.length - 1
        position, ends = 0, array("q", [0])
        texts = read_texts(byte_chunks(path), self.reading, normalize, counts, str(path))
        with open(folder / "ids", "wb") as file, open(folder / "offsets", "wb") as offsets:
            for number, text in texts:
                if not text:
                    counts.empty += 1
                    continue
                name = f"line {number} of {path}"
                ids = encode_fitting(self.vocabulary, text, room, counts, name)
                if ids is not None:
                    file.write((ids - start).astype(self._dtype))
                    position += len(ids)
                    ends.append(position)
                    if len(ends) >= CHUNK:
                        offsets.write(np.array(ends, "<i8"))
                        ends = array("q")
            offsets.write(np.array(ends, "<i8"))
        if not position:
            raise ValueError(_why_none(counts, self.name, self.reading, room, self.vocabulary.unit))
        return asdict(counts)


def _why_none(counts: LineCounts, name: str, reading: Reading, room: int, unit: str) -> str:
    """Why a file has no line that fits."""
    if not counts.lines:
        return f"{name} {no_lines(reading)}"
    if not counts.too_long and not counts.unknown:
        return f"{name} has only empty lines"
    return (
        f"{name}: no line fits the length: all {counts.too_long:,} have more than {room} {unit}s "
        f"(length {room + 1} less the end token)"
        + f", {counts.unknown:,} have {unit}s that the vocabulary lacks"
        * bool(counts.unknown)
    ).replace("all 0 have", "none has")


def _encoded(path: Path, vocabulary: Vocabulary) -> Iterator[np.ndarray]:
    """A file's ids -> arrays [n], a chunk at a time where a token is a character or a byte."""
    if isinstance(vocabulary, ByteVocabulary):
        yield from map(vocabulary.encode_bytes, byte_chunks(path))
        return
    texts, offset = text_chunks(path), 0
    if not isinstance(vocabulary, CharVocabulary):  # a token may cross the chunks' borders
        texts = filter(None, ["".join(texts)])
    for text in texts:
        yield vocabulary.encode_array(text, offset=offset, source=str(path))
        offset += len(text)
