"""Turns a saved benchmark run into README's table, the arithmetic of what falls short, a chart.

    pytest benchmarks/ --benchmark-only --benchmark-json results.json
    python benchmarks/report.py results.json --readme README.md --png speed.png

No call can take less than its floor: its operations at the measured peak, or its bytes at the
measured bandwidth, whichever is longer. A speed-up divided by our share of that limit is therefore
the most that anybody could reach on that machine.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any, NamedTuple

from chart import draw

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
OURS = "fastvae", "fastvae bf16", "fastvae int8"
GPU_HEADER = "work", "ours", "eager", "best other", "× eager", "× other", "of peak"
GPU_HEADER += "µs a step", "peak memory"
HEADER = "work", "ours", "eager", "best other", "× eager", "× other", "of peak", "target", "result"


class Target(NamedTuple):
    """`line` of `work` is `least` times as fast, by symbol, as `over` there, or in `other` work.

    Over "peak", `least` is the share of the machine's limit.
    """

    work: str
    line: str
    over: str
    least: float
    other: str | None = None


TARGETS = (
    Target("greedy decoding, LSTM 1000, B=1", "fastvae", "peak", 0.75),
    Target("greedy decoding, LSTM 1000, B=1", "fastvae bf16", "peak", 0.75),
    Target("greedy decoding, LSTM 1000, B=1", "fastvae int8", "fastvae bf16", 1.6),
    Target("greedy decoding, LSTM 1000, B=16", "fastvae", "eager", 5),
    Target("greedy decoding, LSTM 1000, B=16", "fastvae bf16", "eager", 10),
    Target("greedy decoding, LSTM 1000, B=128", "fastvae", "eager", 3.5),
    Target("greedy decoding, LSTM 1000, B=128", "fastvae bf16", "eager", 6),
    Target("greedy decoding, ByteNet 10, L=56 B=1", "fastvae", "eager", 8),
    Target("greedy decoding, ByteNet 10, L=56 B=1", "fastvae bf16", "eager", 15),
    Target("greedy decoding, ByteNet 10, L=56 B=128", "fastvae", "eager", 3),
    Target("greedy decoding, ByteNet 10, L=56 B=128", "fastvae bf16", "eager", 5),
    Target(
        "greedy decoding, ByteNet 10, L=448 B=1",
        "fastvae",
        "fastvae",
        0.95,
        "greedy decoding, ByteNet 10, L=56 B=1",
    ),
    Target(
        "greedy decoding, ByteNet 10, L=448 B=1",
        "fastvae bf16",
        "fastvae bf16",
        0.95,
        "greedy decoding, ByteNet 10, L=56 B=1",
    ),
    Target("LayerNorm-LSTM training, T=60 B=128 H=1000", "fastvae", "eager", 7),
    Target("LayerNorm-LSTM training, T=60 B=128 H=1000", "fastvae", "nn.LSTM", 1),
    Target("LayerNorm-LSTM training, T=60 B=128 H=1000", "fastvae bf16", "fastvae", 1.6),
    Target("LayerNorm-LSTM training, T=128 B=32 H=1000", "fastvae", "eager", 11),
    Target("LayerNorm-LSTM training, T=128 B=32 H=1000", "fastvae", "nn.LSTM", 1),
    Target("LayerNorm-LSTM training, T=128 B=32 H=1000", "fastvae bf16", "fastvae", 1.6),
    Target("LayerNorm-LSTM training, T=48 B=64 H=500", "fastvae", "eager", 4),
    Target("LayerNorm-LSTM training, T=48 B=64 H=500", "fastvae", "nn.LSTM", 1),
    Target("LayerNorm-LSTM training, T=48 B=64 H=500", "fastvae bf16", "fastvae", 1.6),
    Target("training step, PTB hybrid, ByteNet 3, B=64", "fastvae", "eager", 2),
    Target("training step, PTB hybrid, ByteNet 3, B=64", "fastvae", "compile", 1.3),
    Target("training step, PTB hybrid, ByteNet 10, B=64", "fastvae", "eager", 2),
    Target("training step, PTB hybrid, ByteNet 10, B=64", "fastvae", "compile", 1.3),
    Target("training step, tweets hybrid, LSTM 1000, B=32", "fastvae", "eager", 9),
    Target(
        "training step, tweets hybrid, LSTM 1000, B=32",
        "fastvae",
        "fastvae",
        1.4,
        "training step, tweets LSTM VAE 1000, B=32",
    ),
    Target("training step, PTB hybrid, LSTM 500, B=64", "fastvae", "eager", 4),
    Target(
        "training step, PTB hybrid, LSTM 500, B=64",
        "fastvae",
        "fastvae",
        1.2,
        "training step, PTB LSTM VAE 500, B=64",
    ),
)


class Line(NamedTuple):
    """One line of a work: the median of a call and the least it could take, in seconds."""

    median: float
    floor: float
    info: dict[str, Any]

    @property
    def share(self) -> float:
        return self.floor / self.median


class Run:
    """A saved run: `works[work][line]`, the machine's peaks, and the setting."""

    def __init__(self, saved: dict[str, Any]) -> None:
        entries = [(b["stats"]["median"], b["extra_info"]) for b in saved["benchmarks"]]
        entries = [(median, info) for median, info in entries if "work" in info]
        if not entries:
            raise ValueError("no benchmark in it tells its work: save a run of benchmarks/")
        self.machine, self.info = saved["machine_info"]["cpu"], entries[0][1]
        self.operations: dict[str, float] = {}  # best by dtype, 1e9 a second
        self.reading: dict[float, float] = {}  # best by megabytes, 1e9 bytes a second
        for _, info in entries:
            for best, key, name in (
                (self.operations, info["dtype"], "peak GFLOP/s"),
                (self.reading, info["MB"], "peak GB/s"),
            ):
                if info[name]:
                    best[key] = max(best.get(key, 0.0), info[name])
        turns: dict[str, list[float]] = {}  # of our float32, beside every line of a work
        for _, info in entries:
            turns.setdefault(info["work"], []).extend(info["fastvae turns"])
        self.works: dict[str, dict[str, Line]] = {}
        for median, info in entries:
            if info["line"] == "fastvae":
                median = statistics.median(turns[info["work"]])
            line = Line(median, max(self.limits(info).values()), info)
            self.works.setdefault(info["work"], {})[info["line"]] = line

    def limits(self, info: dict[str, Any]) -> dict[str, float]:
        """The seconds that each bound of a call takes at its peak."""
        limits = {"": 0.0}
        if info["dtype"] in self.operations:
            peak = self.operations[info["dtype"]]
            limits[f"{info['GFLOP']:.4g} GFLOP at {peak:.0f} GFLOP/s"] = info["GFLOP"] / peak
        if info["GB"]:
            peak = self.reading[info["MB"]]
            reads = f"{info['GB']:.3g} GB ({info['MB']:.3g} MB over and over) at {peak:.0f} GB/s"
            limits[reads] = info["GB"] / peak
        return limits

    def speedup(self, work: str, line: str, over: str, other: str | None = None) -> float | None:
        """How many times as fast; in one work from turns taken side by side. None: not measured."""
        mine, rival = (
            self.works.get(work, {}).get(line),
            self.works.get(other or work, {}).get(over),
        )
        if mine and over == "peak":
            return mine.share
        if not mine or not rival:
            return None
        if other:
            return _per_symbol(rival) / _per_symbol(mine)
        return mine.info["fastvae takes"] / rival.info["fastvae takes"]

    def reached(self, target: Target) -> float | None:
        return self.speedup(target.work, target.line, target.over, target.other)

    def at_most(self, target: Target) -> float:
        """What would be reached if the target's line took its floor."""
        return self.reached(target) / self.works[target.work][target.line].share

    def best_other(self, work: str, line: str) -> str | None:
        """The fastest rival but eager that rounds no more coarsely than `line` does."""
        lines = self.works[work]
        size = BYTES[lines[line].info["dtype"]]
        rivals = [
            name
            for name in lines
            if name not in (*OURS, "eager") and BYTES[lines[name].info["dtype"]] >= size
        ]
        return max(rivals, key=lambda name: lines[name].info["fastvae takes"], default=None)


def _per_symbol(line: Line) -> float:
    return line.median / line.info["symbols"]


def report(run: Run) -> str:
    """The table, and under it each shortfall's arithmetic, as markdown.

    A GPU's table has no targets, which are those of two CPUs, but the time of each step.
    """
    if "GPU" in run.info:
        table = [f"| {' | '.join(GPU_HEADER)} |", "|---|" + "---:|" * 8]
        for work, lines in run.works.items():
            ours = [(line, lines[line].info) for line in OURS if line in lines]
            table += [
                f"| {' | '.join([*row(run, work, line, [])[:7], *steps(lines[line], info)])} |"
                for line, info in ours
            ]
        return "\n\n".join([setting(run), "\n".join(table)])
    notes: list[str] = []
    table = [f"| {' | '.join(HEADER)} |", "|---|" + "---:|" * 6 + "---|---|"]
    for work, lines in run.works.items():
        table += [
            f"| {' | '.join(row(run, work, line, notes))} |" for line in OURS if line in lines
        ]
    parts = [setting(run), "\n".join(table)]
    if notes:
        listed = "\n".join(f"{n}. {note}" for n, note in enumerate(notes, 1))
        folded = f"<summary>What falls short, in numbers</summary>\n\n{listed}\n\n"
        parts.append(f"<details>{folded}</details>")
    if missing := [f"{t.work}: {t.line} over {t.over}" for t in TARGETS if run.reached(t) is None]:
        parts.append("Not measured in this run: " + "; ".join(missing) + ".")
    return "\n\n".join(parts)


def steps(line: Line, info: dict[str, Any]) -> list[str]:
    """Of a line on a GPU: the time of a step, where it has steps, and the most memory in use."""
    each = f"{line.median / info['passes'] * 1e6:.3g}" if info.get("passes") else ""
    return [each, f"{info['peak memory, MB']:.0f} MB"]


def setting(run: Run) -> str:
    peaks = [
        f"{peak:.0f} G{'' if dtype == 'int8' else 'FL'}OP/s in {dtype}"
        for dtype, peak in run.operations.items()
    ]
    peaks += [f"{peak:.0f} GB/s over {mb:.3g} MB" for mb, peak in sorted(run.reading.items())]
    info, cpu = run.info, run.machine.get("brand_raw") or "unknown CPU"
    threads = f"{info['threads']} thread" + "s" * (info["threads"] != 1)
    place = info.get("GPU") or f"{cpu}, {info['cpu_capability']}, {threads}"
    return (
        f"{place}, torch {info['torch']}. Medians; speed-ups "
        f"are medians over turns taken side by side; eager is float32. Peaks measured in the same "
        f"run: {', '.join(peaks)}."
    )


def row(run: Run, work: str, line: str, notes: list[str]) -> list[str]:
    """One line of ours; what falls short is added to `notes`."""
    mine, other = run.works[work][line], run.best_other(work, line)
    eager = run.works[work].get("eager")
    targets, results = [], []
    for target in TARGETS:
        reached = run.reached(target)
        if target[:2] != (work, line) or reached is None or "GPU" in mine.info:
            continue
        least = amount(target, target.least)
        targets.append(f"≥ {least} {rival(target)}")
        if reached >= target.least:
            results.append(f"met: {amount(target, reached)}")
            continue
        limit = run.at_most(target)
        results.append(
            f"**short by {1 - reached / target.least:.0%}**: {amount(target, reached)}; at most "
            f"{amount(target, limit)} {'<' if limit < target.least else '≥'} {least} "
            f"({len(notes) + 1})"
        )
        notes.append(shortfall(run, target))
    return [
        f"{work}, {mine.info['dtype']}",
        duration(mine.median),
        duration(eager.median) if eager else "",
        f"{other} {duration(run.works[work][other].median)}" if other else "",
        f"{run.speedup(work, line, 'eager'):.2f}" if eager else "",
        f"{run.speedup(work, line, other):.2f}" if other else "",
        f"{mine.share:.0%}" if mine.share else "",
        "<br>".join(targets),
        "<br>".join(results),
    ]


def shortfall(run: Run, target: Target) -> str:
    """Why `target` is missed: the floor's arithmetic, and what it leaves to gain."""
    mine = run.works[target.work][target.line]
    limits = run.limits(mine.info)
    bound = max(limits, key=limits.get)
    start = (
        f"{target.work}, {mine.info['dtype']}: {bound} takes {duration(mine.floor)}; "
        f"ours takes {duration(mine.median)}, {mine.share:.0%} of the limit"
    )
    if target.over == "peak":
        return f"{start}; {target.least:.0%} would be {duration(mine.floor / target.least)}."
    over = run.works[target.other or target.work][target.over]
    reached = run.reached(target)
    end = f"at {reached:.3g}× {rival(target)} ({duration(over.median)})"
    if target.other:
        symbols = over.info["symbols"] / mine.info["symbols"]
        operations = over.info["GFLOP"] / mine.info["GFLOP"] / symbols
        end += f", whose operations are {operations:.2f}× ours by symbol,"
    limit = run.at_most(target)
    return f"{start}; {end} that leaves {reached:.3g} / {mine.share:.0%} = {limit:.3g}× at most."


def rival(target: Target) -> str:
    if target.over == "peak":
        return "of peak"
    if target.other:
        return f"ours in {target.other}"
    return "ours, fp32" if target.over == "fastvae" else target.over.replace("fastvae", "ours,")


def amount(target: Target, ratio: float) -> str:
    return f"{ratio:.0%}" if target.over == "peak" else f"{ratio:.3g}×"


def duration(seconds: float) -> str:
    return f"{seconds:.3g} s" if seconds >= 0.9995 else f"{seconds * 1e3:.3g} ms"


def replace_block(readme: str, text: str) -> str:
    """README with what stands between its two marks replaced. Raises ValueError without them."""
    if (
        readme.count(BEGIN) != 1
        or readme.count(END) != 1
        or readme.index(BEGIN) > readme.index(END)
    ):
        raise ValueError(f"it must have one `{BEGIN}` line and, after it, one `{END}` line")
    before, rest = readme.split(BEGIN)
    return f"{before}{BEGIN}\n{text}\n{END}{rest.split(END)[1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--readme", type=Path, help="file whose marked block is replaced")
    parser.add_argument("--png", type=Path, help="where to draw the chart")
    arguments = parser.parse_args()
    path = arguments.results
    try:
        run = Run(json.loads(path.read_text("utf-8")))
        text = report(run)
        if arguments.readme:
            path = arguments.readme
            path.write_text(replace_block(path.read_text("utf-8"), text), "utf-8")
        else:
            print(text)
        if arguments.png:
            path = arguments.png
            draw(run, path)
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    main()
