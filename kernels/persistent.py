"""Kernels of csrc/cuda: one launch a sequence, whose blocks keep the weights and pass vectors on.

Here is planned who computes what, a pure function of sizes, and made what the launches are given.
The equations stand with the ops; how blocks exchange data, in csrc/cuda/exchange.cuh.
"""

import math
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
TILES = {8: 8, 16: 5, 32: 4}  # of 16 rows, for which h is read once (csrc/cuda/fragments.cuh)
MOST_DECODING_COLUMNS = 16  # with the LSTM
DIRECT = 8  # sequences of a group whose offers every block reads (csrc/cuda/owners.cuh)
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


class Limits(NamedTuple):
    """What a step is bound by: microseconds, and per microsecond of one multiprocessor.

    Measured on an H100 (benchmarks/results/h100-limits.json, h100.json), except for `mma`, the part
    of the peak that mma.sync reaches on Hopper (Luo et al. 2024, arXiv:2402.13499), and `slice`, an
    estimate: about 700 cycles of instructions that depend on each other.
    """

    exchange: float = 0.73  # all-gather of 256 bytes a block
    l2: float = 61_250  # bytes: 8085 GB/s of 132 multiprocessors
    shared: float = 254_700  # bytes: 33,620 GB/s
    peak: float = 2_794_000  # multiply-adds of 16-bit numbers: 737,571 GFLOP/s
    mma: float = 0.62
    slice: float = 0.4


LIMITS = Limits()


class Cost(NamedTuple):
    """Of a step of the LSTM, by counting: bytes of L2 of the whole grid, the rest of one block."""

    l2: int
    exchanges: int
    shared: int  # bytes through shared memory
    products: int  # multiply-adds
    slices: int

    def time(self, blocks: int, limits: Limits = LIMITS) -> float:
        """Predicted microseconds."""
        product = max(self.shared / limits.shared, self.products / (limits.peak * limits.mma))
        waits = self.exchanges * limits.exchange + self.slices * limits.slice
        return waits + self.l2 / blocks / limits.l2 + product


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
def plan_lstm(
    H: int, B: int, itemsize: int, machine: Machine, V: int = 0, below: float = math.inf
) -> Plan | None:
    """The plan of the least predicted time, or None for a shape that has no plan.

    V is 0 where nothing is decoded. below: microseconds a step; a plan that takes as long is none.
    """
    cost, plan = min(lstm_plans(H, B, itemsize, machine, V), default=((math.inf,), None))
    return plan if cost[0] < below else None


def lstm_plans(
    H: int, B: int, itemsize: int, machine: Machine, V: int = 0
) -> Iterator[tuple[tuple[float, ...], Plan]]:
    """Every plan that the machine has room for, and its cost: the least is best."""
    if H > MOST_HIDDEN or V > MOST_SYMBOLS or itemsize not in COLUMNS:
        return
    B = min(B, BATCH)
    for columns, groups, group_batch in _splits(B, itemsize, machine.processors):
        units = _units(H, min(machine.processors // groups, MAX_GROUP_SIZE))
        plan = Plan(groups, units, columns)
        if V and columns > MOST_DECODING_COLUMNS:
            continue
        if lstm_shared(plan, V, H, group_batch, itemsize) <= machine.shared:
            time = lstm_cost(plan, V, H, B, itemsize).time(-(-H // units) * groups)
            yield (time, -groups), plan


def rival(op: str, itemsize: int, B: int, layers: int = 0) -> float:
    """Microseconds a step of the Triton path that a plan has to beat, for each of its launches.

    Fitted to an H100's (benchmarks/results/h100-sweep.json); infinite where everything is served.
    layers: of `decode_bytenet`, for which Triton launches as much for each, and for the classifier.
    """
    if SERVING.get(op) is EVERYTHING:
        return math.inf
    if op == "decode_bytenet":
        fixed, each = {2: (13.5, 0.004), 4: (9.5, 0.07)}[itemsize]
    else:
        fixed, each = {2: (7.0, 0.03), 4: (10.5, 0.32)}[itemsize]
    return (layers + 1) * (fixed + each * B) / -(-B // BATCH)


@lru_cache(256)
def plan_bytenet(
    C: int,
    layers: int,
    V: int,
    B: int,
    itemsize: int,
    machine: Machine,
    below: float = math.inf,
) -> NetPlan | None:
    """The same for a decoder of masked convolutions."""
    plans = bytenet_plans(C, layers, V, B, itemsize, machine)
    cost, plan = min(plans, default=((math.inf,), None))
    return plan if cost[0] < below else None


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


def lstm_rows(plan: Plan, V: int, H: int, itemsize: int) -> tuple[int, int]:
    """Candidates of a block, and rows of its weights.

    Each candidate has its logit's row, and its cross in one part or two.
    """
    candidates = -(-V // -(-H // plan.units))
    return candidates, 4 * plan.units + (3 if itemsize == 2 else 2) * candidates


def lstm_shared(plan: Plan, V: int, H: int, group_batch: int, itemsize: int) -> int:
    """Bytes of shared memory of a block (csrc/cuda/recurrence.cuh, decode_lstm.cu)."""
    _, units, N, threads = plan
    candidates, rows = lstm_rows(plan, V, H, itemsize)
    warps, sequences = threads // 32, -(-group_batch // N) * N
    words = _fragments(rows, H, N, warps) if itemsize == 2 else _product(rows, H, N, 4, warps)
    stage = (-(-(units * itemsize // 4) // 4) // 2 * 2 + 1) * 4
    words += [4 * units * sequences, units * sequences, units * sequences * itemsize]
    words += [sequences * stage, warps * 3 * N, 8 * units, sequences, sequences]
    if V:
        words += [candidates * N, candidates * N, 2 * candidates * sequences, candidates, V + 1]
        words += [sequences, sequences]
    return _bytes(words)


def lstm_cost(plan: Plan, V: int, H: int, B: int, itemsize: int) -> Cost:
    """What a step asks of the machine, counted as tests/simulator counts it (owners.cuh)."""
    groups, units, N, threads = plan
    group_size, group_batch, warps = -(-H // units), -(-B // groups), threads // 32
    _, rows = lstm_rows(plan, V, H, itemsize)
    slices, owned = -(-group_batch // N), group_batch > DIRECT and group_size > 1
    offer, result = (32, 16) if V else (8, 8)
    state = -(-H // 8) * 8 * itemsize
    reads = -(-rows // 16 // TILES[N]) if itemsize == 2 else 1
    l2 = group_size * B * (reads * state + offer)  # every block reads h; and writes an offer
    l2 += B * state + (2 if V else 1) * B * 4 * H * itemsize  # new h; input, embeddings
    l2 += group_size * B * (result + offer if owned else group_size * offer)
    rows = -(-rows // 16) * 16 if itemsize == 2 else rows
    if itemsize == 2:
        through = rows * -(-H // 32) * 64 + 4 * (warps + 1) // 2 * rows * N * 4
    else:  # a word of weights and N of columns for N products of 32 rows
        through = -(-rows // 32) * H * (1 + N) * 128 + 2 * warps * rows * N * 4
    through += 6 * 4 * units * N * 4
    return Cost(l2, 3 if owned else 2, slices * through, slices * rows * H * N, slices)


def _fragments(rows: int, depth: int, columns: int, warps: int) -> list[int]:
    """Words of weights, columns and partial sums (csrc/cuda/fragments.cuh)."""
    tiles, slots = -(-rows // 16), (warps + 1) // 2
    return [tiles * -(-depth // 32) * 256, 0, slots * 4 * (4 * tiles * columns + 8)]


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


class Tables(NamedTuple):
    """What `decode_lstm` makes of the weights alone: what a token adds to the squares, and means.

    Ẽ are the token embeddings less their means. means, squares |Ẽ|²: [V + 1]; by_state, of which
    the last is what rounding left: 2 Ẽ W [1 or 2, V, H]; by_features: 2 Ẽ W_d [V, D]; of the start
    token, start: 2 Ẽ [4H]; start_by_state: 2 Ẽ W [H].
    """

    means: Tensor
    squares: Tensor
    by_state: Tensor
    by_features: Tensor
    start: Tensor
    start_by_state: Tensor


def lstm_tables(feature_weight: Tensor, token_embeddings: Tensor, weight_hh: Tensor) -> Tables:
    """The tables of weights [4H, D], [V + 1, 4H], [4H, H]."""
    embeddings, recurrent, dtype = token_embeddings.float(), weight_hh.float(), weight_hh.dtype
    means = embeddings.mean(1)
    centered = embeddings - means[:, None]
    by_state, by_features = (2 * centered[:-1] @ w for w in (recurrent, feature_weight.float()))
    parts = [by_state.to(dtype)]
    if dtype.itemsize == 2:
        parts.append((by_state - parts[0].float()).to(dtype))
    return Tables(
        means=means,
        squares=centered.square().sum(1),
        by_state=torch.stack(parts),
        by_features=by_features,
        start=2 * centered[-1],
        start_by_state=2 * centered[-1] @ recurrent,
    )


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
    tables: Tables | None = None,
) -> Tensor:
    """The op `decode_lstm`, in launches of BATCH sequences."""
    if tables is None:
        tables = lstm_tables(feature_weight, token_embeddings, weight_hh)
    fixed = token_embeddings, tables.means, weight_hh, norm_weight, norm_bias, classifier_weight
    fixed = *fixed, classifier_bias, tables.by_state
    start_square = tables.squares[-1]
    tokens = []
    for part in _batches(len(h0)):
        d, h, c = features[:, part], h0[part], c0[part]
        projected = F.linear(d, feature_weight)
        tokens.append(
            torch.ops.fastvae.decode_lstm_persistent(
                projected,
                F.linear(d.float(), tables.by_features, tables.squares[:-1]),
                projected[0].float() @ tables.start
                + h.float() @ tables.start_by_state
                + start_square,
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
