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


def faults(mode):
    command = [sys.executable, "-c", PROGRAM, mode]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the settings are glibc's")
def test_freed_memory_is_kept():
    assert faults("kept") < faults("default") / 20
