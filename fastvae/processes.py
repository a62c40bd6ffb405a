"""Several processes and their signals: joining the group torchrun started, stopping together."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn

from fastvae.nn import set_process_group


@contextmanager
def joined(model: nn.Module) -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes, joined where torchrun started them; None for one process."""
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield None
        return
    if next(model.parameters()).device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        model.to(device)
    ours = not dist.is_initialized()
    if ours:
        # The others wait while the first process evaluates.
        dist.init_process_group(timeout=timedelta(hours=1))
    set_process_group(model, dist.group.WORLD)
    try:
        yield dist.group.WORLD
    finally:
        set_process_group(model, None)
        if ours:
            dist.destroy_process_group()


@contextmanager
def stop_signals(patient: bool) -> Iterator[threading.Event]:
    """An event that SIGINT or SIGTERM sets; a second one acts as ever, unless `patient`."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # only the main thread can receive signals
        return

    def ask(number, frame):
        stop.set()
        if not patient:
            restore()

    def restore():
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        restore()


def wire(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where small tensors travel from: the CPU, unless the group has no backend for it."""
    return torch.device("cpu") if "gloo" in str(dist.get_backend_config(group)) else device
