"""What is freed stays with the process: large tensors made again and again touch no new pages."""

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from fastvae.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    keep_freed_memory()
def step():
    for size in (1 << 20, 5 << 20, 12 << 20):
        torch.zeros(size)
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode, folder):
    command = [sys.executable, "-c", PROGRAM, mode]
    # Outside the source tree, whose bare package has no native module.
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return int(run.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_kept(tmp_path):
    assert faults("kept", tmp_path) < faults("default", tmp_path) / 20
