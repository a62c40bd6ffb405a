"""compute-sanitizer finds no wrong access and no race in any kernel."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    pytest.skip("no CUDA device", allow_module_level=True)

PROGRAM = Path(__file__).with_name("sanitize.py")
TOOL = shutil.which("compute-sanitizer") or shutil.which(
    "compute-sanitizer", path="/usr/local/cuda/bin"
)


@pytest.mark.slow
@pytest.mark.skipif(TOOL is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_sanitizer(tool, tmp_path):
    python = [sys.executable, PROGRAM]
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    # Compiled before, so that the tool sees kernels and not the compiler.
    subprocess.run(python, check=True, cwd=tmp_path, env=environment, timeout=120)
    command = [TOOL, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *python]
    run = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280
    )
    assert run.returncode == 0 and "every kernel ran" in run.stdout, run.stdout + run.stderr
