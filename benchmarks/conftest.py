"""What every benchmark shares: pinned thread count, the medians' context, one way to time."""

import os
from collections.abc import Callable

import pytest
import torch

import fastvae

THREADS = min(2, os.cpu_count() or 1)


@pytest.fixture(autouse=True)
def setting():
    """One seed, a fixed number of threads."""
    before = torch.get_num_threads()
    torch.manual_seed(0)
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def time(benchmark):
    """time(group, function, flops, rounds): the median of whole calls, after one to warm up."""

    def run(group: str, function: Callable[[], object], flops: float, rounds: int = 5) -> None:
        benchmark.group = f"{group}, {THREADS} threads"
        benchmark.pedantic(function, rounds=rounds, warmup_rounds=1)
        benchmark.extra_info |= {
            "threads": THREADS,
            "torch": torch.__version__,
            "cpu_capability": fastvae.cpu_capability(),
        }
        if flops and benchmark.stats:  # absent with --benchmark-disable
            benchmark.extra_info["GFLOP/s"] = flops / benchmark.stats.stats.median / 1e9

    return run
