"""Training in several processes: joining the group that torchrun starts, wrapping the model."""

import atexit
import inspect
import os
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
    """Yield the group of all processes, joined if torchrun started them; None for one process.

    Moves the model to this process's GPU and sets its process group.
    """
    if not dist.is_initialized() and not {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        yield None
        return
    if next(model.parameters()).device.type == "cuda" and "LOCAL_RANK" in os.environ:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        model.to(device)
    if not dist.is_initialized():
        # The others wait while the first process evaluates. The group is destroyed only at exit: a
        # group joined again under the same torchrun finds the first one's addresses and can hang.
        dist.init_process_group(timeout=timedelta(hours=1))
        atexit.register(_leave)
    set_process_group(model, dist.group.WORLD)
    try:
        yield dist.group.WORLD
    finally:
        set_process_group(model, None)


def _leave() -> None:
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def bare(model: nn.Module) -> nn.Module:
    """The model inside the wrappers of torch.compile, DataParallel and DistributedDataParallel."""
    while True:
        if isinstance(getattr(model, "_orig_mod", None), nn.Module):  # torch.compile's
            model = model._orig_mod
        elif isinstance(model, (nn.DataParallel, DistributedDataParallel)):
            model = model.module
        else:
            return model


def wire(group: dist.ProcessGroup, device: torch.device) -> torch.device:
    """The device for small tensors sent to the group: the CPU if the group has a backend for it.

    Args:
        group: the process group.
        device: the device to use otherwise.
    """
    return torch.device("cpu") if "gloo" in str(dist.get_backend_config(group)) else device


def wrapped(model: nn.Module, group: dist.ProcessGroup) -> DistributedDataParallel:
    """Wrap a model in DistributedDataParallel, which averages gradients.

    All processes begin with the parameters and buffers of the first one.

    Args:
        model: the model.
        group: the process group.
    """
    # Batch norm keeps the buffers equal, so they need no broadcast later on. Newer torch renames
    # the option; the older one leaves out the first broadcast too.
    for buffer in model.buffers():
        dist.broadcast(buffer, group_src=0, group=group)
    known = inspect.signature(DistributedDataParallel).parameters
    option = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"
    return DistributedDataParallel(model, process_group=group, **{option: False})
