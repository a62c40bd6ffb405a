"""Compiles every GPU kernel, in every configuration its launcher can choose, for every target.

Run as a program where TRITON_INTERPRET is not set; no GPU is needed. Prints one JSON object a line:
kernel, types, target, and what the machine code needs and has.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvae.kernels import decode_bytenet, highway_conv, layer_norm_lstm
from fastvae.kernels.gates import row_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
HIDDEN = (1, 500, 1000, layer_norm_lstm.LARGEST)
OPTIONS = ("num_warps", "num_stages", "maxnreg")
MATRIX = r"mma\.sync|wgmma|tcgen05\.mma|v_mfma"


class Configuration(NamedTuple):
    kernel: Any
    types: dict[str, str]  # of arguments
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16

    def __str__(self) -> str:
        first = next(iter(self.types.values()))
        return f"{self.kernel.__name__} {first} {self.constants} aligned: {len(self.aligned)}"


def configuration(
    kernel: Any, types: dict[str, str], launch: dict[str, int], sizes: tuple[str, ...], **constants
) -> Configuration:
    """A launch whose tensors are aligned if `sizes`, what they are multiples of, are given."""
    options = {name: launch[name] for name in OPTIONS if name in launch}
    constants |= {name: value for name, value in launch.items() if name not in options}
    pointers = [name for name, kind in types.items() if kind[0] == "*"]
    return Configuration(kernel, types, constants, options, (*pointers, *sizes) if sizes else ())


def typed(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def lstm_configurations(t: str, dtype: torch.dtype) -> Iterator[Configuration]:
    for size in HIDDEN:
        launch = row_launch(size)
        types = typed("a gain bias", t) | {"c_before": "*fp32", "h": t, "c": "*fp32"}
        types |= {"normalised": t, "rstd": "*fp32", "H": "i32"}
        for save in (False, True):
            kernel = layer_norm_lstm.forward_kernel
            yield configuration(kernel, types, launch, (), EPS=1e-4, SAVE=save)
        types = {"dh": t, "through": t, "dc": "*fp32", "gain": t, "bias": t}
        types |= {"c_before": "*fp32", "c": "*fp32", "normalised": t, "rstd": "*fp32"}
        types |= {"da": t, "dz": t, "H": "i32"}
        yield configuration(layer_norm_lstm.backward_kernel, types, launch, ())


def highway_configurations(t: str, dtype: torch.dtype) -> Iterator[Configuration]:
    k, wide = highway_conv, "*fp32"
    norm, nothing = typed("mean scale shift", wide), dict.fromkeys(("mean", "scale", "shift"))
    # Aligned and not; tiles of one column are of one kind.
    several = [(256, ("W", "C")), (500, ()), (1, ())]
    for columns, sizes in several[: {torch.float32: 3, torch.bfloat16: 2, torch.float16: 1}[dtype]]:
        _, launch = k.tiles(64, columns)
        types = {"a": t, "means": wide, "m2s": wide, "R": "i32", "W": "i32"}
        yield configuration(k.statistics_kernel, types, launch, sizes[:1])
        types = {"da": t, "dmean": wide, "dm2": wide, "a": t, "mean": wide, "total": t}
        types |= {"sums": wide, "R": "i32", "W": "i32"}
        yield configuration(k.project_backward_kernel, types, launch, sizes[:1])
        types = {"a": t, "x": t, "y": t, "R": "i32", "C": "i32"}
        gate = partial(configuration, k.gate_kernel, launch=launch, sizes=sizes[1:])
        yield gate(types=types, NORM=False, CARRY=True, **nothing)
        backward = {"dy": t, "a": t, "x": t, **norm, "da": t, "dx": t, "shifts": wide}
        backward |= {"scales": wide, "R": "i32", "C": "i32"}
        for carry in (True, False):
            yield gate(types=types | norm, NORM=True, CARRY=carry)
            yield configuration(k.gate_backward_kernel, backward, launch, sizes[1:], CARRY=carry)
    if dtype == torch.float32:
        types = typed("means m2s mean m2", wide) | typed("R W", "i32")
        for sizes in ((), ("W",)):
            yield configuration(k.combine_kernel, types, k.COMBINE, sizes, ROWS=k.ROWS)


def decode_configurations(t: str, dtype: torch.dtype, hip: bool) -> Iterator[Configuration]:
    names = "projected symbol_rows weight bias classifier_weight classifier_bias state"
    types = typed(names, t) | {"tokens": "*i64"} | typed("T B C V N end_id pad_id", "i32")
    largest = decode_bytenet.LARGEST[dtype.itemsize]
    several = [(largest, True, True), (largest, False, True), (largest, True, False)]
    several += [(largest, False, False)]
    several += [(C, True, True) for C in (1, 32, 64, 128) if largest > C]
    for C, noise, carry in several[: 1 if dtype == torch.float16 else None]:
        # Ones are folded in by the launcher.
        constants = dict.fromkeys(("T", "B", "V", "N", "pad_id"), 1) if C == 1 else {}
        given = types | {"noise": "*fp32"} if noise else types
        given = {name: kind for name, kind in given.items() if name not in constants}
        constants |= {"CARRY": carry, "NOISE": noise} | ({} if noise else {"noise": None})
        launch = decode_bytenet.decode_launch(16, C, dtype, hip)
        yield configuration(decode_bytenet.decode_kernel, given, launch, ("C",), **constants)


def configurations(target: str) -> Iterator[Configuration]:
    for name, dtype in DTYPES.items():
        yield from lstm_configurations(f"*{name}", dtype)
        yield from highway_configurations(f"*{name}", dtype)
        yield from decode_configurations(f"*{name}", dtype, TARGETS[target].backend == "hip")


def needs(compiled) -> dict[str, Any]:
    """Bytes of memory for what registers do not hold, shared memory, and the matrix units' use."""
    text = compiled.asm.get("amdgcn") or compiled.asm["ptx"]
    found = {"shared": compiled.metadata.shared, "matrix": bool(re.search(MATRIX, text))}
    if "amdgcn" in compiled.asm:
        # Scalars that are spilled go to lanes of vector registers, which are not counted here.
        sizes = re.findall(r"\.private_segment_fixed_size:\s+(\d+)", text)
        return {"spilled": max(map(int, sizes)), **found}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Kernels without arrays of their own have a stack only for what is spilled.
    return {"spilled": max(map(int, re.findall(r"STACK:(\d+)", usage))), **found}


def compile_one(target: str, n: int) -> str:
    c = list(configurations(target))[n]
    names = c.kernel.arg_names
    signature = {name: c.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in c.aligned}
    source = ASTSource(c.kernel, signature, constexprs=c.constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=c.options)
    return json.dumps({"kernel": str(c), "target": target, **needs(compiled)})


def main() -> None:
    jobs = [(t, n) for t in sys.argv[1:] or TARGETS for n, _ in enumerate(configurations(t))]
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        for line in pool.map(compile_one, *zip(*jobs, strict=True)):
            print(line, flush=True)


if __name__ == "__main__":
    main()
