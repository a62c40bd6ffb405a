"""The command line: each command reads, calls the library, and prints."""

import errno
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Annotated

import typer

import fastvae
from fastvae.allocator import keep_freed_memory
from fastvae.cli.arguments import Json
from fastvae.cli.models import encode, evaluate, interpolate, reconstruct, sample
from fastvae.cli.page import export
from fastvae.cli.training import demo, experiment, fields, plot, train
from fastvae.console import console, flush_output, one_line, print_json, table
from fastvae.info import facts
from fastvae.signals import orderly_exit

# Fields of models and of training are options too; their names may be written with underscores.
_ANY_OPTION = {"allow_extra_args": True, "ignore_unknown_options": True}
_UNDERSCORES = {"token_normalize_func": lambda name: name.replace("_", "-")}

app = typer.Typer(
    name="fastvae",
    help="Train, evaluate and sample a hybrid convolutional VAE for text.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(demo)
app.command(context_settings=_UNDERSCORES)(train)
app.command()(fields)
app.command()(plot)
for command in (evaluate, sample, reconstruct, interpolate, encode, export):
    app.command()(command)
app.command(context_settings=_ANY_OPTION)(experiment)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"fastvae {fastvae.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """Train, evaluate and sample a hybrid convolutional VAE for text."""


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


# Errors of printing, because what writes files names them.
_OF_OUTPUT = {errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0, or 2 with one line on standard error, 130 on Ctrl-C.

    130 is also the status where a signal stopped a run that was then saved. Other signals exit with
    128 + their number, and where nobody reads the output it is 1.
    """
    # What is printed where a stream was closed before the start goes nowhere, and into no file that
    # would be opened under its number.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  open to the end
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    # Generated text holds any character; a terminal that lacks one must not end the program.
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    keep_freed_memory()
    line, failure = "", None
    try:
        with orderly_exit():
            status = app(arguments, prog_name="fastvae", standalone_mode=False)
    except KeyboardInterrupt:
        status = 130
    except Exception as error:
        # typer's errors differ between its versions in all but this method.
        if not isinstance(error, (ValueError, OSError, RuntimeError)) and not hasattr(
            error, "format_message"
        ):
            raise
        line, status = one_line(error), 2  # empty where typer has printed its help
        if isinstance(error, OSError) and error.errno in _OF_OUTPUT and error.filename is None:
            failure = error
    if failure := flush_output(sys.stdout) or failure:
        reader_left = isinstance(failure, BrokenPipeError)
        line = "" if reader_left else f"cannot write standard output: {failure.strerror}"
        status = 1 if reader_left else 2
    if line:
        with suppress(OSError):
            print(f"fastvae: {line}", file=sys.stderr)
    flush_output(sys.stderr)
    sys.exit(status if isinstance(status, int) else 0)
