"""The persistent kernels of csrc/cuda, run on the host by tests/simulator in many orders of their threads.

The sources are those that nvcc compiles, launchers included: their launches run as fibers, and words
that blocks exchange arrive late and in any order.
"""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import test_decode_lstm as decoding
import test_layer_norm_lstm as lstm
import torch

from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference
from fastvae.testing import assert_accurate

persistent = pytest.importorskip("fastvae.kernels.persistent")
ROOT = Path(__file__).parents[1]
THREADS = 64
SEEDS = range(8)


@pytest.fixture(scope="session")
def simulator(tmp_path_factory):
    """The kernels as CPU ops, and their library."""
    compiler = shutil.which("g++")
    if not compiler:
        pytest.skip("the simulator is compiled with g++")
    torch_folder, library = Path(torch.__file__).parent, tmp_path_factory.mktemp("so") / "so.so"
    subprocess.run(
        [
            *(compiler, "-std=c++20", "-O1", "-fPIC", "-shared", "-o", library),
            *("-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{torch_folder / 'include'}"),
            *(f"-I{ROOT / 'tests/simulator'}", ROOT / "tests/simulator/simulator.cpp"),
            *(f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"),
        ],
        check=True,
    )
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(library)
    loaded.shared_memory_of_last_launch.restype = ctypes.c_int64
    return loaded


def plan(groups, units, columns):
    return persistent.Plan(groups, units, columns, THREADS)


# (T, B, H), groups, units: one block, several, a last one with less, several groups, several slices
LSTM = [((1, 1, 1), 1, 4), ((4, 3, 7), 1, 4), ((3, 5, 16), 2, 8), ((3, 19, 20), 1, 8)]
LSTM += [((3, 11, 26), 3, 12), ((2, 2, 49), 2, 16)]


@pytest.mark.parametrize("columns", [8, 16])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape, groups, units", LSTM, ids=str)
def test_layer_norm_lstm(simulator, shape, groups, units, dtype, columns):
    def op(*inputs):
        return torch.ops.fastvae.layer_norm_lstm_persistent(
            *inputs, 1e-4, False, *plan(groups, units, columns)
        )[:2]

    assert_accurate(op, layer_norm_lstm_reference, *lstm.make(shape, dtype))
