"""Base class of the text VAEs: the bound and its terms, word dropout, generation, input checks."""

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import is_fake

from fastvae import ops
from fastvae.device import check_fits
from fastvae.distributed import AcrossProcesses
from fastvae.models.packing import Packing
from fastvae.models.pretrained import PretrainedMixin
from fastvae.nn import NO_TORCHSCRIPT, NoTorchScript, upcast
from fastvae.objective import VAEOutput, free_bits_kl, gaussian_kl, reconstruction_nats, token_nats
from fastvae.ops.checks import readable
from fastvae.ops.gumbel_noise import HOTTEST
from fastvae.scalars import is_whole, plain

State = tuple[Tensor, Tensor]
LARGEST, MOST_LAYERS = 1 << 24, 1024  # of any size, so that products fit 64 bits, and of layers
_ALONE = (
    "batch norm and free bits use each process's own samples: call fastvae.nn.set_process_group("
    "model, torch.distributed.group.WORLD) to use those of all processes"
)


class TextVAE(NoTorchScript, AcrossProcesses, PretrainedMixin, nn.Module):
    """Base class of the text VAEs: tokens [B, L] -> `fastvae.VAEOutput`.

    Token ids are 0 to V − 1. On the decoder's input side, V is the start token and V + 1 replaces a
    token hidden by word dropout.

    A subclass implements `_encode` and `_expand`, and sets `decoder` (None: the head gives the
    logits) and `head` (None: no auxiliary term). Before you wrap a model in
    `DistributedDataParallel` yourself, call `fastvae.nn.set_process_group`.

    Args:
        config: the constructor's arguments by name, without device and dtype; `save_pretrained`
            writes them to config.json.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        _check_arguments(config)
        self.config = config
        self.vocab_size, self.length = config["vocab_size"], config["length"]
        self.latent_size, self.word_dropout = config["latent_size"], config["word_dropout"]
        self.pad_id, self.end_id = config["pad_id"], config["end_id"]
        self.mask_pad = config["mask_pad"]
        self.aux_weight = config.get("aux_weight", 0.0)
        self.decoder: nn.Module | None = None
        self.head: nn.Module | None = None

    def extra_repr(self) -> str:
        """The sizes, for `repr`."""
        return f"{self.vocab_size}, {self.length}, latent_size={self.latent_size}"

    def reset_parameters(self) -> None:
        """Initialize the parameters of all submodules again."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> mean, log-variance [B, Z]."""
        raise NotImplementedError

    def _expand(self, z: Tensor) -> tuple[Tensor | None, State | None]:
        """z [B, Z] -> features [L, B, D] or None, the decoder's initial state (h0, c0) or None."""
        raise NotImplementedError

    def forward(
        self,
        tokens: Tensor,
        kl_weight: float | Tensor = 1.0,
        *,
        free_bits: float = 0.0,
        eps: Tensor | None = None,
        drop_mask: Tensor | None = None,
        validate: bool = True,
    ) -> VAEOutput:
        """tokens [B, L] -> the loss and its terms, means over the batch, nats per sequence.

            loss = reconstruction + kl_weight · Σ_z max(KL_z, free_bits) + aux_weight · auxiliary

        Semeniuta et al. 2017, arXiv:1702.02390.

        Args:
            tokens: ids, [B, L] int64.
            kl_weight: weight of the KL in the loss.
            free_bits: threshold for each latent dimension: a smaller KL counts as this value, nats.
            eps: standard normal noise of the latent vectors, [B, Z]; None draws it.
            drop_mask: tokens hidden by word dropout, [B, L] bool. drop_mask[b, t] hides the token
                before position t from the decoder; the start token, at t = 0, is never hidden. None
                draws the mask in training mode and hides nothing in eval mode. With
                `word_dropout=1` every token is hidden, whatever the mask.
            validate: check that ids are in the vocabulary. False leaves the check to the caller,
                which on a GPU saves waiting for the tokens.

        Returns:
            the loss and its terms. They are NaN if an id is outside the vocabulary and was not
            checked on a GPU.

        Raises:
            ValueError: tokens, kl_weight or eps have a wrong shape or dtype, the batch is empty,
                free_bits are below 0, or an id is outside the vocabulary.
            RuntimeError: `torch.jit.trace` traces the call, which is not supported.
        """
        self.check_tokens(tokens, ids=validate)
        if not tokens.shape[0]:
            raise ValueError(
                f"a loss is a mean over sequences, got tokens of shape {list(tokens.shape)}: "
                "leave out empty batches"
            )
        if isinstance(kl_weight, Tensor) and kl_weight.dim():
            raise ValueError(f"kl_weight must be one number, got shape {list(kl_weight.shape)}")
        if not free_bits >= 0:
            raise ValueError(f"free_bits must be 0 or more, got {free_bits}")
        self._warn_if_alone()
        mean, logvar = map(upcast, self._encode(tokens))
        if eps is None:
            eps = torch.randn_like(mean)
        elif eps.shape != mean.shape:
            raise ValueError(f"eps must have shape {tuple(mean.shape)}, got {tuple(eps.shape)}")
        if drop_mask is not None and (drop_mask.shape, drop_mask.dtype) != (
            tokens.shape,
            torch.bool,
        ):
            raise ValueError(
                f"drop_mask must be bool of shape {list(tokens.shape)}, "
                f"got {drop_mask.dtype} of shape {list(drop_mask.shape)}"
            )
        inputs = self._expand_for(tokens, mean + (0.5 * logvar).exp() * eps)
        kl_per_dimension = gaussian_kl(mean, logvar).mean(0)
        reconstruction = self._nats(tokens, *inputs, drop_mask).mean()
        auxiliary = torch.zeros_like(reconstruction)
        if self.head is not None and self.decoder is not None:
            auxiliary = self._head_nats(tokens, *inputs[:2]).mean()
        # A head of weight 0 stays in the graph: DistributedDataParallel waits for its gradient.
        loss = (
            reconstruction
            + kl_weight * free_bits_kl(kl_per_dimension, free_bits, self.process_group)
            + self.aux_weight * auxiliary
        )
        return VAEOutput(loss, reconstruction, kl_per_dimension.sum(), auxiliary, kl_per_dimension)

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> posterior mean, log-variance [B, Z], in the module's mode.

        Raises:
            ValueError: tokens have a wrong shape or dtype, or an id is outside the vocabulary.
        """
        self.check_tokens(tokens)
        return self._encode(tokens)

    @torch.no_grad()
    def encode(self, tokens: Tensor) -> Tensor:
        """tokens [B, L], on any device -> posterior means [B, Z], on the model's device.

        Runs in eval mode, whatever the module's mode, and without gradients. `generate` decodes the
        result.

        Raises:
            ValueError: tokens have a wrong shape or dtype, or an id is outside the vocabulary.
        """
        with evaluating(self):
            return self.posterior(tokens.to(next(self.parameters()).device))[0]

    def log_likelihood(self, tokens: Tensor, z: Tensor) -> Tensor:
        """tokens [B, L], z [B, Z] -> log p(x | z) [B], nats, teacher-forced, in the module's mode.

        Word dropout is off, unless `word_dropout=1`, which hides every token.

        Args:
            tokens: ids, [B, L] int64.
            z: latent vectors, [B, Z].

        Returns:
            log p(x | z), [B], summed over positions; without pads if the model was made with
            `mask_pad=True`.

        Raises:
            ValueError: tokens or z have a wrong shape, tokens have a wrong dtype, or an id is
                outside the vocabulary.
        """
        self.check_tokens(tokens)
        self._check_latent(z, tokens.shape[0])
        nothing = torch.zeros_like(tokens, dtype=torch.bool)
        return -self._nats(tokens, *self._expand_for(tokens, z), nothing)

    def logits(self, tokens: Tensor, z: Tensor, *, quantization: str | None = None) -> Tensor:
        """tokens [B, L], z [B, Z] -> logits [L, B, V], teacher-forced, in the module's mode.

        Word dropout is off, unless `word_dropout=1`, which hides every token.

        Args:
            tokens: ids, [B, L] int64.
            z: latent vectors, [B, Z].
            quantization: None, or "int8", which quantizes the decoder's weights as in `generate`,
                in plain PyTorch.

        Returns:
            the logits of each position, [L, B, V]. Without a decoder they depend on z alone.

        Raises:
            ValueError: tokens or z have a wrong shape, tokens have a wrong dtype, an id is outside
                the vocabulary, or `quantization` is unknown or needs a decoder that the model
                lacks.
        """
        self.check_tokens(tokens)
        self._check_latent(z, tokens.shape[0])
        int8 = self._check_quantization(quantization)
        features, state = self._expand(z)
        if self.decoder is None:
            return self.head(features)
        previous = self._previous(tokens, torch.zeros_like(tokens, dtype=torch.bool))
        if not int8:
            return self.decoder(features, previous, state)
        if features is None:
            features = state[0].new_empty(self.length, z.shape[0], 0)
        return self.decoder.int8_logits(features, previous, state, self.word_dropout == 1)

    @torch.no_grad()
    def generate(
        self,
        z: Tensor,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        quantization: str | None = None,
    ) -> Tensor:
        """z [B, Z] -> tokens [B, L], decoded one after the other.

        Runs in eval mode, whatever the module's mode. Packed weights are cached until a parameter
        changes. Threads may share a model that is in eval mode.

        Args:
            z: latent vectors, [B, Z].
            temperature: 0 decodes greedily; above 0 samples from softmax(logits / temperature).
            generator: random source of the samples; None is torch's global one.
            quantization: None, or "int8", which quantizes the decoder's weights. It is faster;
                `fastvae.metrics.int8_loss` measures the loss in accuracy.

        Returns:
            tokens, [B, L] int64; every position after `end_id` holds `pad_id`.

        Raises:
            ValueError: z has a wrong shape, temperature is out of range, or `quantization` is
                unknown or needs a decoder that the model lacks.
        """
        self._check_latent(z)
        int8 = self._check_quantization(quantization)
        noise = self._gumbel(z, temperature, generator)
        ids = self.end_id, self.pad_id
        with evaluating(self):
            features, state = self._expand(z)
            if self.decoder is None:
                return _pick(self.head(features), noise, *ids)
            if features is None:
                features = state[0].new_empty(self.length, z.shape[0], 0)
            mask_history = self.word_dropout == 1
            return self.decoder.generate(features, state, noise, mask_history, *ids, int8)

    def sample(
        self,
        count: int,
        *,
        temperature: float = 0.0,
        generator: torch.Generator | None = None,
        quantization: str | None = None,
    ) -> Tensor:
        """Sample latent vectors from the prior and decode them -> tokens [count, L].

        Args:
            count: number of sequences.
            temperature: as in `generate`.
            generator: random source of latent vectors and tokens; None is torch's global one.
            quantization: as in `generate`.

        Returns:
            tokens, [count, L] int64, on the model's device.

        Raises:
            ValueError: count is no whole number from 0 on, or needs more memory than the machine
                has, temperature is out of range, or `quantization` is unknown or needs a decoder
                that the model lacks.
        """
        self._check_count("count", count, 0, temperature)
        parameter = next(self.parameters())
        drawn_on = parameter.device if generator is None else generator.device
        z = torch.randn(count, self.latent_size, generator=generator, device=drawn_on)
        z = z.to(parameter.device)
        return self.generate(
            z, temperature=temperature, generator=generator, quantization=quantization
        )

    def interpolate(
        self, z0: Tensor, z1: Tensor, steps: int = 7, *, quantization: str | None = None
    ) -> Tensor:
        """Decode a line between two latent vectors greedily: z0, z1 [Z] -> tokens [steps, L].

        Args:
            z0: the first latent vector, [Z].
            z1: the last one, [Z].
            steps: number of equidistant points on the line, both ends included; at least 2.
            quantization: as in `generate`.

        Returns:
            tokens, [steps, L] int64.

        Raises:
            ValueError: z0 or z1 has a wrong shape, `steps` is no whole number from 2 on, or needs
                more memory than the machine has, or `quantization` is unknown or needs a decoder
                that the model lacks.
        """
        if z0.shape != (self.latent_size,) or z1.shape != (self.latent_size,):
            raise ValueError(
                f"z0 and z1 must have shape [{self.latent_size}], "
                f"got {list(z0.shape)} and {list(z1.shape)}"
            )
        self._check_count("steps", steps, 2)
        share = torch.linspace(0, 1, steps, dtype=z0.dtype, device=z0.device)
        return self.generate(torch.lerp(z0, z1, share.unsqueeze(1)), quantization=quantization)

    def _previous(self, tokens: Tensor, drop_mask: Tensor | None) -> Tensor:
        """tokens [B, L] -> the decoder's inputs [L, B]: start, then each token, V + 1 if hidden."""
        before = tokens.T[:-1]
        if self.word_dropout == 1:
            before = torch.full_like(before, self.vocab_size + 1)
        elif drop_mask is not None:
            before = before.masked_fill(drop_mask.T[1:], self.vocab_size + 1)
        elif self.training and self.word_dropout > 0:
            hidden = torch.rand(before.shape, device=tokens.device) < self.word_dropout
            before = before.masked_fill(hidden, self.vocab_size + 1)
        return torch.cat([torch.full_like(tokens.T[:1], self.vocab_size), before])

    def _packing(self, tokens: Tensor) -> Packing | None:
        """tokens [B, L] -> how to leave out pads after a sequence's end; None computes them too.

        That is where they are in the loss, where the decoder needs them (ByteNet's batch norms do),
        and where sizes must not depend on the tokens: on GPUs, under torch.compile and so on.
        """
        packs = self.decoder is None or self.decoder.packs
        if not (self.mask_pad and packs and readable(tokens)):
            return None
        return Packing.of(tokens, self.pad_id)

    def _expand_for(
        self, tokens: Tensor, z: Tensor
    ) -> tuple[Packing | None, Tensor | None, State | None]:
        """tokens [B, L], z [B, Z] -> their packing, and what `_expand` gives, packed by it."""
        packing, (features, state) = self._packing(tokens), self._expand(z)
        if packing is not None:
            features = None if features is None else packing.pack(features)
            state = state and tuple(map(packing.sort, state))
        return packing, features, state

    def _nats(
        self,
        tokens: Tensor,
        packing: Packing | None,
        features: Tensor | None,
        state: State | None,
        drop_mask: Tensor | None,
    ) -> Tensor:
        """tokens [B, L], and features and state of `_expand_for` -> −log p(x | z) [B]."""
        if self.decoder is None:
            return self._head_nats(tokens, packing, features)
        previous = self._previous(tokens, drop_mask)
        if packing is None:
            logits = self.decoder(features, previous, state)
        else:
            logits = self.decoder(features, packing.pack(previous), state, packing.lengths)
        return self._sum_nats(tokens, packing, logits)

    def _head_nats(self, tokens: Tensor, packing: Packing | None, features: Tensor) -> Tensor:
        """tokens [B, L], features of `_expand_for` -> −log p(x | z) [B] under the head."""
        return self._sum_nats(tokens, packing, self.head(features))

    def _sum_nats(self, tokens: Tensor, packing: Packing | None, logits: Tensor) -> Tensor:
        """tokens [B, L], logits [L, B, V] or packed [N, V] -> −log p of each sequence [B]."""
        if packing is None:
            return reconstruction_nats(upcast(logits), tokens.T, self._ignored)
        nats = token_nats(upcast(logits), packing.pack(tokens.T), self._ignored)
        return packing.sum(nats)

    @property
    def _ignored(self) -> int | None:
        """The id whose positions cost nothing, or None."""
        return self.pad_id if self.mask_pad else None

    def _gumbel(
        self, z: Tensor, temperature: float, generator: torch.Generator | None
    ) -> Tensor | None:
        """Gumbel noise [L, B, V] whose addition makes argmax a sample; None for temperature 0."""
        if not 0 <= temperature <= HOTTEST:
            raise ValueError(f"temperature must be 0 to {HOTTEST:g}, got {temperature}")
        if temperature == 0:
            return None
        drawn_on = z.device if generator is None else generator.device
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=drawn_on).to(z.device)
        shape = self.length, z.shape[0], self.vocab_size
        noise = ops.gumbel_noise(seed, *shape, temperature)
        return noise.to(upcast(next(self.parameters())).dtype)

    def check_tokens(self, tokens: Tensor, *, ids: bool = True) -> None:
        """Check the shape, dtype and ids of tokens [B, L].

        Args:
            tokens: [B, L] int64.
            ids: check the values too, where Python can read them: not under `torch.compile` or
                while a CUDA graph is captured, and only on a CPU or CUDA device.

        Raises:
            ValueError: tokens have a wrong shape or dtype, or an id is outside the vocabulary.
            RuntimeError: `torch.jit.trace` traces the call, which is not supported.
        """
        _refuse_tracing()
        if tokens.dim() != 2 or tokens.shape[1] != self.length or tokens.dtype != torch.int64:
            raise ValueError(
                f"tokens must be int64 of shape [B, {self.length}], "
                f"got {tokens.dtype} of shape {list(tokens.shape)}"
            )
        if not ids or not _readable(tokens):
            return
        low, high = torch.stack(tokens.aminmax()).tolist()
        if low < 0 or high >= self.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(
                f"tokens hold the id {wrong}; this model's ids are 0 to {self.vocab_size - 1}"
            )

    def _warn_if_alone(self) -> None:
        """Warn once if several processes train but batch statistics are each process's own."""
        if not self.training or self.process_group is not None or torch.compiler.is_compiling():
            return
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            warnings.warn(_ALONE, stacklevel=3)

    def _check_quantization(self, quantization: str | None) -> bool:
        """Return whether weights are quantized; raises ValueError for an unknown value."""
        if quantization not in (None, "int8"):
            raise ValueError(f'quantization must be None or "int8", got {quantization!r}')
        if quantization and self.decoder is None:
            raise ValueError(
                f'quantization="{quantization}" needs a decoder: this model has "none"'
            )
        return quantization == "int8"

    def _check_count(self, name: str, count: int, least: int, temperature: float = 0.0) -> None:
        """Raise ValueError unless so many sequences can be decoded at once on this machine."""
        if not is_whole(count) or count < least:
            raise ValueError(f"{name} must be a whole number from {least} on, got {count!r}")
        if torch.compiler.is_compiling() or next(self.parameters()).device.type != "cpu":
            return
        noise = self.vocab_size if temperature else 0
        position = 8 + 4 * (self.config.get("feature_channels", 0) + noise)
        size = self.length * position + 4 * self.latent_size
        check_fits(
            plain(count) * size, f"the sequences of {name}={count} and what they are made of"
        )

    def _check_latent(self, z: Tensor, count: int | None = None) -> None:
        """Raise ValueError unless z is [B, Z] of real numbers, with B = `count` where given."""
        _refuse_tracing()
        wrong = z.dim() != 2 or z.shape[1] != self.latent_size
        if wrong or (count is not None and count != z.shape[0]):
            raise ValueError(
                f"z must have shape [{'B' if count is None else count}, {self.latent_size}], "
                f"got {list(z.shape)}"
            )
        if not z.is_floating_point():
            raise ValueError(f"z must have a floating-point dtype, got {z.dtype}")


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in eval mode inside the block and restore each module's mode afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _refuse_tracing() -> None:
    """Raise RuntimeError under `torch.jit.trace`, which would keep this call's sizes."""
    if torch.jit.is_tracing():
        raise RuntimeError(NO_TORCHSCRIPT.format("trace"))


def _readable(tokens: Tensor) -> bool:
    """Whether Python can read the values now; where it cannot, unknown ids make the terms NaN."""
    if torch.compiler.is_compiling() or is_fake(tokens) or not tokens.numel():
        return False
    if torch._C._functorch.is_functorch_wrapped_tensor(tokens):  # under vmap
        return False
    if tokens.device.type == "cuda":
        return not torch.cuda.is_current_stream_capturing()
    return tokens.device.type == "cpu"


def constructor_arguments(names: dict[str, Any]) -> dict[str, Any]:
    """The `locals()` of a constructor -> the model's `config`."""
    left_out = "self", "__class__", "device", "dtype"
    return {k: plain(v) for k, v in names.items() if k not in left_out}


def _pick(logits: Tensor, noise: Tensor | None, end_id: int | None, pad_id: int | None) -> Tensor:
    """logits [L, B, V] of independent positions -> tokens [B, L]."""
    tokens = (logits if noise is None else logits + noise).argmax(-1).T.contiguous()
    if end_id is None:
        return tokens
    ends = (tokens == end_id).cumsum(1)
    return tokens.masked_fill(ends - (tokens == end_id).long() > 0, pad_id)


def _check_arguments(config: dict[str, Any]) -> None:
    """Raise ValueError naming the argument that is out of range."""
    sizes = ("vocab_size", "length", "latent_size", "hidden_size", "feature_channels")
    for name in (*sizes, "conv_layers", "conv_channels", "encoder_channels"):
        given, most = config.get(name, 1), MOST_LAYERS if name == "conv_layers" else LARGEST
        for size in given if isinstance(given, (list, tuple)) else [given]:
            if not is_whole(size):
                raise ValueError(f"{name} must be a whole number, got {size!r}")
            if not 1 <= size <= most:
                raise ValueError(f"{name} must be from 1 to {most:,}, got {size}")
    for name in ("mask_pad", "carry"):
        if not isinstance(config.get(name, False), bool):
            raise ValueError(f"{name} must be True or False, got {config[name]!r}")
    if not 0 <= config["word_dropout"] <= 1:
        raise ValueError(f"word_dropout must be between 0 and 1, got {config['word_dropout']}")
    if not 0 <= config.get("aux_weight", 0) <= sys.float_info.max:
        raise ValueError(f"aux_weight must be 0 or more, and finite, got {config['aux_weight']}")
    for name in ("pad_id", "end_id"):
        id_ = config[name]
        if id_ is not None and not is_whole(id_):
            raise ValueError(f"{name} must be a whole number or None, got {id_!r}")
        if id_ is not None and not 0 <= id_ < config["vocab_size"]:
            last = config["vocab_size"] - 1
            raise ValueError(f"{name} must be between 0 and {last}, got {id_}")
    for name in ("end_id", "mask_pad"):
        if config[name] not in (None, False) and config["pad_id"] is None:
            raise ValueError(f"{name} requires pad_id")
    if config["mask_pad"] and config["pad_id"] == config["end_id"]:
        raise ValueError(
            f"mask_pad leaves pads out of the loss, and with them the end: pad_id and end_id are "
            f"both {config['pad_id']}: give pads an id of their own"
        )
