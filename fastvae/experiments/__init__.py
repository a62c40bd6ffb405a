"""The paper's experiments: grids of runs, their results as JSON, a Markdown page and a figure."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from fastvae.atomic_files import make_folder, write_bytes, write_json
from fastvae.device import find_device
from fastvae.experiments import (
    equal_kl,
    fig3,
    fig4,
    fig5,
    fig6,
    interpolations,
    samples,
    speed,
    table3,
)
from fastvae.experiments.configuration import Job, finished
from fastvae.experiments.grid import STEPS, Configuration, Experiment, Run, pick, runs
from fastvae.experiments.report import LONG, ends_before_annealing, markdown, rows_of
from fastvae.experiments.runner import default_jobs, run_jobs
from fastvae.names import suggestion
from fastvae.text import SyntheticCorpus

EXPERIMENTS: dict[str, Experiment] = {
    "fig3": fig3.EXPERIMENT,
    "fig4": fig4.EXPERIMENT,
    "fig5": fig5.EXPERIMENT,
    "fig6": fig6.EXPERIMENT,
    "table3": table3.EXPERIMENT,
    "samples": samples.EXPERIMENT,
    "interpolations": interpolations.EXPERIMENT,
    "equal-kl": equal_kl.EXPERIMENT,
}
NAMES = (*EXPERIMENTS, "speed")
PAPER_STEPS = 100_000
SYNTHETIC_LINES = {"train": 20_000, "valid": 2000, "test": 2000}


@dataclass(frozen=True)
class Options:
    """How to run an experiment.

    Args:
        out: directory of results and runs.
        files: split (train, valid, perhaps test) -> path; without any, a synthetic text is made.
        text: "characters" or "tweets"; None is the experiment's first.
        steps: of each run; None is the experiment's own.
        points: how many configurations, or comma-separated patterns of their names; None all.
        seeds: runs of each configuration.
        jobs: runs at a time; None is one a core or device.
        device: of the runs; None is a GPU where there is one.
        limit: texts of each held-out pass.
        overrides: fields of models and training by name, their values as text.
    """

    out: Path
    files: Mapping[str, str] = field(default_factory=dict)
    text: str | None = None
    steps: int | None = None
    points: str | None = None
    seeds: int = 1
    jobs: int | None = None
    device: str | None = None
    limit: int | None = None
    overrides: Mapping[str, str] = field(default_factory=dict)


def experiment(name: str, options: Options, console: Console) -> dict[str, Any]:
    """Run or resume an experiment and write NAME.json, NAME.md and NAME.png to `options.out`.

    For a text that is not the experiment's first, they are NAME-TEXT.json and so on. Without any
    result nothing is written, and earlier files stay.

    Args:
        name: of the experiment.
        options: how to run it.
        console: where progress is shown.

    Returns:
        the written paths; failed, run -> why; left, runs that are not finished; interrupted.

    Raises:
        ValueError: a name, configuration or field that does not exist, or an option without effect.
    """
    if name not in NAMES:
        raise ValueError(f"no experiment {name!r}: {suggestion(name, NAMES)}")
    grids = speed.CONFIGURATIONS if name == "speed" else EXPERIMENTS[name].grids
    text = options.text or next(iter(grids))
    if text not in grids:
        raise ValueError(f"{name} has no text {text!r}: {suggestion(text, grids)}")
    if name == "speed":
        _check_speed_options(options, text)
    find_device(options.device)
    stem = name if text == next(iter(grids)) else f"{name}-{text}"
    if name == "speed":
        return _speed(stem, options, text)
    return _grid(stem, EXPERIMENTS[name], options, text, console)


def _grid(
    stem: str,
    experiment: Experiment,
    options: Options,
    text: str,
    console: Console,
) -> dict[str, Any]:
    configurations, steps = experiment.grids[text], options.steps or STEPS[text]

    def named(configurations: Sequence[Configuration]) -> dict[str, Run]:
        return {
            run.name: run for run in runs(configurations, steps, options.seeds, options.overrides)
        }

    picked, every = named(pick(configurations, options.points)), named(configurations)
    files = _files(options)
    jobs = [(run, _job(run, options, files)) for run in every.values()]
    todo = [job for run, job in jobs if run.name in picked and not finished(job)]
    failed, interrupted = {}, False
    if todo:
        at_once = options.jobs or default_jobs(options.device)
        failed, interrupted = run_jobs(todo, at_once, options.device, console)
    results = [_labelled(run, result) for run, job in jobs if (result := finished(job))]
    written = []
    if results:
        written = _write(stem, experiment, options, steps, files, results, failed)
    left = len(configurations) * options.seeds - len(results)
    return {"written": written, "failed": failed, "left": left, "interrupted": interrupted}


def _job(run: Run, options: Options, files: dict[str, str]) -> Job:
    return Job(
        preset=run.preset,
        folder=options.out / "runs" / run.name,
        files=files,
        cache=str(options.out / "cache"),
        device=options.device,
        limit=options.limit,
    )


def _labelled(run: Run, result: dict[str, Any]) -> dict[str, Any]:
    configuration = run.configuration
    label = {"series": configuration.series, "x": configuration.x, "mode": configuration.mode}
    return {"run": run.name, **label, "seed": run.seed, **result}


def _write(
    stem: str,
    experiment: Experiment,
    options: Options,
    steps: int,
    files: dict[str, str],
    results: list[dict[str, Any]],
    failed: dict[str, str],
) -> list[str]:
    rows, out = rows_of(results), options.out
    written = [out / f"{stem}.json", out / f"{stem}.md"]
    if experiment.draw:
        written.append(out / f"{stem}.png")
        unit = results[0]["unit"]
        experiment.draw(rows, written[-1], unit=unit, axis=experiment.axis)
    left_out = {*LONG} - {experiment.shows}
    kept = [{k: v for k, v in r.items() if k not in left_out} for r in results]
    notes = _notes(options, files, f"{steps:,} of the paper's {PAPER_STEPS:,} steps")
    if any(map(ends_before_annealing, results)):
        notes.append("some runs end before their annealing does: see the KL's weight")
    document = {"exhibit": stem, "title": experiment.title, "notes": notes, "results": kept}
    write_json(written[0], document)
    page = markdown(experiment, rows, notes, failed, f"{stem}.png" if len(written) > 2 else None)
    write_bytes(written[1], page.encode())
    return [str(path) for path in written]


def _notes(options: Options, files: Mapping[str, str], steps: str) -> list[str]:
    """What a reader must know: how long, on what, with what changed."""
    data = ", ".join(Path(path).name for path in files.values())
    notes = [steps, f"data: {data}" if options.files else "synthetic text, not the paper's"]
    if options.overrides:
        fields = ", ".join(f"{key} = {value}" for key, value in options.overrides.items())
        notes.append(f"changed from the paper's settings: {fields}")
    return notes


def _check_speed_options(options: Options, text: str) -> None:
    """Raise ValueError for options that change neither the timed models nor their batch."""
    given = {
        "valid": "valid" in options.files,
        "test": "test" in options.files,
        "points": options.points is not None,
        "seeds": options.seeds != 1,
        "jobs": options.jobs is not None,
        "limit": options.limit is not None,
    }
    idle = [name for name, is_given in given.items() if is_given]
    idle += speed.idle_fields(text, options.overrides)
    if idle:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in idle)
        has, it = ("has", "it") if len(idle) == 1 else ("have", "them")
        raise ValueError(f"{names} {has} no effect with speed: leave {it} out")


def _speed(stem: str, options: Options, text: str) -> dict[str, Any]:
    steps, out, files = options.steps or speed.STEPS, options.out, _files(options)
    result = speed.measure_speed(
        text, files["train"], out / "cache", steps, options.device, options.overrides
    )
    where = find_device(options.device)
    on = torch.cuda.get_device_name(where) if where.type == "cuda" else "CPU"
    machine = f"{on}, {torch.get_num_threads()} threads"
    notes = [*_notes(options, files, f"medians of {steps} steps of each, taken in turns"), machine]
    written = [out / f"{stem}.json", out / f"{stem}.md"]
    write_json(written[0], {"exhibit": stem, "notes": notes, **result})
    write_bytes(written[1], speed.page(result, notes).encode())
    return {"written": list(map(str, written)), "failed": {}, "left": 0, "interrupted": False}


def _files(options: Options) -> dict[str, str]:
    """The files to train and measure on, and the folder of the results."""
    make_folder(options.out)
    return {split: str(path) for split, path in options.files.items()} or _synthetic(options.out)


def _synthetic(out: Path) -> dict[str, str]:
    """Lines of the synthetic corpus as files, where no text is given."""
    folder, corpus = out / "synthetic", SyntheticCorpus()
    make_folder(folder)
    files = {}
    for seed, (split, count) in enumerate(SYNTHETIC_LINES.items()):
        path = folder / f"{split}.txt"
        if not path.exists():
            lines = corpus.lines(count, torch.Generator().manual_seed(seed))
            write_bytes(path, ("\n".join(lines) + "\n").encode())
        files[split] = str(path)
    return files
