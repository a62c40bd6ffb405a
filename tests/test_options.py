"""Every option of a command changes what it says, seen in what the command prints."""

import inspect
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from test_cli import TEXT, TINY, run  # noqa: F401  a fixture

from fastvae.cli import models as commands
from fastvae.cli import training
from fastvae.models import load
from fastvae.models.text_vae import TextVAE

LONGER = "the dog sat.\n" * 60 + TEXT


@pytest.fixture
def text(tmp_path):
    (tmp_path / "long.txt").write_text(LONGER)
    return tmp_path / "long.txt"


@pytest.fixture
def other(run, fastvae, text, tmp_path):  # noqa: F811
    """A run of another seed, in a folder whose best weights are those of `run`."""
    folder = tmp_path / "other"
    options = ["--data", run.parent / "text.txt", "--valid", run.parent / "text.txt"]
    assert fastvae("train", *options, "--out", folder, *TINY, "--seed", 5)[0] == 0
    shutil.copy(run / "best.safetensors", folder / "best.safetensors")
    return folder


def printed(fastvae, *arguments):
    status, out, err = fastvae(*arguments, "--json")
    assert status == 0, err
    return json.loads(out)


def test_sample(fastvae, run):  # noqa: F811
    plain = printed(fastvae, "sample", run, "-n", 8)
    warm = printed(fastvae, "sample", run, "-n", 8, "-t", 1.0)
    assert plain == printed(fastvae, "sample", run, "-n", 8) and len(plain) == 8
    assert warm == printed(fastvae, "sample", run, "-n", 8, "-t", 1.0) != plain
    assert warm != printed(fastvae, "sample", run, "-n", 8, "-t", 1.0, "--seed", 1)
    assert warm != printed(fastvae, "sample", run, "-n", 8, "-t", 2.0)
    assert warm != printed(fastvae, "sample", run, "-n", 8, "-t", 1.0, "--batch-size", 4)


def test_int8(fastvae, run, text):  # noqa: F811
    """Of many tokens that a model of no training hardly tells apart, some are others."""
    text.write_text(LONGER * 20)
    for command in (
        ("sample", run, "-n", 2000, "-t", 1.0),
        ("reconstruct", run, "--data", text, "-n", 2000, "-t", 1.0),
    ):
        assert printed(fastvae, *command) != printed(fastvae, *command, "--int8")
    model, vocabulary = load(run)
    for options, quantization in ((), None), (("--int8",), "int8"):
        generator = torch.Generator().manual_seed(3)
        how = {"temperature": 1.0, "generator": generator, "quantization": quantization}
        command = "sample", run, "-n", 2000, "-t", 1.0, "--batch-size", 2000, "--seed", 3
        expected = vocabulary.batch_decode(model.sample(2000, **how))
        assert printed(fastvae, *command, *options) == expected


def test_texts_of_the_command_are_those_of_the_model(fastvae, run):  # noqa: F811
    """With rounded weights too: each end, and a point between them."""
    model, vocabulary = load(run)
    ends = "the cat sat on t", "a dog ran to the"
    means = model.encode(torch.tensor([vocabulary.encode(text) for text in ends]))
    for options, quantization in ((), None), (("--int8",), "int8"):
        expected = model.interpolate(*means, 3, quantization=quantization)
        expected = vocabulary.batch_decode(expected)
        assert printed(fastvae, "interpolate", run, *ends, "--steps", 3, *options) == expected
        generator = torch.Generator().manual_seed(4)
        how = {"temperature": 2.0, "generator": generator, "quantization": quantization}
        expected = vocabulary.batch_decode(model.generate(means, **how))
        stdin = "\n".join(ends).encode()
        command = "reconstruct", run, "--json", "-t", 2.0, "--seed", 4, *options
        pairs = json.loads(fastvae(*command, stdin=stdin)[1])
        assert [(pair["text"], pair["reconstruction"]) for pair in pairs] == [
            *zip(ends, expected, strict=True)
        ]


@pytest.mark.parametrize("command", ["sample", "reconstruct", "interpolate", "evaluate", "encode"])
def test_best(fastvae, run, other, text, tmp_path, command):  # noqa: F811
    """The best weights of `other` are those of `run`'s best."""
    arguments = {
        "sample": ("-n", 20, "-t", 1.0),
        "reconstruct": ("--data", text, "-t", 1.0),
        "interpolate": ("the cat sat on t", "a dog ran to the"),
        "evaluate": ("--data", text, "--limit", 20),
        "encode": ("--data", text, "--limit", 20, "--out", tmp_path / "z.npy"),
    }[command]

    def result(folder, *options):
        if command == "encode":
            assert fastvae(command, folder, *arguments, *options)[0] == 0
            return np.load(tmp_path / "z.npy").tolist()
        return printed(fastvae, command, folder, *arguments, *options)

    assert result(other, "--best") == result(run, "--best")
    if command != "interpolate":  # texts of so small a model may be equal
        assert result(other) != result(other, "--best")


def test_reconstruct(fastvae, run, text):  # noqa: F811
    def out(*options):
        return printed(fastvae, "reconstruct", run, "--data", text, *options)

    assert len(out()) == 10 and len(out("-n", 3)) == 3
    assert out() != out("-t", 1.0) != out("-t", 1.0, "--seed", 1)


def test_interpolate(fastvae, run):  # noqa: F811
    ends = "the cat sat on t", "a dog ran to the"
    assert len(printed(fastvae, "interpolate", run, *ends)) == 7
    assert len(printed(fastvae, "interpolate", run, *ends, "--steps", 3)) == 3


def test_evaluate(fastvae, run, text):  # noqa: F811
    def out(*options):
        return printed(fastvae, "evaluate", run, "--data", text, *options)

    plain = out()
    limited = out("--limit", 5)
    assert limited["samples"] == 5 < plain["samples"]
    assert out("--seed", 1)["reconstruction"] != plain["reconstruction"]
    assert "importance_weighted_nll" not in out("--nll-texts", 0)
    assert out("--nll-texts", 8)["importance_weighted_nll_texts"] == 8
    assert out("--nll-samples", 7)["importance_weighted_nll_samples"] == 7
    assert "mutual_information" not in out("--mi-texts", 0)
    assert out("--mi-texts", 9)["mutual_information_texts"] == 9
    assert plain["mutual_information_texts"] == plain["samples"] < 4096
    assert "exact_reconstruction" not in out("--reconstruct-texts", 0)
    assert out("--reconstruct-texts", 7)["reconstruction_texts"] == 7
    assert out("--int8-texts", 6)["int8_texts"] == 6


def test_evaluate_draws_from_its_seed_alone(fastvae, run, text):  # noqa: F811
    def out(seed):
        options = ("--limit", 20, "--int8-texts", 20, "--seed", seed)
        return printed(fastvae, "evaluate", run, "--data", text, *options)

    plain, other = out(1), out(2)
    assert out(1) == plain
    for name in ("importance_weighted_nll", "mutual_information", "int8_bpc_loss"):
        assert other[name] != plain[name]


def test_evaluate_takes_batches_of_the_size_asked_for(fastvae, run, text, monkeypatch):  # noqa: F811
    sizes = set()

    def noted(self, tokens, *rest, forward=TextVAE.forward, **options):
        sizes.add(len(tokens))
        return forward(self, tokens, *rest, **options)

    monkeypatch.setattr(TextVAE, "forward", noted)
    printed(fastvae, "evaluate", run, "--data", text, "--limit", 10, "--batch-size", 4)
    assert sizes == {4, 2}


def test_encode(fastvae, run, text, tmp_path):  # noqa: F811
    def out(*options):
        path = tmp_path / "z.npy"
        assert fastvae("encode", run, "--data", text, "--out", path, *options)[0] == 0
        return np.load(path)

    assert len(out("--limit", 4)) == 4 < len(out())
    np.testing.assert_allclose(out("--batch-size", 3), out(), rtol=0, atol=1e-5)


DEFAULTS = {
    commands.evaluate: {
        "limit": None, "nll_texts": 64, "nll_samples": 64, "mi_texts": 4096,
        "reconstruct_texts": 1000, "int8_texts": 0, "batch_size": 64, "seed": 0,
    },
    commands.sample: {"n": 20, "temperature": 0.0, "batch_size": 256, "seed": 0},
    commands.reconstruct: {
        "data": None,
        "n": None,
        "temperature": 0.0,
        "batch_size": 256,
        "seed": 0,
    },
    commands.interpolate: {"steps": 7},
    commands.encode: {"data": None, "limit": None, "batch_size": 256},
    training.demo: {"out": None, "steps": 1000, "seed": 0},
    training.fields: {"preset": "lines"},
    training.experiment: {
        "data": None, "valid": None, "test": None, "out": Path("experiments"), "text": None,
        "steps": None, "points": None, "seeds": 1, "jobs": None, "limit": None,
    },
}  # fmt: skip
OFF = {"device": None, "threads": None, "read": None, "normalize": None, "column": None}
OFF |= {"field": None} | dict.fromkeys(
    ("best", "int8", "held_out", "raw", "as_json", "paper"), False
)


@pytest.mark.parametrize("command", DEFAULTS, ids=lambda command: command.__name__)
def test_options_that_are_not_given(command):
    parameters = inspect.signature(command).parameters.values()
    found = {p.name: p.default for p in parameters if p.default is not p.empty}
    expected = {name: OFF[name] for name in found if name in OFF} | DEFAULTS[command]
    assert found == expected


def test_least_and_largest_values(fastvae, run):  # noqa: F811
    ends = "interpolate", run, "the cat", "a dog", "--steps"
    assert "--steps" in fastvae(*ends, 1)[2] and len(printed(fastvae, *ends, 2)) == 2
    sample = "sample", run, "-n", 1, "--seed"
    for seed in (-(2**63), 2**63 - 1):
        assert fastvae(*sample, seed)[0] == 0
    for seed in (-(2**63) - 1, 2**63):
        assert f"a seed has 64 bits at most, got {seed}" in fastvae(*sample, seed)[2]


@pytest.mark.parametrize(
    "command",
    ["interpolate RUN a b --steps", "demo --steps", "experiment fig6 --steps", "sample RUN -n"],
)
def test_whole_numbers_of_any_length_are_one_line(fastvae, run, command):  # noqa: F811
    arguments = [run if word == "RUN" else word for word in command.split()]
    status, out, err = fastvae(*arguments, "9" * 400)
    assert (status, out, err.count("\n")) == (2, "", 1)
    assert f"Invalid value for '{arguments[-1]}'" in err or "'-n' / '--number'" in err


MEASURES = {
    "reconstruction": "reconstruction",
    "KL": "kl",
    "bound (reconstruction + KL)": "bound",
    "bits per character": "bpc",
    "auxiliary": "auxiliary",
    "active units": "active_units",
    "mutual information of x and z": "mutual_information",
    "importance-weighted NLL": "importance_weighted_nll",
    "exact reconstruction": "exact_reconstruction",
    "shuffled control": "shuffled_reconstruction",
    "token accuracy": "token_accuracy",
    "bits per character lost to int8": "int8_bpc_loss",
    "int8 token agreement": "int8_token_agreement",
    "int8 greedy agreement": "int8_greedy_agreement",
    "texts": "samples",
}


def test_the_table_of_evaluate_is_its_json(fastvae, run, text, monkeypatch):  # noqa: F811
    monkeypatch.setenv("COLUMNS", "200")
    command = "evaluate", run, "--data", text, "--limit", 60, "--int8-texts", 50
    command += "--nll-texts", 9, "--nll-samples", 3, "--mi-texts", 40, "--reconstruct-texts", 30
    values = printed(fastvae, *command)
    shown = fastvae(*command)[1].splitlines()
    rows = [re.split(r" {2,}", line.strip()) for line in shown[1 : 1 + len(MEASURES)]]
    assert [row[0] for row in rows] == list(MEASURES)
    for label, number, *_ in rows:
        value = values[MEASURES[label]]
        assert float(number.replace(",", "")) == pytest.approx(value, rel=1e-3, abs=5e-3), label
        assert abs(value) >= 10 or float(number) == pytest.approx(value, rel=1e-3), label
    notes = {row[0]: row[2] for row in rows if len(row) > 2}
    assert notes["active units"] == "of 3"
    assert notes["mutual information of x and z"] == "nats, from 40 texts"
    assert notes["importance-weighted NLL"] == "nats per text, first 9 texts, 3 samples each"
    assert notes["exact reconstruction"].startswith("of 30 texts, greedy")
    assert notes["bits per character lost to int8"] == "of the bound, first 50 texts"


def test_what_latents_keep():
    result = {"exact_reconstruction": 0.5, "shuffled_reconstruction": 0.125, "kl": 3.21}
    assert commands.what_latents_keep(result).startswith(
        "The latent returns 50.0 % of the texts exactly (12.5 % from shuffled latents), for 3.2 na"
    )


def test_the_table_of_train_is_its_last_records(fastvae, text, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    command = "train", "--data", text, "--valid", text, "--out", tmp_path / "run", *TINY
    shown = fastvae(*command)[1].splitlines()
    names = ["step", "reconstruction", "KL", "KL weight", "bound", "bpc"]
    assert re.split(r" {2,}", shown[0].strip()) == names
    records = map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines())
    last = {record["split"]: record for record in records}
    for line in shown[1:3]:
        split, *numbers = line.split()
        keys = ("step", "reconstruction", "kl", "kl_weight", "bound", "bpc")
        for number, key in zip(numbers, keys, strict=True):
            value = last[split][key]
            assert float(number) == pytest.approx(value, rel=1e-3, abs=5e-3 * (value > 10)), key


def test_train_reads_every_option(fastvae, text, tmp_path):
    folder = tmp_path / "run"
    options = {"seed": 7, "kl_target": 0.5, "clip_norm": 3.0, "samples": 2, "kl_cycles": 1}
    named = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    assert fastvae("train", "--data", text, "--out", folder, *TINY, *named)[0] == 0
    saved = json.loads((folder / "training.json").read_text())["config"]
    assert {name: saved[name] for name in options} == options
    assert json.loads((folder / "config.json").read_text())["arguments"]["hidden_size"] == 8


def test_train_begins_with_weights_of_its_seed(fastvae, text, tmp_path):
    """A learning rate of almost nothing leaves them as they were drawn."""
    weights = []
    for n, seed in enumerate((0, 0, 1)):
        options = ("--seed", seed, "--learning-rate", 1e-30)
        assert fastvae("train", "--data", text, "--out", tmp_path / str(n), *TINY, *options)[0] == 0
        weights.append(load(tmp_path / str(n))[0].decoder.classifier.weight)
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_lines_that_end_twice():
    from fastvae.text.files import lines

    assert [*lines([b"a\r\r\nb\r\n\r\nc\rd\n"])] == [b"a", b"", b"b", b"", b"c", b"d"]
