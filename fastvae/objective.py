"""The evidence lower bound with an auxiliary term, and the schedule of the KL term's weight.

    J = reconstruction + w · KL + α · auxiliary          nats per sample: sum over T, mean over B

Semeniuta et al. 2017, arXiv:1702.02390. Free bits: Kingma et al. 2016, arXiv:1606.04934. Cyclical
annealing: Fu et al. 2019, arXiv:1903.10145.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from fastvae.distributed import all_reduce


class VAEOutput(NamedTuple):
    """What a model's forward returns: the loss to minimize and its terms, in nats per sample.

    `kl` and `kl_per_dimension` [Z] are plain, before free bits; `auxiliary` is before its weight.
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    auxiliary: Tensor
    kl_per_dimension: Tensor


@dataclass(frozen=True)
class KLSchedule:
    """The KL term's weight at a step: from `floor` to `target`, linearly between `start` and `end`.

    With `cycles` > 1 the time from start to end holds that many equal cycles; each rises from floor
    to target in the first share `rise` of its length and stays there for the rest (Fu et al. take
    `rise` = 0.5). From `end` on the weight is `target`: without arguments it is 1 at every step.
    """

    floor: float = 0.0
    start: int = 0
    end: int = 0
    cycles: int = 1
    rise: float = 1.0
    target: float = 1.0

    def __post_init__(self) -> None:
        for name in ("floor", "target"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"KL schedule: {name} must be 0 or more, got {value}")
        if not 0 <= self.start <= self.end:
            raise ValueError(
                f"KL schedule: needs 0 <= start <= end, got start {self.start} and end {self.end}"
            )
        if self.cycles < 1:
            raise ValueError(f"KL schedule: cycles must be 1 or more, got {self.cycles}")
        if not 0 < self.rise <= 1:
            raise ValueError(f"KL schedule: rise must be above 0 and at most 1, got {self.rise}")

    def __call__(self, step: int) -> float:
        """The weight at `step`, counted from 0."""
        if step >= self.end:
            return self.target
        if step < self.start:
            return self.floor
        position = (step - self.start) * self.cycles / (self.end - self.start) % 1.0
        return self.floor + (self.target - self.floor) * min(position / self.rise, 1.0)


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)), nats, per dimension: mean, logvar [B, Z] -> [B, Z]."""
    return 0.5 * (mean.square() + logvar.expm1() - logvar)


def free_bits_kl(kl_per_dimension: Tensor, free_bits: float, group=None) -> Tensor:
    """Σ_z max(KL_z, free_bits): batch means KL_z [Z] -> scalar; below the threshold no gradient.

    With a process `group`, KL_z are the means over its processes, whose batches count alike.
    """
    if free_bits > 0 and group is not None:
        kl_per_dimension = all_reduce(kl_per_dimension, group) / group.size()
    return kl_per_dimension.clamp_min(free_bits).sum()


def reconstruction_nats(logits: Tensor, tokens: Tensor, ignored: int | None = None) -> Tensor:
    """−log p of each sequence, nats: logits [T, B, V], tokens [T, B] -> [B]; `ignored` left out."""
    if tokens.device.type != "cpu":  # a wrong target would stop the device; its inputs are NaN
        tokens = tokens.clamp(0, logits.shape[-1] - 1)
    nats = F.cross_entropy(
        logits.flatten(0, 1),
        tokens.flatten(),
        reduction="none",
        ignore_index=-100 if ignored is None else ignored,
    )
    return nats.view(tokens.shape).sum(0)
