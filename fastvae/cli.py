"""The command line. torch-heavy modules load inside the commands, so that help comes at once."""

import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from fastvae.terminal import (
    console,
    escape,
    hush,
    one_line,
    print_json,
    table,
    track,
)

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
    from fastvae.demo import demo as show

    if out is None:
        free = (Path(f"fastvae-demo-{n}" if n > 1 else "fastvae-demo") for n in itertools.count(1))
        out = next(path for path in free if not path.exists())
    show(out, steps=steps, seed=seed, device=_device(device), console=console())


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
    import torch

    from fastvae import training
    from fastvae.presets import build_model, configure, open_corpus

    chosen = configure(preset, _options(context.args))
    config = training.TrainingConfig(**chosen.training)
    corpus = open_corpus(data, chosen.length, text=chosen.text, cache=out / "cache")
    vocabulary = corpus.vocabulary
    validation = valid and open_corpus(
        valid, chosen.length, vocabulary, text=chosen.text, cache=out / "cache"
    )
    torch.manual_seed(config.seed)
    model = build_model(chosen, vocabulary).to(_device(device))
    result = training.train(
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
    batch_size: Batch = 64,
    seed: Seed = 0,
    device: Device = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Reconstruction, KL, bound, bits per character and more on a file, in nats per text."""
    import torch

    from fastvae import metrics

    model, vocabulary = _load(run, best, device)
    corpus = _open(data, vocabulary, model.length)
    count = min(len(corpus), limit or len(corpus))
    batches = track(corpus.batches(batch_size, count), "bound", -(-count // batch_size))
    result = metrics.evaluate(model, batches, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    if mi_texts:
        n = min(mi_texts, count)
        mean, logvar = _posteriors(model, corpus.batches(batch_size, n))
        result["mutual_information"] = metrics.mutual_information(mean, logvar, generator=generator)
        result["mutual_information_texts"] = n
    if nll_texts:
        n = min(nll_texts, count)
        parts = track(corpus.batches(8, n), "importance-weighted NLL", -(-n // 8))
        nll = torch.cat(
            [metrics.importance_weighted_nll(model, x, nll_samples, generator) for x in parts]
        )
        result["importance_weighted_nll"] = nll.mean().item()
        result["importance_weighted_nll_texts"] = n
        result["importance_weighted_nll_samples"] = nll_samples
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
    rows.append(("texts", result["samples"], ""))
    console().print(table(("measure", "value", ""), rows))


@app.command()
def sample(
    run: Run,
    n: Annotated[int, typer.Option("-n", "--number", min=1, help="How many texts.")] = 20,
    temperature: Temperature = 0.0,
    batch_size: Batch = 256,
    seed: Seed = 0,
    device: Device = None,
    best: Best = False,
    as_json: Json = False,
) -> None:
    """Texts from the prior, one a line."""
    import torch

    model, vocabulary = _load(run, best, device)
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    while len(texts) < n:
        count = min(batch_size, n - len(texts))
        tokens = model.sample(count, temperature=temperature, generator=generator)
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
    as_json: Json = False,
) -> None:
    """Texts beside what the decoder makes of their posterior means."""
    import torch

    model, vocabulary = _load(run, best, device)
    generator = torch.Generator().manual_seed(seed)
    pairs = []
    for tokens in _batches(data, n, model, vocabulary, batch_size)[1]:
        z = _posteriors(model, [tokens])[0].to(next(model.parameters()))
        out = model.generate(z, temperature=temperature, generator=generator)
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
    as_json: Json = False,
) -> None:
    """Texts on the line between the posterior means of two texts."""
    import torch

    model, vocabulary = _load(run, best, device)
    tokens = torch.tensor([_encode(text, vocabulary, model.length) for text in (a, b)])
    ends = _posteriors(model, [tokens])[0].to(next(model.parameters()))
    texts = [vocabulary.decode(row) for row in model.interpolate(*ends, steps).tolist()]
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
    import numpy as np

    if out.suffix != ".npy":
        raise ValueError(f"--out {out}: the file's name must end in .npy")
    model, vocabulary = _load(run, best, device)
    count, batches = _batches(data, limit, model, vocabulary, batch_size)
    shape = count, model.latent_size
    partial = out.with_name(out.name + ".partial")
    try:
        # Written as a stream: the latents of a large file need no memory of its size.
        with open(partial, "wb") as file:
            header = {"descr": "<f4", "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for tokens in track(batches, "encoding", -(-count // batch_size)):
                mean, _ = _posteriors(model, [tokens])
                file.write(mean.numpy().astype("<f4").tobytes())
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    console(stderr=True).print(f"{out}: {shape[0]:,} texts, {shape[1]} dimensions")


@app.command()
def info(as_json: Json = False) -> None:
    """Version, build, machine, and what serves each op here."""
    from fastvae.info import facts

    found = facts()
    if as_json:
        print_json(found)
        return
    out = console()
    ops = found.pop("ops")
    out.print(table(("", ""), found.items()))
    rows = [(name, served["cpu"], served["cuda"]) for name, served in ops.items()]
    out.print(table(("op", "CPU", "CUDA"), rows))


def _load(run: Path, best: bool, device: str | None):
    """Model in eval mode on its device, and its vocabulary."""
    from fastvae.checkpoint import load

    model, vocabulary = load(run, best=best)
    if vocabulary is None:
        raise ValueError(f"{run} holds no vocabulary.json, so its symbols cannot be read")
    return model.to(_device(device)), vocabulary


def _device(name: str | None):
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        raise ValueError(f"device {name} cannot be used here: {one_line(error)}") from error
    return device


def _open(path: Path, vocabulary, length: int):
    """A file as the model's training text was read."""
    from fastvae.presets import CHARACTERS, TWEETS, open_corpus

    text = CHARACTERS if vocabulary.end_id is None else TWEETS
    return open_corpus(path, length, vocabulary, text=text)


def _batches(
    data: Path | None, limit: int | None, model, vocabulary, batch_size: int
) -> tuple[int, Iterator[Any]]:
    """How many texts a file or standard input has, and their tokens [<= batch_size, L]."""
    import torch

    if data is not None:
        corpus = _open(data, vocabulary, model.length)
        return min(len(corpus), limit or len(corpus)), corpus.batches(batch_size, limit)
    texts = _read_texts()[:limit]
    tokens = torch.tensor([_encode(text, vocabulary, model.length) for text in texts])
    return len(texts), iter(tokens.split(batch_size))


def _read_texts() -> list[str]:
    """Standard input's lines that are not empty."""
    if sys.stdin.isatty():
        console(stderr=True).print("Type texts, one a line, then Ctrl-D.")
    text = sys.stdin.buffer.read().decode("utf-8", "surrogateescape")
    texts = [line for line in text.split("\n") if line]
    if not texts:
        raise ValueError("standard input holds no text: pipe one in, or name a file with --data")
    return texts


def _encode(text: str, vocabulary, length: int) -> list[int]:
    """A text as the model read its own: tweets normalised, a window no longer than L."""
    from fastvae.text import normalise_tweet

    text = normalise_tweet(text) if vocabulary.end_id is not None else text[:length]
    return vocabulary.encode_sample(text, length)


def _posteriors(model, batches):
    """Batches of tokens -> posterior means and log-variances [N, Z], float32 on the CPU."""
    import torch

    device = next(model.parameters()).device
    with torch.no_grad():
        parts = [model.posterior(tokens.to(device)) for tokens in batches]
    return tuple(torch.cat([p[k] for p in parts]).float().cpu() for k in (0, 1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 with one line on standard error, 130 on Ctrl-C."""
    # Generated text holds any character; a terminal that lacks one must not end the program.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
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
