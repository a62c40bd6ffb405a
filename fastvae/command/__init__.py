"""The command `fastvae`, apart from the package: its import takes a second and may be stopped."""

import os
import signal
import sys


def end_at_once() -> None:
    """Let Ctrl-C end the process without a word, with status 130, unless it is ignored.

    Native code that is being imported may abort on an exception.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # nohup may ignore it
        signal.signal(signal.SIGINT, _end)


def _end(number, frame) -> None:
    os._exit(130)


def main() -> None:
    """Run the command line; 130 without a word where Ctrl-C comes before or after it."""
    end_at_once()
    from fastvae.cli import main as run

    try:
        if signal.getsignal(signal.SIGINT) is _end:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        end_at_once()
