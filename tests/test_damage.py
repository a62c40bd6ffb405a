"""Damaged, senseless and exchanged files: one clear line, and nothing lost in silence."""

import json
import random
import shutil

import pytest
import torch
from test_training import Letters, make_model, quiet, records, run

import fastvae
from fastvae.atomic_files import parse_json
from fastvae.text import CharVocabulary, Reading, WindowCorpus

TEXT = "the cat sat on the mat, the dog did not\n" * 30


def flipped(content: bytes, place: int, bit: int) -> bytes:
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run") / "whole"
    run(folder, steps=12, log_every=2)
    return folder


# Schemas


@pytest.mark.parametrize(
    "text, schema, message",
    [
        ("{", dict, "x is not valid JSON"),
        ("[" * 100_000, dict, "x is not valid JSON"),
        ("3", dict, "x: it must be an object, got 3"),
        ('{"a": 1}', {"a": str}, "x: a must be a string, got 1"),
        ('{"a": true}', {"a": int}, "x: a must be a whole number, got true"),
        ('{"a": 1.5}', {"a": int}, "x: a must be a whole number, got 1.5"),
        ('{"a": {"b": []}}', {"a": {"b": str}}, r"x: a\.b must be a string, got \[\]"),
        ('{"a": [1, "b"]}', {"a": [int]}, r'x: a\.1 must be a whole number, got "b"'),
        ("{}", {"a": str}, "x lacks a"),
        ('{"a": "", "b": 1}', {"a": str}, "x has an unknown key b"),
        ('{"a": 1}', {"a?": (str, type(None))}, "x: a must be a string or null, got 1"),
        ('{"a": 1, "b": ""}', {"a": int, "...": float}, "x: b must be a number"),
    ],
    ids=str,
)
def test_schema_refuses(text, schema, message):
    with pytest.raises(ValueError, match=message):
        parse_json(text, "x", schema)


@pytest.mark.parametrize(
    "text, schema",
    [
        ('{"a": 1}', {"a": float}),
        ('{"a": null}', {"a": (str, type(None))}),
        ("{}", {"a?": str}),
        ('{"a": [true, false]}', {"a": [bool]}),
        ('{"a": 1, "b": 2.5}', {"a": int, "...": float}),
        ('[1, "x", null]', object),
    ],
    ids=str,
)
def test_schema_takes(text, schema):
    assert parse_json(text, "x", schema) == json.loads(text)


# Saved models


@pytest.mark.parametrize("name", ["config.json", "vocabulary.json", "text.json"])
def test_flipped_bits_of_a_saved_model(tmp_path, name):
    vocabulary = CharVocabulary("abcdefgh ,.")
    sizes = {"latent_size": 4, "encoder_channels": (8, 8), "feature_channels": 8}
    model = fastvae.HybridVAE(vocabulary.size, 16, hidden_size=16, pad_id=11, **sizes)
    model.reading = Reading("Lines of mine", "mine.normalized")
    model.save_pretrained(tmp_path, vocabulary)
    path, draw = tmp_path / name, random.Random(0)
    good = path.read_bytes()
    refused = 0
    for _ in range(150):
        path.write_bytes(flipped(good, draw.randrange(len(good)), draw.randrange(8)))
        try:
            found, words = fastvae.load(tmp_path)
        except (ValueError, OSError) as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert (found.config, words) == (model.config, vocabulary)
            assert found.reading == model.reading
    assert refused > 100


def test_a_model_without_signatures_loads(tmp_path):
    """As those saved before there were any."""
    from safetensors.torch import save_file

    vocabulary = CharVocabulary("abc")
    model = fastvae.LSTMVAE(vocabulary.size, 8, latent_size=2, hidden_size=4, pad_id=3)
    model.reading = Reading("lines", "tweets")
    model.save_pretrained(tmp_path, vocabulary)
    save_file(model.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    found, words = fastvae.load(tmp_path)
    assert found.config == model.config and words == vocabulary
    assert found.reading == model.reading


def test_text_read_in_another_way_is_not_the_models(tmp_path):
    model = fastvae.LSTMVAE(4, 8, latent_size=2, hidden_size=4, pad_id=3)
    model.reading = Reading("lines", "tweets")
    model.save_pretrained(tmp_path, CharVocabulary("abc"))
    path = tmp_path / "text.json"
    path.write_text(path.read_text().replace("tweets", "none"))
    for read in (fastvae.load, fastvae.LSTMVAE.from_pretrained):
        with pytest.raises(ValueError, match=r"text\.json is damaged or not the one"):
            read(tmp_path)
    path.unlink()
    for read in (fastvae.load, fastvae.LSTMVAE.from_pretrained):
        with pytest.raises(ValueError, match=r"text\.json is missing, which model\.safe"):
            read(tmp_path)


def test_vocabularies_of_equal_size_are_not_exchanged(tmp_path):
    model = fastvae.LSTMVAE(4, 8, latent_size=2, hidden_size=4, pad_id=3)
    model.save_pretrained(tmp_path, CharVocabulary("abc"))
    CharVocabulary("abd").save(tmp_path / "vocabulary.json")
    with pytest.raises(ValueError, match=r"vocabulary\.json is damaged or not the one"):
        fastvae.load(tmp_path)


@pytest.mark.parametrize("text", ["so \ud83d\ude00", "a\udc80b", "\ud800"], ids=ascii)
def test_half_characters_are_refused(text):
    with pytest.raises(ValueError, match=r"has U\+D[89CA-F0-9]{3}, half of a character"):
        CharVocabulary.from_text(text)


# Runs


def test_a_flipped_bit_of_the_metrics_loses_one_line(whole, tmp_path):
    draw = random.Random(1)
    good = (whole / "metrics.jsonl").read_bytes()
    before = records(whole)
    for n in range(25):
        folder = tmp_path / str(n)
        shutil.copytree(whole, folder)
        path = folder / "metrics.jsonl"
        path.write_bytes(flipped(good, draw.randrange(len(good) - 1), draw.randrange(8)))
        damaged, console = path.read_bytes(), quiet()
        run(folder, steps=14, log_every=2, resume=True, console=console)
        aside = list(folder.glob("metrics.jsonl.damaged*"))
        kept = [record for record in records(folder) if record["step"] <= 12]
        assert len(kept) >= len(before) - 2  # a flipped line end joins two
        if len(kept) < len(before):
            assert [p.read_bytes() for p in aside] == [damaged]
            assert "damaged lines" in console.file.getvalue()


@pytest.mark.parametrize("name", ["training.json", "config.json", "vocabulary.json", "text.json"])
def test_a_flipped_bit_of_the_settings_is_one_line(whole, tmp_path, name):
    draw, good = random.Random(2), (whole / name).read_bytes()
    shutil.copytree(whole, tmp_path / "run")
    for _ in range(40):
        damaged = flipped(good, draw.randrange(len(good)), draw.randrange(8))
        (tmp_path / "run" / name).write_bytes(damaged)
        try:
            run(tmp_path / "run", steps=12, log_every=2, resume=True)
        except ValueError as error:
            assert "\n" not in str(error)


def test_a_config_that_lost_an_argument_is_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    del config["arguments"]["word_dropout"]
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match="was started with word_dropout = None, got"):
        run(tmp_path / "run", steps=12, log_every=2, resume=True)


@pytest.mark.parametrize(
    "damage, message",
    [
        ({"step": "many"}, "step must be a whole number"),
        ({"step": None}, "step must be a whole number"),
        ({"best": "low"}, "best must be a number or null"),
        ({"window": []}, "window must be an object"),
        ({"more": 1}, "unknown key more"),
    ],
    ids=str,
)
def test_a_signed_checkpoint_that_makes_no_sense(whole, tmp_path, damage, message):
    from safetensors import safe_open

    from fastvae.atomic_files import write_tensors

    shutil.copytree(whole, tmp_path / "run")
    for name in ("last", "previous"):
        path = tmp_path / "run" / f"{name}.safetensors"
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            state = json.loads(file.metadata()["fastvae"])
        write_tensors(path, tensors, {"fastvae": json.dumps({**state, **damage})})
    with pytest.raises(ValueError, match=message):
        run(tmp_path / "run", steps=14, log_every=2, resume=True)


class Edited(Letters):
    """The same first batch, another text after it."""

    def digest(self):
        return super().digest()[::-1]


def test_other_data_are_refused(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    settings = {"steps": 14, "log_every": 2, "resume": True}
    with pytest.raises(ValueError, match="started with other training data"):
        run(tmp_path / "run", corpus=Edited(), **settings)
    with pytest.raises(ValueError, match="started with other validation data"):
        run(tmp_path / "run", validation=Edited(), **settings)


def test_digest_is_of_every_id(tmp_path):
    digests = set()
    for place in (0, len(TEXT) // 2, len(TEXT) - 2, None):
        text = TEXT if place is None else TEXT[:place] + "n" + TEXT[place + 1 :]
        (tmp_path / "text").write_text(text)
        found = {WindowCorpus(p, 16).digest() for p in (tmp_path / "text", text)}
        assert len(found) == 1
        digests |= found
    assert len(digests) == 4


def test_a_run_of_before_goes_on(whole, tmp_path):
    """With a digest of the first batch alone, as its training.json had."""
    import hashlib

    from fastvae.training.step import seeded_generator

    shutil.copytree(whole, tmp_path / "run")
    path = tmp_path / "run" / "training.json"
    saved = json.loads(path.read_text())
    first = Letters().batch(
        saved["config"]["batch_size"], seeded_generator(saved["config"]["seed"], 0)
    )
    data = hashlib.blake2b(first.numpy().tobytes(), digest_size=16).hexdigest()
    path.write_text(json.dumps({"data": data, "config": saved["config"]}))
    run(tmp_path / "run", steps=14, log_every=2, resume=True)
    assert json.loads(path.read_text())["data"] == saved["data"]
    path.write_text(json.dumps({"data": data[::-1], "config": saved["config"]}))
    with pytest.raises(ValueError, match="started with other training data"):
        run(tmp_path / "run", steps=16, log_every=2, resume=True)


def test_another_machine_is_told(whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    path, console = tmp_path / "run" / "training.json", quiet()
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({**saved, "threads": 99, "cpu_capability": "abacus"}))
    run(tmp_path / "run", steps=14, log_every=2, resume=True, console=console)
    said = console.file.getvalue()
    assert "started with 99 threads, now" in said and "abacus cpu capability" in said
    assert "not the same bit for bit" in said


@pytest.mark.parametrize(
    "wrap", [lambda m: torch.compile(m, backend="eager"), torch.nn.DataParallel]
)
def test_wrapped_models_are_saved_as_themselves(tmp_path, wrap):
    model = make_model()
    run(tmp_path / "run", wrap(model), steps=4, log_every=2)
    for best in (False, True):
        found, _ = fastvae.load(tmp_path / "run", best=best)
        assert found.state_dict().keys() == model.state_dict().keys()
    _, result = run(tmp_path / "run", steps=6, log_every=2, resume=True)
    assert result["step"] == 6


def test_a_failing_tensorboard_ends_no_run(tmp_path, monkeypatch):
    writer = pytest.importorskip("torch.utils.tensorboard").SummaryWriter

    def fail(*_, **__):
        raise OSError("no space left")

    monkeypatch.setattr(writer, "add_scalar", fail)
    console = quiet()
    _, result = run(tmp_path / "run", steps=6, log_every=2, console=console)
    assert result["step"] == 6
    assert console.file.getvalue().count("no TensorBoard log from here on: no space left") == 1
