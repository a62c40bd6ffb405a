"""The autoregressive decoders: teacher-forced logits for training, one op call to generate.

Both read [features, one-hot(previous symbol)] over V + 2 symbols: after V, `start` and `dropped`.
Semeniuta et al. 2017, arXiv:1702.02390.
"""

import torch
from torch import Tensor, nn

from fastvae import ops
from fastvae.models.weight_cache import WeightCache
from fastvae.nn import (
    BatchNorm,
    HighwayConvStack,
    LayerNormLSTM,
    Linear,
    input_embeddings,
)
from fastvae.ops.decode_bytenet import bytenet_step
from fastvae.ops.decode_lstm import lstm_step, teacher_forced

State = tuple[Tensor, Tensor]


class LSTMDecoder(nn.Module):
    """LayerNorm-LSTM and a classifier."""

    def __init__(
        self, feature_size: int, vocab_size: int, hidden_size: int, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        self.vocab_size = vocab_size
        self.lstm = LayerNormLSTM(feature_size + vocab_size + 2, hidden_size, **factory_kwargs)
        self.classifier = Linear(hidden_size, vocab_size, **factory_kwargs)
        self.weight_cache = WeightCache()

    def forward(self, features: Tensor | None, previous: Tensor, state: State | None) -> Tensor:
        """features [T, B, D] or None, previous ids [T, B], h0 and c0 [B, H] -> logits [T, B, V]."""
        y, _ = self.lstm(features, state, symbols=previous)
        return self.classifier(y)

    def generate(
        self,
        features: Tensor,
        state: State | None,
        noise: Tensor | None,
        mask_history: bool,
        end_id: int | None,
        pad_id: int | None,
        int8: bool = False,
    ) -> Tensor:
        """features [T, B, D], D may be 0 -> tokens [B, T]; `noise` [T, B, V] joins the logits.

        With `int8` weights are rounded: `fastvae.ops.int8`.
        """
        D, dtype = features.shape[-1], features.dtype
        weights, packed = self.weight_cache.get(self, self._packed, D, dtype, mask_history, int8)
        state, ids = self._state(features, state), (end_id, pad_id)
        return ops.decode_lstm(features, *weights, *state, noise, self.lstm.eps, *ids, packed)

    def int8_logits(
        self, features: Tensor, previous: Tensor, state: State | None, mask_history: bool
    ) -> Tensor:
        """As forward, in plain PyTorch, with the rounded weights of `generate`."""
        state = self._state(features, state)
        weights = self._weights(features.shape[-1], features.dtype, mask_history)
        feature_weight, rows, *others = weights
        step = lstm_step(feature_weight, *others, *state, self.lstm.eps, int8=True)
        return teacher_forced(step, features, rows, known(previous, self.vocab_size))

    def _state(self, features: Tensor, state: State | None) -> State:
        if state is None:
            return (features.new_zeros(features.shape[1], self.lstm.hidden_size),) * 2
        h0, c0 = state
        return h0.to(features.dtype), c0.to(features.dtype)

    def _packed(self, D: int, dtype: torch.dtype, mask_history: bool, int8: bool):
        weights = self._weights(D, dtype, mask_history)
        return weights, ops.decode_lstm_pack(weights[0], weights[2], weights[5], int8=int8)

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool) -> list[Tensor]:
        """What `decode_lstm` takes, in its order and in `dtype`."""
        lstm = self.lstm
        weights = (
            lstm.weight_ih[:, :D],
            token_embeddings(lstm.weight_ih, lstm.bias, self.vocab_size, mask_history),
            lstm.weight_hh,
            lstm.norm_weight,
            lstm.norm_bias,
            self.classifier.weight,
            self.classifier.bias,
        )
        return [t.to(dtype) for t in weights]


class ByteNetDecoder(nn.Module):
    """Gated 1x1 convolution with batch norm, highway masked convolutions, a classifier."""

    def __init__(
        self,
        feature_size: int,
        vocab_size: int,
        channels: int,
        layers: int,
        *,
        carry: bool = True,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__()
        factory_kwargs = {"device": device, "dtype": dtype}
        self.vocab_size, self.carry = vocab_size, carry
        self.input = Linear(feature_size + vocab_size + 2, 2 * channels, **factory_kwargs)
        self.input_norm = BatchNorm(2 * channels, **factory_kwargs)
        self.stack = HighwayConvStack(channels, layers, carry=carry, **factory_kwargs)
        self.classifier = Linear(channels, vocab_size, **factory_kwargs)
        self.weight_cache = WeightCache()

    def forward(self, features: Tensor, previous: Tensor, state: None = None) -> Tensor:
        """features [T, B, D], previous symbols [T, B] -> logits [T, B, V]."""
        a = self.input(features, previous)
        p, q = self.input_norm(a.flatten(0, 1)).chunk(2, -1)
        x = (p.tanh() * q.sigmoid()).unflatten(0, previous.shape)
        return self.classifier(self.stack(x))

    def generate(
        self,
        features: Tensor,
        state: None,
        noise: Tensor | None,
        mask_history: bool,
        end_id: int | None,
        pad_id: int | None,
        int8: bool = False,
    ) -> Tensor:
        """features [T, B, D] -> tokens [B, T]; `noise` [T, B, V] joins the logits.

        With `int8` weights are rounded: `fastvae.ops.int8`.
        """
        D, dtype = features.shape[-1], features.dtype
        weights, packed = self.weight_cache.get(self, self._packed, D, dtype, mask_history, int8)
        return ops.decode_bytenet(features, *weights, noise, self.carry, end_id, pad_id, packed)

    def int8_logits(
        self, features: Tensor, previous: Tensor, state: None, mask_history: bool
    ) -> Tensor:
        """As forward, in plain PyTorch, with the rounded weights of `generate`."""
        weights = self._weights(features.shape[-1], features.dtype, mask_history)
        feature_weight, rows, *others = weights
        step = bytenet_step(feature_weight, *others, self.carry, int8=True)
        return teacher_forced(step, features, rows, known(previous, self.vocab_size))

    def _packed(self, D: int, dtype: torch.dtype, mask_history: bool, int8: bool):
        weights = self._weights(D, dtype, mask_history)
        return weights, ops.decode_bytenet_pack(weights[0], weights[2], weights[4], int8=int8)

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool) -> list[Tensor]:
        """What `decode_bytenet` takes, in its order and in `dtype`."""
        weight, bias = self.input_norm.fold(self.input.weight, self.input.bias)
        weights = (
            weight[:, :D],
            token_embeddings(weight, bias, self.vocab_size, mask_history),
            *self.stack.folded(),
            self.classifier.weight,
            self.classifier.bias,
        )
        return [t.to(dtype) for t in weights]


def token_embeddings(weight: Tensor, bias: Tensor, vocab_size: int, mask_history: bool) -> Tensor:
    """What the decoding ops add for each previous symbol, and last for start: [V + 1, N].

    `mask_history`: every symbol counts as dropped.
    """
    table = input_embeddings(weight, bias, vocab_size + 2)
    if not mask_history:
        return table[:-1]
    return torch.cat([table[-1:].expand(vocab_size, -1), table[-2:-1]])


def known(previous: Tensor, vocab_size: int) -> Tensor:
    """Ids of the rows of `token_embeddings`: where dropped tokens occur, all rows are theirs."""
    return previous.masked_fill(previous > vocab_size, 0)
