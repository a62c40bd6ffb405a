"""Measures what persistent kernels are bound by on the GPU at hand, and prints it as a table.

    python benchmarks/gpu_limits.py [--output limits.json]
    python benchmarks/gpu_limits.py --compile-only

Needs nvcc (on the PATH, or below CUDA_HOME), which compiles gpu_limits.cu for the GPUs that the
package's own kernels are compiled for. `--compile-only` is for machines without a GPU.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fastvae.console import console, table

SOURCE = Path(__file__).with_suffix(".cu")
TARGETS = "arch=compute_80,code=sm_80", "arch=compute_90a,code=sm_90a"
TARGETS += ("arch=compute_90,code=compute_90",)
UNITS = {"microseconds": "µs", "gigabytes per second": "GB/s"}
SECONDS = 300


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return shutil.which("nvcc") or shutil.which("nvcc", path=f"{home}/bin")


def compile_program(nvcc: str, program: Path) -> None:
    """Raises RuntimeError with what nvcc said."""
    flags = ["-O3", "-std=c++20", *(f"-gencode={target}" for target in TARGETS)]
    run = subprocess.run([nvcc, *flags, "-o", program, SOURCE], capture_output=True, text=True)
    if run.returncode:
        raise RuntimeError(f"{SOURCE.name} does not compile:\n{run.stderr}")


def measure(program: Path) -> dict[str, Any]:
    """What the program finds, `error` included. Raises RuntimeError if that is nothing."""
    run = subprocess.run([program], capture_output=True, text=True, timeout=SECONDS)
    start = run.stdout.find("{")  # after what a kernel that waits in vain says
    if start < 0:
        raise RuntimeError(run.stderr.strip() or f"{program.name} ended with {run.returncode}")
    return json.loads(run.stdout[start:])


def result(row: dict[str, Any]) -> str:
    """A row's number and unit, or why it has none."""
    for key, unit in UNITS.items():
        if key in row:
            return f"{row[key]:.4g} {unit}"
    return "WRONG RESULT" if "wrong" in row else f"skipped: {row['skipped']}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="JSON file to write")
    parser.add_argument("--compile-only", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    nvcc = find_nvcc()
    if not nvcc:
        sys.exit("no nvcc on the PATH nor below CUDA_HOME")
    try:
        with tempfile.TemporaryDirectory() as folder:
            program = Path(folder, "gpu_limits")
            compile_program(nvcc, program)
            if arguments.compile_only:
                return
            limits = measure(program)
        if arguments.output:
            arguments.output.write_text(json.dumps(limits, indent=1) + "\n", "utf-8")
    except (OSError, RuntimeError, ValueError, subprocess.TimeoutExpired) as error:
        sys.exit(str(error))
    rows = [(row["what"], row["setting"], result(row)) for row in limits["rows"]]
    title = f"{limits['device']}, {limits['SMs']} multiprocessors"
    console().print(table(("what", "setting", "a round, or rate"), rows, title=title))
    if "error" in limits or any("wrong" in row for row in limits["rows"]):
        sys.exit(limits.get("error", "a kernel's result is wrong"))


if __name__ == "__main__":
    main()
