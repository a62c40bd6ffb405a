"""Compiles every GPU kernel, in every configuration its launcher can choose, for every target.

    python tests/compile_kernels.py [--extremes | --lstm | --smallest] [TARGET ...]

where TRITON_INTERPRET is not set; no GPU is needed. `--extremes` is each kernel's smallest, middle
and largest configuration, `--lstm` are those of the LSTM's kernels, `--smallest` is each kernel's
smallest in float32. Prints one JSON object a line: kernel, types, target, what the machine code
needs and has, and `wrong` where that must not be.
Fails if anything is.
"""

import json
import math
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvae.kernels import decode_bytenet, decode_lstm, gumbel_noise, highway_conv, layer_norm_lstm
from fastvae.kernels.gates import row_launch
from fastvae.kernels.products import aligned

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED = {"sm_80": 163 << 10, "sm_90": 227 << 10, "sm_100": 227 << 10, "gfx942": 64 << 10}
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# H, and V beside it; the programs for the two short types differ in what they load alone.
HIDDEN = {1: decode_lstm.LARGEST, 257: 300, 500: 51, 1000: 259, 1024: 512}
HIDDEN[layer_norm_lstm.LARGEST] = decode_lstm.LARGEST
USUAL = 1000
OPTIONS = ("num_warps", "num_stages", "maxnreg")
# What a thread reads and writes of global memory in two bytes, and in eight or sixteen.
NARROW = {
    "ptx": r"(?:ld|st)\.global\S*\.[bu]16",
    "amdgcn": r"global_(?:load|store)_\w*(?:short|b16)",
}
WIDE = {
    "ptx": r"(?:ld|st)\.global\S*\.v[24]\.b32",
    "amdgcn": r"(?:global|buffer)_(?:load|store)_dwordx[24]",
}
MATRIX = r"mma\.sync|wgmma|tcgen05\.mma|v_mfma"
FAST_EXP = r"ex2\.approx|v_exp_f32"  # a few ulps off: not where results are float32


class Configuration(NamedTuple):
    kernel: Any
    types: dict[str, str]  # of arguments
    constants: dict[str, Any]
    options: dict[str, int]
    aligned: tuple[str, ...] = ()  # arguments that are multiples of 16

    def size(self) -> int:
        """Of a program: elements at once, parts that are switched on, bytes of an element."""
        elements = math.prod(1 + v for v in self.constants.values() if isinstance(v, int))
        return elements * (4 if "*fp32" in str(self) else 2)

    def __str__(self) -> str:
        first = next(iter(self.types.values()))
        return f"{self.kernel.__name__} {first} {self.constants} aligned: {len(self.aligned)}"


def configuration(
    kernel: Any,
    types: dict[str, str],
    launch: dict[str, int],
    sizes: tuple[str, ...] = (),
    **constants,
) -> Configuration:
    """A launch with the tensors as PyTorch allocates them; `sizes` are aligned too."""
    options = {name: launch[name] for name in OPTIONS if name in launch}
    constants |= {name: value for name, value in launch.items() if name not in options}
    pointers = tuple(name for name, kind in types.items() if kind[0] == "*")
    return Configuration(kernel, types, constants, options, (*pointers, *sizes))


def typed(names: str, kind: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), kind)


def hidden(dtype: torch.dtype) -> tuple[int, ...]:
    return (USUAL,) if dtype == torch.float16 else tuple(HIDDEN)


def lstm_configurations(t: str, dtype: torch.dtype, hip: bool) -> Iterator[Configuration]:
    k = layer_norm_lstm
    for size in hidden(dtype):
        launch = row_launch(size, hip)
        wide = {"H": size, "STRIDE": aligned(size, dtype)}
        types = typed("x a gain bias", t) | {"c_before": "*fp32", "h": t, "c": "*fp32"}
        types |= {"normalized": t, "rstd": "*fp32"} | typed("row kept before t", "i32")
        forward = partial(configuration, k.forward_kernel, launch=launch, EPS=1e-4, **wide)
        for save in (True, False) if size == USUAL else (True,):
            yield forward(types, SAVE=save, LENGTHS=False, lengths=None)
        yield forward(types | {"lengths": "*i64"}, SAVE=True, LENGTHS=True)
        types = {"dh": t, "through": t, "dc": "*fp32", "gain": t, "bias": t}
        types |= {"c_before": "*fp32", "c": "*fp32", "normalized": t, "rstd": "*fp32"}
        types |= {"da": t, "dz": t} | typed("row before t", "i32")
        backward = partial(configuration, k.backward_kernel, launch=launch, **wide)
        yield backward(types, LENGTHS=False, lengths=None)
        yield backward(types | {"lengths": "*i64"}, LENGTHS=True)
        types = {"dz": t, "normalized": t} | typed("shifts scales", "*fp32") | {"R": "i32"}
        yield configuration(k.sums_kernel, types, k.SUMS, W=4 * size)


def highway_configurations(t: str, dtype: torch.dtype) -> Iterator[Configuration]:
    k, wide = highway_conv, "*fp32"
    norm, nothing = typed("mean scale shift", wide), dict.fromkeys(("mean", "scale", "shift"))
    several = [256, 500, 1]  # tiles of one column are of one kind
    for size in several[: {torch.float32: 3, torch.bfloat16: 2, torch.float16: 1}[dtype]]:
        _, launch = k.tiles(64, size)
        types = {"a": t, "means": wide, "m2s": wide, "R": "i32"}
        yield configuration(k.statistics_kernel, types, launch, W=size, STEPS=k.STEPS)
        types = {"da": t, "dmean": wide, "dm2": wide, "a": t, "mean": wide, "total": t}
        types |= {"sums": wide, "R": "i32"}
        yield configuration(k.project_backward_kernel, types, launch, W=size)
        types = {"a": t, "x": t, "y": t, "R": "i32"}
        gate = partial(configuration, k.gate_kernel, launch=launch, C=size)
        yield gate(types=types, NORM=False, CARRY=True, **nothing)
        backward = {"dy": t, "a": t, "x": t, **norm, "da": t, "dx": t, "shifts": wide}
        backward |= {"scales": wide, "R": "i32"}
        for carry in (True, False):
            yield gate(types=types | norm, NORM=True, CARRY=carry)
            yield configuration(k.gate_backward_kernel, backward, launch, C=size, CARRY=carry)
    if dtype == torch.float32:
        types = typed("means m2s mean m2", wide) | {"R": "i32"}
        for size in (500, 768):
            yield configuration(k.combine_kernel, types, k.COMBINE, W=size, ROWS=k.ROWS * k.STEPS)


def decode_lstm_configurations(t: str, dtype: torch.dtype, hip: bool) -> Iterator[Configuration]:
    types = typed("u projected rows gain bias classifier_bias", t) | {"noise": "*fp32"}
    types |= {"c": "*fp32", "h": t, "token": "*i32", "ended": "*i32", "tokens": "*i64"}
    types |= typed("now chosen end_id pad_id", "i32")
    # A chunk's steps with noise and without, its first, and its last choice.
    several = [(True, True, True), (True, False, True), (False, False, True), (True, True, False)]
    for size in hidden(dtype):
        sizes = {"H": size, "V": HIDDEN[size]}
        sizes["N"] = 4 * sizes["H"] + sizes["V"]
        sizes["N"] += -sizes["N"] % decode_lstm.ALIGNED
        sizes["STRIDE"] = aligned(size, dtype)
        launch = decode_lstm.launch(sizes["H"], sizes["V"], hip)
        for parts in several[: 4 if size == USUAL else 1]:
            names = dict(zip(("CHOOSE", "NOISE", "ADVANCE"), parts, strict=True))
            yield configuration(decode_lstm.step_kernel, types, launch, EPS=1e-4, **sizes, **names)


def decode_bytenet_configurations(t: str, dtype: torch.dtype) -> Iterator[Configuration]:
    names = "projected rows weight bias classifier_weight classifier_bias state"
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
        constants |= {"CARRY": carry, "NOISE": noise, "PRECISION": "ieee"}
        constants |= {} if noise else {"noise": None}
        launch = decode_bytenet.launch(16, C, dtype, False)
        yield configuration(decode_bytenet.sequence_kernel, given, launch, ("C",), **constants)


def noise_configurations() -> Iterator[Configuration]:
    types = {"seed": "*i64", "noise": "*fp32", "temperature": "fp32", "COUNT": "i32"}
    launch = {"BLOCKS": gumbel_noise.BLOCKS}
    yield configuration(gumbel_noise.noise_kernel, types, launch)
    yield configuration(gumbel_noise.noise_kernel, {**types, "COUNT": "i64"}, launch)


def configurations(target: str) -> Iterator[Configuration]:
    hip = TARGETS[target].backend == "hip"
    yield from noise_configurations()
    for name, dtype in DTYPES.items():
        of_type = f"*{name}", dtype
        yield from lstm_configurations(*of_type, hip)
        yield from highway_configurations(*of_type)
        yield from decode_lstm_configurations(*of_type, hip)
        if not hip:
            yield from decode_bytenet_configurations(*of_type)


def lstm(target: str) -> Iterator[Configuration]:
    hip = TARGETS[target].backend == "hip"
    for name, dtype in DTYPES.items():
        yield from lstm_configurations(f"*{name}", dtype, hip)
        yield from decode_lstm_configurations(f"*{name}", dtype, hip)


def extremes(target: str) -> Iterator[Configuration]:
    """Each kernel's smallest, middle and largest."""
    kernels: dict[str, list[Configuration]] = {}
    for c in configurations(target):
        kernels.setdefault(c.kernel.__name__, []).append(c)
    for several in kernels.values():
        several.sort(key=Configuration.size)
        yield from (several[0], several[len(several) // 2], several[-1])


def smallest(target: str) -> Iterator[Configuration]:
    """Each kernel's smallest in float32."""
    kernels: dict[str, Configuration] = {}
    for c in configurations(target):
        if next(iter(c.types.values())) == "*fp32":
            least = kernels.setdefault(c.kernel.__name__, c)
            kernels[c.kernel.__name__] = min(least, c, key=Configuration.size)
    yield from kernels.values()


def needs(compiled) -> dict[str, Any]:
    """Bytes of memory for what registers do not hold, shared memory, and the matrix units' use."""
    kind = "amdgcn" if "amdgcn" in compiled.asm else "ptx"
    text = compiled.asm[kind]
    found = {"shared": compiled.metadata.shared, "matrix": bool(re.search(MATRIX, text))}
    found |= {"fast_exp": bool(re.search(FAST_EXP, text))}
    found |= {"narrow": len(re.findall(NARROW[kind], text))}
    found |= {"wide": len(re.findall(WIDE[kind], text))}
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


def compile_one(c: Configuration, target: str) -> dict[str, Any]:
    names = c.kernel.arg_names
    signature = {name: c.types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in c.aligned}
    source = ASTSource(c.kernel, signature, constexprs=c.constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options=c.options)
    found = {"kernel": str(c), "target": target, **needs(compiled)}
    # Products of short floats run on matrix units, fp32 ones, which those round, do not.
    matrix = c.kernel is decode_bytenet.sequence_kernel and "*fp32" not in str(c)
    if found["spilled"] or found["shared"] > SHARED[target] or found["matrix"] != matrix:
        found["wrong"] = True
    if found["fast_exp"] and next(iter(c.types.values())) == "*fp32":
        found["wrong"] = True
    return found


def compile_nth(listing: Callable, target: str, n: int) -> dict[str, Any]:
    return compile_one(list(listing(target))[n], target)


def main(*arguments: str) -> int:
    targets = [a for a in arguments if a in TARGETS] or list(TARGETS)
    listing = extremes if "--extremes" in arguments else configurations
    listing = lstm if "--lstm" in arguments else listing
    listing = smallest if "--smallest" in arguments else listing
    jobs = [(listing, t, n) for t in targets for n, _ in enumerate(listing(t))]
    wrong = 0
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        for found in pool.map(compile_nth, *zip(*jobs, strict=True)):
            print(json.dumps(found), flush=True)
            wrong += "wrong" in found
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
