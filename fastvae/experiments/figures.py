"""Figures in the paper's form: cost against what configurations differ in, and training curves."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastvae.experiments.report import Row, in_mode, modes_of
from fastvae.plots import pyplot, save_figure

COLOURS = ("#1f5a8f", "#c0392b", "#2e8b57", "#8e5ea2", "#d68910", "#555555", "#17a2b8")


def costs(rows: Sequence[Row], path: Path, *, unit: str, axis: str) -> None:
    """Bits per character against x: solid the full cost, dashed the KL; a panel a comparison.

    Bands span the seeds.
    """
    modes = modes_of(rows)
    with _figure(path, len(modes), axis, f"bits per {unit}") as panels:
        for panel, mode in zip(panels, modes, strict=True):
            for series, color in _colors(rows).items():
                line = sorted((r for r in in_mode(rows, mode) if r.series == series), key=_x)
                if not line:
                    continue
                _line(panel, line, "bpc", color, "-", series)
                _line(panel, line, "kl_bpc", color, "--", None)
            panel.set_ylim(bottom=0)
            panel.set_xticks(sorted({row.x for row in rows}))
            if len(modes) > 1:
                panel.set_title(mode)
        panels[0].plot([], [], color="black", ls="-", label="full cost")
        panels[0].plot([], [], color="black", ls="--", label="KL")


def bound_at_kl(rows: Sequence[Row], path: Path, *, unit: str, axis: str) -> None:
    """The bound's bits per character against the KL; each configuration is labelled with its x."""
    with _figure(path, 1, f"KL, nats (labels: {axis})", f"bits per {unit} of the bound") as panels:
        for series, color in _colors(rows).items():
            points = [(r["kl"], r["bpc"], r.x) for r in rows if r.series == series]
            kls, bits, strengths = zip(*sorted(points), strict=True)
            panels[0].plot(kls, bits, color=color, marker="o", ms=4, label=series)
            for kl, cost, strength in zip(kls, bits, strengths, strict=True):
                panels[0].annotate(
                    f"{strength:g}", (kl, cost), xytext=(4, 4), textcoords="offset points", size=8
                )


def curves(rows: Sequence[Row], path: Path, *, unit: str, axis: str) -> None:
    """Reconstruction in bits per character against steps; a panel for each x, dashed: valid."""
    places = sorted({row.x for row in rows})
    colors = _colors(rows, lambda row: _compared(row))
    with _figure(path, len(places), "step", f"bits per {unit} of the reconstruction") as panels:
        for panel, x in zip(panels, places, strict=True):
            for row in rows:
                if row.x != x:
                    continue
                for split, style in (("train", "-"), ("valid", "--")):
                    points = row.results[0]["curves"][split]
                    # A record's bits per character are of its bound.
                    bits = [p["bpc"] * p["reconstruction"] / p["bound"] for p in points]
                    label = _compared(row) if split == "train" else None
                    steps = [p["step"] for p in points]
                    panel.plot(steps, bits, color=colors[_compared(row)], ls=style, label=label)
            panel.set_title(f"{axis} {x:g}")
            panel.set_ylim(bottom=0)
        panels[0].plot([], [], color="black", ls="-", label="training")
        panels[0].plot([], [], color="black", ls="--", label="held out")


def _compared(row: Row) -> str:
    return row.series if row.mode == "both" else f"{row.series}, {row.mode}"


@contextmanager
def _figure(path: Path, panels: int, x: str, y: str) -> Iterator[list]:
    """Panels side by side on one scale; saved when the block ends."""
    plt = pyplot()
    size = (min(15, 2 + 4.2 * panels), 4.2)
    figure, grid = plt.subplots(
        1, panels, figsize=size, layout="constrained", sharey=True, squeeze=False
    )
    for panel in grid[0]:
        panel.set_xlabel(x)
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    grid[0][0].set_ylabel(y)
    yield list(grid[0])
    labelled = {
        label: handle
        for panel in grid[0]
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(labelled.values(), labelled, loc="outside right upper", frameon=False)
    save_figure(figure, path)


def _line(panel, line: Sequence[Row], key: str, color: str, style: str, label: str | None) -> None:
    xs = [row.x for row in line]
    panel.plot(
        xs, [row[key] for row in line], color=color, ls=style, marker="o", ms=3.5, label=label
    )
    if any(len(row.results) > 1 for row in line):
        low, high = ([f(row.values(key)) for row in line] for f in (min, max))
        panel.fill_between(xs, low, high, color=color, alpha=0.15, lw=0)


def _colors(rows: Sequence[Row], name=lambda row: row.series) -> dict[str, str]:
    names = dict.fromkeys(name(row) for row in rows)
    return {key: COLOURS[n % len(COLOURS)] for n, key in enumerate(names)}


def _x(row: Row) -> float:
    return row.x
