"""Several processes and their signals: joining the group torchrun started, stopping together."""

import atexit
import inspect
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
    if not dist.is_initialized():
        # The others wait while the first process evaluates. Left at exit: a group that is joined
        # again under the same torchrun finds the addresses of the first one, and can hang.
        dist.init_process_group(timeout=timedelta(hours=1))
        atexit.register(_leave)
    set_process_group(model, dist.group.WORLD)
    try:
        yield dist.group.WORLD
    finally:
        set_process_group(model, None)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


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


def check_fits(size: int, what: str) -> None:
    """Raises ValueError where `size` bytes are more than this machine's memory."""
    if not hasattr(os, "sysconf"):
        return
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise ValueError(
            f"{what} need {size / 1e9:,.0f} GB, this machine has {memory / 1e9:,.0f} GB of memory: "
            "choose smaller sizes"
        )


def bare(model: nn.Module) -> nn.Module:
    """The model inside what torch.compile, DataParallel or DistributedDataParallel made of it."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


def wire(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """Where small tensors travel from: the CPU, unless the group has no backend for it."""
    return torch.device("cpu") if "gloo" in str(dist.get_backend_config(group)) else device


def wrapped(model: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
    """The model with averaged gradients; begins with the first process's parameters and buffers."""
    # Batch norm keeps the buffers equal; newer versions of torch rename the option that trusts it.
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, process_group=group, **{option: False})
