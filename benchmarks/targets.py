"""What each line of a benchmark run is to reach, on two threads of a CPU and on an H100."""

from typing import NamedTuple

DECODE, BYTENET = "greedy decoding, LSTM 1000", "greedy decoding, ByteNet 10"
LSTM, FORWARD = "LayerNorm-LSTM training", "LayerNorm-LSTM forward"
STEP = "training step,"
GREEDY, SAMPLE = "small hybrid, greedy", "small hybrid, temperature 1"
SERVED = "fastvae", "fastvae bf16"


class Time(NamedTuple):
    """What a step, or a whole call, takes: a bar that no rival of the run sets."""

    microseconds: float
    of: str = "step"  # or "call"


class Target(NamedTuple):
    """`line` of `work` is `least` times as fast as a bar: whatever `over` takes for the same.

    `over` is another line of the work, or of the work `other` and then by token; "peak", the least
    that the machine could take, so that `least` is the share of its limit; or a Time.
    """

    work: str
    line: str
    over: str | Time
    least: float = 1
    other: str | None = None

    def __str__(self) -> str:
        if isinstance(self.over, Time):
            return f"≤ {self.amount(1)} a {self.over.of}"
        return f"≥ {self.amount(self.least)} {self.rival}"

    @property
    def rival(self) -> str:
        if self.over == "peak":
            return "of peak"
        if self.other:
            return f"ours in {self.other}"
        return "ours, fp32" if self.over == "fastvae" else self.over.replace("fastvae", "ours,")

    def amount(self, speed: float) -> str:
        """What it is to be `speed` times as fast as the bar, in the target's own unit."""
        if isinstance(self.over, Time):
            return duration(self.over.microseconds / 1e6 / speed)
        return f"{speed:.0%}" if self.over == "peak" else f"{speed:.3g}×"

    def limit(self, speed: float) -> str:
        """What could be reached at most beside what is wanted, both in the target's own unit."""
        time, within = isinstance(self.over, Time), speed >= self.least
        sign = ("≤" if within else ">") if time else ("≥" if within else "<")
        most, wanted = self.amount(speed), self.amount(self.least)
        return f"at {'best' if time else 'most'} {most} {sign} {wanted}"


def duration(seconds: float) -> str:
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} µs"


CPU_TARGETS = (
    *(Target(f"{DECODE}, B={B}", line, "peak", 0.8) for B in (1, 16, 128) for line in SERVED),
    Target(f"{DECODE}, B=1", "fastvae int8", "fastvae bf16", 1.8),
    Target(f"{DECODE}, B=128", "fastvae bf16", "eager bf16", 1.6),
    *(Target(f"{BYTENET}, L=56 B={B}", line, "peak", 0.8) for B in (1, 128) for line in SERVED),
    *(Target(f"{BYTENET}, L=448 B=1", line, line, 0.95, f"{BYTENET}, L=56 B=1") for line in SERVED),
    *(
        Target(f"{LSTM}, {sizes}", line, over, least)
        for sizes in ("T=60 B=128 H=1000", "T=128 B=32 H=1000", "T=48 B=64 H=500")
        for line, over, least in (
            ("fastvae", "nn.LSTM", 1.05),
            ("fastvae bf16", "nn.LSTM bf16", 1.3),
            ("fastvae bf16", "eager bf16", 1.5),
        )
    ),
    *(
        Target(f"{STEP} PTB hybrid, ByteNet {layers}, B=64", line, over, least)
        for layers in (3, 10)
        for line, over, least in (
            ("fastvae", "peak", 0.75),
            ("fastvae", "compile", 1.3),
            ("fastvae bf16", "compile bf16", 1.5),
            ("fastvae bf16", "eager bf16", 1.5),
        )
    ),
    *(
        target
        for hybrid, baseline, least in (
            ("tweets hybrid, LSTM 1000, B=32", "tweets LSTM VAE 1000, B=32", 1.4),
            ("PTB hybrid, LSTM 500, B=64", "PTB LSTM VAE 500, B=64", 1.2),
        )
        for target in (
            Target(f"{STEP} {hybrid}", "fastvae", "peak", 0.75),
            Target(f"{STEP} {hybrid}", "fastvae", "fastvae", least, f"{STEP} {baseline}"),
        )
    ),
    Target(f"{STEP} tweets as lines, LSTM 1000, B=32", "fastvae", "pads computed", 1.4),
    Target(f"{STEP} place names, LSTM 300, B=64", "fastvae", "pads computed", 1.8),
    *(Target(f"{STEP} small hybrid, LSTM 200, B={B}", "fastvae", "peak", 0.55) for B in (64, 128)),
    *(
        Target(f"{SAMPLE}, B={B}", "fastvae", "fastvae", 1 / 1.15, f"{GREEDY}, B={B}")
        for B in (64, 128)
    ),
)

# Beside what serves by default, the line of the persistent kernels.
SERVING, PERSISTENT = "fastvae bf16", "fastvae persistent bf16"
GPU_TARGETS = (
    Target(f"{FORWARD}, T=128 B=32 H=1000", SERVING, Time(7)),
    Target(f"{FORWARD}, T=128 B=32 H=1000", PERSISTENT, Time(3)),
    Target(f"{FORWARD}, T=60 B=128 H=1000", SERVING, Time(7)),
    Target(f"{FORWARD}, T=60 B=128 H=1000", PERSISTENT, Time(3.5)),
    Target(f"{LSTM}, T=60 B=128 H=1000", SERVING, Time(1200, "call")),
    Target(f"{LSTM}, T=60 B=128 H=1000", PERSISTENT, Time(700, "call")),
    *(Target(f"{LSTM}, T=60 B=128 H=1000", line, "nn.LSTM fp16") for line in (SERVING, PERSISTENT)),
    *(
        Target(f"{DECODE}, B={B}", line, Time(microseconds))
        for line in (SERVING, PERSISTENT)
        for B, microseconds in ((1, 2.5), (128, 3.5), (1024, 18))
    ),
    *(
        Target(f"{DECODE}, B={B}", line, over, least)
        for line in (SERVING, PERSISTENT)
        for B in (1, 16, 128)
        for over, least in (("graph bf16", 5), ("eager bf16", 25))
    ),
    *(Target(f"{BYTENET}, L=56 B=128", line, Time(10)) for line in (SERVING, PERSISTENT)),
    *(
        Target(f"{STEP} {work}", f"fastvae recorded{low}", f"graph{low}")
        for work in (
            "PTB hybrid, LSTM 500, B=64",
            "PTB hybrid, ByteNet 10, B=64",
            "tweets hybrid, LSTM 1000, B=32",
        )
        for low in ("", " bf16")
    ),
)
