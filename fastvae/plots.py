"""Learning curves of runs, from their metrics.jsonl to a PNG."""

import atexit
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

from fastvae.atomic_files import make_folder, write_bytes
from fastvae.training.run_directory import read_records

SUFFIXES = ".png", ".svg", ".pdf"
COLORS = {"train": "#8fb3d1", "valid": "#1f5a8f"}
LINE, WEIGHT = "#c0392b", "#8a8a8a"
PANELS = {
    "bound": "bound = reconstruction + KL, nats",
    "bpc": "bits per character of the bound",
    "reconstruction": "reconstruction, nats",
    "kl": "KL, nats",
}

Metrics = Mapping[str, list[dict[str, Any]]]
Lines = Mapping[str, tuple[list[dict[str, Any]], str, bool]]


def pyplot():
    """matplotlib's, which draws to files here, with a cache of its own where the home has none."""
    try:
        has_home = os.access(Path.home(), os.W_OK)
    except RuntimeError:  # no home, and none in the system's list of users
        has_home = False
    if "MPLCONFIGDIR" not in os.environ and not has_home:
        cache = tempfile.mkdtemp(prefix="fastvae-")
        atexit.register(shutil.rmtree, cache, ignore_errors=True)
        os.environ["MPLCONFIGDIR"] = cache
    import matplotlib

    if "matplotlib.pyplot" not in sys.modules:  # else the caller has a backend
        matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def read_metrics(path: str | Path) -> dict[str, list[dict[str, Any]]]:
    """A run's metrics.jsonl -> rows by split, in order of steps; OSError or ValueError by name."""
    rows: dict[str, list[dict[str, Any]]] = {"train": [], "valid": []}
    for number, row in read_records(Path(path).read_bytes()):
        if row is None:
            raise ValueError(f"{path}: line {number} is no record of a run")
        rows[row["split"]].append(row)
    return rows


def learning_curves(
    metrics: Metrics, path: str | Path, *, entropy: float | None = None, title: str = ""
) -> None:
    """Draw bound, bits per character, reconstruction, KL and its weight against steps.

    Frames fit what follows the first twentieth of the steps, on a logarithmic scale where it spans
    a factor of ten.

    Args:
        metrics: what `read_metrics` returns.
        path: of the picture; the suffix gives the format.
        entropy: of a sample, nats, where it is known: a line that no bound can pass.
        title: above the picture.

    Raises:
        ValueError: there is nothing to draw.
    """
    if not any(metrics.values()):
        raise ValueError("metrics.jsonl has no rows yet: train the run first")
    lines = {split: (metrics[split], color, split == "valid") for split, color in COLORS.items()}
    figure, axes = _panels(lines)
    if entropy is not None:
        label = f"entropy of the corpus, {entropy:.1f}"
        axes["bound"].axhline(entropy, color=LINE, ls="--", lw=1.3, label=label)
        _legend(axes)
    _weight(axes["kl"], metrics)
    if title:
        figure.suptitle(_plain(title))
    save_figure(figure, path)


def compare_runs(runs: Mapping[str, Metrics], path: str | Path) -> None:
    """Draw the terms of several runs against steps: of their validation data, or of training.

    Args:
        runs: name -> what `read_metrics` returns.
        path: of the picture; the suffix gives the format.

    Raises:
        ValueError: a run has no rows.
    """
    lines = {}
    for number, (name, metrics) in enumerate(runs.items()):
        rows = metrics["valid"] or metrics["train"]
        if not rows:
            raise ValueError(f"{name}: metrics.jsonl has no rows yet: train the run first")
        lines[_plain(name)] = rows, f"C{number % 10}", bool(metrics["valid"])
    figure, _ = _panels(lines)
    save_figure(figure, path)


def _plain(text: str) -> str:
    """Text as it is: matplotlib reads what dollars enclose and hides labels that begin with _."""
    return (" " if text.startswith("_") else "") + text.replace("$", r"\$")


def _panels(lines: Lines) -> tuple[Any, dict[str, Any]]:
    """A panel for each term: line by line its label, rows, color, and whether it is evaluated."""
    figure, grid = pyplot().subplots(2, 2, figsize=(10, 6.4), layout="constrained")
    axes = dict(zip(PANELS, grid.flat, strict=True))
    for key, axis in axes.items():
        _curves(axis, lines, key)
        axis.set(title=PANELS[key], xlabel="step")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    _legend(axes)
    return figure, axes


def _legend(axes: dict[str, Any]) -> None:
    """Name the lines of all panels in the first one."""
    lines = {line.get_label(): line for axis in axes.values() for line in axis.get_lines()}
    if lines:
        axes["bound"].legend(handles=list(lines.values()), frameon=False)


def save_figure(figure, path: str | Path) -> None:
    """Write a figure and close it. Raises ValueError for a format, OSError for a file."""
    try:
        if Path(path).suffix.lower() not in SUFFIXES:
            raise ValueError(f"{path}: the name of a picture must end in .png, .svg or .pdf")
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph")  # of names that the font lacks
            content = BytesIO()
            figure.savefig(content, dpi=130, format=Path(path).suffix[1:].lower())
        make_folder(Path(path).parent)
        write_bytes(Path(path), content.getvalue())
    finally:
        pyplot().close(figure)


def _curves(axis, lines: Lines, key: str) -> None:
    from matplotlib.ticker import LogLocator

    last = max(row["step"] for rows, _, _ in lines.values() for row in rows)
    framed = []
    for label, (rows, color, valid) in lines.items():
        points = [(row["step"], row[key]) for row in rows if _is_finite(row[key])]
        if not points:
            continue
        marker = "o" if valid and len(points) < 30 else None
        steps, values = zip(*points, strict=True)
        axis.plot(
            steps, values, color=color, lw=1.8 if valid else 1, marker=marker, ms=3.5, label=label
        )
        framed += [value for step, value in points if step > last / 20]
    low, high = min(framed, default=0), max(framed, default=0)
    if 0 < 10 * low < high:
        axis.set_yscale("log")
        axis.set_ylim(low / 1.3, high * 1.3)
        axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.yaxis.set_major_formatter("{x:g}")
        axis.yaxis.set_minor_formatter("")
    else:
        axis.set_ylim(0, 1.08 * high or 1)


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


def _weight(axis, metrics: Metrics) -> None:
    rows = metrics["train"] or metrics["valid"]
    points = [(row["step"], row["kl_weight"]) for row in rows if _is_finite(row["kl_weight"])]
    if not points:
        return
    right = axis.twinx()
    right.plot(*zip(*points, strict=True), color=WEIGHT, ls=":", lw=1.2)
    right.set_ylim(0, 1.08 * max(weight for _, weight in points) or 1)
    right.set_ylabel("weight of the KL (dotted)", color=WEIGHT)
    right.tick_params(axis="y", colors=WEIGHT)
    right.spines["top"].set_visible(False)
