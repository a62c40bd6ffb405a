"""What the commands read: models, files, texts on standard input."""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from fastvae.console import console, escape
from fastvae.device import find_device
from fastvae.models import load
from fastvae.models.text_vae import TextVAE
from fastvae.presets import TEXTS, read_corpus
from fastvae.text import ByteVocabulary, CharVocabulary, Corpus, Reading, Vocabulary
from fastvae.text.files import CHUNK, byte_chunks, stream_chunks
from fastvae.text.lines import LineCounts, encode_fitting, no_lines, read_texts
from fastvae.text.reading import (
    LINES,
    NORMALIZATIONS,
    NORMALIZERS,
    VALID,
    WINDOWS,
    load_reading,
)

STANDARD_INPUT = "standard input"


def load_model(
    folder: Path, *, best: bool = False, device: str | None = None
) -> tuple[TextVAE, Vocabulary]:
    """A folder's model in eval mode on its device, and its vocabulary. ValueError without one."""
    model, vocabulary = load(folder, best=best)
    if vocabulary is None:
        raise ValueError(f"{folder} holds no vocabulary.json, so its tokens cannot be decoded")
    for name, value in model.state_dict().items():
        if not value.isfinite().all():
            raise ValueError(f"{folder}: {name} is not finite, so the model can make no texts")
    return model.to(find_device(device)), vocabulary


def find_reading(
    folder: Path,
    model: TextVAE,
    kind: str | None = None,
    normalization: str | None = None,
    column: str | None = None,
    field: str | None = None,
    held_out: bool = False,
) -> Reading:
    """How the model's training text was read, unless an option says otherwise.

    A model without a record reads as those of the command line do that have or lack an end token.
    All texts of a file are read, or with `held_out` those that training left for validation. Raises
    ValueError where only Python can read as the record says, or where nothing was held out.
    """
    reading = load_reading(folder)
    if reading is None:
        reading = Reading(WINDOWS) if model.end_id is None else TEXTS["tweets"].reading
    if held_out and reading.part is None:
        raise ValueError(f"--held-out: {folder} was trained on all texts of its file")
    recorded = reading = replace(reading, part=VALID if held_out else None)
    if kind not in (None, WINDOWS, LINES):
        raise ValueError(f"--read {kind}: text is read as {WINDOWS} or {LINES}")
    if kind not in (None, reading.kind):
        reading = Reading(kind, part=reading.part)
    if reading.kind not in (WINDOWS, LINES):
        raise ValueError(
            f"{folder} was trained on {reading.kind}, a corpus that the command line cannot make: "
            f"say how to read with --read {WINDOWS} or --read {LINES}"
        )
    if column is not None or field is not None:
        reading = in_place(reading, column, field)
    if normalization is not None:
        reading = reading.normalized_by(normalization)
    if recorded.normalization not in NORMALIZERS:  # left to the user, see below
        recorded = replace(recorded, normalization=reading.normalization)
    if held_out and reading != recorded:
        raise ValueError(
            f"--held-out: which texts were held out depends on how {folder} read them: leave out "
            "--read, --normalize, --column and --field"
        )
    if reading.normalization not in NORMALIZERS:
        raise ValueError(
            f"{folder} was trained on lines that {reading.normalization} had normalized, which the "
            "command line cannot call: normalize the text with it and say --normalize none"
        )
    return reading


def check_is_file(data: Path | None, column: str | None, field: str | None, held_out: bool) -> None:
    """Raise ValueError for options of files where texts come from standard input."""
    if data is None and (column, field, held_out) != (None, None, False):
        raise ValueError("--column, --field and --held-out are for a file: name it with --data")


def check_not_read(option: str, out: Path, *sources: Path | None) -> None:
    """Raise ValueError where a file to be written is one that is read."""
    for source in sources:
        if source is not None and source.exists() and out.exists() and out.samefile(source):
            raise ValueError(f"{option} {out} is a file that is read: name another one")


def in_place(reading: Reading, column: str | None, field: str | None) -> Reading:
    """A reading with the column or field that hold the texts; column 0 is the whole line."""
    return replace(reading, column=None if column == "0" else column, field=field)


def open_for(model: TextVAE, vocabulary: Vocabulary, reading: Reading, path: Path) -> Corpus:
    """A file as a corpus, read as the model's training text was. ValueError for other models."""
    if reading.kind == LINES and vocabulary.end_id is None:
        raise ValueError(
            f"{shown(path)}: this model has no token that ends a line: read the text with --read "
            f"{WINDOWS}"
        )
    with regular_file(path) as file:
        return read_named(path, file, model.length, reading, vocabulary)


def shown(path: Path) -> str:
    """What a path is called in messages."""
    return STANDARD_INPUT if str(path) == "-" else str(path)


@contextmanager
def regular_file(path: Path) -> Iterator[Path]:
    """The file to read: the path, or for - a temporary copy of standard input.

    ValueErrors call that copy standard input. Raises ValueError for standard input that is closed,
    or that several processes would share, and OSError where the copy cannot be written.
    """
    if str(path) != "-":
        yield path
        return
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("several processes cannot share standard input: name a file with --data")
    with TemporaryDirectory(prefix="fastvae-") as folder:
        copy = Path(folder) / "text"
        with open(copy, "wb") as file:
            for chunk in stream_chunks(_standard_input(), STANDARD_INPUT):
                _write(file, chunk)
        try:
            yield copy
        except ValueError as error:
            raise ValueError(str(error).replace(str(copy), STANDARD_INPUT)) from error


def _write(file: BinaryIO, chunk: bytes) -> None:
    """Write to the copy of standard input; OSError says that."""
    try:
        file.write(chunk)
        file.flush()
    except OSError as error:
        raise OSError(
            f"cannot keep standard input in {gettempdir()}: {error.strerror}; name a file with "
            "--data, or set TMPDIR"
        ) from error


def read_named(path: Path, file: Path, *arguments: Any, **keywords: Any) -> Corpus:
    """`read_corpus` of the file that `regular_file(path)` gives, named after the path."""
    corpus = read_corpus(file, *arguments, **keywords)
    corpus.name = corpus.name.replace(str(file), shown(path))
    return corpus


def _standard_input() -> BinaryIO:
    """Standard input's bytes; tells a person at a terminal how to end it."""
    if sys.stdin is None:
        raise ValueError("standard input is closed: name a file with --data")
    if sys.stdin.isatty():
        console(stderr=True).print("Type texts, one a line, then Ctrl-D.")
    return sys.stdin.buffer


def tell(notes: Iterable[str]) -> None:
    """Lines on standard error, whatever they hold."""
    for note in notes:
        console(stderr=True).print(escape(note), soft_wrap=True)


@dataclass
class LineTokens:
    """Number and tokens of lines of a file, or of standard input where `path` is None.

    A file's column or field holds its texts; on standard input each line is a text, unless `path`
    is -. Windows of L tokens take the first L of a line; `cut` counts the lines that have more.
    Empty lines and others that do not fit are left out, but with `every_line` an empty line has
    tokens and one that does not fit has None. With `strict`, one that does not fit raises
    ValueError. Iterate once.
    """

    vocabulary: Vocabulary
    length: int
    reading: Reading
    path: Path | None = None
    strict: bool = False
    every_line: bool = False
    counts: LineCounts = field(default_factory=LineCounts)
    cut: int = 0
    first_without: int | None = None

    @property
    def name(self) -> str:
        return shown(self.path or Path("-"))

    @property
    def end_id(self) -> int | None:
        """What ends a line: windows go on until they are full."""
        return self.vocabulary.end_id if self.reading.kind == LINES else None

    @property
    def room(self) -> int:
        return self.length - (self.end_id is not None)

    def __iter__(self) -> Iterator[tuple[int, np.ndarray | None]]:
        """Number and tokens [L] in order. Raises ValueError naming a line that has none."""
        reading = self.reading if self.path else replace(self.reading, column=None, field=None)
        normalize = NORMALIZERS[reading.normalization]
        texts = read_texts(self._chunks(), reading, normalize, self.counts, self.name)
        for number, text in texts:
            row = self.encode(text, f"line {number} of {self.name}")
            if not text:
                self.counts.empty += 1
            if row is None:
                self.first_without = self.first_without or number
            if self.every_line or (text and row is not None):
                yield number, row
        if not self.counts.lines:
            if self.path is not None:
                raise ValueError(f"{self.name} {no_lines(reading)}")
            raise ValueError(
                "standard input holds no text: pipe one in, or name a file with --data"
            )

    def encode(self, text: bytes, name: str) -> np.ndarray | None:
        """Tokens [L] of a text that is normalized already and that errors call `name`."""
        if self.reading.kind == WINDOWS:
            ids = self._first_tokens(text, name)
        else:
            ids = self._fitting_tokens(text, name)
        if ids is None:
            return None
        row = np.full(self.length, self.vocabulary.pad_id, np.int64)
        row[: len(ids)] = ids
        if self.end_id is not None:
            row[len(ids)] = self.end_id
        return row

    def _first_tokens(self, text: bytes, name: str) -> np.ndarray:
        """Ids [≤ L] of what a window holds of a text."""
        if isinstance(self.vocabulary, ByteVocabulary):
            self.cut += len(text) > self.length
            return self.vocabulary.encode_bytes(text[: self.length])
        try:  # a line of a MiB may have been cut within a character
            characters, _ = codecs.utf_8_decode(text, "strict", len(text) < CHUNK)
        except UnicodeDecodeError as error:
            raise ValueError(f"{name} is not UTF-8 at byte {error.start}") from None
        if isinstance(self.vocabulary, CharVocabulary):  # what is cut may hold unknown ones
            self.cut += len(characters) > self.length
            return self.vocabulary.encode_array(characters[: self.length], source=name)
        ids = self.vocabulary.encode_array(characters, source=name)
        self.cut += len(ids) > self.length
        return ids[: self.length]

    def _fitting_tokens(self, text: bytes, name: str) -> np.ndarray | None:
        """Ids [< L] of a text, or None if it does not fit and this is no error."""
        if not self.strict:
            return encode_fitting(self.vocabulary, text, self.room, self.counts, name)
        if len(text) >= CHUNK and not isinstance(self.vocabulary, ByteVocabulary):
            text = text.decode("utf-8", "ignore").encode()  # it may have been cut in a character
        ids = self.vocabulary.encode_bytes(text, source=name)
        if len(ids) > self.room:
            least = "at least " * (len(text) > CHUNK - 4)  # longer lines are cut there
            raise ValueError(
                f"{name} has {least}{len(ids)} {self.vocabulary.unit}s, more than the "
                f"{self.room} that fit: {text[:40].decode('utf-8', 'replace')!r}"
            )
        return ids

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
        if self.first_without:
            unknown = f", {self.counts.unknown:,} with {unit}s that the vocabulary lacks"
            found.append(
                f"{self.name}: {self.counts.too_long:,} {of} too long (over {self.room} {unit}s)"
                + unknown * bool(self.counts.unknown)
                + f", the first is line {self.first_without:,}: their rows are NaN"
            )
        return found + self._counted(replace(self.counts, empty=0, too_long=0, unknown=0))

    def _counted(self, counts: LineCounts) -> list[str]:
        unit, normalization = self.vocabulary.unit, self.reading.normalization
        return counts.notes(self.name, self.room, unit, normalization)

    def _chunks(self) -> Iterator[bytes]:
        if self.path is not None and str(self.path) != "-":
            return byte_chunks(self.path)
        return stream_chunks(_standard_input(), STANDARD_INPUT)


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
