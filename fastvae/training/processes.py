"""Several processes: joining the group that torchrun started, and what wraps a model in it."""

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
