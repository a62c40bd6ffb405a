"""Training speed of the hybrid and the LSTM VAE, ours and plain PyTorch's, steps in turns."""

import time
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor, nn

from fastvae import reference
from fastvae.console import track
from fastvae.device import find_device
from fastvae.experiments import fig4, table3
from fastvae.experiments.grid import CHARACTERS, RELEASED, TWEETS, Configuration, runs
from fastvae.presets import Preset, build_model, check_effect, field_types, open_corpus
from fastvae.training.config import TrainingConfig

TITLE = "Speed: training steps per second"
CLAIM = "the hybrid trains about 2x faster than the LSTM VAE"
STEPS = 20
# Fields of training that a step here does not depend on: it takes a batch, and nothing else.
IDLE = {field.name for field in fields(TrainingConfig)} - {"batch_size"}
CONFIGURATIONS: dict[str, tuple[Configuration, ...]] = {
    TWEETS: (table3.HYBRID, table3.lstm(0.5, RELEASED)),
    CHARACTERS: tuple(
        configuration
        for configuration in fig4.EXPERIMENT.grids[CHARACTERS]
        if configuration.x == 48 and configuration.series in (fig4.HYBRID, "LSTM VAE, p = 0.5")
    )[:2],
}


def idle_fields(text: str, overrides: Mapping[str, str]) -> list[str]:
    """The overrides that change neither a model nor its batch; ValueError for unknown ones."""
    idle = [name for name in overrides if name in IDLE]
    rest = {name: value for name, value in overrides.items() if name not in IDLE}
    presets = [run.preset for run in runs(CONFIGURATIONS[text], STEPS, 1, rest)]
    return idle + [name for name in rest if not any(_has_effect(p, name) for p in presets)]


def measure_speed(
    text: str, data: str, cache: Path, steps: int, device: str | None, overrides: Mapping[str, str]
) -> dict[str, Any]:
    """Median seconds of `steps` steps of each model, ours and plain PyTorch's, taken in turns."""
    where = find_device(device)
    trainers, sizes = {}, {}
    for run in runs(CONFIGURATIONS[text], steps, 1, overrides):
        corpus = open_corpus(Path(data), run.preset.length, text=run.preset.text, cache=cache)
        torch.manual_seed(0)
        model = build_model(run.preset, corpus.vocabulary).to(where)
        reference_model = getattr(reference, run.preset.model)(**model.config).to(where)
        reference_model.load_state_dict(model.state_dict())
        batch = run.preset.training["batch_size"]
        tokens = corpus.batch(batch, torch.Generator().manual_seed(0)).to(where)
        trainers[run.configuration.series, "fastvae"] = _trainer(model, tokens)
        trainers[run.configuration.series, "plain PyTorch"] = _trainer(reference_model, tokens)
        sizes[run.configuration.series] = sum(p.numel() for p in model.parameters())
    times: dict[tuple[str, str], list[float]] = {key: [] for key in trainers}
    for turn in track(range(steps + 1), "steps in turns", steps + 1):
        for key, step in trainers.items():
            begin = time.perf_counter()
            step()
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            if turn:  # the first warms up
                times[key].append(time.perf_counter() - begin)
    rows = [
        {
            "model": name,
            "by": by,
            "parameters": sizes[name],
            "steps": steps,
            "seconds_per_step": median(found),
            "steps_per_second": 1 / median(found),
        }
        for (name, by), found in times.items()
    ]
    found = {(row["model"], row["by"]): row["steps_per_second"] for row in rows}
    names = list(sizes)
    ratios = {by: found[names[0], by] / found[names[1], by] for by in ("fastvae", "plain PyTorch")}
    return {"rows": rows, "ratios": ratios}


def page(result: Mapping[str, Any], notes: list[str]) -> str:
    """The measured speeds -> a Markdown page."""
    ratios = [f"| {by} | {ratio:.2f}x |" for by, ratio in result["ratios"].items()]
    lines = [
        f"| {r['model']} | {r['by']} | {r['parameters']:,} | {r['steps_per_second']:.3g} |"
        for r in result["rows"]
    ]
    parts = [
        f"# {TITLE}",
        "\n".join(f"- {note}" for note in notes),
        f"The paper: {CLAIM}. Ours, steps per second of the hybrid over those of the LSTM VAE:",
        "\n".join(["| implementation | ratio |", "| --- | --- |", *ratios]),
        "\n".join(
            [
                "| model | implementation | parameters | steps per second |",
                "|" + " --- |" * 4,
                *lines,
            ]
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _has_effect(preset: Preset, name: str) -> bool:
    try:
        check_effect(preset, [name])
    except ValueError:
        return False
    return name in field_types(preset)


def _trainer(model: nn.Module, tokens: Tensor):
    """A training step: forward, backward, Adam."""
    optimizer = torch.optim.Adam(model.parameters(), 1e-4, fused=True)
    model.train()

    def step() -> None:
        model(tokens, 0.5).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step
