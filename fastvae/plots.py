"""Learning curves of runs, from their metrics.jsonl to a PNG."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TRAINING, VALIDATION, BOUND = "#9ab8d3", "#1f5a8f", "#c0392b"


def read_metrics(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """A run's metrics.jsonl as split -> rows in order of their steps; OSError if it is missing."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        rows.setdefault(row["split"], []).append(row)
    return rows


def learning_curves(
    metrics: Mapping[str, list[dict[str, Any]]],
    path: str | Path,
    *,
    entropy: float | None = None,
    title: str = "",
) -> None:
    """Draw bound, reconstruction and KL, nats per sample, against steps; the suffix is the format.

    `entropy`, where the corpus knows it, is the line that no bound can pass. Training values are
    light, validation values dark. Raises ValueError where there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    if not any(metrics.values()):
        raise ValueError("metrics.jsonl has no rows yet: train the run first")
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.6), layout="constrained")
    panels = ("bound", "bound = reconstruction + KL"), ("reconstruction",) * 2, ("kl", "KL")
    for axis, (key, name) in zip(axes, panels, strict=True):
        for split, colour, width in ("train", TRAINING, 1.0), ("valid", VALIDATION, 1.8):
            points = [(row["step"], row[key]) for row in metrics.get(split, []) if key in row]
            if points:
                marker = "o" if len(points) < 30 and split == "valid" else None
                steps, values = zip(*points, strict=True)
                axis.plot(steps, values, color=colour, lw=width, marker=marker, ms=3.5, label=split)
        axis.set(title=name, xlabel="step")
        axis.set_ylim(bottom=0)
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    if entropy is not None:
        label = f"entropy of the corpus, {entropy:.1f}"
        axes[0].axhline(entropy, color=BOUND, ls="--", lw=1.3, label=label)
    axes[0].set_ylabel("nats per sample")
    axes[0].legend(frameon=False)
    if title:
        figure.suptitle(title)
    figure.savefig(path, dpi=130)
    plt.close(figure)
