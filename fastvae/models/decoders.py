"""The autoregressive decoders: teacher-forced logits for training, one op call for generation.

Both read [features, one-hot(previous token)] over V + 2 ids: the V tokens, `start` = V and
`dropped` = V + 1. Semeniuta et al. 2017, arXiv:1702.02390.
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
    NoTorchScript,
    input_embeddings,
)
from fastvae.ops.decode_bytenet import bytenet_step
from fastvae.ops.decode_lstm import Step, lstm_step, teacher_forced

State = tuple[Tensor, Tensor]
_KNOWN = nn.ModuleList.forward, nn.Linear.forward  # of layers whose weights tell all


class LSTMWeights(NamedTuple):
    """The weights of `fastvae.ops.decode_lstm`, in its order.

    Args:
        feature_weight: [4H, D].
        token_embeddings: [V + 1, 4H].
        weight_hh: [4H, H].
        norm_weight: [4H].
        norm_bias: [4H].
        classifier_weight: [V, H].
        classifier_bias: [V].
    """

    feature_weight: Tensor
    token_embeddings: Tensor
    weight_hh: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor


class ByteNetWeights(NamedTuple):
    """The weights of `fastvae.ops.decode_bytenet`, in its order.

    Args:
        feature_weight: [2C, D].
        token_embeddings: [V + 1, 2C].
        conv_weight: [N, 3C, C, 2], batch norms folded in.
        conv_bias: [N, 3C], batch norms folded in.
        classifier_weight: [V, C].
        classifier_bias: [V].
    """

    feature_weight: Tensor
    token_embeddings: Tensor
    conv_weight: Tensor
    conv_bias: Tensor
    classifier_weight: Tensor
    classifier_bias: Tensor


class Decoder(NoTorchScript, nn.Module):
    """Base class of the decoders: generates with one op call, from cached packed weights.

    A decoder implements `forward`, `_weights`, `_pack`, `_decode` and `_step`. `packs` says whether
    its `forward` takes packed inputs, without the pads after each sequence's end.

    Args:
        vocab_size: V.
    """

    packs = False

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
        """features [T, B, D] -> tokens [B, T], free running.

        Args:
            features: what the decoder reads at each position, [T, B, D]; D may be 0.
            state: the LSTM's (h0, c0), [B, H] each; None is zeros, or a decoder without a state.
            noise: added to the logits, [T, B, V]; None decodes greedily.
            mask_history: feed the `dropped` token instead of each previous token.
            end_id: the id that ends a sequence, or None.
            pad_id: the id that fills a sequence after its end, or None.
            int8: quantize weights and activations; see `fastvae.ops.int8`.

        Returns:
            tokens, [B, T] int64.

        Raises:
            RuntimeError: a submodule has hooks or another forward, which the weights do not tell.
        """
        self._check_submodules()
        D, dtype = features.shape[-1], features.dtype
        weights, packed = self.weight_cache.get(self, self._packed, D, dtype, mask_history, int8)
        return self._decode(features, weights, state, noise, end_id, pad_id, packed, int8)

    def _check_submodules(self) -> None:
        """Raise RuntimeError where a forward does more than its weights tell, as with hooks."""
        if torch.compiler.is_compiling():
            return
        for name, module in self.named_modules():
            if "parametrizations" in name.split("."):  # what reads a weight calls these
                continue
            hooks = module._forward_hooks or module._forward_pre_hooks
            if type(module).__module__.startswith("torch._dynamo."):
                continue  # torch.compile's; the module that it compiled is looked at by itself
            forward = type(module).forward
            known = forward in _KNOWN or forward.__module__.startswith("fastvae.")
            if hooks or not known or "forward" in vars(module):
                what = "hooks" if hooks else "a forward of its own"
                raise RuntimeError(
                    f"generation reads the decoder's weights and would skip {what} of "
                    f"{name or 'it'} ({type(module).__name__}): remove them, as prune.remove or "
                    "remove_weight_norm does, or use torch.nn.utils.parametrizations"
                )

    def int8_logits(
        self, features: Tensor, previous: Tensor, state: State | None, mask_history: bool
    ) -> Tensor:
        """features [T, B, D], previous ids [T, B] -> logits [T, B, V], with int8 weights.

        Runs the quantized weights of `generate` in plain PyTorch, teacher-forced.

        Args:
            features: what the decoder reads at each position, [T, B, D]; D may be 0.
            previous: ids of the tokens before, `start` or `dropped`, [T, B] int64.
            state: the LSTM's (h0, c0), [B, H] each; None is zeros, or a decoder without a state.
            mask_history: `previous` holds `dropped` only, after `start`.

        Returns:
            the logits, [T, B, V].
        """
        self._check_submodules()
        weights = self._weights(features.shape[-1], features.dtype, mask_history)
        step = self._step(features, weights, state)
        rows = embedding_rows(previous, self.vocab_size)
        return teacher_forced(step, features, weights.token_embeddings, rows)

    def _packed(self, D: int, dtype: torch.dtype, mask_history: bool, int8: bool):
        """D features -> the op's weights in `dtype`, and their packed form (uint8 [·])."""
        weights = self._weights(D, dtype, mask_history)
        return weights, self._pack(weights, int8)

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool):
        """The op's weights in `dtype`, for D features."""
        raise NotImplementedError

    def _pack(self, weights, int8: bool) -> Tensor:
        """The op's weights -> packed weights, uint8 [·]."""
        raise NotImplementedError

    def _decode(self, features, weights, state, noise, end_id, pad_id, packed, int8) -> Tensor:
        """Call the op: features [T, B, D] -> tokens [B, T]."""
        raise NotImplementedError

    def _step(self, features: Tensor, weights, state: State | None) -> Step:
        """One step with quantized weights, in plain PyTorch: [B, D], rows [B, ·] -> [B, V]."""
        raise NotImplementedError


class LSTMDecoder(Decoder):
    """LayerNorm-LSTM and a classifier: features [T, B, D], previous ids [T, B] -> logits [T, B, V].

    Args:
        feature_size: D, features per position; may be 0.
        vocab_size: V.
        hidden_size: H.
        device: where parameters are created.
        dtype: of the parameters.
    """

    packs = True

    def __init__(
        self, feature_size: int, vocab_size: int, hidden_size: int, *, device=None, dtype=None
    ) -> None:
        super().__init__(vocab_size)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.lstm = LayerNormLSTM(feature_size + vocab_size + 2, hidden_size, **factory_kwargs)
        self.classifier = Linear(hidden_size, vocab_size, **factory_kwargs)

    def forward(
        self,
        features: Tensor | None,
        previous: Tensor,
        state: State | None,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """features [T, B, D], previous ids [T, B] -> logits [T, B, V], teacher-forced.

        Args:
            features: [T, B, D], or packed [N, D]; None if D is 0.
            previous: ids of the tokens before, `start` or `dropped`, [T, B] int64, or packed [N].
            state: (h0, c0), [B, H] each; None is zeros.
            lengths: steps of each sequence, as in `fastvae.nn.LayerNormLSTM`, or None.

        Returns:
            the logits, [T, B, V], or packed [N, V].
        """
        y, _ = self.lstm(features, state, tokens=previous, lengths=lengths)
        return self.classifier(y)

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool) -> LSTMWeights:
        """The weights of `decode_lstm` in `dtype`, for D features."""
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
        """The weights -> packed weights, uint8 [·]."""
        return ops.decode_lstm_pack(
            weights.feature_weight,
            weights.weight_hh,
            weights.classifier_weight,
            weights.token_embeddings,
            int8=int8,
        )

    def _decode(
        self, features, weights: LSTMWeights, state, noise, end_id, pad_id, packed, int8
    ) -> Tensor:
        """Call `decode_lstm`: features [T, B, D] -> tokens [B, T]."""
        h0, c0 = self._state(features, state)
        eps = self.lstm.eps
        rest = noise, eps, end_id, pad_id, packed, int8
        return ops.decode_lstm(features, *weights, h0, c0, *rest)

    def _step(self, features: Tensor, weights: LSTMWeights, state: State | None) -> Step:
        """One step with quantized weights: features [B, D], rows -> logits [B, V]."""
        feature_weight, _, *others = weights
        h0, c0 = self._state(features, state)
        return lstm_step(feature_weight, *others, h0, c0, self.lstm.eps, int8=True)

    def _state(self, features: Tensor, state: State | None) -> State:
        """(h0, c0) [B, H] in the dtype of the features; zeros for None."""
        if state is None:
            return (features.new_zeros(features.shape[1], self.lstm.hidden_size),) * 2
        h0, c0 = state
        return h0.to(features.dtype), c0.to(features.dtype)


class ByteNetDecoder(Decoder):
    """Gated 1x1 convolution, highway masked convolutions, classifier: [T, B, D] -> [T, B, V].

        p, q = chunk(BatchNorm(W [d_t, one-hot(previous_t)] + b)),   x_t = tanh(p) σ(q)
        logits_t = classifier(highway convolutions of x)_t

    Semeniuta et al. 2017, arXiv:1702.02390.

    Args:
        feature_size: D, features per position.
        vocab_size: V.
        channels: C.
        layers: N, the number of highway convolutions.
        carry: whether the highway layers carry their input on.
        device: where parameters are created.
        dtype: of the parameters.
    """

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
        """features [T, B, D], previous ids [T, B] -> logits [T, B, V], teacher-forced.

        Args:
            features: [T, B, D].
            previous: ids of the tokens before, `start` or `dropped`, [T, B] int64.
            state: None; the decoder has no state.

        Returns:
            the logits, [T, B, V].
        """
        a = self.input(features, previous)
        p, q = self.input_norm(a.flatten(0, 1)).chunk(2, -1)
        x = (p.tanh() * q.sigmoid()).unflatten(0, previous.shape)
        return self.classifier(self.stack(x))

    def _weights(self, D: int, dtype: torch.dtype, mask_history: bool) -> ByteNetWeights:
        """The weights of `decode_bytenet` in `dtype`, norms folded in, for D features."""
        weight, bias = self.input_norm.fold(self.input.weight, self.input.bias)
        if any(layer.carry != self.carry for layer in self.stack.layers):
            raise RuntimeError(
                f"generation has one carry for all layers, {self.carry}, and a layer has another: "
                "build the decoder with the carry that it is to have"
            )
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
        """The weights -> packed weights, uint8 [·]."""
        return ops.decode_bytenet_pack(
            weights.feature_weight, weights.conv_weight, weights.classifier_weight, int8=int8
        )

    def _decode(
        self, features, weights: ByteNetWeights, state, noise, end_id, pad_id, packed, int8
    ) -> Tensor:
        """Call `decode_bytenet`: features [T, B, D] -> tokens [B, T]."""
        rest = noise, self.carry, end_id, pad_id, packed, int8
        return ops.decode_bytenet(features, *weights, *rest)

    def _step(self, features: Tensor, weights: ByteNetWeights, state: None) -> Step:
        """One step with quantized weights: features [B, D], rows -> logits [B, V]."""
        feature_weight, _, *others = weights
        return bytenet_step(feature_weight, *others, self.carry, int8=True)


def token_embeddings(weight: Tensor, bias: Tensor, vocab_size: int, mask_history: bool) -> Tensor:
    """What the decoding ops add for each previous token and, last, for start -> [V + 1, N].

    Args:
        weight: input weight, [N, D + V + 2].
        bias: its bias, [N], added to every row.
        vocab_size: V.
        mask_history: the row of each token is that of `dropped`.

    Returns:
        the rows, [V + 1, N], in the accumulation dtype.
    """
    table = input_embeddings(weight, bias, vocab_size + 2)
    if not mask_history:
        return table[:-1]
    return torch.cat([table[-1:].expand(vocab_size, -1), table[-2:-1]])


def embedding_rows(previous: Tensor, vocab_size: int) -> Tensor:
    """Previous ids [T, B] -> rows of `token_embeddings`; `dropped` becomes 0.

    That is right because `dropped` occurs only with `mask_history`, which makes all rows of tokens
    the same.

    Args:
        previous: ids, [T, B] int64.
        vocab_size: V.
    """
    return previous.masked_fill(previous > vocab_size, 0)
