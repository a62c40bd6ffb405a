"""Every command reads a text as the run's training did, tells what it leaves out, loses no byte."""

import codecs
import ctypes
import gzip
import io
import json
import sys
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

import fastvae
from fastvae import allocator, cli
from fastvae.atomic_files import open_tensors, read_tensors, write_tensors
from fastvae.console import escape, print_json
from fastvae.metrics import evaluate
from fastvae.models.hybrid import HybridVAE
from fastvae.text import (
    ByteVocabulary,
    CharVocabulary,
    LineCorpus,
    SyntheticCorpus,
    TokenVocabulary,
    WindowCorpus,
    normalize_tweet,
)
from fastvae.text.reading import (
    Reading,
    check_reading,
    load_reading,
    normalization_name,
    save_reading,
)

pytestmark = pytest.mark.usefixtures("no_power_cuts")
SIZES = {"latent_size": 3, "encoder_channels": (4,), "feature_channels": 4, "hidden_size": 4}
TINY = [
    *("--steps=2", "--batch-size=4", "--length=32", "--latent-size=3", "--encoder-channels=4"),
    *("--hidden-size=8", "--feature-channels=4", "--sample-every=0", "--kl-start=0", "--kl-end=0"),
]
LINES = b"@dmin2024 x\n@pple-pie\nhttp://x.y\n\nletmein\nlonger than any of them\n"
QUICK = "--nll-texts", "0", "--mi-texts", "0", "--json"


@pytest.fixture
def fastvae_cli(capfdbinary, monkeypatch):
    """Run a command in this process -> exit status, standard output as bytes, standard error."""

    def run(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        out, err = capfdbinary.readouterr()
        return end.value.code, out, err.decode()

    return run


@pytest.fixture
def words(tmp_path):
    path = tmp_path / "words.txt"
    path.write_bytes(LINES)
    return path


def shout(line):
    return line.upper()


def model_of(vocabulary, end_id, length=16):
    torch.manual_seed(0)
    return HybridVAE(vocabulary.size, length, pad_id=vocabulary.pad_id, end_id=end_id, **SIZES)


@pytest.fixture
def lines_model(tmp_path):
    """A model of lines of at most 15 bytes, saved without a word on how they were read."""
    vocabulary = ByteVocabulary()
    model_of(vocabulary, vocabulary.end_id).save_pretrained(tmp_path / "lines", vocabulary)
    return tmp_path / "lines"


@pytest.fixture
def windows_model(tmp_path):
    vocabulary = CharVocabulary("\nabcdefghijklmnopqrstuvwxyz ")
    model_of(vocabulary, None).save_pretrained(tmp_path / "windows", vocabulary)
    return tmp_path / "windows"


def trained(folder, corpus, end_id):
    model = model_of(corpus.vocabulary, end_id, corpus.length)
    settings = fastvae.TrainingConfig(steps=1, batch_size=4, sample_every=0)
    fastvae.train(model, corpus, settings, folder, console=Console(file=io.StringIO()))
    return model.eval()


# How a text was read


@pytest.mark.parametrize("kind", ["lines", "tweets", "windows", "byte windows"])
def test_commands_read_as_training_did(kind, words, tmp_path, fastvae_cli):
    vocabulary = ByteVocabulary()
    corpus, end_id = {
        "lines": lambda: (LineCorpus(words, 16), vocabulary.end_id),
        "tweets": lambda: (LineCorpus(words, 16, normalize=normalize_tweet), vocabulary.end_id),
        "windows": lambda: (WindowCorpus(words, 16), None),
        "byte windows": lambda: (WindowCorpus(words, 16, vocabulary=vocabulary), None),
    }[kind]()
    model = trained(tmp_path / "run", corpus, end_id)
    expected = evaluate(model, corpus.batches(64))

    status, out, _ = fastvae_cli("evaluate", tmp_path / "run", "--data", words, *QUICK)
    found = json.loads(out)
    assert status == 0
    assert {name: found[name] for name in expected} == pytest.approx(expected)
    assert found["text"] == {
        "kind": corpus.reading.kind,
        "normalization": corpus.reading.normalization,
        **corpus.counts(),
    }

    arguments = "reconstruct", tmp_path / "run", "--data", words, "-n", 99, "--json"
    texts = [pair["text"] for pair in json.loads(fastvae_cli(*arguments)[1])]
    assert texts == [corpus.vocabulary.decode(row) for row in corpus]

    assert (
        fastvae_cli("encode", tmp_path / "run", "--data", words, "--out", tmp_path / "z.npy")[0]
        == 0
    )
    z = np.load(tmp_path / "z.npy")
    own = model.posterior(torch.stack(list(corpus)))[0].detach().numpy()
    kept = [0, 1, 2, 4] if "lines" in kind or kind == "tweets" else range(len(corpus))
    np.testing.assert_allclose(z[list(kept)], own, rtol=1e-5, atol=1e-6)

    first = corpus.vocabulary.decode(corpus[0])
    arguments = "reconstruct", tmp_path / "run", "--json"
    piped = json.loads(fastvae_cli(*arguments, stdin=words.read_bytes().split(b"\n")[0])[1])
    assert piped[0]["text"] == first.split("\n")[0]
    ends = "interpolate", tmp_path / "run", "@dmin2024 x", "letmein", "--json"
    assert json.loads(fastvae_cli(*ends)[1])[0] == piped[0]["reconstruction"]


def test_what_only_python_can_read_is_refused_until_told(words, tmp_path, fastvae_cli):
    corpus = LineCorpus(words, 16, normalize=shout)
    trained(tmp_path / "shouting", corpus, 2)
    status, _, err = fastvae_cli("evaluate", tmp_path / "shouting", "--data", words, *QUICK)
    assert (status, err.count("\n")) == (2, 1)
    assert "test_reading.shout had normalized" in err and "--normalize none" in err
    arguments = "reconstruct", tmp_path / "shouting", "--normalize", "none", "--json"
    assert json.loads(fastvae_cli(*arguments, stdin=b"HI")[1])[0]["text"] == "HI"

    class Own(SyntheticCorpus):
        reading = None

    trained(tmp_path / "own", Own(), None)
    status, _, err = fastvae_cli("reconstruct", tmp_path / "own", stdin=b"the king\n")
    assert (status, err.count("\n")) == (2, 1)
    assert "was trained on Own, a corpus" in err and "--read lines" in err
    arguments = "reconstruct", tmp_path / "own", "--read", "lines", "--json"
    assert json.loads(fastvae_cli(*arguments, stdin=b"the king\n")[1])[0]["text"] == "the king"
    status, _, err = fastvae_cli("evaluate", tmp_path / "own", "--data", words, "--read", "lines")
    assert status == 2 and "no token that ends a line" in err


def test_lines_need_not_be_tweets(words, tmp_path, fastvae_cli):
    arguments = "train", "--data", words, "--preset", "tweets", *TINY
    status, _, err = fastvae_cli(*arguments, "--out", tmp_path / "tweets")
    assert status == 0
    assert "3 of 6 lines changed by normalization (tweets: links become url" in err
    status, out, err = fastvae_cli(
        *arguments, "--out", tmp_path / "lines", "--normalize", "none", "--json"
    )
    assert status == 0 and "changed" not in err
    assert json.loads(out)["text"] == {
        "kind": "lines",
        "normalization": "none",
        "train": {"lines": 6, "empty": 1, "too_long": 0, "unknown": 0, "normalized": 0},
        "valid": None,
    }
    said = fastvae_cli("reconstruct", tmp_path / "lines", "--data", words)[1].decode()
    lines = [line[4:] for line in said.splitlines() if line.startswith("in  ")]
    assert lines == [line for line in LINES.decode().splitlines() if line]


def test_a_run_goes_on_with_the_text_read_as_before(words, tmp_path, fastvae_cli):
    words.write_text("hello\nworld\n")  # the same samples, normalized or not
    arguments = "train", "--data", words, "--preset", "tweets", *TINY, "--out", tmp_path / "run"
    assert fastvae_cli(*arguments)[0] == 0
    status, _, err = fastvae_cli(*arguments, "--resume", "--normalize", "none", "--steps", 3)
    assert status == 2 and "was started with text read as" in err
    # As in a run made before there was a record, which nothing signs.
    (tmp_path / "run" / "text.json").unlink()
    weights = tmp_path / "run" / "model.safetensors"
    with open_tensors(weights) as file:
        tensors, metadata = read_tensors(weights, file)
    unsigned = {k: v for k, v in metadata.items() if k not in ("digest", "text.json")}
    write_tensors(weights, tensors, unsigned)
    assert fastvae_cli(*arguments, "--resume", "--steps", 3)[0] == 0
    assert json.loads((tmp_path / "run" / "text.json").read_text())["normalization"] == "tweets"


def test_changed_ends_of_an_interpolation_are_told(lines_model, fastvae_cli):
    status, _, err = fastvae_cli("interpolate", lines_model, "@ann", "hi")
    assert status == 0
    assert err == ("A was changed by normalization (tweets: links become url, @handles @userid)\n")


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"kind": 3}', '{"kind": "lines", "normalization": 1}']
)
def test_a_damaged_record_is_one_line(content, lines_model, fastvae_cli):
    (lines_model / "text.json").write_text(content)
    status, _, err = fastvae_cli("reconstruct", lines_model, stdin=b"hi\n")
    assert (status, err.count("\n")) == (2, 1) and "text.json" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--read", "words"), "--read words: text is read as windows or lines"),
        (("--normalize", "words"), "no normalization 'words': there are none, tweets"),
        (("--read", "windows", "--normalize", "tweets"), "windows are read as they are"),
    ],
)
def test_senseless_ways_to_read_are_refused(options, message, lines_model, fastvae_cli):
    status, _, err = fastvae_cli("reconstruct", lines_model, *options, stdin=b"hi\n")
    assert (status, err.count("\n")) == (2, 1) and message in err


# Lines left out


def test_encode_keeps_a_row_a_line(lines_model, tmp_path, fastvae_cli):
    path, out = tmp_path / "molecules", tmp_path / "z.npy"
    path.write_bytes(b"CCO\n\nCC(=O)Oc1ccccc1C(=O)O\nc1ccccc1\n@a\nOc1ccccc1C(=O)OCC\n")
    results = []
    for stdin, more in ((b"", ("--data", path)), (path.read_bytes(), ())):
        status, _, err = fastvae_cli("encode", lines_model, "--out", out, *more, stdin=stdin)
        assert status == 0
        name = path if more else "standard input"
        assert err.splitlines() == [
            f"{name}: 1 of 6 lines empty: their rows are of the empty text",
            f"{name}: 2 of 6 lines too long (over 15 bytes), the first is line 3: "
            "their rows are NaN",
            f"{name}: 1 of 6 lines changed by normalization "
            "(tweets: links become url, @handles @userid)",
            f"{out}: 6 texts, 3 dimensions",
        ]
        results.append(np.load(out))
    np.testing.assert_array_equal(*results)
    z = results[0]
    assert z.dtype == np.float32 and z.shape == (6, 3)
    assert np.isnan(z).all(1).tolist() == [False, False, True, False, False, True]
    model, vocabulary = fastvae.load(lines_model)
    tokens = [vocabulary.encode_sample(text, 16) for text in ("CCO", "", "c1ccccc1", "@userid")]
    own = model.posterior(torch.tensor(tokens))[0].detach()
    np.testing.assert_allclose(z[[0, 1, 3, 4]], own, rtol=1e-5, atol=1e-6)
    assert fastvae_cli("encode", lines_model, "--out", out, "--data", path, "--limit", 3)[0] == 0
    assert np.load(out).shape == (3, 3)


def test_encode_takes_the_longest_file_names(lines_model, tmp_path, fastvae_cli):
    out = tmp_path / ("z" * 251 + ".npy")
    assert fastvae_cli("encode", lines_model, "--out", out, stdin=b"hi\n")[0] == 0
    assert np.load(out).shape == (1, 3)
    assert [path for path in tmp_path.iterdir() if path.is_file()] == [out]


def test_commands_tell_what_they_leave_out(lines_model, tmp_path, fastvae_cli):
    path = tmp_path / "lines.txt"
    path.write_text("short\n\n" + "too long for sixteen\n" * 3)
    left = f"{path}: 4 of 5 lines left out: 1 empty, 3 too long (over 15 bytes)\n"
    status, out, err = fastvae_cli("evaluate", lines_model, "--data", path, *QUICK)
    one = "exact reconstruction needs 2 texts or more, for its shuffled control: left out\n"
    assert (status, err) == (0, left + one)
    counts = {"lines": 5, "empty": 1, "too_long": 3, "unknown": 0, "normalized": 0}
    found = json.loads(out)
    assert found["samples"] == 1
    assert found["text"] == {"kind": "lines", "normalization": "tweets", **counts}
    status, out, err = fastvae_cli("reconstruct", lines_model, "--data", path, "--json")
    assert (status, err) == (0, left)
    assert [(pair["line"], pair["text"]) for pair in json.loads(out)] == [(1, "short")]

    arguments = "train", "--data", path, "--valid", path, "--preset", "tweets", *TINY
    status, out, err = fastvae_cli(*arguments, "--length", 16, "--out", tmp_path / "run", "--json")
    assert status == 0 and err.splitlines().count(left.strip()) == 1
    assert json.loads(out)["text"]["train"] == json.loads(out)["text"]["valid"] == counts

    path.write_text("\n" + "too long for sixteen\n")
    status, _, err = fastvae_cli("reconstruct", lines_model, "--data", path)
    assert (status, err.count("\n")) == (2, 1)
    assert "2 of 2 lines left out: 1 empty, 1 too long (over 15 bytes): no text is left" in err


def test_windows_tell_what_is_cut_and_left_over(windows_model, tmp_path, fastvae_cli):
    path = tmp_path / "text"
    path.write_text("abcdefghijklmnopqrstuvwxyz")
    found = json.loads(fastvae_cli("evaluate", windows_model, "--data", path, *QUICK)[1])
    expected = {"kind": "windows", "normalization": "none", "characters_left_over": 10}
    assert found["text"] == expected
    status, out, err = fastvae_cli("reconstruct", windows_model, "--json", stdin=path.read_bytes())
    assert json.loads(out)[0]["text"] == "abcdefghijklmnop"
    assert err == (
        "standard input: 1 of 1 lines have more than 16 characters: only their first 16 were read\n"
    )
    status, _, err = fastvae_cli("interpolate", windows_model, "a" * 17, "b")
    assert (status, err) == (0, "only the first 16 characters of A were read\n")


def test_a_line_may_be_cut_within_a_character(tmp_path, fastvae_cli):
    """Lines of more than a MiB are; they are too long, and no bad UTF-8."""
    vocabulary = CharVocabulary("aé", end=True)
    model_of(vocabulary, vocabulary.end_id).save_pretrained(tmp_path / "model", vocabulary)
    for text, least in (("a" + "é" * 600_000, 524_288), ("é" * 600_000, 524_288)):
        status, _, err = fastvae_cli("reconstruct", tmp_path / "model", stdin=text.encode())
        assert status == 2
        assert f"line 1 of standard input has at least {least} characters, more than the 15" in err


def test_windows_of_tokens_are_cut_by_tokens(tmp_path, fastvae_cli):
    vocabulary = TokenVocabulary(["Cl", "C", "l", "Br"], "Cl|Br|.")
    model_of(vocabulary, None).save_pretrained(tmp_path / "model", vocabulary)
    read = "reconstruct", tmp_path / "model", "--json", "--read", "windows"
    for text, told in (("ClBr" * 8, False), ("C" * 15 + "Cl", False), ("ClBr" * 8 + "C", True)):
        status, out, err = fastvae_cli(*read, stdin=text.encode())
        assert status == 0 and json.loads(out)[0]["text"] == text.removesuffix("C" * told)
        assert ("1 of 1 lines have more than 16 tokens: only their first 16" in err) == told
    status, _, err = fastvae_cli("interpolate", tmp_path / "model", "ClBr" * 8 + "C", "C")
    assert (status, err) == (0, "only the first 16 tokens of A were read\n")


# Standard input


@pytest.mark.parametrize("kind", ["lines", "windows"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text.replace(b"\n", b"\r\n"),
        lambda text: text.replace(b"\n", b"\r"),
        lambda text: codecs.BOM_UTF8 + text,
        lambda text: text.removesuffix(b"\n"),
        gzip.compress,
    ],
    ids=["CRLF", "CR", "mark", "no last end", "gzip"],
)
def test_standard_input_reads_as_a_file(kind, change, tmp_path, request, fastvae_cli):
    model = request.getfixturevalue(f"{kind}_model")
    text = b"green tea\n\nblack\nwhite\n"
    path = tmp_path / "text"
    path.write_bytes(change(text))

    def rows(*more, stdin=b""):
        status, _, err = fastvae_cli(
            "encode", model, "--out", tmp_path / "z.npy", *more, stdin=stdin
        )
        assert status == 0, err
        return np.load(tmp_path / "z.npy")

    expected = rows(stdin=text)
    assert expected.shape == (4, 3)
    np.testing.assert_array_equal(rows(stdin=change(text)), expected)
    if kind == "lines":
        np.testing.assert_array_equal(rows("--data", path), expected)
    pairs = json.loads(fastvae_cli("reconstruct", model, "--json", stdin=change(text))[1])
    found = [(pair["line"], pair["text"]) for pair in pairs]
    assert found == [(1, "green tea"), (3, "black"), (4, "white")]


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            "lines",
            b"ok\n\nmore than sixteen bytes\n",
            "line 3 of standard input has 23 bytes, more",
        ),
        (
            "lines",
            b"ok\n" + b"x" * (1 << 21),
            "line 2 of standard input has at least 1048576 bytes, more",
        ),
        ("windows", b"ok\nno B\n", "'B' (U+0042) at position 3 of line 2 of standard input"),
        ("windows", b"ok\n\n\r\na \xff\n", "line 4 of standard input is not UTF-8 at byte 2"),
        ("lines", "ok\n".encode("utf-16"), "standard input is UTF-16 text, not text in UTF-8"),
        ("lines", b"", "standard input holds no text: pipe one in"),
        (
            "lines",
            b"\n\n",
            "standard input: 2 of 2 lines left out: 2 empty, 0 too long (over 15 bytes): no text",
        ),
    ],
)
def test_errors_on_standard_input_name_the_line(kind, text, message, request, fastvae_cli):
    model = request.getfixturevalue(f"{kind}_model")
    status, _, err = fastvae_cli("reconstruct", model, stdin=text)
    assert (status, err.count("\n")) == (2, 1)
    assert message in err


def test_a_file_called_as_standard_input_is_read(lines_model, tmp_path, monkeypatch, fastvae_cli):
    monkeypatch.chdir(tmp_path)
    for name in ("names.txt", "standard input"):
        (tmp_path / name).write_text("ok\nno\nok\n")
    found = []
    for name in ("names.txt", "standard input"):
        out = tmp_path / f"{name}.npy"
        fastvae_cli("encode", lines_model, "--data", name, "--out", out, stdin=b"no\n")
        found.append(np.load(out))
    assert len(found[0]) == 3 and np.array_equal(*found)


def test_closed_standard_input_is_one_line(lines_model, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(SystemExit):
        cli.main(["reconstruct", str(lines_model)])
    assert capsys.readouterr().err == (
        "fastvae: standard input is closed: name a file with --data\n"
    )


def test_a_line_without_end_on_standard_input(windows_model, lines_model, tmp_path, fastvae_cli):
    """Windows take its beginning, whatever character stands where reading it was cut."""
    endless = b"a" * 20 + "é".encode() * (1 << 20)
    status, out, _ = fastvae_cli("reconstruct", windows_model, "--json", stdin=endless)
    assert status == 0 and json.loads(out)[0]["text"] == "a" * 16
    status, _, err = fastvae_cli("encode", lines_model, "--out", tmp_path / "z.npy", stdin=endless)
    assert status == 0 and "1 of 1 lines too long" in err


# Bytes that are no UTF-8, and what a terminal shows


def test_no_byte_is_lost(lines_model, fastvae_cli):
    text = "señor".encode("latin-1")
    status, out, _ = fastvae_cli("reconstruct", lines_model, stdin=text)
    assert out.splitlines()[0] == rb"in  se\xf1or"
    found = fastvae_cli("reconstruct", lines_model, "--json", stdin=text)[1]
    exact = json.loads(found)[0]["text"].encode("utf-8", "surrogateescape")
    assert exact == text and rb"\udcf1" in found
    found.decode("utf-8", "strict")
    raw = fastvae_cli("reconstruct", lines_model, "--raw", stdin=text)[1]
    assert raw.startswith(b"in  " + text + b"\nout ")
    copy = json.loads(found)[0]["reconstruction"].encode("utf-8", "surrogateescape")
    assert raw == b"in  " + text + b"\nout " + copy + b"\n"
    for command in (("sample", lines_model, "-t", 1), ("interpolate", lines_model, "a", "b")):
        texts = json.loads(fastvae_cli(*command, "--json")[1])
        exact = [text.encode("utf-8", "surrogateescape") for text in texts]
        assert fastvae_cli(*command, "--raw")[1] == b"".join(text + b"\n" for text in exact)
        status, _, err = fastvae_cli(*command, "--raw", "--json")
        assert status == 2 and "--raw and --json exclude each other" in err


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_json_survives_a_terminal_of_few_characters(encoding, monkeypatch):
    written = io.BytesIO()
    stream = io.TextIOWrapper(written, encoding, "backslashreplace")
    monkeypatch.setattr(sys, "stdout", stream)
    for value in (["é☃"], ["é\udcf1☃"]):
        print_json(value)
        stream.flush()
        assert json.loads(written.getvalue().decode(encoding)) == value
        written.seek(0)
        written.truncate()


@pytest.mark.parametrize(
    "text",
    [
        "می\u200cخواهم",
        "👩\u200d💻",
        "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f",
        "春は\u3000あけぼの",
        "Ça va\u00a0?",
        "1\u202f000",
        "co\u00adop",
        "שלום\u200f!",
        "C:\\x0a",
    ],
)
def test_text_is_shown_as_it_is(text):
    assert escape(text) == text


@pytest.mark.parametrize("code", [0x00, 0x1B, 0x7F, 0x85, 0x9B])
def test_control_characters_are_escaped(code):
    assert escape(chr(code)) == f"\\x{code:02x}"


@pytest.mark.parametrize(
    "character", "\u202a\u202e\u2066\u2067\u2069\u2028\u2029\ud800\udc7f\udd00"
)
def test_what_breaks_or_reorders_a_line_is_escaped(character):
    assert escape(character) == f"\\u{ord(character):04x}"


def test_bytes_are_escaped_as_bytes():
    assert escape(b"a\xf1\x80\xff".decode("utf-8", "surrogateescape")) == r"a\xf1\x80\xff"


# What a run says


def test_a_run_too_short_for_its_annealing_says_so(words, tmp_path, fastvae_cli):
    arguments = "train", "--data", words, "--preset", "tweets", *TINY
    said = fastvae_cli(*arguments, "--out", tmp_path / "a", "--kl-end", 100)[2]
    assert "annealed until step 100 (kl_end), but the run ends at step 2 (steps)" in said
    assert "with a weight of 0.011 instead of 1" in said
    for name, finished in {
        "b": ("--kl-end", 2),
        "c": ("--kl-end", 100, "--kl-floor", 0.5, "--kl-target", 0.5),
        "d": ("--kl-end", 100, "--kl-nats", 1),
        "e": ("--kl-end", 4, "--kl-rise", 0.5),
    }.items():
        said = fastvae_cli(*arguments, "--out", tmp_path / name, *finished)[2]
        assert "anneal" not in said


def test_the_bound_is_shown_once_it_means_something(words, tmp_path, fastvae_cli):
    arguments = "train", "--data", words, "--preset", "tweets", *TINY
    low = "--kl-start=9", "--kl-end=9"
    _, out, err = fastvae_cli(*arguments, "--out", tmp_path / "a", *low)
    assert "(weight 0.001)" in err and "bpc" not in err
    assert "bound and bits per character mean little before it is 1" in out.decode()
    _, out, err = fastvae_cli(*arguments, "--out", tmp_path / "b")
    assert "weight" not in err and "bpc" in err
    assert "mean little" not in out.decode()


def test_a_model_trains_on_text_read_otherwise(words, tmp_path):
    """Its record of the former text is replaced, in the model and in its files."""
    lines = LineCorpus(words, 32, normalize=normalize_tweet)
    model = HybridVAE(259, 32, **SIZES, pad_id=256, end_id=257)
    model.reading = Reading("windows")
    config = fastvae.training.TrainingConfig(steps=1, batch_size=2)
    fastvae.training.train(
        model, lines, config, tmp_path / "run", console=Console(file=io.StringIO())
    )
    for reading in (model.reading, fastvae.load(tmp_path / "run")[0].reading):
        assert reading == Reading("lines", "tweets")


# Other systems


def test_without_a_handle_on_the_c_library(monkeypatch):
    """As on Windows."""

    def refuse(name):
        raise TypeError("argument of type 'NoneType' is not iterable")

    monkeypatch.setattr(ctypes, "CDLL", refuse)
    allocator.keep_freed_memory()


def test_what_this_package_can_read_by_itself():
    known = [Reading("windows"), Reading("lines", "tweets"), Reading("lines", "none")]
    assert all(reading.is_known for reading in known)
    assert not Reading("lines", "mine.normalize").is_known and not Reading("MyCorpus").is_known


def test_a_record_that_no_run_writes_is_refused(tmp_path):
    (tmp_path / "text.json").write_text('{"kind": "windows", "normalization": "tweets"}')
    with pytest.raises(ValueError, match=r"text.json: windows are read as they are: .*tweets"):
        load_reading(tmp_path)


@pytest.mark.parametrize("given", [{"column": "1"}, {"field": "t"}, {"part": "train"}], ids=str)
def test_windows_have_no_columns_fields_or_parts(given):
    assert Reading("lines", **given).to_dict() == {"kind": "lines", "normalization": "none"} | given
    with pytest.raises(ValueError, match="windows are read as they are: columns and parts are for"):
        Reading("windows", **given)


def test_names_of_normalizations():
    class Shout:
        def __call__(self, text):
            return text.upper()

    functions = None, normalize_tweet, str.lower, partial(str.replace), shout, Shout()
    assert [normalization_name(function) for function in functions] == [
        *("none", "tweets", "builtins.str.lower", "functools.partial", f"{__name__}.shout"),
        f"{__name__}.test_names_of_normalizations.<locals>.Shout",
    ]


def test_a_run_keeps_what_it_recorded(tmp_path):
    """Readings of other classes are not compared; without a record the corpus tells."""
    lines, own = Reading("lines", "tweets"), Reading("Own")
    assert check_reading(tmp_path, SimpleNamespace(reading=lines)) == lines
    assert check_reading(tmp_path, SimpleNamespace()) == Reading("SimpleNamespace")
    save_reading(tmp_path, lines)
    assert load_reading(tmp_path) == lines
    for reading in (lines, own, Reading("lines", "mine.normalize")):
        assert check_reading(tmp_path, SimpleNamespace(reading=reading)) == lines
    for reading in (Reading("lines"), Reading("windows"), Reading("lines", "tweets", part="train")):
        with pytest.raises(
            ValueError, match=r'with text read as {"kind": "lines", .*, got {"kind"'
        ):
            check_reading(tmp_path, SimpleNamespace(reading=reading))
    save_reading(tmp_path, own)
    assert check_reading(tmp_path, SimpleNamespace(reading=lines)) == own
