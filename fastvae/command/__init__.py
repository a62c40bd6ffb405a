"""The command `fastvae`, apart from the package: its import takes a second and may be stopped."""

import sys


def main() -> None:
    """Run the command line; 130 without a word where Ctrl-C comes before it has begun."""
    try:
        from fastvae.cli import main as run
    except KeyboardInterrupt:
        sys.exit(130)
    run()
