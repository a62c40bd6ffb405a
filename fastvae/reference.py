"""Reference layers and models in plain PyTorch: what fastvae must equal, and its rival in speed.

Written from the equations with `torch.nn` alone (one-hots, convolutions, loops over time), apart
from `fastvae.nn` and `fastvae.models`, with the same constructors and the same state dict.
Semeniuta et al. 2017, arXiv:1702.02390; the LSTM baseline: Bowman et al. 2016, arXiv:1511.06349.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastvae.ops.gumbel_noise import gumbel_noise_reference

EPS = 1e-4


class Output(NamedTuple):
    """Scalars in nats per sample, mean over the batch; kl_per_dimension [Z]."""

    loss: Tensor
    reconstruction: Tensor
    kl: Tensor
    auxiliary: Tensor
    kl_per_dimension: Tensor


def _uniform(module: nn.Module) -> nn.Module:
    """Weights and biases from U(-0.1, 0.1)."""
    for parameter in module.parameters():
        nn.init.uniform_(parameter, -0.1, 0.1)
    return module


def _norm(channels: int, factory: dict) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(channels, eps=EPS, momentum=0.1, **factory)


class LayerNormLSTM(nn.Module):
    """LSTM with one LayerNorm over the sum of its four gates' pre-activations; gates i, f, g, o."""

    def __init__(self, input_size: int, hidden_size: int, *, eps=EPS, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.hidden_size, self.eps = hidden_size, eps
        self.weight_ih = nn.Parameter(torch.empty(4 * hidden_size, input_size, **factory))
        self.weight_hh = nn.Parameter(torch.empty(4 * hidden_size, hidden_size, **factory))
        self.bias = nn.Parameter(torch.empty(4 * hidden_size, **factory))
        self.norm_weight = nn.Parameter(torch.empty(4 * hidden_size, **factory))
        self.norm_bias = nn.Parameter(torch.empty(4 * hidden_size, **factory))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        _uniform(self)
        nn.init.ones_(self.norm_weight)
        nn.init.zeros_(self.norm_bias)

    def forward(self, x: Tensor, state: tuple[Tensor, Tensor] | None = None, *, lengths=None):
        """x [T, B, I], state (h0, c0) [B, H], lengths [B] -> y [T, B, H], (h_n, c_n) [B, H]."""
        if lengths is not None:
            return self._each(x, state, lengths)
        inputs = F.linear(x, self.weight_ih, self.bias)
        h, c = state or (inputs.new_zeros(x.shape[1], self.hidden_size),) * 2
        outputs = []
        for input_t in inputs.unbind(0):
            a = input_t + F.linear(h, self.weight_hh)
            a = F.layer_norm(a, a.shape[-1:], self.norm_weight, self.norm_bias, self.eps)
            i, f, g, o = a.chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
            outputs.append(h)
        return torch.stack(outputs), (h, c)

    def _each(self, x: Tensor, state, lengths: Tensor):
        """Each sequence alone, as long as it is, then zeros."""
        outputs, states = [], []
        h0, c0 = state or (x.new_zeros(x.shape[1], self.hidden_size),) * 2
        for b, steps in enumerate(lengths.tolist()):
            own = slice(b, b + 1)
            y, last = x.new_zeros(0, 1, self.hidden_size), (h0[own], c0[own])
            if steps:
                y, last = self(x[:steps, own], last)
            outputs.append(F.pad(y, (0, 0, 0, 0, 0, len(x) - steps)))
            states.append(last)
        h_n, c_n = map(torch.cat, zip(*states, strict=True))
        return torch.cat(outputs, 1), (h_n, c_n)


class HighwayConv(nn.Module):
    """Causal convolution of kernel 2, batch norm, gates i, f, g."""

    def __init__(self, channels: int, *, carry: bool, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.carry = carry
        self.weight = nn.Parameter(torch.empty(3 * channels, channels, 2, **factory))
        self.bias = nn.Parameter(torch.empty(3 * channels, **factory))
        _uniform(self)
        self.norm = _norm(3 * channels, factory)

    def forward(self, x: Tensor, before: Tensor) -> Tensor:
        """x [B, C, T] and the vector before its first, [B, C, 1] -> y [B, C, T]."""
        a = self.norm(F.conv1d(torch.cat([before, x], dim=-1), self.weight, self.bias))
        i, f, g = a.chunk(3, dim=1)
        y = torch.sigmoid(i) * torch.tanh(g)
        return y + torch.sigmoid(f) * x if self.carry else y


class HighwayConvStack(nn.Module):
    """`layers` highway convolutions; x [T, B, C] -> y [T, B, C]."""

    def __init__(self, channels: int, layers: int, *, carry=True, device=None, dtype=None):
        super().__init__()
        self.layers = nn.ModuleList(
            HighwayConv(channels, carry=carry, device=device, dtype=dtype) for _ in range(layers)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.advance(x, None)[0]

    def advance(self, x: Tensor, state: list[Tensor] | None) -> tuple[Tensor, list[Tensor]]:
        """x [T, B, C] after earlier ones -> y [T, B, C], each layer's last input [B, C, 1]."""
        x = x.permute(1, 2, 0)
        state = state or [torch.zeros_like(x[..., :1])] * len(self.layers)
        after = []
        for layer, before in zip(self.layers, state, strict=True):
            after.append(x[..., -1:])
            x = layer(x, before)
        return x.permute(2, 0, 1), after


class ConvEncoder(nn.Module):
    """Strided convolutions over one-hot tokens, then one linear layer to mean and log-variance."""

    def __init__(self, vocab_size, length, latent_size, channels, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        self.vocab_size = vocab_size
        sizes = [vocab_size, *channels]
        self.convs = nn.ModuleList(
            _uniform(nn.Conv1d(before, after, 3, stride=2, padding=1, **factory))
            for before, after in pairwise(sizes)
        )
        self.norms = nn.ModuleList(_norm(size, factory) for size in channels)
        flat = channels[-1] * (length // 2 ** len(channels))
        self.linear = _uniform(nn.Linear(flat, 2 * latent_size, **factory))

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> mean, logvar [B, Z]."""
        x = F.one_hot(tokens, self.vocab_size).mT.to(self.linear.weight.dtype)
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return self.linear(x.flatten(1)).chunk(2, dim=-1)


class DeconvDecoder(nn.Module):
    """A linear layer, then transposed convolutions that double the length up to L."""

    def __init__(self, latent_size, length, channels, feature_channels, *, device=None, dtype=None):
        super().__init__()
        factory = {"device": device, "dtype": dtype}
        sizes = [*reversed(channels), feature_channels]
        self.channels = sizes[0]
        flat = sizes[0] * (length // 2 ** len(channels))
        self.linear = _uniform(nn.Linear(latent_size, flat, **factory))
        self.convs = nn.ModuleList(
            _uniform(
                nn.ConvTranspose1d(
                    before, after, 3, stride=2, padding=1, output_padding=1, **factory
                )
            )
            for before, after in pairwise(sizes)
        )
        self.norms = nn.ModuleList(_norm(size, factory) for size in sizes[1:])

    def forward(self, z: Tensor) -> Tensor:
        """z [B, Z] -> features [L, B, D]."""
        x = torch.relu(self.linear(z)).unflatten(1, (self.channels, -1))
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = torch.relu(norm(conv(x)))
        return x.permute(2, 0, 1)


class LSTMDecoder(nn.Module):
    """LayerNorm-LSTM and classifier."""

    def __init__(self, input_size: int, hidden_size: int, vocab_size: int, factory: dict):
        super().__init__()
        self.lstm = LayerNormLSTM(input_size, hidden_size, **factory)
        self.classifier = _uniform(nn.Linear(hidden_size, vocab_size, **factory))

    def forward(self, x: Tensor, state=None):
        """x [T, B, I] -> logits [T, B, V], state to go on from."""
        y, state = self.lstm(x, state)
        return self.classifier(y), state


class ByteNetDecoder(nn.Module):
    """Gated 1x1 convolution, highway convolutions, classifier."""

    def __init__(self, input_size, channels, layers, carry, vocab_size, factory: dict):
        super().__init__()
        self.input = _uniform(nn.Linear(input_size, 2 * channels, **factory))
        self.input_norm = _norm(2 * channels, factory)
        self.stack = HighwayConvStack(channels, layers, carry=carry, **factory)
        self.classifier = _uniform(nn.Linear(channels, vocab_size, **factory))

    def forward(self, x: Tensor, state=None):
        """x [T, B, I] -> logits [T, B, V], state to go on from."""
        T, B, _ = x.shape
        p, q = self.input_norm(self.input(x.flatten(0, 1))).chunk(2, dim=-1)
        y, state = self.stack.advance((torch.tanh(p) * torch.sigmoid(q)).view(T, B, -1), state)
        return self.classifier(y), state


class TextVAE(nn.Module):
    """What both models share: the bound, its terms, and generation token by token.

    A model defines `posterior(tokens)`, `start(z) -> features [L, B, D] | None, state` and
    `decoder(inputs [T, B, I], state) -> logits, state`.
    """

    def __init__(self, vocab_size, length, latent_size, word_dropout, pad_id, end_id, mask_pad):
        super().__init__()
        self.vocab_size, self.length, self.latent_size = vocab_size, length, latent_size
        self.word_dropout = word_dropout
        self.pad_id, self.end_id, self.mask_pad = pad_id, end_id, mask_pad
        self.aux_weight = 0.0
        self.head: nn.Linear | None = None
        self.decoder: nn.Module | None = None

    def forward(self, tokens, kl_weight=1.0, *, free_bits=0.0, eps=None, drop_mask=None) -> Output:
        """tokens [B, L], eps [B, Z], drop_mask [B, L] -> terms of J, nats per sample."""
        mean, logvar = self.posterior(tokens)
        eps = torch.randn_like(mean) if eps is None else eps
        z = mean + torch.exp(0.5 * logvar) * eps
        if drop_mask is None and self.training and 0 < self.word_dropout < 1:
            drop_mask = torch.rand(tokens.shape, device=tokens.device) < self.word_dropout
        logits, head_logits = self.logits(tokens, z, drop_mask)
        reconstruction = self.nats(logits, tokens).mean()
        auxiliary = torch.zeros_like(reconstruction)
        if head_logits is not None:
            auxiliary = self.nats(head_logits, tokens).mean()
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean(0)
        loss = reconstruction + kl_weight * kl.clamp(min=free_bits).sum()
        loss = loss + self.aux_weight * auxiliary
        return Output(loss, reconstruction, kl.sum(), auxiliary, kl)

    def nats(self, logits: Tensor, tokens: Tensor) -> Tensor:
        """-log p of each sample: logits [L, B, V], tokens [B, L] -> [B]."""
        nats = F.cross_entropy(logits.permute(1, 2, 0), tokens, reduction="none")
        if self.mask_pad:
            nats = nats.masked_fill(tokens == self.pad_id, 0)
        return nats.sum(-1)

    def logits(self, tokens: Tensor, z: Tensor, drop_mask: Tensor | None = None):
        """Teacher-forced logits [L, B, V], and those of the auxiliary head or None."""
        features, state = self.start(z)
        if self.decoder is None:
            return self.head(features), None
        previous = torch.cat([torch.full_like(tokens[:, :1], self.vocab_size), tokens[:, :-1]], 1)
        if self.word_dropout >= 1:
            previous[:, 1:] = self.vocab_size + 1
        elif drop_mask is not None:
            previous[:, 1:] = previous[:, 1:].masked_fill(drop_mask[:, 1:], self.vocab_size + 1)
        logits, _ = self.decoder(self.inputs(features, previous.T), state)
        return logits, None if self.head is None else self.head(features)

    def inputs(self, features: Tensor | None, previous: Tensor) -> Tensor:
        """features [T, B, D], previous tokens [T, B] -> decoder's input [T, B, D + V + 2]."""
        one_hot = F.one_hot(previous, self.vocab_size + 2).to(self.decoder.classifier.weight.dtype)
        return one_hot if features is None else torch.cat([features, one_hot], dim=-1)

    def log_likelihood(self, tokens: Tensor, z: Tensor) -> Tensor:
        """log p(x | z): tokens [B, L], z [B, Z] -> [B], nats."""
        return -self.nats(self.logits(tokens, z)[0], tokens)

    @torch.no_grad()
    def generate(self, z: Tensor, *, temperature=0.0, generator=None) -> Tensor:
        """z [B, Z] -> tokens [B, L]; temperature 0 is greedy."""
        was_training = self.training
        self.eval()
        try:
            return self._generate(z, self._gumbel(z, temperature, generator))
        finally:
            self.train(was_training)

    def _gumbel(self, z: Tensor, temperature: float, generator) -> Tensor:
        shape = (self.length, z.shape[0], self.vocab_size)
        if temperature == 0:
            return z.new_zeros(1).expand(shape)
        seed = torch.randint(2**63 - 1, (1,), generator=generator, device=z.device)
        return gumbel_noise_reference(seed, *shape, temperature).to(
            torch.promote_types(z.dtype, torch.float32)
        )

    def _generate(self, z: Tensor, noise: Tensor) -> Tensor:
        features, state = self.start(z)
        if self.decoder is None:
            return self._stop((self.head(features) + noise).argmax(-1).T)
        tokens = torch.full((z.shape[0], self.length), -1, device=z.device)
        previous = torch.full((1, z.shape[0]), self.vocab_size, device=z.device)
        for t in range(self.length):
            features_t = None if features is None else features[t : t + 1]
            logits, state = self.decoder(self.inputs(features_t, previous), state)
            tokens[:, t] = (logits[0] + noise[t]).argmax(-1)
            if self.end_id is not None and (tokens == self.end_id).any(-1).all():
                break
            drop_mask = torch.full_like(previous, self.vocab_size + 1)
            previous = drop_mask if self.word_dropout >= 1 else tokens[None, :, t]
        return self._stop(tokens)

    def _stop(self, tokens: Tensor) -> Tensor:
        """After its first end_id a sequence is pad_id."""
        if self.end_id is None:
            return tokens
        ends = (tokens == self.end_id).int()
        return tokens.masked_fill(ends.cumsum(-1) - ends > 0, self.pad_id)

    def sample(self, count: int, *, temperature=0.0, generator=None) -> Tensor:
        """`count` sequences from the prior, [count, L]."""
        weight = next(self.parameters())
        z = torch.randn(count, self.latent_size, generator=generator, device=weight.device)
        return self.generate(z.to(weight.dtype), temperature=temperature, generator=generator)

    def interpolate(self, z0: Tensor, z1: Tensor, steps: int = 7) -> Tensor:
        """Greedy texts on the line from z0 [Z] to z1 [Z], ends included: [steps, L]."""
        share = torch.linspace(0, 1, steps, device=z0.device, dtype=z0.dtype)[:, None]
        return self.generate(z0 + share * (z1 - z0))


class HybridVAE(TextVAE):
    """Convolutional encoder and decoder, and a recurrent or causal decoder on its features."""

    def __init__(
        self,
        vocab_size: int,
        length: int,
        *,
        latent_size=100,
        encoder_channels=(128, 256, 512, 512, 512),
        feature_channels=200,
        decoder="lstm",
        hidden_size=1000,
        conv_layers=3,
        conv_channels=256,
        carry=True,
        aux_weight=0.2,
        word_dropout=0.0,
        pad_id=None,
        end_id=None,
        mask_pad=False,
        device=None,
        dtype=None,
    ):
        super().__init__(vocab_size, length, latent_size, word_dropout, pad_id, end_id, mask_pad)
        factory = {"device": device, "dtype": dtype}
        channels, self.aux_weight = list(encoder_channels), aux_weight
        self.encoder = ConvEncoder(vocab_size, length, latent_size, channels, **factory)
        self.deconvolution = DeconvDecoder(
            latent_size, length, channels, feature_channels, **factory
        )
        self.head = _uniform(nn.Linear(feature_channels, vocab_size, **factory))
        inputs = feature_channels + vocab_size + 2
        if decoder == "lstm":
            self.decoder = LSTMDecoder(inputs, hidden_size, vocab_size, factory)
        elif decoder == "bytenet":
            self.decoder = ByteNetDecoder(
                inputs, conv_channels, conv_layers, carry, vocab_size, factory
            )
        elif decoder != "none":
            raise ValueError(f"decoder is {decoder!r}; it must be 'lstm', 'bytenet' or 'none'")

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> mean, logvar [B, Z]."""
        return self.encoder(tokens)

    def start(self, z: Tensor) -> tuple[Tensor, None]:
        return self.deconvolution(z), None


class LSTMVAE(TextVAE):
    """The baseline: LayerNorm-LSTMs on both sides, z in the decoder's initial state."""

    def __init__(
        self,
        vocab_size: int,
        length: int,
        *,
        latent_size=100,
        hidden_size=1000,
        word_dropout=0.5,
        pad_id=None,
        end_id=None,
        mask_pad=False,
        device=None,
        dtype=None,
    ):
        super().__init__(vocab_size, length, latent_size, word_dropout, pad_id, end_id, mask_pad)
        factory = {"device": device, "dtype": dtype}
        self.encoder = LayerNormLSTM(vocab_size, hidden_size, **factory)
        self.posterior_linear = _uniform(nn.Linear(hidden_size, 2 * latent_size, **factory))
        self.initial_state = _uniform(nn.Linear(latent_size, 2 * hidden_size, **factory))
        self.decoder = LSTMDecoder(vocab_size + 2, hidden_size, vocab_size, factory)

    def posterior(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> mean, logvar [B, Z]."""
        one_hot = F.one_hot(tokens.T, self.vocab_size).to(self.posterior_linear.weight.dtype)
        lengths = None
        if self.mask_pad:  # the encoder stops at a sequence's last token
            position = torch.arange(1, self.length + 1, device=tokens.device)
            lengths = torch.where(tokens == self.pad_id, 0, position).amax(1)
        _, (h, _) = self.encoder(one_hot, lengths=lengths)
        return self.posterior_linear(h).chunk(2, dim=-1)

    def start(self, z: Tensor) -> tuple[None, tuple[Tensor, Tensor]]:
        h0, c0 = torch.tanh(self.initial_state(z)).chunk(2, dim=-1)
        return None, (h0, c0)
