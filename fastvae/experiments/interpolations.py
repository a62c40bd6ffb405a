"""Table 6: texts at seven points on a line between two samples of the prior, the ends bold."""

from collections.abc import Sequence
from typing import Any

from fastvae.experiments import samples
from fastvae.experiments.grid import BOTH, Claim, Experiment
from fastvae.experiments.report import Fact, Row, code


def _paths(results: Sequence[dict[str, Any]]) -> str:
    parts = []
    for result in results:
        parts.append(f"## {result['series']}, seed {result['seed']}")
        for texts in result["interpolations"]:
            ends = 0, len(texts) - 1
            lines = (f"**{code(t)}**" if n in ends else code(t) for n, t in enumerate(texts))
            parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def _distinct(rows: list[Row]) -> list[Fact]:
    found = []
    for row in rows:
        paths = [path for result in row.results for path in result["interpolations"]]
        mean = sum(len(set(path)) for path in paths) / len(paths)
        measure = f"different texts of {len(paths[0])} on a line, mean of {len(paths)} lines"
        found.append((measure, row.series, f"{mean:.1f}"))
    return found


EXPERIMENT = Experiment(
    title="Table 6: interpolations",
    claims=(Claim("the text changes step by step from one end to the other", _distinct),),
    grids={
        text: tuple(configuration for configuration in configurations if configuration.mode == BOTH)
        for text, configurations in samples.EXPERIMENT.grids.items()
    },
    details=_paths,
    shows="interpolations",
)
