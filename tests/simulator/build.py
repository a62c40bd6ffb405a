"""Compiles the kernels of csrc/cuda with the simulator, and counts what their launches ask for."""

import ctypes
import os
import subprocess
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch

ROOT = Path(__file__).parents[2]
HEADERS = Path(torch.__file__).parent / "include", ROOT / "tests/simulator"
FLAGS = "-std=c++20", "-O1", "-fPIC", "-DTORCH_TARGET_VERSION=0x020a000000000000"
# The compiler then calls the simulator at every access of memory, which counts them by address.
WATCHED = "-fsanitize=thread --param tsan-instrument-func-entry-exit=0"


class Counts(NamedTuple):
    """What a launch asks of a GPU, as simulator.cpp counts it."""

    read: int
    written: int
    accesses: int
    wide: int
    sectors: int
    fullest: int
    shared: int
    wavefronts: int
    free: int
    polls: int
    barriers: int
    exchanges: int


def load(folder: Path) -> ctypes.CDLL:
    """The kernels and the simulator as a library, whose ops are then the CPU's.

    SIMULATOR_FLAGS: flags of the compiler in place of those that count.
    """
    watched = os.environ.get("SIMULATOR_FLAGS", WATCHED).split()
    headers = [f"-I{path}" for path in HEADERS]
    # The compiler is not to run with the sanitizers of this process.
    environment = {name: v for name, v in os.environ.items() if name != "LD_PRELOAD"}

    def compile_one(source: Path) -> Path:
        target = folder / f"{source.stem}.o"
        extra = watched if source.suffix == ".cu" or watched != WATCHED.split() else ["-O2"]
        command = "g++", *FLAGS, *headers, *extra, "-x", "c++", "-Wno-unknown-pragmas"
        subprocess.run([*command, "-c", source, "-o", target], check=True, env=environment)
        return target

    sources = [*(ROOT / "csrc/cuda").glob("*.cu"), ROOT / "tests/simulator/simulator.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "simulator.so"
    torch_libraries = f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"
    link = "g++", "-shared", *objects, "-o", library, *torch_libraries
    subprocess.run(link, check=True, env=environment)
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(library)
    loaded.shared_memory_of_last_launch.restype = ctypes.c_int64
    loaded.counts_of_last_launch.restype = ctypes.POINTER(ctypes.c_int64)
    loaded.run_fault.restype = ctypes.c_char_p
    return loaded


def count(simulator: ctypes.CDLL, run: Callable[[int], object]) -> Counts:
    """What one step asks for: run(2) less run(1), launches of so many steps. Results are wrong."""
    simulator.set_counting(True)
    simulator.set_seed(0)
    found = []
    try:
        for steps in (1, 2):
            run(steps)
            numbers = simulator.counts_of_last_launch()
            found.append([numbers[i] for i in range(len(Counts._fields))])
    finally:
        simulator.set_counting(False)
    return Counts(*(second - first for first, second in zip(*found, strict=True)))
