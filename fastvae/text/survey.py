"""A pass over a file of lines: what a vocabulary, a length and a split are chosen from."""

import os
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from fastvae.text.files import CHUNK, byte_chunks, stored
from fastvae.text.lines import LineCounts, no_lines, part_of, read_texts, text_hash
from fastvae.text.reading import (
    LINES,
    TRAIN,
    VALID,
    Reading,
    normalization_name,
    normalization_source,
)
from fastvae.text.vocabulary import (
    ByteVocabulary,
    CharVocabulary,
    TokenVocabulary,
    Vocabulary,
    decode_utf8,
    splitter,
)

UNITS = "character", "byte", "token"
SHARES = 64  # of all hashes, each sorted in memory by itself


@dataclass(frozen=True)
class Survey:
    """What `survey` found out about a file of lines.

    Args:
        counts: its lines; those of a MiB are too long for any corpus.
        repeated: number of texts that occurred before.
        lengths: part ("train" and "valid", a split by hash) -> tokens of a text -> how many texts.
        vocabulary: the vocabulary of its texts, with an end token; None if no line holds a text of
            less than a MiB.
    """

    counts: LineCounts
    repeated: int
    lengths: dict[str, dict[int, int]]
    vocabulary: Vocabulary | None

    def length(self, multiple: int = 1, share: float = 0.99) -> int:
        """L that holds this share of the texts and their end token.

        Args:
            multiple: what L must be a multiple of.
            share: share of the texts that are not empty.

        Returns:
            L, the smallest such multiple.

        Raises:
            ValueError: an argument is out of range.
        """
        if not hasattr(multiple, "__index__") or multiple < 1 or not 0 < share <= 1:
            raise ValueError(
                "multiple must be a whole number of at least 1, share above 0 and at most 1, "
                f"got {multiple} and {share}"
            )
        found = sum((Counter(part) for part in self.lengths.values()), Counter())
        wanted, room = share * found.total(), 0
        for room in sorted(found):
            wanted -= found[room]
            if wanted <= 0:
                break
        return -(-(room + 1) // multiple) * multiple

    def fitting(self, length: int, part: str) -> int:
        """Number of texts of a part that fit L tokens with their end.

        Args:
            length: L.
            part: "train" or "valid".

        Returns:
            the number, counting copies.

        Raises:
            ValueError: there is no such part.
        """
        if part not in self.lengths:
            raise ValueError(f"part must be {TRAIN} or {VALID}, got {part!r}")
        return sum(count for size, count in self.lengths[part].items() if size < length)


def survey(
    path: str | os.PathLike,
    *,
    unit: str = "character",
    tokens: str | None = None,
    normalize: Callable[[str], str] | None = None,
    column: str | int | None = None,
    field: str | None = None,
    cache: str | os.PathLike | None = None,
) -> Survey:
    """Read a file of lines once: its counts, lengths and vocabulary.

    Memory is bounded by the vocabulary, whatever the size of the file.

    Args:
        path: path of the file; gzip is unpacked.
        unit: what a token is: "character", "byte", or "token", what `tokens` finds.
        tokens: a regular expression for `TokenVocabulary`; it implies "token".
        normalize: function applied to each text first, as in `LineCorpus`.
        column: column of a table that holds the texts, as in `LineCorpus`.
        field: field of JSON lines that holds the texts, as in `LineCorpus`.
        cache: directory that keeps the result for the next run; None keeps nothing.

    Returns:
        the survey. Its vocabulary has characters or tokens in order of first appearance.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file is empty, or a line is not UTF-8, lacks the column or field, or does
            not consist of the tokens; the message names it.
    """
    if unit not in UNITS or (unit == "token") > (tokens is not None):
        raise ValueError(f"unit must be character, byte, or token with tokens given, got {unit!r}")
    if tokens is not None:
        unit, _ = "token", splitter(tokens)
    path = Path(path)
    reading = Reading(
        LINES, normalization_name(normalize), None if column is None else str(column), field
    )
    source = normalization_source(reading.normalization)
    settings = {"survey": unit, "tokens": tokens, **reading.to_dict(), "normalize": source}
    if source is None:
        cache = None  # it cannot be known whether the function still does the same

    def write(folder: Path) -> dict:
        return _survey(path, reading, unit, tokens, normalize, folder)

    with TemporaryDirectory(prefix="fastvae-") as temporary:
        _, notes = stored(path, Path(cache or temporary), settings, write)
    return Survey(
        LineCounts(**notes["counts"]),
        notes["repeated"],
        {part: {int(k): v for k, v in found.items()} for part, found in notes["lengths"].items()},
        notes["vocabulary"] and Vocabulary.from_dict(notes["vocabulary"]),
    )


def _survey(
    path: Path,
    reading: Reading,
    unit: str,
    tokens: str | None,
    normalize: Callable[[str], str] | None,
    folder: Path,
) -> dict:
    """The survey as JSON values; uses the folder for hashes of the texts."""
    counts, found = LineCounts(), {TRAIN: Counter(), VALID: Counter()}
    seen: dict[str, None] = {}
    split = splitter(tokens) if unit == "token" else lambda text, source: text
    shares = [folder / f"hashes-{n}" for n in range(SHARES)]
    with ExitStack() as stack:
        files = [stack.enter_context(open(share, "wb")) for share in shares]
        texts = read_texts(byte_chunks(path), reading, normalize, counts, str(path))
        for number, line in texts:
            if not line:
                counts.empty += 1
            elif len(line) >= CHUNK:
                counts.too_long += 1
            else:
                units = line
                if unit != "byte":
                    name = f"line {number} of {path}"
                    units = split(decode_utf8(line, name), name)
                    if not seen.keys() >= (new := set(units)):
                        seen.update(dict.fromkeys(u for u in units if u in new))
                hashed = text_hash(line)
                files[hashed[0] % SHARES].write(hashed)
                found[part_of(hashed)][len(units)] += 1
    if not counts.lines:
        raise ValueError(f"{path} {no_lines(reading)}")
    texts = sum(part.total() for part in found.values())
    repeated = texts - sum(len(np.unique(np.fromfile(share, "<u8"))) for share in shares)
    for share in shares:
        share.unlink()
    vocabulary: Vocabulary | None = None
    if texts and unit == "byte":
        vocabulary = ByteVocabulary()
    elif texts and unit == "token":
        vocabulary = TokenVocabulary(seen, tokens)
    elif texts:
        vocabulary = CharVocabulary("".join(seen), end=True)
    lengths = {part: dict(sorted(sizes.items())) for part, sizes in found.items()}
    return {
        "counts": asdict(counts),
        "repeated": repeated,
        "lengths": lengths,
        "vocabulary": vocabulary and vocabulary.to_dict(),
    }


def looks_like_lines(found: Survey, longest: int) -> bool:
    """Whether a file is lines, each a text of its own, and not a stream such as a book.

    Args:
        found: the survey of the file.
        longest: the L that 99 % of the texts must fit with their end.

    Returns:
        whether there are several lines, less than 5 % of them empty, and the others so short.
    """
    lines, empty = found.counts.lines, found.counts.empty
    short = found.vocabulary and not found.counts.too_long and found.length() <= longest
    return lines > 1 and 20 * empty < lines and bool(short)
