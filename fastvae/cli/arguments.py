"""Arguments that several commands share."""

from pathlib import Path
from typing import Annotated

import torch
import typer

from fastvae.models.pretrained import find_folder


def use_threads(count: int | None) -> int | None:
    """Sets how many threads every op of this process runs on."""
    if count is not None:
        torch.set_num_threads(count)
    return count


def path(name: str) -> Path:
    """A name on the command line as a path; BadParameter for an empty one, which would be "."."""
    if not str(name):
        raise typer.BadParameter("the name is empty: give a file or folder")
    return Path(name)


def check_seed(seed: int) -> int:
    """The seed, if torch takes it."""
    if not -(2**63) <= seed < 2**63:
        raise typer.BadParameter(f"a seed has 64 bits at most, got {seed}")
    return seed


MOST = 10**9  # texts

Run = Annotated[
    Path,
    typer.Argument(
        parser=path,
        help="Folder of a trained run or a saved model; places is a packaged model.",
        callback=find_folder,
    ),
]
Data = Annotated[
    Path,
    typer.Option("--data", parser=path, help="Text file in UTF-8 (gzip too); - is standard input."),
]
MaybeData = Annotated[
    Path | None,
    typer.Option("--data", parser=path, help="Text file (gzip too); else texts on standard input."),
]
Column = Annotated[
    str | None,
    typer.Option(
        metavar="N",
        help="Column of a table (tabs, commas or semicolons) that holds the texts: its number from "
        "1 on, or its name in the first line. 0 is the whole line.",
    ),
]
Field = Annotated[
    str | None, typer.Option(metavar="NAME", help="Field of JSON lines that holds the texts.")
]
HeldOut = Annotated[
    bool,
    typer.Option("--held-out", help="Only the texts of the file that train held out."),
]
Read = Annotated[
    str | None,
    typer.Option(help="windows or lines: how to read the text, if not as the run recorded."),
]
Normalize = Annotated[
    str | None,
    typer.Option(
        help="tweets (links become url, @handles @userid) or none: what lines go through first, "
        "if not what the run recorded or the preset has.",
    ),
]
Raw = Annotated[
    bool, typer.Option("--raw", help="Print the exact bytes of texts, nothing escaped.")
]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, max=1024, help="CPU threads.", callback=use_threads),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Seed = Annotated[
    int,
    typer.Option("--seed", help="Seed of everything drawn at random.", callback=check_seed),
]
Device = Annotated[str | None, typer.Option("--device", help="cpu, cuda, cuda:1 ...")]
Best = Annotated[bool, typer.Option("--best", help="Best weights instead of the last ones.")]
Batch = Annotated[int, typer.Option("--batch-size", min=1, max=MOST, help="Texts at a time.")]
Temperature = Annotated[float, typer.Option("--temperature", "-t", min=0.0, help="0 is greedy.")]
Int8 = Annotated[bool, typer.Option("--int8", help="Round the decoder's weights to 8 bits.")]
