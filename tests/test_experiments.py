"""The paper's experiments: settings of configurations, shortened and resumed runs, their pages."""

import io
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from fastvae import cli
from fastvae.evaluation import measure
from fastvae.experiments import (
    EXPERIMENTS,
    NAMES,
    Options,
    experiment,
    figures,
    runner,
    speed,
)
from fastvae.experiments.configuration import Job, finished
from fastvae.experiments.configuration import main as run_main
from fastvae.experiments.configuration import run as run_job
from fastvae.experiments.fig3 import EQUAL_SIZE
from fastvae.experiments.grid import (
    BOTH,
    CHARACTERS,
    MATCHED,
    RELEASED,
    TWEETS,
    Configuration,
    pick,
    runs,
    shortened,
)
from fastvae.experiments.report import (
    LONG,
    code,
    ends_before_annealing,
    facts,
    in_mode,
    markdown,
    rows_of,
)
from fastvae.experiments.runner import _last_step
from fastvae.metrics import variety
from fastvae.models import load
from fastvae.presets import PRESETS, build_model
from fastvae.text import ByteVocabulary, CharVocabulary, WindowCorpus
from fastvae.training.config import TrainingConfig

PTB = CharVocabulary("".join(map(chr, range(33, 83))))  # 50 characters, as in the paper
TINY = {
    "encoder_channels": "8,8",
    "latent_size": "4",
    "feature_channels": "8",
    "conv_channels": "16",
    "hidden_size": "8",
}
FLAGS = [f"--{name.replace('_', '-')}={value}" for name, value in TINY.items()]
FIG6 = ["experiment", "fig6", "--steps=200", "--points=2", "--jobs=2", *FLAGS]
GRIDS = [(name, text) for name, experiment in EXPERIMENTS.items() for text in experiment.grids]


def configurations(name, text=None):
    grids = EXPERIMENTS[name].grids
    return grids[text or next(iter(grids))]


def built(preset):
    with torch.device("meta"):
        return build_model(preset, ByteVocabulary() if preset.text == TWEETS else PTB)


def size(configuration):
    return sum(p.numel() for p in built(configuration.settings).parameters())


def config(configuration):
    return TrainingConfig(**configuration.settings.training)


@pytest.mark.parametrize(("name", "text"), GRIDS)
def test_every_point_is_a_model_of_its_own(name, text):
    grid = configurations(name, text)
    assert len({configuration.name for configuration in grid}) == len(grid)
    assert len({(p.series, p.x, p.mode) for p in grid}) == len(grid)
    for run in runs(grid, 200, 1, {}):
        assert run.preset.text == (TWEETS if text == TWEETS else "windows")
        assert built(run.preset).length == run.preset.length
        TrainingConfig(**run.preset.training)


def test_grids_are_those_of_the_paper():
    """Figures 3 to 6 and table 3: lengths, dropout rates, weights and layers, by series."""
    from fastvae.experiments import fig3, fig4, fig5, fig6, table3

    def axes(experiment, text=CHARACTERS):
        found = {}
        for configuration in experiment.EXPERIMENT.grids[text]:
            found.setdefault(configuration.series, set()).add(configuration.x)
        return found

    lengths = {12, 24, 36, 48, 60}
    found = axes(fig4)
    assert all(found[series] == lengths for series in found)
    rates = {f"LSTM VAE, p = {p}" for p in (0.2, 0.5, 0.8, 1)}
    assert found.keys() == rates | {"hybrid, α = 0.2", "feed-forward"}
    assert set().union(*axes(fig3).values()) == {20, 32, 52, 100}
    weights = {0.0, 0.2, 0.4, 0.6, 0.8, 1.0}
    assert axes(fig5) == {"annealed": weights, "not annealed": weights}
    layers = {1, 2, 3, 5, 7, 10}
    assert axes(fig6) == {f"α = {a}": layers for a in (0, 0.2, 0.5)}
    assert axes(table3, TWEETS).keys() == rates | {"hybrid, α = 0.2", "feed-forward"}
    for configuration in fig4.EXPERIMENT.grids[CHARACTERS]:
        assert configuration.changes["length"] == configuration.x
    for configuration in fig6.EXPERIMENT.grids[CHARACTERS]:
        alpha = float(configuration.series.removeprefix("α = "))
        assert (configuration.changes["conv_layers"], configuration.changes["aux_weight"]) == (
            configuration.x,
            alpha,
        )


@pytest.mark.parametrize(("name", "text"), GRIDS)
def test_what_a_series_says_is_set(name, text):
    """The weight of the auxiliary loss or the word dropout in its name."""
    for configuration in configurations(name, text):
        _, _, number = configuration.series.rpartition(" = ")
        model = built(configuration.settings)
        if "α = " in configuration.series:
            assert model.aux_weight == float(number)
        if "p = " in configuration.series:
            assert model.word_dropout == float(number)


PAGES = Path(__file__).parents[1] / "docs" / "paper"
RESULTS = [p for p in sorted(PAGES.rglob("*.json")) if not p.name.startswith("speed")]


@pytest.mark.parametrize("path", RESULTS, ids=lambda p: str(p.relative_to(PAGES)))
def test_pages_in_the_docs_are_those_of_their_results(path):
    document, stem = json.loads(path.read_text()), path.stem
    experiment = EXPERIMENTS[stem.removesuffix(f"-{CHARACTERS}")]
    figure = f"{stem}.png" if experiment.draw else None
    page = markdown(experiment, rows_of(document["results"]), document["notes"], {}, figure)
    assert page == path.with_suffix(".md").read_text()
    long = {key for result in document["results"] for key in LONG if key in result}
    assert long == {experiment.shows} - {None}


@pytest.mark.parametrize("name", ["speed", "speed-characters"])
def test_speed_pages_in_the_docs_are_those_of_their_results(name):
    document = json.loads((PAGES / f"{name}.json").read_text())
    assert speed.page(document, document["notes"]) == (PAGES / f"{name}.md").read_text()


def test_figure_3_trains_autoencoders_without_history():
    for configuration in configurations("fig3"):
        schedule = config(configuration).kl_schedule
        assert {schedule(step) for step in (0, 1, 10_000, 99_999)} == {0.0}
        model = built(configuration.settings)
        assert model.decoder is None or model.word_dropout == 1
        assert model.latent_size == 100
    assert {p.x for p in configurations("fig3")} == {20, 32, 52, 100}


@pytest.mark.parametrize("length", EQUAL_SIZE)
def test_figure_3_matched_models_are_of_equal_size(length):
    at = [p for p in configurations("fig3") if p.x == length]
    conv, released, matched = (size(p) for p in at)
    assert [p.mode for p in at] == [BOTH, RELEASED, MATCHED]
    assert matched == pytest.approx(conv, rel=0.01)
    assert (released == pytest.approx(conv, rel=0.1)) == (length == 100)


@pytest.mark.parametrize(("name", "hybrid"), [("fig4", "ptb-lstm"), ("table3", "tweets")])
def test_matched_baselines_are_trained_as_the_hybrid(name, hybrid):
    own = PRESETS[hybrid]
    for configuration in configurations(name):
        preset, c, wanted = (
            configuration.settings,
            config(configuration),
            TrainingConfig(**own.training),
        )
        if configuration.mode == RELEASED:
            assert preset.model_arguments["latent_size"] == 100
            assert (c.kl_floor, c.kl_start, c.kl_end, c.lr_decay) == (0, 10_000, 17_000, 1)
            assert c.clip_norm == (None if "conv" in configuration.preset else 100)
            continue
        assert preset.model_arguments["latent_size"] == own.model_arguments["latent_size"]
        for step in (0, 1000, 5000, 8000, 55_000, 60_000, 99_999):
            assert c.kl_schedule(step) == wanted.kl_schedule(step)
            assert c.learning_rate_at(step) == wanted.learning_rate_at(step)
        assert (c.clip_norm, c.batch_size, c.steps) == (None, wanted.batch_size, 100_000)


def test_figure_5_anneals_or_does_not():
    for configuration in configurations("fig5"):
        schedule = config(configuration).kl_schedule
        weights = schedule(0), schedule(999), schedule(8000)
        assert weights == (
            (1, 1, 1) if configuration.series == "not annealed" else (0.001, 0.001, 1)
        )
        assert configuration.settings.length == 52


def test_shorter_runs_keep_the_annealing_and_shrink_the_decay():
    preset = PRESETS["ptb-lstm"]
    whole, long, part = (
        TrainingConfig(**p.training)
        for p in (preset, shortened(preset, 50_000), shortened(preset, 12_000))
    )
    assert (long.steps, part.steps) == (50_000, 12_000)
    for shorter in (long, part):
        assert all(shorter.kl_schedule(n) == whole.kl_schedule(n) for n in range(0, 12_000, 500))
    for step in (0, 9_999, 10_000, 10_499, 10_500, 49_999):
        assert long.learning_rate_at(step) == whole.learning_rate_at(2 * step)
    for after in (-1, 0, 49, 50, 3_999):  # after the annealing's 8,000 steps
        assert part.learning_rate_at(8_000 + after) == whole.learning_rate_at(20_000 + 20 * after)
    within = TrainingConfig(**shortened(preset, 300).training)
    baseline = TrainingConfig(**shortened(PRESETS["ptb-lstm-vae"], 300).training)
    for constant in (within, baseline):
        assert {constant.learning_rate_at(n) for n in range(300)} == {1e-3}
    unchanged = TrainingConfig(**shortened(preset, 100_000).training)
    assert (unchanged.lr_decay_start, unchanged.lr_decay_every) == (20_000, 1000)


@pytest.mark.parametrize(
    ("steps", "log", "evaluation"), [(20_000, 100, 1000), (399, 1, 19), (19, 1, 1)]
)
def test_runs_of_a_grid_look_on_in_proportion(steps, log, evaluation):
    found = shortened(PRESETS["ptb-lstm"], steps).config()
    assert (found.steps, found.log_every, found.eval_every) == (steps, log, evaluation)
    assert (found.eval_samples, found.sample_every) == (512, 0)


def test_ways_to_keep_the_kl():
    """Each alone: without the auxiliary loss, but where that is the way."""
    found = [
        (p.x, c.aux_weight, c.free_bits, c.kl_cycles, c.kl_rise)
        for p in configurations("equal-kl")
        for c in [SimpleNamespace(**p.settings.model_arguments, **vars(config(p)))]
    ]
    assert found == [
        (0.0, 0.0, 0.0, 1, 1.0), (0.1, 0.1, 0.0, 1, 1.0), (0.2, 0.2, 0.0, 1, 1.0),
        (0.5, 0.5, 0.0, 1, 1.0), (0.1, 0.0, 0.1, 1, 1.0), (0.2, 0.0, 0.2, 1, 1.0),
        (0.4, 0.0, 0.4, 1, 1.0), (0.8, 0.0, 0.8, 1, 1.0), (2, 0.0, 0.0, 2, 0.5),
        (4, 0.0, 0.0, 4, 0.5), (8, 0.0, 0.0, 8, 0.5),
    ]  # fmt: skip
    assert {p.settings.length for p in configurations("equal-kl")} == {48}


def test_every_point_of_a_comparison_decays_alike():
    """Whether it anneals or not: another learning rate would be another cause."""
    short = [
        TrainingConfig(**shortened(p.settings, 12_000).training) for p in configurations("fig5")
    ]
    assert len({tuple(c.learning_rate_at(n) for n in range(0, 12_000, 50)) for c in short}) == 1


def test_runs_are_seed_by_seed_and_named_by_their_settings():
    grid = configurations("fig6")[:2]
    found = runs(grid, 50, 2, {"hidden_size": "16"})
    assert [(r.configuration, r.seed) for r in found] == [(p, s) for s in (0, 1) for p in grid]
    assert [r.preset.training["seed"] for r in found] == [0, 0, 1, 1]
    assert found[3].name == (
        "ptb-bytenet_conv-layers-1_aux-weight-0.2_hidden-size-16_steps-50_seed-1"
    )
    assert found[0].preset.model_arguments["hidden_size"] == 16


def test_a_run_is_the_same_in_whatever_order_its_fields_are_given():
    given = {"hidden_size": "16", "precision": "bf16"}, {"precision": "bf16", "hidden_size": "16"}
    one, other = (runs(configurations("fig6")[:1], 50, 1, overrides) for overrides in given)
    assert one == other


def test_overrides_are_not_shortened():
    (run,) = runs(
        configurations("fig4")[:1], 9000, 1, {"eval_every": "50", "lr_decay_every": "900"}
    )
    assert run.preset.training["eval_every"] == 50
    assert run.preset.training["lr_decay_every"] == 900
    (run,) = runs(configurations("fig4")[:1], 9000, 1, {"kl_end": "1500"})
    assert run.preset.training["lr_decay_start"] == 1800


@pytest.mark.parametrize("name", ["fig6", "table3"])
@pytest.mark.parametrize("start", [100_000, 150_000])
def test_a_decay_that_begins_after_the_last_step_is_not_shortened(name, start):
    for run in runs(configurations(name), 4, 1, {"lr_decay_start": str(start)}):
        c, whole = run.preset.config(), config(run.configuration)
        assert (c.steps, c.lr_decay_start) == (4, start)
        assert (c.lr_decay, c.lr_decay_every) == (whole.lr_decay, whole.lr_decay_every)
        assert {c.learning_rate_at(step) for step in range(4)} == {1e-3}


def test_points_are_picked_by_number_or_name():
    grid = configurations("fig6")
    assert pick(grid, None) == list(grid)
    assert pick(grid, "3") == list(grid[:3])
    whole, longer = "ptb-lstm_length-52_aux-weight-0.2", "aux-weight-0.2_kl-floor"
    assert [p.name for p in pick(configurations("fig5"), whole)] == [whole]
    assert [p.name for p in pick(configurations("fig5"), longer)] == [f"{whole}_kl-floor-1.0"]
    picked = pick(grid, "layers-10_aux-weight-0.0, layers-2_")
    assert [(p.x, p.series) for p in picked] == [
        (2, "α = 0"), (2, "α = 0.2"), (2, "α = 0.5"), (10, "α = 0")
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"points": "layers-4"},
            r"no configuration is named like 'layers-4': there are ptb-bytenet_conv-",
        ),
        ({"points": "0"}, "at least 1"),
        (
            {"overrides": {"speed": "1"}},
            r"no configuration has a field 'speed': did you mean seed",
        ),
        ({"overrides": {"conv_layers": "1"}}, r"conv_layers is set by the grid: .*--points"),
        ({"overrides": {"kl_end": "soon"}}, r"kl_end = 'soon': expected a whole number"),
        ({"text": "tweets"}, r"fig6 has no text 'tweets': there are characters"),
        ({"device": "abacus"}, r"device abacus cannot be used here"),
    ],
)
def test_senseless_options_are_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        experiment("fig6", Options(tmp_path / "out", **options), Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_an_override_reaches_the_points_that_have_it():
    found = runs(configurations("fig4"), 50, 1, {"encoder_channels": "8,8"})
    for run in found:
        has = run.configuration.preset != "ptb-lstm-vae"
        assert ("encoder-channels-8-8" in run.name) == has
        assert (run.preset.model_arguments.get("encoder_channels") == (8, 8)) == has


def fake(configuration, seed, kl):
    measured = {
        "reconstruction": 30.0, "kl": kl, "bound": 30.0 + kl, "bpc": (30 + kl) / 40,
        "active_units": 3, "mutual_information": 1.0, "mutual_information_texts": 9,
        "importance_weighted_nll": 29.0, "importance_weighted_nll_texts": 9,
        "importance_weighted_nll_samples": 8,
    }  # fmt: skip
    variety = {f"distinct_{n}": 0.5 for n in (1, 2, 3)}
    variety |= {"unique_share": 0.9, "most_common_share": 0.1, "texts": 10}
    record = {"step": 1, "reconstruction": 30.0, "kl": kl, "bound": 30.0 + kl, "bpc": 1.0}
    return {
        "series": configuration.series, "x": configuration.x, "mode": configuration.mode,
        "seed": seed, "unit": "byte",
        "valid": {**measured, "kl": 99.0}, "test": measured, "variety": variety,
        "device": "cpu", "threads": 1, "variety_of_held_out": variety, "parameters": 5,
        "kl_weight": 1.0, "steps_per_second": 2.0,
        "samples": ["a|b", "*c*"], "interpolations": [["`x`", "b", "c"]],
        "settings": asdict(configuration.settings),
        "curves": {"train": [record, {**record, "step": 2}], "valid": [record]},
    }  # fmt: skip


def test_rows_are_means_over_seeds_of_the_test_file():
    one, other = Configuration("a", 2, "small"), Configuration("b", 2, "small")
    rows = rows_of([fake(one, 0, 4.0), fake(other, 0, 9.0), fake(one, 1, 6.0)])
    assert [(r.series, len(r.results)) for r in rows] == [("a", 2), ("b", 1)]
    assert rows[0]["kl"] == 5 and rows[0].text("kl") == "5.00 ± 1.00"
    assert rows[0].text("reconstruction") == "30.00"
    assert rows[1].text("kl") == "9.00"
    assert rows[1]["kl_share"] == pytest.approx(9 / 39)
    assert rows[1]["kl_bpc"] == pytest.approx(9 / 40)
    assert rows[1]["reconstruction_bpc"] == pytest.approx(30 / 40)
    assert rows[0]["unique_share"] == 0.9


def test_units_of_two_seeds_keep_their_half():
    results = [fake(Configuration("a", 2, "small"), seed, 4.0) for seed in (0, 1)]
    results[1]["test"] = {**results[1]["test"], "active_units": 4}
    assert "| 3.5 ± 0.5 |" in markdown(EXPERIMENTS["fig4"], rows_of(results), [], {}, None)


@pytest.mark.parametrize(("name", "text"), GRIDS)
def test_every_experiment_has_its_page_and_figure(name, text, tmp_path):
    experiment = EXPERIMENTS[name]
    results = [
        fake(p, s, 10.0 + n) for n, p in enumerate(configurations(name, text)) for s in (0, 1)
    ]
    rows = rows_of(results)
    page = markdown(experiment, rows, ["a note"], {"run": "out of `luck`"}, None)
    assert "not run" not in page
    assert all(claim.text in page for claim in experiment.claims)
    if any(configuration.mode == MATCHED for configuration in configurations(name, text)):
        assert "| ours, as released | ours, matched |" in page
    assert "- run: `` out of `luck` ``" in page
    if experiment.draw:
        experiment.draw(rows, tmp_path / "figure.png", unit="byte", axis=experiment.axis)
        assert (tmp_path / "figure.png").stat().st_size > 10_000
    empty = markdown(experiment, [], [], {}, None)
    assert all("not run" in line or "---" in line or "ours" in line
               for line in empty.splitlines() if line.startswith("|"))  # fmt: skip


@pytest.mark.parametrize("name", ["fig3", "fig6", "samples", "interpolations"])
def test_documents_keep_the_long_part_that_they_show(name, tmp_path, monkeypatch, drawn):
    labels, made = ("series", "x", "mode", "seed"), fake(configurations(name)[0], 0, 4.0)
    made = {key: value for key, value in made.items() if key not in labels}
    monkeypatch.setattr("fastvae.experiments.finished", lambda job: made)
    experiment(name, Options(tmp_path), Console(quiet=True))
    results = json.loads((tmp_path / f"{name}.json").read_text())["results"]
    shown = {"fig3": {"curves"}, "fig6": set()}.get(name, {name})
    assert results and all(result.keys() & set(LONG) == shown for result in results)
    assert all(result[key] == made[key] for result in results for key in shown)


@pytest.mark.parametrize(
    ("changes", "weight", "expected"),
    [
        ({"steps": 4}, 0.0, True),  # long before kl_start
        ({"steps": 16_999}, 1.0, True),
        ({"steps": 17_000}, 1.0, False),
        ({"steps": 4, "kl_start": 0, "kl_end": 1, "kl_target": 0.5}, 0.5, False),
        ({"steps": 4, "kl_start": 0, "kl_end": 5, "kl_target": 0.5}, 0.3, True),
        ({"steps": 4, "kl_nats": 2.0}, 0.2, False),
        ({"steps": 4, "kl_floor": 1.0}, 1.0, False),
        ({"steps": 4, "kl_start": 0, "kl_end": 0, "kl_target": 0.0}, 0.0, False),
    ],
)
def test_a_note_tells_of_annealing_that_does_not_end(
    changes, weight, expected, tmp_path, monkeypatch, drawn
):
    (one, *_) = configurations("fig6")
    made = fake(replace(one, preset="ptb-lstm-vae", changes=changes), 0, 4.0)
    made["kl_weight"] = weight
    assert ends_before_annealing(made) == expected
    made = {key: made[key] for key in made.keys() - {"series", "x", "mode", "seed"}}
    monkeypatch.setattr("fastvae.experiments.finished", lambda job: made)
    experiment("fig6", Options(tmp_path), Console(quiet=True))
    note = "some runs end before their annealing does"
    assert (note in (tmp_path / "fig6.md").read_text()) == expected


def lines_of(axis):
    """x and y of each line, solid or dashed."""
    return sorted((line.get_linestyle(), *map(list, line.get_data())) for line in axis.lines)


def test_costs_are_drawn_for_each_comparison(drawn):
    """Solid the bound, dashed the KL, in order of x; a band where there are seeds."""
    points = [("a", 3, BOTH, 4.0), ("a", 2, BOTH, 8.0), ("b", 2, RELEASED, 1.0)]
    points.append(("b", 2, MATCHED, 2.0))
    results = [
        fake(Configuration(series, x, "small", mode=mode), seed, kl + seed)
        for series, x, mode, kl in points
        for seed in (0, 1)
    ]
    figures.costs(rows_of(results), None, unit="byte", axis="layers")
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == [RELEASED, MATCHED]
    assert panels[0].get_ylabel() == "bits per byte" and panels[1].get_xlabel() == "layers"
    for panel, kl in zip(panels, (1.5, 2.5), strict=True):
        drawn_lines = [lines for lines in lines_of(panel) if lines[1]]
        assert [(style, xs) for style, xs, _ in drawn_lines] == [
            ("-", [2]), ("-", [2, 3]), ("--", [2]), ("--", [2, 3])
        ]  # fmt: skip
        values = (30 + kl, 38.5, 34.5, kl, 8.5, 4.5)
        assert [y for *_, ys in drawn_lines for y in ys] == pytest.approx([v / 40 for v in values])
        assert list(panel.get_xticks()) == [2, 3] and panel.get_ylim()[0] == 0
        bands = [band.get_paths()[0].vertices[:, 1] for band in panel.collections]
        ends = [34, 39, 4, 9, 29.5 + kl, 30.5 + kl, kl - 0.5, kl + 0.5]
        assert [40 * y for b in bands for y in (b.min(), b.max())] == pytest.approx(ends)
    (legend,) = drawn[0].legends
    assert [t.get_text() for t in legend.texts] == ["a", "b", "full cost", "KL"]


def test_the_bound_is_drawn_at_its_kl(drawn):
    points = [("a", 0.2, 9.0), ("a", 0.1, 3.0), ("b", 4, 5.0)]
    results = [fake(Configuration(s, x, "small"), 0, kl) for s, x, kl in points]
    figures.bound_at_kl(rows_of(results), None, unit="byte", axis="strength")
    (panel,) = drawn[0].axes
    assert [list(map(list, line.get_data())) for line in panel.lines] == [
        [[3, 9], [33 / 40, 39 / 40]], [[5], [35 / 40]]
    ]  # fmt: skip
    assert [(t.get_text(), t.xy) for t in panel.texts] == [
        ("0.1", (3, 33 / 40)), ("0.2", (9, 39 / 40)), ("4", (5, 35 / 40))
    ]  # fmt: skip
    assert panel.get_xlabel() == "KL, nats (labels: strength)"
    assert panel.get_ylabel() == "bits per byte of the bound"


def test_training_curves_are_of_the_reconstruction(drawn):
    """A record's bits are those of its bound."""
    configurations = [Configuration("a", 24, "small"), Configuration("a", 12, "small")]
    configurations.append(Configuration("b", 12, "small", mode=MATCHED))
    results = [fake(c, 0, kl) for c, kl in zip(configurations, (10.0, 2.0, 6.0), strict=True)]
    figures.curves(rows_of(results), None, unit="byte", axis="length")
    panels = drawn[0].axes
    assert [panel.get_title() for panel in panels] == ["length 12", "length 24"]
    for panel, kls in zip(panels, ((2, 6), (10,)), strict=True):
        drawn_lines = [line for line in lines_of(panel) if line[1]]
        assert drawn_lines == sorted(
            (style, steps, [30 / (30 + kl)] * len(steps))
            for kl in kls
            for style, steps in (("-", [1, 2]), ("--", [1]))
        )
    (legend,) = drawn[0].legends
    assert [t.get_text() for t in legend.texts] == ["a", "b, matched", "training", "held out"]


def test_claims_tell_the_comparisons_and_series_apart():
    p = {p.mode: p for p in configurations("fig4") if p.series == "LSTM VAE, p = 0.2" and p.x == 48}
    rows = rows_of([fake(p[RELEASED], 0, 1.0), fake(p[MATCHED], 0, 2.0)])
    page = markdown(EXPERIMENTS["fig4"], rows, [], {}, None)
    claim = "| the LSTM VAE's KL falls to 0 past a length of 48 "
    assert f"{claim}| KL, nats | p = 0.2, length 48 | 1.0 | 2.0 |\n" in page
    page = markdown(EXPERIMENTS["fig4"], rows[1:], [], {}, None)
    assert (
        f"{claim}| KL, nats | p = 0.2, length 48 | 2.0 |\n" in page and "as released |" not in page
    )
    alphas = rows_of([fake(Configuration(f"α = {a:g}", 1, "small"), 0, a) for a in (0.0, 0.2)])
    found = facts(alphas, "KL", "kl", series="α = 0", axis="layers")
    assert found == [("KL", "layers 1", "0.0")]
    assert in_mode(rows, MATCHED) == rows[1:]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\nb", "`a⏎b`"),
        ("`", "`` ` ``"),
        ("a``b", "```a``b```"),
        ("", "`  `"),
        ("\x1b", r"`\x1b`"),
    ],
)
def test_generated_text_as_markdown(text, expected):
    assert code(text) == expected


@pytest.fixture
def fastvae(capsys):
    """Run a command in this process -> exit status, standard output, standard error."""

    def run(*arguments):
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def texts(tmp_path):
    """Paths of three files by split."""
    for n, split in enumerate(("train", "valid", "test")):
        lines = (f"line {7 * k + n} of train, valid and test\n" for k in range(60))
        (tmp_path / f"{split}.txt").write_text("".join(lines))
    return {split: tmp_path / f"{split}.txt" for split in ("train", "valid", "test")}


def test_options_of_the_command(fastvae, texts, tmp_path, monkeypatch):
    asked, result = [], {"written": ["a page"], "failed": {}, "left": 3, "interrupted": False}
    monkeypatch.setattr(
        "fastvae.cli.training.run_experiment", lambda *given: asked.append(given[:2]) or result
    )
    files = [f"--{k if k != 'train' else 'data'}={path}" for k, path in texts.items()]
    options = "--text=tweets", "--steps=7", "--points=a,b", "--seeds=2", "--jobs=3", "--limit=5"
    more = "--device=cpu", "--hidden-size", "9", "--kl_end=4"
    assert fastvae("experiment", "fig4", *files, *options, *more, "--out", tmp_path / "o")[:2] == (
        0, "a page\nruns of the grid not finished: 3\n"
    )  # fmt: skip
    given = {"text": "tweets", "steps": 7, "points": "a,b", "seeds": 2, "jobs": 3, "limit": 5}
    overrides = {"hidden_size": "9", "kl_end": "4"}
    wanted = Options(tmp_path / "o", texts, **given, device="cpu", overrides=overrides)
    assert asked.pop() == ("fig4", wanted)
    assert fastvae("experiment", "fig4", "--paper")[0] == 0
    assert asked.pop()[1] == Options(Path("experiments"), steps=100_000)
    assert fastvae("experiment", "speed", files[0])[0] == 0
    assert asked.pop()[1].files == {"train": texts["train"]}
    result["interrupted"] = True
    assert fastvae("experiment", "fig4")[0] == 130
    result |= {"interrupted": False, "failed": {"one": "no memory", "two": "no disk"}}
    status, _, err = fastvae("experiment", "fig4")
    assert status == 2 and "2 runs failed, the first one: no memory" in err
    for wrong, said in (
        (("--valid", texts["valid"]), "give --data and --valid together"),
        (("--test", texts["test"]), "give --data and --valid together"),
        (("stray",), "unexpected argument 'stray'"),
        (("--kl-end=", "stray"), "unexpected argument 'stray'"),
        (("--kl-end",), "--kl-end needs a value"),
    ):
        status, _, err = fastvae("experiment", "fig4", *wrong)
        assert status == 2 and said in err


def test_a_job_reaches_its_process_whole(tmp_path):
    (found,) = runs(configurations("fig6")[:1], 50, 1, TINY)
    files = {"train": "a", "valid": "b", "test": "c"}
    job = Job(found.preset, tmp_path, files, "cache", device="cpu", threads=3, limit=7)
    again = Job.from_json(job.to_json())
    assert json.loads(again.to_json()) == json.loads(job.to_json())
    assert (again.folder, again.files, again.cache) == (tmp_path, files, "cache")
    assert (again.device, again.threads, again.limit) == ("cpu", 3, 7)
    assert again.preset.config() == found.preset.config()


def test_a_grid_measures_each_of_its_runs_once(texts, tmp_path, monkeypatch):
    """Runs one after the other in this process; their values are measured again here."""
    began, at_once, all_jobs = [], [], []

    def run_jobs(jobs, most, device, console):
        all_jobs.extend(jobs)
        began.extend(job.folder.name for job in jobs)
        at_once.append(most)
        for job in jobs:
            assert run_job(replace(job, threads=None))
        return {}, False

    monkeypatch.setattr("fastvae.experiments.run_jobs", run_jobs)
    seeds = []  # texts of so small models may be equal
    sample = lambda m, g: seeds.append(g.initial_seed()) or m.sample(100, generator=g)  # noqa: E731
    monkeypatch.setattr("fastvae.experiments.configuration._sample", sample)
    out, console = tmp_path / "out", Console(file=io.StringIO())
    options = Options(
        out, texts, steps=4, points="1", jobs=5, limit=20, device="cpu", overrides=TINY
    )
    result = experiment("fig6", options, console)
    grid = configurations("fig6")
    assert result == {
        "written": [str(out / f"fig6.{kind}") for kind in ("json", "md", "png")],
        "failed": {}, "left": len(grid) - 1, "interrupted": False,
    }  # fmt: skip
    (found,) = json.loads((out / "fig6.json").read_text())["results"]
    folder = out / "runs" / began[0]
    whole = json.loads((folder / "result.json").read_text())
    model, vocabulary = load(folder)
    assert (found["series"], found["x"], found["mode"], found["seed"]) == ("α = 0", 1, BOTH, 0)
    assert found["run"] == began[0] and not found.keys() & set(LONG)
    for split in ("valid", "test"):
        corpus = WindowCorpus(texts[split], model.length, vocabulary=vocabulary)
        assert whole[split] == pytest.approx(measure(model, corpus, limit=20, nll_texts=256))
        assert whole["text"][split] == corpus.counts()
    assert whole["variety"]["texts"] == 1000 and len(whole["samples"]) == 20
    generator = torch.Generator().manual_seed(0)
    samples = [model.sample(100, generator=generator) for _ in range(10)]
    samples = vocabulary.batch_decode(torch.cat(samples))
    assert whole["samples"] == samples[:20]
    assert whole["variety"] == {**variety(samples), "texts": 1000}
    held_out = WindowCorpus(texts["valid"], model.length, vocabulary=vocabulary)
    held_out = vocabulary.batch_decode(list(held_out))
    assert whole["variety_of_held_out"] == {**variety(held_out), "texts": len(held_out)}
    ends = torch.randn(3, 2, model.latent_size, generator=generator)
    paths = [vocabulary.batch_decode(model.interpolate(a, b, 7)) for a, b in ends]
    assert whole["interpolations"] == paths
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    terms = ("step", "reconstruction", "kl", "bound", "bpc")
    for split in ("train", "valid"):
        rows = [r for r in records if r["split"] == split]
        assert whole["curves"][split] == [{k: r[k] for k in terms} for r in rows]
    trained = [r for r in records if r["split"] == "train"]
    assert whole["kl_weight"] == trained[-1]["kl_weight"] == 0.001
    speeds = sorted(r["steps_per_second"] for r in trained)
    assert whole["steps_per_second"] == pytest.approx((speeds[1] + speeds[2]) / 2)
    assert whole["parameters"] == sum(p.numel() for p in model.parameters())
    assert (whole["unit"], whole["vocabulary"]) == ("character", vocabulary.size)
    assert (whole["device"], whole["threads"]) == ("cpu", torch.get_num_threads())
    page = (out / "fig6.md").read_text()
    assert "- 4 of the paper's 100,000 steps\n- data: train.txt, valid.txt, test.txt\n" in page
    assert "- changed from the paper's settings: encoder_channels = 8,8, latent_size = 4," in page
    assert "some runs end before their annealing does" in page

    # A run begins with weights of its own seed, whatever was drawn before.
    torch.manual_seed(99)
    assert run_job(replace(all_jobs[0], folder=tmp_path / "again"))
    again = load(tmp_path / "again")[0].state_dict()
    assert all(torch.equal(again[name], t) for name, t in model.state_dict().items())

    # Again nothing is trained; another seed is trained alone; other settings are another run.
    experiment("fig6", options, console)
    assert len(began) == 1
    result = experiment("fig6", replace(options, seeds=2), console)
    assert result["left"] == 2 * len(grid) - 2 and len(began) == 2
    assert began[1] == began[0].replace("seed-0", "seed-1") and at_once == [5, 5]
    other = json.loads((out / "runs" / began[1] / "result.json").read_text())
    model, vocabulary = load(out / "runs" / began[1])
    corpus = WindowCorpus(texts["test"], model.length, vocabulary=vocabulary)
    assert other["test"] == pytest.approx(measure(model, corpus, limit=20, nll_texts=256, seed=1))
    assert seeds == [0] * 20 + [1] * 10
    experiment("fig6", replace(options, limit=19), console)
    assert began[2:] == began[:1]
    texts["test"].write_text("line 2 of train, valid and test\n" * 9)
    experiment("fig6", replace(options, limit=19), console)
    assert began[3:] == began[:1]
    texts["test"].write_text("line 3 of train, valid and test\n" * 9)  # of the same size
    experiment("fig6", replace(options, limit=19), console)
    assert began[4:] == began[:1]


@pytest.mark.parametrize(
    ("name", "text", "names"),
    [
        ("samples", CHARACTERS, ["samples-characters.json", "samples-characters.md"]),
        ("fig6", None, ["fig6.json", "fig6.md", "fig6.png"]),
    ],
)
def test_another_text_has_files_of_its_own(name, text, names, texts, tmp_path, monkeypatch):
    grid, measured = configurations(name, text), []
    made = fake(grid[0], 0, 4.0)
    made = {key: made[key] for key in made.keys() - {"series", "x", "mode", "seed"}}
    monkeypatch.setattr("fastvae.experiments.run_jobs", lambda *given: ({}, True))
    monkeypatch.setattr(
        "fastvae.experiments.finished", lambda job: made if job.folder.name in measured else None
    )
    options, out = Options(tmp_path / "out", texts, text=text), tmp_path / "out"
    result = experiment(name, options, Console(quiet=True))
    assert result == {"written": [], "failed": {}, "left": len(grid), "interrupted": True}
    assert not list(out.iterdir())

    measured += [run.name for run in runs(grid[:1], 20_000, 1, {})]
    result = experiment(name, options, Console(quiet=True))
    assert result["written"] == [str(out / name) for name in names]
    assert result["left"] == len(grid) - 1
    assert sorted(path.name for path in out.iterdir()) == names
    before = {path: path.read_bytes() for path in out.iterdir()}

    measured.clear()
    assert experiment(name, options, Console(quiet=True))["written"] == []
    assert {path: path.read_bytes() for path in out.iterdir()} == before


def test_a_damaged_result_is_measured_again(texts, tmp_path):
    (found,) = runs(configurations("fig6")[:1], 2, 1, TINY)
    files = {split: str(path) for split, path in texts.items()}
    job = Job(found.preset, tmp_path / "run", files, str(tmp_path / "cache"), limit=4)
    path = job.folder / "result.json"
    assert finished(job) is None and run_job(job)
    whole, content = finished(job), path.read_bytes()
    assert whole == json.loads(content)
    parts = [json.dumps({k: v for k, v in whole.items() if k != key}) for key in whole]
    needed = [key for key, part in zip(whole, parts, strict=True) if not reads(job, part.encode())]
    assert {"settings", "valid", "unit", "kl_weight", "curves"} <= {*needed}
    other = [b"[1]", b"null", b"1", b"{}", b"", b"\xff", content[:-9], content[:99]]
    assert not any(reads(job, damaged) for damaged in other)
    assert run_job(job) and path.read_bytes() == content


def reads(job, content):
    """Whether a run counts as measured with this result."""
    (job.folder / "result.json").write_bytes(content)
    return finished(job) is not None


@pytest.mark.slow
def test_smoke(fastvae, tmp_path):
    status, out, err = fastvae(*FIG6, "--limit=64", "--out", tmp_path, "--json")
    assert status == 0, err
    written = [str(tmp_path / f"fig6.{kind}") for kind in ("json", "md", "png")]
    assert json.loads(out) == {
        "written": written, "failed": {}, "left": 16, "interrupted": False
    }  # fmt: skip
    results = json.loads((tmp_path / "fig6.json").read_text())["results"]
    assert [(r["series"], r["x"]) for r in results] == [("α = 0", 1), ("α = 0.2", 1)]
    for result in results:
        assert result["test"]["samples"] == result["valid"]["samples"] == 64
        assert result["settings"]["training"]["kl_end"] == 8000
        assert result["test"]["bound"] < 170  # 190 before the first step
        assert result["variety"]["texts"] == 1000
        assert "samples" not in result and "curves" not in result
    page = (tmp_path / "fig6.md").read_text()
    assert "synthetic text" in page and "200 of the paper's 100,000 steps" in page
    assert "before their annealing does" in page

    # Again: nothing is trained; another number of configurations keeps what is there.
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/result.json")}
    assert fastvae(*FIG6, "--limit=64", "--out", tmp_path, "--points=1")[0] == 0
    assert before == {p: p.stat().st_mtime_ns for p in tmp_path.glob("runs/*/result.json")}
    assert len(json.loads((tmp_path / "fig6.json").read_text())["results"]) == 2


def test_runs_at_a_time(monkeypatch):
    """One a core, at most eight; on a named device one, on its GPUs one each."""
    for cores, most in ((1, 1), (7, 7), (8, 8), (9, 8)):
        monkeypatch.setattr(runner, "_cores", lambda cores=cores: cores)
        assert runner.default_jobs("cpu") == runner.default_jobs(None) == most
    assert runner.default_jobs("cuda:1") == 1
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert runner.default_jobs(None) == 3
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert [runner._visible_gpu(slot) for slot in range(4)] == ["0", "1", "2", "0"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert [runner._visible_gpu(slot) for slot in range(3)] == ["4", "7", "4"]


def test_what_becomes_of_each_run_is_told(tmp_path, monkeypatch):
    """At most two at a time share four cores; one fails without and one with a word."""
    preset = shortened(PRESETS["small"], 10)
    jobs = [
        Job(preset, tmp_path / name, {}, "cache")
        for name in ("well", "silent", "loud", "fine", "last")
    ]
    running, threads = [], []

    def start(job, slot, device, bars):
        job.folder.mkdir()
        (job.folder / "log.txt").write_text("at first\nno memory\n\n" * (job.folder.name == "loud"))
        (job.folder / "metrics.jsonl").write_text('{"step": 10}\n')
        running[:] = [p for p in running if p.poll() is None]
        status = 3 if job.folder.name in ("silent", "loud") else 0
        ends = f"import time; time.sleep(0.3); raise SystemExit({status})"
        running.append(subprocess.Popen([sys.executable, "-c", ends]))
        threads.append((job.threads, device))
        assert len(running) <= 2
        return runner._Worker(job, running[-1], bars.add_task("run", total=10), slot)

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "_cores", lambda: 4)
    console = Console(file=io.StringIO(), width=200)
    failed, interrupted = runner.run_jobs(jobs, 2, "cpu", console)
    assert failed == {"silent": "ended with status 3", "loud": "no memory"} and not interrupted
    assert threads == [(2, "cpu")] * 5
    said = sorted(console.file.getvalue().split("\n"))
    assert said == [
        "",
        *(f"done: {name}" for name in ("fine", "last", "well")),
        "failed: loud",
        "failed: silent",
    ]


def test_each_run_is_a_process_of_its_own(tmp_path, monkeypatch):
    """It reads its job, has its share of the cores, and its log goes on."""
    program, folder = tmp_path / "python", tmp_path / "run"
    program.write_text(
        f'#!/bin/sh\ncat > "{tmp_path}/job"\necho "$OMP_NUM_THREADS threads"\nexit 3'
    )
    program.chmod(0o755)
    folder.mkdir()
    (folder / "log.txt").write_text("from before\n")
    (folder / "metrics.jsonl").write_text('{"step": 7}\n')
    monkeypatch.setattr(sys, "executable", str(program))
    monkeypatch.setattr(runner, "_cores", lambda: 4)
    monkeypatch.setattr(runner, "SPEAK", -1)
    console = Console(file=io.StringIO(), width=200)
    job = Job(shortened(PRESETS["small"], 10), folder, {"train": "a"}, "cache", limit=3)
    assert runner.run_jobs([job], 5, None, console) == ({"run": "4 threads"}, False)
    assert json.loads((tmp_path / "job").read_text()) == json.loads(
        replace(job, threads=4).to_json()
    )
    assert (folder / "log.txt").read_text() == "from before\n4 threads\n"
    assert "7 of 10 steps\n" in console.file.getvalue()


def test_a_process_that_ends_before_it_reads_its_job(tmp_path, monkeypatch):
    files = {"train": "a" * (1 << 20)}  # more than a pipe holds
    job = Job(shortened(PRESETS["small"], 10), tmp_path / "run", files, "cache")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    failed, interrupted = runner.run_jobs([job], 1, None, Console(file=io.StringIO()))
    assert failed == {"run": "ended with status 1"} and not interrupted


def test_no_run_is_left_behind_by_an_error(tmp_path, monkeypatch):
    """As of a full disk, on which nothing more can be told."""
    jobs = [Job(shortened(PRESETS["small"], 10), tmp_path / n, {}, "cache") for n in ("a", "b")]
    processes = []

    def start(job, slot, device, bars):
        processes.append(subprocess.Popen(["sleep", "60" if processes else "0"]))
        return runner._Worker(job, processes[-1], bars.add_task("run", total=10), slot)

    def fail(*said, **how):
        raise OSError("no space")

    monkeypatch.setattr(runner, "_start", start)
    console = Console(file=io.StringIO())
    monkeypatch.setattr(console, "print", fail)
    with pytest.raises(OSError, match="no space"):
        runner.run_jobs(jobs, 2, "cpu", console)
    assert [process.poll() for process in processes] == [0, -signal.SIGKILL]


@pytest.mark.parametrize(
    ("outcome", "status", "said"),
    [
        (True, 0, ""),
        (False, 130, ""),
        (KeyboardInterrupt(), 130, ""),
        (ValueError("no [/b]\nroom"), 2, "fastvae: no [/b]\n"),
        (RuntimeError("no memory"), 2, "fastvae: no memory\n"),
    ],
)
def test_the_status_of_a_run(outcome, status, said, tmp_path, monkeypatch, capsys):
    job = Job(shortened(PRESETS["small"], 10), tmp_path, {}, "cache")

    def run(job):
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    monkeypatch.setattr(sys, "stdin", io.StringIO(job.to_json()))
    monkeypatch.setattr("fastvae.experiments.configuration.run", run)
    with pytest.raises(SystemExit) as end:
        run_main()
    assert (end.value.code, capsys.readouterr().err) == (status, said)


WAITS = """
import pathlib, signal, sys, time
folder, seen = pathlib.Path(sys.argv[1]), []
signal.signal(signal.SIGINT, lambda *_: seen.append(1))
(folder / "began").touch()
while not seen:
    time.sleep(0.01)
time.sleep(1)
(folder / "seen").write_text(str(len(seen)))
"""


def test_a_signal_is_handed_on_once(tmp_path, monkeypatch):
    """A second one would end a run without saving it."""
    job = SimpleNamespace(preset=PRESETS["small"], folder=tmp_path, threads=1)

    def start(job, slot, device, bars):
        process = subprocess.Popen(
            [sys.executable, "-c", WAITS, str(tmp_path)], start_new_session=True
        )
        return runner._Worker(job, process, bars.add_task("run", total=1), slot)

    def interrupt():
        while not (tmp_path / "began").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(runner, "_start", start)
    monkeypatch.setattr(runner, "replace", lambda job, **changes: job)
    thread = threading.Thread(target=interrupt)
    thread.start()
    failed, interrupted = runner.run_jobs([job], 1, None, Console(file=io.StringIO()))
    thread.join()
    assert interrupted and not failed
    assert (tmp_path / "seen").read_text() == "1"


@pytest.mark.slow
def test_ctrl_c_stops_all_runs_and_the_same_command_goes_on(tmp_path):
    program = [sys.executable, "-P", "-c", "from fastvae.cli import main; main()"]
    command = [*program, *FIG6, "--steps=300", "--limit=64", "--out", str(tmp_path)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 100
    begun = []
    while len(begun) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
        begun = [path for path in tmp_path.glob("runs/*/metrics.jsonl") if path.stat().st_size]
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    assert err.count("stopped: ptb-bytenet") == 2
    assert not list(tmp_path.glob("runs/*/result.json"))
    logs = [path.read_text() for path in tmp_path.glob("runs/*/log.txt")]
    assert all("stopped and saved at step" in log for log in logs)

    subprocess.run(command, check=True, capture_output=True)
    for folder in tmp_path.glob("runs/*"):
        assert "resuming from step" in (folder / "log.txt").read_text()
        records = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
        assert [r["step"] for r in records if r["split"] == "train"] == [*range(1, 301)]
        assert (folder / "result.json").exists()


def test_a_failed_run_is_told_and_leaves_the_others(fastvae, tmp_path):
    blocked = "ptb-bytenet_conv-layers-1_aux-weight-0.0"
    arguments = [*FIG6, "--steps=2", "--limit=8", "--out", tmp_path]
    run = runs(configurations("fig6")[:1], 2, 1, TINY)[0]
    (tmp_path / "runs" / run.name).mkdir(parents=True)
    (tmp_path / "runs" / run.name / "metrics.jsonl").write_text("")
    status, _, err = fastvae(*arguments)
    assert status == 2
    assert f"1 runs failed, the first {blocked}" in err and "choose another folder" in err
    assert "## Failed" in (tmp_path / "fig6.md").read_text()
    assert len(json.loads((tmp_path / "fig6.json").read_text())["results"]) == 1


def test_results_stay_where_all_runs_are_refused(fastvae, tmp_path):
    """As where the data are others than those of the runs that are there."""
    (run,) = runs(configurations("fig6")[:1], 2, 1, TINY)
    (tmp_path / "runs" / run.name).mkdir(parents=True)
    (tmp_path / "runs" / run.name / "metrics.jsonl").write_text("")
    before = {"fig6.json": "results", "fig6.md": "a table"}
    for name, content in before.items():
        (tmp_path / name).write_text(content)
    status, out, err = fastvae(*FIG6, "--steps=2", "--points=1", "--out", tmp_path)
    assert status == 2 and "1 runs failed" in err and "fig6.json" not in out
    assert {name: (tmp_path / name).read_text() for name in before} == before


def test_speed_compares_steps_in_turns(tmp_path):
    tiny = {k: v for k, v in TINY.items() if k != "conv_channels"} | {"batch_size": "4"}
    options = Options(tmp_path, text="characters", steps=2, overrides=tiny)
    result = experiment("speed", options, Console(file=io.StringIO()))
    found = json.loads((tmp_path / "speed-characters.json").read_text())
    assert [(r["model"], r["by"]) for r in found["rows"]] == [
        (name, by)
        for name in ("hybrid, α = 0.2", "LSTM VAE, p = 0.5")
        for by in ("fastvae", "plain PyTorch")
    ]
    assert found["ratios"]["fastvae"] == pytest.approx(
        found["rows"][2]["seconds_per_step"] / found["rows"][0]["seconds_per_step"]
    )
    assert all(r["parameters"] < 5000 for r in found["rows"])  # of the tiny sizes, not the paper's
    assert {r["steps"] for r in found["rows"]} == {2}
    products = [r["steps_per_second"] * r["seconds_per_step"] for r in found["rows"]]
    assert products == pytest.approx([1] * len(products))
    page = (tmp_path / "speed-characters.md").read_text()
    assert "2x faster" in page and "synthetic text" in page
    assert f"{torch.get_num_threads()} threads" in page
    lines = {p.stem: p.read_text().splitlines() for p in (tmp_path / "synthetic").iterdir()}
    sizes = {"train": 20_000, "valid": 2000, "test": 2000}
    assert {split: len(found) for split, found in lines.items()} == sizes
    assert not any(lines[a][:9] == lines[b][:9] for a, b in itertools.combinations(lines, 2))
    assert len(result["written"]) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--points=1"], "--points has no effect with speed: leave it out"),
        (["--seeds=2", "--jobs=3"], "--seeds, --jobs have no effect with speed: leave them out"),
        (["--limit=2"], "--limit has no effect with speed"),
        (["--data=x", "--valid=x", "--test=x"], "--valid, --test have no effect with speed"),
        (["--valid=x"], "--valid has no effect with speed"),
        (["--kl-end=4", "--hidden-size=8"], "--kl-end has no effect with speed"),
        (["--precision=bf16", "--seed=1"], "--precision, --seed have no effect with speed"),
        (["--conv-layers=3"], "--conv-layers has no effect with speed"),
        (["--lenght=3"], "no configuration has a field 'lenght': did you mean length?"),
    ],
)
def test_speed_refuses_options_without_effect(fastvae, tmp_path, options, message):
    status, _, err = fastvae("experiment", "speed", *options, "--out", tmp_path / "out")
    assert status == 2 and err.startswith(f"fastvae: {message}") and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_bad_use_is_one_line(fastvae, tmp_path):
    for arguments, message in (
        (["fig7"], "no experiment 'fig7': did you mean fig6?"),
        (["pictures"], f"no experiment 'pictures': there are {', '.join(NAMES)}"),
        (["fig6", "--data", "x"], "--data and --valid together"),
        (["fig6", "--steps=3", "--paper"], "exclude each other"),
    ):
        status, _, err = fastvae("experiment", *arguments, "--out", tmp_path / "out")
        assert status == 2 and message in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "text, step",
    [
        (b'{"step": 7}\n', 7),
        (b'{"step": 7}\n{"step": 8', 7),
        (b'{"step": 1}\n' * 999 + b'{"text": "%s", "step": 7}\n' % (b"a" * 2000), 7),
        (b"\xff\xfe\n", 0),
        (b"[1]\n", 0),
        (b'{"loss": 1}\n', 0),
        (b'{"step": null}\n', 0),
        (b"", 0),
    ],
)
def test_progress_is_read_from_records_whatever_they_hold(tmp_path, text, step):
    (tmp_path / "metrics.jsonl").write_bytes(text)
    assert _last_step(SimpleNamespace(folder=tmp_path)) == step
