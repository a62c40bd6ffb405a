"""Arguments that nobody should give: no call may end the process, each error is one clear line."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from hostile_worker import valid

WORKER = Path(__file__).with_name("hostile_worker.py")
SEEDS, CALLS = range(4), 700


@pytest.mark.parametrize("op", list(valid()))
def test_a_tensor_of_another_dtype_or_device_is_refused(op):
    """By the fake as by the kernel: an output of what it lets pass is memory that nobody wrote."""
    call, here = getattr(torch.ops.fastvae, op.split()[0]), valid(op)
    fake = [t.to("meta") if isinstance(t, torch.Tensor) else t for t in here]
    alone = sum(isinstance(t, torch.Tensor) for t in here) == 1
    for n, value in enumerate(here):
        if isinstance(value, torch.Tensor):
            for wrong, given in (
                (value.to(torch.complex64), here),
                (fake[n].to(torch.complex64), fake),
                *([] if alone else [(fake[n], here)]),
            ):
                with pytest.raises(RuntimeError, match=r"must (be|have)|takes float32"):
                    call(*given[:n], wrong, *given[n + 1 :])


@pytest.mark.parametrize("op", list(valid()))
def test_no_tensor_at_all_is_refused(op):
    """The dispatcher knows no device of them, and no kernel sees them."""
    inputs = [None if isinstance(t, torch.Tensor) else t for t in valid(op)]
    with pytest.raises(RuntimeError, match=r"^\w+ must be a tensor, got None$"):
        getattr(torch.ops.fastvae, op.split()[0])(*inputs)


def run(seed: int, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, WORKER, str(seed), str(CALLS)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def test_hostile_arguments(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda seed: run(seed, tmp_path), SEEDS):
            assert done.returncode == 0, done.stderr[-2000:]
            assert done.stderr.count("\n") >= CALLS  # every call was made
            assert done.stdout == ""
