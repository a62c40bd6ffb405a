import bz2
import codecs
import copy
import gzip
import importlib
import inspect
import io
import lzma
import os
import pickle
import re
import stat
import subprocess
import sys
import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from fastvae.text import (
    ByteVocabulary,
    CharVocabulary,
    LineCorpus,
    Reading,
    SyntheticCorpus,
    TokenVocabulary,
    WindowCorpus,
    normalize_tweet,
    tweets,
)
from fastvae.text import files as text_files

TEXT = "the first line\nthe second line\n" * 20


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fixed_pass(corpus, batch_size=7):
    return torch.cat(list(corpus.batches(batch_size)))


@pytest.fixture
def chunk(monkeypatch):
    """Files read three bytes at a time: every boundary is crossed."""
    monkeypatch.setattr(text_files, "CHUNK", 3)


# Windows


@pytest.mark.parametrize("vocabulary", [None, ByteVocabulary()], ids=["characters", "bytes"])
@pytest.mark.parametrize("name", ["text.txt", "text.txt.gz"])
def test_windows_are_pieces_of_the_text(name, vocabulary, tmp_path, chunk):
    text = TEXT + "é☃\U0001f600"
    path = tmp_path / name
    path.write_bytes(gzip.compress(text.encode()) if name.endswith("gz") else text.encode())
    corpus = WindowCorpus(path, 13, vocabulary=vocabulary)
    stream = text.encode() if vocabulary else text
    decode = corpus.vocabulary.decode_bytes if vocabulary else corpus.vocabulary.decode
    assert corpus.vocabulary == (vocabulary or CharVocabulary("".join(dict.fromkeys(text))))

    whole = [stream[i : i + 13] for i in range(0, len(stream) - 12, 13)]
    assert [decode(row) for row in fixed_pass(corpus)] == whole
    assert len(corpus) == len(whole)

    batch = corpus.batch(500, generator())
    assert batch.shape == (500, 13) and batch.dtype == torch.int64
    starts = torch.randint(len(stream) - 12, (500,), generator=generator())
    assert [decode(row) for row in batch] == [stream[i : i + 13] for i in starts]
    assert torch.equal(batch, corpus.batch(500, generator()))


def test_random_windows_reach_both_ends_of_the_stream():
    corpus = WindowCorpus.from_text("abcdef", 4)
    seen = {tuple(row) for row in corpus.batch(200, generator()).tolist()}
    assert seen == {(0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5)}


def test_source_is_a_path_or_a_text_with_newlines(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "some text").write_text(TEXT)
    from_file = fixed_pass(WindowCorpus("some text", 20))
    for corpus in (WindowCorpus(TEXT, 20), WindowCorpus.from_text(TEXT, 20)):
        assert torch.equal(fixed_pass(corpus), from_file)
    given = WindowCorpus("a\nb", 3, vocabulary=CharVocabulary("xb\na"))
    assert fixed_pass(given).tolist() == [[3, 2, 1]]
    assert len(WindowCorpus.from_text("some text", 4)) == 2
    with pytest.raises(FileNotFoundError, match="no such file: other text"):
        WindowCorpus("other text", 4)


def test_limit_and_batch_size():
    corpus = WindowCorpus.from_text("abcdefghijk", 2)
    assert [len(b) for b in corpus.batches(2)] == [2, 2, 1]
    assert [b.tolist() for b in corpus.batches(2, limit=3)] == [[[0, 1], [2, 3]], [[4, 5]]]
    for arguments in ((0,), (1, 0)):
        with pytest.raises(ValueError, match="must be at least 1"):
            corpus.batches(*arguments)


def test_wide_characters_take_more_than_a_byte(tmp_path):
    characters = "".join(chr(0x4E00 + i) for i in range(300))
    path = tmp_path / "text"
    path.write_text(characters * 2, encoding="utf-8")
    corpus = WindowCorpus(path, 300)
    assert corpus.vocabulary.size == 301
    assert fixed_pass(corpus).tolist() == [list(range(300))] * 2


def test_a_given_vocabulary_is_used_as_it_is(tmp_path, chunk):
    path = tmp_path / "text"
    path.write_text("cab☃cab", encoding="utf-8")
    corpus = WindowCorpus(path, 7, vocabulary=CharVocabulary("☃abcd"))
    assert corpus.batch(1, generator()).tolist() == [[3, 1, 2, 0, 3, 1, 2]]
    with pytest.raises(ValueError, match=r"'☃' \(U\+2603\) at position 3 of .*text"):
        WindowCorpus(path, 7, vocabulary=CharVocabulary("abc"))


def test_a_token_may_cross_what_is_read_at_once(tmp_path, chunk):
    """Or half a token would be read as another, or be unknown."""
    path = tmp_path / "text"
    path.write_text("CClCCl" * 5)
    expected = [0, 1] * 10
    for tokens in (["C", "Cl"], ["C", "Cl", "l"]):
        vocabulary = TokenVocabulary(tokens, "Cl|.")
        assert WindowCorpus(path, 20, vocabulary=vocabulary)[0].tolist() == expected
    path.write_text("CClCCl" * 5 + "x")
    with pytest.raises(ValueError, match=r"token 'x' at position 20 of .*text is not among the 2"):
        WindowCorpus(path, 20, vocabulary=TokenVocabulary(["C", "Cl"], "Cl|."))
    path.write_text("")
    with pytest.raises(ValueError, match="text is empty"):
        WindowCorpus(path, 20, vocabulary=vocabulary)


@given(st.text(), st.binary(min_size=1), st.text())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_invalid_utf8_names_the_byte(tmp_path, chunk, before, bad, after):
    data = before.encode() + bad + after.encode()
    assume(not data.startswith(codecs.BOM_UTF8))
    assume(not any(begin.match(data) for begin, *_ in text_files._FORMATS))
    path = tmp_path / "text"
    path.write_bytes(data)
    try:
        expected = data.decode()
    except UnicodeDecodeError as error:
        with pytest.raises(ValueError, match=rf"not UTF-8 at byte {error.start} \("):
            WindowCorpus(path, 1)
    else:
        assert WindowCorpus(path, 1).vocabulary.characters == "".join(dict.fromkeys(expected))


def test_invalid_utf8_past_the_first_chunk(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("☃".encode() * 700_000 + b"\xe2\x98")
    with pytest.raises(ValueError, match=r"not UTF-8 at byte 2100000 \(unexpected end of data"):
        WindowCorpus(path, 8)
    assert len(WindowCorpus(path, 8, vocabulary=ByteVocabulary())) == 2_100_002 // 8


# Lines


def test_line_samples(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"ab\n\nabcd\r\nabcde\n\xff\n\r\nxyz")
    corpus = LineCorpus(path, 5)
    a, end = 3 + ord("a"), 2
    assert fixed_pass(corpus).tolist() == [
        [a, a + 1, end, 0, 0],
        [a, a + 1, a + 2, a + 3, end],
        [3 + 255, end, 0, 0, 0],
        [3 + ord(c) for c in "xyz"] + [end, 0],
    ]
    assert (len(corpus), corpus.left_out) == (4, 1)
    assert corpus.vocabulary == ByteVocabulary()


def test_random_lines_are_uniform_and_repeatable(tmp_path):
    path = tmp_path / "lines"
    path.write_text("".join(f"{i}\n" for i in range(50)))
    corpus = LineCorpus(path, 4)
    batch = corpus.batch(500, generator())
    assert batch.dtype == torch.int64
    index = torch.randint(50, (500,), generator=generator())
    assert [corpus.vocabulary.decode(row) for row in batch] == [str(int(i)) for i in index]
    assert set(index.tolist()) == set(range(50))
    assert torch.equal(batch, corpus.batch(500, generator()))


@given(st.lists(st.binary(max_size=9).filter(lambda line: not {10, 13} & set(line))))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
def test_lines_that_fit_come_back_in_order(tmp_path, lines):
    path = tmp_path / "lines"
    path.write_bytes(b"\n".join([*lines, b"end"]))
    corpus = LineCorpus(path, 6)
    kept = [line for line in [*lines, b"end"] if 0 < len(line) < 6]
    assert [corpus.vocabulary.decode_bytes(row) for row in fixed_pass(corpus)] == kept


def test_lines_are_normalized_before_they_are_measured(tmp_path):
    path = tmp_path / "lines.gz"
    tweets = b"hi @a\nsee http://t.co/12345678901234567890\n@averyveryverylongname\n\xff @b\n"
    path.write_bytes(gzip.compress(tweets))
    corpus = LineCorpus(path, 11, normalize=normalize_tweet)
    texts = [corpus.vocabulary.decode_bytes(row) for row in fixed_pass(corpus)]
    assert texts == [b"hi @userid", b"see url", b"@userid", b"\xff @userid"]


def test_an_endless_line_is_left_out_and_not_held(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"x" * (5 << 20) + b"\nab\n" + b"y" * (1 << 20) + b"\ncd")
    corpus = LineCorpus(path, 8, normalize=lambda line: line[:2])
    assert [corpus.vocabulary.decode(row) for row in fixed_pass(corpus)] == ["ab", "cd"]
    assert corpus.left_out == 2


def test_lengths_of_numpy(tmp_path):
    (tmp_path / "text").write_text("ab\nabc\n")
    for corpus in (LineCorpus, WindowCorpus):
        found = corpus(tmp_path / "text", np.int64(4), vocabulary=ByteVocabulary())
        assert found.length == 4 and type(found.length) is int and found[0].shape == (4,)


def test_lines_need_an_end_token(tmp_path):
    (tmp_path / "lines").write_text("ab\n")
    with pytest.raises(ValueError, match="vocabulary with an end token"):
        LineCorpus(tmp_path / "lines", 4, vocabulary=CharVocabulary("ab"))


# Bad files


@pytest.mark.parametrize("make", [WindowCorpus, LineCorpus], ids=["windows", "lines"])
class TestBadFiles:
    def test_missing(self, make, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"^no such file: .*absent"):
            make(tmp_path / "absent", 8)

    def test_folder(self, make, tmp_path):
        with pytest.raises(ValueError, match="not a regular file"):
            make(tmp_path, 8)

    @pytest.mark.parametrize("content", [b"", gzip.compress(b"")], ids=["plain", "gzip"])
    def test_empty(self, make, content, tmp_path):
        path = tmp_path / ("empty.gz" if content else "empty")
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"empty(\.gz)? is empty"):
            make(path, 8)

    @pytest.mark.parametrize("damage", [slice(40), slice(1, None)], ids=["cut", "no header"])
    def test_damaged_gzip(self, make, damage, tmp_path):
        path = tmp_path / "text.gz"
        path.write_bytes(gzip.compress(os.urandom(2000))[damage])
        with pytest.raises(ValueError, match=r"text\.gz is a damaged gzip file"):
            make(path, 8)

    def test_length(self, make, tmp_path):
        (tmp_path / "text").write_text(TEXT)
        with pytest.raises(ValueError, match="length must be a whole number of at least 1, got 0"):
            make(tmp_path / "text", 0)


def test_shorter_than_one_window(tmp_path):
    (tmp_path / "text").write_text("abcdefg")
    with pytest.raises(ValueError, match="text has 7 characters, fewer than one window of 8"):
        WindowCorpus(tmp_path / "text", 8)
    with pytest.raises(ValueError, match="empty"):
        WindowCorpus.from_text("", 8)


def test_no_line_fits(tmp_path):
    path = tmp_path / "lines"
    path.write_text("abcd\nabcde\n")
    with pytest.raises(ValueError, match=r"no line fits .* all 2 have more than 3 bytes"):
        LineCorpus(path, 4)
    path.write_text("\n\n")
    with pytest.raises(ValueError, match="only empty lines"):
        LineCorpus(path, 4)


# Cache


def contents(folder):
    return {file.name: (file.read_bytes(), file.stat().st_mtime_ns) for file in folder.iterdir()}


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


DAMAGES = [
    lambda file: file.write_bytes(b"{"),
    lambda file: file.write_bytes(b""),
    lambda file: file.write_bytes(b'{"notes": {}, "digests": 3}'),
    lambda file: file.unlink(),
    flip_a_byte,
]


@pytest.mark.parametrize(
    "make",
    [
        lambda path, cache: WindowCorpus(path, 8, cache=cache),
        lambda path, cache: LineCorpus(path, 20, normalize=normalize_tweet, cache=cache),
    ],
    ids=["windows", "lines"],
)
class TestCache:
    def test_second_run_reuses_it(self, make, tmp_path):
        path, cache = tmp_path / "text", tmp_path / "deep" / "cache"
        path.write_text(TEXT)
        first, before = fixed_pass(make(path, cache)), contents(cache)
        again = make(path, cache)
        assert contents(cache) == before
        assert torch.equal(fixed_pass(again), first)

    def test_only_its_owner_may_read_it(self, make, tmp_path):
        path, cache = tmp_path / "text", tmp_path / "cache"
        path.write_text(TEXT)
        make(path, cache)
        assert {stat.S_IMODE(file.stat().st_mode) for file in cache.iterdir()} == {0o600}

    def test_another_text_is_read_anew(self, make, tmp_path):
        path, cache = tmp_path / "text", tmp_path / "cache"
        path.write_text(TEXT)
        first = fixed_pass(make(path, cache))
        status = path.stat()
        path.write_text(TEXT.replace("first", "third"))
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
        assert not torch.equal(fixed_pass(make(path, cache)), first)

    def test_damaged_cache_is_made_again(self, make, tmp_path):
        path, cache = tmp_path / "text", tmp_path / "cache"
        path.write_text(TEXT)
        first = fixed_pass(make(path, cache))
        for damage in DAMAGES:
            for file in list(cache.iterdir()):
                damage(file)
                assert torch.equal(fixed_pass(make(path, cache)), first)

    def test_several_at_once(self, make, tmp_path):
        path, cache = tmp_path / "text", tmp_path / "cache"
        path.write_text(TEXT * 50)
        with ThreadPoolExecutor(8) as pool:
            passes = list(pool.map(lambda _: fixed_pass(make(path, cache), 100), range(16)))
        assert all(torch.equal(passes[0], other) for other in passes)
        assert not list(cache.glob("fastvae-partial-*"))

    def test_a_failure_leaves_nothing_behind(self, make, tmp_path):
        path, cache = tmp_path / "text.gz", tmp_path / "cache"
        path.write_bytes(gzip.compress(os.urandom(4000))[:2000])
        with pytest.raises(ValueError, match="gzip"):
            make(path, cache)
        assert list(cache.iterdir()) == []

    def test_what_a_killed_build_left_is_removed(self, make, tmp_path):
        path, cache = tmp_path / "text", tmp_path / "cache"
        path.write_text(TEXT)
        left, used = cache / "fastvae-partial-killed", cache / "fastvae-partial-used"
        for folder in (left, used):
            folder.mkdir(parents=True)
            (folder / "ids").write_text(TEXT)
        with text_files._locked(used):  # as a build that goes on in another process
            make(path, cache)
        assert not left.exists() and used.exists()

    @pytest.mark.parametrize("letter", ["n", "ñ", "名"])
    def test_the_longest_file_names(self, make, letter, tmp_path):
        name = letter * (255 // len(letter.encode()))
        path, cache = tmp_path / name, tmp_path / "cache"
        path.write_text(TEXT)
        first = fixed_pass(make(path, cache))
        before = contents(cache)
        assert torch.equal(fixed_pass(make(path, cache)), first)
        assert contents(cache) == before

    def test_temporary_by_default(self, make, tmp_path, monkeypatch):
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
        (tmp_path / "temporary").mkdir()
        path = tmp_path / "text"
        path.write_text(TEXT)
        corpus = make(path, None)
        assert len(list((tmp_path / "temporary").iterdir())) == 1
        assert len(corpus.batch(3, generator())) == 3
        del corpus
        assert list((tmp_path / "temporary").iterdir()) == []


def test_a_build_that_is_killed_leaves_nothing_for_long(tmp_path):
    path, cache = tmp_path / "text", tmp_path / "cache"
    path.write_text(TEXT)
    program = (
        "import os, sys\n"
        "from pathlib import Path\n"
        "from fastvae.text.files import stored\n"
        "stored(Path(sys.argv[1]), Path(sys.argv[2]), {}, lambda folder: os._exit(9))"
    )
    command = [sys.executable, "-c", program, str(path), str(cache)]
    assert subprocess.run(command, cwd=tmp_path).returncode == 9
    assert len(list(cache.glob("fastvae-partial-*"))) == 1
    LineCorpus(path, 20, cache=cache)
    assert not list(cache.glob("fastvae-partial-*"))


def test_cache_tells_settings_apart(tmp_path):
    path, cache = tmp_path / "text", tmp_path / "cache"
    path.write_text("b@a\n@bb\nbab\n")
    default = WindowCorpus(path, 4, cache=cache)
    turned = WindowCorpus(path, 4, vocabulary=CharVocabulary("\nab@"), cache=cache)
    raw = WindowCorpus(path, 4, vocabulary=ByteVocabulary(), cache=cache)
    firsts = [next(corpus.batches(1))[0] for corpus in (default, turned, raw)]
    assert len({tuple(ids.tolist()) for ids in firsts}) == 3
    for corpus, ids in zip((default, turned, raw), firsts, strict=True):
        assert corpus.vocabulary.decode(ids) == "b@a\n"

    def decoded(**arguments):
        corpus = LineCorpus(path, 8, cache=cache, **arguments)
        return [corpus.vocabulary.decode(row) for row in fixed_pass(corpus)]

    assert decoded() == ["b@a", "@bb", "bab"]
    assert decoded(normalize=normalize_tweet) == ["b@a", "@userid", "bab"]
    assert decoded(normalize=str.upper) == ["B@A", "@BB", "BAB"]
    for letter in "xy":  # two functions of one name and one source text

        def replaced(line, letter=letter):
            return line.replace("b", letter)

        assert decoded(normalize=replaced)[2] == f"{letter}a{letter}"
    with pytest.raises(ValueError, match="no line fits"):
        LineCorpus(path, 3, cache=cache)


def test_lines_never_come_from_an_older_function(tmp_path, monkeypatch):
    """What a function calls may change while its own source does not."""
    monkeypatch.syspath_prepend(tmp_path)
    # Python would take the bytecode of a source of the same size and second for the new one's.
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "text").write_text("Anna\nBert\n")
    module = tmp_path / "cleaning.py"
    for method, expected in (("upper", ["ANNA", "BERT"]), ("lower", ["anna", "bert"])):
        module.write_text(
            f"def helper(line): return line.{method}()\ndef clean(line): return helper(line)\n"
        )
        monkeypatch.delitem(sys.modules, "cleaning", raising=False)
        importlib.invalidate_caches()
        clean = importlib.import_module("cleaning").clean
        corpus = LineCorpus(tmp_path / "text", 8, normalize=clean, cache=tmp_path / "cache")
        assert [corpus.vocabulary.decode(row) for row in fixed_pass(corpus)] == expected
        assert corpus.reading == Reading("lines", "cleaning.clean")


def test_lines_never_come_from_an_older_normalization_of_ours(tmp_path, monkeypatch):
    (tmp_path / "text").write_text("@ann\n")

    def first():
        corpus = LineCorpus(
            tmp_path / "text", 12, normalize=normalize_tweet, cache=tmp_path / "cache"
        )
        return corpus.vocabulary.decode(corpus[0])

    assert first() == "@userid"
    source = inspect.getsource(tweets)
    monkeypatch.setattr(tweets, "_TOKEN", re.compile("a"))
    monkeypatch.setattr(
        inspect, "getsource", lambda module: source.replace("_TOKEN = ", "_TOKEN  = ")
    )
    assert first() == "@urlnn"


# Datasets


@pytest.fixture(params=["windows", "lines", "text", "synthetic"])
def corpus(request, tmp_path):
    path = tmp_path / "text"
    path.write_text(TEXT)
    return {
        "windows": lambda: WindowCorpus(path, 8),
        "lines": lambda: LineCorpus(path, 20),
        "text": lambda: WindowCorpus.from_text(TEXT, 8),
        "synthetic": lambda: SyntheticCorpus(samples=20),
    }[request.param]()


def test_an_index_gives_a_sample_of_the_fixed_pass(corpus):
    rows = fixed_pass(corpus)
    assert torch.equal(corpus[3], rows[3])
    assert torch.equal(corpus[-1], rows[-1])
    assert torch.equal(torch.stack(list(corpus)), rows)
    for index in (len(rows), -len(rows) - 1):
        with pytest.raises(IndexError, match=f"index {index} .* {len(rows)} samples"):
            corpus[index]


def test_copies_read_the_same(corpus):
    for copied in (pickle.loads(pickle.dumps(corpus)), copy.deepcopy(corpus)):
        assert torch.equal(fixed_pass(copied), fixed_pass(corpus))
        assert torch.equal(copied.batch(5, generator()), corpus.batch(5, generator()))
        assert copied.vocabulary == corpus.vocabulary
        assert (copied.counts(), copied.reading) == (corpus.counts(), corpus.reading)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_data_loader_serves_the_fixed_pass(corpus, workers):
    loader = torch.utils.data.DataLoader(corpus, batch_size=7, num_workers=workers)
    assert torch.equal(torch.cat(list(loader)), fixed_pass(corpus))
    assert len(corpus.batch(3, generator())) == 3  # the workers' end leaves the files alone


def test_a_spawned_worker_serves_the_fixed_pass(tmp_path):
    path = tmp_path / "text"
    path.write_text(TEXT)
    lines, windows = LineCorpus(path, 20), WindowCorpus(path, 20)
    both = torch.utils.data.ConcatDataset([lines, windows])
    loader = torch.utils.data.DataLoader(
        both, batch_size=7, num_workers=1, multiprocessing_context="spawn"
    )
    expected = torch.cat([fixed_pass(lines), fixed_pass(windows)])
    assert torch.equal(torch.cat(list(loader)), expected)


def test_a_pickle_outlives_its_cache_with_a_word(tmp_path):
    path, cache = tmp_path / "text", tmp_path / "cache"
    path.write_text(TEXT)
    corpus = WindowCorpus(path, 8, cache=cache)
    pickled = pickle.dumps(corpus)
    (ids,) = cache.glob("*.ids")
    content = ids.read_bytes()
    for changed in (content[:-1], content * 2):
        ids.write_bytes(changed)
        with pytest.raises(ValueError, match=r"\.ids has changed since"):
            pickle.loads(pickled)
    ids.unlink()
    with pytest.raises(FileNotFoundError, match=r"\.ids is gone.* a cache folder that stays"):
        pickle.loads(pickled)


def test_a_pickle_is_read_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("text").write_text(TEXT)
    corpus = WindowCorpus("text", 8, cache="cache")
    pickled = pickle.dumps(corpus)
    monkeypatch.chdir("cache")
    assert torch.equal(fixed_pass(pickle.loads(pickled)), fixed_pass(corpus))


# What is left out


def test_lines_left_out_or_changed_are_counted(tmp_path):
    path = tmp_path / "lines"
    path.write_bytes(b"@a b\n\nabcdefghijkl\n\r\nhi\n@ann " + b"x" * 9 + b"\n")
    corpus = LineCorpus(path, 12, normalize=normalize_tweet)
    assert corpus.counts() == {
        "lines": 6,
        "empty": 2,
        "too_long": 2,
        "unknown": 0,
        "normalized": 2,
    }
    assert corpus.notes() == [
        f"{path}: 4 of 6 lines left out: 2 empty, 2 too long (over 11 bytes)",
        f"{path}: 2 of 6 lines changed by normalization "
        "(tweets: links become url, @handles @userid)",
    ]
    path.write_text("ab\ncd\n")
    assert LineCorpus(path, 12, normalize=normalize_tweet).notes() == []


def test_bytes_that_are_no_text_are_not_changed_by_normalization(tmp_path):
    (tmp_path / "lines").write_bytes(b"caf\xe9\n\xff\xfe\n@ann\n")
    corpus = LineCorpus(tmp_path / "lines", 12, normalize=normalize_tweet)
    assert corpus.counts() == {"lines": 3, "empty": 0, "too_long": 0, "unknown": 0, "normalized": 1}
    assert corpus.vocabulary.decode_bytes(corpus[0]) == b"caf\xe9"


def test_more_lines_than_are_written_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr("fastvae.text.corpus.CHUNK", 4)
    lines = [b"abc"[: 1 + n % 3] for n in range(11)]
    (tmp_path / "lines").write_bytes(b"\n".join(lines))
    corpus = LineCorpus(tmp_path / "lines", 8)
    assert [corpus.vocabulary.decode_bytes(row) for row in corpus] == lines


def test_characters_after_the_last_window_are_counted():
    corpus = WindowCorpus.from_text("abcdefg", 3)
    assert corpus.counts() == {"characters_left_over": 1}
    assert corpus.notes()[0].endswith("the last 1 character left out: they fill no window of 3")
    corpus = WindowCorpus.from_text("é" * 5, 3, vocabulary=ByteVocabulary())
    assert corpus.counts() == {"bytes_left_over": 1}


# Encodings and formats

PLAIN = "".join(f"name number {n}\n" for n in range(400))


def tar(format):
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w", format=format) as file:
        member = tarfile.TarInfo("names.txt")
        member.size = len(PLAIN)
        file.addfile(member, io.BytesIO(PLAIN.encode()))
    return content.getvalue()


def zipped():
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as file:
        file.writestr("names.txt", PLAIN)
    return content.getvalue()


NOT_TEXT = {
    "UTF-16 text": PLAIN.encode("utf-16"),
    "UTF-16 text ": PLAIN.encode("utf-16-be"),
    "UTF-16 text  ": codecs.BOM_UTF16_BE + PLAIN.encode("utf-16-be"),
    "UTF-32 text": PLAIN.encode("utf-32"),
    "an xz file": lzma.compress(PLAIN.encode()),
    "an LZMA file": lzma.compress(PLAIN.encode(), lzma.FORMAT_ALONE),
    "a bzip2 file": bz2.compress(PLAIN.encode()),
    "a bzip2 file ": bz2.compress(b""),
    "a Zstandard file": b"\x28\xb5\x2f\xfd\x24\x05" + b"names",
    "a zip file": zipped(),
    "a Parquet file": b"PAR1\x15\x04\x15\x1c" + b"names",
    "a tar file": tar(tarfile.USTAR_FORMAT),
    "a tar file ": tar(tarfile.GNU_FORMAT),
    "a tar file  ": tar(tarfile.PAX_FORMAT),
    "a gzip file": gzip.compress(PLAIN.encode()),
}
READERS = [
    lambda path: WindowCorpus(path, 64),
    lambda path: WindowCorpus(path, 64, vocabulary=ByteVocabulary()),
    lambda path: LineCorpus(path, 64),
]


@pytest.mark.parametrize("make", READERS, ids=["characters", "bytes", "lines"])
@pytest.mark.parametrize("what", NOT_TEXT)
def test_files_that_are_no_text_are_refused(make, what, tmp_path):
    path, content = tmp_path / "names.txt", NOT_TEXT[what]
    if what != "a gzip file":
        path.write_bytes(content)
        with pytest.raises(ValueError, match=rf"names\.txt is {what.strip()}, not text in UTF-8: "):
            make(path)
    path.write_bytes(gzip.compress(content))
    with pytest.raises(ValueError, match=rf"unpacked, is {what.strip()}, not text in UTF-8: "):
        make(path)


@pytest.mark.parametrize("make", READERS, ids=["characters", "bytes", "lines"])
def test_a_text_may_name_what_other_files_begin_with(make, tmp_path):
    """They tell a format at the beginning of a file alone."""
    path = tmp_path / "notes.txt"
    path.write_text("a file begins with %PDF-1.7, Rar!\x1a\x07 or PK\x03\x04\n" * 3)
    assert make(path).batch(3, torch.Generator()).shape == (3, 64)


@pytest.mark.parametrize("make", READERS, ids=["characters", "bytes", "lines"])
@pytest.mark.parametrize("name", ["names", "names.txt", "NAMES.GZ"])
def test_gzip_is_unpacked_under_any_name(make, name, tmp_path):
    (tmp_path / "plain").write_text(PLAIN)
    path = tmp_path / name
    half = len(PLAIN) // 2
    path.write_bytes(gzip.compress(PLAIN[:half].encode()) + gzip.compress(PLAIN[half:].encode()))
    assert torch.equal(fixed_pass(make(path)), fixed_pass(make(tmp_path / "plain")))


@pytest.mark.parametrize("make", READERS, ids=["characters", "bytes", "lines"])
@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gzip"])
def test_a_byte_order_mark_is_no_text(make, pack, tmp_path):
    for name, content in (("plain", PLAIN.encode()), ("mark", PLAIN.encode("utf-8-sig"))):
        (tmp_path / name).write_bytes(pack(content))
    plain, mark = make(tmp_path / "plain"), make(tmp_path / "mark")
    assert mark.vocabulary == plain.vocabulary
    assert torch.equal(fixed_pass(mark), fixed_pass(plain))


def test_bad_bytes_after_a_mark_are_counted_from_the_files_start(tmp_path):
    (tmp_path / "text").write_bytes(codecs.BOM_UTF8 + b"abc\xff")
    with pytest.raises(ValueError, match="not UTF-8 at byte 6 "):
        WindowCorpus(tmp_path / "text", 2)


@pytest.mark.parametrize("size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"ab\rc\r\rd", [b"ab", b"c", b"", b"d"]),
        (b"ab\r", [b"ab"]),
        (b"ab\r\r\nc\r\n\r\n", [b"ab", b"", b"c", b""]),
        (b"10%\r20%\r\nend", [b"10%", b"20%", b"end"]),
        (b"a long line\nb\rc\r", [b"a long line", b"b", b"c"]),
        (b"\n\na", [b"", b"", b"a"]),
        (b"", []),
    ],
)
def test_line_ends(content, expected, size):
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    assert list(text_files.lines(chunks)) == expected


@given(st.lists(st.sampled_from([b"a", b"\xc2\x85", b"\x0b", b"\r", b"\n"])), st.integers(1, 4))
def test_lines_do_not_depend_on_the_chunks(parts, size):
    content = b"".join(parts)
    expected = re.split(rb"\r\n|\r|\n", content)
    if not expected[-1]:
        expected.pop()
    chunks = [content[i : i + size] for i in range(0, len(content), size)]
    assert list(text_files.lines(chunks)) == expected


# Memory

# The peak of this program alone: ru_maxrss would start from that of the process it is forked from.
MEASURE = """
import sys
from pathlib import Path

import torch
from fastvae.text import LineCorpus, WindowCorpus, files

def peak():
    status = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) << 10

path, kind, cache = sys.argv[1:]
files.RESIDENT //= 16  # as if the file were sixteen times as large
files.ROWS_AT_ONCE //= 16
corpus_class = {"windows": WindowCorpus, "lines": LineCorpus}[kind]
before = peak()
corpus = corpus_class(path, 1024, cache=cache)
generator = torch.Generator().manual_seed(0)
for _ in range(100):
    corpus.batch(64, generator)
for _ in corpus.batches(64):
    pass
print(peak() - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc, needs MADV_DONTNEED")
@pytest.mark.parametrize("kind", ["windows", "lines"])
def test_memory_stays_far_below_the_file(kind, tmp_path):
    path = tmp_path / "text"
    line = bytes(range(ord("A"), ord("z"))) * 17 + b"\n"
    with open(path, "wb") as file:
        for _ in range((64 << 20) // len(line)):
            file.write(line)
    command = [sys.executable, "-c", MEASURE, str(path), kind, str(tmp_path / "cache")]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert int(run.stdout) < 32 << 20  # half the file
