"""Exports a model with its vocabulary as a page: one HTML file that decodes and encodes offline."""

import base64
import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae.atomic_files import open_tensors, read_tensors, write_bytes
from fastvae.models.text_vae import TextVAE
from fastvae.page.document import document
from fastvae.page.pattern import to_javascript
from fastvae.page.weights import pack, quantize, rounded
from fastvae.text import ByteVocabulary, CharVocabulary, TokenVocabulary, Vocabulary
from fastvae.text.reading import LINES, WINDOWS
from fastvae.text.vocabulary import SURROGATES

# Of a saved model, if it has directions with names, and paragraphs about it.
MOST_EXAMPLES = 3
DIRECTIONS, PAGE_CARD = "directions.safetensors", "card.txt"
EXAMPLES = 3  # the two ends of a path, and the third corner of the map
CANDIDATES = 128  # texts among which examples are looked for
CARD = """\
A variational autoencoder for text: every text has a place in a space of {latent} dimensions, \
and every place has a text. This page moves between places and shows what is there.

Everything is computed in this page. It sends nothing anywhere, and it works without a network."""


@dataclass(frozen=True)
class Page:
    """A page that was written; a notebook shows it.

    Args:
        path: the file.
        size: its bytes.
    """

    path: Path
    size: int

    def _repr_html_(self) -> str:
        source = html.escape(str(self.path), quote=True)
        return f'<iframe src="{source}" width="100%" height="760" style="border:0"></iframe>'


def export_page(
    model: TextVAE,
    vocabulary: Vocabulary,
    path: str | Path,
    *,
    title: str = "A space of texts",
    prompt: str = "Type over either text.",
    card: str | None = None,
    examples: Sequence[str] = (),
    directions: Mapping[str, Tensor] | None = None,
    texts: Iterable[str] = (),
) -> Page:
    """Write a model as one HTML file, which needs no server and no network -> the page.

    Weights are rounded to 8 bits; docs/page.md says what that costs.

    Args:
        model: a `HybridVAE` or `LSTMVAE`. Its `reading` says whether texts are lines, and which
            normalization the page applies to them: that of tweets, but no function of Python.
        vocabulary: the vocabulary of its ids.
        path: the file to write; an existing one is replaced.
        title: of the page.
        prompt: the sentence above the first text.
        card: paragraphs about the model, its data and their license, separated by empty lines; None
            is a general one.
        examples: up to three texts that the page begins with; others are taken from `texts` or
            sampled.
        directions: names and latent vectors [Z] that a person can add to a text's.
        texts: known texts, with which the page compares what it decodes. They become part of it.

    Returns:
        the path and the size of the file; a notebook shows the page.

    Raises:
        ValueError: the vocabulary has another size than the model, a direction another size than
            its latent vectors or a value that is not finite, there are more than three examples or
            one holds nothing that the model reads, a text has half of a surrogate pair, or a
            tokens' pattern cannot be written in JavaScript.
        OSError: the file cannot be written.
    """
    if len(examples) > MOST_EXAMPLES:
        raise ValueError(f"a page begins with {MOST_EXAMPLES} texts, got {len(examples)} examples")
    if vocabulary.size != model.vocab_size:
        raise ValueError(
            f"the vocabulary has {vocabulary.size} tokens, the model {model.vocab_size}: they do "
            "not belong together"
        )
    path, known = Path(path), list(dict.fromkeys(texts))
    shown = {"title": [title], "prompt": [prompt], "card": [card or ""]}
    shown |= {"examples": examples, "directions": directions or {}, "texts": known}
    for name, values in shown.items():
        for value in values:
            if SURROGATES.search(value):
                raise ValueError(f"{name}: {value!r} is not Unicode: it has half of a character")
    exact = rounded(model)
    lines = _reads_lines(model)
    room = model.length - (lines and model.end_id is not None)
    manifest = {
        "vocabulary": _describe(vocabulary),
        "unit": vocabulary.unit,
        "length": model.length,
        "latent": model.latent_size,
        "pad": model.pad_id if model.pad_id is not None else vocabulary.pad_id,
        "end": model.end_id,
        "lines": lines,
        "normalization": model.reading.normalization if model.reading else "none",
        "work": _multiplications(exact),
        "prompt": prompt,
        "examples": _find_examples(exact, vocabulary, list(examples), known, room),
        "directions": _directions(directions or {}, model.latent_size),
        "card": CARD.format(latent=model.latent_size) if card is None else card,
        "facts": _facts(model, vocabulary, room, known),
        "known": bool(known),
    }
    content = document(title, manifest, pack(model), known)
    write_bytes(path, content)
    return Page(path, len(content))


def load_directions(folder: Path) -> dict[str, Tensor]:
    """Folder of a saved model -> its directions by name, the longest first; none without the file.

    Raises:
        ValueError: the file is damaged.
    """
    path = folder / DIRECTIONS
    if not path.exists():
        return {}
    with open_tensors(path) as file:
        tensors, _ = read_tensors(path, file)
    return dict(sorted(tensors.items(), key=lambda item: -item[1].double().norm().item()))


def _reads_lines(model: TextVAE) -> bool:
    """Whether a text is a line with an end, not a window of a stream."""
    if model.reading is None or model.reading.kind not in (LINES, WINDOWS):
        return model.end_id is not None
    return model.reading.kind == LINES


def _describe(vocabulary: Vocabulary) -> dict[str, Any]:
    """A vocabulary as the page reads it."""
    if isinstance(vocabulary, CharVocabulary):
        return {"kind": "character", "characters": vocabulary.characters}
    if isinstance(vocabulary, TokenVocabulary):
        pattern, tokens = to_javascript(vocabulary.pattern), list(vocabulary.tokens)
        return {"kind": "token", "tokens": tokens, "pattern": pattern}
    if isinstance(vocabulary, ByteVocabulary):
        return {"kind": "byte"}
    raise ValueError(f"the page cannot read texts with a {type(vocabulary).__name__}")


def _find_examples(
    model: TextVAE, vocabulary: Vocabulary, given: list[str], known: list[str], room: int
) -> list[str]:
    """Texts to begin with: those given, then some that come back exactly from their latents."""
    found = given[:EXAMPLES]
    for text in found:
        if not text or not any(part in text for part in _parts(vocabulary, text)):
            raise ValueError(f"the example {text!r} holds nothing that the model reads")
    if len(found) == EXAMPLES:
        return found
    generator = torch.Generator().manual_seed(0)
    candidates = known[:: max(1, len(known) // CANDIDATES)][:CANDIDATES]
    if not candidates:
        tokens = model.sample(CANDIDATES, generator=generator)
        candidates = [t for t in vocabulary.batch_decode(tokens.tolist()) if t.strip()]
    rows = []
    for text in dict.fromkeys(candidates):
        try:
            ids = vocabulary.encode(text)[:room]
        except ValueError:
            continue
        pads = [vocabulary.pad_id] * (model.length - len(ids))
        if room < model.length:
            pads[0] = model.end_id
        rows.append((text, ids + pads))
    if rows:
        tokens = torch.tensor([ids for _, ids in rows])
        same = (model.generate(model.encode(tokens)) == tokens).float().mean(1)
        order = sorted(range(len(rows)), key=lambda n: (-same[n], abs(len(rows[n][0]) - 10)))
        found += [rows[n][0] for n in order if rows[n][0] not in found]
    return (found + ["a"] * EXAMPLES)[:EXAMPLES]


def _parts(vocabulary: Vocabulary, text: str) -> Iterable[str]:
    """What of a text may be tokens."""
    if isinstance(vocabulary, CharVocabulary):
        return vocabulary.characters
    return vocabulary.tokens if isinstance(vocabulary, TokenVocabulary) else [text]


def _directions(directions: Mapping[str, Tensor], size: int) -> list[list[Any]]:
    """Names and vectors -> name and base64 of int8 values each."""
    found = []
    for name, vector in directions.items():
        if vector.shape != (size,):
            raise ValueError(
                f"the direction {name!r} must have shape [{size}], got {list(vector.shape)}"
            )
        if not (vector.is_floating_point() and vector.isfinite().all()):
            raise ValueError(f"the direction {name!r} must be of finite floating-point numbers")
        q, _ = quantize(vector.float().unsqueeze(0))  # the page gives all the same length
        found.append([name, base64.b64encode(q.numpy().tobytes()).decode()])
    return found


def _multiplications(model: TextVAE) -> int:
    """About how many multiplications a text of full length takes to decode."""
    decoder = model.decoder if model.decoder is not None else model.head
    total = model.length * sum(p.numel() for p in decoder.parameters())
    deconvolution = getattr(model, "deconvolution", None)
    if deconvolution is not None:
        length = deconvolution.shape[1]
        for conv in deconvolution.convs:
            total += length * conv.weight.numel()
            length *= 2
    return total


def _facts(
    model: TextVAE, vocabulary: Vocabulary, room: int, known: list[str]
) -> list[tuple[str, str]]:
    """Names and values for the page's card."""
    import fastvae

    parameters = sum(p.numel() for p in model.parameters())
    found = [
        ("Model", f"{type(model).__name__}, {parameters / 1e6:.2g} million parameters"),
        ("Latent space", f"{model.latent_size} dimensions"),
        ("Texts", f"up to {room} {vocabulary.unit}s, of {len(vocabulary.text_ids)} different"),
    ]
    if known:
        found.append(("Known texts", f"{len(known):,}"))
    return [*found, ("Made with", f"fastvae {fastvae.__version__}")]
