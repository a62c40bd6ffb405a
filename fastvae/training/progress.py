"""The progress of a training run, shown on standard error."""

import io
import time
from collections.abc import Callable
from typing import Any, Self

from rich.console import Console

from fastvae.console import console as make_console
from fastvae.console import escape, progress


class TrainingDisplay:
    """A progress bar on a terminal, elsewhere a line every ten seconds; text is escaped.

    Args:
        console: where to show it; None is standard error.
        steps: steps of the run.
        kl_target: the least KL weight at which the bound is shown.
    """

    def __init__(self, console: Console | None, steps: int, kl_target: float) -> None:
        self.console = console or make_console(stderr=True)
        self.steps, self.spoken, self.kl_target = steps, time.monotonic(), kl_target
        self.bar = None
        if self.console.is_terminal:
            self.bar = progress(self.console)
            self.task = self.bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        if self.bar:
            self._show(self.bar.start)
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar:
            self._show(self.bar.stop)

    def say(self, text: str) -> None:
        """Print one line of text."""
        options = {"markup": False, "emoji": False, "highlight": False, "soft_wrap": True}
        self._show(lambda: self.console.print(escape(text), **options))

    def _show(self, write: Callable[[], object]) -> None:
        """Call `write`, which prints; if the terminal is closed, print nothing from then on."""
        try:
            write()
        except (OSError, SystemExit) as error:
            # rich exits with 1 if a pipe has no reader; another status is a signal's.
            if isinstance(error, SystemExit) and error.code != 1:
                raise
            self.bar, self.console = None, Console(file=io.StringIO())

    def update(self, step: int, record: dict[str, Any] | None) -> None:
        """Show the number of steps done and the last record.

        Args:
            step: number of steps done.
            record: the last training record, or None.
        """
        text = ""
        if record:
            text = (
                f"rec {record['reconstruction']:.2f}  {self._bound(record)}  "
                f"{record['steps_per_second']:.1f} steps/s  "
                f"{record['characters_per_second']:,.0f} characters/s"
            )
        if self.bar:
            self._show(lambda: self.bar.update(self.task, completed=step, description=text))
        elif text and (time.monotonic() - self.spoken > 10 or step == self.steps):
            self.say(f"step {step} of {self.steps}  {text}")
            self.spoken = time.monotonic()

    def _bound(self, record: dict[str, Any]) -> str:
        """The KL, and bits per character if the KL weight has reached `kl_target`."""
        if record["kl_weight"] < self.kl_target:
            return f"KL {record['kl']:,.2f} (weight {record['kl_weight']:.3g})"
        return f"KL {record['kl']:,.2f}  bpc {record['bpc']:.3f}"
