"""benchmarks/report.py: a small saved run, made by hand, and the rows it must give."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"
DECODING = "greedy decoding, LSTM 1000"
PTB = "training step, PTB"
WORKS = "forward", "training"
FP32 = {"dtype": "fp32", "peak GFLOP/s": 100.0}
TARGETS = (
    (f"{DECODING}, B=1", "fastvae", "peak", 0.75),
    (f"{DECODING}, B=1", "fastvae bf16", "peak", 0.75),
    (f"{DECODING}, B=16", "fastvae", "eager", 5),
    (f"{DECODING}, B=16", "fastvae bf16", "eager", 10),
    (f"{DECODING}, B=128", "fastvae", "eager", 3.5),
    (f"{PTB} hybrid, LSTM 500, B=64", "fastvae", "eager", 4),
    (f"{PTB} hybrid, LSTM 500, B=64", "fastvae", "fastvae", 1.2, f"{PTB} LSTM VAE 500, B=64"),
)
PERSISTENT = "fastvae persistent bf16"
BF16 = {"dtype": "bf16", "peak GFLOP/s": 200.0}


@pytest.fixture
def report(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    for name in ("chart", "targets"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("report", FOLDER / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.CPU_TARGETS = tuple(module.Target(*target) for target in TARGETS)
    return module


def entry(work, line, median, takes, gflop, *, tokens=64, mb=0.0, gb=0.0, **info):
    setting = {"threads": 2, "torch": "2.13.0", "cpu_capability": "avx512", "tokens": tokens}
    limits = {"GFLOP": gflop, "GB": gb, "MB": mb, "peak GB/s": 50.0 if gb else None}
    turns = {"fastvae takes": takes, "fastvae turns": [median] if line == "fastvae" else []}
    named = {"work": work, "line": line} | turns
    return {"stats": {"median": median}, "extra_info": setting | limits | named | FP32 | info}


def saved():
    """Two decoding works, two models; the second one's tokens are half as many."""
    benchmarks = [
        entry(f"{DECODING}, B=1", "fastvae", 0.05, 1.0, 1.0, mb=17.0, gb=2.0),
        entry(f"{DECODING}, B=16", "fastvae", 0.2, 1.0, 10.0),
        entry(f"{DECODING}, B=16", "fastvae bf16", 0.1, 2.0, 10.0, **BF16),
        entry(f"{DECODING}, B=16", "eager", 0.6, 0.25, 10.0),
        entry(f"{DECODING}, B=16", "eager bf16", 0.3, 0.5, 10.0, **BF16),
        entry(f"{DECODING}, B=16", "compile", 0.4, 0.4, 10.0),
        entry(f"{PTB} hybrid, LSTM 500, B=64", "fastvae", 0.2, 1.0, 10.0),
        entry(f"{PTB} hybrid, LSTM 500, B=64", "eager", 1.0, 0.2, 10.0),
        entry(f"{PTB} LSTM VAE 500, B=64", "fastvae", 0.11, 1.0, 7.5, tokens=32),
    ]
    machine = {"cpu": {"brand_raw": "Some CPU"}}
    return {
        "machine_info": machine,
        "benchmarks": [*benchmarks, {**benchmarks[0], "extra_info": {}}],
    }


def rows(report, data):
    text = report.report(report.Run(data))
    return text, [line for line in text.splitlines() if line.startswith("| ")][1:]


def test_rows(report):
    _, got = rows(report, saved())
    vae = "ours in training step, PTB LSTM VAE 500, B=64"
    assert got == [
        f"| {DECODING}, B=1, fp32 | 50 ms |  |  |  |  | 80% | ≥ 75% of peak | met: 80% |",
        f"| {DECODING}, B=16, fp32 | 200 ms | 600 ms | compile 400 ms | 4.00 | 2.50 | 50% "
        "| ≥ 5× eager | **short by 20%**: 4×; at most 8× ≥ 5× (1) |",
        f"| {DECODING}, B=16, bf16 | 100 ms | 600 ms | eager bf16 300 ms | 8.00 | 4.00 | 50% "
        "| ≥ 10× eager | **short by 20%**: 8×; at most 16× ≥ 10× (2) |",
        f"| {PTB} hybrid, LSTM 500, B=64, fp32 | 200 ms | 1 s |  | 5.00 |  | 50% "
        f"| ≥ 4× eager<br>≥ 1.2× {vae} "
        "| met: 5×<br>**short by 8%**: 1.1×; at most 2.2× ≥ 1.2× (3) |",
        f"| {PTB} LSTM VAE 500, B=64, fp32 | 110 ms |  |  |  |  | 68% |  |  |",
    ]


def test_out_of_reach(report):
    """The peak that counts is the best of the run: one slower measurement changes nothing."""
    data = saved()
    for benchmark in data["benchmarks"][1:4]:
        benchmark["extra_info"] |= {"GFLOP": 19.0}
    _, got = rows(report, data)
    data["benchmarks"][1]["extra_info"] |= {"peak GFLOP/s": 50.0}
    assert rows(report, data)[1] == got
    assert got[1].endswith("**short by 20%**: 4×; at most 4.21× < 5× (1) |")


def test_arithmetic_of_what_falls_short(report):
    text, _ = rows(report, saved())
    assert (
        f"\n1. {DECODING}, B=16, fp32: 10 GFLOP at 100 GFLOP/s takes 100 ms; ours takes 200 ms, "
        "50% of the limit; at 4× eager (600 ms) that leaves 4 / 50% = 8× at most."
    ) in text
    assert "whose operations are 1.50× ours by token, that leaves 1.1 / 50% = 2.2× at most." in text
    assert "Not measured in this run: " in text
    assert f"{DECODING}, B=1: fastvae bf16 ≥ 75% of peak" in text
    assert f"{DECODING}, B=16: fastvae ≥ 5× eager" not in text


def test_our_time_is_that_of_all_turns(report):
    """A slow moment of our own rounds does not count more than a rival's turns do."""
    data = saved()
    for benchmark, seconds in zip(data["benchmarks"][1:6], (0.9, 0.2, 0.1, 0.2, 0.3), strict=True):
        benchmark["extra_info"]["fastvae turns"] = [seconds]
    data["benchmarks"][1]["stats"]["median"] = 0.9
    assert "| 200 ms | 600 ms |" in rows(report, data)[1][1]


def test_bytes_may_be_the_limit(report):
    data = saved()
    data["benchmarks"][0]["extra_info"]["fastvae turns"] = [0.08]
    text, got = rows(report, data)
    assert got[0].endswith("**short by 33%**: 50%; at most 100% ≥ 75% (1) |")
    assert "2 GB (17 MB over and over) at 50 GB/s takes 40 ms; ours takes 80 ms" in text
    assert "75% would be 53.3 ms." in text


def test_without_a_peak(report, tmp_path):
    """int8 has none on some machines: the row is there, without a share."""
    data, int8 = saved(), {"dtype": "int8", "peak GFLOP/s": None}
    data["benchmarks"].append(entry(f"{DECODING}, B=16", "fastvae int8", 0.1, 2.0, 10.0, **int8))
    row = f"| {DECODING}, B=16, int8 | 100 ms | 600 ms | eager bf16 300 ms | 8.00 | 4.00 |  |  |  |"
    assert row in rows(report, data)[1]
    from chart import draw

    draw(report.Run(data), tmp_path / "speed.png")


def saved_on_gpu():
    """The LSTM's two works, both with persistent lines, and decoding with two rivals."""
    forward, training = (f"LayerNorm-LSTM {work}, T=60 B=128 H=1000" for work in WORKS)
    gpu = {"GPU": "Some GPU", "peak memory, MB": 123.4}
    steps = {"passes": 60, "exchanges": [40_000, 300, 100]}
    benchmarks = [
        entry(forward, "fastvae bf16", 360e-6, 2.0, 0.036, passes=60, **gpu, **BF16),
        entry(forward, PERSISTENT, 270e-6, 4.0, 0.036, **steps, **gpu, **BF16),
        entry(training, PERSISTENT, 1e-3, 2.0, 0.16, **steps, **gpu, **BF16),
        entry(training, "FlashRNN (no norm) bf16", 8e-4, 2.5, 0.16, passes=60, **gpu, **BF16),
        entry(f"{DECODING}, B=1", "fastvae bf16", 256e-6, 2.0, 0.02, passes=128, **gpu, **BF16),
        entry(f"{DECODING}, B=1", "graph bf16", 5e-3, 0.1, 0.02, passes=128, **gpu, **BF16),
        entry(f"{DECODING}, B=1", "eager bf16", 6e-3, 0.1, 0.02, passes=128, **gpu, **BF16),
    ]
    return {**saved(), "benchmarks": benchmarks}


def test_rows_on_a_gpu(report):
    """Targets in seconds beside those in speed-ups, and the columns that only a GPU has."""
    text, got = rows(report, saved_on_gpu())
    assert text.startswith("Some GPU, torch 2.13.0. ") and "Targets are those of an H100." in text
    assert text.splitlines()[2].endswith("| µs a step | peak memory | target | result |")
    assert got == [
        "| LayerNorm-LSTM forward, T=60 B=128 H=1000, bf16 | 360 µs |  |  |  |  | 50% | 6 | 123 MB "
        "| ≤ 7 µs a step | met: 6 µs |",
        "| LayerNorm-LSTM forward, T=60 B=128 H=1000, bf16, persistent | 270 µs |  |  |  |  | 67% "
        "| 4.5 | 123 MB | ≤ 3.5 µs a step | **short by 22%**: 4.5 µs; at best 3 µs ≤ 3.5 µs (1) |",
        "| LayerNorm-LSTM training, T=60 B=128 H=1000, bf16, persistent | 1 ms |  "
        "| FlashRNN (no norm) bf16 800 µs |  | 0.80 | 80% | 16.7 | 123 MB "
        "| ≤ 700 µs a call | **short by 30%**: 1 ms; at best 800 µs > 700 µs (2) |",
        f"| {DECODING}, B=1, bf16 | 256 µs |  | graph bf16 5 ms |  | 20.00 | 39% | 2 | 123 MB "
        "| ≤ 2.5 µs a step<br>≥ 5× graph bf16<br>≥ 25× eager bf16 "
        "| met: 2 µs<br>met: 20×<br>**short by 20%**: 20×; at most 51.2× ≥ 25× (3) |",
    ]
    assert (
        "\n1. LayerNorm-LSTM forward, T=60 B=128 H=1000, bf16, persistent: 0.036 GFLOP at 200 "
        "GFLOP/s takes 180 µs; ours takes 270 µs, 67% of the limit, which is 3 µs a step.\n"
    ) in text
    for line in ("fastvae bf16", PERSISTENT):
        assert f"{DECODING}, B=1024: {line} ≤ 18 µs a step" in text.split("Not measured")[1]
    assert "fastvae bf16 ≥ 75% of peak" not in text


def test_a_shortfall_without_a_peak(report):
    data = saved_on_gpu()
    for benchmark in data["benchmarks"]:
        benchmark["extra_info"]["peak GFLOP/s"] = None
    text, got = rows(report, data)
    assert got[1].endswith("| **short by 22%**: 4.5 µs |") and "<details>" not in text


def measured_limits():
    times = {"256 B, 132 blocks x 256 threads": 1.0, "4 KB, 132 blocks x 256 threads": 1.6}
    times |= {"8 KB, 132 blocks x 256 threads": 2.5, "8 KB, 132 blocks x 1024 threads": 2.0}
    rows = [{"what": "all-gather", "setting": s, "microseconds": t} for s, t in times.items()]
    rows += [{"what": "all-gather", "setting": "16 KB, 132 blocks x 256 threads", "wrong": True}]
    rows += [{"what": "grid.sync", "setting": "132 blocks x 256 threads", "microseconds": 0.7}]
    return {"device": "Some GPU", "SMs": 132, "rows": rows}


def test_limits_of_the_card(report):
    """Exchanges bound a persistent line: the fastest of each payload's next smaller one."""
    run = report.Run(saved_on_gpu(), report.exchange_times(measured_limits()))
    text = report.report(run)
    assert (
        "| 89% | 4.5 | 123 MB | ≤ 3.5 µs a step | **short by 22%**: 4.5 µs; at best 4 µs >" in text
    )
    assert (
        "persistent: 60 steps of 3 exchanges, 4 µs a step, takes 240 µs; ours takes 270 µs" in text
    )
    assert (
        "Exchanges between blocks alone:\n\n"
        "- LayerNorm-LSTM forward, T=60 B=128 H=1000, bf16, persistent: 3 a step, at least 4 µs; "
        "ours takes 4.5 µs, of which that is 89%\n"
        "- LayerNorm-LSTM training, T=60 B=128 H=1000, bf16, persistent: 3 a step, at least 4 µs; "
        "ours takes 16.7 µs, of which that is 24%\n"
    ) in text
    assert "Exchanges" not in report.report(report.Run(saved_on_gpu(), {}))


def test_a_file_of_limits(report, monkeypatch, tmp_path, capsys):
    results, limits = tmp_path / "run.json", tmp_path / "limits.json"
    results.write_text(json.dumps(saved_on_gpu()), "utf-8")
    limits.write_text(json.dumps(measured_limits()), "utf-8")
    run(report, monkeypatch, results, "--limits", limits)
    assert "Exchanges between blocks alone" in capsys.readouterr().out
    limits.write_text("{", "utf-8")
    with pytest.raises(SystemExit, match=r"limits\.json: "):
        run(report, monkeypatch, results, "--limits", limits)


def run(report, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["report.py", *map(str, arguments)])
    report.main()


def test_readme_and_chart(report, monkeypatch, tmp_path):
    results, readme, chart = (tmp_path / name for name in ("run.json", "README.md", "speed.png"))
    results.write_text(json.dumps(saved()), "utf-8")
    readme.write_text("before\n<!-- benchmarks -->\nold\n<!-- /benchmarks -->\nafter\n", "utf-8")
    run(report, monkeypatch, results, "--readme", readme, "--png", chart)
    once = readme.read_text("utf-8")
    assert once.startswith("before\n<!-- benchmarks -->\nSome CPU, avx512, 2 threads")
    assert once.endswith("\n<!-- /benchmarks -->\nafter\n") and "old" not in once
    run(report, monkeypatch, results, "--readme", readme)
    assert readme.read_text("utf-8") == once
    assert chart.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("text", ["", "<!-- /benchmarks --><!-- benchmarks -->"])
def test_readme_without_marks(report, monkeypatch, tmp_path, text):
    results, readme = tmp_path / "run.json", tmp_path / "README.md"
    results.write_text(json.dumps(saved()), "utf-8")
    readme.write_text(text, "utf-8")
    with pytest.raises(SystemExit, match=r"README\.md: it must have one `<!-- benchmarks -->`"):
        run(report, monkeypatch, results, "--readme", readme)
    assert readme.read_text("utf-8") == text


def test_another_file(report, monkeypatch, tmp_path):
    results = tmp_path / "run.json"
    for text in ("{", json.dumps({"machine_info": {"cpu": {}}, "benchmarks": []})):
        results.write_text(text, "utf-8")
        with pytest.raises(SystemExit, match=r"run\.json: "):
            run(report, monkeypatch, results)


@pytest.mark.parametrize(
    ("content", "got"),
    [
        ({}, r"without 'benchmarks': \{\}"),
        ([1], r"of another form: \[1\]"),
        (None, "of another form: null"),
        ({"benchmarks": 1}, 'of another form: {"benchmarks": 1}'),
        ({"benchmarks": [{}]}, "without 'stats': "),
        ({"benchmarks": saved()["benchmarks"]}, "without 'machine_info': "),
    ],
)
def test_json_of_something_else(report, monkeypatch, tmp_path, content, got):
    results = tmp_path / "run.json"
    results.write_text(json.dumps(content), "utf-8")
    wanted = r"run\.json: it must be what pytest benchmarks/ --benchmark-json writes, got JSON "
    with pytest.raises(SystemExit, match=wanted + got):
        run(report, monkeypatch, results)
    results.write_text(json.dumps(saved_on_gpu()), "utf-8")
    limits = tmp_path / "limits.json"
    limits.write_text("{}", "utf-8")
    with pytest.raises(SystemExit, match=r"what gpu_limits\.py writes, got JSON without 'rows'"):
        run(report, monkeypatch, results, "--limits", limits)


@pytest.mark.parametrize("option", [None, "--readme", "--png", "--whole-png"])
def test_a_run_without_a_line_of_ours(report, monkeypatch, tmp_path, option):
    data, results, out = saved(), tmp_path / "run.json", tmp_path / "out"
    data["benchmarks"] = data["benchmarks"][3:5]
    results.write_text(json.dumps(data), "utf-8")
    out.write_text(f"{report.BEGIN}\nold\n{report.END}\n")
    before = out.read_bytes()
    message = r"run\.json: it has no line of fastvae, only eager, eager bf16: save a run of "
    with pytest.raises(SystemExit, match=message):
        run(report, monkeypatch, results, *([option, out] if option else []))
    assert out.read_bytes() == before


def test_works_without_a_line_of_ours(report, monkeypatch, tmp_path):
    """Of main works that only a rival has README and charts show nothing."""
    data, chart = saved(), tmp_path / "speed.png"
    only_eager = entry(f"{DECODING}, B=1", "eager", 0.6, 0.25, 10.0)
    data["benchmarks"] = [only_eager, *data["benchmarks"][1:6]]
    made = report.Run(data)
    rows = report.table_rows(report.summary(made))
    assert [*rows] == [f"{DECODING}, B=16, fp32", f"{DECODING}, B=16, bf16"]
    old = f"| {DECODING}, B=1, fp32 | 50 ms |  |  |  |  | 80% |"
    before = f"{report.BEGIN}\n| work | ours |\n|---|---|\n{old}\n{report.END}\n"
    assert old in report.with_rows_of(before, report.summary(made)).splitlines()
    from chart import draw

    draw(made, chart)
    assert chart.read_bytes().startswith(b"\x89PNG")
    data["benchmarks"] = [only_eager, data["benchmarks"][1]]
    with pytest.raises(ValueError, match="no work has both a line of fastvae and eager, only"):
        draw(report.Run(data), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_a_real_run(report, tmp_path):
    """What a benchmark saves is what the report reads, and names no host."""
    results = tmp_path / "run.json"
    command = [
        sys.executable,
        "-m",
        "pytest",
        "bench_highway_conv.py",
        "-k",
        "fastvae and not bf16",
    ]
    options = ["--benchmark-only", "--threads", "1", "--benchmark-json", str(results)]
    # Below a worker of pytest-xdist a benchmark would not be timed.
    alone = {name: value for name, value in os.environ.items() if "XDIST" not in name}
    run = subprocess.run([*command, *options], cwd=FOLDER, env=alone, timeout=300)
    assert run.returncode == 0
    data = json.loads(results.read_text("utf-8"))
    assert data["machine_info"].keys() == {"machine", "python_version", "system", "cpu"}
    assert data["commit_info"].keys() <= {"id", "time", "dirty"}
    text, got = rows(report, data)
    assert ", 1 thread, torch" in text and len(got) == 1
    assert 0 < int(got[0].split("|")[7].strip(" %")) <= 100


def test_targets_name_what_is_measured(report):
    """A work spelt otherwise in a benchmark would leave its target unmeasured for ever."""
    sources = "".join(path.read_text("utf-8") for path in FOLDER.glob("bench_*.py"))
    for target in report.CPU_TARGETS + report.GPU_TARGETS:
        kind = target.work.split(",")[0].split(" T=")[0]
        assert kind in sources, target


def test_readme_gets_the_main_rows(report, tmp_path):
    """Without targets; rows of other works that stand there stay."""
    run = report.Run(saved())
    text = report.summary(run)
    assert f"| {DECODING}, B=1, fp32 | 50 ms |  |  |  |  | 80% |" in text.splitlines()
    assert "B=16" not in text and "target" not in text
    kept = "| something else, fp32 | 3 ms |  |  |  |  | 5% |"
    stale = f"| {DECODING}, B=1, fp32 | 99 ms |  |  |  |  | 1% |"
    before = f"{report.BEGIN}\nx\n\n| work | ours |\n|---|---|\n{stale}\n{kept}\n{report.END}\n"
    lines = report.with_rows_of(before, text).splitlines()
    assert kept in lines and stale not in lines and len(set(lines)) == len(lines)


def test_a_busy_machine_is_told(report):
    data = saved()
    assert "busy" not in report.report(report.Run(data))
    data["benchmarks"][0]["extra_info"]["spread"] = 0.3
    assert f"in 1 of 5 rows: {DECODING}, B=1, fp32 (30%)." in report.report(report.Run(data))


def test_help_needs_no_matplotlib():
    program = "import sys; sys.modules['matplotlib'] = None; import report; report.main()"
    command = [sys.executable, "-c", program, "--help"]
    done = subprocess.run(command, cwd=FOLDER, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "--whole-png" in done.stdout
