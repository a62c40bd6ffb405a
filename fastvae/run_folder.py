"""The folder of one training run: its lock, its settings, its metrics.

config.json, vocabulary.json and model.safetensors make it a model that `fastvae.load` reads;
last, previous and best.safetensors are training checkpoints.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from fastvae.checkpoint import BEST, CONFIG, LAST, PREVIOUS, VOCABULARY, WEIGHTS
from fastvae.files import make_folder, read_json, write_bytes, write_json

SETTINGS, METRICS, LOCK = "training.json", "metrics.jsonl", "lock"
# What may differ when a run goes on: how far, and what only looks on.
FREE = {"steps", "log_every", "eval_every", "eval_samples", "checkpoint_every"}
FREE |= {"sample_every", "samples"}


class RunFolder:
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

    def create(self, model, vocabulary, config, fingerprint: str) -> None:
        """Begin a run: the model with its vocabulary, then the settings, which make it one."""
        model.save_pretrained(self.path, vocabulary)
        write_json(self.path / SETTINGS, {"data": fingerprint, "config": asdict(config)})

    def check(self, model, vocabulary, config, fingerprint: str) -> None:
        """Raises ValueError naming what differs from the run that is there."""
        saved, there = read_json(self.path / SETTINGS), read_json(self.path / CONFIG)
        if there["class"] != type(model).__name__:
            raise ValueError(f"{self.path} holds a {there['class']}, not a {type(model).__name__}")
        # JSON turns tuples into lists: compare what both look like in a file.
        arguments, settings = json.loads(json.dumps([model.config, asdict(config)]))
        fixed = {k: v for k, v in settings.items() if k not in FREE}
        for now, before in ((arguments, there["arguments"]), (fixed, saved["config"])):
            for name, value in now.items():
                if before.get(name) != value:
                    raise ValueError(
                        f"{self.path} was begun with {name} = {before.get(name)}, not {value}: "
                        "resume with what it was, or choose another folder"
                    )
        if read_json(self.path / VOCABULARY) != vocabulary.to_dict():
            raise ValueError(f"{self.path} was begun with another vocabulary")
        if saved["data"] != fingerprint:
            raise ValueError(f"{self.path} was begun with other training data")
        write_json(self.path / SETTINGS, {**saved, "config": asdict(config)})

    def open_metrics(self, step: int) -> dict[str, dict[str, Any]]:
        """Cut the metrics back to `step` and append from there -> last record of each split."""
        path, kept = self.path / METRICS, []
        for line in path.read_bytes().splitlines() if path.exists() else []:
            try:
                record = json.loads(line)
            except ValueError:  # a kill in the middle of a line
                break
            if record["step"] <= step:
                kept.append(record)
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
        if self._board:
            for name, value in record.items():
                if name not in ("step", "split"):
                    self._board.add_scalar(f"{record['split']}/{name}", value, record["step"])

    def sync(self) -> None:
        """Bring the metrics to disk, before a checkpoint that they belong to."""
        os.fsync(self._metrics.fileno())
        if self._board:
            self._board.flush()

    def close(self) -> None:
        """Release the folder."""
        for part in (self._metrics, self._board, self._lock):
            if part:
                part.close()

    def _open_board(self, step: int):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._say("no TensorBoard log: pip install tensorboard to get one")
            return None
        # Events of steps after the checkpoint belong to a future that did not happen.
        return SummaryWriter(self.path / "tensorboard", purge_step=step + 1)


def _lock(folder: Path):
    """An open file that this process alone has locked; the system releases it at any exit."""
    import fcntl  # POSIX only: elsewhere everything but training works

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
