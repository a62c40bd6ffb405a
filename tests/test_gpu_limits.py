"""benchmarks/gpu_limits.py: it compiles, and shows what its program prints."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).parents[1] / "benchmarks" / "gpu_limits.py"
ROWS = [
    {"what": "grid.sync", "setting": "132 blocks", "microseconds": 1.25},
    {"what": "reading shared memory", "setting": "132 blocks", "gigabytes per second": 29000.0},
    {"what": "cluster barrier", "setting": "clusters of 2", "skipped": "needs compute capability"},
]
LIMITS = {"device": "a GPU", "compute capability": "9.0", "SMs": 132, "rows": ROWS}


@pytest.fixture
def gpu_limits():
    spec = importlib.util.spec_from_file_location("gpu_limits", PROGRAM)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_compiles(gpu_limits):
    if not gpu_limits.find_nvcc():
        pytest.skip("no nvcc")
    run = subprocess.run(
        [sys.executable, PROGRAM, "--compile-only"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert not run.stdout


def shown(gpu_limits, monkeypatch, capsys, limits, *arguments):
    """What is printed where the program prints `limits`, and the exit status."""
    monkeypatch.setattr(gpu_limits, "find_nvcc", lambda: "nvcc")
    monkeypatch.setattr(gpu_limits, "compile_program", lambda nvcc, program: None)
    monkeypatch.setattr(gpu_limits, "measure", lambda program: limits)
    monkeypatch.setattr(sys, "argv", ["gpu_limits.py", *arguments])
    status = None
    try:
        gpu_limits.main()
    except SystemExit as end:
        status = end.code
    return capsys.readouterr().out, status


def test_shows_and_writes_what_is_measured(gpu_limits, monkeypatch, capsys, tmp_path):
    output = tmp_path / "limits.json"
    text, status = shown(gpu_limits, monkeypatch, capsys, LIMITS, "--output", str(output))
    assert status is None
    assert "a GPU, 132 multiprocessors" in text
    assert "1.25 µs" in text and "2.9e+04 GB/s" in text
    assert "skipped: needs compute capability" in text
    assert json.loads(output.read_text()) == LIMITS


@pytest.mark.parametrize(
    "more, message",
    [({"rows": [{"what": "x", "setting": "", "wrong": True}]}, "wrong"), ({"error": "b"}, "b")],
)
def test_a_wrong_result_fails(gpu_limits, monkeypatch, capsys, more, message):
    text, status = shown(gpu_limits, monkeypatch, capsys, LIMITS | more)
    assert message in status
    assert ("WRONG RESULT" in text) == ("rows" in more)


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "gpu_limits"

    def that(does):
        path.write_text(f"#!/bin/sh\n{does}\nexit 1\n")
        path.chmod(0o755)
        return path

    return that


def test_without_a_gpu_one_line_says_so(gpu_limits, program):
    with pytest.raises(RuntimeError, match=r"^no device$"):
        gpu_limits.measure(program("echo no device >&2"))


def test_what_was_measured_before_an_error_is_kept(gpu_limits, program):
    cut_short = LIMITS | {"error": "kernel: unspecified launch failure"}
    echo = f"echo 'block 3 waited in vain'; echo '{json.dumps(cut_short)}'"
    assert gpu_limits.measure(program(echo)) == cut_short
