"""Files of short lines: vocabularies, columns, fields, tokens, the split, what train chooses."""

import hashlib
import io
import json
import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import PROGRAM

from fastvae.cli.plan import plan_training
from fastvae.metrics import evaluate
from fastvae.models import load
from fastvae.names import counted
from fastvae.presets import PRESETS
from fastvae.text import (
    ByteVocabulary,
    CharVocabulary,
    LineCorpus,
    OutOfVocabularyError,
    TokenVocabulary,
    Vocabulary,
    normalize_tweet,
    survey,
)
from fastvae.text.files import unchanged
from fastvae.text.lines import LineCounts, part_of, text_hash
from fastvae.text.survey import Survey, looks_like_lines

pytestmark = pytest.mark.usefixtures("no_power_cuts")
NAMES = [
    f"{a}{b}{c}" for a in "BDKLMNPRST" for b in ("a", "é", "ou") for c in ("na", "rik", "", "ß")
]
TINY = [
    *("--steps=2", "--batch-size=4", "--latent-size=3", "--encoder-channels=4,4"),
    *("--hidden-size=8", "--feature-channels=4", "--sample-every=0"),
]


@pytest.fixture
def names(tmp_path):
    path = tmp_path / "names.txt"
    path.write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    return path


def texts(corpus):
    return [corpus.vocabulary.decode(row) for batch in corpus.batches(7) for row in batch.tolist()]


def assert_same_weights(*folders):
    one, other = (load(folder)[0].state_dict() for folder in folders)
    assert all(torch.equal(one[name], other[name]) for name in one.keys() | other.keys())


# Vocabularies


def test_characters_with_an_end():
    vocabulary = CharVocabulary("ab", end=True)
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.end_id) == (4, 2, 3)
    assert vocabulary.encode_sample("ba", 5) == [1, 0, 3, 2, 2]
    assert vocabulary.decode([1, 0, 3, 0, 0]) == "ba"
    assert Vocabulary.from_dict(vocabulary.to_dict()) == vocabulary != CharVocabulary("ab")
    assert CharVocabulary("ab").to_dict() == {"kind": "character", "characters": "ab"}


def test_tokens_of_a_regular_expression(tmp_path):
    vocabulary = TokenVocabulary(["Cl", "C", "Br"], "Cl|Br|.")
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.end_id) == (5, 3, 4)
    assert vocabulary.encode("CClBrC") == [1, 0, 2, 1]
    assert vocabulary.decode([1, 0, 2, 4, 3]) == "CClBr"
    vocabulary.save(tmp_path / "vocabulary.json")
    again = Vocabulary.load(tmp_path / "vocabulary.json")
    assert again == vocabulary and again.encode("ClC") == [0, 1]
    with pytest.raises(OutOfVocabularyError, match=r"token 'N' at position 1 of the text"):
        vocabulary.encode("CN")
    with pytest.raises(ValueError, match=r"join to 'CC', not to the text 'C C'"):
        TokenVocabulary(["C"], "C").encode("C C")


def test_vocabularies_and_their_corpora_pickle(tmp_path):
    path = tmp_path / "lines"
    path.write_text("ClC\nBr\n")
    for vocabulary in (survey(path).vocabulary, survey(path, tokens="Cl|Br|.").vocabulary):
        again = pickle.loads(pickle.dumps(vocabulary))
        assert again == vocabulary and again.encode("ClC") == vocabulary.encode("ClC")
        corpus = LineCorpus(path, 8, vocabulary=vocabulary, cache=tmp_path / "cache")
        assert texts(pickle.loads(pickle.dumps(corpus))) == ["ClC", "Br"]


def test_any_character_is_a_line_break_too():
    assert TokenVocabulary(["a", "\n"], ".").encode("a\na") == [0, 1, 0]


@pytest.mark.parametrize(
    ("tokens", "pattern", "message"),
    [
        ([], ".", "at least one token"),
        (["a", "a"], ".", "'a' twice"),
        (["a", ""], ".", "has ''"),
        (["\ud800"], ".", "not a text of characters"),
        (["a\ud800"], ".", "not a text of characters"),
        (["a"], "(", "is not a regular expression: missing"),
        (["a"], "", "a regular expression that finds tokens is needed, got ''"),
        (["a"], b"a", "a regular expression that finds tokens is needed, got b'a'"),
        (["a"], "a{99999999999999999999}", "is not a regular expression"),
    ],
)
def test_no_token_vocabulary(tokens, pattern, message):
    with pytest.raises(ValueError, match=message):
        TokenVocabulary(tokens, pattern)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "token", "tokens": ["a", 1], "pattern": "."},
        {"kind": "token", "tokens": ["a", ["b"]], "pattern": "."},
        {"kind": "token", "tokens": "ab", "pattern": "."},
        {"kind": "token", "tokens": ["a"]},
        {"kind": "token", "tokens": ["a"], "pattern": ".", "flags": "i"},
        {"kind": "byte", "end": True},
        {"kind": "character", "characters": "a", "end": True, "pad": 0},
        {"kind": "character", "characters": "a", "end": False},
        {"kind": "character", "characters": "a", "end": 1.5},
    ],
    ids=str,
)
def test_descriptions_that_are_no_vocabulary(values):
    with pytest.raises(ValueError, match="vocabulary"):
        Vocabulary.from_dict(values)


# The survey


def test_survey_counts(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes("ab\n\nbé\r\nab\nabcdefgh\n".encode())
    found = survey(path)
    assert (found.counts.lines, found.counts.empty, found.repeated) == (5, 1, 1)
    assert found.vocabulary == CharVocabulary("abécdefgh", end=True)
    sizes = Counter({2: 3, 8: 1})
    assert sum(map(Counter, found.lengths.values()), Counter()) == sizes
    assert [found.length(share=s) for s in (0.5, 0.75, 0.76, 1.0)] == [3, 3, 9, 9]
    assert found.length(4, share=0.75) == 4 and found.length(4) == 12
    in_bytes = survey(path, unit="byte")
    assert in_bytes.vocabulary == ByteVocabulary()
    assert sum(map(Counter, in_bytes.lengths.values()), Counter()) == {2: 2, 3: 1, 8: 1}
    in_tokens = survey(path, tokens="[a-c]+|.")
    assert survey(path, unit="token", tokens="[a-c]+|.") == in_tokens
    assert in_tokens.vocabulary.tokens == ("ab", "b", "é", "abc", "d", "e", "f", "g", "h")


@pytest.mark.parametrize(
    ("lengths", "empty", "too_long", "whether"),
    [
        ({3: 2}, 0, 0, True),
        ({3: 1}, 0, 0, False),  # a single line
        ({3: 19}, 1, 0, False),  # 5 % are empty
        ({3: 20}, 1, 0, True),
        ({3: 20}, 0, 1, False),
        ({7: 2}, 0, 0, True),  # 8 tokens with its end
        ({8: 2}, 0, 0, False),
        ({3: 99, 8: 1}, 0, 0, True),  # 1 % may be longer
        ({3: 98, 8: 2}, 0, 0, False),
        ({}, 2, 0, False),
    ],
)
def test_when_a_file_is_lines(lengths, empty, too_long, whether):
    count = sum(lengths.values()) + empty + too_long
    found = Survey(
        LineCounts(lines=count, empty=empty, too_long=too_long),
        repeated=0,
        lengths={"train": lengths, "valid": {}},
        vocabulary=ByteVocabulary() if lengths else None,
    )
    assert looks_like_lines(found, 8) == whether


def test_counted_things():
    assert [counted(n, "line") for n in (0, 1, 2, 2000)] == [
        "0 lines", "1 line", "2 lines", "2,000 lines"
    ]  # fmt: skip


def test_survey_of_wrong_arguments(names):
    found = survey(names)
    wrong = {"multiple": 0}, {"multiple": 2.5}, {"share": 2}, {"share": float("nan")}, {"share": 0}
    for arguments in wrong:
        with pytest.raises(
            ValueError, match="multiple must be a whole number of at least 1, share"
        ):
            found.length(**arguments)
    with pytest.raises(ValueError, match="part must be train or valid, got 'test'"):
        found.fitting(8, "test")
    for arguments in ({"unit": "word"}, {"unit": "token"}, {"tokens": b"."}):
        with pytest.raises(ValueError, match=r"unit must be|regular expression"):
            survey(names, **arguments)
    for length in (0, 8.5, "8", None):
        with pytest.raises(ValueError, match="length must be a whole number of at least 1"):
            LineCorpus(names, length)


def test_survey_counts_repeats(tmp_path):
    """Copies far apart, and more texts than shares of their hashes."""
    path, cache = tmp_path / "lines", tmp_path / "cache"
    path.write_text("".join(f"{n % 700}\n" for n in range(1000)))
    assert survey(path, cache=cache).repeated == 300
    assert len(list(cache.iterdir())) == 1  # no hashes are left


def test_survey_of_a_changed_normalization_is_not_kept(names, tmp_path):
    cache = tmp_path / "cache"
    assert "B" in survey(names, cache=cache).vocabulary.characters
    assert "B" not in survey(names, cache=cache, normalize=str.lower).vocabulary.characters
    assert len(list(cache.glob("*.json"))) == 1
    assert survey(names, cache=cache).vocabulary == survey(names).vocabulary


def test_a_file_that_changes_while_it_is_read(names, tmp_path):
    def meddle(text):
        if text == NAMES[0]:
            with open(names, "a", encoding="utf-8") as file:
                file.write("more\n")
        return text

    for cache in (None, tmp_path / "cache"):
        with pytest.raises(ValueError, match=r"names.txt changed while it was read"):
            survey(names, normalize=meddle, cache=cache)
        with pytest.raises(ValueError, match=r"names.txt changed while it was read"):
            LineCorpus(names, 8, normalize=meddle, cache=cache)
    with unchanged(names):
        pass


# Corpora of any vocabulary


def test_lines_of_characters(names):
    vocabulary = survey(names).vocabulary
    corpus = LineCorpus(names, 8, vocabulary=vocabulary)
    assert texts(corpus) == NAMES
    row = corpus[NAMES.index("Béß")].tolist()
    ids = [vocabulary.characters.index(c) for c in "Béß"]
    assert row == [*ids, vocabulary.end_id, *[vocabulary.pad_id] * 4]
    assert set(texts(corpus)) >= {
        vocabulary.decode(r) for r in corpus.batch(9, torch.Generator().manual_seed(1))
    }


def test_a_vocabulary_of_many_characters(tmp_path):
    """More than 256 of them need two bytes each in the cache."""
    path = tmp_path / "lines"
    lines = [chr(0x4E00 + n) + chr(0x4E00 + 399 - n) for n in range(400)]
    path.write_text("\n".join(lines), encoding="utf-8")
    corpus = LineCorpus(path, 4, vocabulary=survey(path).vocabulary, cache=tmp_path / "cache")
    assert texts(corpus) == lines
    assert (
        texts(LineCorpus(path, 4, vocabulary=corpus.vocabulary, cache=tmp_path / "cache")) == lines
    )


def test_other_vocabularies_do_not_share_a_cache(names, tmp_path):
    cache, first = tmp_path / "cache", survey(names).vocabulary
    other = CharVocabulary(first.characters[::-1], end=True)
    for vocabulary in (first, other, ByteVocabulary()):
        assert texts(LineCorpus(names, 9, vocabulary=vocabulary, cache=cache)) == NAMES


def test_lines_with_unknown_characters_are_left_out_and_told(tmp_path):
    path = tmp_path / "lines"
    path.write_text("ab\nxb\nba\nabab\n")
    corpus = LineCorpus(path, 4, vocabulary=CharVocabulary("ab", end=True))
    assert texts(corpus) == ["ab", "ba"]
    assert corpus.counts() == {
        **{"lines": 4, "empty": 0, "too_long": 1, "unknown": 1},
        "normalized": 0,
    }
    assert corpus.notes() == [
        f"{path}: 2 of 4 lines left out: 0 empty, 1 too long (over 3 characters), "
        "1 with characters that the vocabulary lacks"
    ]
    with pytest.raises(ValueError, match=r"no line fits the length: none has more .*, 4"):
        LineCorpus(path, 4, vocabulary=CharVocabulary("x", end=True))


def test_lines_of_characters_must_be_utf8(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"ok\nfa\xe7ade\n")
    with pytest.raises(ValueError, match=r"line 2 of .*lines is not UTF-8 at byte 2"):
        survey(path)
    with pytest.raises(ValueError, match=r"line 2 of .*lines is not UTF-8 at byte 2"):
        LineCorpus(path, 8, vocabulary=CharVocabulary("okfade", end=True))
    assert len(LineCorpus(path, 8)) == 2


# Columns and fields


@pytest.mark.parametrize(
    ("content", "column", "expected"),
    [
        ("a\tx y\nb\t\nc\tz\n", 2, ["x y", "z"]),
        ('"a"\tx\nb,c\ty\n', 1, ['"a"', "b,c"]),
        ("name\tn\nAda\t1\nBob\t2\n", "name", ["Ada", "Bob"]),
        ('n,name\n1,"Paris, Texas"\n2,"say ""hi"""\n', "name", ["Paris, Texas", 'say "hi"']),
        ('1,"two\nlines"\n2,one\n', 2, ["two\nlines", "one"]),
        ("a,1\n\nb,2\n", 1, ["a", "b"]),
        ("just one\n", 1, ["just one"]),
        ("name;n\nAda, Lady;1\n", "name", ["Ada, Lady"]),
        ("\n\na\tb\n", 2, ["b"]),
        ("n,name\n1," + "x" * 200_000 + "\n2,y\n", "name", ["y"]),
    ],
)
def test_columns(tmp_path, content, column, expected):
    path = tmp_path / "table"
    path.write_text(content)
    corpus = LineCorpus(path, 16, column=column)
    assert texts(corpus) == expected
    assert survey(path, column=column).counts.lines == corpus.counts()["lines"]


def test_fields(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"t": "a\\u00e9", "n": 1}\n\n{"n": 2, "t": "b\\nc"}\n')
    corpus = LineCorpus(path, 8, field="t")
    assert texts(corpus) == ["aé", "b\nc"] and corpus.counts()["empty"] == 1


def test_what_is_quoted_separates_nothing(tmp_path):
    path = tmp_path / "table"
    for content, expected in (
        ('"a\tb";c\n"mira";1\n', ["a\tb", "mira"]),
        ('"a, b";c\n"mira";1\n', ["a, b", "mira"]),
        ('12" a\tc\nmira\t1\n', ['12" a', "mira"]),
    ):
        path.write_text(content)
        assert texts(LineCorpus(path, 8, column=1)) == expected


@pytest.mark.parametrize(
    ("content", "where", "message"),
    [
        (
            "a\tb\nc\n",
            {"column": 2},
            r"line 2 of .* has no column 2: it has 1 \(separated by tabs\): 'c'",
        ),
        ("a,b\n", {"column": 3}, r"line 1 of .* has no column 3: it has 2 \(separated by commas\)"),
        ("a,b\n", {"column": "c"}, r"has no column 'c': its first line has a, b"),
        ("a,b\n", {"column": "-1"}, r"has no column '-1'"),
        ("a,b,a\n1,2,3\n", {"column": "a"}, r"has 2 columns 'a': give the number of one"),
        (
            "n,cc\nSmith, J,DE\n",
            {"column": "cc"},
            r"line 2 of .* has 3 cells, the first one 2",
        ),
        (
            "name;price, EUR\nnamo;1\n",  # commas come first
            {"column": 1},
            r"line 2 of .* has 1 cell, the first one 2 \(separated by commas\): 'namo;1'",
        ),
        ("a\tb\n", {"column": "2" * 5000}, r"line 1 of .* has no column 2222"),
        ("name\n", {"column": "name"}, r"has no line but the one that names columns"),
        ('{"a": "' + "x" * 2**20 + '"}\n', {"field": "a"}, r"line 1 of .* has more than a MiB"),
        ('a,"b"c\n', {"column": 1}, r"row at line 1 of .* is not separated by commas"),
        (
            'a,"b\nc\n',
            {"column": 1},
            r"row at line 1 of .* by commas: unexpected end",
        ),
        ("{}\n", {"field": "t"}, r"line 1 of .* has no field 't': it has "),
        ('{"a": 1}\n{"b": 2}\n', {"field": "a"}, r"line 1 of .*: field 'a' is 1, not a text"),
        ('{"a": "x"}\n{"b": 2}\n', {"field": "a"}, r"line 2 of .* has no field 'a': it has b"),
        ("[1]\n", {"field": "a"}, r"no field 'a': it has no fields"),
        ("no json\n", {"field": "a"}, r"line 1 of .* is not JSON"),
        ("[" * 99999 + "\n", {"field": "a"}, r"line 1 of .* cannot be read as JSON"),
        ("{}x\n", {"field": "a"}, r"line 1 of .* is not JSON: Extra data at character 2"),
        ('{"a": "\\ud800"}\n', {"field": "a"}, r"field 'a' has U\+D800, half of a character"),
        ("a,b\n", {"column": 1, "field": "a"}, "columns or JSON fields, not both"),
    ],
)
def test_tables_that_lack_the_text(tmp_path, content, where, message):
    path = tmp_path / "table"
    path.write_text(content)
    for read in (lambda: LineCorpus(path, 8, **where), lambda: survey(path, **where)):
        with pytest.raises(ValueError, match=message):
            read()


def test_line_numbers_are_those_of_the_file(tmp_path):
    """Below a line that names columns, and after texts of two lines."""
    path = tmp_path / "table.csv"
    path.write_bytes(b'name,n\n"a\nb",1\nfa\xe7ade,2\n')
    with pytest.raises(ValueError, match=r"line 4 of .*table.csv is not UTF-8 at byte 2"):
        survey(path, column="name")
    path.write_bytes(b'name,n\n"a\nb",1\nok\n')
    with pytest.raises(ValueError, match=r"line 4 of .*table.csv has no column n: it has 1"):
        survey(path, column="n")


# The split


def test_a_hash_holds_out_texts(tmp_path):
    """By the first 8 bytes of BLAKE2b as a little-endian number: multiples of 20 are held out."""
    path = tmp_path / "lines"
    lines = [str(n % 900) for n in range(1000)]
    path.write_text("\n".join(lines))

    def is_held_out(text):
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % 20 == 0

    parts = {part: LineCorpus(path, 8, part=part) for part in ("train", "valid")}
    assert texts(parts["valid"]) == [line for line in lines if is_held_out(line)]
    assert texts(parts["train"]) == [line for line in lines if not is_held_out(line)]
    assert 30 < len(parts["valid"]) < 70
    found = survey(path)
    assert found.fitting(8, "valid") == len(parts["valid"])
    assert found.fitting(3, "valid") == len([x for x in texts(parts["valid"]) if len(x) < 3])
    assert sum(corpus.counts()["lines"] for corpus in parts.values()) == 1000


def test_copies_stay_on_one_side_after_normalization(tmp_path):
    path = tmp_path / "lines"
    path.write_text("".join(f"@user{n} says {n % 50}\n" for n in range(500)))
    parts = [
        set(texts(LineCorpus(path, 32, normalize=normalize_tweet, part=part)))
        for part in ("train", "valid")
    ]
    assert parts[0] and parts[1] and not parts[0] & parts[1]


def test_no_other_part(names):
    with pytest.raises(ValueError, match="part must be train, valid or None, got 'test'"):
        LineCorpus(names, 8, part="test")


# What train chooses


@pytest.mark.parametrize("option", ["--column=2", "--column=name", "--field=name"])
def test_train_says_what_of_a_line_is_the_text(option, tmp_path, fastvae):
    rows = [("id", "name"), *((str(n), f"text {n}") for n in range(40))]
    table = "".join("\t".join(row) + "\n" for row in rows)
    if option.startswith("--field"):
        table = "".join(json.dumps({"name": name}) + "\n" for _, name in rows)
    file = tmp_path / "table"
    file.write_text(table)
    steps = "--steps=1", "--batch-size=4", "--sample-every=0"
    status, _, err = fastvae("train", "--data", file, option, "--out", tmp_path / "run", *steps)
    assert status == 0
    source = option.removeprefix("--").replace("=", " ")
    assert err.startswith(f"{file}: read as lines ({source} of each line is a text), length 8 ")


def test_train_with_data_and_out_alone(names, tmp_path, fastvae):
    out = tmp_path / "run"
    steps = "--steps=2", "--sample-every=0", "--batch-size=4"
    status, shown, err = fastvae("train", "--data", names, "--out", out, *steps, "--json")
    assert status == 0
    said = err.splitlines()
    assert said[0] == (
        f"{names}: read as lines (each line is a text), length 8 characters: 120 of 120 "
        "lines fit, 0 repeat an earlier one"
    )
    held_out = len(LineCorpus(names, 8, part="valid"))
    assert said[1].startswith(f"{held_out} lines held out for validation, by a hash of each. To")
    model, vocabulary = load(out)
    assert model.length == 8 and model.mask_pad and vocabulary == survey(names).vocabulary
    size = sum(p.numel() for p in PRESETS["lines"].model_for(vocabulary, 8).parameters())
    assert size == sum(p.numel() for p in model.parameters())
    latent = json.loads(shown)["latent"]
    assert latent["reconstruction_texts"] == held_out and latent["kl"] >= 0
    text = json.loads(shown)["text"]
    assert text["part"] == "train" and text["valid"]["lines"] == held_out
    assert json.loads((out / "text.json").read_text())["kind"] == "lines"


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ("\n".join(NAMES), "lines"),
        ("\n".join(f"line {n}" for n in range(99)) + "\n" * 4, "lines"),
        ("\n\n".join(NAMES), "windows"),  # half of the lines are empty
        ("\n".join(["word " * 40] * 9), "windows"),
        ("one long line " * 99, "windows"),
    ],
)
def test_lines_are_told_from_streams(tmp_path, fastvae, content, kind):
    path, out = tmp_path / "text", tmp_path / "run"
    path.write_text(content, encoding="utf-8")
    status, _, err = fastvae("train", "--data", path, "--out", out, *TINY)
    assert status == 0 and f"{path}: read as {kind} (" in err
    assert json.loads((out / "text.json").read_text())["kind"] == kind
    assert ("held out" in err) == (kind == "lines")


@pytest.mark.parametrize(
    ("options", "kind", "unit", "length"),
    [
        (("--text", "lines"), "lines", "character", 8),
        (("--text", "byte-lines"), "lines", "byte", 8),
        (("--text", "windows"), "windows", "character", 48),
        (("--preset", "lines", "--length", "12"), "lines", "character", 12),
        (("--preset", "small"), "windows", "character", 48),
        (("--text", "tweets"), "lines", "byte", 8),
        (("--tokens", "ou|."), "lines", "token", 8),
    ],
)
def test_what_options_choose(names, tmp_path, fastvae, options, kind, unit, length):
    out = tmp_path / "run"
    status, _, err = fastvae("train", "--data", names, "--out", out, *TINY, *options)
    assert status == 0, err
    model, vocabulary = load(out)
    assert (vocabulary.unit, model.length) == (unit, length)
    assert json.loads((out / "text.json").read_text())["kind"] == kind


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--text", "words"), "no text 'words': there are lines, byte-lines"),
        (("--text", "windows", "--column", "1"), "windows are read as they are"),
        (("--text", "windows", "--preset", "lines"), "give --length"),
        (("--text", "windows", "--tokens", "."), "--tokens is for lines of characters"),
        (("--text", "byte-lines", "--tokens", "."), "--tokens is for lines of characters"),
        (("--tokens", "("), "is not a regular expression"),
        (
            ("--tokens", "[A-Z]|[a-z]"),
            "line 4 of {data}: the matches of '[A-Z]|[a-z]' join to 'Ba'",
        ),
        (("--column", "2"), "line 1 of {data} has no column 2"),
        (("--field", "name"), "line 1 of {data} is not JSON"),
        (("--text", "lines", "--length", "1"), "no line fits the length"),
        (("--column", "1", "--length", "0"), "length must be a whole number of at least 1, got 0"),
        (("--tokens", ""), "a regular expression that finds tokens is needed, got ''"),
        (("--text", ""), "no text ''"),
    ],
)
def test_options_that_do_not_fit(names, tmp_path, fastvae, options, message):
    out = tmp_path / "run"
    status, _, err = fastvae("train", "--data", names, "--out", out, *TINY, *options)
    assert status == 2 and message.format(data=names) in err and err.count("\n") == 1
    assert not out.exists()  # no copy of the text is left either


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\n\n\n", "all lines are empty"),
        (b"\xef\xbb\xbf", "is empty"),
        (b"ok\nfa\xe7ade\n", "line 2 of {data} is not UTF-8 at byte 2"),
    ],
)
def test_files_without_lines(tmp_path, fastvae, content, message):
    path = tmp_path / "text"
    path.write_bytes(content)
    command = "train", "--data", path, "--out", tmp_path / "run", "--text", "lines", *TINY
    status, _, err = fastvae(*command)
    assert status == 2 and message.format(data=path) in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "content",
    [
        b"one line\n",
        b"same\n" * 50,
        b"\xef\xbb\xbfone\r\ntwo\r\n",
        b"one\rtwo\r",
        b"a\0b\ncd",
        b"one\ntwo" + b"x" * 200,
    ],
    ids=["one", "equal", "CRLF", "CR", "NUL", "no last end"],
)
def test_odd_files_of_lines_train(tmp_path, fastvae, content):
    path = tmp_path / "text"
    path.write_bytes(content)
    command = "train", "--data", path, "--out", tmp_path / "run", "--text", "lines", *TINY
    status, _, err = fastvae(*command)
    assert status == 0, err
    assert "no validation: too few lines to hold any out." in err


def test_the_end_of_train_says_what_the_latent_keeps(names, tmp_path, fastvae):
    """Measured again by evaluate on the same texts."""
    out = tmp_path / "run"
    status, shown, _ = fastvae("train", "--data", names, "--out", out, *TINY)
    (said,) = [line for line in shown.splitlines() if line.startswith("The latent returns")]
    arguments = "evaluate", out, "--data", names, "--held-out", "--nll-texts=0", "--mi-texts=0"
    assert status == 0 and said in fastvae(*arguments)[1].splitlines()
    assert "% from shuffled latents), for " in said and "--kl-nats" in said


def test_the_end_of_train_measures_the_first_texts(tmp_path, fastvae):
    path, valid, out = tmp_path / "text", tmp_path / "valid", tmp_path / "run"
    path.write_text("".join(f"{n}\n" for n in range(300)))
    for texts, measured in ((257, 256), (2, 2), (1, None)):
        valid.write_text("".join(f"{n}\n" for n in range(texts)))
        command = "train", "--data", path, "--valid", valid, "--out", out / str(texts), *TINY
        latent = json.loads(fastvae(*command, "--json")[1])["latent"]
        assert (latent and latent["reconstruction_texts"]) == measured
        if latent:
            model, vocabulary = load(out / str(texts))
            corpus = LineCorpus(valid, model.length, vocabulary=vocabulary)
            few = evaluate(model, corpus.batches(64, measured))
            assert latent["kl"] == pytest.approx(few["kl"])


def test_resuming_keeps_the_split(names, tmp_path, fastvae):
    once, twice = tmp_path / "once", tmp_path / "twice"
    same = "--kl-end=2", "--lr-decay-start=2", "--lr-decay-every=1"  # for all numbers of steps
    every = "--data", names, *TINY, "--eval-every", "2", *same
    assert fastvae("train", "--out", once, *every, "--steps", "4")[0] == 0
    assert fastvae("train", "--out", twice, *every, "--steps", "2")[0] == 0
    status, _, err = fastvae("train", "--out", twice, *every, "--steps", "4", "--resume")
    assert status == 0, err
    assert_same_weights(once, twice)
    with open(names, "a", encoding="utf-8") as file:
        file.write("Another\n")
    status, _, err = fastvae("train", "--out", twice, *every, "--steps", "6", "--resume")
    assert status == 2


def test_more_steps_keep_the_schedule_of_the_run(names, tmp_path, fastvae):
    """What preset lines computes from the steps stays as it was, unless an option says else."""
    out = tmp_path / "run"
    every = "--data", names, "--out", out, *TINY
    assert fastvae("train", *every, "--steps", "20")[0] == 0
    status, _, err = fastvae("train", *every, "--steps", "40", "--resume")
    assert status == 0, err
    config = json.loads((out / "training.json").read_text())["config"]
    assert (config["kl_end"], config["lr_decay_start"], config["lr_decay_every"]) == (14, 14, 1)
    records = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert records[-1]["step"] == 40
    last = [row["learning_rate"] for row in records if row["split"] == "train"][-1]
    assert last == 1e-4 > 1e-3 * 0.8**25  # lr_floor
    status, _, err = fastvae("train", *every, "--steps", "40", "--kl-end", "28", "--resume")
    assert status == 2 and "was started with kl_end = 14, got 28" in err


def test_edited_settings_of_a_run(names, tmp_path, fastvae):
    """What is computed from the steps is read from them: the checkpoint tells what was trained."""
    out = tmp_path / "run"
    every = "--data", names, "--out", out, *TINY, "--steps"
    assert fastvae("train", *every, "20")[0] == 0
    settings = out / "training.json"
    before = json.loads(settings.read_text())
    for value, message in (
        (15, f"{settings} has kl_end = 15, the run's checkpoint 14: correct the file"),
        ("x", f"{settings}: kl_end must be int, got 'x'"),
    ):
        edited = {**before, "config": {**before["config"], "kl_end": value}}
        settings.write_text(json.dumps(edited))
        status, _, err = fastvae("train", *every, "40", "--resume")
        assert status == 2 and message in err
    settings.write_text(json.dumps(before))
    assert fastvae("train", *every, "40", "--resume")[0] == 0


def test_what_train_warns_of(tmp_path, fastvae):
    path = tmp_path / "characters.txt"
    path.write_text("".join(f"{chr(0x4E00 + n)}\n" for n in range(1100)), encoding="utf-8")
    out = tmp_path / "run"
    status, _, err = fastvae("train", "--data", path, "--valid", path, "--out", out, *TINY)
    assert status == 0 and "1,102 different characters make training slow" in err
    assert f"{path} is the training file" in err


@pytest.mark.parametrize(
    ("size", "overrides", "kind", "length"),
    [
        (127, {}, "lines", 128),
        (128, {}, "windows", 48),
        (200, {"length": "201"}, "lines", 201),
        (200, {"length": "200"}, "windows", 200),
        (20, {"encoder_channels": "4,4,4"}, "lines", 24),
        (20, {"encoder_channels": "4"}, "lines", 22),
    ],
)
def test_lengths_that_train_chooses(tmp_path, size, overrides, kind, length):
    path = tmp_path / "text"
    path.write_text("".join(f"{n:0{size}}\n" for n in range(100)))
    plan = plan_training(path, tmp_path / "run", overrides)
    assert (plan.corpus.reading.kind, plan.corpus.length) == (kind, length)
    assert plan.preset.length == length and (plan.validation is None) == (kind == "windows")
    said = " ".join(plan.notes)
    assert f"read as {kind} (" in said and f", length {length} characters" in said
    assert ("No validation without --valid." in said) == (kind == "windows")
    assert "To choose otherwise: --text," in said


@pytest.mark.parametrize(("characters", "told"), [(1022, False), (1023, True)])
def test_large_vocabularies_are_told(tmp_path, characters, told):
    """Pad and end are tokens too: more than 1,024 together."""
    path = tmp_path / "characters.txt"
    path.write_text("".join(f"{chr(0x4E00 + n)}\n" for n in range(characters)), encoding="utf-8")
    plan = plan_training(path, tmp_path / "run", {})
    assert plan.corpus.vocabulary.size == characters + 2
    assert any("make training slow" in note for note in plan.notes) == told


def test_standard_input_leaves_no_copy_in_the_cache(names, tmp_path, monkeypatch):
    """Its name is another one each time, so the copy would never be read."""
    left = []
    for _ in range(2):
        text = io.BytesIO("\n".join(NAMES[:2]).encode())
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(text))
        plan = plan_training(names, tmp_path / "run", {}, valid=Path("-"))
        assert len(plan.validation) == 2
        left.append(len(list((tmp_path / "run" / "cache").iterdir())))
    assert left[0] == left[1] > 0


def test_standard_input_is_read_once(tmp_path, fastvae):
    command = "train", "--data", "-", "--valid", "-", "--out", tmp_path / "run"
    status, _, err = fastvae(*command, stdin=b"a\nb\n")
    assert status == 2 and "standard input can be read once" in err


def test_pipes_are_pointed_to_standard_input(tmp_path, fastvae):
    os.mkfifo(tmp_path / "pipe")
    status, _, err = fastvae("train", "--data", tmp_path / "pipe", "--out", tmp_path / "run")
    assert status == 2 and "pipe is not a regular file: pipe it in with --data -" in err


def test_runs_that_held_out_nothing_go_on_so(names, tmp_path, fastvae):
    """As runs of before did without --valid."""
    out = tmp_path / "run"
    every = "--data", names, "--preset", "tweets", *TINY, "--length", "12"
    assert fastvae("train", "--out", out, *every, "--valid", names)[0] == 0
    record = json.loads((out / "text.json").read_text())
    assert "part" not in record
    status, _, err = fastvae(
        "train", "--out", out, *every, "--valid", names, "--steps", "3", "--resume"
    )
    assert status == 0 and "held out" not in err


def test_every_command_reads_the_column_of_the_run(tmp_path, fastvae):
    path, out = tmp_path / "table.tsv", tmp_path / "run"
    path.write_text("".join(f"{n}\t{name}\n" for n, name in enumerate(NAMES)), encoding="utf-8")
    assert fastvae("train", "--data", path, "--out", out, "--column", "2", *TINY)[0] == 0
    quick = "--nll-texts", "0", "--mi-texts", "0", "--json"
    status, shown, _ = fastvae("evaluate", out, "--data", path, *quick)
    found = json.loads(shown)
    assert status == 0 and found["samples"] == len(NAMES) and found["text"]["column"] == "2"
    held_out = len(LineCorpus(path, 9, column=2, part="valid"))
    status, shown, _ = fastvae("evaluate", out, "--data", path, "--held-out", *quick)
    assert json.loads(shown)["samples"] == held_out
    status, shown, _ = fastvae("reconstruct", out, "--data", path, "-n", "2", "--json")
    assert [pair["text"] for pair in json.loads(shown)] == NAMES[:2]
    arguments = "reconstruct", out, "--data", path, "--held-out", "-n", "99", "--json"
    shown = json.loads(fastvae(*arguments)[1])
    assert [NAMES[pair["line"] - 1] for pair in shown] == [pair["text"] for pair in shown]
    assert len(shown) == held_out
    # Another column or normalization would hold out other texts, which training saw.
    for other in (("--column", "1"), ("--normalize", "tweets"), ("--field", "x")):
        status, shown, err = fastvae(*arguments, *other)
        assert (status, shown) == (2, "") and err.count("\n") == 1
        assert f"which texts were held out depends on how {out} read them: leave out" in err
    assert fastvae(*arguments, "--column", "2", "--normalize", "none")[0] == 0
    status, _, _ = fastvae("encode", out, "--data", path, "--out", tmp_path / "z.npy")
    assert status == 0 and np.isfinite(np.load(tmp_path / "z.npy")).all()
    # Texts that are typed are whole lines, tables on standard input are tables.
    status, shown, _ = fastvae("reconstruct", out, "--json", stdin="Béna\n".encode())
    assert json.loads(shown)[0]["text"] == "Béna"
    arguments = "reconstruct", out, "--data", "-", "--json"
    status, shown, _ = fastvae(*arguments, stdin="7\tBéna\n".encode())
    assert json.loads(shown)[0]["text"] == "Béna"
    # Another file may hold its texts elsewhere.
    other = tmp_path / "other.jsonl"
    other.write_text('{"name": "Bana"}\n')
    arguments = "reconstruct", out, "--data", other, "--field", "name", "--json"
    assert json.loads(fastvae(*arguments)[1])[0]["text"] == "Bana"
    plain = tmp_path / "plain.txt"
    plain.write_text("Bana\n")
    arguments = "reconstruct", out, "--data", plain, "--column", "0", "--json"
    assert json.loads(fastvae(*arguments)[1])[0]["text"] == "Bana"


def test_windows_are_not_held_out(names, tmp_path, fastvae):
    out = tmp_path / "run"
    assert fastvae("train", "--data", names, "--out", out, *TINY)[0] == 0
    command = "evaluate", out, "--data", names, "--read", "windows", "--held-out"
    status, _, err = fastvae(*command)
    assert status == 2 and "windows are read as they are" in err


def test_files_without_lines_for_a_run(tmp_path, fastvae):
    """A table's first line alone, and a file of which no line is held out."""
    path, out = tmp_path / "table.csv", tmp_path / "run"
    path.write_text("n,name\n" + "".join(f"{n},{name}\n" for n, name in enumerate(NAMES)))
    assert fastvae("train", "--data", path, "--column=name", "--out", out, *TINY)[0] == 0
    path.write_text("n,name\n")
    for command in ("evaluate", "reconstruct"):
        status, _, err = fastvae(command, out, "--data", path)
        assert status == 2 and "table.csv has no line but the one that names columns" in err
    trained = next(name for name in NAMES if part_of(text_hash(name.encode())) == "train")
    path.write_text(f"n,name\n1,{trained}\n")
    status, _, err = fastvae("evaluate", out, "--data", path, "--held-out")
    assert status == 2 and "table.csv, valid part holds no line" in err


def test_held_out_needs_a_split(names, tmp_path, fastvae):
    out = tmp_path / "run"
    command = "train", "--data", names, "--valid", names, "--out", out, *TINY
    assert fastvae(*command)[0] == 0
    status, _, err = fastvae("evaluate", out, "--data", names, "--held-out")
    assert status == 2 and f"--held-out: {out} was trained on all texts of its file" in err
    for more in (("--held-out",), ("--column", "1"), ("--field", "a")):
        status, _, err = fastvae("reconstruct", out, *more, stdin=b"Bana\n")
        assert status == 2 and "are for a file" in err
    status, _, err = fastvae("reconstruct", out, "--held-out", stdin=b"Bana\n")
    assert status == 2 and "--held-out are for a file" in err


def test_unknown_characters_at_the_command_line(names, tmp_path, fastvae):
    out, other = tmp_path / "run", tmp_path / "other.txt"
    assert fastvae("train", "--data", names, "--out", out, *TINY)[0] == 0
    other.write_text("Bana\nXenia\nKouna\n")
    status, shown, err = fastvae("reconstruct", out, "--data", other, "--json")
    assert [pair["line"] for pair in json.loads(shown)] == [1, 3]
    assert "1 of 3 lines left out: 0 empty, 0 too long (over 7 characters), 1 with ch" in err
    status, _, err = fastvae("reconstruct", out, stdin=b"Bana\nXenia\n")
    assert status == 2 and "'X' (U+0058) at position 0 of line 2 of standard input" in err
    fastvae("encode", out, "--data", other, "--out", tmp_path / "z.npy")
    assert np.isnan(np.load(tmp_path / "z.npy")).any(1).tolist() == [False, True, False]


def test_standard_input_is_data(names, tmp_path, fastvae):
    file, piped = tmp_path / "file", tmp_path / "piped"
    assert fastvae("train", "--data", names, "--out", file, *TINY)[0] == 0
    status, _, err = fastvae(
        "train", "--data", "-", "--out", piped, *TINY, stdin=names.read_bytes()
    )
    assert status == 0, err
    assert_same_weights(file, piped)
    assert not (piped / "cache").exists()
    quick = "--nll-texts", "0", "--mi-texts", "0", "--json"
    shown = fastvae("evaluate", piped, "--data", "-", *quick, stdin=names.read_bytes())[1]
    assert json.loads(shown)["samples"] == len(NAMES)


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"ab\ncd\n\xff\n", ["--text", "lines"], "line 3 of standard input is not UTF-8"),
        (b"ab\xff\n", ["--text", "windows"], "standard input is not UTF-8 at byte 2"),
        (b"ab\n", ["--text", "windows"], "standard input has 3 characters, fewer than one window"),
        (b"a,b\nc,d\n", ["--column", "x"], "standard input has no column 'x'"),
        (b"", ["--text", "lines"], "standard input is empty"),
        (b"\n\n", ["--text", "lines"], "standard input: all lines are empty"),
    ],
)
def test_messages_name_standard_input(tmp_path, fastvae, text, options, message):
    """And not the temporary file that holds it."""
    command = "train", "--data", "-", "--out", tmp_path / "run", *TINY, *options
    status, _, err = fastvae(*command, stdin=text)
    assert status == 2 and message in err and tempfile.gettempdir() not in err
    assert not (tmp_path / "run").exists()


def test_notes_name_standard_input(names, tmp_path, fastvae):
    options = "--preset", "lines", *TINY, "--length", "4"
    command = "train", "--data", "-", "--out", tmp_path / "run", *options
    _, _, err = fastvae(*command, stdin=names.read_bytes())
    left_out = [row for row in err.splitlines() if "left out" in row]
    assert len(left_out) == 2 and all(row.startswith("standard input") for row in left_out)
    status, _, err = fastvae(
        "train", "--data", "-", "--out", tmp_path / "b", *TINY, stdin=b"a\nb\n"
    )
    assert status == 0 and err.startswith("standard input: read as lines")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_while_standard_input_is_read(tmp_path, number):
    """Leaves neither a copy of it nor a run."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    command = [PROGRAM, "train", "--data", "-", "--out", tmp_path / "run"]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, env={**os.environ, "TMPDIR": str(temporary)}
    )
    process.stdin.write(b"text\n" * (1 << 18))  # more than is read at once
    process.stdin.flush()
    for _ in range(600):
        if any(file.stat().st_size for file in temporary.glob("fastvae-*/*")):
            break
        time.sleep(0.1)
    else:
        raise AssertionError("no copy of standard input appeared")
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    process.stdin.close()
    assert not list(temporary.glob("fastvae-*")) and not (tmp_path / "run").exists()


def test_what_was_in_a_folder_stays(names, tmp_path, fastvae):
    """Where a run cannot begin, and where it does: a folder may be called cache too."""
    out = tmp_path / "project"
    mine = out / "cache" / "partial-mine" / "results.txt"
    mine.parent.mkdir(parents=True)
    mine.write_text("precious")
    (out / "cache" / "names.txt").write_bytes(names.read_bytes())
    every = "train", "--data", out / "cache" / "names.txt", "--out", out, *TINY
    assert fastvae(*every, "--batch-size", "0")[0] == 2
    assert mine.read_text() == "precious" and (out / "cache" / "names.txt").exists()
    assert fastvae(*every)[0] == 0 and mine.read_text() == "precious"


def test_a_validation_file_of_a_run_that_holds_out(names, tmp_path, fastvae):
    out = tmp_path / "run"
    every = "train", "--data", names, "--out", out, *TINY
    assert fastvae(*every)[0] == 0
    status, _, err = fastvae(*every, "--resume", "--steps", "4", "--valid", names)
    assert status == 2 and "holds out lines of its file: leave --valid out" in err
    (out / "text.json").unlink()
    status, _, err = fastvae(*every, "--resume", "--steps", "4")
    assert status == 2 and "text.json is missing, which model.safetensors was written with" in err


def test_processes_cannot_share_standard_input(tmp_path):
    command = [PROGRAM, "train", "--data", "-", "--out", tmp_path / "run"]
    environment = {**os.environ, "WORLD_SIZE": "2"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, input="a\n")
    assert done.returncode == 2 and "several processes cannot share standard input" in done.stderr
