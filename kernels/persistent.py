"""Kernels of csrc/cuda: one launch a sequence, whose blocks keep the weights and pass vectors on.

Here is planned who computes what, a pure function of sizes, and made what the launches are given.
The equations stand with the ops; how blocks exchange data, in csrc/cuda/exchange.cuh.
"""

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

THREADS = 256  # of a block
WARPS = THREADS // 32
MAX_GROUP_SIZE, MAX_CLASSIFIER_BLOCKS = 160, 32  # blocks that group_batch a step, and a choice
MOST_HIDDEN, MOST_CHANNELS, MOST_SYMBOLS = 1024, 512, 512
BATCH = 128  # sequences of a launch: what they exchange is memory
COLUMNS = {2: (8, 16, 32), 4: (1, 8)}  # by bytes of a number
DTYPES = {
    "layer_norm_lstm": (torch.bfloat16, torch.float16),
    "decode_lstm": (torch.bfloat16, torch.float32),
    "decode_bytenet": (torch.bfloat16, torch.float32),
}
CAPABILITY = 8, 0  # the least that they are compiled for


class Served(NamedTuple):
    """What a kernel serves: the most sequences by bytes of a number, and from which size on."""

    most: dict[int, int]
    least: int = 0


# Where results on a GPU, in benchmarks/results, are better than those of the Triton path.
SERVING = {"decode_bytenet": Served({2: 256, 4: 128}, least=256)}
EVERYTHING = Served({2: sys.maxsize, 4: sys.maxsize})


class Machine(NamedTuple):
    """What a device has: multiprocessors, and bytes of shared memory for a block."""

    processors: int
    shared: int


class Plan(NamedTuple):
    """Groups of blocks divide the sequences, a group's blocks the cells: `units` each.

    columns: sequences that a block takes at once. threads: of a block.
    """

    groups: int
    units: int
    columns: int
    threads: int = THREADS


class NetPlan(NamedTuple):
    """The same for each layer of a group; its `classifier_blocks` divide the candidates."""

    groups: int
    units: int
    classifier_blocks: int
    columns: int
    threads: int = THREADS


class Block(NamedTuple):
    """Bytes of shared memory that a block holds, and words that pass through it at a step."""

    shared: int
    work: int


def serving(op: str, like: Tensor, sequences: int, size: int) -> Machine | None:
    """The machine of a tensor, where a persistent kernel serves the op for so many sequences.

    size: H, or C.
    """
    if not (like.is_cuda and built(op) and serves(op, like.dtype, sequences, size)):
        return None
    return machine(like.device) if torch.cuda.get_device_capability() >= CAPABILITY else None


def serves(op: str, dtype: torch.dtype, sequences: int, size: int) -> bool:
    """Whether a persistent kernel is to serve the op, where there is one."""
    served = SERVING.get(op)
    if served is None or dtype not in DTYPES[op]:
        return False
    return sequences <= served.most[dtype.itemsize] and size >= served.least


def built(op: str) -> bool:
    """Whether the op's kernel was compiled for GPUs."""
    return torch._C._dispatch_has_kernel_for_dispatch_key(f"fastvae::{op}_persistent", "CUDA")


@contextmanager
def serve(ops: Iterable[str] = tuple(DTYPES)) -> Iterator[None]:
    """Inside it exactly these ops are served, at every size: for tests and benchmarks."""
    before = dict(SERVING)
    SERVING.clear()
    SERVING.update(dict.fromkeys(ops, EVERYTHING))
    try:
        yield
    finally:
        SERVING.clear()
        SERVING.update(before)


def machine(device: torch.device) -> Machine:
    found = torch.cuda.get_device_properties(device)
    return Machine(found.multi_processor_count, found.shared_memory_per_block_optin)


@lru_cache(256)
def plan_lstm(H: int, B: int, itemsize: int, machine: Machine, V: int = 0) -> Plan | None:
    """The plan with the least work, or None for a shape that these kernels are not made for.

    V is 0 where nothing is decoded.
    """
    return min(lstm_plans(H, B, itemsize, machine, V), default=(0, None))[1]


def lstm_plans(
    H: int, B: int, itemsize: int, machine: Machine, V: int = 0
) -> Iterator[tuple[tuple[int, ...], Plan]]:
    """Every plan that the machine has room for, and its cost: the least is best."""
    if H > MOST_HIDDEN or V > MOST_SYMBOLS or itemsize not in COLUMNS:
        return
    for columns, groups, group_batch in _splits(min(B, BATCH), itemsize, machine.processors):
        units = _units(H, min(machine.processors // groups, MAX_GROUP_SIZE))
        candidates = -(-V // -(-H // units))
        block = lstm_block(units, candidates, H, columns, group_batch, itemsize)
        if block.shared <= machine.shared:
            yield (block.work, -groups), Plan(groups, units, columns)


@lru_cache(256)
def plan_bytenet(
    C: int, layers: int, V: int, B: int, itemsize: int, machine: Machine
) -> NetPlan | None:
    """The same for a decoder of masked convolutions."""
    return min(bytenet_plans(C, layers, V, B, itemsize, machine), default=(0, None))[1]


def bytenet_plans(
    C: int, layers: int, V: int, B: int, itemsize: int, machine: Machine
) -> Iterator[tuple[tuple[float, ...], NetPlan]]:
    if not layers or C > MOST_CHANNELS or V > MOST_SYMBOLS or itemsize not in COLUMNS:
        return
    most = machine.processors // (layers + 1)
    for columns, groups, group_batch in _splits(min(B, BATCH), itemsize, most):
        for classifier_blocks in range(1, min(V, MAX_CLASSIFIER_BLOCKS) + 1):
            candidates = -(-V // classifier_blocks)
            group_size = min(
                (machine.processors // groups - classifier_blocks) // layers, MAX_GROUP_SIZE
            )
            if group_size < 1 or candidates * (classifier_blocks - 1) >= V:
                continue
            units = _units(C, group_size)
            blocks = net_blocks(units, candidates, C, columns, group_batch, itemsize)
            if max(block.shared for block in blocks) <= machine.shared:
                stage = max(
                    net_stage(rows, C, columns, itemsize) for rows in (3 * units, candidates)
                )
                # Slices follow each other, or one alone passes all layers, in half a stage each.
                time = max(-(-group_batch // columns) * stage, (layers + 1) * stage / 2)
                yield (
                    (time, -groups, classifier_blocks),
                    NetPlan(groups, units, classifier_blocks, columns),
                )


def net_stage(rows: int, C: int, columns: int, itemsize: int) -> float:
    """About how long a block takes for a slice of a step, µs, fitted to an H100's times."""
    if itemsize == 2:
        return 2 + columns / 2 + rows * C * columns / 76_800
    passes = -(-rows // 32)  # of a warp's lanes over the rows
    return 2.5 + passes * (1.6 + columns / 3) * C / 256


def _splits(B: int, itemsize: int, most: int) -> Iterator[tuple[int, int, int]]:
    """Columns, groups, and a group's sequences, such that each group has one."""
    for columns in COLUMNS[itemsize]:
        for groups in range(1, min(B, most) + 1):
            group_batch = -(-B // groups)
            if group_batch * (groups - 1) < B:
                yield columns, groups, group_batch


def _units(size: int, group_size: int) -> int:
    return -(-size // group_size // 4) * 4


def lstm_block(
    units: int,
    candidates: int,
    H: int,
    columns: int,
    group_batch: int,
    itemsize: int,
    warps: int = WARPS,
) -> Block:
    """Gates of `units` cells and, of each candidate, its logit and its cross in one part or two."""
    slices = -(-group_batch // columns)
    rows = 4 * units + (3 if itemsize == 2 else 2) * candidates
    product = _product(rows, H, columns, itemsize, warps)
    state = [4 * units * slices * columns, units * slices * columns, columns, columns]
    if candidates:
        state += [candidates * columns, candidates * columns, columns, group_batch]
    return Block(_bytes([*product, *state]), slices * _work(*product))


def net_blocks(
    units: int,
    candidates: int,
    C: int,
    columns: int,
    group_batch: int,
    itemsize: int,
    warps: int = WARPS,
) -> tuple[Block, Block]:
    """A layer's block, whose weights of the step before are as many again, and a classifier's."""
    slices = -(-group_batch // columns)
    both = [columns, group_batch, slices]
    product = _product(3 * units, C, columns, itemsize, warps)
    shared = _bytes([product[0], *product, slices * 3 * units * columns, *both])
    layer = Block(shared, 2 * slices * _work(*product))
    product = _product(candidates, C, columns, itemsize, warps)
    classifier = Block(_bytes([*product, candidates * columns, *both]), slices * _work(*product))
    return layer, classifier


def _product(rows: int, depth: int, columns: int, itemsize: int, warps: int) -> list[int]:
    """Words of weights, columns and partial sums (csrc/cuda/matrix.cuh)."""
    if itemsize == 4:
        return [rows * depth, columns * depth, warps * columns * rows]
    tiles, deep = -(-rows // 16), -(-depth // 16)
    return [tiles * deep * 128, columns * (8 * deep + 4), warps * columns * 16 * tiles]


def _work(weights: int, columns: int, partial: int) -> int:
    return weights + columns + 2 * partial


def _bytes(words: list[int]) -> int:
    return sum(-(-n // 4) * 16 for n in words)


def layer_norm_lstm(*inputs, plan: Plan) -> tuple[Tensor, ...]:
    """The op `layer_norm_lstm`, in launches of BATCH sequences: its tensors, eps and save."""
    x, *weights, h0, c0, eps, save = inputs
    parts = [
        torch.ops.fastvae.layer_norm_lstm_persistent(
            x[:, part], *weights, h0[part], c0[part], eps, save, *plan
        )
        for part in _batches(len(h0))
    ]
    if len(parts) == 1:
        return parts[0]
    h, c_n, *saved = zip(*parts, strict=True)
    return (
        torch.cat(h, 1),
        torch.cat(c_n),
        *(torch.cat(t, 1) if save else t[0] for t in saved),
    )


def _batches(B: int) -> list[slice]:
    return [slice(first, first + BATCH) for first in range(0, B, BATCH)]


def decode_lstm(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    noise: Tensor | None,
    eps: float,
    end_id: int | None,
    pad_id: int | None,
    plan: Plan,
) -> Tensor:
    """The op `decode_lstm`, in launches of BATCH sequences."""
    embeddings, recurrent = token_embeddings.float(), weight_hh.float()
    means = embeddings.mean(1)
    centered = embeddings - means[:, None]
    squares = centered.square().sum(1)
    # Of each token: what its choice adds to the squares of the next step, by h and by features.
    by_state, by_features = (2 * centered[:-1] @ w for w in (recurrent, feature_weight.float()))
    cross_weight = [by_state.to(h0.dtype)]
    if h0.dtype.itemsize == 2:
        cross_weight.append((by_state - cross_weight[0].float()).to(h0.dtype))
    fixed = token_embeddings, means, weight_hh, norm_weight, norm_bias, classifier_weight
    fixed = *fixed, classifier_bias, torch.stack(cross_weight)
    tokens = []
    for part in _batches(len(h0)):
        d, h, c = features[:, part], h0[part], c0[part]
        projected = F.linear(d, feature_weight)
        before = projected[0].float() + h.float() @ recurrent.T
        tokens.append(
            torch.ops.fastvae.decode_lstm_persistent(
                projected,
                F.linear(d.float(), by_features, squares[:-1]),
                2 * (before @ centered[-1]) + squares[-1],
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


def decode_bytenet(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    noise: Tensor | None,
    carry: bool,
    end_id: int | None,
    pad_id: int | None,
    plan: NetPlan,
) -> Tensor:
    """The op `decode_bytenet`, in launches of BATCH sequences."""
    taps = conv_weight.permute(0, 3, 1, 2).contiguous()
    tokens = [
        torch.ops.fastvae.decode_bytenet_persistent(
            F.linear(features[:, part], feature_weight),
            token_embeddings,
            taps,
            conv_bias,
            classifier_weight,
            classifier_bias,
            None if noise is None else noise[:, part],
            carry,
            end_id,
            pad_id,
            *plan,
        )
        for part in _batches(features.shape[1])
    ]
    return torch.cat(tokens)
