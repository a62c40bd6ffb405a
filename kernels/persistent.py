"""Kernels of csrc/cuda: one launch a sequence, whose blocks keep the weights and pass vectors on.

Here is planned who computes what, a pure function of sizes, and made what the launches are given.
The equations stand with the ops; how blocks exchange data, in csrc/cuda/exchange.h.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

THREADS = 256
MOST_MEMBERS = 160  # blocks that share a step
MOST_HIDDEN, MOST_SYMBOLS = 1024, 512
BATCH = 128  # sequences of a launch: what they exchange is memory
OFFERED = 3  # rows of a candidate beside the gates': its logit, and its cross in two parts
COLUMNS = {2: (8, 16, 32), 4: (1, 8)}  # by bytes of a number


class Machine(NamedTuple):
    """What a device has: multiprocessors, and bytes of shared memory for a block."""

    processors: int
    shared: int

    @classmethod
    def of(cls, device: torch.device) -> "Machine":
        found = torch.cuda.get_device_properties(device)
        return cls(found.multi_processor_count, found.shared_memory_per_block_optin)


class Plan(NamedTuple):
    """Groups of blocks divide the sequences, a group's blocks the cells: `units` each.

    columns: sequences that a block takes at once. threads: of a block.
    """

    groups: int
    units: int
    columns: int
    threads: int


class Block(NamedTuple):
    """What a block holds in shared memory: sizes, and bytes of a number of its weights."""

    units: int
    candidates: int
    hidden: int
    columns: int
    sequences: int
    itemsize: int

    @property
    def slices(self) -> int:
        return -(-self.sequences // self.columns)

    def words(self) -> list[int]:
        """Of weights, columns and partial sums, which every slice passes through; of the rest."""
        short = self.itemsize == 2
        more = (OFFERED if short else OFFERED - 1) * self.candidates
        rows, deep = 4 * self.units + more, -(-self.hidden // 16)
        tiles = -(-rows // 16)
        weights = tiles * deep * 128 if short else rows * self.hidden
        columns = self.columns * (8 * deep + 4 if short else self.hidden)
        partial = THREADS // 32 * self.columns * (16 * tiles if short else rows)
        state = [4 * self.units * self.slices, self.units * self.slices, 1, 1]
        if self.candidates:
            state += [self.candidates, self.candidates, 1]
        rest = [n * self.columns for n in state] + ([self.sequences] if self.candidates else [])
        return [weights, columns, partial, *rest]

    def shared(self) -> int:
        """Bytes."""
        return sum(-(-words // 4) * 16 for words in self.words())

    def work(self) -> int:
        """Words that pass through shared memory at a step."""
        weights, columns, partial, *_ = self.words()
        return self.slices * (weights + columns + 2 * partial)


def plan_lstm(H: int, B: int, itemsize: int, machine: Machine, V: int = 0) -> Plan | None:
    """The plan that moves least in shared memory, or None where the shape is not for these kernels.

    V is 0 where nothing is decoded. B up to BATCH.
    """
    if H > MOST_HIDDEN or V > MOST_SYMBOLS or B > BATCH or itemsize not in COLUMNS:
        return None
    fitting = [p for p in _plans(H, B, V, itemsize, machine) if p[0].shared() <= machine.shared]
    return min(fitting, key=lambda p: (p[0].work(), -p[1].groups))[1] if fitting else None


def _plans(
    H: int, B: int, V: int, itemsize: int, machine: Machine
) -> Iterator[tuple[Block, Plan]]:
    for columns in COLUMNS[itemsize]:
        for groups in range(1, min(B, machine.processors) + 1):
            share = -(-B // groups)
            if share * (groups - 1) >= B:
                continue
            units = -(-H // min(machine.processors // groups, MOST_MEMBERS) // 4) * 4
            candidates = -(-V // -(-H // units))
            block = Block(units, candidates, H, columns, share, itemsize)
            yield block, Plan(groups, units, columns, THREADS)


def decode_lstm(
    features: Tensor,
    feature_weight: Tensor,
    symbol_rows: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    noise: Tensor | None,
    eps: float,
    end_id: int,
    pad_id: int,
    plan: Plan,
) -> Tensor:
    """`fastvae.ops.decode_lstm` in launches of BATCH sequences."""
    wide, recurrent = symbol_rows.float(), weight_hh.float()
    means = wide.mean(1)
    centred = wide - means[:, None]
    squares = centred.square().sum(1)
    # Of each symbol: what its choice adds to the squares of the next step, by h and by features.
    by_state, by_features = (2 * centred[:-1] @ w for w in (recurrent, feature_weight.float()))
    cross_weight = [by_state.to(h0.dtype)]
    if h0.dtype.itemsize == 2:
        cross_weight.append((by_state - cross_weight[0].float()).to(h0.dtype))
    fixed = symbol_rows, means, weight_hh, norm_weight, norm_bias, classifier_weight
    fixed = *fixed, classifier_bias, torch.stack(cross_weight)
    tokens = []
    for first in range(0, len(h0), BATCH):
        part = slice(first, first + BATCH)
        d, h, c = features[:, part], h0[part], c0[part]
        projected = F.linear(d, feature_weight)
        before = projected[0].float() + h.float() @ recurrent.T
        tokens.append(
            torch.ops.fastvae.decode_lstm_persistent(
                projected,
                F.linear(d.float(), by_features, squares[:-1]),
                2 * (before @ centred[-1]) + squares[-1],
                *fixed,
                h,
                c,
                None if noise is None else noise[:, part],
                eps,
                end_id,
                pad_id,
                *plan,
            )
        )
    return torch.cat(tokens)
