"""The command `fastvae`, apart from the package: its import takes a second and may be stopped."""

import os
import signal
import sys


def main() -> None:
    """Run the command line; 130 without a word where Ctrl-C comes before it has begun."""
    # Native code that is being imported may abort on an exception, so end at once instead.
    raises = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # nohup may ignore it
    if raises:
        signal.signal(signal.SIGINT, lambda number, frame: os._exit(130))
    from fastvae.cli import main as run

    try:
        if raises:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
    except KeyboardInterrupt:
        sys.exit(130)
