"""What a step of the persistent kernels asks of a GPU, counted by the simulator from their source.

The budgets hold for the plans that an H100 gets at the paper's size, in bfloat16.
"""

import pytest
import torch
from simulator import build

persistent = pytest.importorskip("fastvae.kernels.persistent")
H100 = persistent.Machine(132, 232_448)
H, V, D = 1000, 259, 8
BATCHES = 1, 16, 32, 128
# Megabytes of L2 a step. With B 128 every block of two groups of 63 reads the h of 64 sequences,
# 16 MB: docs/performance.md tells why it cannot be the 6 that were aimed at.
L2 = {
    "layer_norm_lstm": {1: 0.5, 16: 3.2, 32: 5.2, 128: 20},
    "decode_lstm": {1: 1, 16: 5, 32: 5.6, 128: 22},
}


def zeros(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.bfloat16)


def layer_norm_lstm(B: int, plan, steps: int) -> None:
    norm = zeros(4 * H), zeros(4 * H)
    inputs = zeros(steps, B, 4 * H), zeros(4 * H, H), *norm, zeros(B, H), zeros(B, H)
    persistent.layer_norm_lstm(*inputs, 1e-4, False, plan=plan)


def decode_lstm(B: int, plan, steps: int) -> None:
    inputs = zeros(steps, B, D), zeros(4 * H, D), zeros(V + 1, 4 * H), zeros(4 * H, H)
    inputs += zeros(4 * H), zeros(4 * H), zeros(V, H), zeros(V), zeros(B, H), zeros(B, H)
    persistent.decode_lstm(*inputs, None, 1e-4, None, None, plan)


RUNS = {"layer_norm_lstm": (layer_norm_lstm, 0), "decode_lstm": (decode_lstm, V)}


@pytest.mark.parametrize("B", BATCHES)
@pytest.mark.parametrize("op", RUNS)
def test_budgets(simulator, op, B):
    run, vocabulary = RUNS[op]
    plan = persistent.plan_lstm(H, B, 2, H100, vocabulary)
    counts = build.count(simulator, lambda steps: run(B, plan, steps))
    traffic = counts.read + counts.written
    assert 0 < traffic <= 1e6 * L2[op][B]
    assert 0 < counts.wavefronts <= 1.25 * counts.free
    assert counts.wide >= 0.9 * counts.accesses
    assert counts.sectors <= 1.15 * counts.fullest
    assert counts.exchanges == (2 if -(-B // plan.groups) <= persistent.DIRECT else 3)
    cost = persistent.lstm_cost(plan, vocabulary, H, B, 2)
    assert cost.exchanges == counts.exchanges and 0.85 < cost.l2 / traffic < 1.1
