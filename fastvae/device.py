"""The device that work runs on, and whether the work fits in this machine's memory."""

import os

import torch

from fastvae.atomic_files import first_line


def find_device(name: str | None) -> torch.device:
    """The device of this name, by default a GPU if there is one. ValueError if it does not work."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if not name.strip():
        raise ValueError(f"device must be cpu, cuda, cuda:1 or the like, got {name!r}: name one")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except Exception as error:  # torch asserts that it was built with CUDA, or imports what is not
        why = first_line(error).partition(". ")[0]  # what follows lists all backends of PyTorch
        if "INTERNAL ASSERT" in why:
            why = "PyTorch makes no tensors there"
        raise ValueError(f"device {name} cannot be used here: {why}") from error
    if device.type == "meta":
        raise ValueError("device meta holds no numbers: choose cpu or cuda")
    if device.type == "cpu":
        if device.index:
            raise ValueError(
                f"device must be cpu or cpu:0, got {name}: there is no other CPU device"
            )
        return torch.device("cpu")
    return device


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
