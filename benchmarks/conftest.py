"""What every benchmark shares: the device, pinned threads, its peak, one way to time.

With `--device cuda` every tensor is made on the GPU, whose own events are the clock.
"""

import os
import re
import runpy
import statistics
from collections.abc import Callable, Sequence
from functools import partial
from operator import truediv
from pathlib import Path
from time import perf_counter

import pytest
import torch

import fastvae
from fastvae import _C

KEPT = "arch", "brand_raw", "count", "family", "model"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SLOWEST = 5  # seconds a call, of a line that is timed
# Lines, works and batches: what a test's parameters must not hold on the other device.
GPU_ONLY = {"graph", "graph bf16", "nn.LSTM fp16", "FlashRNN (no norm) bf16", "Haste (other norms)"}
GPU_ONLY |= {"LayerNorm-LSTM forward", 1024, "fastvae recorded", "fastvae recorded bf16"}
GPU_ONLY |= {"fastvae persistent", "fastvae persistent bf16", "fastvae persistent fp16"}
CPU_ONLY = {"fastvae int8", "nn.LSTM deprecated int8", "pads computed"}


def pytest_addoption(parser) -> None:
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.addoption(
        "--threads", type=int, default=min(2, usable or 1), help="CPUs and threads to run on"
    )
    parser.addoption("--rows", help="run only rows whose work and line match this expression")
    parser.addoption("--rival", type=Path, help="Python file with your own line: see rival()")
    parser.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="where to run")


def pytest_configure(config) -> None:
    """Every line gets the allocator that the command line sets: ours and the rivals alike."""
    rows = config.getoption("--rows")
    try:
        re.compile(rows or "")
    except re.error as error:
        raise pytest.UsageError(
            f"--rows {rows!r} is not a regular expression: {error}; write a parenthesis as \\("
        ) from None
    fastvae.keep_freed_memory()


def pytest_collection_modifyitems(config, items) -> None:
    """Leaves out what is the other device's alone; on a GPU its events are the clock."""
    gpu = config.getoption("--device") == "cuda"
    if gpu and not torch.cuda.is_available():
        raise pytest.UsageError("--device cuda: there is no CUDA device")
    absent = CPU_ONLY if gpu else GPU_ONLY
    left_out = [item for item in items if absent & _parameters(item)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in left_out]
    for item in items if gpu else ():
        item.add_marker(pytest.mark.benchmark(timer=gpu_clock))


def _parameters(item) -> set:
    callspec = getattr(item, "callspec", None)
    return set(callspec.params.values()) if callspec else set()


class GpuClock:
    """Seconds on the GPU's clock, once all that was launched has ended.

    The time between two events is a float32, too coarse for minutes, so calls sum it.
    """

    def __init__(self) -> None:
        self.before, self.seconds = None, 0.0

    def __call__(self) -> float:
        now = torch.cuda.Event(enable_timing=True)
        now.record()
        now.synchronize()
        if self.before:
            self.seconds += self.before.elapsed_time(now) / 1e3
        self.before = now
        return self.seconds


gpu_clock = GpuClock()


@pytest.fixture(autouse=True)
def device(request):
    """Where every tensor is made that is told no device."""
    name = request.config.getoption("--device")
    if name == "cuda":
        torch.set_default_device("cuda")
        torch.backends.cudnn.allow_tf32 = False  # float32 is float32 in every line
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield name
    if name == "cuda":
        torch.set_default_device(None)


def pytest_benchmark_update_machine_info(config, machine_info) -> None:
    """Keeps what explains a timing, and nothing that tells whose machine it is."""
    cpu = machine_info["cpu"]
    kept = {key: machine_info[key] for key in ("machine", "python_version", "system")}
    machine_info.clear()
    machine_info |= kept | {"cpu": {key: cpu.get(key) for key in KEPT}}


def pytest_benchmark_update_commit_info(config, commit_info) -> None:
    for key in {*commit_info} - {"id", "time", "dirty"}:
        del commit_info[key]


@pytest.fixture
def rival(request):
    """rival(name): a function of the file that `--rival` names, which makes a line of its own.

    layer_norm_lstm(inputs, H) -> a module that takes x [T, B, inputs] as nn.LSTM does;
    HybridVAE(...) or LSTMVAE(...), called as fastvae's are -> a model whose output has a loss.
    """
    path = request.config.getoption("--rival")

    def find(name: str) -> Callable:
        if path is None:
            pytest.skip("--rival names no file")
        made = runpy.run_path(str(path))
        if name not in made:
            pytest.skip(f"{path} makes no {name}")
        return made[name]

    return find


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
    """peak(device, kind, threads, megabytes): the best rate so far in this session, 1e9 a second.

    `_C.machine_peak`, or on a GPU the best of PyTorch's own products and sums.
    """
    best: dict[tuple, float] = {}

    def measure(*key) -> float:
        device, *limit = key
        rate = gpu_peak if device == "cuda" else _C.machine_peak
        rates = [rate(*limit) for _ in range(1 if key in best else 3)]
        best[key] = max(best.get(key, 0.0), *rates)
        return best[key]

    return measure


def gpu_peak(kind: str, threads: int, megabytes: float = 0.0) -> float:
    """1e9 operations a second of a large product; "read": bytes of `megabytes` read repeatedly."""
    if kind == "read":
        values = torch.ones(max(int(megabytes * 1e6 / 4), 1))
        work = partial(torch.sum, values.expand(max(int(4e3 / megabytes), 1), -1))
        amount = max(int(4e3 / megabytes), 1) * values.nbytes
    else:
        size = 4096 if kind == "fp32" else 8192
        a, b = torch.randn(2, size, size, dtype=DTYPES[kind])
        work, amount = partial(torch.mm, a, b), 2 * size**3
    times = []
    for _ in range(5):
        start = gpu_clock()
        work()
        times.append(gpu_clock() - start)
    return amount / min(times) / 1e9


@pytest.fixture
def graphed():
    """graphed(function): one replay of a CUDA graph for all that function launches."""

    def capture(function: Callable[[], object]) -> Callable[[], None]:
        side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            function()
        torch.cuda.current_stream().wait_stream(side)
        with torch.cuda.graph(graph):
            function()
        return graph.replay

    return capture


class Served:
    """Has a persistent kernel serve what a line's functions call of `op`, if the line says so."""

    def __init__(self, line: str, op: str, monkeypatch) -> None:
        self.op, self.plan = op, None
        self.persistent = "persistent" in line
        if not self.persistent:
            return
        self.kernels = pytest.importorskip("fastvae.kernels.persistent", exc_type=ImportError)
        if not self.kernels.built(op):
            pytest.skip("csrc/cuda was not built")
        self.run = getattr(self.kernels, op)
        monkeypatch.setattr(self.kernels, op, self._note)

    def _note(self, *inputs, **named):
        self.plan = named.get("plan", inputs[-1])
        return self.run(*inputs, **named)

    def __call__(self, function: Callable) -> Callable:
        """The function; the test is skipped when it finds that the kernel is not for its sizes."""
        if not self.persistent:
            return function

        def served(*inputs):
            self.plan = None
            with self.kernels.serve([self.op]):
                outputs = function(*inputs)
            if self.plan is None:
                pytest.skip("the persistent kernel is not for these sizes on this GPU")
            return outputs

        return served

    def exchanges(self, B: int, payloads: Callable) -> list[int]:
        """Bytes that a step of all launches exchanges: payloads(plan, sequences), by a slice."""
        if self.plan is None:
            return []
        most = self.kernels.BATCH
        sequences = min(self.plan.columns, -(-min(B, most) // self.plan.groups))
        return payloads(self.plan, sequences) * -(-B // most)


@pytest.fixture
def serving(monkeypatch):
    """serving(line, op): what the line's functions are served by."""
    return partial(Served, monkeypatch=monkeypatch)


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
def timer(benchmark, threads, peak, device, pytestconfig):
    """timer(work, line): a function that times this row, time(function, beside, ...).

    `work` names what all lines of a group do. A test that `--rows` leaves out is skipped here, so
    its first statement is this call. The function takes the median of whole calls, after one to
    warm up. `beside`, our own op in float32, takes turns with `function`, so that a machine's moods
    touch both; None where `function` is it. `tokens` in one call, `flops` that they need, and
    `weights` read anew in each of `passes` steps make the limits; `exchanges` are the bytes that
    blocks pass on in a step, one exchange after the other. A function of which one call takes
    more than SLOWEST seconds is left out.
    """

    def make(work: str, line: str) -> Callable[..., None]:
        rows = pytestconfig.getoption("--rows")
        if rows and not re.search(rows, f"{work}, {line}"):
            pytest.skip("not one of --rows")
        return partial(run, work, line)

    def run(
        work: str,
        line: str,
        function: Callable[[], object],
        beside: Callable[[], object] | None,
        *,
        tokens: int,
        flops: float,
        weights: float = 0,
        passes: int = 0,
        exchanges: Sequence[int] = (),
        rounds: int = 5,
    ) -> None:
        gpu = device == "cuda"
        benchmark.group = f"{work}, {device if gpu else f'{threads} threads'}"
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
            "tokens": tokens,
            "passes": passes,
            "exchanges": list(exchanges),
            "dtype": kind,
            "GFLOP": flops / 1e9,
            "peak GFLOP/s": peak(device, kind, threads),
            "MB": megabytes,
            "GB": megabytes * passes / 1e3,
            "peak GB/s": peak(device, "read", threads, megabytes) if weights else None,
        }
        clock = gpu_clock if gpu else perf_counter
        for last in (False, True):  # the first call compiles
            start = clock()
            function()
            seconds = clock() - start
            if seconds <= SLOWEST:
                break
            if last:
                pytest.skip(f"{work}, {line}: a call takes {seconds:.0f} s, {SLOWEST} at most")
        if gpu:
            info["GPU"] = torch.cuda.get_device_name()
            rounds = max(rounds, 15)
            other = torch.empty(1 << 28, dtype=torch.uint8)  # fills the cache between two calls
            torch.cuda.reset_peak_memory_stats()
            function()
            info["peak memory, MB"] = (torch.cuda.max_memory_allocated() - other.nbytes) / 1e6
        ours = []

        def take_turns() -> None:
            start = clock()
            if beside:
                beside()
            ours.append(clock() - start)
            if gpu:
                other.zero_()

        if beside:
            beside()
        benchmark.pedantic(function, setup=take_turns, rounds=rounds, warmup_rounds=0)
        times = benchmark.stats.stats.data
        median = statistics.median(times)
        low, _, high = statistics.quantiles(times, n=4)
        info["spread"] = (high - low) / median
        limits = [info["GFLOP"] / info["peak GFLOP/s"]] if info["peak GFLOP/s"] else []
        limits += [info["GB"] / info["peak GB/s"]] if weights else []
        info |= {"GFLOP/s": info["GFLOP"] / median, "GB/s": info["GB"] / median}
        info["share of peak"] = max(limits, default=0.0) / median
        turns = ours if beside else times
        info["fastvae turns"] = turns
        info["fastvae takes"] = statistics.median(map(truediv, turns, times))
        benchmark.extra_info |= info

    return make
