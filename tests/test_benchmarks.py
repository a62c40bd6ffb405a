"""benchmarks/: which lines a device has, and those of packages that may be there or not."""

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

FOLDER = Path(__file__).parents[1] / "benchmarks"
FLASHRNN, HASTE = "FlashRNN (no norm) bf16", "Haste (other norms)"
ON_CPU = {"fastvae int8", "nn.LSTM deprecated int8", "pads computed"}
ON_GPU = {"graph", "graph bf16", "nn.LSTM fp16", FLASHRNN, HASTE}
ON_GPU |= {"LayerNorm-LSTM forward", "1024", "fastvae persistent bf16", "fastvae persistent fp16"}


@pytest.mark.parametrize(
    "device, there, absent", [("cpu", ON_CPU, ON_GPU), ("cuda", ON_GPU, ON_CPU)]
)
def test_what_a_device_collects(device, there, absent):
    program = """
import sys, pytest, torch
torch.cuda.is_available = lambda: True
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
    command = [sys.executable, "-c", program, str(FOLDER), "--device", device]
    run = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stdout + run.stderr
    assert {value for value in there | absent if value in run.stdout} == there


TIMED = """
import time
import pytest

@pytest.mark.parametrize("line", ["quick", "compiled once", "slow"])
def test_work(timer, line):
    timed = timer("work", line)
    print("set up", line)
    calls = []
    def function():
        calls.append(line)
        time.sleep(0.2 * (line == "slow" or line == "compiled once" and len(calls) == 1))
    timed(function, None, tokens=1, flops=0)
    print(len(calls), "calls of", line)
"""


def run_timed(folder, *options):
    """What TIMED prints beside benchmarks/conftest.py, where 0.1 seconds a call are too slow."""
    conftest = (FOLDER / "conftest.py").read_text()
    (folder / "conftest.py").write_text(conftest + "\nSLOWEST = 0.1\n")
    (folder / "test_timed.py").write_text(TIMED)
    command = [sys.executable, "-m", "pytest", "-rs", "-s", "-p", "no:cacheprovider"]
    command += ["--benchmark-only", "test_timed.py", *options]
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    run = subprocess.run(
        command, cwd=folder, env=alone, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stdout + run.stderr
    return run.stdout


def test_rows_that_are_left_out_are_not_set_up(tmp_path):
    printed = run_timed(tmp_path, "--rows", "work, quick")
    assert "set up quick" in printed and "6 calls of quick" in printed  # to warm up, and 5 rounds
    assert "2 skipped" in printed and "not one of --rows" in printed
    assert "set up slow" not in printed and "set up compiled once" not in printed


def test_rows_must_be_an_expression(tmp_path):
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER)]
    done = subprocess.run(
        [*command, "--rows", "B=1, ("], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == pytest.ExitCode.USAGE_ERROR and done.stdout == ""
    said = done.stderr.strip()
    assert said.startswith("ERROR: --rows 'B=1, (' is not a regular expression: missing )")
    assert said.endswith(r"write a parenthesis as \(") and said.count("\n") == 0


def test_slow_rivals_are_left_out_and_named(tmp_path):
    printed = run_timed(tmp_path)
    assert "2 passed, 1 skipped" in printed and "7 calls of compiled once" in printed
    assert "work, slow: a call takes 0 s, 0.1 at most" in printed


class Haste(nn.Module):
    """What haste_pytorch.LayerNormLSTM takes and gives, not what it computes."""

    def __init__(self, input_size, hidden_size, batch_first=False, forget_bias=1.0):
        super().__init__()
        self.hidden_size, self.linear = hidden_size, nn.Linear(input_size, hidden_size)

    def forward(self, input, state=None, lengths=None):
        h = self.linear(input)
        return h, (h[-1:], h[-1:])


def flashrnn(Wx, R, b, states=None, function="lstm", config=None, backend="cuda_fused", dtype=None):
    """What FlashRNN takes and gives: Wx [B, T, G, N, D] -> [S, B, T, N, D], the last of them."""
    G, N, D = Wx.shape[2:]
    assert (G, N, D % 16) == (4, 1, 0) and R.shape == (G, N, D, D) and b.shape == (G, N, D)
    assert Wx.dtype == R.dtype == b.dtype == torch.bfloat16 and function == "lstm"
    h = (Wx + R.sum(-1) + b).sum(2)
    states = torch.stack([h, h])
    return states, states[:, :, -1:]


def loaded(name):
    spec = importlib.util.spec_from_file_location(name, FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def served(monkeypatch):
    """served(line, op): what makes a line's functions be served, by kernels that count as built."""
    persistent = pytest.importorskip("fastvae.kernels.persistent")
    monkeypatch.setattr(persistent, "built", lambda op: True)
    return partial(loaded("conftest").Served, monkeypatch=monkeypatch)


def test_lines_that_persistent_kernels_serve(served, monkeypatch):
    """Their functions run with the kernel serving, which must have served; its plan tells bytes."""
    persistent = sys.modules["fastvae.kernels.persistent"]
    plan = persistent.Plan(groups=2, units=8, columns=16)
    monkeypatch.setattr(persistent, "decode_lstm", lambda *inputs: (set(persistent.SERVING), plan))
    line = served("fastvae persistent bf16", "decode_lstm")
    assert line.exchanges(300, lambda *_: [1]) == []
    serves = line(lambda: persistent.decode_lstm("features", plan)[0])
    assert "decode_lstm" in serves() and "decode_lstm" not in persistent.SERVING
    assert line.exchanges(24, lambda plan, sequences: [plan.units, sequences]) == [8, 12]
    assert line.exchanges(300, lambda plan, sequences: [plan.units, sequences]) == [8, 16] * 3
    with pytest.raises(pytest.skip.Exception, match="not for these sizes"):
        line(lambda: None)()
    plain = served("fastvae bf16", "decode_lstm")
    assert plain(len) is len and plain.exchanges(300, None) == []


def test_persistent_lines_where_none_was_built(served, monkeypatch):
    monkeypatch.setattr("fastvae.kernels.persistent.built", lambda op: False)
    with pytest.raises(pytest.skip.Exception, match="csrc/cuda was not built"):
        served("fastvae persistent", "decode_lstm")


@pytest.fixture
def lines(monkeypatch):
    """lines(line, work) -> the lines that the benchmark of the LSTM times: one, or none."""
    bench = loaded("bench_layer_norm_lstm")
    serving = partial(loaded("conftest").Served, monkeypatch=monkeypatch)

    def run(line, work):
        timed = []

        def timer(work, line):
            def time(function, beside, **_):
                function()
                beside()
                timed.append((work, line))

            return time

        fixtures = {"timer": timer, "compiled": None, "graphed": None, "steps": lambda T: T}
        fixtures |= {"serving": serving, "rival": None}
        bench.test_layer_norm_lstm(**fixtures, line=line, work=work, shape=(3, 2, 20))
        return timed

    return run


PACKAGES = {FLASHRNN: ("flashrnn", {"flashrnn": flashrnn})}
PACKAGES[HASTE] = "haste_pytorch", {"LayerNormLSTM": Haste}


@pytest.mark.parametrize("work", ["LayerNorm-LSTM training", "LayerNorm-LSTM forward"])
@pytest.mark.parametrize("line", PACKAGES)
def test_other_packages(lines, monkeypatch, line, work):
    name, contents = PACKAGES[line]
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    assert lines(line, work) == [(f"{work}, T=3 B=2 H=20", line)]
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(pytest.skip.Exception, match=name):
        lines(line, work)


@pytest.mark.parametrize("line", PACKAGES)
def test_other_packages_that_refuse_have_no_line(lines, monkeypatch, line):
    def refuse(*_, **__):
        raise ValueError("No working solution of constraints")

    name, contents = PACKAGES[line]
    monkeypatch.setitem(sys.modules, name, SimpleNamespace(**contents))
    monkeypatch.setattr(Haste, "forward", refuse)
    monkeypatch.setattr(sys.modules[name], "flashrnn", refuse, raising=False)
    with pytest.raises(pytest.skip.Exception, match="No working solution"):
        lines(line, "LayerNorm-LSTM training")


def test_other_packages_must_give_finite_numbers(lines, monkeypatch):
    monkeypatch.setitem(sys.modules, "haste_pytorch", SimpleNamespace(LayerNormLSTM=Haste))
    monkeypatch.setattr(Haste, "forward", lambda self, x: (self.linear(x) / 0, None))
    with pytest.raises(AssertionError):
        lines(HASTE, "LayerNorm-LSTM training")
