"""Runs of a grid in processes: several at once, their progress, Ctrl-C handed on to all of them."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.progress import Progress

from fastvae.console import progress
from fastvae.experiments.configuration import Job
from fastvae.signals import stop_signals
from fastvae.training.run_directory import METRICS

LOG, MOST = "log.txt", 8
POLL, SPEAK = 0.2, 60  # seconds; between lines where there is no terminal for a bar


@dataclass
class _Worker:
    job: Job
    process: subprocess.Popen
    task: int
    slot: int


def default_jobs(device: str | None) -> int:
    """Runs at a time: one a GPU, or on the CPU one a core, at most MOST for the memory's sake.

    Two runs on a core each are 5 to 20 % faster than one after the other on both, and do not wait
    for a core that another program holds.
    """
    if device is None and torch.cuda.is_available():
        return torch.cuda.device_count()
    return min(MOST, _cores()) if (device or "cpu") == "cpu" else 1


def run_jobs(
    jobs: Sequence[Job], at_once: int, device: str | None, console: Console
) -> tuple[dict[str, str], bool]:
    """-> what went wrong by folder's name, and whether a signal stopped the grid.

    A signal goes on to every process, which saves its run; a second one ends them at once.
    """
    waiting, working, failed = deque(jobs), [], {}
    slots = deque(range(max(1, min(at_once, len(jobs)))))
    share = max(1, _cores() // len(slots))
    bars = progress(console)
    total = sum(job.preset.training["steps"] for job in jobs)
    with bars, stop_signals(patient=False) as stop:
        whole = bars.add_task("all steps", total=total)
        told, spoken = False, time.monotonic()
        try:
            while working or (waiting and not stop.is_set()):
                while waiting and slots and not stop.is_set():
                    job, slot = replace(waiting.popleft(), threads=share), slots.popleft()
                    working.append(_start(job, slot, device, bars))
                time.sleep(POLL)
                if stop.is_set() and not told:
                    told = True
                    for worker in working:
                        worker.process.send_signal(signal.SIGINT)
                for worker in list(working):
                    _show(worker, bars)
                    status = worker.process.poll()
                    if status is None:
                        continue
                    working.remove(worker)
                    slots.append(worker.slot)
                    name = worker.job.folder.name
                    outcome = "done" if status == 0 else "stopped" if told else "failed"
                    if outcome == "failed":
                        failed[name] = _last_line(worker.job) or f"ended with status {status}"
                    console.print(f"{outcome}: {name}", soft_wrap=True)
                done = sum(task.completed for task in bars.tasks[1:])
                bars.update(whole, completed=done)
                if not console.is_terminal and time.monotonic() - spoken > SPEAK:
                    console.print(f"{done:,.0f} of {total:,} steps", soft_wrap=True)
                    spoken = time.monotonic()
        finally:
            for worker in working:
                worker.process.kill()
                worker.process.wait()
    return failed, stop.is_set()


def _start(job: Job, slot: int, device: str | None, bars: Progress) -> _Worker:
    job.folder.mkdir(parents=True, exist_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": str(job.threads)}
    if device is None and torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = _visible_gpu(slot)
    with open(job.folder / LOG, "a", encoding="utf-8") as log:
        # In its own session: a terminal's Ctrl-C reaches this process alone, which hands it on.
        process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-c",
                "from fastvae.experiments.configuration import main; main()",
            ],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=log,
            text=True,
            env=environment,
            start_new_session=True,
        )
    with suppress(BrokenPipeError):  # its status will tell
        process.stdin.write(job.to_json())
        process.stdin.close()
    steps = job.preset.training["steps"]
    return _Worker(job, process, bars.add_task(job.folder.name, total=steps), slot)


def _visible_gpu(slot: int) -> str:
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = listed.split(",") if listed else [str(n) for n in range(torch.cuda.device_count())]
    return names[slot % len(names)]


def _show(worker: _Worker, bars: Progress) -> None:
    step = _last_step(worker.job)
    steps = worker.job.preset.training["steps"]
    doing = "  measuring" if step >= steps else ""
    if worker.process.poll() is None:
        bars.update(worker.task, completed=step, description=worker.job.folder.name + doing)
    else:
        bars.update(worker.task, completed=step, visible=False)


def _last_step(job: Job) -> int:
    """The step of the run's last record; 0 before there is one."""
    try:
        with open(job.folder / METRICS, "rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - 4096))
            last = file.read().rpartition(b"\n")[0].rpartition(b"\n")[2]
        return int(json.loads(last)["step"])
    except (OSError, ValueError, KeyError, TypeError):  # no record, or a damaged one
        return 0


def _last_line(job: Job) -> str:
    lines = (job.folder / LOG).read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line for line in reversed(lines) if line.strip()), "")


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
