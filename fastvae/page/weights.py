"""Weights for the page's engine: rounded to int8 with a scale per row, norms folded in, one file.

    w ≈ s q,   q = round(w / s) in [−47, 47],   s = max |w| / 47 of the row

A row is that of one matrix of the engine (csrc/wasm): a tap of a convolution and the columns of
features, of one-hot tokens and of the hidden state have scales of their own.
"""

import copy
import struct
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fastvae.models.decoders import ByteNetDecoder, LSTMDecoder
from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.models.text_vae import TextVAE
from fastvae.nn import BatchNorm, LayerNormLSTM

MAGIC, VERSION = 0x45415646, 1
MOST_BLOCKS = 16
# Of 127 that an int8 holds: compressed, the file is a sixth smaller. Of 1,000 held-out place names
# a trained model then returns 854 exactly instead of 857.
LEVELS = 47
HEADER = struct.Struct(f"<14i2fi{MOST_BLOCKS}i2i")
DECODERS = {"none": 0, "lstm": 1, "bytenet": 2}


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight [N, ...] -> q [N, ...] int8, s [N] float32: a scale for each row."""
    largest = weight.abs().flatten(1).amax(1)
    scale = (largest / LEVELS).clamp_min(torch.finfo(torch.float32).tiny)
    q = (weight / _along_rows(scale, weight)).round().clamp(-LEVELS, LEVELS)
    return q.to(torch.int8), scale


@torch.no_grad()
def rounded(model: TextVAE) -> TextVAE:
    """Copy a model in float32 and eval mode, with the weights that the page's engine computes with.

    Args:
        model: a `HybridVAE` or `LSTMVAE`.

    Raises:
        ValueError: the model is of another class or a parameter is not finite.
    """
    model = _plain(model)
    for weight in _weights(model):
        q, scale = quantize(weight)
        weight.copy_(q.float() * _along_rows(scale, weight))
    return model


@torch.no_grad()
def pack(model: TextVAE) -> bytes:
    """Model -> the file that the engine's `engine_load` reads: header, floats, int8 weights.

    Args:
        model: a `HybridVAE` or `LSTMVAE`.

    Raises:
        ValueError: the model is of another class, has more than 16 encoder blocks, or a parameter
            is not finite.
    """
    model, file = _plain(model), _File()
    config = model.config
    if isinstance(model, HybridVAE):
        _pack_convolutions(model, file)
        decoder, features = config["decoder"], config["feature_channels"]
        channels = config["encoder_channels"]
        hidden = {"none": 0, "lstm": config["hidden_size"], "bytenet": config["conv_channels"]}
        hidden, encoder_eps = hidden[decoder], 0.0
    else:
        _pack_lstm_encoder(model, file)
        decoder, features, channels = "lstm", 0, ()
        hidden, encoder_eps = config["hidden_size"], model.encoder.eps
    if len(channels) > MOST_BLOCKS:
        raise ValueError(f"a page holds up to {MOST_BLOCKS} encoder blocks, got {len(channels)}")
    _pack_decoder(model, features, file)
    eps = model.decoder.lstm.eps if decoder == "lstm" else 0.0
    layers, carry = (config["conv_layers"], config["carry"]) if decoder == "bytenet" else (0, False)
    ids = (-1 if i is None else i for i in (model.pad_id, model.end_id))
    sizes = model.vocab_size, model.length, model.latent_size, hidden, features, layers, carry
    blocks = len(channels), *channels, *[0] * (MOST_BLOCKS - len(channels))
    start = MAGIC, VERSION, isinstance(model, LSTMVAE), DECODERS[decoder]
    norms = model.mask_pad, eps, encoder_eps
    floats, values = b"".join(file.floats), b"".join(file.values)
    header = HEADER.pack(*start, *sizes, *ids, *norms, *blocks, len(floats) // 4, len(values))
    return header + floats + values


class _File:
    """Floats and int8 weights in the order in which the engine takes them."""

    def __init__(self) -> None:
        self.floats: list[bytes] = []
        self.values: list[bytes] = []

    def add_floats(self, *rows: Tensor) -> None:
        """Scales and biases, [N] each."""
        self.floats += [row.float().contiguous().numpy().tobytes() for row in rows]

    def add_matrix(
        self, parts: Sequence[Tensor], bias: Tensor | None, scale: Tensor | float = 1.0
    ) -> None:
        """Parts [N, K] of a matrix's rows, bias [N] or None; `scale` [N] multiplies the parts."""
        for part in parts:
            q, s = quantize(part)
            self.add_floats(s * scale)
            self.values.append(q.contiguous().numpy().tobytes())
        if bias is not None:
            self.add_floats(bias)

    def add_table(self, q: Tensor, scale: Tensor, bias: Tensor) -> None:
        """Rows [M, N] int8 for one-hot inputs, with scale and bias [N] for the columns."""
        self.add_floats(scale, bias)
        self.values.append(q.contiguous().numpy().tobytes())


def _pack_convolutions(model: HybridVAE, file: _File) -> None:
    """Encoder and deconvolutions, norms folded in, rows and columns position by position."""
    encoder, deconvolution = model.encoder, model.deconvolution
    for n, (conv, norm) in enumerate(zip(encoder.convs, encoder.norms, strict=True)):
        scale, bias = _folded(norm, conv.bias)
        if n:
            file.add_matrix(conv.weight.unbind(2), bias, scale)
        else:
            q, s = quantize(conv.weight)
            file.add_table(q.permute(2, 1, 0), s * scale, bias)
    channels, length = deconvolution.shape
    weight = encoder.linear.weight.unflatten(1, (channels, length))
    file.add_matrix(weight.unbind(2), encoder.linear.bias)
    weight, bias = (
        t.unflatten(0, (channels, length)).transpose(0, 1).flatten(0, 1)
        for t in (deconvolution.linear.weight, deconvolution.linear.bias)
    )
    file.add_matrix([weight], bias)
    for conv, norm in zip(deconvolution.convs, deconvolution.norms, strict=True):
        before, same, after = conv.weight.transpose(0, 1).unbind(2)
        scale, bias = _folded(norm, conv.bias)
        file.add_matrix([same], bias, scale)
        file.add_matrix([after, before], bias, scale)


def _pack_lstm_encoder(model: LSTMVAE, file: _File) -> None:
    """The LSTM VAE's encoder, posterior and initial state."""
    q, scale = quantize(model.encoder.weight_ih)
    file.add_table(q.T, scale, model.encoder.bias)
    file.add_matrix([model.encoder.weight_hh], None)
    _pack_norm(model.encoder, file)
    file.add_matrix([model.posterior_linear.weight], model.posterior_linear.bias)
    file.add_matrix([model.initial_state.weight], model.initial_state.bias)


def _pack_decoder(model: TextVAE, features: int, file: _File) -> None:
    """The decoder, for so many features, and its classifier; or the head alone."""
    decoder = model.decoder
    if isinstance(decoder, LSTMDecoder):
        lstm = decoder.lstm
        _pack_tokens(model, lstm.weight_ih[:, features:], 1.0, lstm.bias, file)
        parts = [lstm.weight_ih[:, :features]] if features else []
        file.add_matrix([*parts, lstm.weight_hh], None)
        _pack_norm(lstm, file)
    elif isinstance(decoder, ByteNetDecoder):
        scale, bias = _folded(decoder.input_norm, decoder.input.bias)
        _pack_tokens(model, decoder.input.weight[:, features:], scale, bias, file)
        file.add_matrix([decoder.input.weight[:, :features]], None, scale)
        for layer in decoder.stack.layers:
            scale, bias = _folded(layer.norm, layer.bias)
            file.add_matrix(layer.weight.unbind(2), bias, scale)
    classifier = model.head if decoder is None else decoder.classifier
    file.add_matrix([classifier.weight], classifier.bias)


def _pack_tokens(
    model: TextVAE, weight: Tensor, scale: Tensor | float, bias: Tensor, file: _File
) -> None:
    """weight [N, V + 2] of previous tokens -> a row for each, and last for the start."""
    q, s = quantize(weight)
    rows = q.T[:-1]
    if model.word_dropout == 1:
        rows = torch.cat([q.T[-1:].expand(model.vocab_size, -1), q.T[-2:-1]])
    file.add_table(rows, s * scale, bias)


def _pack_norm(lstm: LayerNormLSTM, file: _File) -> None:
    file.add_floats(lstm.norm_weight, lstm.norm_bias)


def _plain(model: TextVAE) -> TextVAE:
    """A copy on the CPU, in float32 and eval mode."""
    if not isinstance(model, HybridVAE | LSTMVAE):
        raise ValueError(f"a page holds a HybridVAE or an LSTMVAE, got {type(model).__name__}")
    model = copy.deepcopy(model).to("cpu", torch.float32).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} is not finite: the model cannot be exported")
    return model


def _weights(model: TextVAE) -> Iterator[Tensor]:
    """Views [N, ...] of all that is rounded, each row with a scale of its own."""
    if isinstance(model, HybridVAE):
        first, *others = (conv.weight for conv in model.encoder.convs)
        yield first
        for weight in others:
            yield from weight.unbind(2)
        shape = model.deconvolution.shape
        yield from model.encoder.linear.weight.unflatten(1, shape).unbind(2)
        yield model.deconvolution.linear.weight
        for conv in model.deconvolution.convs:
            yield from conv.weight.transpose(0, 1).unbind(2)
        features = model.config["feature_channels"]
    else:
        yield from (model.encoder.weight_ih, model.encoder.weight_hh)
        yield from (model.posterior_linear.weight, model.initial_state.weight)
        features = 0
    decoder = model.decoder
    if decoder is None:
        yield model.head.weight
        return
    if isinstance(decoder, LSTMDecoder):
        weight, others = decoder.lstm.weight_ih, [decoder.lstm.weight_hh]
    else:
        weight = decoder.input.weight
        others = [tap for layer in decoder.stack.layers for tap in layer.weight.unbind(2)]
    yield from (t for t in (weight[:, :features], weight[:, features:]) if t.numel())
    yield from (*others, decoder.classifier.weight)


def _folded(norm: BatchNorm, bias: Tensor) -> tuple[Tensor, Tensor]:
    """A norm and the bias before it -> what multiplies the weights' rows, and the new bias, [C]."""
    weight, folded = norm.fold(torch.ones_like(bias), bias)
    return weight, folded


def _along_rows(scale: Tensor, weight: Tensor) -> Tensor:
    """scale [N] -> [N, 1, ...], with the dimensions of the weight."""
    return scale.view(-1, *[1] * (weight.dim() - 1))
