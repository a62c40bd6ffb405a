"""Every kernel of csrc/cuda/ compiles for the GPUs it is built for, and fits in what they have."""

import importlib.util
import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.utils.cpp_extension import COMMON_NVCC_FLAGS, include_paths

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
GPUS = "sm_80", "sm_90a"
KERNEL = re.compile(
    r"Compiling entry function '(?P<name>\w+)' for '(?P<gpu>\w+)'.*?"
    r"(?P<stores>\d+) bytes spill stores, (?P<loads>\d+) bytes spill loads.*?"
    r"Used (?P<registers>\d+) registers(?P<used>[^\n]*)",
    re.S,
)


class Kernel(NamedTuple):
    name: str
    spilled: int
    static_shared: int


def load(name: str, path: Path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def kernels(said: str, gpu: str) -> list[Kernel]:
    """What ptxas -v tells of each kernel."""
    found = []
    for match in KERNEL.finditer(said):
        assert match["gpu"] == gpu
        shared = re.search(r"(\d+) bytes smem", match["used"])
        spilled = int(match["stores"]) + int(match["loads"])
        found.append(Kernel(match["name"], spilled, int(shared[1]) if shared else 0))
    assert len(found) == said.count("Compiling entry function")
    return found


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled[source, gpu]: how nvcc ended, two at a time, with setup.py's flags."""
    nvcc = load("gpu_limits", ROOT / "benchmarks" / "gpu_limits.py").find_nvcc()
    if not nvcc:
        pytest.skip("no nvcc")
    setup = load("setup", ROOT / "setup.py")
    flags = [flag for flag in setup.NVCC_FLAGS if flag not in setup.GPUS]
    flags += [*COMMON_NVCC_FLAGS, *(f"-I{path}" for path in include_paths())]
    folder = tmp_path_factory.mktemp("cubins")

    def run(job: tuple[Path, str]) -> subprocess.CompletedProcess:
        source, gpu = job
        output = folder / f"{source.stem}.{gpu}.cubin"
        command = [nvcc, *flags, f"-arch={gpu}", "-cubin", "-Xptxas", "-v", "-o", output, source]
        return subprocess.run(command, capture_output=True, text=True)

    jobs = [(source, gpu) for source in SOURCES for gpu in GPUS]
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(jobs, pool.map(run, jobs), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_fits(compiled, source, gpu):
    run = compiled[source, gpu]
    assert run.returncode == 0, run.stderr
    found = kernels(run.stderr + run.stdout, gpu)
    assert found
    assert not [kernel for kernel in found if kernel.spilled]
    # All shared memory of a block is the plan's to give out (fastvae/kernels/persistent.py).
    assert not [kernel for kernel in found if kernel.static_shared]


def test_reads_what_ptxas_says():
    said = """ptxas info    : Compiling entry function 'first' for 'sm_80'
ptxas info    : Function properties for first
    16 bytes stack frame, 8 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 32768 bytes smem, 496 bytes cmem[0]
ptxas info    : Compiling entry function 'second' for 'sm_80'
ptxas info    : Function properties for second
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 8 registers
"""
    assert kernels(said, "sm_80") == [Kernel("first", 12, 32768), Kernel("second", 0, 0)]
