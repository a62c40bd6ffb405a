"""Commands that use a trained model: measure it, write with it, encode with it."""

import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, BinaryIO

import numpy as np
import torch
import typer
from rich.text import Text

from fastvae import metrics
from fastvae.atomic_files import make_folder, replaced
from fastvae.cli.arguments import (
    MOST,
    Batch,
    Best,
    Column,
    Data,
    Device,
    Field,
    HeldOut,
    Int8,
    Json,
    MaybeData,
    Normalize,
    Raw,
    Read,
    Run,
    Seed,
    Temperature,
    Threads,
    path,
)
from fastvae.cli.inputs import (
    LineTokens,
    check_is_file,
    check_not_read,
    encode_texts,
    find_reading,
    in_batches,
    load_model,
    open_for,
    tell,
)
from fastvae.console import console, escape, print_bytes, print_json, table, track
from fastvae.device import check_fits
from fastvae.evaluation import measure
from fastvae.names import counted
from fastvae.text import Vocabulary
from fastvae.text.reading import WINDOWS


def evaluate(
    run: Run,
    data: Data,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Only the first texts.")
    ] = None,
    nll_texts: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="Texts for the importance-weighted NLL; 0 leaves it out."
        ),
    ] = 64,
    nll_samples: Annotated[
        int, typer.Option(min=1, max=10**6, help="Its samples of z for each text.")
    ] = 64,
    mi_texts: Annotated[
        int,
        typer.Option(min=0, max=MOST, help="Texts for the mutual information; 0 leaves it out."),
    ] = 4096,
    reconstruct_texts: Annotated[
        int, typer.Option(min=0, max=MOST, help="Texts to reconstruct greedily; 0 leaves it out.")
    ] = 1000,
    int8_texts: Annotated[
        int,
        typer.Option(
            min=0, max=MOST, help="Texts for what --int8 costs elsewhere; 0 leaves it out."
        ),
    ] = 0,
    batch_size: Batch = 64,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = None,
    best: Best = False,
    read: Read = None,
    normalize: Normalize = None,
    column: Column = None,
    field: Field = None,
    held_out: HeldOut = False,
    as_json: Json = False,
) -> None:
    """Reconstruction, KL, bound, bits per character and more on a file, in nats per text."""
    model, vocabulary = load_model(run, best=best, device=device)
    reading = find_reading(run, model, read, normalize, column, field, held_out)
    corpus = open_for(model, vocabulary, reading, data)
    tell(corpus.notes())
    count = min(len(corpus), limit or len(corpus))
    result = measure(
        model,
        corpus,
        limit=count,
        nll_texts=nll_texts,
        nll_samples=nll_samples,
        mi_texts=mi_texts,
        reconstruct_texts=reconstruct_texts,
        batch_size=batch_size,
        seed=seed,
        track=track,
    )
    if int8_texts:
        n = min(int8_texts, count)
        parts = track(corpus.batches(batch_size, n), "int8 weights", -(-n // batch_size))
        result |= {f"int8_{k}": v for k, v in metrics.int8_loss(model, parts, seed=seed).items()}
    if reconstruct_texts and "exact_reconstruction" not in result:
        tell(["exact reconstruction needs 2 texts or more, for its shuffled control: left out"])
    if as_json:
        print_json({**result, "text": {**reading.to_dict(), **corpus.counts()}})
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
        note = f"nats, from {counted(result['mutual_information_texts'], 'text')}"
        rows.append(("mutual information of x and z", result["mutual_information"], note))
    if "importance_weighted_nll" in result:
        texts, samples = (result[f"importance_weighted_nll_{k}"] for k in ("texts", "samples"))
        note = f"{units}, first {counted(texts, 'text')}, {counted(samples, 'sample')} each"
        rows.append(("importance-weighted NLL", result["importance_weighted_nll"], note))
    if "exact_reconstruction" in result:
        note = f"of {result['reconstruction_texts']:,} texts, greedy, from their own latents"
        rows.append(("exact reconstruction", result["exact_reconstruction"], note))
        note = "the same from other texts' latents: what needs no latent"
        rows.append(("shuffled control", result["shuffled_reconstruction"], note))
        rows.append(("token accuracy", result["token_accuracy"], "of the same, pads left out"))
    if "int8_texts" in result:
        note = f"of the bound, first {counted(result['int8_texts'], 'text')}"
        rows.append((f"bits per {unit} lost to int8", result["int8_bpc_loss"], note))
        note = "top-1 agreement, teacher-forced"
        rows.append(("int8 token agreement", result["int8_token_agreement"], note))
        note = "token agreement, free-running from the same z"
        rows.append(("int8 greedy agreement", result["int8_greedy_agreement"], note))
    rows.append(("texts", result["samples"], ""))
    console().print(table(("measure", "value", ""), rows))
    if "exact_reconstruction" in result:
        console().print(what_latents_keep(result), soft_wrap=True)


def what_latents_keep(result: dict[str, Any]) -> str:
    """Results of `measure` -> a sentence about what the latents keep, and what to change."""
    share, shuffled = (100 * result[f"{k}_reconstruction"] for k in ("exact", "shuffled"))
    return (
        f"The latent returns {share:.1f} % of the texts exactly ({shuffled:.1f} % from shuffled "
        f"latents), for {result['kl']:.1f} nats: train with a higher --kl-nats for more, with a "
        "lower one for a lower bound."
    )


def _quantization(int8: bool) -> str | None:
    return "int8" if int8 else None


def sample(
    run: Run,
    n: Annotated[int, typer.Option("-n", "--number", min=1, max=MOST, help="How many texts.")] = 20,
    temperature: Temperature = 0.0,
    batch_size: Batch = 256,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = None,
    best: Best = False,
    int8: Int8 = False,
    raw: Raw = False,
    as_json: Json = False,
) -> None:
    """Texts from the prior, one a line."""
    show = _printer(raw, as_json)
    model, vocabulary = load_model(run, best=best, device=device)
    if as_json:
        string = 57 + 2 * model.length  # a Python string in a list, and its part of the document
        check_fits(n * string, f"the {n:,} texts of --json")
    generator = torch.Generator().manual_seed(seed)
    texts: list[str] = []
    for begin in range(0, n, batch_size):
        count = min(batch_size, n - begin)
        tokens = model.sample(
            count, temperature=temperature, generator=generator, quantization=_quantization(int8)
        )
        for row in tokens.tolist():
            text = show("", row, vocabulary)
            if as_json:
                texts.append(text)
    if as_json:
        print_json(texts)


def reconstruct(
    run: Run,
    data: MaybeData = None,
    n: Annotated[
        int | None,
        typer.Option(
            "-n", "--number", min=1, max=MOST, help="Texts; else 10 of --data, or all typed ones."
        ),
    ] = None,
    temperature: Temperature = 0.0,
    batch_size: Batch = 256,
    seed: Seed = 0,
    device: Device = None,
    threads: Threads = None,
    best: Best = False,
    int8: Int8 = False,
    read: Read = None,
    normalize: Normalize = None,
    column: Column = None,
    field: Field = None,
    held_out: HeldOut = False,
    raw: Raw = False,
    as_json: Json = False,
) -> None:
    """Texts beside what the decoder makes of their posterior means.

    A model of windows of L characters reads the first L of each line of standard input. Empty lines
    are left out, and lines of --data that are too long; on standard input these are an error.
    """
    show = _printer(raw, as_json)
    model, vocabulary = load_model(run, best=best, device=device)
    check_is_file(data, column, field, held_out)
    reading = find_reading(run, model, read, normalize, column, field, held_out)
    generator = torch.Generator().manual_seed(seed)
    if n is None and data is not None:
        n = 10
    if data is not None and reading.kind == WINDOWS:
        corpus = open_for(model, vocabulary, reading, data)
        rows, lines = (
            ((None, row) for x in corpus.batches(batch_size, n) for row in x.numpy()),
            None,
        )
    else:
        lines = LineTokens(vocabulary, model.length, reading, data, strict=data is None)
        rows = islice(lines, n)
    found, count = [], 0
    for batch in in_batches(rows, batch_size):
        tokens = torch.from_numpy(np.stack([row for _, row in batch]))
        mean = model.encode(tokens)
        out = model.generate(
            mean, temperature=temperature, generator=generator, quantization=_quantization(int8)
        )
        for (number, original), copy in zip(batch, out.tolist(), strict=True):
            line = {} if number is None else {"line": number}
            text = show("in  ", original.tolist(), vocabulary)
            made = {**line, "text": text, "reconstruction": show("out ", copy, vocabulary)}
            if as_json:
                found.append(made)
        count += len(batch)
    if lines:
        if not count:
            raise ValueError(f"{lines.notes()[0]}: no text is left")
        tell(lines.notes())
    if as_json:
        print_json(found)


def _printer(raw: bool, as_json: bool) -> Callable[..., str]:
    """A function that decodes tokens and prints them at once, unless JSON is to come."""
    if raw and as_json:
        raise ValueError("--raw and --json exclude each other")

    def show(label: str, row: list[int], vocabulary: Vocabulary, style: str = "") -> str:
        exact = vocabulary.decode_bytes(row)
        text = exact.decode("utf-8", "surrogateescape")
        if raw:
            print_bytes(label.encode() + exact)
        elif style and not as_json:
            console().print(Text(label + escape(text), style=style), soft_wrap=True)
        elif not as_json:
            print(label + escape(text))
        return text

    return show


def interpolate(
    run: Run,
    a: Annotated[str, typer.Argument(metavar="A", help="Text at one end.")],
    b: Annotated[str, typer.Argument(metavar="B", help="Text at the other end.")],
    steps: Annotated[int, typer.Option(min=2, max=MOST, help="Texts, the ends included.")] = 7,
    device: Device = None,
    threads: Threads = None,
    best: Best = False,
    int8: Int8 = False,
    read: Read = None,
    normalize: Normalize = None,
    raw: Raw = False,
    as_json: Json = False,
) -> None:
    """Texts on the line between the posterior means of two texts."""
    show = _printer(raw, as_json)
    model, vocabulary = load_model(run, best=best, device=device)
    reading = find_reading(run, model, read, normalize)
    ends = model.encode(encode_texts(model, vocabulary, reading, {"A": a, "B": b}))
    rows = model.interpolate(*ends, steps, quantization=_quantization(int8)).tolist()
    styles = ["bold", *[""] * (steps - 2), "bold"]
    texts = [show("", row, vocabulary, style) for row, style in zip(rows, styles, strict=True)]
    if as_json:
        print_json(texts)


def encode(
    run: Run,
    out: Annotated[
        Path, typer.Option("--out", parser=path, help="File to write: .npy, float32 [N, Z].")
    ],
    data: MaybeData = None,
    limit: Annotated[
        int | None, typer.Option(min=1, max=MOST, help="Only the first texts.")
    ] = None,
    batch_size: Batch = 256,
    device: Device = None,
    threads: Threads = None,
    best: Best = False,
    read: Read = None,
    normalize: Normalize = None,
    column: Column = None,
    field: Field = None,
    held_out: HeldOut = False,
) -> None:
    """Posterior means of texts as a NumPy file.

    Lines have a row each, in order: NaN for one that is too long. A file that a model of windows
    reads has a row for each window; of a line of standard input such a model reads the first L.
    """
    if out.suffix != ".npy":
        raise ValueError(f"--out {out}: the file's name must end in .npy")
    if out.is_dir():
        raise ValueError(f"--out {out} is a folder: name a file")
    check_not_read("--out", out, data)
    model, vocabulary = load_model(run, best=best, device=device)
    check_is_file(data, column, field, held_out)
    reading = find_reading(run, model, read, normalize, column, field, held_out)
    total = lines = None
    if data is not None and reading.kind == WINDOWS:
        corpus = open_for(model, vocabulary, reading, data)
        total = min(len(corpus), limit or len(corpus))
        rows = (row for tokens in corpus.batches(batch_size, limit) for row in tokens.numpy())
    else:
        lines = LineTokens(vocabulary, model.length, reading, data, every_line=True)
        rows = (row for _, row in islice(lines, limit))
    make_folder(out.parent)
    # Of its own, and no longer than a name may be.
    partial = out.with_name(f"{os.getpid()}-{out.name[-32:]}.partial")
    count = 0
    # Written as a stream: the latents of a large file need no memory of its size.
    with replaced(out, partial) as file:
        _write_header(file, count, model.latent_size)
        batches = in_batches(rows, batch_size)
        steps = None if total is None else -(-total // batch_size)
        for batch in track(batches, "encoding", steps):
            latents = np.full((len(batch), model.latent_size), np.nan, "<f4")
            fits = [n for n, row in enumerate(batch) if row is not None]
            if fits:
                tokens = torch.from_numpy(np.stack([batch[n] for n in fits]))
                latents[fits] = model.encode(tokens).float().cpu().numpy()
            file.write(latents.tobytes())
            count += len(batch)
        file.seek(0)
        _write_header(file, count, model.latent_size)
    tell(lines.notes() if lines else corpus.notes())
    tell([f"{out}: {count:,} texts, {model.latent_size} dimensions"])


def _write_header(file: BinaryIO, rows: int, columns: int) -> None:
    """Of a .npy file; numpy pads it to the same size for every number of rows."""
    header = {"descr": "<f4", "fortran_order": False, "shape": (rows, columns)}
    np.lib.format.write_array_header_1_0(file, header)
