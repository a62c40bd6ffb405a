"""Times every plan of the persistent kernels on the GPU at hand, beside the Triton path.

    python benchmarks/gpu_sweep.py [--output sweep.json] [--seconds 100]
    python benchmarks/gpu_sweep.py --plans

One step's time is that of T = 120 less that of T = 20, by 100, each a CUDA graph of the op alone.
The results of each plan are compared with the reference before it is timed.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastvae import ops
from fastvae.console import console, table
from fastvae.kernels import persistent
from fastvae.ops.decode_bytenet import bytenet_step
from fastvae.ops.decode_lstm import lstm_step, teacher_forced
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_reference
from fastvae.testing import assert_accurate, assert_best

SHORT, LONG = 20, 120  # steps
ROUNDS = 7
BATCHES = 1, 16, 32, 128
EPS = 1e-4
D, H, V = 200, 1000, 259
C, LAYERS, SYMBOLS = 256, 10, 51


def uniform(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.rand(shape, device="cuda").mul_(0.2).sub_(0.1).to(dtype)


def lstm_inputs(T: int, B: int, dtype: torch.dtype) -> list[Tensor]:
    norm = torch.ones(4 * H, device="cuda", dtype=dtype), uniform(4 * H, dtype=dtype)
    state = (uniform(B, H, dtype=dtype) for _ in range(2))
    return [uniform(T, B, 4 * H, dtype=dtype) * 10, uniform(4 * H, H, dtype=dtype), *norm, *state]


def decode_inputs(T: int, B: int, dtype: torch.dtype) -> list[Tensor]:
    _, weight, *rest = lstm_inputs(1, B, dtype)
    norm, state = rest[:2], rest[2:]
    shapes = (4 * H, D), (V + 1, 4 * H)
    projections = (uniform(*shape, dtype=dtype) for shape in shapes)
    classifier = uniform(V, H, dtype=dtype), uniform(V, dtype=dtype)
    features = uniform(T, B, D, dtype=dtype) * 10
    return [features, *projections, weight, *norm, *classifier, *state]


def bytenet_inputs(T: int, B: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = (2 * C, D), (SYMBOLS + 1, 2 * C), (LAYERS, 3 * C, C, 2), (LAYERS, 3 * C)
    shapes += (SYMBOLS, C), (SYMBOLS,)
    return [uniform(T, B, D, dtype=dtype) * 10, *(uniform(*shape, dtype=dtype) for shape in shapes)]


def check_lstm(run: Callable, inputs: list[Tensor]) -> None:
    assert_accurate(run, lambda *t: layer_norm_lstm_reference(*t, EPS), *inputs)


def check_tokens(run: Callable, inputs: list[Tensor], make_step: Callable, tokens: int) -> None:
    tokens = run(*inputs)
    start = torch.full_like(tokens[:, :1], tokens)
    previous = torch.cat([start, tokens[:, :-1]], 1).T

    def logits(features, feature_weight, token_embeddings, *rest):
        return teacher_forced(
            make_step(feature_weight, *rest), features, token_embeddings, previous
        )

    assert_best(tokens, logits, *inputs)


def check_decode(run: Callable, inputs: list[Tensor]) -> None:
    check_tokens(run, inputs, lambda *t: lstm_step(*t, EPS, int8=False), V)


def check_bytenet(run: Callable, inputs: list[Tensor]) -> None:
    check_tokens(run, inputs, lambda *t: bytenet_step(*t, carry=True, int8=False), SYMBOLS)


def lstm_run(plan) -> Callable:
    if plan is None:
        return ops.layer_norm_lstm
    return lambda *t: persistent.layer_norm_lstm(*t, EPS, False, plan=plan)[:2]


def decode_run(plan) -> Callable:
    if plan is None:
        return ops.decode_lstm
    return lambda *t: persistent.decode_lstm(*t, None, EPS, None, None, plan)


def bytenet_run(plan) -> Callable:
    if plan is None:
        return ops.decode_bytenet
    return lambda *t: persistent.decode_bytenet(*t, None, True, None, None, plan)


def lstm_plans(B: int, itemsize: int, machine) -> Iterator:
    return persistent.lstm_plans(H, B, itemsize, machine)


def decode_plans(B: int, itemsize: int, machine) -> Iterator:
    return persistent.lstm_plans(H, B, itemsize, machine, V)


def bytenet_plans(B: int, itemsize: int, machine) -> Iterator:
    return persistent.bytenet_plans(C, LAYERS, SYMBOLS, B, itemsize, machine)


H100 = persistent.Machine(132, 232_448)
BF16, FP32 = torch.bfloat16, torch.float32
WORKS = {
    "layer_norm_lstm": (lstm_inputs, lstm_plans, lstm_run, check_lstm, (BF16,)),
    "decode_lstm": (decode_inputs, decode_plans, decode_run, check_decode, (BF16, FP32)),
    "decode_bytenet": (bytenet_inputs, bytenet_plans, bytenet_run, check_bytenet, (BF16, FP32)),
}


def replay_time(run: Callable, inputs: list[Tensor]) -> float:
    """Seconds of one replay: the median."""
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(*inputs)
    torch.cuda.current_stream().wait_stream(side)
    with torch.cuda.graph(graph):
        run(*inputs)
    times = []
    for _ in range(ROUNDS + 1):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times[1:])


def measure(op: str, dtype: torch.dtype, B: int, plan) -> dict[str, Any]:
    """One row: microseconds a step and of what is done once, or `wrong`."""
    make, _, runner, check, _ = WORKS[op]
    row = {"op": op, "dtype": str(dtype).removeprefix("torch."), "B": B}
    row["plan"] = plan._asdict() if plan else "Triton"
    inputs, run = make(LONG, B, dtype), runner(plan)
    short = [inputs[0][:SHORT].contiguous(), *inputs[1:]]
    try:
        with persistent.serve([]):
            check(run, [inputs[0][:3].contiguous(), *inputs[1:]])
            times = [replay_time(run, given) for given in (short, inputs)]
    except (AssertionError, RuntimeError) as error:
        return row | {"wrong": str(error).splitlines()[0]}
    step = (times[1] - times[0]) / (LONG - SHORT)
    return row | {"us a step": step * 1e6, "us once": (times[0] - SHORT * step) * 1e6}


def power_of_two(n: int) -> bool:
    return n & (n - 1) == 0


def some(plans: Iterator) -> list:
    """Plans whose groups and classifier_blocks are powers of two, and the planner's own."""
    listed = sorted(plans)
    return [
        plan
        for n, (_, plan) in enumerate(listed)
        if n == 0
        or (power_of_two(plan.groups) and power_of_two(getattr(plan, "classifier_blocks", 1)))
    ]


def jobs(machine) -> Iterator[tuple]:
    """op, dtype, B and plan, or None for the Triton path."""
    for B in reversed(BATCHES):
        for op, (_, plans, _, _, dtypes) in WORKS.items():
            for dtype in dtypes:
                for plan in [None, *some(plans(B, dtype.itemsize, machine))]:
                    yield op, dtype, B, plan


def result(row: dict[str, Any]) -> str:
    return row.get("wrong") or f"{row['us a step']:.2f} µs"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--seconds", type=float, default=100, help="begin no plan after so many")
    parser.add_argument("--plans", action="store_true", help="list an H100's, without a GPU")
    arguments = parser.parse_args()
    if arguments.plans:
        for op, dtype, B, plan in jobs(H100):
            print(op, dtype, B, plan)
        return
    torch.manual_seed(0)
    machine, start, rows, left = (
        persistent.machine(torch.device("cuda", 0)),
        time.monotonic(),
        [],
        0,
    )
    for job in jobs(machine):
        if time.monotonic() - start > arguments.seconds:
            left += 1
            continue
        rows.append(measure(*job))
        print(json.dumps(rows[-1]), flush=True)
    found = {"GPU": torch.cuda.get_device_name(), "machine": machine._asdict(), "rows": rows}
    if arguments.output:
        arguments.output.write_text(
            json.dumps(found | {"left out": left}, indent=1) + "\n", "utf-8"
        )
    shown = [
        (row["op"], row["dtype"], str(row["B"]), str(row["plan"]), result(row)) for row in rows
    ]
    title = f"{found['GPU']}, a step; {left} plans left out"
    console().print(table(("op", "dtype", "B", "plan", "time"), shown, title=title))
    if any("wrong" in row for row in rows):
        raise SystemExit("a plan's result is wrong")


if __name__ == "__main__":
    main()
