"""The chart of a benchmark run: speed-ups over eager, and all that the measured peak allows."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

COLOURS = {
    "fastvae": "#0b6e8f",
    "fastvae bf16": "#5fb3c8",
    "fastvae int8": "#b5dbe4",
    "fastvae recorded": "#7a3e9d",
    "fastvae recorded bf16": "#b48ccb",
    "fastvae persistent": "#2a7f4f",
    "fastvae persistent bf16": "#7cc49a",
    "fastvae persistent fp16": "#b9e0c8",
    "best other, fp32": "#909090",
    "best other, bf16": "#c8c8c8",
    "best other, fp16": "#c8c8c8",
}


def draw(run, path: Path, works: Sequence[str] | None = None) -> None:
    """Writes the chart of a `report.Run`: bars per work on a logarithmic scale, as PNG.

    `works`: those to draw, where the run has them; None: all. Raises ValueError where it has none.
    """
    there = [
        work for work, lines in run.works.items() if "eager" in lines and lines.keys() & {*COLOURS}
    ]
    if not there:
        lines = ", ".join(dict.fromkeys(line for lines in run.works.values() for line in lines))
        raise ValueError(
            f"no work has both a line of fastvae and eager, only {lines}: save a run of "
            "benchmarks/ without --rows, or with those that match both"
        )
    works = [work for work in there if works is None or work in works] or there
    figure, axes = plt.subplots(figsize=(9, 1 + 0.5 * len(works)), layout="constrained")
    for n, work in enumerate(works):
        shown = _shown(run, work)
        height = 0.8 / len(shown)
        for k, (label, line) in enumerate(shown.items()):
            y, speedup = n + (k + 0.5) * height - 0.4, run.speedup(work, line, "eager")
            axes.barh(y, speedup, height, color=COLOURS[label], label=label)
            if label == line and (share := run.works[work][line].share):
                limit = speedup / share
                ends = [y - height / 2, y + height / 2]
                axes.plot([limit] * 2, ends, color="#c0392b", label="all that the peak allows")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(works)), works, fontsize=8)
    axes.set_ylim(len(works) - 0.4, -0.6)
    axes.set_xscale("log")
    axes.set_xticks([1, 2, 5, 10, 20, 50, 100], minor=False)
    axes.minorticks_off()
    axes.xaxis.set_major_formatter("{x:g}×")
    axes.set_xlabel("times as fast as plain PyTorch in float32")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(unique.values(), unique, loc="outside upper center", ncols=3, fontsize=8)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _shown(run, work: str) -> dict[str, str]:
    """Each bar's label and line: ours, and the best of the others in each precision."""
    lines = run.works[work]
    shown = {line: line for line in COLOURS if line in lines}
    for ours in ("fastvae", "fastvae bf16"):
        other = run.best_other(work, ours) if ours in lines else None
        if other and other not in shown.values():
            shown[f"best other, {lines[other].info['dtype']}"] = other
    return shown
