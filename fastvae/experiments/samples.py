"""Tables 1, 2, 4 and 5: greedy samples from the prior and measures of their diversity."""

from collections.abc import Sequence
from typing import Any

from fastvae.experiments import fig4, table3
from fastvae.experiments.grid import CHARACTERS, TWEETS, Claim, Experiment
from fastvae.experiments.report import Fact, Row, code, compare

LENGTH, SHOWN = 48, 12
EXPLAINED = """\
All values are fractions. distinct-n: distinct n-grams of words among all n-grams. Unique texts:
different texts among all texts. Most common text: texts equal to the most frequent one."""
MEASURES = {
    "distinct_1": "distinct-1",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "unique_share": "unique texts",
    "most_common_share": "most common text",
}


def variety_table(results: Sequence[dict[str, Any]]) -> str:
    """Diversity of each run's samples and of as many held-out texts; then the first samples."""
    if not results:
        return ""
    lines = [_line(_name(r), r["variety"]) for r in results]
    lines.append(_line("held-out texts", results[0]["variety_of_held_out"]))
    head = (
        f"| samples | {' | '.join(MEASURES.values())} | texts |\n|{' --- |' * (len(MEASURES) + 2)}"
    )
    parts = ["## Diversity of greedy samples", EXPLAINED, "\n".join([head, *lines])]
    for result in results:
        texts = "\n".join(f"- {code(text)}" for text in result["samples"][:SHOWN])
        parts.append(f"## {_name(result)}\n\n{texts}")
    return "\n\n".join(parts)


def _line(name: str, found: dict[str, float]) -> str:
    shares = " | ".join(f"{found[key]:.3f}" for key in MEASURES)
    return f"| {name} | {shares} | {found['texts']:,} |"


def _name(result: dict[str, Any]) -> str:
    return f"{result['series']} ({result['mode']}, seed {result['seed']})"


def _ours(rows: list[Row]) -> list[Fact]:
    return [
        *compare(rows, "distinct-3", "distinct_3", ".3f"),
        *compare(rows, "fraction of unique texts", "unique_share", ".3f"),
    ]


EXPERIMENT = Experiment(
    title="Tables 1, 2, 4, 5: samples from the prior",
    claims=(Claim("the hybrid's samples are more diverse than the LSTM VAE's", _ours),),
    grids={
        TWEETS: table3.EXPERIMENT.grids[TWEETS],
        CHARACTERS: tuple(p for p in fig4.EXPERIMENT.grids[CHARACTERS] if p.x == LENGTH),
    },
    details=variety_table,
    shows="samples",
)
