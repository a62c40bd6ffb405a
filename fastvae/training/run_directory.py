"""The folder of one training run: its lock, its settings, its metrics.

config.json, vocabulary.json and model.safetensors make it a model that `fastvae.load` reads;
last, previous and best.safetensors are training checkpoints.
"""

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastvae import _C
from fastvae.atomic_files import (
    first_line,
    make_folder,
    parse_json,
    read_json,
    write_bytes,
    write_json,
)
from fastvae.models.pretrained import BEST, CONFIG, CONFIG_SCHEMA, VOCABULARY, WEIGHTS
from fastvae.training.checkpoint import LAST, PREVIOUS

SETTINGS, METRICS, LOCK = "training.json", "metrics.jsonl", "lock"
# What may differ when a run goes on: how far, and what only looks on.
FREE = {"steps", "log_every", "eval_every", "eval_samples", "checkpoint_every"}
FREE |= {"sample_every", "samples"}
# Runs of before have no digest of the validation's, and one of the first batch alone.
SETTINGS_SCHEMA = {
    "data": str,
    "config": dict,
    "validation?": (str, type(None)),
    "threads?": int,
    "cpu_capability?": str,
}
NUMBER = (float, type(None))
_SPEEDS = {"steps_per_second": float, "characters_per_second": float}
_TERMS = dict.fromkeys(("reconstruction", "kl", "kl_weight", "bound", "bpc"), NUMBER)
RECORD_SCHEMAS = {
    "train": {"step": int, "split": str, **_TERMS, **_SPEEDS, "...": NUMBER},
    "valid": {"step": int, "split": str, **_TERMS, "...": NUMBER},
}

_SAME = "with the same, or choose another directory"


class RunDirectory:
    """A run's folder, held by this process alone until `close` or its end.

    `fresh` tells whether it holds no run yet. Raises OSError where it cannot be written, ValueError
    where another process holds it, or a run is there and `resume` is False.
    """

    def __init__(self, path: str | Path, *, resume: bool, say: Callable[[str], None]) -> None:
        self.path, self._say = Path(path), say
        self._metrics = self._board = None
        make_folder(self.path)
        self._lock = _lock(self.path)
        held = (SETTINGS, METRICS, LAST, PREVIOUS, BEST, CONFIG, WEIGHTS)
        if not resume and any((self.path / name).exists() for name in held):
            self.close()
            raise ValueError(
                f"{self.path} already holds a run: resume it (--resume) or choose another folder"
            )
        self.fresh = not (self.path / SETTINGS).exists()
        if resume and self.fresh:
            say(f"{self.path} holds no run to resume: beginning one")

    def create(self, model, vocabulary, config, data: Callable[[bool], dict]) -> None:
        """Begin a run: the model with its vocabulary, then the settings, which make it one.

        data(of_before): the digests of what it reads, by name, or the one that runs of before have.
        """
        model.save_pretrained(self.path, vocabulary)
        self._write_settings(config, data(False))

    def _write_settings(self, config, data: dict) -> None:
        content = {**data, "config": asdict(config), **_machine()}
        write_json(self.path / SETTINGS, content)

    def check(self, model, vocabulary, config, data: Callable[[bool], dict]) -> None:
        """Raises ValueError naming what differs from the run that is there; see `create`."""
        saved = read_json(self.path / SETTINGS, SETTINGS_SCHEMA)
        there = read_json(self.path / CONFIG, CONFIG_SCHEMA)
        if there["class"] != type(model).__name__:
            raise ValueError(f"{self.path} holds a {there['class']}, not a {type(model).__name__}")
        # JSON turns tuples into lists: compare what both look like in a file.
        arguments, settings = json.loads(json.dumps([model.config, asdict(config)]))
        fixed = {k: v for k, v in settings.items() if k not in FREE}
        for now, before in ((arguments, there["arguments"]), (fixed, saved["config"])):
            for name, value in now.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{self.path} was started with {name} = {before.get(name)}, got {value}: "
                        f"resume {_SAME}"
                    )
        if read_json(self.path / VOCABULARY) != vocabulary.to_dict():
            raise ValueError(f"{self.path} was started with another vocabulary: resume {_SAME}")
        found = data(False)
        if saved["data"] != (data(True) if "validation" not in saved else found)["data"]:
            raise ValueError(f"{self.path} was started with other training data: resume {_SAME}")
        if saved.get("validation", found["validation"]) != found["validation"]:
            raise ValueError(
                f"{self.path} was started with other validation data, or with none where some is "
                f"given now: resume {_SAME}"
            )
        changed = [
            f"{saved[name]} {name.replace('_', ' ')}, now {now}"
            for name, now in _machine().items()
            if saved.get(name, now) != now
        ]
        if changed:
            self._say(
                f"the run was started with {' and '.join(changed)}: it continues, but its results "
                "are not the same bit for bit"
            )
        self._write_settings(config, found)

    def open_metrics(self, step: int) -> dict[str, dict[str, Any]]:
        """Cut the metrics back to `step` and append from there -> last record of each split."""
        path, kept, damaged = self.path / METRICS, [], []
        content = path.read_bytes() if path.exists() else b""
        lines = content.split(b"\n")
        lines.pop()  # nothing, or what a kill left of a line
        for number, line in enumerate(lines, 1):
            try:
                split = parse_json(line, METRICS, {"split": str, "...": object})["split"]
                record = parse_json(line, METRICS, RECORD_SCHEMAS[split])
            except (ValueError, KeyError):
                damaged.append(number)
                continue
            if record["step"] <= step:
                kept.append(record)
        if damaged:
            aside = _free_name(self.path / f"{METRICS}.damaged")
            write_bytes(aside, content)
            self._say(
                f"{path}: {len(damaged)} damaged lines, the first is line {damaged[0]}; the others "
                f"are kept, and the original file is {aside.name}"
            )
        write_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._metrics = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
        self._board = self._open_board(step)
        return {record["split"]: record for record in kept}

    def log(self, record: dict[str, Any]) -> None:
        """One line of metrics.jsonl, and the same to TensorBoard. Raises OSError in one line."""
        try:
            self._metrics.write(json.dumps(record).encode() + b"\n")
        except OSError as error:
            raise OSError(f"cannot write {self.path / METRICS}: {error.strerror}") from error
        for name, value in record.items() if self._board else ():
            if name not in ("step", "split"):
                tag = f"{record['split']}/{name}"
                self._to_board(lambda b, t=tag, v=value: b.add_scalar(t, v, record["step"]))

    def sync(self) -> None:
        """Bring the metrics to disk, before a checkpoint that they belong to."""
        os.fsync(self._metrics.fileno())
        self._to_board(lambda board: board.flush())

    def close(self) -> None:
        """Release the folder."""
        self._to_board(lambda board: board.close())
        for part in (self._metrics, self._lock):
            if part:
                part.close()

    def _to_board(self, write: Callable) -> None:
        """Let TensorBoard's writer do something; where it fails the run goes on without it."""
        if not self._board:
            return
        try:
            write(self._board)
        except Exception as error:  # whatever goes wrong in a log that only looks on
            self._board = None
            self._say(f"no TensorBoard log from here on: {first_line(error)}")

    def _open_board(self, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._say("no TensorBoard log: pip install tensorboard to get one")
            return None
        try:
            # Events of steps after the checkpoint belong to a future that did not happen.
            return SummaryWriter(self.path / "tensorboard", purge_step=step + 1)
        except Exception as error:
            self._say(f"no TensorBoard log: {first_line(error)}")
            return None


def _machine() -> dict[str, Any]:
    """What decides how sums are rounded: a run goes on bit for bit where it stays the same."""
    return {"threads": torch.get_num_threads(), "cpu_capability": _C.cpu_capability()}


def _free_name(path: Path) -> Path:
    names = (path.with_name(f"{path.name}{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def _lock(folder: Path):
    """An open file that this process alone has locked; the system releases it at any exit."""
    try:
        import fcntl
    except ImportError as error:
        message = "training needs POSIX file locks, which this system lacks: on Windows use WSL"
        raise OSError(message) from error
    try:
        file = open(folder / LOCK, "a+")  # noqa: SIM115  open as long as the run
    except OSError as error:
        raise OSError(f"cannot write in {folder}: {error.strerror}") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        if not isinstance(error, BlockingIOError):
            raise OSError(f"cannot lock {folder / LOCK}: {error.strerror}") from error
        raise ValueError(f"{folder} is in use by another training process") from error
    return file
