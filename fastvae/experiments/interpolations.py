"""Table 6: texts on seven points of a line between two draws from the prior, the ends bold."""

from collections.abc import Sequence
from typing import Any

from fastvae.experiments import samples
from fastvae.experiments.grid import BOTH, Claim, Experiment
from fastvae.experiments.report import Row, code


def _paths(results: Sequence[dict[str, Any]]) -> str:
    parts = []
    for result in results:
        parts.append(f"## {result['series']}, seed {result['seed']}")
        for texts in result["interpolations"]:
            ends = 0, len(texts) - 1
            lines = (f"**{code(t)}**" if n in ends else code(t) for n, t in enumerate(texts))
            parts.append("\n".join(f"- {line}" for line in lines))
    return "\n\n".join(parts)


def _distinct(rows: list[Row]) -> str:
    paths = [path for row in rows for r in row.results for path in r["interpolations"]]
    if not paths:
        return "not run"
    mean = sum(len(set(path)) for path in paths) / len(paths)
    return f"{mean:.1f} different texts of {len(paths[0])} on a line, mean of {len(paths)} lines"


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
