"""Results of a grid as rows (seeds together) and as a Markdown page."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import log
from statistics import fmean
from typing import Any

from fastvae.console import escape
from fastvae.experiments.grid import BOTH, MATCHED, RELEASED, Experiment
from fastvae.metrics import bits_per_character
from fastvae.training.config import TrainingConfig

# Parts of a result that are long: documents keep them only where their experiment shows them.
LONG = ("curves", "samples", "interpolations")
Fact = tuple[str, str, str]  # measure, configuration, value


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


def ends_before_annealing(result: Mapping[str, Any]) -> bool:
    """Whether the last step of the run comes while its KL weight is still annealed."""
    return TrainingConfig(**result["settings"]["training"]).ends_before_annealing


def modes_of(rows: Sequence[Row]) -> list[str]:
    """The comparisons that these rows allow: one, or both ways of being fair."""
    found = [mode for mode in (RELEASED, MATCHED) if any(row.mode == mode for row in rows)]
    return found or [BOTH]


def in_mode(rows: Sequence[Row], mode: str) -> list[Row]:
    """The rows of one comparison."""
    return [row for row in rows if row.mode in (mode, BOTH)]


def facts(
    rows: Sequence[Row], measure: str, key: str, form: str = ".1f", *, series: str, axis: str
) -> list[Fact]:
    """A measure of one series along x: (measure, "length 12", "8.1"), ...

    Args:
        rows: rows of all series.
        measure: what the values are, with their unit.
        key: of the rows.
        form: format of a value.
        series: the series, whose name is compared as a whole.
        axis: what x is.
    """
    found = sorted((row for row in rows if row.series == series), key=lambda row: row.x)
    return [(measure, f"{axis} {row.x:g}", f"{row[key]:{form}}") for row in found]


def compare(rows: Sequence[Row], measure: str, key: str, form: str = ".1f") -> list[Fact]:
    """A measure of every row: (measure, name of its series, value), ..."""
    return [(measure, row.series, f"{row[key]:{form}}") for row in rows]


def markdown(
    experiment: Experiment,
    rows: Sequence[Row],
    notes: Sequence[str],
    failed: Mapping[str, str],
    figure: str | None,
) -> str:
    """The experiment's page: what was run, claims with our values, all measures, details."""
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
    """A table of the claims: one fact a line, one column for each comparison."""
    modes = modes_of(rows)
    names = ["ours"] if modes == [BOTH] else [f"ours, {mode}" for mode in modes]
    lines = []
    for claim in experiment.claims:
        measured = [
            {(measure, name): value for measure, name, value in claim.ours(in_mode(rows, mode))}
            for mode in modes
        ]
        text = claim.text
        for measure, name in dict.fromkeys((m, n) for m, n, _ in claim.ours(rows)):
            values = [found.get((measure, name), "–") for found in measured]
            lines.append([text, measure, name, *values])
            text = ""
        if text:
            lines.append([text, "", "", *["not run"] * len(modes)])
    return "## Claims\n\n" + _table(["the paper", "measure", "configuration", *names], lines)


COLUMNS = {
    "reconstruction": ("reconstruction", ".2f"),
    "kl": ("KL", ".2f"),
    "bound": ("bound", ".2f"),
    "bpc": ("bits per {unit}", ".3f"),
    "kl_share": ("KL / bound", ".2f"),
    "importance_weighted_nll": ("importance-weighted NLL", ".2f"),
    "active_units": ("active units", ".3g"),
    "mutual_information": ("mutual information", ".2f"),
    "parameters": ("parameters", ",.0f"),
    "kl_weight": ("KL weight at the end", ".2f"),
    "steps_per_second": ("steps per second", ".2f"),
}


def _measures(experiment: Experiment, rows: Sequence[Row]) -> str:
    """A table of all measures, one configuration a line, with notes on how to read it."""
    unit, modes = rows[0].results[0]["unit"], modes_of(rows)
    names = [name.format(unit=unit) for name, _ in COLUMNS.values()]
    head = ["model", experiment.axis, "compared", *names]
    lines = [
        [
            row.series,
            f"{row.x:g}",
            row.mode,
            *(row.text(key, form) for key, (_, form) in COLUMNS.items()),
        ]
        for row in rows
    ]
    left_out = {1} if not experiment.axis else set()
    if modes == [BOTH]:
        left_out.add(2)
    head, *lines = (
        [cell for n, cell in enumerate(line) if n not in left_out] for line in (head, *lines)
    )
    notes = "\n".join(f"- {note}" for note in _reading_notes(rows, modes))
    return f"## All measures\n\n{notes}\n\n{_table(head, lines)}"


def _reading_notes(rows: Sequence[Row], modes: Sequence[str]) -> list[str]:
    """Sentences about the units, the texts and the comparisons of the table of measures."""
    split = _split(rows[0].results[0])
    first, name = rows[0].results[0][split], {"valid": "validation"}.get(split, split)
    nll_texts, mi_texts = (
        first[f"{key}_texts"] for key in ("importance_weighted_nll", "mutual_information")
    )
    notes = [
        f"Reconstruction, KL and bound are means over the {name} file, in nats per text.",
        f"The importance-weighted NLL is the mean over the first {nll_texts:,} texts, with "
        f"{first['importance_weighted_nll_samples']} samples each, in nats per text. The bound "
        "covers all texts, so it can be the smaller one.",
        f"Mutual information is that of the first {mi_texts:,} texts, in nats. It is at most "
        f"ln {mi_texts:,} = {log(mi_texts):.2f}.",
    ]
    if modes != [BOTH]:
        notes.append(
            "As released: the baseline has the settings of the released code. Matched: it has the "
            "latent size, KL schedule, learning-rate decay and clipping of the model that it is "
            "compared with, and in Figure 3 also its number of parameters. Both: the model is the "
            "same in both comparisons."
        )
    if any(len(row.results) > 1 for row in rows):
        notes.append("± is half the range over the seeds.")
    machines = dict.fromkeys(
        f"{result['device']}, {result['threads']} thread{'s' * (result['threads'] != 1)}"
        for row in rows
        for result in row.results
    )
    notes.append(f"Each run trained on: {'; '.join(machines)}.")
    return notes


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
