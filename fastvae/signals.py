"""Signals that ask a long piece of work to stop."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def stop_signals(patient: bool) -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM or SIGHUP sets; a second one acts as ever, unless `patient`.

    A second SIGHUP does nothing: the shell and the system each send one when a terminal closes.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can receive signals
        return

    def ask(number, frame):
        stop.set()
        if not patient:
            restore()
            if hangup in before:
                signal.signal(hangup, signal.SIG_IGN)

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    numbers = [signal.SIGINT, signal.SIGTERM]
    hangup = getattr(signal, "SIGHUP", None)
    if hangup is not None and signal.getsignal(hangup) != signal.SIG_IGN:  # nohup ignores it
        numbers.append(hangup)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield stop
    finally:
        restore()


@contextmanager
def orderly_exit() -> Iterator[None]:
    """Make SIGTERM and SIGHUP leave as `sys.exit` does, so that temporary files are removed.

    The status is 128 + the signal's number, as in a shell. A signal that is ignored stays ignored.
    """

    def leave(number, frame):
        signal.signal(number, signal.SIG_IGN)  # both often come twice
        sys.exit(128 + number)

    numbers = [signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)]
    before = {n: signal.signal(n, leave) for n in numbers if signal.getsignal(n) == signal.SIG_DFL}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
