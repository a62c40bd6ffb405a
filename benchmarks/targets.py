"""What each line of a benchmark run is to reach, on two threads of a CPU and on an H100."""

from typing import NamedTuple

DECODE, BYTENET = "greedy decoding, LSTM 1000", "greedy decoding, ByteNet 10"
LSTM, FORWARD = "LayerNorm-LSTM training", "LayerNorm-LSTM forward"
STEP = "training step,"


class Time(NamedTuple):
    """What a step, or a whole call, takes: a bar that no rival of the run sets."""

    microseconds: float
    of: str = "step"  # or "call"


class Target(NamedTuple):
    """`line` of `work` is `least` times as fast as a bar: whatever `over` takes for the same.

    `over` is another line of the work, or of the work `other` and then by symbol; "peak", the least
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
    Target(f"{DECODE}, B=1", "fastvae", "peak", 0.75),
    Target(f"{DECODE}, B=1", "fastvae bf16", "peak", 0.75),
    Target(f"{DECODE}, B=1", "fastvae int8", "fastvae bf16", 1.6),
    Target(f"{DECODE}, B=16", "fastvae", "eager", 5),
    Target(f"{DECODE}, B=16", "fastvae bf16", "eager", 10),
    Target(f"{DECODE}, B=128", "fastvae", "eager", 3.5),
    Target(f"{DECODE}, B=128", "fastvae bf16", "eager", 6),
    Target(f"{BYTENET}, L=56 B=1", "fastvae", "eager", 8),
    Target(f"{BYTENET}, L=56 B=1", "fastvae bf16", "eager", 15),
    Target(f"{BYTENET}, L=56 B=128", "fastvae", "eager", 3),
    Target(f"{BYTENET}, L=56 B=128", "fastvae bf16", "eager", 5),
    Target(f"{BYTENET}, L=448 B=1", "fastvae", "fastvae", 0.95, f"{BYTENET}, L=56 B=1"),
    Target(f"{BYTENET}, L=448 B=1", "fastvae bf16", "fastvae bf16", 0.95, f"{BYTENET}, L=56 B=1"),
    Target(f"{LSTM}, T=60 B=128 H=1000", "fastvae", "eager", 7),
    Target(f"{LSTM}, T=60 B=128 H=1000", "fastvae", "nn.LSTM"),
    Target(f"{LSTM}, T=60 B=128 H=1000", "fastvae bf16", "fastvae", 1.6),
    Target(f"{LSTM}, T=128 B=32 H=1000", "fastvae", "eager", 11),
    Target(f"{LSTM}, T=128 B=32 H=1000", "fastvae", "nn.LSTM"),
    Target(f"{LSTM}, T=128 B=32 H=1000", "fastvae bf16", "fastvae", 1.6),
    Target(f"{LSTM}, T=48 B=64 H=500", "fastvae", "eager", 4),
    Target(f"{LSTM}, T=48 B=64 H=500", "fastvae", "nn.LSTM"),
    Target(f"{LSTM}, T=48 B=64 H=500", "fastvae bf16", "fastvae", 1.6),
    Target(f"{STEP} PTB hybrid, ByteNet 3, B=64", "fastvae", "eager", 2),
    Target(f"{STEP} PTB hybrid, ByteNet 3, B=64", "fastvae", "compile", 1.3),
    Target(f"{STEP} PTB hybrid, ByteNet 10, B=64", "fastvae", "eager", 2),
    Target(f"{STEP} PTB hybrid, ByteNet 10, B=64", "fastvae", "compile", 1.3),
    Target(f"{STEP} tweets hybrid, LSTM 1000, B=32", "fastvae", "eager", 9),
    Target(
        f"{STEP} tweets hybrid, LSTM 1000, B=32",
        "fastvae",
        "fastvae",
        1.4,
        f"{STEP} tweets LSTM VAE 1000, B=32",
    ),
    Target(f"{STEP} PTB hybrid, LSTM 500, B=64", "fastvae", "eager", 4),
    Target(
        f"{STEP} PTB hybrid, LSTM 500, B=64",
        "fastvae",
        "fastvae",
        1.2,
        f"{STEP} PTB LSTM VAE 500, B=64",
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
)
