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
    """Counts of a file's lines; `empty` and `too_long` lines are left out of the corpus.

    Args:
        lines: all lines.
        empty: empty lines.
        too_long: lines of more bytes than fit.
        normalized: lines changed by the normalization.
    """

    lines: int = 0
    empty: int = 0
    too_long: int = 0
    normalized: int = 0  # changed by the normalization

    def notes(self, name: str, room: int, unit: str, normalization: str) -> list[str]:
        """One sentence about lines left out and one about lines changed, if there are any.

        Args:
            name: name of the corpus.
            room: bytes of the longest line that fits.
            unit: what a token is: "byte" or "character".
            normalization: name of the normalization; see `Reading`.
        """
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
        """Set `length`; raises ValueError below 1."""
        if length < 1:
            raise ValueError(f"length must be at least 1, got {length}")
        self.length = length

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
            reads any file.
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
    """Lines as bytes: a sample is the bytes of a line, the end token, and pads up to L.

    Empty lines and lines of more than L − 1 bytes are left out; `counts` tells how many. The fixed
    pass consists of all other lines in order.

    Args:
        path: path of the file; gzip is unpacked.
        length: L, tokens of a sample.
        vocabulary: a `ByteVocabulary`; None makes one.
        normalize: function applied to each line first, such as `normalize_tweet`; bytes that are
            not UTF-8 reach it as surrogate escapes. None changes nothing.
        cache: directory that keeps lines and their index for the next run; None is a temporary one.
            Lines normalized by any function other than `normalize_tweet` are not kept, because it
            cannot be known whether the function still does the same.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, no line fits, it is of a known format that is not text, or
            the vocabulary is of another class.
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
        """Number of lines left out as too long."""
        return self._counts.too_long

    def digest(self) -> str:
        return digest(chain(_parts(self._offsets, "<i8"), _parts(self._bytes, "u1")))

    def counts(self) -> dict[str, int]:
        """Numbers of lines by name: lines, empty, too_long, normalized; see `LineCounts`."""
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
    """A file's ids, a chunk at a time -> arrays [n]."""
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
    """Chunks of bytes -> lines, normalized unless they have a MiB or more.

    Args:
        chunks: parts of a file, as `byte_chunks` gives them.
        normalize: function applied to each line, or None.
        counts: counts of lines and of changed lines, updated in place.

    Returns:
        an iterator of lines without their ends.
    """
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
    """Write the fitting lines' bytes end to end, and offsets: 0, then each line's end."""
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
