"""The evidence lower bound with an auxiliary term, and the schedule of the KL term's weight.

    J = reconstruction + w · KL + α · auxiliary          nats per sample: sum over T, mean over B

Semeniuta et al. 2017, arXiv:1702.02390. Free bits: Kingma et al. 2016, arXiv:1606.04934. Cyclical
annealing: Fu et al. 2019, arXiv:1903.10145.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.distributed import all_reduce


class VAEOutput(NamedTuple):
    """The loss and its terms, as a model's forward returns them: batch means, nats per sequence.

    Args:
        loss: the value to minimize, a scalar.
        reconstruction: −log p(x | z), a scalar.
        kl: KL of the posterior to the prior, before free bits and weight, a scalar.
        auxiliary: the auxiliary loss before its weight, a scalar.
        kl_per_dimension: the terms of `kl`, [Z].
    """

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    auxiliary: Tensor
    kl_per_dimension: Tensor


@dataclass(frozen=True)
class KLSchedule:
    """Weight of the KL term as a function of the step.

    The weight is `floor` before `start`, rises linearly from `floor` to `target` between the steps
    `start` and `end`, once or in cycles, and is `target` from `end` on. Without arguments it is 1
    at every step. Cyclical annealing: Fu et al. 2019, arXiv:1903.10145.

    Args:
        floor: the weight before `start`.
        start: the step at which the weight begins to rise.
        end: the step from which the weight is `target`.
        cycles: number of rises between `start` and `end`.
        rise: fraction of a cycle in which the weight rises; for the rest it is `target` (0.5 in Fu
            et al.).
        target: the weight at the end.

    Raises:
        ValueError: a value is out of range; the message names it.
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

    @property
    def settled(self) -> float:
        """The number of steps after which the weight stays at its target."""
        if self.floor == self.target:
            return 0.0
        rises = (self.cycles - 1 + self.rise) / self.cycles
        return self.start + (self.end - self.start) * rises

    def __call__(self, step: int) -> float:
        """step, counted from 0 -> weight."""
        if step >= self.end:
            return self.target
        if step < self.start:
            return self.floor
        position = (step - self.start) * self.cycles / (self.end - self.start) % 1.0
        return self.floor + (self.target - self.floor) * min(position / self.rise, 1.0)


class KLController:
    """Weight of the KL term that holds the KL at a target: a PI controller in the log domain.

    With e = log(KL / target), limited to ±1, each step does

        I ← I + 0.03 e,   next weight = exp(I + 2 e)       both from 1e-4 to 10, 0.1 at first

    Because the error is relative, one setting serves targets of all sizes. After ControlVAE (Shao
    et al. 2020, arXiv:2004.05988), whose controller is linear and has gains for each data set.

    Args:
        target: KL to hold, nats per sequence.
        device: the device of the KL that `update` receives; updates do not synchronize with it.
    """

    INTEGRAL, PROPORTIONAL, LIMIT = 0.03, 2.0, 1.0
    FIRST, LEAST, MOST = 0.1, 1e-4, 10.0

    def __init__(self, target: float, device: torch.device | str = "cpu") -> None:
        self.target = target
        # I, the weight of the next step, that of the last one.
        first = [math.log(self.FIRST), self.FIRST, self.FIRST]
        self.state = torch.tensor(first, dtype=torch.float32, device=device)

    @property
    def weight(self) -> Tensor:
        """The weight of the next step, a scalar tensor that `update` changes in place."""
        return self.state[1]

    @torch.no_grad()
    def update(self, kl: Tensor) -> None:
        """Update the weight from the KL of a step, nats per sequence, a scalar."""
        error = (kl.float() / self.target).log().clamp(-self.LIMIT, self.LIMIT)
        integral = self.state[0] + self.INTEGRAL * error
        integral = integral.clamp(math.log(self.LEAST), math.log(self.MOST))
        weight = (integral + self.PROPORTIONAL * error).exp().clamp(self.LEAST, self.MOST)
        self.state.copy_(torch.stack([integral, weight, self.state[1]]))


def gaussian_kl(mean: Tensor, logvar: Tensor) -> Tensor:
    """KL(N(mean, exp(logvar)) ‖ N(0, 1)) of each dimension, nats: mean, logvar [B, Z] -> [B, Z].

        KL = ½ (mean² + exp(logvar) − 1 − logvar)

    Args:
        mean: posterior means, [B, Z].
        logvar: posterior log-variances, [B, Z].

    Returns:
        the KL of each dimension, [B, Z].
    """
    return 0.5 * (mean.square() + logvar.expm1() - logvar)


def free_bits_kl(kl_per_dimension: Tensor, free_bits: float, group=None) -> Tensor:
    """Σ_z max(KL_z, free_bits): batch means KL_z [Z] -> scalar, nats.

    Dimensions below the threshold get no gradient. Kingma et al. 2016, arXiv:1606.04934.

    Args:
        kl_per_dimension: KL_z, nats, [Z].
        free_bits: the threshold of each dimension, nats.
        group: processes over which KL_z is averaged first; their batches must have the same size.
            None is this process alone.

    Returns:
        the sum, a scalar.
    """
    if free_bits > 0 and group is not None:
        kl_per_dimension = all_reduce(kl_per_dimension, group) / group.size()
    return kl_per_dimension.clamp_min(free_bits).sum()


def reconstruction_nats(logits: Tensor, tokens: Tensor, ignored: int | None = None) -> Tensor:
    """−log p of each sequence, nats: logits [T, B, V], tokens [T, B] -> [B].

    Args:
        logits: logits of each position, [T, B, V].
        tokens: ids, [T, B] int64.
        ignored: an id whose positions cost nothing, or None.

    Returns:
        −log p, summed over positions, [B]. On devices other than the CPU, ids out of range are
        clamped, not reported.
    """
    nats = token_nats(logits.flatten(0, 1), tokens.flatten(), ignored)
    return nats.view(tokens.shape).sum(0)


_NO_ID = -(2**62)  # PyTorch's default, -100, might be a wrong id, which is to be reported


def token_nats(logits: Tensor, tokens: Tensor, ignored: int | None = None) -> Tensor:
    """−log p of each token, nats: logits [N, V], tokens [N] -> [N].

    Args:
        logits: logits of each token, [N, V].
        tokens: ids, [N] int64.
        ignored: an id that costs nothing, or None.

    Returns:
        −log p, [N]. On devices other than the CPU, ids out of range are clamped, not reported.
    """
    if tokens.device.type != "cpu":  # a wrong target would stop the device; its inputs are NaN
        tokens = tokens.clamp(0, logits.shape[-1] - 1)
    return F.cross_entropy(
        logits, tokens, reduction="none", ignore_index=_NO_ID if ignored is None else ignored
    )
