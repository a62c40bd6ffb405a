"""The texts of a file of lines: whole lines, a column of a table, or a field of JSON lines."""

import csv
import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain

import numpy as np

from fastvae.names import counted
from fastvae.text.files import CHUNK, lines
from fastvae.text.reading import NORMALIZATIONS, TRAIN, VALID, Reading
from fastvae.text.vocabulary import OutOfVocabularyError, Vocabulary

HELD_OUT = 20  # one of so many texts is held out for validation
SEPARATORS = {"\t": "tabs", ",": "commas", ";": "semicolons"}  # of cells, the likeliest first

NumberedLines = Iterator[tuple[int, bytes]]


@dataclass
class LineCounts:
    """Counts of a file's lines; all but those that fit are left out of a corpus.

    Args:
        lines: all lines.
        empty: empty lines.
        too_long: lines of more tokens than fit.
        unknown: lines with a character or token that the vocabulary lacks.
        normalized: lines changed by the normalization.
    """

    lines: int = 0
    empty: int = 0
    too_long: int = 0
    unknown: int = 0
    normalized: int = 0

    @property
    def left_out(self) -> int:
        """Number of lines left out."""
        return self.empty + self.too_long + self.unknown

    def notes(self, name: str, room: int, unit: str, normalization: str) -> list[str]:
        """One sentence about lines left out and one about lines changed, if there are any.

        Args:
            name: name of the corpus.
            room: tokens of the longest line that fits.
            unit: what a token is: "byte", "character" or "token".
            normalization: name of the normalization; see `Reading`.
        """
        found = []
        of = f"of {self.lines:,} lines"
        if self.left_out:
            most = counted(room, unit)
            reasons = [f"{self.empty:,} empty", f"{self.too_long:,} too long (over {most})"]
            if self.unknown:
                reasons.append(f"{self.unknown:,} with {unit}s that the vocabulary lacks")
            found.append(f"{name}: {self.left_out:,} {of} left out: {', '.join(reasons)}")
        if self.normalized:
            how = NORMALIZATIONS.get(normalization, normalization)
            found.append(f"{name}: {self.normalized:,} {of} changed by normalization ({how})")
        return found


def read_texts(
    chunks: Iterable[bytes],
    reading: Reading,
    normalize: Callable[[str], str] | None,
    counts: LineCounts,
    name: str,
) -> Iterator[tuple[int, bytes]]:
    """Chunks of bytes -> number and text of each line, normalized unless it has a MiB or more.

    Args:
        chunks: parts of a file, as `byte_chunks` gives them.
        reading: its column and field say which part of a line is the text, its part which texts.
        normalize: function applied to each text, or None.
        counts: counts of the part's lines and of changed ones, updated in place.
        name: name of the file, for error messages.

    Returns:
        an iterator of numbers, from 1 on, and texts. Those of whole lines are cut after a MiB.

    Raises:
        ValueError: while iterating: a line has no such column or field; the message names it.
    """
    texts = enumerate(lines(chunks), 1)
    if reading.column is not None:
        texts = _column(texts, reading.column, name)
    elif reading.field is not None:
        texts = _field(texts, reading.field, name)
    for number, original in texts:
        text = original
        if normalize and len(text) < CHUNK:
            changed = normalize(text.decode("utf-8", "surrogateescape"))
            text = changed.encode("utf-8", "surrogateescape")
        if reading.part is None or part_of(text_hash(text)) == reading.part:
            counts.lines += 1
            counts.normalized += text != original
            yield number, text


def encode_fitting(
    vocabulary: Vocabulary, text: bytes, room: int, counts: LineCounts, name: str
) -> np.ndarray | None:
    """A text -> its ids [n], int32, or None if it does not fit, which is counted.

    Args:
        vocabulary: the vocabulary.
        text: the text, normalized.
        room: tokens that fit.
        counts: its `too_long` and `unknown` are updated in place.
        name: name of the text, for error messages.

    Raises:
        ValueError: the text is not UTF-8, or does not consist of the vocabulary's tokens.
    """
    try:
        ids = None if len(text) >= CHUNK else vocabulary.encode_bytes(text, source=name)
    except OutOfVocabularyError:
        counts.unknown += 1
        return None
    if ids is None or len(ids) > room:
        counts.too_long += 1
        return None
    return ids


def no_lines(reading: Reading) -> str:
    """What a file, or its part, is that has no lines."""
    if reading.part is not None:
        return "holds no line"
    named = reading.column is not None and not reading.column.isdigit()
    return "has no line but the one that names columns" if named else "is empty"


def text_hash(text: bytes) -> bytes:
    """A text -> 8 bytes, the same on all machines."""
    return hashlib.blake2b(text, digest_size=8).digest()


def part_of(hashed: bytes) -> str:
    """Hash of a text -> the part that all its copies belong to: "train", or "valid" for 5 %."""
    return TRAIN if int.from_bytes(hashed, "little") % HELD_OUT else VALID


def _column(texts: NumberedLines, column: str, name: str) -> NumberedLines:
    """Lines of a table -> their cells in one column; empty lines stay empty."""
    for number, text in texts:
        if text:
            break
        yield number, b""
    else:
        return
    delimiter, before = _delimiter(text), number - 1
    rows = _cells(chain([text], (text for _, text in texts)), before, delimiter, name)
    first = next(rows)
    if column.isascii() and column.isdigit() and int(column[:9]) > 0:
        index = int(column[:9]) - 1
        rows = chain([first], rows)
    elif column in first[1]:
        index = first[1].index(column)
        if (same := first[1].count(column)) > 1:
            raise ValueError(
                f"{name} has {same} columns {column!r}: give the number of one, from 1 on"
            )
    else:
        has = ", ".join(first[1])[:200]
        raise ValueError(f"{name} has no column {column!r}: its first line has {has}")
    for number, row in rows:
        # A row of one cell is one that something else separates.
        other = len(row) > len(first[1]) or len(row) == 1 < len(first[1])
        if row and (index >= len(row) or (other and delimiter != "\t")):
            wrong = f"has {len(row)} cell{'s' * (len(row) > 1)}, the first one {len(first[1])}"
            if index >= len(row):
                wrong = f"has no column {column}: it has {len(row)}"
            raise ValueError(
                f"line {number} of {name} {wrong} (separated by {SEPARATORS[delimiter]}): "
                f"{'|'.join(row)[:80]!r}"
            )
        yield number, row[index].encode("utf-8", "surrogateescape") if row else b""


def _delimiter(line: bytes) -> str:
    """A table's first line -> what separates its cells: not what is between quotes, if it can."""
    outside = re.sub(rb'"[^"]*"', b"", line)
    return next((c for part in (outside, line) for c in SEPARATORS if c.encode() in part), ",")


def _cells(
    texts: Iterable[bytes], before: int, delimiter: str, name: str
) -> Iterator[tuple[int, list[str]]]:
    """Lines after so many others -> number and cells of each row.

    Quotes are those of RFC 4180; where tabs separate, there are none.
    """
    decoded = (text.decode("utf-8", "surrogateescape") for text in texts)
    if delimiter == "\t":
        for number, text in enumerate(decoded, before + 1):
            yield number, text.split("\t") if text else []
        return
    csv.field_size_limit(max(csv.field_size_limit(), CHUNK))
    reader = csv.reader((text + "\n" for text in decoded), delimiter=delimiter, strict=True)
    number = before + 1
    try:
        for row in reader:
            yield number, row
            number = before + reader.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"the row at line {number} of {name} is not separated by {SEPARATORS[delimiter]}: "
            f"{error}"
        ) from None


def _field(texts: NumberedLines, field: str, name: str) -> NumberedLines:
    """JSON lines -> their texts in one field; empty lines stay empty."""
    for number, text in texts:
        if not text.strip():
            yield number, b""
            continue
        if len(text) >= CHUNK:
            raise ValueError(f"line {number} of {name} has more than a MiB: shorten it")
        try:
            values = json.loads(text)
        except json.JSONDecodeError as error:
            why = f"{error.msg} at character {error.pos}"
            raise ValueError(f"line {number} of {name} is not JSON: {why}") from None
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} of {name} cannot be read as JSON: {error}") from None
        if not isinstance(values, dict) or field not in values:
            has = ", ".join(map(str, values)) if isinstance(values, dict) else "no fields"
            raise ValueError(f"line {number} of {name} has no field {field!r}: it has {has[:200]}")
        value = values[field]
        if not isinstance(value, str):
            raise ValueError(
                f"line {number} of {name}: field {field!r} is {json.dumps(value)[:80]}, not a text"
            )
        try:
            yield number, value.encode()
        except UnicodeEncodeError as error:
            code = ord(value[error.start])
            raise ValueError(
                f"line {number} of {name}: field {field!r} has U+{code:04X}, half of a character"
            ) from None
