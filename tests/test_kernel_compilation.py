"""Every GPU kernel compiles for every target, spills nothing, and fits what the target has.

`python tests/compile_kernels.py` does so in every configuration for all of them.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compile_kernels.py")
KERNELS = Path(__file__).parents[1] / "kernels"


def compiled(target, extent, folder):
    """The program's run, and what it found of each kernel."""
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(folder)
    command = [sys.executable, PROGRAM, target, *extent.split()]
    run = subprocess.run(command, env=environment, capture_output=True, text=True)
    return run, [json.loads(line) for line in run.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "target, extent",
    [
        ("sm_80", "--extremes"),
        ("sm_80", "--lstm"),
        ("sm_90", ""),
        ("sm_100", "--extremes"),
        ("gfx942", ""),
    ],
)
def test_compiles(target, extent, tmp_path):
    run, kernels = compiled(target, extent, tmp_path)
    assert not [k for k in kernels if "wrong" in k]
    assert run.returncode == 0, run.stderr
    assert len(kernels) > 20 and {k["target"] for k in kernels} == {target}
    if target == "sm_90":
        sources = "".join(path.read_text() for path in KERNELS.glob("*.py"))
        names = set(re.findall(r"^def (\w+_kernel)\(", sources, re.MULTILINE))
        assert names == {k["kernel"].split()[0] for k in kernels}
    if extent != "--extremes":
        counted = [k for k in kernels if counts_accesses(k)]
        assert len(counted) > 30


def test_float32_has_exact_exponentials(tmp_path):
    """The interpreter's are exact, whichever function a kernel calls."""
    run, kernels = compiled("sm_90", "--smallest", tmp_path)
    assert run.returncode == 0, run.stderr
    assert len(kernels) >= 10 and not [k for k in kernels if k["fast_exp"]]


def counts_accesses(found) -> bool:
    """Whether it is an LSTM's kernel, whose rows of numbers then move as vectors.

    By two bytes go, in 16 bits, the logits alone, whose first lies anywhere, and rows of an odd H.
    """
    pattern = r"(forward|backward|step)_kernel \*(bf16|fp16|fp32) .*'H': (257|500|1000|1024),"
    kernel = re.match(pattern, found["kernel"])
    if not kernel:
        return False
    odd, step, short = kernel[3] == "257", kernel[1] == "step", kernel[2] != "fp32"
    assert found["narrow"] <= short * (4 * 34 if odd else 4 * step), found
    assert odd or found["wide"] > 16 or "'ADVANCE': False" in found["kernel"], found
    return True
