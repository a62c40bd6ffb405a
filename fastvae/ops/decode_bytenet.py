"""Decoding with highway masked convolutions: a whole sequence, token by token, in one call."""

import torch
from torch import Tensor

from fastvae.ops.checks import check_decode_bytenet, check_decode_bytenet_pack, check_packed
from fastvae.ops.decode_lstm import Step, decode_steps, fake_packed, pack_reference
from fastvae.ops.fallback import register_fallback
from fastvae.ops.int8 import check_int8, float_linear, int8_linear


def decode_bytenet(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    noise: Tensor | None = None,
    carry: bool = True,
    end_id: int | None = None,
    pad_id: int | None = None,
    packed: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """features d [T, B, D] and a ByteNet decoder's weights -> tokens [B, T], in one call.

        p, q = chunk(W_d dₜ + E[sₜ₋₁]),   x⁰ₜ = tanh(p) σ(q)     s₋₁ = start: the last row of E
        xⁿ⁺¹ₜ = highway_conv(xⁿₜ₋₁, xⁿₜ),   n = 0 … N−1           norms folded into the weights
        sₜ = argmax(W_v xᴺₜ + b_v + noiseₜ)

    Each layer keeps its one previous vector, so a token costs the same at every position.
    Semeniuta et al. 2017, arXiv:1702.02390; noise as in `decode_lstm`.

    Args:
        features: d, [T, B, D]; D may be 0.
        feature_weight: W_d, [2C, D].
        token_embeddings: E, [V + 1, 2C]: for each previous token, and last for `start`, its
            column of the input weight plus the bias.
        conv_weight: weights of the layers, [N, 3C, C, 2].
        conv_bias: their biases, [N, 3C].
        classifier_weight: W_v, [V, C].
        classifier_bias: b_v, [V].
        noise: added to the logits, [T, B, V] in float32 (float64 for float64), or None.
        carry: whether the highway layers carry their input on.
        end_id: the token after which a sequence is `pad_id`; work stops once all have ended.
        pad_id: what fills a sequence after `end_id`.
        packed: what `decode_bytenet_pack` made of the weights with the same `int8`, which saves
            packing them again.
        int8: round weights and what they multiply to integers: `fastvae.ops.int8`.

    Returns:
        tokens, [B, T] int64.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device, or rows too wide for `int8`; the
            message names it.
    """
    if features.dim() == 3 and not features.shape[1]:  # no kernel starts for nothing
        return features.new_empty(0, features.shape[0], dtype=torch.int64)
    check_int8(int8, feature_weight=feature_weight, classifier_weight=classifier_weight)
    return torch.ops.fastvae.decode_bytenet(
        features,
        feature_weight,
        token_embeddings,
        conv_weight,
        conv_bias,
        classifier_weight,
        classifier_bias,
        noise,
        carry,
        end_id,
        pad_id,
        packed,
        int8,
    )


def decode_bytenet_pack(
    feature_weight: Tensor, conv_weight: Tensor, classifier_weight: Tensor, *, int8: bool = False
) -> Tensor:
    """feature_weight [2C, D], conv_weight [N, 3C, C, 2], classifier_weight [V, C] -> uint8 [·].

    Args:
        feature_weight: as in `decode_bytenet`, as the next two.
        conv_weight: the layers' weights.
        classifier_weight: the classifier's weight.
        int8: round weights and what they multiply as `fastvae.ops.int8` tells.

    Returns:
        the weights as `decode_bytenet` reads them, valid for these values, this device and this
        `fastvae.cpu_capability()`; decoding refuses them with another one.

    Raises:
        RuntimeError: a tensor has a wrong shape, dtype or device, or rows too wide for `int8`; the
            message names it.
    """
    check_int8(int8, feature_weight=feature_weight, classifier_weight=classifier_weight)
    return torch.ops.fastvae.decode_bytenet_pack(
        feature_weight, conv_weight, classifier_weight, int8
    )


def decode_bytenet_reference(
    features: Tensor,
    feature_weight: Tensor,
    token_embeddings: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    noise: Tensor | None = None,
    carry: bool = True,
    end_id: int | None = None,
    pad_id: int | None = None,
    packed: Tensor | None = None,
    int8: bool = False,
) -> Tensor:
    """The same function in plain PyTorch: what every kernel is tested against."""
    weights = feature_weight, conv_weight, conv_bias, classifier_weight, classifier_bias
    step = bytenet_step(*weights, carry, int8)
    return decode_steps(step, features, token_embeddings, noise, end_id, pad_id)


def bytenet_step(
    feature_weight: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor,
    classifier_weight: Tensor,
    classifier_bias: Tensor,
    carry: bool,
    int8: bool,
) -> Step:
    """One token, as a function that keeps each layer's previous vector; with `int8` it upcasts."""
    make = int8_linear if int8 else float_linear
    project, classify = make(feature_weight), make(classifier_weight, classifier_bias)
    layers = [
        (make(weight[..., 0]), make(weight[..., 1], bias))
        for weight, bias in zip(conv_weight, conv_bias, strict=True)
    ]
    before: list[Tensor | None] = [None] * len(layers)

    def step(d_t: Tensor, rows: Tensor) -> Tensor:
        p, q = (project(d_t) + rows).chunk(2, -1)
        x = p.tanh() * q.sigmoid()
        for n, (tap_0, tap_1) in enumerate(layers):
            a = tap_1(x) if before[n] is None else tap_0(before[n]) + tap_1(x)
            i, f, g = a.chunk(3, -1)
            before[n] = x
            x = i.sigmoid() * g.tanh() + (f.sigmoid() * x if carry else 0)
        return classify(x)

    return step


register_fallback("decode_bytenet", decode_bytenet_reference)
register_fallback("decode_bytenet_pack", pack_reference)


@torch.library.register_fake("fastvae::decode_bytenet_pack")
def _fake_pack(feature_weight, conv_weight, classifier_weight, int8=False):
    check_decode_bytenet_pack(feature_weight, conv_weight, classifier_weight)
    return fake_packed(conv_weight)


@torch.library.register_fake("fastvae::decode_bytenet")
def _fake(features, *rest):
    # None at the end is left out.
    *others, noise, _, end_id, pad_id, packed = (*rest, None, None, None)[:11]
    T, B, _ = check_decode_bytenet(features, *others, noise, end_id, pad_id)
    check_packed(packed, features)
    return features.new_empty(B, T, dtype=torch.int64)
