"""What every benchmark shares: pinned threads, the machine's peak, one way to time."""

import os
import statistics
from collections.abc import Callable
from functools import partial
from operator import truediv
from pathlib import Path
from time import perf_counter

import pytest
import torch

import fastvae
from fastvae import _C

BYTES = {"fp32": 4, "bf16": 2, "int8": 1}


def pytest_addoption(parser) -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.addoption(
        "--threads", type=int, default=min(2, usable or 1), help="CPUs and threads to run on"
    )


def pytest_configure(config) -> None:
    """Every line gets the allocator that the command line sets: ours and the rivals alike."""
    fastvae.keep_freed_memory()


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Keeps what explains a timing, and nothing that tells whose machine it is."""
    cpu = machine_info["cpu"]
    kept = {key: machine_info[key] for key in ("machine", "python_version", "system")}
    machine_info.clear()
    machine_info |= kept | {"cpu": {key: cpu.get(key) for key in ("arch", "brand_raw", "count")}}


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in {*commit_info} - {"id", "time", "dirty"}:
        del commit_info[key]


@pytest.fixture(autouse=True)
def threads(request):
    """How many threads: all of this process stay on as many CPUs, until the test is over."""
    count, before = request.config.getoption("threads"), torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(count)
    before_pinning = {task: os.sched_getaffinity(task) for task in _tasks()}
    cpus = sorted(before_pinning.get(os.getpid(), ()))[:count]
    for task in before_pinning:
        os.sched_setaffinity(task, cpus)
    yield count
    torch.set_num_threads(before)
    for task in _tasks() if before_pinning else ():
        os.sched_setaffinity(task, before_pinning.get(task, before_pinning[os.getpid()]))


def _tasks() -> list[int]:
    """This process's threads, none where they cannot be pinned."""
    listed = Path("/proc/self/task")
    if not hasattr(os, "sched_setaffinity") or not listed.exists():
        return []
    return [int(task.name) for task in listed.iterdir()]


@pytest.fixture(scope="session")
def peak():
    """peak(kind, threads, megabytes): `_C.machine_peak`, the best so far in this session."""
    best: dict[tuple, float] = {}

    def measure(*key) -> float | None:
        rates = [_C.machine_peak(*key) or 0.0 for _ in range(1 if key in best else 3)]
        best[key] = max(best.get(key, 0.0), *rates)
        return best[key] or None

    return measure


@pytest.fixture
def compiled(benchmark):
    """torch.compile, which generates no code where nothing is timed."""
    torch.compiler.reset()
    return partial(torch.compile, backend="inductor" if benchmark.enabled else "eager")


@pytest.fixture
def steps(benchmark):
    """steps(T) is T; where nothing is timed a few, enough to see that every line runs."""
    return lambda T, few=4: T if benchmark.enabled else few


@pytest.fixture
def time(benchmark, threads, peak):
    """time(work, line, function, beside, ...): the median of whole calls, after one to warm up.

    `work` names what all lines of a group do. `beside`, our own op in float32, takes turns with
    `function`, so that a machine's moods touch both; None where `function` is it. `symbols` in one
    call, `flops` that they need, and `weights` read anew `passes` times make the limits.
    """

    def run(
        work: str,
        line: str,
        function: Callable[[], object],
        beside: Callable[[], object] | None,
        *,
        symbols: int,
        flops: float,
        weights: float = 0,
        passes: int = 0,
        rounds: int = 5,
    ) -> None:
        benchmark.group = f"{work}, {threads} threads"
        if not benchmark.enabled:
            benchmark(function)
            return
        kind = line.split()[-1] if line.split()[-1] in BYTES else "fp32"
        megabytes = weights * BYTES[kind] / 1e6
        info = {
            "work": work,
            "line": line,
            "threads": threads,
            "torch": torch.__version__,
            "cpu_capability": fastvae.cpu_capability(),
            "symbols": symbols,
            "dtype": kind,
            "GFLOP": flops / 1e9,
            "peak GFLOP/s": peak(kind, threads),
            "MB": megabytes,
            "GB": megabytes * passes / 1e3,
            "peak GB/s": peak("read", threads, megabytes) if weights else None,
        }
        ours = []

        def take_turns() -> None:
            start = perf_counter()
            if beside:
                beside()
            ours.append(perf_counter() - start)

        benchmark.pedantic(function, setup=take_turns, rounds=rounds, warmup_rounds=1)
        times = benchmark.stats.stats.data
        median = statistics.median(times)
        limits = [info["GFLOP"] / info["peak GFLOP/s"]] if info["peak GFLOP/s"] else []
        limits += [info["GB"] / info["peak GB/s"]] if weights else []
        info |= {"GFLOP/s": info["GFLOP"] / median, "GB/s": info["GB"] / median}
        info["share of peak"] = max(limits, default=0.0) / median
        turns = ours[-rounds:] if beside else times
        info["fastvae turns"] = turns
        info["fastvae takes"] = statistics.median(map(truediv, turns, times))
        benchmark.extra_info |= info

    return run
