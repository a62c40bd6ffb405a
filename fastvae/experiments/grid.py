"""An experiment of the paper as data: its grid of configurations, and how runs are shortened.

A configuration is a preset with some fields changed; a run adds a number of steps and a seed.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

from fastvae.names import suggestion
from fastvae.presets import PRESETS, Preset, changed, field_types, parse

RELEASED, MATCHED, BOTH = "as released", "matched", "both"
# What a matched baseline takes from the model that it is compared with, besides the latent size.
MATCHED_FIELDS = (
    "kl_floor", "kl_start", "kl_end", "lr_decay", "lr_decay_every", "lr_decay_start", "clip_norm"
)  # fmt: skip
# Steps where neither --steps nor --paper says otherwise: every annealing has ended by then.
CHARACTERS, TWEETS = "characters", "tweets"  # the texts that grids are for
STEPS = {CHARACTERS: 20_000, TWEETS: 70_000}


@dataclass(frozen=True)
class Configuration:
    """One model of a grid: a preset with `changes`, at `x` of the line `series` of a figure.

    mode: the comparison that it stands in, "as released", "matched" or both. match: the preset
    whose latent size, KL schedule, decay and clipping it takes; None keeps its own.
    """

    series: str
    x: float
    preset: str
    changes: Mapping[str, Any] = field(default_factory=dict)
    mode: str = BOTH
    match: str | None = None

    @property
    def name(self) -> str:
        """Different for different settings: `ptb-lstm_length-48_aux-weight-0.2`."""
        matched = f"_as-{self.match}" if self.match else ""
        return self.preset + matched + _suffix(self.changes)

    @property
    def settings(self) -> Preset:
        """The paper's settings of this configuration, with the paper's number of steps."""
        preset = PRESETS[self.preset]
        if self.match:
            other = PRESETS[self.match]
            training = other.config()
            taken = {name: getattr(training, name) for name in MATCHED_FIELDS}
            taken["latent_size"] = other.model_arguments["latent_size"]
            preset = changed(preset, taken)
        return changed(preset, self.changes)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper, and the function that measures it.

    Args:
        text: the claim.
        ours: rows -> facts (measure, configuration, value), each a row of the page's table.
    """

    text: str
    ours: Callable[[Sequence[Any]], list[tuple[str, str, str]]]


@dataclass(frozen=True)
class Experiment:
    """A figure or table of the paper: kinds of text -> configurations, the first kind by default.

    draw(rows, path, unit=, axis=) makes the figure; details(results) adds Markdown made of texts.
    shows: the long part of results that these need.
    """

    title: str
    claims: tuple[Claim, ...]
    grids: Mapping[str, tuple[Configuration, ...]]
    axis: str = ""
    draw: Callable[..., None] | None = None
    details: Callable[[Sequence[dict[str, Any]]], str] | None = None
    shows: str | None = None


@dataclass(frozen=True)
class Run:
    """A configuration to be trained: all that its folder's name and its training follow from."""

    configuration: Configuration
    preset: Preset
    seed: int
    name: str

    @property
    def steps(self) -> int:
        return self.preset.training["steps"]


def runs(
    configurations: Sequence[Configuration], steps: int, seeds: int, overrides: Mapping[str, str]
) -> list[Run]:
    """Every configuration with seed 0, then with seed 1 and so on.

    `overrides` are fields by name with their values as text; each reaches the configurations that
    have it, and is not shortened. Raises ValueError for a field that no configuration has, and for
    one that configurations differ in.
    """
    _check_overrides(configurations, overrides)
    found = []
    for configuration in configurations:
        kinds = field_types(configuration.settings)
        values = {k: parse(k, v, kinds[k]) for k, v in sorted(overrides.items()) if k in kinds}
        preset = changed(shortened(changed(configuration.settings, values), steps), values)
        found.append(
            (configuration, preset, f"{configuration.name}{_suffix(values)}_steps-{steps}")
        )
    return [
        Run(
            configuration,
            changed(preset, {"seed": seed}),
            seed,
            f"{name}_seed-{seed}",
        )
        for seed in range(seeds)
        for configuration, preset, name in found
    ]


def shortened(preset: Preset, steps: int) -> Preset:
    """The preset for `steps` steps: the decay shrinks with them, the annealing stays as it is.

    An annealing squeezed into fewer steps collapses for reasons that are not the paper's. The decay
    starts after the annealing, as the paper's does, and ends at the paper's learning rate.
    """
    config = preset.config()
    looks = {
        "log_every": max(1, steps // 200),
        "eval_every": max(1, steps // 20),
        "eval_samples": 512,
        "sample_every": 0,
    }
    values = {"steps": steps, **looks}
    if config.lr_decay != 1:
        start = max(round(config.lr_decay_start * steps / config.steps), config.kl_end)
        values["lr_decay_start"] = start
        if config.lr_decay_start < config.steps:  # else it never decays
            share = (steps - start) / (config.steps - config.lr_decay_start)
            values["lr_decay_every"] = max(1, round(config.lr_decay_every * share))
    training = {**preset.training, **values}
    return replace(preset, training=training)


def pick(configurations: Sequence[Configuration], wanted: str | None) -> list[Configuration]:
    """The first N, or those that comma-separated names, or patterns in names, pick.

    A whole name picks its configuration alone, not those whose names begin with it.
    """
    if wanted is None:
        return list(configurations)
    if wanted.isdecimal():
        if int(wanted) < 1:
            raise ValueError("--points must be at least 1")
        return list(configurations[: int(wanted)])
    names = [configuration.name for configuration in configurations]
    picked = set()
    for part in map(str.strip, wanted.split(",")):
        found = [n for n in names if n == part] or [n for n in names if fnmatchcase(n, f"*{part}*")]
        if not found:
            raise ValueError(
                f"no configuration is named like {part!r}: there are {', '.join(names)}"
            )
        picked.update(found)
    return [configuration for configuration in configurations if configuration.name in picked]


def _check_overrides(configurations: Sequence[Configuration], overrides: Mapping[str, str]) -> None:
    known = dict.fromkeys(name for p in configurations for name in field_types(p.settings))
    for name in overrides:
        if name not in known:
            raise ValueError(f"no configuration has a field {name!r}: {suggestion(name, known)}")
        if name in ("steps", "seed") or any(name in p.changes for p in configurations):
            raise ValueError(
                f"{name} is set by the grid: leave it out, or choose among its configurations with "
                "--points"
            )


def _suffix(values: Mapping[str, Any]) -> str:
    return "".join(f"_{k.replace('_', '-')}-{_word(v)}" for k, v in values.items())


def _word(value: Any) -> str:
    return "-".join(map(str, value)) if isinstance(value, tuple) else str(value)
