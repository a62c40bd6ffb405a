"""`fastvae demo`: a small hybrid VAE learns a toy language whose entropy is known, in a minute."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor, nn

from fastvae import reference
from fastvae.cli.inputs import tell
from fastvae.console import escape, progress, table
from fastvae.models.hybrid import HybridVAE
from fastvae.plots import learning_curves, read_metrics
from fastvae.text import SyntheticCorpus
from fastvae.training import TrainingConfig, train
from fastvae.training.run_directory import CURVES

LENGTH, ROWS, SHOWN = 48, 12, 6
MODEL = {
    "latent_size": 32,
    "encoder_channels": (64, 128),
    "feature_channels": 64,
    "hidden_size": 128,
    "aux_weight": 0.2,
}


def demo(
    folder: Path, *, steps: int, seed: int, device: torch.device, console: Console
) -> dict[str, float] | None:
    """Train, show and measure; the run and its plot go to `folder` -> bound, entropy, speed-ups.

    None where a signal stopped the training. Raises ValueError where the folder is not empty.
    """
    if folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} is not empty: name another folder with --out")
    corpus = SyntheticCorpus(LENGTH)
    torch.manual_seed(seed)
    model = HybridVAE(corpus.vocabulary.size, LENGTH, pad_id=corpus.vocabulary.pad_id, **MODEL)
    model.to(device)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"
    parameters = sum(p.numel() for p in model.parameters())
    console.print(
        f"A hybrid VAE of {parameters:,} parameters learns a toy language on {where}.\n"
        f"Its grammar gives the entropy of a line exactly: {corpus.entropy:.2f} nats. "
        "On fresh lines the\nbound (reconstruction + KL) comes down towards it, and no model's "
        "can pass it.\n"
    )
    result = _train(model, corpus, folder, steps, seed, console)
    if result["interrupted"]:
        tell([f"stopped and saved at step {result['step']}: try fastvae sample {folder}"])
        return None
    model.eval()
    _show_samples(model, corpus, seed, console)
    _show_reconstructions(model, corpus, seed, console)
    _show_interpolation(model, corpus, seed, console)
    speed = _show_speed(model, corpus, seed, console)
    title = "fastvae demo: the bound nears the entropy of the corpus"
    metrics = read_metrics(folder / "metrics.jsonl")
    learning_curves(metrics, folder / CURVES, entropy=corpus.entropy, title=title)
    console.print(
        f"Written to {folder}: the model, metrics.jsonl, {CURVES}. Try:\n"
        f"  fastvae sample {folder} -n 5 -t 1\n"
        f'  fastvae interpolate {folder} "the king rode lions." "do cows eat hay?"\n'
        "  fastvae train --data your.txt --out your-run\n"
        "A packaged model of place names:\n"
        "  fastvae sample places -n 5 -t 1\n"
        '  fastvae interpolate places "Hamburg" "San Francisco"\n'
        "  fastvae export places places.html --open",
        soft_wrap=True,
    )
    return {"bound": result["valid"]["bound"], "entropy": corpus.entropy, **speed}


def _train(
    model: HybridVAE, corpus: SyntheticCorpus, folder: Path, steps: int, seed: int, console: Console
) -> dict[str, Any]:
    """Train in as many parts as the table has rows, or until a signal -> the last part's result."""
    config = TrainingConfig(
        steps=steps,
        seed=seed,
        kl_floor=0.05,
        kl_end=steps // 2,
        lr_decay=0.5,
        lr_decay_every=max(1, steps // 10),
        lr_decay_start=steps * 7 // 10,
        learning_rate=3e-3,
        log_every=max(1, steps // 100),
        eval_every=0,
        sample_every=0,
    )
    fresh = SyntheticCorpus(LENGTH, seed=seed + 1, samples=512)
    quiet, ends = Console(quiet=True), sorted({steps * n // ROWS or 1 for n in range(1, ROWS + 1)})
    console.print(Text("   step  reconstruction     KL  bound  above the entropy", style="bold"))
    with progress(console) as bar:
        for end in bar.track(ends, description="training"):
            part = replace(config, steps=end, eval_every=end)
            result = train(
                model, corpus, part, folder, validation=fresh, resume=end > ends[0], console=quiet
            )
            if result["interrupted"]:
                return result
            row = result["valid"]
            above = row["bound"] - corpus.entropy
            terms = f"{end:7,}   {row['reconstruction']:13.2f} {row['kl']:6.2f} {row['bound']:6.2f}"
            console.print(f"{terms}  {above:6.2f} {'━' * min(30, max(1, round(above / 3)))}")
    console.print()
    return result


def _show_samples(model: HybridVAE, corpus: SyntheticCorpus, seed: int, console: Console) -> None:
    generator = torch.Generator().manual_seed(seed)
    texts = corpus.vocabulary.batch_decode(model.sample(200, generator=generator))
    right = sum(corpus.describe(text) is not None for text in texts)
    console.print(Text("Samples from the prior, greedy", style="bold"))
    for text in texts[:SHOWN]:
        mark = "✓" if corpus.describe(text) else " "
        console.print(f"  {mark} {escape(text)}")
    console.print(f"  ✓ a line of the grammar: {right} of {len(texts)}\n")


def _show_reconstructions(
    model: HybridVAE, corpus: SyntheticCorpus, seed: int, console: Console
) -> None:
    tokens = corpus.batch(200, torch.Generator().manual_seed(seed + 2))
    copied = model.generate(model.encode(tokens))
    texts, copies = map(corpus.vocabulary.batch_decode, (tokens, copied))
    console.print(Text("Fresh lines, and below each its reconstruction from z", style="bold"))
    for text, copy in list(zip(texts, copies, strict=True))[:SHOWN]:
        console.print(f"    {escape(text)}")
        shown, words = Text("  →"), text.split(" ")
        for n, word in enumerate(copy.split(" ")):
            shown.append(" ").append(
                escape(word), style="" if words[n : n + 1] == [word] else "red"
            )
        console.print(shown)
    found = [
        (corpus.describe(a), corpus.describe(b) or {}) for a, b in zip(texts, copies, strict=True)
    ]
    kept = {name: sum(a[name] == b.get(name) for a, b in found) for name in corpus.factors}
    shares = ", ".join(f"{name} {100 * n / len(found):.0f} %" for name, n in kept.items())
    console.print(f"  kept in {len(found)} of them: {shares}\n")


def _show_interpolation(
    model: HybridVAE, corpus: SyntheticCorpus, seed: int, console: Console
) -> None:
    ends = model.encode(corpus.batch(2, torch.Generator().manual_seed(seed + 3)))
    console.print(Text("From one line to another in seven points of z", style="bold"))
    for n, text in enumerate(corpus.vocabulary.batch_decode(model.interpolate(*ends, 7))):
        console.print(Text(f"    {escape(text)}", style="bold" if n in (0, 6) else ""))
    console.print("")


def _show_speed(
    model: HybridVAE, corpus: SyntheticCorpus, seed: int, console: Console
) -> dict[str, float]:
    """Medians of a training step and of greedy decoding, against plain PyTorch's."""
    device = next(model.parameters()).device
    reference_model = reference.HybridVAE(**model.config).to(device)
    reference_model.load_state_dict(model.state_dict())
    tokens = corpus.batch(64, torch.Generator().manual_seed(seed)).to(device)
    z = torch.randn(64, model.latent_size, device=device)
    rows, ratios = [], {}
    jobs = {
        "training step of 64 lines": (_step(model, tokens), _step(reference_model, tokens)),
        "greedy decoding of 64 lines": (
            lambda: model.generate(z),
            lambda: reference_model.generate(z),
        ),
    }
    for name, (ours, plain) in jobs.items():
        fast, slow = _medians(ours, plain, device)
        rows.append((name, f"{1e3 * fast:.1f} ms", f"{1e3 * slow:.1f} ms", f"{slow / fast:.1f}x"))
        ratios[name] = slow / fast
    threads = "" if device.type == "cuda" else f", threads: {torch.get_num_threads()}"
    title = f"Speed: fastvae and plain PyTorch with the same weights{threads}"
    console.print(Text(title, style="bold"))
    console.print(table(("", "fastvae", "PyTorch", "faster"), rows))
    console.print("")
    return ratios


def _step(model: nn.Module, tokens: Tensor) -> Callable[[], None]:
    optimizer = torch.optim.Adam(model.parameters(), 0.0)

    def step() -> None:
        model.train()
        model(tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _medians(ours: Callable, plain: Callable, device: torch.device) -> tuple[float, float]:
    """Median seconds of each, taken in turns so that other load meets both."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(8):
        for function, found in zip((ours, plain), times, strict=True):
            begin = time.perf_counter()
            function()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first warms up
                found.append(time.perf_counter() - begin)
    return median(times[0]), median(times[1])
