"""The command that writes a model as a page."""

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from fastvae.atomic_files import make_folder
from fastvae.cli.arguments import Best, Column, Field, Run, path
from fastvae.cli.inputs import check_not_read, find_reading, load_model, tell
from fastvae.page.export import PAGE_CARD, export_page, load_directions
from fastvae.text.files import byte_chunks
from fastvae.text.lines import LineCounts, encode_fitting, read_texts
from fastvae.text.reading import LINES, NORMALIZERS


def export(
    run: Run,
    page: Annotated[Path, typer.Argument(metavar="PAGE", parser=path, help="HTML file to write.")],
    show: Annotated[bool, typer.Option("--open", help="Show the page in the browser.")] = False,
    texts: Annotated[
        Path | None,
        typer.Option(
            parser=path, help="Known texts, put into the page: it tells how near a new one is."
        ),
    ] = None,
    title: Annotated[str | None, typer.Option(help="Of the page; else the folder's name.")] = None,
    prompt: Annotated[
        str, typer.Option(help="Sentence above the first text.")
    ] = "Type over either text.",
    example: Annotated[
        list[str] | None, typer.Option(help="Text that the page begins with; up to three times.")
    ] = None,
    card: Annotated[
        Path | None,
        typer.Option(
            parser=path,
            help="Text file about the model, shown under About; else card.txt beside it.",
        ),
    ] = None,
    best: Best = False,
    column: Column = None,
    field: Field = None,
) -> None:
    """One HTML file that shows the model's space of texts, offline, in any browser."""
    model, vocabulary = load_model(run, best=best, device="cpu")
    if texts is None and (column, field) != (None, None):
        raise ValueError("--column and --field are for the file that --texts names")
    if page.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"{page}: the page's name must end in .html")
    check_not_read("PAGE", page, texts, card)
    make_folder(page.parent)
    known = _read_known(run, model, vocabulary, texts, column, field) if texts else []
    if card is None and (run / PAGE_CARD).exists():
        card = run / PAGE_CARD
    written = export_page(
        model,
        vocabulary,
        page,
        title=run.resolve().name if title is None else title,
        prompt=prompt,
        card=None if card is None else _read_card(card),
        examples=example or (),
        directions=load_directions(run),
        texts=known,
    )
    inside = f", with {len(known):,} known texts" if known else ""
    print(f"{page}: {written.size / 1e6:.2f} MB{inside}")
    if model.reading and model.reading.normalization not in NORMALIZERS:
        tell(
            [
                f"the page reads texts as they are typed: it cannot call "
                f"{model.reading.normalization}, which normalized the training lines"
            ]
        )
    if show and not webbrowser.open(page.resolve().as_uri()):
        tell([f"found no browser: open {page.resolve()} in one"])


def _read_card(path: Path) -> str:
    """A text file -> its text."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 (byte {error.start:,}): convert it") from error


def _read_known(run, model, vocabulary, path, column, field) -> list[str]:
    """A file -> its texts that fit the model, each once, read as the run read its own."""
    reading = find_reading(run, model, None, None, column, field)
    if reading.kind != LINES:
        raise ValueError("--texts: this model reads windows of a stream, which are no known texts")
    counts, room = LineCounts(), model.length - (vocabulary.end_id is not None)
    normalize = NORMALIZERS[reading.normalization]
    found = {}
    for _, text in read_texts(byte_chunks(path), reading, normalize, counts, str(path)):
        if text and encode_fitting(vocabulary, text, room, counts, str(path)) is not None:
            found[text.decode("utf-8", "replace").replace("\n", " ")] = None
    if not found:
        raise ValueError(f"--texts {path} holds no text that fits the model")
    return list(found)
