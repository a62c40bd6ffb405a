"""Calls of every CPU op with arguments that nobody should give.

`python hostile_worker.py SEED COUNT` prints each error that is not one clear line; a crash ends the
process, and its last line names the call.
"""

import random
import sys

import torch

import fastvae

HUGE = (2**33 + 1, 2**41, 2**57, 2**62)
DTYPES = (torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool, torch.complex64)
FORBIDDEN = ("csrc/", "frame #", "torch_call_dispatcher", "enforce fail", "\n")


def valid(op: str | None = None) -> dict | list:
    """Small arguments that the op takes; None: of each op."""
    f = torch.randn
    T, B, H, V, D, N = 3, 2, 5, 7, 4, 2
    lstm = f(4 * H, H), f(4 * H), f(4 * H), f(B, H), f(B, H)
    saved, lengths = (f(T, B, H), f(T, B, 4 * H), f(T, B)), torch.tensor([3, 1])
    bytenet = f(2 * H, D), f(N, 3 * H, H, 2), f(V, H)
    norm = f(3 * H), f(3 * H), f(3 * H)
    decode = f(V, H), f(V)
    pack = fastvae.ops.decode_lstm_pack(f(4 * H, D), lstm[0], decode[0])
    pack_bytenet = fastvae.ops.decode_bytenet_pack(*bytenet)
    ids = torch.randint(V, (T, B))
    weights = f(4 * H, D), lstm[0], lstm[1], lstm[2], *decode, lstm[3], lstm[4]
    everything = {
        "linear": [f(T, B, D), f(H, D + V), f(H), ids],
        "linear_backward": [f(T, B, H), f(T, B, D), f(H, D + V), ids],
        "layer_norm_lstm": [f(T, B, 4 * H), *lstm, 1e-4, True, lengths],
        "layer_norm_lstm packed": [f(4, 4 * H), *lstm, 1e-4, True, lengths],
        "layer_norm_lstm_backward": [f(T, B, H), f(B, H), *lstm, f(T, B, H), *saved, lengths],
        "layer_norm_lstm_backward packed": [
            *(f(4, H), f(B, H), *lstm, f(4, H), *(t.flatten(0, 1)[:4] for t in saved), lengths)
        ],
        "highway_conv_project": [f(T, B, H), f(3 * H, H, 2), f(3 * H)],
        "highway_conv_project_backward": [
            *(f(T, B, 3 * H), *norm[:2], f(T, B, H), f(3 * H, H, 2), f(T, B, 3 * H), norm[2])
        ],
        "highway_conv_gate": [f(T, B, 3 * H), f(T, B, H), *norm, True],
        "highway_conv_gate_backward": [f(T, B, H), f(T, B, 3 * H), f(T, B, H), *norm, True],
        "highway_conv": [f(T, B, H), f(3 * H, H, 2), f(3 * H), True],
        "unfold": [f(2 * T, B, H)],
        "fold": [f(T, B, H, 3), f(H)],
        "decode_lstm_pack": [f(4 * H, D), lstm[0], decode[0], f(V + 1, 4 * H), False],
        "decode_bytenet_pack": [*bytenet, False],
        "decode_lstm": [
            *(f(T, B, D), weights[0], f(V + 1, 4 * H), *weights[1:]),
            *(f(T, B, V), 1e-4, 1, 0, pack),
        ],
        "decode_bytenet": [
            *(f(T, B, D), bytenet[0], f(V + 1, 2 * H), bytenet[1], f(N, 3 * H), *decode),
            *(f(T, B, V), True, 1, 0, pack_bytenet),
        ],
    }
    return everything if op is None else everything[op]


def hostile(rng: random.Random, value):
    """Another value in its place."""
    if isinstance(value, bool):
        return rng.choice([not value, 2, None])
    if isinstance(value, int):
        return rng.choice([0, -1, -(2**63), 2**63 - 1, 2**31, 5])
    if isinstance(value, float):
        return rng.choice([float("nan"), float("inf"), -1.0, 0.0, 1e308])
    sizes = list(value.shape)
    kind = rng.randrange(11)
    if kind == 0:
        return value.to(rng.choice(DTYPES))
    if kind == 1:
        return torch.empty(sizes, device="meta", dtype=value.dtype)
    if kind == 2 and sizes:
        sizes[rng.randrange(len(sizes))] = rng.choice((0, 1, 2, 9))
        return torch.zeros(sizes, dtype=value.dtype)
    if kind == 3 and sizes:  # a repeated element takes no memory
        for n in rng.sample(range(len(sizes)), rng.randint(1, len(sizes))):
            sizes[n] = rng.choice(HUGE) if rng.random() < 0.5 else sizes[n]
        try:
            return torch.zeros((), dtype=value.dtype).expand(sizes)
        except RuntimeError:  # torch's own limit
            return value
    if kind == 4:
        return value.unsqueeze(rng.randint(0, len(sizes)))
    if kind == 5 and sizes:
        return value.flatten()
    if kind == 6 and len(sizes) > 1:
        return value.transpose(0, -1).contiguous().transpose(0, -1)
    if kind == 7:
        return None
    if kind == 8 and value.dtype == torch.int64:
        return value.fill_(rng.choice((-1, 2**62, -(2**63), 99)))
    if kind == 8 and value.dtype.is_floating_point:
        return value.fill_(rng.choice((float("nan"), float("inf"), 1e38, -0.0)))
    if kind == 9 and value.dtype == torch.uint8:
        value = value.clone()
        value[rng.randrange(min(64, len(value)))] ^= 1 << rng.randrange(8)
        return value[: rng.choice((0, 1, 63, 64, len(value) - 1, len(value)))]
    return value[:0] if sizes else value


def main() -> None:
    seed, count = map(int, sys.argv[1:])
    rng = random.Random(seed)
    torch.manual_seed(seed)
    ops = list(valid())
    for call in range(count):
        op = rng.choice(ops)
        arguments = valid(op)
        changed = min(rng.choice((1, 1, 1, 2, 3)), len(arguments))
        for n in rng.sample(range(len(arguments)), changed):
            arguments[n] = hostile(rng, arguments[n]) if arguments[n] is not None else None
        print(f"{call} {op}", file=sys.stderr)
        try:
            getattr(torch.ops.fastvae, op.split()[0])(*arguments)
        except RuntimeError as error:
            text = str(error)
            # What the dispatcher says of arguments that do not fit a schema is torch's own.
            if (
                any(part in text for part in FORBIDDEN)
                and "_call_impl" not in text
                and "schema" not in text
            ):
                print(f"seed {seed}, call {call}, {op}: {text[:500]!r}")


if __name__ == "__main__":
    main()
