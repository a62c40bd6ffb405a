"""Decoding with a LayerNorm-LSTM: a whole sequence, token by token, in one call."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastvae.ops.checks import check_decode_lstm, check_decode_lstm_pack, check_eps, check_packed
from fastvae.ops.fallback import register_fallback
from fastvae.ops.int8 import check_int8, float_linear, int8_linear
from fastvae.ops.layer_norm_lstm import layer_norm_lstm_cell
from fastvae.ops.precision import accumulate_dtype

# d_t [B, D], rows of the tokens before [B, ·] -> logits [B, V]
Step = Callable[[Tensor, Tensor], Tensor]


def decode_lstm(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
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
    packed: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """features d [T, B, D] and an LSTM decoder's weights -> tokens [B, T], in one call.

        aₜ = W_d dₜ + E[sₜ₋₁] + W hₜ₋₁                     s₋₁ = start: the last row of E
        hₜ, cₜ = gates of `layer_norm_lstm`
        sₜ = argmax(W_v hₜ + b_v + noiseₜ)                 greedy without noise

    Adding temperature × Gumbel(0, 1) noise samples from softmax(logits / temperature) (Maddison et
    al. 2014, arXiv:1411.0030). Model: Semeniuta et al. 2017, arXiv:1702.02390.

    Args:
        features: d, [T, B, D]; D may be 0.
        feature_weight: W_d, [4H, D].
        token_embeddings: E, [V + 1, 4H]: for each previous token, and last for `start`, its
            column of the input weight plus the bias.
        weight_hh: W, [4H, H].
        norm_weight: gain of the norm, [4H].
        norm_bias: bias of the norm, [4H].
        classifier_weight: W_v, [V, H].
        classifier_bias: b_v, [V].
        h0: initial hidden state, [B, H].
        c0: initial cell state, [B, H].
        noise: added to the logits, [T, B, V] in float32 (float64 for float64), or None.
        eps: of the norm.
        end_id: the token after which a sequence is `pad_id`; work stops once all have ended.
        pad_id: what fills a sequence after `end_id`.
        packed: what `decode_lstm_pack` made of the weights with the same `int8`, which saves
            packing them again.
        int8: round weights and what they multiply to integers: `fastvae.ops.int8`.

    Returns:
        tokens, [B, T] int64.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device, or rows too wide for `int8`, or
            eps is negative or not finite; the message names it.
    """
    check_eps(eps)
    if features.dim() == 3 and not features.shape[1]:  # no kernel starts for nothing
        return features.new_empty(0, features.shape[0], dtype=torch.int64)
    check_int8(int8, feature_weight=feature_weight, weight_hh=weight_hh)
    return torch.ops.fastvae.decode_lstm(
        features,
        feature_weight,
        token_embeddings,
        weight_hh,
        norm_weight,
        norm_bias,
        classifier_weight,
        classifier_bias,
        h0,
        c0,
        noise,
        eps,
        end_id,
        pad_id,
        packed,
        int8,
    )


def decode_lstm_pack(
    feature_weight: Tensor,
    weight_hh: Tensor,
    classifier_weight: Tensor,
    token_embeddings: Tensor | None = None,
    *,
    int8: bool = False,
) -> Tensor:
    """feature_weight [4H, D], weight_hh [4H, H], classifier_weight [V, H] -> opaque uint8 [·].

    Args:
        feature_weight: as in `decode_lstm`, as the next two.
        weight_hh: the recurrent weight.
        classifier_weight: the classifier's weight.
        token_embeddings: [V + 1, 4H], or None. GPU kernels prepare them too, here or at each call.
        int8: round weights and what they multiply as `fastvae.ops.int8` tells: features by row, h
            by 1/127 (an h0 beyond ±1 is clipped).

    Returns:
        the weights as `decode_lstm` reads them, valid for these values, this device and this
        `fastvae.cpu_capability()`; decoding refuses them with another one.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device, or rows too wide for `int8`; the
            message names it.
    """
    check_int8(int8, feature_weight=feature_weight, weight_hh=weight_hh)
    weights = feature_weight, weight_hh, classifier_weight, token_embeddings
    return torch.ops.fastvae.decode_lstm_pack(*weights, int8)


def decode_lstm_reference(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
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
    packed: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    weights = feature_weight, weight_hh, norm_weight, norm_bias, classifier_weight, classifier_bias
    step = lstm_step(*weights, h0, c0, eps, int8)
    return decode_steps(step, features, token_embeddings, noise, end_id, pad_id)


def lstm_step(
    feature_weight: Tensor,
    weight_hh: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    h: Tensor,
    c: Tensor,
    eps: float,
    int8: bool,
) -> Step:
    """One token, as a function that keeps the state; with `int8` it upcasts."""
    if int8:
        dtype = accumulate_dtype(norm_weight.dtype)
        norm_weight, norm_bias = norm_weight.to(dtype), norm_bias.to(dtype)
    make, scale = int8_linear if int8 else float_linear, {"scale": 1 / 127}
    project, recur = make(feature_weight), make(weight_hh, **scale)
    classify = make(classifier_weight, classifier_bias, **scale)

    def step(d_t: Tensor, rows: Tensor) -> Tensor:
        nonlocal h, c
        a = project(d_t) + rows + recur(h)
        h, c = layer_norm_lstm_cell(a, c, norm_weight, norm_bias, eps)
        return classify(h)

    return step


def teacher_forced(
    step: Step, features: Tensor, token_embeddings: Tensor, previous: Tensor
) -> Tensor:
    """Logits [T, B, V] of `step`, given features [T, B, D] and the tokens before [T, B]."""
    rows = token_embeddings[previous]
    return torch.stack([step(d_t, rows_t) for d_t, rows_t in zip(features, rows, strict=True)])


def decode_steps(step: Step, features, token_embeddings, noise, end_id, pad_id) -> Tensor:
    """The decoding loop in plain PyTorch."""
    T, B = features.shape[:2]
    token = features.new_full((B,), len(token_embeddings) - 1, dtype=torch.int64)
    ended = torch.zeros_like(token, dtype=torch.bool)
    pad = 0 if pad_id is None else pad_id
    tokens = features.new_full((B, T), pad, dtype=torch.int64)
    for t in range(T):
        logits = step(features[t], token_embeddings[token])
        token = (logits if noise is None else logits + noise[t]).argmax(-1)
        tokens[:, t] = torch.where(ended, pad, token)
        if end_id is not None:
            ended |= token == end_id
            if ended.all():
                break
    return tokens


def pack_reference(weight: Tensor, *rest) -> Tensor:
    """Nothing: where the reference decodes, it reads the weights themselves."""
    return weight.new_empty(0, dtype=torch.uint8)


register_fallback("decode_lstm", decode_lstm_reference)
register_fallback("decode_lstm_pack", pack_reference)


@torch.library.register_fake("fastvae::decode_lstm_pack")
def _fake_pack(feature_weight, weight_hh, classifier_weight, token_embeddings=None, int8=False):
    check_decode_lstm_pack(feature_weight, weight_hh, classifier_weight, token_embeddings)
    return fake_packed(weight_hh)


def fake_packed(weight: Tensor) -> Tensor:
    """Packed weights of a size that nothing knows before."""
    return weight.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8)


@torch.library.register_fake("fastvae::decode_lstm")
def _fake(features, *rest):
    # None at the end is left out.
    *others, noise, _, end_id, pad_id, packed = (*rest, None, None, None)[:14]
    T, B, _ = check_decode_lstm(features, *others, noise, end_id, pad_id)
    check_packed(packed, features)
    return features.new_empty(B, T, dtype=torch.int64)
