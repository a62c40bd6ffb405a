"""The settings of a training run, with their checks."""

import math
from dataclasses import dataclass, fields
from typing import Any, Self

from fastvae.names import suggestion
from fastvae.objective import KLSchedule
from fastvae.scalars import plain

# The least value of a field; 0 for fields not named here.
LEAST = {
    "steps": 1,
    "batch_size": 1,
    "lr_decay_every": 1,
    "accumulate": 1,
    "log_every": 1,
    "checkpoint_every": 1,
    "eval_samples": 1,
}
LARGEST = 2**53  # whole numbers up to it are exact as floats, as which some readers parse JSON
ABOVE_ZERO = ("learning_rate", "lr_decay", "clip_norm", "kl_nats")


@dataclass(frozen=True)
class TrainingConfig:
    """The settings of a training run.

    Args:
        steps: steps of the optimizer.
        batch_size: sequences per step, over all processes and micro-batches together.
        learning_rate: Adam's learning rate.
        lr_decay: factor of the learning rate, applied every `lr_decay_every` steps.
        lr_decay_every: steps between two decays.
        lr_decay_start: the step from which these steps are counted.
        lr_floor: decays do not lead below this learning rate.
        kl_floor: `floor` of `fastvae.KLSchedule`: the KL weight before `kl_start`.
        kl_start: its `start`: the step at which the KL weight begins to rise.
        kl_end: its `end`: the step from which the KL weight is `kl_target`.
        kl_cycles: its `cycles`: number of rises between them.
        kl_rise: its `rise`: fraction of a cycle in which the weight rises.
        kl_target: its `target`: the KL weight at the end.
        kl_nats: hold the KL at this value, nats per sequence, instead of following that schedule
            (`fastvae.objective.KLController`); None follows the schedule.
        free_bits: threshold for each latent dimension: a smaller KL counts as this value, nats.
        clip_norm: largest norm of the gradient; larger ones are scaled to it. None is no limit.
        precision: "fp32" (the model's own dtype) or "bf16" (autocast).
        accumulate: micro-batches per step; batch norm sees one micro-batch of all processes.
        seed: seed of the data order, of latent noise and of word dropout.
        log_every: steps between two records of training metrics.
        eval_every: steps between two evaluations; 0 is never.
        eval_samples: sequences per evaluation; None is all of the validation data.
        checkpoint_every: steps between two checkpoints.
        sample_every: steps between two sets of samples; 0 is never.
        samples: sequences per set.

    Raises:
        ValueError: a field is out of range or of a wrong type; the message names it.
    """

    steps: int = 100_000
    batch_size: int = 64
    learning_rate: float = 1e-3
    lr_decay: float = 1.0
    lr_decay_every: int = 1000
    lr_decay_start: int = 0
    lr_floor: float = 0.0
    kl_floor: float = 0.0
    kl_start: int = 0
    kl_end: int = 0
    kl_cycles: int = 1
    kl_rise: float = 1.0
    kl_target: float = 1.0
    kl_nats: float | None = None
    free_bits: float = 0.0
    clip_norm: float | None = None
    precision: str = "fp32"
    accumulate: int = 1
    seed: int = 0
    log_every: int = 50
    eval_every: int = 1000
    eval_samples: int | None = 2000
    checkpoint_every: int = 1000
    sample_every: int = 1000
    samples: int = 5

    def __post_init__(self) -> None:
        for field in fields(self):
            object.__setattr__(self, field.name, plain(getattr(self, field.name)))
            _check_field(field.name, field.type, getattr(self, field.name))
        if self.precision not in ("fp32", "bf16"):
            raise ValueError(f'precision must be "fp32" or "bf16", got {self.precision!r}')
        if self.batch_size % self.accumulate:
            raise ValueError(
                f"batch_size {self.batch_size} is not divisible by accumulate {self.accumulate}"
            )
        _ = self.kl_schedule  # checks itself
        try:
            last = self.learning_rate_at(self.steps)
        except OverflowError:
            last = math.inf
        if not math.isfinite(last):
            raise ValueError(
                f"lr_decay {self.lr_decay} makes the learning rate infinite before step "
                f"{self.steps}: take one of at most 1"
            )

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Fields by name -> config; fields that are missing have their defaults.

        Raises:
            ValueError: a field is unknown, out of range or of a wrong type; the message names it.
        """
        known = [field.name for field in fields(cls)]
        for name in values:
            if name not in known:
                raise ValueError(f"training has no field {name!r}: {suggestion(name, known)}")
        return cls(**values)

    @property
    def kl_schedule(self) -> KLSchedule:
        """The KL weight as a function of the step."""
        names = [field.name for field in fields(KLSchedule)]
        return KLSchedule(**{name: getattr(self, f"kl_{name}") for name in names})

    @property
    def ends_before_annealing(self) -> bool:
        """Whether the last step comes while the KL weight is still annealed."""
        return self.kl_nats is None and self.steps < self.kl_schedule.settled

    @property
    def honest_kl_weight(self) -> float:
        """The least KL weight at which the bound is shown: `kl_target`, or 0 with `kl_nats`."""
        return self.kl_target if self.kl_nats is None else 0.0

    def learning_rate_at(self, step: int) -> float:
        """Number of steps done -> Adam's learning rate in the next one."""
        decays = max(0, step - self.lr_decay_start) // self.lr_decay_every
        floor = min(self.learning_rate, self.lr_floor)
        return max(floor, self.learning_rate * self.lr_decay**decays)


def _check_field(name: str, kind: Any, value: Any) -> None:
    """Raise ValueError if a value is not of the field's type or out of range."""
    whole = kind in (int, int | None)
    if isinstance(value, bool) or not isinstance(value, kind if whole else kind | int):
        raise ValueError(f"{name} must be {getattr(kind, '__name__', kind)}, got {value!r}")
    if value is None or isinstance(value, str):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value}")
    if value > LARGEST:
        got = value if value < 1e30 else "a larger one by far"
        raise ValueError(f"{name} must be at most {LARGEST}, got {got}")
    if name in ABOVE_ZERO and value <= 0:
        raise ValueError(f"{name} must be above 0, got {value}")
    if value < LEAST.get(name, 0):
        raise ValueError(f"{name} must be {LEAST.get(name, 0)} or more, got {value}")
