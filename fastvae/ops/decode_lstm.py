"""Decoding with a LayerNorm-LSTM: a whole sequence, symbol by symbol, in one call.

    aₜ = W_d dₜ + E[sₜ₋₁] + W hₜ₋₁                     s₋₁ = start: the last row of E
    hₜ, cₜ = gates of `layer_norm_lstm`
    sₜ = argmax(W_v hₜ + b_v + noiseₜ)                 noise: none is greedy; Gumbel noise samples

Adding temperature × Gumbel(0, 1) noise to the logits samples from softmax(logits / temperature)
(Gumbel 1954; Maddison et al. 2014, arXiv:1411.0030). Model: arXiv:1702.02390.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from fastvae.ops.layer_norm_lstm import layer_norm_lstm_cell


def decode_lstm(
    features: Tensor,
    feature_weight: Tensor,
    symbol_rows: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    noise: Tensor | None = None,
    eps: float = 1e-4,
    end_id: int | None = None,
    pad_id: int | None = None,
) -> Tensor:
    """features d [T, B, D], feature_weight [4H, D], symbol_rows E [V + 1, 4H] -> tokens [B, T].

    E holds, for each previous symbol and last for `start`, its row of the input weight plus bias.
    weight_hh [4H, H], norm_weight, norm_bias [4H], classifier_weight [V, H], classifier_bias [V],
    h0, c0 [B, H]; D may be 0. `noise` [T, B, V] joins the logits, in float32 (float64 for float64).
    Tokens are int64.
    With `end_id`, a sequence is `pad_id` after its first `end_id`; work stops once all have ended.
    Raises RuntimeError naming the tensor whose shape, dtype or device is wrong.
    """
    return torch.ops.fastvae.decode_lstm(
        features,
        feature_weight,
        symbol_rows,
        weight_hh,
        norm_weight,
        norm_bias,
        classifier_weight,
        classifier_bias,
        h0,
        c0,
        noise,
        eps,
        -1 if end_id is None else end_id,
        -1 if pad_id is None else pad_id,
    )


def decode_lstm_reference(
    features: Tensor,
    feature_weight: Tensor,
    symbol_rows: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h0: Tensor,
    c0: Tensor,
    noise: Tensor | None = None,
    eps: float = 1e-4,
    end_id: int = -1,
    pad_id: int = -1,
) -> Tensor:
    """The same function in plain PyTorch, -1 for no id: what every kernel is tested against."""
    h, c = h0, c0

    def step(d_t: Tensor, rows: Tensor) -> Tensor:
        nonlocal h, c
        a = F.linear(d_t, feature_weight) + rows + h @ weight_hh.T
        h, c = layer_norm_lstm_cell(a, c, norm_weight, norm_bias, eps)
        return F.linear(h, classifier_weight, classifier_bias)

    return decode_steps(step, features, symbol_rows, noise, end_id, pad_id)


def decode_steps(step, features, symbol_rows, noise, end_id, pad_id) -> Tensor:
    """The decoding loop in plain PyTorch: step(d_t [B, D], rows [B, ·]) -> logits [B, V]."""
    T, B = features.shape[:2]
    symbol = features.new_full((B,), len(symbol_rows) - 1, dtype=torch.int64)
    ended = torch.zeros_like(symbol, dtype=torch.bool)
    tokens = features.new_full((B, T), pad_id, dtype=torch.int64)
    for t in range(T):
        logits = step(features[t], symbol_rows[symbol])
        symbol = (logits if noise is None else logits + noise[t]).argmax(-1)
        tokens[:, t] = torch.where(ended, pad_id, symbol)
        ended |= symbol == end_id
        if ended.all():
            break
    return tokens


# Devices without a kernel run the reference: PyTorch's dispatcher is the only registry.
torch.library.impl("fastvae::decode_lstm", "CompositeExplicitAutograd", decode_lstm_reference)


@torch.library.register_fake("fastvae::decode_lstm")
def _fake(features, *_):
    return features.new_empty(features.shape[1], features.shape[0], dtype=torch.int64)
