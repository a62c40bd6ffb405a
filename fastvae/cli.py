"""The command line: each command reads, calls the library, and prints."""

import itertools
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.text import Text

from fastvae import metrics
from fastvae.allocator import keep_freed_memory
from fastvae.demo import demo as run_demo
from fastvae.evaluation import measure
from fastvae.experiments import NAMES, PAPER_STEPS, Options
from fastvae.experiments import experiment as run_experiment
from fastvae.info import facts
from fastvae.inputs import (
    encode_texts,
    find_device,
    load_model,
    open_for,
    posterior,
    token_batches,
)
from fastvae.presets import build_model, configure, open_corpus
from fastvae.terminal import (
    console,
    escape,
    hush,
    one_line,
    print_json,
    table,
    track,
)
from fastvae.training import train as run_training
from fastvae.training_config import TrainingConfig

app = typer.Typer(
    name="fastvae",
    help="A hybrid convolutional VAE for text: train it, measure it, let it speak.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

Run = Annotated[Path, typer.Argument(help="Folder of a trained run or a saved model.")]
Data = Annotated[Path, typer.Option("--data", help="Text file (.gz too).")]
MaybeData = Annotated[
    Path | None, typer.Option("--data", help="Text file (.gz too); else texts on standard input.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of everything drawn at random.")]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
Best = Annotated[bool, typer.Option("--best", help="Best weights instead of the last ones.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, help="Texts at a time.")]
Temperature = Annotated[
    float, typer.Option("--temperature", "-t", min=0.0, help="0 takes the likeliest symbols.")
]
Int8 = Annotated[bool, typer.Option("--int8", help="Round the decoder's weights to 8 bits.")]


@app.command()
def demo(
    out: Annotated[
        Path | None,
        typer.Option(help="Folder to write, new or empty; else the first free fastvae-demo.."),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="Training steps.")] = 1000,
    seed: Seed = 0,
    device: Device = None,
) -> None:
    """Watch a small model learn a toy language in about a minute."""
    if out is None:
        free = (Path(f"fastvae-demo-{n}" if n > 1 else "fastvae-demo") for n in itertools.count(1))
        out = next(path for path in free if not path.exists())
    run_demo(out, steps=steps, seed=seed, device=find_device(device), console=console())


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def train(
    context: typer.Context,
    data: Data,
    out: Annotated[Path, typer.Option("--out", help="Folder of the run, made if missing.")],
    valid: Annotated[Path | None, typer.Option(help="Text file to evaluate on.")] = None,
    preset: Annotated[str, typer.Option(help="Settings to start from: see below.")] = "small",
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in --out.")] = False,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Train on any text file.

    Presets: small, ptb-lstm, ptb-bytenet, ptb-conv, ptb-lstm-vae, tweets, tweets-lstm-vae.

    Every field of the model and of the training is an option too: --steps 300 --seed 1 --length 64
    --hidden-size 500 --kl-end 2000 --batch-size 16 --precision bf16. A wrong one lists them all.

    Ctrl-C saves; the same command with --resume goes on from there.
    """
    chosen = configure(preset, _options(context.args))
    config = TrainingConfig(**chosen.training)
    corpus = open_corpus(data, chosen.length, text=chosen.text, cache=out / "cache")
    vocabulary = corpus.vocabulary
    validation = valid and open_corpus(
        valid, chosen.length, vocabulary, text=chosen.text, cache=out / "cache"
    )
    torch.manual_seed(config.seed)
    model = build_model(chosen, vocabulary).to(find_device(device))
    result = run_training(
        model,
        corpus,
        config,
        out,
        validation=validation,
        resume=resume,
    )
    if os.environ.get("RANK", "0") == "0":  # under torchrun the first process speaks
        _print_training(result, out, as_json)
    if result["interrupted"]:
        raise typer.Exit(130)


def _print_training(result: dict[str, Any], out: Path, as_json: bool) -> None:
    if as_json:
        print_json(result)
        return
    keys = "step", "reconstruction", "kl", "bound", "bpc"
    rows = [[name, *(result[name][k] for k in keys)] for name in ("train", "valid") if result[name]]
    console().print(table(("", "step", "reconstruction", "KL", "bound", "bpc"), rows))
    console().print(f"nats per text; next: fastvae sample {out}", soft_wrap=True)


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


@app.command()
def evaluate(
    run: Run,
    data: Data,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first texts.")] = None,
    nll_texts: Annotated[
        int, typer.Option(min=0, help="Texts for the importance-weighted NLL; 0 leaves it out.")
    ] = 64,
    nll_samples: Annotated[int, typer.Option(min=1, help="Its samples of z for each text.")] = 64,
    mi_texts: Annotated[
        int, typer.Option(min=0, help="Texts for the mutual information; 0 leaves it out.")
    ] = 4096,
    int8_texts: Annotated[
        int, typer.Option(min=0, help="Texts for what --int8 costs elsewhere; 0 leaves it out.")
    ] = 0,
    batch_size: Batch = 64,
    seed: Seed = 0,
    device: Device = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Reconstruction, KL, bound, bits per character and more on a file, in nats per text."""
    model, vocabulary = load_model(run, best=best, device=device)
    corpus = open_for(model, vocabulary, data)
    count = min(len(corpus), limit or len(corpus))
    result = measure(
        model,
        corpus,
        limit=count,
        nll_texts=nll_texts,
        nll_samples=nll_samples,
        mi_texts=mi_texts,
        batch_size=batch_size,
        seed=seed,
        track=track,
    )
    if int8_texts:
        n = min(int8_texts, count)
        parts = track(corpus.batches(batch_size, n), "int8 weights", -(-n // batch_size))
        result |= {f"int8_{k}": v for k, v in metrics.int8_loss(model, parts, seed=seed).items()}
    if as_json:
        print_json(result)
    else:
        _print_evaluation(result, vocabulary.unit, model.latent_size)


def _print_evaluation(result: dict[str, Any], unit: str, latent_size: int) -> None:
    units = "nats per text"
    rows = [
        ("reconstruction", result["reconstruction"], units),
        ("KL", result["kl"], units),
        ("bound (reconstruction + KL)", result["bound"], units),
        (f"bits per {unit}", result["bpc"], "of the bound"),
        ("auxiliary", result["auxiliary"], f"{units}, before its weight"),
        ("active units", result["active_units"], f"of {latent_size}"),
    ]
    if "mutual_information" in result:
        note = f"nats, from {result['mutual_information_texts']:,} texts"
        rows.append(("mutual information of x and z", result["mutual_information"], note))
    if "importance_weighted_nll" in result:
        texts, samples = (result[f"importance_weighted_nll_{k}"] for k in ("texts", "samples"))
        note = f"{units}, first {texts:,} texts, {samples:,} samples each"
        rows.append(("importance-weighted NLL", result["importance_weighted_nll"], note))
    if "int8_texts" in result:
        note = f"of the bound, first {result['int8_texts']:,} texts"
        rows.append((f"bits per {unit} lost to int8", result["int8_bpc_loss"], note))
        note = "share of likeliest symbols after the same text"
        rows.append(("int8 token agreement", result["int8_token_agreement"], note))
        note = "share of symbols written from the same z"
        rows.append(("int8 greedy agreement", result["int8_greedy_agreement"], note))
    rows.append(("texts", result["samples"], ""))
    console().print(table(("measure", "value", ""), rows))


def _weights(int8: bool) -> str | None:
    return "int8" if int8 else None


@app.command()
def sample(
    run: Run,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many texts.")] = 20,
    temperature: Temperature = 0.0,
    batch_size: Batch = 256,
    seed: Seed = 0,
    device: Device = None,
    best: Best = False,
    int8: Int8 = False,
    as_json: Json = False,
) -> None:
    """Texts from the prior, one a line."""
    model, vocabulary = load_model(run, best=best, device=device)
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    while len(texts) < n:
        count = min(batch_size, n - len(texts))
        tokens = model.sample(
            count, temperature=temperature, generator=generator, weights=_weights(int8)
        )
        batch = [vocabulary.decode(row) for row in tokens.tolist()]
        if not as_json:
            for text in batch:
                print(escape(text))
        texts += batch
    if as_json:
        print_json(texts)


@app.command()
def reconstruct(
    run: Run,
    data: MaybeData = None,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="Texts of --data.")] = 10,
    temperature: Temperature = 0.0,
    batch_size: Batch = 256,
    seed: Seed = 0,
    device: Device = None,
    best: Best = False,
    int8: Int8 = False,
    as_json: Json = False,
) -> None:
    """Texts beside what the decoder makes of their posterior means.

    A model of windows of L characters reads the first L of each line of standard input.
    """
    model, vocabulary = load_model(run, best=best, device=device)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for tokens in token_batches(model, vocabulary, data, n if data else None, batch_size)[1]:
        mean, _ = posterior(model, tokens)
        out = model.generate(
            mean, temperature=temperature, generator=generator, weights=_weights(int8)
        )
        for original, copy in zip(tokens.tolist(), out.tolist(), strict=True):
            pairs.append((vocabulary.decode(original), vocabulary.decode(copy)))
            if not as_json:
                print(f"in  {escape(pairs[-1][0])}\nout {escape(pairs[-1][1])}")
    if as_json:
        print_json([{"text": text, "reconstruction": copy} for text, copy in pairs])


@app.command()
def interpolate(
    run: Run,
    a: Annotated[str, typer.Argument(metavar="A", help="Text at one end.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Text at the other end.")],
    steps: Annotated[int, typer.Option(min=2, help="Texts, the ends included.")] = 7,
    device: Device = None,
    best: Best = False,
    int8: Int8 = False,
    as_json: Json = False,
) -> None:
    """Texts on the line between the posterior means of two texts."""
    model, vocabulary = load_model(run, best=best, device=device)
    ends, _ = posterior(model, encode_texts(model, vocabulary, (a, b)))
    tokens = model.interpolate(*ends, steps, weights=_weights(int8))
    texts = [vocabulary.decode(row) for row in tokens.tolist()]
    if as_json:
        print_json(texts)
        return
    for number, text in enumerate(texts):
        style = "bold" if number in (0, steps - 1) else ""
        console().print(Text(escape(text), style=style), soft_wrap=True)


@app.command()
def encode(
    run: Run,
    out: Annotated[Path, typer.Option("--out", help="File to write: .npy, float32 [N, Z].")],
    data: MaybeData = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first texts.")] = None,
    batch_size: Batch = 256,
    device: Device = None,
    best: Best = False,
) -> None:
    """Posterior means of texts as a NumPy file."""
    if out.suffix != ".npy":
        raise ValueError(f"--out {out}: the file's name must end in .npy")
    model, vocabulary = load_model(run, best=best, device=device)
    count, batches = token_batches(model, vocabulary, data, limit, batch_size)
    shape = count, model.latent_size
    partial = out.with_name(out.name + ".partial")
    try:
        # Written as a stream: the latents of a large file need no memory of its size.
        with open(partial, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for tokens in track(batches, "encoding", -(-count // batch_size)):
                mean, _ = posterior(model, tokens)
                file.write(mean.float().cpu().numpy().astype("<f4").tobytes())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    console(stderr=True).print(f"{out}: {shape[0]:,} texts, {shape[1]} dimensions")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})
def experiment(
    context: typer.Context,
    name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(NAMES))],
    data: Annotated[Path | None, typer.Option("--data", help="Text file to train on.")] = None,
    valid: Annotated[Path | None, typer.Option(help="Text file to evaluate on.")] = None,
    test: Annotated[Path | None, typer.Option(help="Text file that the tables are of.")] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of runs and results.")] = Path(
        "experiments"
    ),
    text: Annotated[
        str | None, typer.Option(help="characters or tweets, where an exhibit has both.")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Steps of a run.")] = None,
    paper: Annotated[bool, typer.Option("--paper", help="The paper's 100,000 steps.")] = False,
    points: Annotated[
        str | None, typer.Option(help="How many points, or their names or parts of names.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each point.")] = 1,
    jobs: Annotated[int | None, typer.Option(min=1, help="Runs at a time.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first held-out texts.")] = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Run an exhibit of the paper: its grid of models, table and figure.

    Without --data it runs on a synthetic text, to see that it works. --steps scales the run and its
    decay; the annealing keeps its steps. Every field of models and training is an option too.

    Ctrl-C saves all runs; the same command goes on from there, and finished runs are kept.
    """
    if (data is None) != (valid is None) or (test is not None and data is None):
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


@app.command()
def info(as_json: Json = False) -> None:
    """Version, build, machine, and what serves each op here."""
    found = facts()
    if as_json:
        print_json(found)
        return
    out = console()
    ops = found.pop("ops")
    out.print(table(("", ""), found.items()))
    rows = [(name, served["cpu"], served["cuda"]) for name, served in ops.items()]
    out.print(table(("op", "CPU", "CUDA"), rows))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 with one line on standard error, 130 on Ctrl-C."""
    # Generated text holds any character; a terminal that lacks one must not end the program.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    try:
        status = app(arguments, prog_name="fastvae", standalone_mode=False)
        sys.stdout.flush()
    except BrokenPipeError:
        hush()
        status = 1
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        # typer's errors differ between its versions in all but this method.
        if not isinstance(error, (ValueError, OSError, RuntimeError)) and not hasattr(
            error, "format_message"
        ):
            raise
        if line := one_line(error):  # empty where typer has printed its help
            print(f"fastvae: {line}", file=sys.stderr)
        status = 2
    sys.exit(status if isinstance(status, int) else 0)
