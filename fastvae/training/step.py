"""One training step: the batch that it reads, forward, backward, clipping, Adam.

Tokens, eps and drop mask are functions of (seed, step). They are drawn for the whole batch and then
divided among processes. So a checkpoint needs no generator state, and several processes train as
one would.
"""

import gc
import hashlib
import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastvae.device import check_fits
from fastvae.models.text_vae import TextVAE
from fastvae.objective import KLController
from fastvae.training.config import TrainingConfig
from fastvae.training.processes import wire, wrapped
from fastvae.training.recorded_step import RecordedStep

TERMS = ("loss", "reconstruction", "kl", "auxiliary", "gradient_norm")  # of a step, in this order


class Batch(NamedTuple):
    """The inputs of one step, for all processes together.

    Args:
        tokens: ids, [B, L] int64.
        eps: standard normal noise of the latent vectors, [B, Z].
        drop_mask: tokens hidden from the decoder, [B, L] bool, or None without word dropout.
    """

    tokens: Tensor
    eps: Tensor
    drop_mask: Tensor | None


def draw_batch(corpus: Any, model: TextVAE, config: TrainingConfig, step: int) -> Batch:
    """Number of steps done -> the batch of the next step.

    Args:
        corpus: the training data.
        model: gives the latent size and the word dropout.
        config: gives batch size and seed.
        step: number of steps done.

    Returns:
        the batch, on the CPU.
    """
    generator = seeded_generator(config.seed, step)
    tokens = corpus.batch(config.batch_size, generator)
    eps = torch.randn(len(tokens), model.latent_size, generator=generator, device="cpu")
    drop_mask = None
    if model.word_dropout > 0:
        drop_mask = torch.rand(tokens.shape, generator=generator, device="cpu") < model.word_dropout
    return Batch(tokens, eps, drop_mask)


def seeded_generator(seed: int, step: int | str) -> torch.Generator:
    """Seed and step -> a generator; those of close seeds and steps are unrelated.

    Args:
        seed: the run's seed.
        step: number of steps done, or a name for another purpose.
    """
    digest = hashlib.blake2b(f"{seed}/{step}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)


class TrainingStep:
    """One process's share of each step: batch -> terms [5], as `TERMS` names them.

    Args:
        model: the model.
        forward: the model, or its wrapper by torch.compile or DataParallel.
        config: the settings.
        group: the process group, or None for one process.

    Raises:
        ValueError: the batch is not divisible by the processes, `kl_nats` is more than the tokens
            can tell, or a step needs more memory than this machine has.
    """

    def __init__(
        self,
        model: TextVAE,
        forward: nn.Module,
        config: TrainingConfig,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.model, self.forward, self.config, self.group = model, forward, config, group
        self.rank, self.world = (group.rank(), group.size()) if group else (0, 1)
        if config.batch_size // config.accumulate % self.world:
            raise ValueError(
                f"batch_size {config.batch_size} is not divisible by {self.world} processes times "
                f"accumulate {config.accumulate}"
            )
        self.device = next(model.parameters()).device
        tokens = config.batch_size * model.length
        logits = tokens // config.accumulate // self.world * model.vocab_size
        if self.device.type == "cpu":
            what = f"the ids and logits of a step (batch_size {config.batch_size})"
            check_fits(8 * tokens + 2 * 4 * logits, what)
        # A CUDA graph reads the learning rate from a fixed address.
        cuda, rate = self.device.type == "cuda", config.learning_rate
        self.optimizer = torch.optim.Adam(
            model.parameters(),
            torch.tensor(rate, device=self.device) if cuda else rate,
            fused=self.device.type in ("cpu", "cuda"),
            capturable=cuda,
        )
        self._recorded: RecordedStep | None = None
        self.controller: KLController | None = None
        if config.kl_nats is not None:
            most = model.length * math.log(model.vocab_size)
            if config.kl_nats > most:
                raise ValueError(
                    f"kl_nats must be at most {most:.1f}, what {model.length} tokens of "
                    f"{model.vocab_size} can tell, got {config.kl_nats:g}"
                )
            self.controller = KLController(config.kl_nats, self.device)

    def kl_weight(self, step: int) -> float:
        """The KL weight of the last step; `step` is the number of steps before it."""
        if self.controller:
            return self.controller.state[2].item()
        return self.config.kl_schedule(step)

    def share(self, step: int) -> int:
        """Give all processes the first one's weights and optimizer state -> its steps done."""
        if not self.group:
            return step
        self.forward = wrapped(self.forward, self.group)
        count = torch.tensor(float(step), device=wire(self.group, self.device))
        dist.broadcast(count, 0, self.group)
        if self.controller:
            state = self.controller.state.to(count.device)
            dist.broadcast(state, 0, self.group)
            self.controller.state.copy_(state)
        if int(count):
            if self.rank:
                self._make_moments(float(count))
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    for name in ("exp_avg", "exp_avg_sq"):
                        dist.broadcast(self.optimizer.state[parameter][name], 0, self.group)
        return int(count)

    def record(self, say: Callable[[str], None]) -> None:
        """Run later steps as one CUDA graph, on one GPU only; `say` gets a line if that fails."""
        if self.device.type == "cuda" and not isinstance(self.forward, nn.DataParallel):
            self._recorded = RecordedStep(self._update, self.device, say)

    def release(self) -> None:
        """Release gradients, recorded step, and the wrapper, which must not outlive its group."""
        self.optimizer.zero_grad()
        self.forward, self.group, self._recorded = self.model, None, None
        gc.collect()

    def __call__(self, batch: Batch, step: int) -> Tensor:
        """Do one step -> its terms [5], on the model's device.

        Args:
            batch: the inputs of all processes.
            step: number of steps done before.

        Raises:
            ValueError: an id is outside the vocabulary.
        """
        rate = self.config.learning_rate_at(step)
        kl_weight = self.controller.weight if self.controller else self.config.kl_schedule(step)
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate
        self.model.check_tokens(batch.tokens)
        if self._recorded:
            return self._recorded(*batch, None if self.controller else torch.tensor(kl_weight))
        return self._update(*batch, kl_weight)

    def _update(
        self,
        tokens: Tensor,
        eps: Tensor,
        drop_mask: Tensor | None,
        kl_weight: float | Tensor | None,
    ) -> Tensor:
        """Compute the gradients of all micro-batches, clip them, step Adam -> terms [5]."""
        c = self.config
        if self.controller:
            kl_weight = self.controller.weight
        self.optimizer.zero_grad()
        terms = 0
        for micro in range(c.accumulate):
            rows = self._own_rows(micro)
            last = micro == c.accumulate - 1
            with nullcontext() if last or not self.group else self.forward.no_sync():
                with autocast(self.device, c):
                    out = self.forward(
                        tokens[rows].to(self.device),
                        kl_weight,
                        free_bits=c.free_bits,
                        eps=eps[rows].to(self.device),
                        drop_mask=None if drop_mask is None else drop_mask[rows].to(self.device),
                        validate=False,
                    )
                (out.loss / c.accumulate).backward()
            named = [getattr(out, name).detach() for name in TERMS[:-1]]
            terms = terms + torch.stack(named) / c.accumulate
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = get_total_norm(gradients)
        if c.clip_norm is not None:
            clip_grads_with_norm_(self.model.parameters(), c.clip_norm, norm)
        self.optimizer.step()
        if self.controller:
            self.controller.update(self._mean(terms[TERMS.index("kl")]))
        return torch.cat([terms, norm.to(terms).view(1)])

    def _mean(self, value: Tensor) -> Tensor:
        """value -> its mean over all processes."""
        if not self.group:
            return value
        value = value.to(wire(self.group, self.device), copy=True)
        dist.all_reduce(value, group=self.group)
        return value.to(self.device) / self.world

    def _own_rows(self, micro: int) -> slice:
        """The rows of a micro-batch that belong to this process."""
        size = self.config.batch_size // self.config.accumulate
        share = size // self.world
        begin = micro * size + self.rank * share
        return slice(begin, begin + share)

    def _make_moments(self, step: float) -> None:
        """Create Adam's state after `step` steps, with zeros to be filled."""
        state = {
            n: {
                "step": torch.tensor(step, device="cpu"),  # one per parameter: Adam counts in place
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }
            for n, p in enumerate(self.model.parameters())
            if p.requires_grad
        }
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": state})


def autocast(device: torch.device, config: TrainingConfig) -> torch.autocast:
    """Context of a forward pass in the config's precision.

    Args:
        device: the model's device.
        config: gives the precision.
    """
    return torch.autocast(device.type, torch.bfloat16, enabled=config.precision == "bf16")
