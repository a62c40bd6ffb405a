"""Every option of a command changes what it says, seen in what the command prints."""

import json
import shutil

import numpy as np
import pytest
import torch
from test_cli import TEXT, TINY, run  # noqa: F401  a fixture

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

    assert [*lines([b"a\r\r\nb\r\n\r\nc\rd\n"])] == [b"a\r", b"b", b"", b"c\rd"]
