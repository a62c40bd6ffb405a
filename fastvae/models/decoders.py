"""The autoregressive decoders: teacher-forced logits for training, one op call to generate.

Both read [features, one-hot(previous token)] over V + 2 tokens: after V, `start` and `dropped`.
Semeniuta et al. 2017, arXiv:1702.02390.
"""

from typing import NamedTuple

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
from fastvae.ops.decode_lstm import Step, lstm_step, teacher_forced

State = tuple[Tensor, Tensor]


class LSTMWeights(NamedTuple):
    """The weights of `decode_lstm`, in its order."""

    feature_weight: Tensor
    token_embeddings: Tensor
    weight_hh: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor


class ByteNetWeights(NamedTuple):
    """The weights of `decode_bytenet`, in its order."""

    feature_weight: Tensor
    token_embeddings: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor


class Decoder(nn.Module):
    """Generation by one call of an op, with weights that are derived and packed once.

    A decoder defines `forward`, `_weights`, `_pack`, `_decode` and `_step`.
    """

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size = vocab_size
        self.weight_cache = WeightCache()

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

        With `int8` weights are quantized: `fastvae.ops.int8`.
        """
        D, dtype = features.shape[-1], features.dtype
        weights, packed = self.weight_cache.get(self, self._packed, D, dtype, mask_history, int8)
        return self._decode(features, weights, state, noise, end_id, pad_id, packed, int8)

    def int8_logits(
        self, features: Tensor, previous: Tensor, state: State | None, mask_history: bool
    ) -> Tensor:
        """As forward, in plain PyTorch, with the quantized weights of `generate`."""
        weights = self._weights(features.shape[-1], features.dtype, mask_history)
        step = self._step(features, weights, state)
        rows = embedding_rows(previous, self.vocab_size)
        return teacher_forced(step, features, weights.token_embeddings, rows)

    def _packed(self, D: int, dtype: torch.dtype, mask_history: bool, int8: bool):
        weights = self._weights(D, dtype, mask_history)
        return weights, self._pack(weights, int8)

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool):
        """What the op takes, in `dtype`, for D features."""
        raise NotImplementedError

    def _pack(self, weights, int8: bool) -> Tensor:
        raise NotImplementedError

    def _decode(self, features, weights, state, noise, end_id, pad_id, packed, int8) -> Tensor:
        """The op's call -> tokens [B, T]."""
        raise NotImplementedError

    def _step(self, features: Tensor, weights, state: State | None) -> Step:
        """One token in plain PyTorch, with quantized weights."""
        raise NotImplementedError


class LSTMDecoder(Decoder):
    """LayerNorm-LSTM and a classifier."""

    def __init__(
        self, feature_size: int, vocab_size: int, hidden_size: int, *, device=None, dtype=None
    ) -> None:
        super().__init__(vocab_size)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.lstm = LayerNormLSTM(feature_size + vocab_size + 2, hidden_size, **factory_kwargs)
        self.classifier = Linear(hidden_size, vocab_size, **factory_kwargs)

    def forward(self, features: Tensor | None, previous: Tensor, state: State | None) -> Tensor:
        """features [T, B, D] or None, previous ids [T, B], h0 and c0 [B, H] -> logits [T, B, V]."""
        y, _ = self.lstm(features, state, tokens=previous)
        return self.classifier(y)

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool) -> LSTMWeights:
        lstm = self.lstm
        weights = LSTMWeights(
            feature_weight=lstm.weight_ih[:, :D],
            token_embeddings=token_embeddings(
                lstm.weight_ih, lstm.bias, self.vocab_size, mask_history
            ),
            weight_hh=lstm.weight_hh,
            norm_weight=lstm.norm_weight,
            norm_bias=lstm.norm_bias,
            classifier_weight=self.classifier.weight,
            classifier_bias=self.classifier.bias,
        )
        return LSTMWeights(*[t.to(dtype) for t in weights])

    def _pack(self, weights: LSTMWeights, int8: bool) -> Tensor:
        return ops.decode_lstm_pack(
            weights.feature_weight, weights.weight_hh, weights.classifier_weight, int8=int8
        )

    def _decode(
        self, features, weights: LSTMWeights, state, noise, end_id, pad_id, packed, int8
    ) -> Tensor:
        h0, c0 = self._state(features, state)
        eps = self.lstm.eps
        rest = noise, eps, end_id, pad_id, packed, int8
        return ops.decode_lstm(features, *weights, h0, c0, *rest)

    def _step(self, features: Tensor, weights: LSTMWeights, state: State | None) -> Step:
        feature_weight, _, *others = weights
        h0, c0 = self._state(features, state)
        return lstm_step(feature_weight, *others, h0, c0, self.lstm.eps, int8=True)

    def _state(self, features: Tensor, state: State | None) -> State:
        if state is None:
            return (features.new_zeros(features.shape[1], self.lstm.hidden_size),) * 2
        h0, c0 = state
        return h0.to(features.dtype), c0.to(features.dtype)


class ByteNetDecoder(Decoder):
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
        super().__init__(vocab_size)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.carry = carry
        self.input = Linear(feature_size + vocab_size + 2, 2 * channels, **factory_kwargs)
        self.input_norm = BatchNorm(2 * channels, **factory_kwargs)
        self.stack = HighwayConvStack(channels, layers, carry=carry, **factory_kwargs)
        self.classifier = Linear(channels, vocab_size, **factory_kwargs)

    def forward(self, features: Tensor, previous: Tensor, state: None = None) -> Tensor:
        """features [T, B, D], previous ids [T, B] -> logits [T, B, V]."""
        a = self.input(features, previous)
        p, q = self.input_norm(a.flatten(0, 1)).chunk(2, -1)
        x = (p.tanh() * q.sigmoid()).unflatten(0, previous.shape)
        return self.classifier(self.stack(x))

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool) -> ByteNetWeights:
        weight, bias = self.input_norm.fold(self.input.weight, self.input.bias)
        conv_weight, conv_bias = self.stack.folded()
        weights = ByteNetWeights(
            feature_weight=weight[:, :D],
            token_embeddings=token_embeddings(weight, bias, self.vocab_size, mask_history),
            conv_weight=conv_weight,
            conv_bias=conv_bias,
            classifier_weight=self.classifier.weight,
            classifier_bias=self.classifier.bias,
        )
        return ByteNetWeights(*[t.to(dtype) for t in weights])

    def _pack(self, weights: ByteNetWeights, int8: bool) -> Tensor:
        return ops.decode_bytenet_pack(
            weights.feature_weight, weights.conv_weight, weights.classifier_weight, int8=int8
        )

    def _decode(
        self, features, weights: ByteNetWeights, state, noise, end_id, pad_id, packed, int8
    ) -> Tensor:
        rest = noise, self.carry, end_id, pad_id, packed, int8
        return ops.decode_bytenet(features, *weights, *rest)

    def _step(self, features: Tensor, weights: ByteNetWeights, state: None) -> Step:
        feature_weight, _, *others = weights
        return bytenet_step(feature_weight, *others, self.carry, int8=True)


def token_embeddings(weight: Tensor, bias: Tensor, vocab_size: int, mask_history: bool) -> Tensor:
    """What the decoding ops add for each previous token, and last for start: [V + 1, N].

    `mask_history`: every token counts as dropped.
    """
    table = input_embeddings(weight, bias, vocab_size + 2)
    if not mask_history:
        return table[:-1]
    return torch.cat([table[-1:].expand(vocab_size, -1), table[-2:-1]])


def embedding_rows(previous: Tensor, vocab_size: int) -> Tensor:
    """Ids of the rows of `token_embeddings`: where dropped tokens occur, all rows are theirs."""
    return previous.masked_fill(previous > vocab_size, 0)
