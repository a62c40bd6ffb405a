"""Texts to token ids and back: characters, bytes with the ids of arXiv:1702.02390, other tokens."""

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import numpy as np

from fastvae.atomic_files import read_limited, write_bytes
from fastvae.text.files import text_chunks

SURROGATES = re.compile("[\ud800-\udfff]")


class OutOfVocabularyError(ValueError):
    """A text has a character or token that the vocabulary lacks; the message gives its position."""


class Vocabulary:
    """Base class of the vocabularies: text -> token ids, and back.

    `size` is V. `text_ids` are the ids that stand for text; `pad_id`, `unk_id` and `end_id` those
    of pad, unknown and end; the last two are None where there is none. `start_id` = V and
    `dropped_id` = V + 1 exist only on a decoder's input side.
    """

    unit: str  # what one token is: "character", "byte" or "token"
    size: int
    text_ids: range
    pad_id: int
    unk_id: int | None = None
    end_id: int | None = None

    @property
    def start_id(self) -> int:
        """The decoder's input before the first token: V."""
        return self.size

    @property
    def dropped_id(self) -> int:
        """The decoder's input for a token hidden by word dropout: V + 1."""
        return self.size + 1

    def encode_array(self, text: str, *, offset: int = 0, source: str = "the text") -> np.ndarray:
        """Text -> ids [n], int32, without end token and pads.

        Args:
            text: the text to encode.
            offset: position of its first character, for error messages.
            source: name of the text, for error messages.

        Returns:
            the ids, [n] int32.

        Raises:
            OutOfVocabularyError: a character or token is not in the vocabulary.
        """
        raise NotImplementedError

    def encode_bytes(self, data: bytes, *, source: str = "the text") -> np.ndarray:
        """Bytes of a text in UTF-8 -> ids [n], int32, without end token and pads.

        Args:
            data: the bytes.
            source: name of the text, for error messages.

        Returns:
            the ids, [n] int32.

        Raises:
            ValueError: the bytes are not UTF-8.
            OutOfVocabularyError: a character or token is not in the vocabulary.
        """
        return self.encode_array(decode_utf8(data, source), source=source)

    def encode(self, text: str) -> list[int]:
        """Text -> list of ids, without end token and pads.

        Raises:
            OutOfVocabularyError: a character or token is not in the vocabulary.
        """
        return self.encode_array(text).tolist()

    def encode_sample(self, text: str, length: int) -> list[int]:
        """Text -> list of `length` ids: those of the text, the end token if there is one, pads.

        Args:
            text: the text to encode.
            length: L, tokens of a sequence.

        Returns:
            L ids.

        Raises:
            ValueError: the text is too long.
            OutOfVocabularyError: a character or token is not in the vocabulary.
        """
        ids = self.encode(text) + ([] if self.end_id is None else [self.end_id])
        if len(ids) > length:
            room = length - (self.end_id is not None)
            raise ValueError(
                f"the text has {len(ids) - length + room} {self.unit}s, more than the {room} that "
                f"fit: {text[:40]!r}"
            )
        return ids + [self.pad_id] * (length - len(ids))

    def decode(self, ids: Iterable[int]) -> str:
        """Ids -> text up to the end token, without pads.

        Raises:
            ValueError: an id is outside 0 to V − 1.
        """
        raise NotImplementedError

    def batch_decode(self, rows: Iterable[Iterable[int]]) -> list[str]:
        """Rows of ids, such as tokens [B, L] -> a text per row.

        Raises:
            ValueError: an id is outside 0 to V − 1.
        """
        return [self.decode(row) for row in rows]

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> the exact bytes up to the end token, without pads.

        Raises:
            ValueError: an id is outside 0 to V − 1.
        """
        return self.decode(ids).encode("utf-8", "surrogatepass")

    def _content(self, ids: Iterable[int]) -> list[int]:
        """Ids -> those up to the end token, without pads; ValueError if one is out of range."""
        ids = ids.tolist() if hasattr(ids, "tolist") else list(ids)
        for position, i in enumerate(ids):
            if not 0 <= i < self.size:
                raise ValueError(f"id {i} at position {position} is outside 0 .. {self.size - 1}")
        if self.end_id in ids:
            ids = ids[: ids.index(self.end_id)]
        return [i for i in ids if i != self.pad_id]

    def to_dict(self) -> dict:
        """A description for `from_dict`, as JSON values."""
        raise NotImplementedError

    @staticmethod
    def from_dict(values: dict) -> "Vocabulary":
        """Description made by `to_dict` -> vocabulary.

        Raises:
            ValueError: it is not such a description.
        """
        match values:
            case {"kind": "character", "characters": str(characters), **more} if not more:
                return CharVocabulary(characters)
            case {"kind": "character", "characters": str(characters), "end": True, **more} if (
                not more
            ):
                return CharVocabulary(characters, end=True)
            case {"kind": "byte", **more} if not more:
                return ByteVocabulary()
            case {"kind": "token", "tokens": [*tokens], "pattern": str(pattern), **more} if (
                not more
            ):
                return TokenVocabulary(tokens, pattern)
        raise ValueError(
            'not a vocabulary: its kind must be "character" (with characters), "byte" or "token" '
            "(with tokens and pattern)"
        )

    def save(self, path: str | os.PathLike) -> None:
        """Write vocabulary.json; an existing file is replaced atomically.

        Raises:
            OSError: the file cannot be written.
        """
        write_bytes(Path(path), (json.dumps(self.to_dict()) + "\n").encode("ascii"))

    @staticmethod
    def load(path: str | os.PathLike) -> "Vocabulary":
        """Read a vocabulary written by `save`.

        Raises:
            OSError: the file cannot be read.
            ValueError: the file holds something else.
        """
        try:
            return Vocabulary.from_dict(json.loads(read_limited(Path(path))))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: {error}") from error

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.to_dict() == other.to_dict()

    def __hash__(self) -> int:
        return hash(json.dumps(self.to_dict()))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.size} tokens)"


class CharVocabulary(Vocabulary):
    """Characters in a given order, then pad and perhaps an end token; no unknown token.

    Args:
        characters: n characters, ids 0 to n − 1; pad is n. Each occurs once.
        end: whether there is an end token, n + 1, as lines need it: V is n + 2 then, else n + 1.

    Raises:
        ValueError: there is no character, one occurs twice, or one is half of a surrogate pair.
    """

    unit = "character"

    def __init__(self, characters: str, *, end: bool = False):
        if not characters:
            raise ValueError("a vocabulary needs at least one character")
        if len(set(characters)) < len(characters):
            twice = next(c for c, count in Counter(characters).items() if count > 1)
            raise ValueError(f"the vocabulary has {twice!r} twice")
        if found := SURROGATES.search(characters):
            raise ValueError(
                f"the vocabulary has U+{ord(found[0]):04X}, half of a character: join pairs by "
                'text.encode("utf-16", "surrogatepass").decode("utf-16"), or read the text as bytes'
            )
        self.characters = characters
        self.text_ids = range(len(characters))
        self.pad_id = len(characters)
        self.end_id = len(characters) + 1 if end else None
        self.size = len(characters) + 1 + bool(end)
        codes = _code_points(characters)
        # One entry beyond the highest code point stands for all that come after it.
        self._ids = np.full(int(codes.max()) + 2, -1, dtype=np.int32)
        self._ids[codes] = np.arange(len(characters))

    @classmethod
    def from_text(cls, text: str) -> "CharVocabulary":
        """Text -> the vocabulary of its characters, in order of first appearance.

        Raises:
            ValueError: the text is empty or holds half of a surrogate pair.
        """
        return cls("".join(dict.fromkeys(text)))

    @classmethod
    def from_file(cls, path: str | os.PathLike) -> "CharVocabulary":
        """UTF-8 file (.gz too) -> the vocabulary of its characters, in order of first appearance.

        The file is read as a stream.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: the file is empty, not UTF-8, or of a known format that is not text.
        """
        seen: dict[str, None] = {}
        for text in text_chunks(Path(path)):
            if new := set(text).difference(seen):
                seen.update(dict.fromkeys(c for c in text if c in new))
        if not seen:
            raise ValueError(f"{path} is empty")
        return cls("".join(seen))

    def encode_array(self, text: str, *, offset: int = 0, source: str = "the text") -> np.ndarray:
        ids = self._ids[np.minimum(_code_points(text), len(self._ids) - 1)]
        if ids.size and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            character = text[position]
            raise OutOfVocabularyError(
                f"character {character!r} (U+{ord(character):04X}) at position "
                f"{offset + position} of {source} is not among the {len(self.characters)} "
                "of the vocabulary"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.characters[i] for i in self._content(ids))

    def to_dict(self) -> dict:
        end = {} if self.end_id is None else {"end": True}
        return {"kind": "character", "characters": self.characters, **end}


class ByteVocabulary(Vocabulary):
    """Pad 0, unknown 1, end 2, then the 256 bytes: V = 259. Texts are encoded as UTF-8."""

    unit = "byte"
    size, pad_id, unk_id, end_id = 259, 0, 1, 2
    first_byte_id = 3
    text_ids = range(first_byte_id, size)

    def encode_array(self, text: str, *, offset: int = 0, source: str = "the text") -> np.ndarray:
        # surrogateescape: what the command line could not decode keeps its bytes
        return self.encode_bytes(text.encode("utf-8", "surrogateescape"))

    def encode_bytes(self, data: bytes, *, source: str = "the text") -> np.ndarray:
        return np.frombuffer(data, np.uint8).astype(np.int32) + self.first_byte_id

    def decode(self, ids: Iterable[int]) -> str:
        return self.decode_bytes(ids).decode("utf-8", "replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Ids -> the exact bytes up to the end token, without pads; unknown becomes U+FFFD.

        Raises:
            ValueError: an id is outside 0 to V − 1.
        """
        first, unknown = self.first_byte_id, "\ufffd".encode()
        return b"".join(
            unknown if i == self.unk_id else bytes((i - first,)) for i in self._content(ids)
        )

    def to_dict(self) -> dict:
        return {"kind": "byte"}


class TokenVocabulary(Vocabulary):
    """Tokens that a regular expression finds, in a given order, then pad and end: V = n + 2.

    A text's matches must join to the text again; for example r"Cl|Br|." reads SMILES with atoms of
    two letters as one token each.

    Args:
        tokens: n tokens, ids 0 to n − 1; pad is n, end n + 1. Each occurs once.
        pattern: a regular expression of Python's `re`, in which . is any character; each match is a
            token.

    Raises:
        ValueError: there is no token, one is empty, occurs twice or has half of a surrogate pair,
            or the pattern is not a regular expression.
    """

    unit = "token"

    def __init__(self, tokens: Iterable[str], pattern: str):
        self.tokens = tuple(tokens)
        if not self.tokens:
            raise ValueError("a vocabulary needs at least one token")
        for token in self.tokens:
            if not isinstance(token, str) or not token or SURROGATES.search(token):
                raise ValueError(f"the vocabulary has {token!r}, not a text of characters")
        if len(set(self.tokens)) < len(self.tokens):
            twice = next(t for t, count in Counter(self.tokens).items() if count > 1)
            raise ValueError(f"the vocabulary has {twice!r} twice")
        self.pattern = pattern
        self._split = splitter(pattern)
        self._ids = {token: i for i, token in enumerate(self.tokens)}
        self.text_ids = range(len(self.tokens))
        self.pad_id, self.end_id = len(self.tokens), len(self.tokens) + 1
        self.size = len(self.tokens) + 2

    def encode_array(self, text: str, *, offset: int = 0, source: str = "the text") -> np.ndarray:
        found = self._split(text, source)
        ids = np.array([self._ids.get(token, -1) for token in found], np.int32)
        if ids.size and ids.min() < 0:
            position = int(np.argmax(ids < 0))
            raise OutOfVocabularyError(
                f"token {found[position]!r} at position {offset + position} of {source} is not "
                f"among the {len(self.tokens)} of the vocabulary"
            )
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        return "".join(self.tokens[i] for i in self._content(ids))

    def to_dict(self) -> dict:
        return {"kind": "token", "tokens": list(self.tokens), "pattern": self.pattern}


def splitter(pattern: str) -> Callable[[str, str], list[str]]:
    """Regular expression -> a function: a text and its name for messages -> the text's tokens.

    The function raises ValueError where the matches do not join to the text.

    Raises:
        ValueError: the pattern is not a regular expression.
    """
    if not isinstance(pattern, str) or not pattern:
        raise ValueError(f"a regular expression that finds tokens is needed, got {pattern!r}")
    try:
        compiled = re.compile(pattern, re.DOTALL)
    except (re.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from None

    return partial(_split, compiled)


def _split(compiled: re.Pattern[str], text: str, source: str) -> list[str]:
    """A text and its name for messages -> its tokens; ValueError if they do not join to it."""
    tokens = [match[0] for match in compiled.finditer(text) if match[0]]
    if (joined := "".join(tokens)) != text:
        raise ValueError(
            f"{source}: the matches of {compiled.pattern!r} join to {joined[:80]!r}, not to the "
            f"text {text[:80]!r}: extend the expression, for instance by |."
        )
    return tokens


def decode_utf8(data: bytes, source: str) -> str:
    """Bytes -> text; ValueError names the source and the first byte that is not UTF-8."""
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{source} is not UTF-8 at byte {error.start} ({error.reason}): "
            "convert it, or read it as bytes"
        ) from None


def _code_points(text: str) -> np.ndarray:
    """Text -> code points [n], uint32."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
