"""The directory of one training run: its lock, its settings, its metrics.

config.json, vocabulary.json and model.safetensors make it a model that `fastvae.load` reads;
last.safetensors, previous.safetensors and best.safetensors are training checkpoints.
"""

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from fastvae import _C
from fastvae.atomic_files import (
    check_utf8,
    first_line,
    make_folder,
    parse_json,
    read_json,
    remove_temporaries,
    write_bytes,
    write_json,
    writing,
)
from fastvae.models.pretrained import BEST, CONFIG, CONFIG_SCHEMA, VOCABULARY, WEIGHTS
from fastvae.text.reading import FILE as READING
from fastvae.training.checkpoint import LAST, PREVIOUS

SETTINGS, METRICS, LOCK = "training.json", "metrics.jsonl", "lock"
MARK = b"of a fastvae run\n"  # in a run's lock: a person's file of that name holds something else
CURVES = "learning-curve.png"
FILES = CONFIG, WEIGHTS, VOCABULARY, READING, SETTINGS, METRICS, LAST, PREVIOUS, BEST
# Settings that may change on resume: the number of steps, and what does not affect training.
FREE = {"steps", "log_every", "eval_every", "eval_samples", "checkpoint_every"}
FREE |= {"sample_every", "samples"}
# Older runs have no digest of the validation data, and one of the first training batch only.
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
    """A run directory, locked by this process until `close` or its end.

    `fresh` tells whether it holds no run yet.

    Args:
        path: the directory; created if missing.
        resume: whether it may hold a run.
        say: receives a line of text.

    Raises:
        OSError: the directory cannot be written or locked.
        ValueError: another process uses it, or it holds a run and `resume` is False.
    """

    def __init__(self, path: str | Path, *, resume: bool, say: Callable[[str], None]) -> None:
        self.path, self._say = Path(path), say
        self._metrics = self._board = self._thread_hook = None
        check_utf8(self.path)
        make_folder(self.path)
        self._check_files()
        new = not (self.path / LOCK).exists()
        self._lock = _lock(self.path)
        was_run = not new and self._lock.read(len(MARK)) == MARK
        self.fresh = not (self.path / SETTINGS).exists()
        if was_run or not self.fresh:
            remove_temporaries(self.path / name for name in (*FILES, CURVES))
        if new:
            try:
                with writing(self.path / LOCK):
                    self._lock.write(MARK)
            except OSError:
                (self.path / LOCK).unlink()
                self._lock.close()
                raise
        if wrong := self._unusable(resume, was_run):
            if new:
                (self.path / LOCK).unlink()
            self.close()
            raise ValueError(wrong)
        if resume and self.fresh:
            say(f"{self.path} holds no run to resume: beginning one")

    def _unusable(self, resume: bool, was_run: bool) -> str | None:
        """Why no run may begin or go on here, if so; `was_run`: training has been here before."""
        model, run = (CONFIG, WEIGHTS), (METRICS, LAST, PREVIOUS, BEST)
        held = [name for name in (*model, *run) if (self.path / name).exists()]
        if not resume and (held or not self.fresh):
            return f"{self.path} already holds a run: resume it (--resume) or choose another folder"
        # A run killed before its first step has left a lock and a model, which may be replaced.
        if self.fresh and (set(held) & set(run) or (held and not was_run)):
            return (
                f"{self.path} has {held[0]} but no {SETTINGS}, so it cannot be resumed: "
                "choose another folder"
            )
        others = (name for name in (VOCABULARY, READING, CURVES) if (self.path / name).exists())
        if self.fresh and not was_run and (foreign := next(others, None)):
            return f"{self.path} has a {foreign}, which a run would replace: choose another folder"
        return None

    def _check_files(self) -> None:
        """Raise ValueError for a folder, a link to nothing or the like in place of a run's file."""
        for path in (self.path / name for name in (LOCK, *FILES)):
            if os.path.lexists(path) and not path.is_file():
                what = "a folder" if path.is_dir() else "no regular file"
                if path.is_symlink() and not path.exists():
                    what = "a link to nothing"
                raise ValueError(f"{path} is {what}, but must be a file of a run: move it away")

    def check_place(self) -> None:
        """Check that the path still leads to the directory that this process has locked.

        Raises:
            OSError: the directory was moved or replaced since.
        """
        try:
            here = os.path.samestat(os.stat(self.path / LOCK), os.fstat(self._lock.fileno()))
        except FileNotFoundError:
            here = False
        if not here:
            raise OSError(
                f"{self.path} is not the folder that this run began in: it was moved or replaced "
                "while the run used it; nothing was written there"
            )

    def create(self, model, vocabulary, config, data: Callable[[bool], dict]) -> None:
        """Begin a run: save the model and its vocabulary, then the settings, which mark the run.

        Args:
            model: the model.
            vocabulary: its vocabulary.
            config: the settings.
            data: False -> digests of the data by name; True -> the digest that older runs have.

        Raises:
            OSError: a file cannot be written.
        """
        model.save_pretrained(self.path, vocabulary)
        self._write_settings(config, data(False))

    def _write_settings(self, config, data: dict) -> None:
        """Write training.json."""
        content = {**data, "config": asdict(config), **_machine()}
        write_json(self.path / SETTINGS, content)

    def check(self, model, vocabulary, config, data: Callable[[bool], dict]) -> None:
        """Check that a run is resumed as it was started.

        Args:
            model: the model.
            vocabulary: its vocabulary.
            config: the settings.
            data: as in `create`.

        Raises:
            ValueError: model, vocabulary, settings or data differ from those of the run; the
                message names what.
        """
        saved = read_json(self.path / SETTINGS, SETTINGS_SCHEMA)
        there = read_json(self.path / CONFIG, CONFIG_SCHEMA)
        if there["class"] != type(model).__name__:
            raise ValueError(f"{self.path} holds a {there['class']}, not a {type(model).__name__}")
        # JSON turns tuples into lists: compare both as JSON.
        arguments = json.loads(json.dumps(model.config))
        began = {**asdict(type(config)()), **saved["config"]}  # older runs lack some fields
        for now, before in ((arguments, there["arguments"]), (fixed_settings(config), began)):
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

    def check_checkpoint(self, config, data: dict, state: dict[str, Any]) -> None:
        """Check that a checkpoint was made with these settings and data.

        Args:
            config: the settings, which are those of training.json.
            data: digests of the data by name.
            state: the checkpoint's state.

        Raises:
            ValueError: the data differ: the file is another run's; or a setting does: training.json
                was edited.
        """
        if state.get("data", data) != data:
            raise ValueError(f"the checkpoint in {self.path} is of a run on other data")
        made = {**fixed_settings(type(config)()), **state.get("settings", {})}
        for name, value in fixed_settings(config).items() if "settings" in state else ():
            if made[name] != value:
                raise ValueError(
                    f"{self.path / SETTINGS} has {name} = {value}, the run's checkpoint "
                    f"{made[name]}: correct the file"
                )

    def open_metrics(self, step: int, recorded: int) -> dict[str, dict[str, Any]]:
        """Cut the metrics back to `step` and append from there -> the last record of each split.

        Args:
            step: the checkpoint's step.
            recorded: the step of the last training record before it, or 0.

        Raises:
            OSError: the file cannot be read or written.
        """
        path, kept, damaged = self.path / METRICS, [], []
        content = path.read_bytes() if path.exists() else b""
        if step and not path.exists():
            self._say(f"{path} is missing: it begins anew after step {step}")
        for number, record in read_records(content):
            if record is None:
                damaged.append(number)
            elif record["step"] <= step:
                kept.append(record)
        if damaged:
            aside = _free_name(self.path / f"{METRICS}.damaged")
            write_bytes(aside, content)
            self._say(
                f"{path}: {len(damaged)} damaged lines, the first is line {damaged[0]}; the others "
                f"are kept, and the original file is {aside.name}"
            )
        elif path.exists():
            last = max((r["step"] for r in kept if r["split"] == "train"), default=0)
            if last < recorded:
                held = f"ends at step {last}" if last else "has no training record"
                self._say(
                    f"{path} {held}, but step {recorded} was recorded: what lies between is lost"
                )
        write_bytes(path, "".join(json.dumps(r) + "\n" for r in kept).encode())
        self._metrics = open(path, "ab", buffering=0)  # noqa: SIM115  open as long as the run
        self._board = self._open_board(step)
        return {record["split"]: record for record in kept}

    def log(self, record: dict[str, Any]) -> None:
        """Append a record to metrics.jsonl and to the TensorBoard log.

        Raises:
            OSError: metrics.jsonl cannot be written.
        """
        rest = json.dumps(record).encode() + b"\n"
        with writing(self.path / METRICS):
            while rest:  # a disk that is nearly full takes a part of it
                rest = rest[self._metrics.write(rest) :]
        for name, value in record.items() if self._board else ():
            if name not in ("step", "split"):
                tag = f"{record['split']}/{name}"
                self._to_board(lambda b, t=tag, v=value: b.add_scalar(t, v, record["step"]))

    def sync(self) -> None:
        """Flush the metrics to disk, before the checkpoint that they belong to."""
        with writing(self.path / METRICS):
            os.fsync(self._metrics.fileno())
        self._to_board(lambda board: board.flush())

    def close(self) -> None:
        """Release the directory."""
        self._to_board(lambda board: board.close())
        if self._thread_hook and threading.excepthook == self._report_thread_error:
            threading.excepthook = self._thread_hook
        for part in (self._metrics, self._lock):
            if part:
                part.close()

    def _to_board(self, write: Callable) -> None:
        """Call `write` with TensorBoard's writer; if it fails, the run continues without it."""
        if not self._board:
            return
        try:
            write(self._board)
        except Exception as error:  # a failing log must not stop the run
            self._board = None
            self._say(f"no TensorBoard log from here on: {first_line(error)}")

    def _open_board(self, step: int):
        """TensorBoard's writer for steps after `step`, or None with a line that says why."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            self._say("no TensorBoard log: pip install tensorboard to get one")
            return None
        try:
            self._thread_hook = threading.excepthook
            threading.excepthook = self._report_thread_error
            # Drops events after the checkpoint, which these steps will log again.
            return SummaryWriter(self.path / "tensorboard", purge_step=step + 1)
        except Exception as error:
            self._say(f"no TensorBoard log: {first_line(error)}")
            return None

    def _report_thread_error(self, error: threading.ExceptHookArgs) -> None:
        """Report an error of a thread as before, unless the thread is TensorBoard's.

        TensorBoard raises that error again in its next call, where `_to_board` reports it.
        """
        if not type(error.thread).__module__.startswith("tensorboard."):
            self._thread_hook(error)


def fixed_settings(config) -> dict[str, Any]:
    """Settings -> those that may not change on resume, as JSON values."""
    return {k: v for k, v in json.loads(json.dumps(asdict(config))).items() if k not in FREE}


def read_records(content: bytes) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """Content of metrics.jsonl -> number and record of each line, None where it is damaged.

    A last line without its end that is damaged was cut off by a kill and is left out.
    """
    *lines, rest = content.split(b"\n")
    for number, line in enumerate((*lines, rest), 1):
        try:
            split = parse_json(line, METRICS, {"split": str, "...": object})["split"]
            yield number, parse_json(line, METRICS, RECORD_SCHEMAS[split])
        except (ValueError, KeyError):
            if number <= len(lines):
                yield number, None


def _machine() -> dict[str, Any]:
    """What determines how sums are rounded: a run resumes bit for bit where it stays the same."""
    return {"threads": torch.get_num_threads(), "cpu_capability": _C.cpu_capability()}


def _free_name(path: Path) -> Path:
    """The path, or the first path.1, path.2, ... that does not exist."""
    names = (path.with_name(f"{path.name}{n or ''}") for n in itertools.count())
    return next(name for name in names if not name.exists())


def _lock(folder: Path):
    """Lock the directory -> the open lock file; the system releases it at any exit."""
    try:
        import fcntl
    except ImportError as error:
        message = "training needs POSIX file locks, which this system lacks: on Windows use WSL"
        raise OSError(message) from error
    try:
        file = open(folder / LOCK, "a+b", buffering=0)  # noqa: SIM115  open as long as the run
        file.seek(0)
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
