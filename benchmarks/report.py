"""Turns a saved benchmark run into README's rows, or a whole table with arithmetic, and a chart.

    pytest benchmarks/ --benchmark-only --benchmark-json results.json
    python benchmarks/report.py results.json --readme README.md --png speed.png

No call can take less than its floor: its operations at the measured peak, or its bytes at the
measured bandwidth, whichever is longer. A speed-up divided by our share of that limit is therefore
the most that anybody could reach on that machine. With what gpu_limits.py measured on the same GPU
(`--limits limits.json`) the exchanges of a persistent kernel, one after the other, are a bound too.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from targets import CPU_TARGETS, GPU_TARGETS, Target, Time, duration

BEGIN, END = "<!-- benchmarks -->", "<!-- /benchmarks -->"
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "int8": 1}
OURS = "fastvae", "fastvae bf16", "fastvae int8"
OURS += "fastvae persistent", "fastvae persistent bf16", "fastvae persistent fp16"
OURS += "fastvae recorded", "fastvae recorded bf16"
UNITS = {"B": 1, "KB": 1024}
HEADER = "work", "ours", "eager", "best other", "× eager", "× other", "of peak"
SPREAD = 0.2  # of the median, between the quartiles, that a quiet machine stays under
MAIN_WORKS = (
    "LayerNorm-LSTM training, T=60 B=128 H=1000",
    "LayerNorm-LSTM training, T=48 B=64 H=500",
    "training step, PTB hybrid, ByteNet 10, B=64",
    "training step, tweets hybrid, LSTM 1000, B=32",
    "greedy decoding, LSTM 1000, B=1",
    "greedy decoding, LSTM 1000, B=128",
)
GPU_HEADER = "µs a step", "peak memory"


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

    def __init__(self, saved: dict[str, Any], exchange: dict[int, float] | None = None) -> None:
        self.exchange = exchange or {}  # see exchange_times
        entries = [(b["stats"]["median"], b["extra_info"]) for b in saved["benchmarks"]]
        entries = [(median, info) for median, info in entries if "work" in info]
        if not entries:
            raise ValueError("no benchmark in it tells its work: save a run of benchmarks/")
        lines = dict.fromkeys(info["line"] for _, info in entries)
        if not lines.keys() & {*OURS}:
            raise ValueError(
                f"it has no line of fastvae, only {', '.join(lines)}: save a run of benchmarks/ "
                "without --rows, or with those that match fastvae's lines too"
            )
        self.machine, self.info = saved["machine_info"]["cpu"], entries[0][1]
        self.gpu = self.info.get("GPU")
        self.targets = GPU_TARGETS if self.gpu else CPU_TARGETS
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
        if step := self.exchanging(info):
            count, passes = len(info["exchanges"]), info["passes"]
            limits[f"{passes} steps of {count} exchanges, {duration(step)} a step,"] = step * passes
        return limits

    def exchanging(self, info: dict[str, Any]) -> float:
        """The seconds that the exchanges of a step take; 0 where there are none, or no limits."""
        sent = info.get("exchanges") if self.exchange else None
        return sum(self._exchange(size) for size in sent or ())

    def _exchange(self, size: int) -> float:
        """Of the sizes measured the next smaller one's, so that it bounds this one's."""
        return self.exchange[
            max((n for n in self.exchange if n <= size), default=min(self.exchange))
        ]

    def speedup(
        self, work: str, line: str, over: str | Time, other: str | None = None
    ) -> float | None:
        """How many times as fast; in one work from turns taken side by side. None: not measured."""
        mine = self.works.get(work, {}).get(line)
        if mine and over == "peak":
            return mine.share
        if mine and isinstance(over, Time):
            times = mine.info["passes"] if over.of == "step" else 1
            return over.microseconds / 1e6 * times / mine.median
        rival = self.works.get(other or work, {}).get(over)
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


def exchange_times(limits: dict[str, Any]) -> dict[int, float]:
    """By bytes that every block sees, the least seconds of an all-gather (gpu_limits.py)."""
    times: dict[int, float] = {}
    for row in limits["rows"]:
        if row["what"] == "all-gather" and "microseconds" in row:
            number, unit = row["setting"].split(",")[0].split()
            size, seconds = int(number) * UNITS[unit], row["microseconds"] / 1e6
            times[size] = min(times.get(size, seconds), seconds)
    return times


def _per_symbol(line: Line) -> float:
    return line.median / line.info["tokens"]


def summary(run: Run) -> str:
    """Rows of the main works, or of all where ours has none, without targets, as markdown."""
    ours = [work for work, lines in run.works.items() if lines.keys() & {*OURS}]
    works = [work for work in MAIN_WORKS if work in ours] or ours
    rows = [HEADER] + [
        row(run, work, line, [])[: len(HEADER)]
        for work in works
        for line in OURS
        if line in run.works[work]
    ]
    head, *body = (f"| {' | '.join(cells)} |" for cells in rows)
    return "\n".join([setting(run), "", head, "|---" + "|---:" * (len(HEADER) - 1) + "|", *body])


def report(run: Run) -> str:
    """The table, and under it each shortfall's arithmetic, as markdown."""
    notes: list[str] = []
    header = [*HEADER, *(GPU_HEADER if run.gpu else ()), "target", "result"]
    table = [f"| {' | '.join(header)} |", "|---|" + "---:|" * (len(header) - 3) + "---|---|"]
    for work, lines in run.works.items():
        table += [
            f"| {' | '.join(row(run, work, line, notes))} |" for line in OURS if line in lines
        ]
    parts = [setting(run), "\n".join(table)]
    if notes:
        listed = "\n".join(f"{n}. {note}" for n, note in enumerate(notes, 1))
        folded = f"<summary>What falls short, in numbers</summary>\n\n{listed}\n\n"
        parts.append(f"<details>{folded}</details>")
    if bounds := [
        exchanges(run, work, line)
        for work, lines in run.works.items()
        for line in lines
        if run.exchanging(lines[line].info)
    ]:
        parts.append("Exchanges between blocks alone:\n\n" + "\n".join(bounds))
    if missing := [f"{t.work}: {t.line} {t}" for t in run.targets if run.reached(t) is None]:
        parts.append("Not measured in this run: " + "; ".join(missing) + ".")
    return "\n\n".join(parts)


def exchanges(run: Run, work: str, line: str) -> str:
    """What a persistent kernel's exchanges would take on this card beside what it takes, a step."""
    mine = run.works[work][line]
    least, takes = run.exchanging(mine.info), mine.median / mine.info["passes"]
    return (
        f"- {name(work, line, mine)}: {len(mine.info['exchanges'])} a step, at least "
        f"{duration(least)}; ours takes {duration(takes)}, of which that is {least / takes:.0%}"
    )


def name(work: str, line: str, mine: Line) -> str:
    ways = "".join(f", {way}" for way in ("persistent", "recorded") if way in line)
    return f"{work}, {mine.info['dtype']}{ways}"


def setting(run: Run) -> str:
    peaks = [
        f"{peak:.0f} G{'' if dtype == 'int8' else 'FL'}OP/s in {dtype}"
        for dtype, peak in run.operations.items()
    ]
    peaks += [f"{peak:.0f} GB/s over {mb:.3g} MB" for mb, peak in sorted(run.reading.items())]
    info, cpu = run.info, run.machine.get("brand_raw") or "unknown CPU"
    if "family" in run.machine:
        cpu += f" (family {run.machine['family']}, model {run.machine['model']})"
    threads = f"{info['threads']} thread" + "s" * (info["threads"] != 1)
    place = run.gpu or f"{cpu}, {info['cpu_capability']}, {threads}"
    return (
        f"{place}, torch {info['torch']}. Medians; speed-ups "
        f"are medians over turns taken side by side; eager is float32. Peaks measured in the same "
        f"run: {', '.join(peaks)}." + " Targets are those of an H100." * bool(run.gpu) + busy(run)
    )


def busy(run: Run) -> str:
    """A sentence where other work disturbed the run: times of one line that lie far apart."""
    spreads = {
        name(work, line, mine): mine.info.get("spread", 0.0)
        for work, lines in run.works.items()
        for line, mine in lines.items()
        if line in OURS
    }
    wide = [f"{who} ({spread:.0%})" for who, spread in spreads.items() if spread > SPREAD]
    if not wide:
        return ""
    return (
        f" The machine was busy: the middle half of the times spreads over more than {SPREAD:.0%} "
        f"of the median in {len(wide)} of {len(spreads)} rows: {', '.join(wide[:5])}."
    )


def row(run: Run, work: str, line: str, notes: list[str]) -> list[str]:
    """One line of ours; what falls short is added to `notes`."""
    mine, other = run.works[work][line], run.best_other(work, line)
    eager = run.works[work].get("eager")
    targets = [t for t in run.targets if t[:2] == (work, line) and run.reached(t) is not None]
    return [
        name(work, line, mine),
        duration(mine.median),
        duration(eager.median) if eager else "",
        f"{other} {duration(run.works[work][other].median)}" if other else "",
        f"{run.speedup(work, line, 'eager'):.2f}" if eager else "",
        f"{run.speedup(work, line, other):.2f}" if other else "",
        f"{mine.share:.0%}" if mine.share else "",
        *(on_gpu(mine) if run.gpu else ()),
        "<br>".join(map(str, targets)),
        "<br>".join(result(run, target, notes) for target in targets),
    ]


def on_gpu(line: Line) -> list[str]:
    """The time of a step, where a call has steps, and the most memory in use."""
    steps, memory = line.info["passes"], line.info["peak memory, MB"]
    return [f"{line.median / steps * 1e6:.3g}" if steps else "", f"{memory:.0f} MB"]


def result(run: Run, target: Target, notes: list[str]) -> str:
    """Whether `target` is met, and if not, whether it can be, with a note on why."""
    reached = run.reached(target)
    if reached >= target.least:
        return f"met: {target.amount(reached)}"
    short = f"**short by {1 - reached / target.least:.0%}**: {target.amount(reached)}"
    if not run.works[target.work][target.line].share:
        return short
    notes.append(shortfall(run, target))
    return f"{short}; {target.limit(run.at_most(target))} ({len(notes)})"


def shortfall(run: Run, target: Target) -> str:
    """Why `target` is missed: the floor's arithmetic, and what it leaves to gain."""
    mine = run.works[target.work][target.line]
    limits = run.limits(mine.info)
    bound = max(limits, key=limits.get)
    start = (
        f"{name(target.work, target.line, mine)}: {bound} takes {duration(mine.floor)}; "
        f"ours takes {duration(mine.median)}, {mine.share:.0%} of the limit"
    )
    if target.over == "peak":
        return f"{start}; {target.least:.0%} would be {duration(mine.floor / target.least)}."
    if isinstance(target.over, Time):
        return f"{start}, which is {target.amount(run.at_most(target))} a {target.over.of}."
    over = run.works[target.other or target.work][target.over]
    reached = run.reached(target)
    end = f"at {reached:.3g}× {target.rival} ({duration(over.median)})"
    if target.other:
        tokens = over.info["tokens"] / mine.info["tokens"]
        operations = over.info["GFLOP"] / mine.info["GFLOP"] / tokens
        end += f", whose operations are {operations:.2f}× ours by token,"
    limit = run.at_most(target)
    return f"{start}; {end} that leaves {reached:.3g} / {mine.share:.0%} = {limit:.3g}× at most."


def with_rows_of(readme: str, text: str) -> str:
    """The report with those rows of README's block whose works it does not have, as they are."""
    if BEGIN not in readme or END not in readme:
        return text
    old = table_rows(readme.split(BEGIN)[1].split(END)[0])
    new = table_rows(text)
    kept = [row for work, row in old.items() if work not in new]
    last = [*new.values()][-1]
    return text.replace(last, "\n".join([last, *kept]), 1)


def table_rows(text: str) -> dict[str, str]:
    """The rows of its table by their first cell."""
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    return {row.split(" | ")[0].removeprefix("| "): row for row in rows if "| work |" not in row}


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


def read(path: Path, writer: str, make: Callable[[Any], Any]) -> Any:
    """JSON file -> make(its content). Raises ValueError where it is not what `writer` writes."""
    saved = json.loads(path.read_text("utf-8"))
    try:
        return make(saved)
    except (LookupError, TypeError, AttributeError) as error:
        lacking = f"without {error}" if isinstance(error, KeyError) else "of another form"
        got = f"got JSON {lacking}: {json.dumps(saved)[:40]}"
        raise ValueError(f"it must be what {writer} writes, {got}") from error


def with_report(run: Run) -> tuple[Run, str]:
    return run, report(run)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("results", type=Path, help="what --benchmark-json wrote")
    parser.add_argument("--limits", type=Path, help="what gpu_limits.py wrote on the same GPU")
    parser.add_argument(
        "--readme", type=Path, help="file whose marked block gets the main rows, or those there are"
    )
    parser.add_argument("--png", type=Path, help="where to draw the chart of the main rows")
    parser.add_argument("--whole-png", type=Path, help="where to draw the chart of all rows")
    arguments = parser.parse_args()
    path, exchange = arguments.limits, None
    try:
        if path:
            exchange = read(path, "gpu_limits.py", exchange_times)
        path, writer = arguments.results, "pytest benchmarks/ --benchmark-json"
        run, text = read(path, writer, lambda saved: with_report(Run(saved, exchange)))
        if arguments.readme:
            path = arguments.readme
            before = path.read_text("utf-8")
            path.write_text(replace_block(before, with_rows_of(before, summary(run))), "utf-8")
        else:
            print(text)
        for path, works in ((arguments.png, MAIN_WORKS), (arguments.whole_png, None)):
            if path:
                from chart import draw  # matplotlib takes a second

                draw(run, path, works)
    except (OSError, ValueError) as error:
        sys.exit(f"{path}: {error}")


if __name__ == "__main__":
    main()
