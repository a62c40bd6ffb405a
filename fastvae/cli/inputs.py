"""What the commands read: models, files, texts on standard input."""

import codecs
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from fastvae.console import console, escape
from fastvae.device import find_device
from fastvae.models import load
from fastvae.models.text_vae import TextVAE
from fastvae.presets import READINGS, TWEETS, read_corpus
from fastvae.text import ByteVocabulary, Corpus, Reading, Vocabulary
from fastvae.text.corpus import LineCounts, normalized_lines
from fastvae.text.files import CHUNK, byte_chunks, stream_chunks
from fastvae.text.reading import LINES, NORMALIZATIONS, NORMALIZERS, WINDOWS, load_reading

STANDARD_INPUT = "standard input"


def load_model(
    folder: Path, *, best: bool = False, device: str | None = None
) -> tuple[TextVAE, Vocabulary]:
    """A folder's model in eval mode on its device, and its vocabulary. ValueError without one."""
    model, vocabulary = load(folder, best=best)
    if vocabulary is None:
        raise ValueError(f"{folder} holds no vocabulary.json, so its tokens cannot be decoded")
    return model.to(find_device(device)), vocabulary


def find_reading(
    folder: Path, model: TextVAE, kind: str | None = None, normalization: str | None = None
) -> Reading:
    """How the model's training text was read, unless `kind` or `normalization` say otherwise.

    A model without a record reads as those of the command line do that have or lack an end token.
    Raises ValueError where only Python can read as the record says.
    """
    reading = load_reading(folder)
    if reading is None:
        reading = Reading(WINDOWS) if model.end_id is None else READINGS[TWEETS]
    if kind not in (None, WINDOWS, LINES):
        raise ValueError(f"--read {kind}: text is read as {WINDOWS} or {LINES}")
    if kind not in (None, reading.kind):
        reading = Reading(kind)
    if reading.kind not in (WINDOWS, LINES):
        raise ValueError(
            f"{folder} was trained on {reading.kind}, a corpus that the command line cannot make: "
            f"say how to read with --read {WINDOWS} or --read {LINES}"
        )
    if normalization is not None:
        return reading.normalized_by(normalization)
    if reading.normalization not in NORMALIZERS:
        raise ValueError(
            f"{folder} was trained on lines that {reading.normalization} had normalized, which the "
            "command line cannot call: normalize the text with it and say --normalize none"
        )
    return reading


def open_for(model: TextVAE, vocabulary: Vocabulary, reading: Reading, path: Path) -> Corpus:
    """A file as a corpus, read as the model's training text was. ValueError for other models."""
    if reading.kind == LINES and not isinstance(vocabulary, ByteVocabulary):
        raise ValueError(
            f"{path}: windows of characters and lines of bytes can be read from a file, "
            "not lines of characters, which this model is for"
        )
    return read_corpus(path, model.length, reading, vocabulary)


def tell(notes: Iterable[str]) -> None:
    """Lines on standard error, whatever they hold."""
    for note in notes:
        console(stderr=True).print(escape(note), soft_wrap=True)


@dataclass
class LineTokens:
    """Number and tokens of lines of a file, or of standard input where `path` is None.

    Windows of L tokens take the first L of a line; `cut` counts the lines that have more. Empty
    lines and others that are too long are left out, but with `every_line` an empty line has tokens
    and one that is too long has None. With `strict`, one that is too long raises ValueError.
    Iterate once.
    """

    vocabulary: Vocabulary
    length: int
    reading: Reading
    path: Path | None = None
    strict: bool = False
    every_line: bool = False
    counts: LineCounts = field(default_factory=LineCounts)
    cut: int = 0
    first_too_long: int | None = None

    @property
    def name(self) -> str:
        return STANDARD_INPUT if self.path is None else str(self.path)

    @property
    def end_id(self) -> int | None:
        """What ends a line: windows go on until they are full."""
        return self.vocabulary.end_id if self.reading.kind == LINES else None

    @property
    def room(self) -> int:
        return self.length - (self.end_id is not None)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray | None]]:
        """Number and tokens [L] in order. Raises ValueError naming a line that has none."""
        normalize = NORMALIZERS[self.reading.normalization]
        for line in normalized_lines(self._chunks(), normalize, self.counts):
            number = self.counts.lines
            row = self.encode(line, f"line {number} of {self.name}")
            if not line:
                self.counts.empty += 1
            if row is None:
                self.counts.too_long += 1
                self.first_too_long = self.first_too_long or number
            if self.every_line or (line and row is not None):
                yield number, row
        if not self.counts.lines:
            if self.path is not None:
                raise ValueError(f"{self.path} is empty")
            raise ValueError(
                "standard input holds no text: pipe one in, or name a file with --data"
            )

    def encode(self, line: bytes, name: str) -> np.ndarray | None:
        """Tokens [L] of a text that is normalized already and that errors call `name`."""
        content = line
        if not isinstance(self.vocabulary, ByteVocabulary):
            try:  # a line of a MiB may have been cut within a character
                content, _ = codecs.utf_8_decode(line, "strict", len(line) < CHUNK)
            except UnicodeDecodeError as error:
                raise ValueError(f"{name} is not UTF-8 at byte {error.start}") from None
        if len(content) > self.room:
            if self.reading.kind == WINDOWS:
                self.cut += 1
                content = content[: self.room]
            elif self.strict:
                least = "at least " * (len(line) >= CHUNK)  # longer lines are cut there
                raise ValueError(
                    f"{name} has {least}{len(content)} {self.vocabulary.unit}s, more than the "
                    f"{self.room} that fit: {content[:40]!r}"
                )
            else:
                return None
        if isinstance(content, str):
            ids = self.vocabulary.encode_array(content, source=name)
        else:
            ids = self.vocabulary.encode_bytes(content)
        row = np.full(self.length, self.vocabulary.pad_id, np.int64)
        row[: len(ids)] = ids
        if self.end_id is not None:
            row[len(ids)] = self.end_id
        return row

    def notes(self) -> list[str]:
        """Sentences about the lines that were not read, or not as they are."""
        of, unit = f"of {self.counts.lines:,} lines", self.vocabulary.unit
        found = []
        if self.cut:
            found.append(
                f"{self.name}: {self.cut:,} {of} have more than {self.room} {unit}s: "
                f"only their first {self.room} were read"
            )
        if not self.every_line:
            return found + self._counted(self.counts)
        if self.counts.empty:
            found.append(
                f"{self.name}: {self.counts.empty:,} {of} empty: their rows are of the empty text"
            )
        if self.counts.too_long:
            found.append(
                f"{self.name}: {self.counts.too_long:,} {of} too long (over {self.room} {unit}s), "
                f"the first is line {self.first_too_long:,}: their rows are NaN"
            )
        return found + self._counted(replace(self.counts, empty=0, too_long=0))

    def _counted(self, counts: LineCounts) -> list[str]:
        unit, normalization = self.vocabulary.unit, self.reading.normalization
        return counts.notes(self.name, self.room, unit, normalization)

    def _chunks(self) -> Iterator[bytes]:
        if self.path is not None:
            return byte_chunks(self.path)
        if sys.stdin is None:
            raise ValueError("standard input is closed: name a file with --data")
        if sys.stdin.isatty():
            console(stderr=True).print("Type texts, one a line, then Ctrl-D.")
        return stream_chunks(sys.stdin.buffer, STANDARD_INPUT)


def encode_texts(
    model: TextVAE, vocabulary: Vocabulary, reading: Reading, texts: dict[str, str]
) -> Tensor:
    """Tokens [N, L] of texts by name, read as the model's training text was.

    Raises ValueError naming a text that does not fit, or that holds unknown characters.
    """
    encoder = LineTokens(vocabulary, model.length, reading, strict=True)
    normalize = NORMALIZERS[reading.normalization] or str
    rows = []
    for name, text in texts.items():
        before, read = encoder.cut, normalize(text)
        rows.append(encoder.encode(read.encode("utf-8", "surrogateescape"), name))
        if encoder.cut > before:
            tell([f"only the first {encoder.room} {vocabulary.unit}s of {name} were read"])
        if read != text:
            how = NORMALIZATIONS[reading.normalization]
            tell([f"{name} was changed by normalization ({how})"])
    return torch.from_numpy(np.stack(rows))


def in_batches(items: Iterable, size: int) -> Iterator[list]:
    """Lists of `size` items, the last one perhaps shorter."""
    items = iter(items)
    while batch := list(islice(items, size)):
        yield batch
