"""A run that an earlier version wrote loads, evaluates, resumes and generates as it did there."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import fastvae
from fastvae.evaluation import measure
from fastvae.text import WindowCorpus

DATA = Path(__file__).parent / "data"
EXPECTED = json.loads((DATA / "expected.json").read_text())
CLOSE = {"rel": 1e-5}  # sums of float32 terms, rounded in another order on other processors


@pytest.fixture(scope="module")
def saved():
    model, vocabulary = fastvae.load(DATA / "run")
    z = torch.randn(8, model.latent_size, generator=torch.Generator().manual_seed(3))
    return model, corpus("valid", model, vocabulary), z


def corpus(name, model, vocabulary):
    return WindowCorpus(DATA / f"{name}.txt", model.length, vocabulary=vocabulary)


def test_generates_the_same_tokens(saved):
    model, valid, z = saved
    generator = torch.Generator().manual_seed(4)
    assert model.generate(z).tolist() == EXPECTED["generated"]
    sampled = model.generate(z, temperature=1.0, generator=generator)
    assert sampled.tolist() == EXPECTED["sampled"]
    assert model.interpolate(z[0], z[1], 5).tolist() == EXPECTED["interpolated"]
    mean, _ = model.posterior(next(iter(valid.batches(8, 8))))
    assert model.generate(mean).tolist() == EXPECTED["reconstructed"]


def test_evaluates_to_the_same_values(saved):
    model, valid, _ = saved
    result = measure(model, valid)
    for name, value in EXPECTED["evaluated"].items():
        assert result[name] == pytest.approx(value, **CLOSE), name


def test_resumes_to_the_same_records(tmp_path):
    shutil.copytree(DATA / "run", tmp_path / "run")
    model, vocabulary = fastvae.load(tmp_path / "run")
    train, valid = corpus("train", model, vocabulary), corpus("valid", model, vocabulary)
    settings = json.loads((tmp_path / "run/training.json").read_text())["config"]
    config = fastvae.TrainingConfig(**{**settings, "steps": 404})
    result = fastvae.train(model, train, config, tmp_path / "run", validation=valid, resume=True)
    assert result["step"] == 404
    assert result["valid"]["step"] == 404
    # Of validation nothing: Adam moves biases before a batch norm by the noise of their gradients,
    # and running means follow them late.
    for name, value in EXPECTED["resumed"].items():
        assert result["train"][name] == pytest.approx(value, **CLOSE), name
