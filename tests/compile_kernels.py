"""Compiles every GPU kernel, in every configuration its launcher can choose, for every target.

Run as a program where TRITON_INTERPRET is not set; no GPU is needed. Prints one JSON object a line:
kernel, types, target, and what the machine code needs.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastvae.kernels import decode_lstm, layer_norm_lstm
from fastvae.kernels.gates import row_launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = {"fp32": "fp32", "bf16": "fp32", "fp16": "fp32"}  # and the types they are computed in
HIDDEN = (1, 500, 1000, layer_norm_lstm.LARGEST)
SYMBOLS = dict(zip(HIDDEN, (decode_lstm.LARGEST, 51, 259, decode_lstm.LARGEST), strict=True))


def configurations():
    """kernel, name -> type, constants, launch options."""
    for dtype, wide in DTYPES.items():
        t, w = f"*{dtype}", f"*{wide}"
        for size in HIDDEN:
            launch = row_launch(size)
            constants = {"BLOCK": launch.pop("BLOCK")}
            types = {"x": t, "a": t, "gain": t, "bias": t, "c_before": w, "h": t, "c": w}
            types |= {"normalised": t, "rstd": w, "H": "i32"}
            for save in (False, True):
                yield (
                    layer_norm_lstm.forward_kernel,
                    types,
                    {**constants, "EPS": 1e-4, "SAVE": save},
                    launch,
                )
            types = {"dh": t, "through": t, "dc": w, "gain": t, "bias": t, "c_before": w, "c": w}
            types |= {"normalised": t, "rstd": w, "da": t, "dz": t, "H": "i32"}
            yield layer_norm_lstm.backward_kernel, types, constants, launch
            yield from decoding(t, w, size, SYMBOLS[size])


def decoding(t: str, w: str, size: int, symbols: int):
    """A chunk's first, middle and last steps, greedy and not."""
    launch = decode_lstm.launch(size, symbols)
    constants = {name: launch.pop(name) for name in ("BLOCK", "BLOCK_V")} | {"EPS": 1e-4}
    types = {"u": t, "x": t, "rows": t, "gain": t, "bias": t, "classifier_bias": t, "noise": w}
    types |= {"c": w, "h": t, "symbol": "*i32", "ended": "*i32", "tokens": "*i64"}
    types |= dict.fromkeys(("H", "V", "N", "end_id", "pad_id"), "i32")
    for parts in (
        (False, False, True),
        (True, False, True),
        (True, True, True),
        (True, True, False),
    ):
        names = dict(zip(("CHOOSE", "NOISE", "ADVANCE"), parts, strict=True))
        yield decode_lstm.step_kernel, types, constants | names, launch


def needs(compiled, target: str) -> dict[str, int]:
    """Bytes spilled and shared memory of a compiled kernel."""
    shared = compiled.metadata.shared
    if target.startswith("gfx"):
        spilled = re.findall(r"\.[sv]gpr_spill_count:\s+(\d+)", compiled.asm["amdgcn"])
        return {"spilled": sum(map(int, spilled)), "shared": shared}
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [tools / "cuobjdump", "-res-usage", file.name]
        usage = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    # Kernels without arrays of their own have a stack only for what is spilled.
    return {"spilled": max(map(int, re.findall(r"STACK:(\d+)", usage))), "shared": shared}


def main() -> None:
    wanted = sys.argv[1:] or list(TARGETS)
    for kernel, types, constants, launch in configurations():
        signature = types | dict.fromkeys(constants, "constexpr")
        for target in wanted:
            source = ASTSource(kernel, signature, constexprs=constants)
            compiled = triton.compile(source, target=TARGETS[target], options=launch)
            name = " ".join([kernel.__name__, types.get("h", types.get("dh", "")), str(constants)])
            print(json.dumps({"kernel": name, "target": target, **needs(compiled, target)}))


if __name__ == "__main__":
    main()
