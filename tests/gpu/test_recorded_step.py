"""Training on the GPU: recorded steps do what launched ones do; what cannot be recorded runs."""

import io
import json

import pytest
import test_training as training
import torch
from rich.console import Console

import fastvae
from fastvae.training import recorded_step

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

SIZES = {"vocab_size": 11, "length": 8, "pad_id": 10, "word_dropout": 0.3, "latent_size": 4}
SIZES |= {"encoder_channels": (8,), "feature_channels": 6}
MODELS = {
    "lstm": {"decoder": "lstm", "hidden_size": 24},
    "bytenet": {"decoder": "bytenet", "conv_channels": 24, "conv_layers": 2},
    "none": {"decoder": "none"},
}
CHANGES = {"steps": 12, "log_every": 1}


def run(folder, name="lstm", kind=fastvae.HybridVAE, resume=False, **changes):
    """-> the model, the result, and what was said."""
    torch.manual_seed(0)
    model, said = kind(**SIZES, **MODELS[name]).cuda(), io.StringIO()
    console = Console(file=said, width=200)
    _, result = training.run(folder, model, resume=resume, console=console, **CHANGES | changes)
    return model, result, said.getvalue()


def losses(folder):
    lines = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if line["split"] == "train"]


@pytest.fixture
def launched(monkeypatch):
    """launched(...): run(...) without a recording."""

    def call(*arguments, **named):
        with monkeypatch.context() as patch:
            patch.setattr(recorded_step, "WARM_UP", 1 << 30)
            return run(*arguments, **named)

    return call


@pytest.mark.parametrize(
    "changes", [{}, {"accumulate": 2, "clip_norm": 0.5}, {"precision": "bf16"}]
)
@pytest.mark.parametrize("name", MODELS)
def test_recorded_steps_equal_launched_ones(tmp_path, launched, name, changes):
    model, result, said = run(tmp_path / "recorded", name, **changes)
    other, expected, _ = launched(tmp_path / "launched", name, **changes)
    assert result["step"] == expected["step"] == 12 and "kernel by kernel" not in said
    assert losses(tmp_path / "recorded") == losses(tmp_path / "launched")
    for got, want in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(got, want) and got.grad is None


def test_resumed_in_the_middle(tmp_path):
    run(tmp_path / "whole")
    run(tmp_path / "parts", steps=7)
    run(tmp_path / "parts", resume=True)
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")


def test_a_model_that_waits_for_the_device_is_launched(tmp_path, launched):
    class Waiting(fastvae.HybridVAE):
        def forward(self, *inputs, **options):
            out = super().forward(*inputs, **options)
            assert out.loss.item() == out.loss.item()
            return out

    _, result, said = run(tmp_path / "waiting", kind=Waiting)
    assert result["step"] == 12 and said.count("kernel by kernel") == 1
    launched(tmp_path / "launched")
    assert losses(tmp_path / "waiting") == losses(tmp_path / "launched")


def test_inputs_of_another_shape_are_refused():
    step = recorded_step.RecordedStep(lambda x, y: x.sum())
    for n in range(6):
        assert step(torch.full((2, 3), float(n)), None).item() == 6 * n
    for wrong in ((torch.ones(1, 3), None), (torch.ones(2, 3), torch.ones(1))):
        with pytest.raises(ValueError, match="at first"):
            step(*wrong)
    assert step(torch.ones(2, 3), None).item() == 6
