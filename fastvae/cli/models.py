"""Commands that use a trained model: measure it, write with it, encode with it."""

from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from rich.text import Text

from fastvae import metrics
from fastvae.cli.arguments import (
    Batch,
    Best,
    Data,
    Device,
    Int8,
    Json,
    MaybeData,
    Run,
    Seed,
    Temperature,
)
from fastvae.evaluation import measure
from fastvae.inputs import encode_texts, load_model, open_for, posterior, token_batches
from fastvae.terminal import console, escape, print_json, table, track


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
