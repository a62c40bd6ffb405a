"""Training checkpoints: model, Adam's state and the run's state in one safetensors file.

No pickle: the run's state is JSON in the file's header. Files are replaced atomically.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from fastvae.atomic_files import (
    DamagedFileError,
    check_tensors,
    open_tensors,
    parse_json,
    read_tensors,
    write_tensors,
)
from fastvae.models.pretrained import BEST_PREFIX, signatures

FORMAT = 1
LAST, PREVIOUS = "last.safetensors", "previous.safetensors"
STATE_SCHEMA = {
    "format": int,
    "step": int,
    "seed?": int,
    "best?": (float, type(None)),
    "window?": dict,
    "kl_controller?": list,
    "settings?": dict,
    "data?": dict,
}


def save_checkpoint(
    path: Path,
    model: nn.Module,
    optimizer: Optimizer,
    state: dict[str, Any],
    keep: Path | None = None,
    signed: dict[str, str] | None = None,
) -> None:
    """Write a checkpoint: the model, Adam's state and `state`, with a digest.

    Args:
        path: the file to write; an existing one is replaced.
        model: the model.
        optimizer: its Adam optimizer.
        state: the run's state as JSON values: step, seed, best bound, means since the last record.
        keep: path that an existing file at `path` is moved to; None overwrites it.
        signed: the `signatures` of the run's other files.

    Raises:
        OSError: the file cannot be written.
    """
    tensors = {f"{BEST_PREFIX}{name}": t for name, t in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value.float() if key == "step" else value
    metadata = {"fastvae": json.dumps({"format": FORMAT, **state}), **(signed or {})}
    write_tensors(path, tensors, metadata, keep)


def load_checkpoint(path: Path, model: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Load a checkpoint into model and optimizer, in place -> the run's `state`.

    Model and optimizer stay unchanged if the checkpoint is rejected.

    Args:
        path: the checkpoint.
        model: the model to fill.
        optimizer: its Adam optimizer, to fill.

    Returns:
        the `state` given to `save_checkpoint`.

    Raises:
        DamagedFileError: the file is damaged or not a training checkpoint.
        ValueError: it belongs to another model or another version of fastvae.
    """
    with open_tensors(path) as file:
        # The digest first: a damaged header must not pass for another model's.
        tensors, metadata = read_tensors(path, file)
        if not {"digest", "fastvae"} <= metadata.keys():
            raise DamagedFileError(f"{path} is damaged or no training checkpoint")
        state = parse_json(metadata["fastvae"], f"{path}: its state", STATE_SCHEMA)
        if state.pop("format") != FORMAT:
            raise ValueError(f"{path} was written by another version of fastvae")
        expected = {f"{BEST_PREFIX}{name}": t for name, t in model.state_dict().items()}
        moments = {}
        for n, (name, parameter) in enumerate(model.named_parameters()):
            if f"step.{name}" in tensors:  # Adam has no state before its first step
                moments[n] = {
                    "step": torch.empty((), device="cpu", dtype=torch.float32),
                    "exp_avg": parameter,
                    "exp_avg_sq": parameter,
                }
                expected |= {f"{key}.{name}": t for key, t in moments[n].items()}
        check_tensors(path, file, expected)
    for name, signature in signatures(path.parent).items():
        if metadata.get(name, signature) != signature:
            raise ValueError(f"{path} belongs to a run with another {name}")
    model.load_state_dict({name: tensors[f"{BEST_PREFIX}{name}"] for name in model.state_dict()})
    names = [name for name, _ in model.named_parameters()]
    filled = {n: {key: tensors[f"{key}.{names[n]}"] for key in keys} for n, keys in moments.items()}
    optimizer.load_state_dict({**optimizer.state_dict(), "state": filled})
    return state


def load_latest(
    folder: Path, model: nn.Module, optimizer: Optimizer, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Load a run's last checkpoint, or the previous one if the last is damaged -> its state.

    Args:
        folder: the run directory.
        model: the model to fill.
        optimizer: its Adam optimizer, to fill.
        say: receives one line of text if the previous checkpoint is used.

    Returns:
        the run's state, or None if there is no checkpoint.

    Raises:
        ValueError: all checkpoints are damaged, or one belongs to another model.
    """
    why = f"{folder / LAST} is missing"
    damaged = False
    for path in (folder / LAST, folder / PREVIOUS):
        if not path.exists():
            continue
        try:
            state = load_checkpoint(path, model, optimizer)
        except DamagedFileError as error:
            why, damaged = str(error), True
            continue
        if path.name == PREVIOUS:
            say(f"{why}; resuming from the checkpoint before it, step {state['step']}")
        return state
    if damaged:
        raise ValueError(f"{why}, and no other checkpoint is whole: start again in another folder")
    return None
