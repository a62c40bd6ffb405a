"""The autoregressive decoders: teacher-forced logits for training, one op call to generate.

Both read [features, one-hot(previous symbol)] over V + 2 symbols: after V, `start` and `dropped`.
Semeniuta et al. 2017, arXiv:1702.02390.
"""

import torch
from torch import Tensor, nn

from fastvae import ops
from fastvae.nn import (
    BatchNorm,
    HighwayConvStack,
    LayerNormLSTM,
    Linear,
    symbol_table,
)

State = tuple[Tensor, Tensor]


class LSTMDecoder(nn.Module):
    """LayerNorm-LSTM and a classifier."""

    def __init__(
        self, feature_size: int, vocab_size: int, hidden_size: int, *, device=None, dtype=None
    ) -> None:
        super().__init__()
        place = {"device": device, "dtype": dtype}
        self.vocab_size = vocab_size
        self.lstm = LayerNormLSTM(feature_size + vocab_size + 2, hidden_size, **place)
        self.classifier = Linear(hidden_size, vocab_size, **place)

    def forward(self, features: Tensor | None, previous: Tensor, state: State | None) -> Tensor:
        """features [T, B, D] or None, previous ids [T, B], h0 and c0 [B, H] -> logits [T, B, V]."""
        y, _ = self.lstm(features, state, symbols=previous)
        return self.classifier(y)

    def generate(
        self,
        features: Tensor,
        state: State | None,
        noise: Tensor | None,
        historyless: bool,
        end_id: int | None,
        pad_id: int | None,
    ) -> Tensor:
        """features [T, B, D], D may be 0 -> tokens [B, T]; `noise` [T, B, V] joins the logits."""
        lstm, dtype = self.lstm, features.dtype
        if state is None:
            state = (features.new_zeros(features.shape[1], lstm.hidden_size),) * 2
        weights = (
            lstm.weight_ih[:, : features.shape[-1]],
            symbol_rows(lstm.weight_ih, lstm.bias, self.vocab_size, historyless),
            lstm.weight_hh,
            lstm.norm_weight,
            lstm.norm_bias,
            self.classifier.weight,
            self.classifier.bias,
            *state,
        )
        weights = [t.to(dtype) for t in weights]
        return ops.decode_lstm(features, *weights, noise, lstm.eps, end_id, pad_id)


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
        place = {"device": device, "dtype": dtype}
        self.vocab_size, self.carry = vocab_size, carry
        self.input = Linear(feature_size + vocab_size + 2, 2 * channels, **place)
        self.input_norm = BatchNorm(2 * channels, **place)
        self.stack = HighwayConvStack(channels, layers, carry=carry, **place)
        self.classifier = Linear(channels, vocab_size, **place)

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
        historyless: bool,
        end_id: int | None,
        pad_id: int | None,
    ) -> Tensor:
        """features [T, B, D] -> tokens [B, T]; `noise` [T, B, V] joins the logits."""
        weight, bias = self.input_norm.fold(self.input.weight, self.input.bias)
        weights = (
            weight[:, : features.shape[-1]],
            symbol_rows(weight, bias, self.vocab_size, historyless),
            *self.stack.folded(),
            self.classifier.weight,
            self.classifier.bias,
        )
        weights = [t.to(features.dtype) for t in weights]
        return ops.decode_bytenet(features, *weights, noise, self.carry, end_id, pad_id)


def symbol_rows(weight: Tensor, bias: Tensor, vocab_size: int, historyless: bool) -> Tensor:
    """What the decoding ops add for each previous symbol, and last for start: [V + 1, N].

    `historyless`: every symbol counts as dropped.
    """
    table = symbol_table(weight, bias, vocab_size + 2)
    if not historyless:
        return table[:-1]
    return torch.cat([table[-1:].expand(vocab_size, -1), table[-2:-1]])
