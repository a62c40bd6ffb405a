"""The measured limits of the machine, which benchmarks take shares of."""

from time import perf_counter

import pytest
import torch

import fastvae
from fastvae import _C

BEST = fastvae.cpu_capability()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("kind", ["fp32", "bf16", "int8", "read"])
def test_is_a_rate_and_quick(kind, threads):
    start = perf_counter()
    rate = _C.machine_peak(kind, threads, 2.0)
    assert perf_counter() - start < 2  # a tenth of a second on a quiet machine
    assert 0.1 < rate < 1e5


def test_narrow_numbers_are_faster():
    """Four int8 stand where one float does; of AMX's instructions, one is worth many."""
    peaks = {kind: _C.machine_peak(kind, 1) for kind in ("fp32", "bf16", "int8")}
    assert peaks["int8"] > 1.2 * peaks["fp32"]
    if BEST == "amx":
        assert peaks["bf16"] > 3 * peaks["fp32"] and peaks["int8"] > 1.5 * peaks["bf16"]


def test_no_product_is_faster():
    """A loop that a compiler has shortened would claim less, or more, than a real product shows."""
    a, before = torch.randn(512, 512), torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = []
    for _ in range(20):
        start = perf_counter()
        a @ a
        seconds.append(perf_counter() - start)
    torch.set_num_threads(before)
    measured = 2 * 512**3 / min(seconds) / 1e9
    # No core issues more than two products and sums of vectors a cycle (NEON four), at 6.5 GHz.
    lanes = {"baseline": 4, "avx2": 8}.get(BEST, 16)
    most = 6.5 * 2 * 2 * max(lanes, 8)
    assert 0.8 * measured < _C.machine_peak("fp32", 1) < most


def test_cache_is_faster_than_memory():
    assert _C.machine_peak("read", 1, 0.2) > 1.2 * _C.machine_peak("read", 1, 300.0)


def test_level_is_obeyed():
    if BEST == "baseline":
        pytest.skip("this machine has one isa")
    best = _C.machine_peak("fp32", 1)
    _C.set_cpu_capability("baseline")
    try:
        assert _C.machine_peak("fp32", 1) < 0.7 * best  # vectors half as wide, or less
    finally:
        _C.set_cpu_capability(BEST)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (("fp16", 1), "kind must be"),
        (("fp32", 0), "threads must be"),
        (("read", 1), "megabytes must be"),
        (("read", 1, float("nan")), "megabytes must be"),
    ],
    ids=str,
)
def test_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        _C.machine_peak(*arguments)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("fp64", 8, 2, 1), "kind must be 'fp32' or 'bf16', got 'fp64'"),
        (("fp32", 0, 2, 1), "sizes must be 1 or more"),
        (("bf16", 8, 2, -1), "sizes must be 1 or more"),
        (("fp32", 2**40, 2**40, 1), "sizes too large"),
    ],
)
def test_gates_of_wrong_sizes(arguments, message, backward):
    with pytest.raises((ValueError, RuntimeError), match=message):
        _C.layer_norm_lstm_gates(*arguments, backward)
