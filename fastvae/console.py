"""What reaches a terminal: escaped texts, tables, and errors as one line."""

import json
import math
import os
import sys
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Of bidirectional text: they change the order of what follows them on the line.
_REORDERING = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}


def escape(text: str) -> str:
    """`text` on one line and harmless, for people to read; JSON is the form for programs.

    A newline becomes ⏎; control characters, those that reorder the line, bytes that are no UTF-8
    (surrogate escapes) and characters unknown to Unicode become \\xNN or \\uNNNN. All else stays as
    it is: spaces of every kind, joiners, soft hyphens, backslashes.
    """
    return "".join(c if c.isprintable() else _escape_character(c) for c in text)


def _escape_character(c: str) -> str:
    if c == "\n":
        return "⏎"
    category = unicodedata.category(c)
    if category == "Zs" or (category == "Cf" and unicodedata.bidirectional(c) not in _REORDERING):
        return c
    code = ord(c)
    if 0xDC80 <= code <= 0xDCFF:  # what surrogateescape makes of a byte
        code -= 0xDC00
    # backslashreplace leaves what UTF-8 can encode alone, so go through ASCII.
    return f"\\x{code:02x}" if code < 256 else c.encode("ascii", "backslashreplace").decode()


def console(*, stderr: bool = False) -> Console:
    """A console that prints texts as they are: no markup, no emoji codes, no highlighting."""
    return Console(stderr=stderr, markup=False, emoji=False, highlight=False)


def progress(shown: Console | None = None) -> Progress:
    """A progress bar on standard error that vanishes when done; none where it is no terminal."""
    shown = shown or console(stderr=True)
    return Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", markup=False),
        console=shown,
        transient=True,
        disable=not shown.is_terminal,
    )


def track(values: Iterable, description: str, total: int | None = None) -> Iterable:
    """`values` one by one behind a progress bar."""
    with progress() as bar:
        yield from bar.track(values, total=total, description=description)


def print_json(value: Any) -> None:
    """`value` as one JSON document on standard output.

    A byte that is no UTF-8 comes out as Python's surrogate escape: F1 as \\udcf1. NaN and
    infinities, which JSON has no numbers for, are null.
    """
    value = _finite(value)
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        text = json.dumps(value, indent=2)
    print(text)


def _finite(value: Any) -> Any:
    """A JSON value -> the same with None for NaN and infinities."""
    if isinstance(value, dict):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_bytes(line: bytes) -> None:
    """A line on standard output, exactly these bytes."""
    sys.stdout.flush()
    sys.stdout.buffer.write(line + b"\n")
    sys.stdout.buffer.flush()


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], *, title: str = "") -> Table:
    """A rich table whose cells are plain text; numbers are right-aligned."""
    rows = [[_cell(cell) for cell in row] for row in rows]
    result = Table(title=title or None, title_justify="left", header_style="bold", box=None)
    for n, name in enumerate(columns):
        numeric = bool(rows) and all(row[n][1] for row in rows)
        result.add_column(name, justify="right" if numeric else "left", overflow="fold")
    for row in rows:
        result.add_row(*(text for text, _ in row))
    return result


def _cell(value: Any) -> tuple[Text, bool]:
    if isinstance(value, Text):
        return value, False
    if isinstance(value, float):
        return Text(f"{value:,.4g}" if abs(value) < 10 else f"{value:,.2f}"), True
    if isinstance(value, int) and not isinstance(value, bool):
        return Text(f"{value:,}"), True
    return Text(str(value)), False


def one_line(error: BaseException) -> str:
    """What went wrong, in one line for a user."""
    if hasattr(error, "format_message"):  # typer's own errors, in every version of it
        text = error.format_message()
    elif isinstance(error, OSError) and error.strerror and error.filename:
        text = f"{error.filename}: {error.strerror}"
    else:
        text = str(error).strip() or type(error).__name__
    return escape(text.split("\n")[0].strip())


def flush_output(stream: TextIO) -> OSError | None:
    """Flush a standard stream; if it cannot be written, send the rest to nowhere -> the error."""
    try:
        stream.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return error
    return None
