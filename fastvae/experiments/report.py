"""Results of a grid as rows (seeds together), a Markdown page and a JSON document."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from fastvae.console import escape
from fastvae.experiments.grid import BOTH, MATCHED, RELEASED, Experiment
from fastvae.metrics import bits_per_character

# Parts of a result that are long: documents keep them only where their experiment shows them.
LONG = ("curves", "samples", "interpolations")


@dataclass(frozen=True)
class Row:
    """A configuration and the results of its seeds; `row[key]` is the mean over them.

    Keys are those of a result, of its test pass (of its valid pass without one), of its variety,
    and kl_share, the KL's part of the bound, kl_bpc and reconstruction_bpc, in bits per character.
    """

    series: str
    x: float
    mode: str
    results: Sequence[Mapping[str, Any]]

    def __getitem__(self, key: str) -> float:
        return fmean(self.values(key))

    def values(self, key: str) -> list[float]:
        """One value for each seed."""
        return [_value(result, key) for result in self.results]

    def text(self, key: str, form: str = ".2f") -> str:
        """The mean, with half the range over the seeds where they differ."""
        values = self.values(key)
        spread = (max(values) - min(values)) / 2
        return f"{fmean(values):{form}}" + (f" ± {spread:{form}}" if spread else "")


def rows_of(results: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Results with their configuration's series, x and mode -> rows, in order of configurations."""
    groups: dict[tuple, list] = {}
    for result in results:
        groups.setdefault((result["series"], result["x"], result["mode"]), []).append(result)
    return [Row(*key, group) for key, group in groups.items()]


def modes_of(rows: Sequence[Row]) -> list[str]:
    """The comparisons that these rows allow: one, or both ways of being fair."""
    found = [mode for mode in (RELEASED, MATCHED) if any(row.mode == mode for row in rows)]
    return found or [BOTH]


def in_mode(rows: Sequence[Row], mode: str) -> list[Row]:
    """The rows of one comparison."""
    return [row for row in rows if row.mode in (mode, BOTH)]


def trace(rows: Sequence[Row], key: str, form: str = ".1f", *, series: str) -> str:
    """A measure of one series along x: `12: 8.1, 24: 17.2`."""
    found = sorted((row for row in rows if row.series == series), key=lambda row: row.x)
    return ", ".join(f"{row.x:g}: {row[key]:{form}}" for row in found) or "not run"


def compare(rows: Sequence[Row], key: str, form: str = ".1f") -> str:
    """A measure of every row by the name of its series."""
    return ", ".join(f"{row.series} {row[key]:{form}}" for row in rows) or "not run"


def markdown(
    experiment: Experiment,
    rows: Sequence[Row],
    notes: Sequence[str],
    failed: Mapping[str, str],
    figure: str | None,
) -> str:
    """The experiment's page: claims beside ours, the table of configurations, what was changed."""
    parts = [f"# {experiment.title}", "\n".join(f"- {note}" for note in notes)]
    if figure:
        parts.append(f"![{experiment.title}]({figure})")
    parts.append(_claims(experiment, rows))
    if rows:
        parts.append(_measures(experiment, rows))
    if experiment.details:
        parts.append(experiment.details([result for row in rows for result in row.results]))
    if failed:
        lines = [f"- {name}: {code(error)}" for name, error in failed.items()]
        parts.append("## Failed\n\n" + "\n".join(lines))
    return "\n\n".join(part for part in parts if part) + "\n"


def _claims(experiment: Experiment, rows: Sequence[Row]) -> str:
    modes = modes_of(rows)
    names = ["ours"] if modes == [BOTH] else [f"ours, {mode}" for mode in modes]
    return _table(
        ["the paper", *names],
        [[c.text, *(c.ours(in_mode(rows, mode)) for mode in modes)] for c in experiment.claims],
    )


def _measures(experiment: Experiment, rows: Sequence[Row]) -> str:
    unit = rows[0].results[0]["unit"]
    columns = {
        "reconstruction": ".2f",
        "kl": ".2f",
        "bound": ".2f",
        "bpc": ".3f",
        "kl_share": ".2f",
        "importance_weighted_nll": ".2f",
        "active_units": ".3g",
        "mutual_information": ".2f",
        "parameters": ",.0f",
        "kl_weight": ".2f",
        "steps_per_second": ".2f",
    }
    shown = {"kl": "KL", "bpc": f"bits per {unit}", "kl_weight": "KL weight at the end"}
    head = [
        "model",
        experiment.axis,
        "compared",
        *(shown.get(k, k.replace("_", " ")) for k in columns),
    ]
    lines = [
        [row.series, f"{row.x:g}", row.mode, *(row.text(k, form) for k, form in columns.items())]
        for row in rows
    ]
    left_out = {1} if not experiment.axis else set()
    if modes_of(rows) == [BOTH]:
        left_out.add(2)
    head, *lines = (
        [cell for n, cell in enumerate(line) if n not in left_out] for line in (head, *lines)
    )
    split = _split(rows[0].results[0])
    first = rows[0].results[0][split]
    note = (
        f"Nats per text, means over a fixed pass over the {split} file; importance-weighted NLL of "
        f"its first {first['importance_weighted_nll_texts']:,} texts with "
        f"{first['importance_weighted_nll_samples']} samples each, whose bound is not the whole "
        f"pass's; mutual information of its first {first['mutual_information_texts']:,}. "
        "± is half the range over seeds."
    )
    return note + "\n\n" + _table(head, lines)


def code(text: str) -> str:
    """Any text as inline code of Markdown."""
    text = escape(text)
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if text.startswith("`") or text.endswith("`") or not text.strip() else ""
    return f"{fence}{space}{text}{space}{fence}"


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _split(result: Mapping[str, Any]) -> str:
    return "test" if "test" in result else "valid"


def _value(result: Mapping[str, Any], key: str) -> float:
    measured = result[_split(result)]
    if key == "kl_share":
        return measured["kl"] / measured["bound"]
    if key in ("kl_bpc", "reconstruction_bpc"):
        return bits_per_character(measured[key.removesuffix("_bpc")], _characters(measured))
    for place in (result, measured, result["variety"]):
        if key in place:
            return place[key]
    raise KeyError(key)


def _characters(measured: Mapping[str, float]) -> float:
    """Characters of a text that the loss counts."""
    return bits_per_character(measured["bound"], measured["bpc"])
