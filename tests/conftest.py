"""Fixtures for every test: one seed, and no uninitialized memory that happens to be good."""

import io
import os
import shutil
import signal
import sys
import threading
from importlib.metadata import PackageNotFoundError, version

import pytest
import torch

# Without it, products on a GPU refuse to run where only deterministic algorithms may.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
os.environ["FASTVAE_FILL_SCRATCH"] = "1"  # with NaN, in C++
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: run kernels/ on CPU tensors


def pytest_addoption(parser):
    parser.addoption("--cpu-capability", help="run every op at this isa: baseline, avx2, ...")


def interpreter_too_old() -> bool:
    """Whether Triton's interpreter is of before NumPy 2.4, and the NumPy is not."""
    try:
        installed = [tuple(map(int, version(n).split(".")[:2])) for n in ("triton", "numpy")]
    except PackageNotFoundError:
        return False
    return installed[0] < (3, 7) and installed[1] >= (2, 4)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem):
    try:
        return (yield)
    except Exception as error:
        if "only 0-dimensional arrays" in str(error) and interpreter_too_old():
            pytest.skip("Triton's interpreter takes NumPy 2.4 from Triton 3.7 on")
        raise


def pytest_configure(config):
    # A shell's background job and nohup ignore these. What the tests start would too, but for a
    # handler here, in whose place a started program has the default.
    if threading.current_thread() is threading.main_thread():
        if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
            signal.signal(signal.SIGHUP, lambda number, frame: None)
    if isa := config.getoption("--cpu-capability"):
        from fastvae import _C

        _C.set_cpu_capability(isa)


@pytest.fixture(autouse=True)
def strict():
    """Fixed seed; every uninitialized buffer starts as NaN, in Python and in C++."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # implies deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=[1, 2, 5], ids="threads={}".format)
def threads(request):
    """Kernels run on so many threads: one, two, more than there are cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def pytest_generate_tests(metafunc):
    if "isa" in metafunc.fixturenames:
        from fastvae import _C

        metafunc.parametrize("isa", _C.cpu_capabilities(), indirect=True)


@pytest.fixture
def isa(request):
    """Kernels run at this instruction set: each that the machine has, in turn."""
    from fastvae import _C

    before = _C.cpu_capability()
    _C.set_cpu_capability(request.param)
    yield request.param
    _C.set_cpu_capability(before)


@pytest.fixture(scope="session")
def simulator(tmp_path_factory):
    """The kernels of csrc/cuda as ops of the CPU, in launches that tests/simulator runs."""
    if not shutil.which("g++"):
        pytest.skip("the simulator is compiled with g++")
    from simulator import build

    loaded = build.load(tmp_path_factory.mktemp("simulator"))
    yield loaded
    loaded.set_seed(0)


@pytest.fixture
def no_power_cuts(monkeypatch):
    """Waiting for the disk is most of a small run's time."""
    monkeypatch.setattr(os, "fsync", lambda handle: None)


@pytest.fixture
def fastvae(capsys, monkeypatch):
    """Run a command in this process -> exit status, standard output, standard error."""
    from fastvae import cli

    def run(*arguments, stdin: bytes = b""):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as end:
            cli.main([str(a) for a in arguments])
        return end.value.code, *capsys.readouterr()

    return run


@pytest.fixture
def drawn(monkeypatch):
    """Pictures are not written -> the figures that were drawn."""
    from fastvae import plots  # once the environment above is set

    figures = []
    for module in "fastvae.plots", "fastvae.experiments.figures":
        monkeypatch.setattr(f"{module}.save_figure", lambda figure, path: figures.append(figure))
    yield figures
    for figure in figures:
        plots.pyplot().close(figure)
