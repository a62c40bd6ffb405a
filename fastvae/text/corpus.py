"""Corpora: random batches for training and one fixed pass, memory-mapped from a cache on disk."""

import inspect
import os
import shutil
import tempfile
import weakref
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvae.text.files import CHUNK, MappedArray, byte_chunks, lines, stored, text_chunks
from fastvae.text.vocabulary import ByteVocabulary, CharVocabulary, Vocabulary

PathLike = str | os.PathLike


class Corpus:
    """Base of all corpora: samples are rows of `length` ids of `vocabulary`."""

    vocabulary: Vocabulary
    length: int

    def batch(self, count: int, generator: torch.Generator) -> Tensor:
        """Random samples [count, L] int64, a pure function of the generator's state (CPU)."""
        raise NotImplementedError

    def batches(self, batch_size: int, limit: int | None = None) -> Iterator[Tensor]:
        """The fixed pass, or its first `limit` samples, in order: [<= batch_size, L] int64 each."""
        for name, value in (("batch_size", batch_size), ("limit", limit)):
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, not {value}")
        count = len(self) if limit is None else min(limit, len(self))
        return (
            self._samples(torch.arange(i, min(i + batch_size, count), device="cpu"))
            for i in range(0, count, batch_size)
        )

    def __len__(self) -> int:
        """Samples in the fixed pass."""
        raise NotImplementedError

    def _samples(self, index: Tensor) -> Tensor:
        """Samples of the fixed pass [n, L] at index [n]."""
        raise NotImplementedError

    def _set_length(self, length: int) -> None:
        if length < 1:
            raise ValueError(f"length must be at least 1, not {length}")
        self.length = length

    def _cache_folder(self, cache: PathLike | None) -> Path:
        if cache is not None:
            return Path(cache)
        folder = Path(tempfile.mkdtemp(prefix="fastvae-"))
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)  # at exit at the latest
        return folder


class WindowCorpus(Corpus):
    """Windows of L symbols of one stream, lines crossed, line ends ordinary symbols.

    source: a path (`.gz` is unpacked), or the text itself if it is a `str` with a newline in it
    (`from_text` takes any text). vocabulary: by default the file's characters in order of first
    appearance; a ByteVocabulary reads any file. cache: folder that keeps the ids for the next run;
    by default they go to a temporary folder. The fixed pass is the windows that follow each other
    without overlap; what is left after the last whole one is not in it.
    Raises FileNotFoundError; ValueError if the text is empty, shorter than one window, not UTF-8
    or holds a character that the given vocabulary lacks.
    """

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
        """A corpus of a text in memory."""
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
            symbols = vocabulary or CharVocabulary.from_file(path)
            dtype = np.min_scalar_type(symbols.size - 1).newbyteorder("<")
            with open(folder / "ids", "wb") as file:
                for ids in _encoded(path, symbols):
                    file.write(ids.astype(dtype).tobytes())
                if not file.tell():
                    raise ValueError(f"{path} is empty")
            return {"vocabulary": symbols.to_dict(), "dtype": dtype.str}

        settings = {"windows": vocabulary and vocabulary.to_dict()}
        locate, notes = stored(path, self._cache_folder(cache), settings, write)
        ids = MappedArray(locate("ids"), notes["dtype"])
        self._open(ids, Vocabulary.from_dict(notes["vocabulary"]), str(path))

    def _open(self, ids: np.ndarray | MappedArray, vocabulary: Vocabulary, name: str) -> None:
        if len(ids) < self.length:
            raise ValueError(
                f"{name} has {len(ids)} {vocabulary.unit}s, fewer than one window of {self.length}"
            )
        self.vocabulary, self._ids = vocabulary, ids

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
    """Lines as bytes: a sample is the line's bytes, the end symbol, pads up to L.

    Empty lines and lines of more than L - 1 bytes are left out (`left_out` counts the latter).
    normalise: applied to each line first, e.g. `normalise_tweet`; bytes that are not UTF-8 reach it
    as surrogate escapes. cache: folder that keeps lines and their index for the next run (unless
    `normalise` is not a module's own function: nothing tells lambdas and closures apart).
    Raises FileNotFoundError; ValueError if the file is empty or no line fits.
    """

    def __init__(
        self,
        path: PathLike,
        length: int,
        *,
        vocabulary: Vocabulary | None = None,
        normalise: Callable[[str], str] | None = None,
        cache: PathLike | None = None,
    ):
        self.vocabulary = ByteVocabulary() if vocabulary is None else vocabulary
        if not isinstance(self.vocabulary, ByteVocabulary):
            raise ValueError("LineCorpus reads bytes: its vocabulary must be a ByteVocabulary")
        self._set_length(length)
        path, name = Path(path), _identity(normalise)
        locate, notes = stored(
            path,
            self._cache_folder(None if normalise and name is None else cache),
            {"lines": length, "normalise": name},
            lambda folder: _write_lines(path, length - 1, normalise, folder),
        )
        self.left_out: int = notes["left_out"]
        self._bytes = MappedArray(locate("bytes"), "u1")
        self._offsets = MappedArray(locate("offsets"), "<i8")

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


def _write_lines(
    path: Path, longest: int, normalise: Callable[[str], str] | None, folder: Path
) -> dict:
    """Write the kept lines' bytes end to end, and the offsets of their ends after a 0."""
    seen = kept = left_out = position = 0
    ends = array("q", [0])
    with open(folder / "bytes", "wb") as data, open(folder / "offsets", "wb") as offsets:
        for seen, line in enumerate(lines(path), start=1):  # noqa: B007  used after the loop
            too_long = len(line) >= CHUNK
            if normalise and not too_long:
                text = normalise(line.decode("utf-8", "surrogateescape"))
                line = text.encode("utf-8", "surrogateescape")
            if too_long or len(line) > longest:
                left_out += 1
            elif line:
                kept += 1
                position += data.write(line)
                ends.append(position)
                if len(ends) >= CHUNK:
                    offsets.write(np.array(ends, "<i8").tobytes())
                    ends = array("q")
        offsets.write(np.array(ends, "<i8").tobytes())
    if not kept:
        if not left_out:
            raise ValueError(f"{path} " + ("has only empty lines" if seen else "is empty"))
        raise ValueError(
            f"{path}: no line fits the length: all {left_out} have more than {longest} bytes "
            f"(length {longest + 1} less the end symbol)"
        )
    return {"left_out": left_out}


def _identity(function: Callable | None) -> str | None:
    """Name and source text of a module's own function; None for what these do not tell apart."""
    if not inspect.isfunction(function) or "<" in function.__qualname__:
        return None
    try:
        return f"{function.__module__}.{function.__qualname__}\n{inspect.getsource(function)}"
    except OSError:  # typed in at a prompt
        return None
