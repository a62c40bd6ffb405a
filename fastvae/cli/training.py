"""Commands that train: a demonstration, a run, an experiment of the paper."""

import itertools
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from fastvae.cli.arguments import (
    MOST,
    Column,
    Data,
    Device,
    Field,
    Json,
    Normalize,
    Seed,
    Threads,
    path,
)
from fastvae.cli.demo import demo as run_demo
from fastvae.cli.fields import MODEL, groups, shown, with_field_options
from fastvae.cli.inputs import tell
from fastvae.cli.models import what_latents_keep
from fastvae.cli.plan import plan_training
from fastvae.console import console, escape, one_line, print_json, table
from fastvae.device import find_device
from fastvae.evaluation import measure
from fastvae.experiments import NAMES, PAPER_STEPS, Options
from fastvae.experiments import experiment as run_experiment
from fastvae.plots import compare_runs, learning_curves, read_metrics
from fastvae.presets import (
    MEANINGS,
    PRESETS,
    TEXTS,
    build_model,
)
from fastvae.training import train as run_training
from fastvae.training.run_directory import CURVES, METRICS, SETTINGS

LATENT_TEXTS = 256  # validation texts that are reconstructed when a run ends


def demo(
    out: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Folder to write, new or empty; else the first free fastvae-demo.."
        ),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, max=MOST, help="Training steps.")] = 1000,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = None,
) -> None:
    """Watch a small model learn a toy language in about a minute."""
    if out is None:
        free = (Path(f"fastvae-demo-{n}" if n > 1 else "fastvae-demo") for n in itertools.count(1))
        out = next(path for path in free if not path.exists())
    result = run_demo(out, steps=steps, seed=seed, device=find_device(device), console=console())
    if result is None:
        raise typer.Exit(130)


@with_field_options
def train(
    data: Data,
    out: Annotated[
        Path, typer.Option("--out", parser=path, help="Folder of the run, made if missing.")
    ],
    valid: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Text file to evaluate on; else 5 % of the lines are held out."
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Settings to start from; else by the file: see above.")
    ] = None,
    text: Annotated[
        str | None, typer.Option(help=f"{', '.join(TEXTS)}; else by preset and file.")
    ] = None,
    column: Column = None,
    field: Field = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            metavar="REGEX", help="What a token is, if not a character, such as 'Cl|Br|.'"
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    normalize: Normalize = None,
    device: Device = None,
    threads: Threads = None,
    as_json: Json = False,
    *,
    overrides: dict[str, str],
) -> None:
    """Train on any text file.

    A file of short lines is read line by line with preset lines, any other as
    a stream with preset small. A preset sets the model and its training; the
    options below change it. Defaults shown are those of preset lines; fastvae
    fields --preset NAME lists another's.

    PRESETS

    Ctrl-C saves; the same command with --resume goes on from there.
    """
    with _no_cache_without_a_run(out):
        plan = plan_training(
            data,
            out,
            overrides,
            preset=preset,
            text=text,
            column=column,
            field=field,
            tokens=tokens,
            normalize=normalize,
            valid=valid,
            resume=resume,
        )
        chosen, corpus, validation = plan.preset, plan.corpus, plan.validation
        config, vocabulary = chosen.config(), corpus.vocabulary
        torch.manual_seed(config.seed)
        model = build_model(chosen, vocabulary).to(find_device(device))
        result = run_training(
            model,
            corpus,
            config,
            out,
            validation=validation,
            resume=resume,
            notes=plan.notes,
        )
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks
        counts = {"train": corpus.counts(), "valid": validation and validation.counts()}
        result["text"] = {**corpus.reading.to_dict(), **counts}
        result["latent"] = None
        if validation and len(validation) > 1 and not result["interrupted"]:
            few = {"mi_texts": 0, "nll_texts": 0, "limit": LATENT_TEXTS}
            measured = measure(model, validation, reconstruct_texts=LATENT_TEXTS, **few)
            result["latent"] = {k: v for k, v in measured.items() if "recon" in k or k == "kl"}
        _print_training(result, out, config.honest_kl_weight, as_json)
        if result["train"] or result["valid"]:
            try:
                learning_curves(read_metrics(out / METRICS), out / CURVES, title=str(out))
            except (OSError, ValueError) as error:  # the run is saved
                tell([one_line(error)])
    if result["interrupted"]:
        raise typer.Exit(130)


@contextmanager
def _no_cache_without_a_run(out: Path) -> Iterator[None]:
    """Remove the cache, and the folder if it is empty then, of a run that could not begin.

    What was there before stays.
    """
    was_there, cache = out.exists(), out / "cache"
    is_new = not cache.exists()
    try:
        yield
    except Exception:
        if not (out / SETTINGS).exists() and os.environ.get("RANK", "0") == "0":
            if is_new:
                shutil.rmtree(cache, ignore_errors=True)
            if not was_there:
                with suppress(OSError):
                    out.rmdir()
        raise


train.__doc__ = train.__doc__.replace(
    "PRESETS", "\n\n    ".join(f"{name}: {p.description}" for name, p in PRESETS.items())
)


def fields(
    preset: Annotated[str, typer.Option(help="Whose defaults are shown.")] = "lines",
    as_json: Json = False,
) -> None:
    """Every field of models and training that train takes as an option."""
    found = groups(preset)
    rows = [
        {"field": name, "group": group, "default": value, "meaning": MEANINGS[name]}
        for group, values in found.items()
        for name, value in values.items()
    ]
    if as_json:
        print_json(rows)
        return
    for group in found:
        title = f"{group}, preset {preset}" if group == MODEL else group
        cells = [
            (f"--{row['field'].replace('_', '-')}", shown(row["default"]), row["meaning"])
            for row in rows
            if row["group"] == group
        ]
        console().print(table(("option", "default", "meaning"), cells, title=title))


def plot(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", parser=path, help="Folders of runs.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=path,
            help="Picture to write: .png, .svg or .pdf; else learning-curve.png in the run, or for "
            "several learning-curves.png here.",
        ),
    ] = None,
) -> None:
    """Draw the learning curves of a run, or compare those of several."""
    metrics = {str(run): read_metrics(run / METRICS) for run in runs}
    if len(metrics) == 1:
        (name,) = metrics
        path = out or runs[0] / CURVES
        learning_curves(metrics[name], path, title=name)
    else:
        path = out or Path("learning-curves.png")
        compare_runs(metrics, path)
    console().print(f"Written: {escape(str(path))}", soft_wrap=True)


def _print_training(result: dict[str, Any], out: Path, kl_target: float, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    keys = "step", "reconstruction", "kl", "kl_weight", "bound", "bpc"
    rows = [[name, *(result[name][k] for k in keys)] for name in ("train", "valid") if result[name]]
    console().print(table(("", "step", "reconstruction", "KL", "KL weight", "bound", "bpc"), rows))
    if any(row[4] < kl_target for row in rows):
        console().print(
            "The KL is hardly held down while its weight is small: bound and bits per character "
            f"mean little before it is {kl_target:g}.",
            soft_wrap=True,
        )
    if result["latent"]:
        console().print(what_latents_keep(result["latent"]), soft_wrap=True)
    folder = f"./{out}" if str(out).startswith("-") else str(out)
    name = shlex.quote(folder) if folder.isprintable() else "FOLDER"  # nobody could paste it
    line = f"nats per text; next: fastvae sample {name}"
    console().print(escape(line), soft_wrap=True)


def experiment(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(NAMES))],
    data: Annotated[
        Path | None, typer.Option("--data", parser=path, help="Text file to train on.")
    ] = None,
    valid: Annotated[
        Path | None, typer.Option(parser=path, help="Text file to evaluate on.")
    ] = None,
    test: Annotated[
        Path | None, typer.Option(parser=path, help="Text file that the tables are of.")
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", parser=path, help="Folder of runs and results.")
    ] = Path("experiments"),
    text: Annotated[
        str | None, typer.Option(help="characters or tweets, where an experiment has both.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, max=MOST, help="Steps of a run.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's 100,000 steps.")] = False,
    points: Annotated[
        str | None, typer.Option(help="How many configurations, or their names or parts of names.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each configuration.")] = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first held-out texts.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run an experiment of the paper: its grid of models, table and figure.

    Without --data it runs on a synthetic text, to see that it works. --steps scales the run and its
    decay; the annealing keeps its steps. Every field of models and training is an option too.

    Ctrl-C saves all runs; the same command goes on from there, and finished runs are kept.
    """
    incomplete = (data is None) != (valid is None) or (test is not None and data is None)
    if incomplete and name != "speed":  # which takes --data alone
        raise ValueError("give --data and --valid together, with or without --test")
    if paper and steps:
        raise ValueError("--steps and --paper exclude each other")
    files = {"train": data, "valid": valid, "test": test}
    options = Options(
        out=out,
        files={split: path for split, path in files.items() if path},
        text=text,
        steps=PAPER_STEPS if paper else steps,
        points=points,
        seeds=seeds,
        jobs=jobs,
        device=device,
        limit=limit,
        overrides=_options(context.args),
    )
    result = run_experiment(name, options, console(stderr=True))
    if as_json:
        print_json(result)
    else:
        for path in result["written"]:
            console().print(path, soft_wrap=True)
        console().print(f"runs of the grid not finished: {result['left']}", soft_wrap=True)
    if result["interrupted"]:
        raise typer.Exit(130)
    if result["failed"]:
        run, why = next(iter(result["failed"].items()))
        raise ValueError(f"{len(result['failed'])} runs failed, the first {run}: {why}")


def _options(arguments: Sequence[str]) -> dict[str, str]:
    """`--name value` and `--name=value` -> name_with_underscores: value."""
    found, rest = {}, iter(arguments)
    for argument in rest:
        name, equals, value = argument.partition("=")
        if not name.startswith("--"):
            raise ValueError(f"unexpected argument {argument!r}")
        value = value if equals else next(rest, None)
        if value is None:
            raise ValueError(f"{name} needs a value")
        found[name[2:].replace("-", "_")] = value
    return found
