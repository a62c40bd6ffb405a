"""The hybrid VAE: convolutional encoder, deconvolutional features, autoregressive decoder.

Semeniuta, Severyn, Barth 2017, "A Hybrid Convolutional Variational Autoencoder for Text
Generation", arXiv:1702.02390.
"""

from collections.abc import Iterable, Sequence

from torch import Tensor

from fastvae.models.decoders import ByteNetDecoder, LSTMDecoder
from fastvae.models.text_vae import TextVAE, constructor_arguments
from fastvae.nn import ConvEncoder, DeconvDecoder, Linear


class HybridVAE(TextVAE):
    """The hybrid VAE of the paper (its figure 2): tokens [B, L] -> `fastvae.VAEOutput`.

    A convolutional encoder computes the posterior of z, deconvolutions expand z into features, and
    an autoregressive decoder reads these features together with the previous tokens. A linear head
    on the features gives the auxiliary loss. Semeniuta et al. 2017, arXiv:1702.02390.

    Args:
        vocab_size: V, the number of token ids.
        length: L, tokens of a sequence; divisible by 2 for each encoder block.
        latent_size: Z.
        encoder_channels: channels of each encoder block, which halves the length; the
            deconvolutions mirror them.
        feature_channels: D, features per position.
        decoder: "lstm", "bytenet" (masked convolutions) or "none" (feed-forward only, figure 2a).
        hidden_size: units of the LSTM decoder.
        conv_layers: N, layers of the ByteNet decoder, which sees N + 1 previous tokens.
        conv_channels: channels of the ByteNet decoder.
        carry: whether ByteNet layers pass their input on through the carry gate.
        aux_weight: α, the weight of the auxiliary loss; ignored with decoder "none".
        word_dropout: probability of hiding a token from the decoder in training. 1 hides all of
            them, in evaluation and generation too.
        pad_id: the id that fills a sequence after its end, or None.
        end_id: the id that ends a sequence, or None; requires `pad_id`.
        mask_pad: leave pads out of the loss; requires `pad_id`, other than `end_id`. On a CPU,
            decoders "lstm" and "none" then compute no position after a sequence's last token.
        device: where parameters are created.
        dtype: of the parameters.

    Raises:
        ValueError: an argument is out of range; the message names it.
    """

    def __init__(
        self,
        vocab_size: int,
        length: int,
        *,
        latent_size: int = 100,
        encoder_channels: Sequence[int] = (128, 256, 512, 512, 512),
        feature_channels: int = 200,
        decoder: str = "lstm",
        hidden_size: int = 1000,
        conv_layers: int = 3,
        conv_channels: int = 256,
        carry: bool = True,
        aux_weight: float = 0.2,
        word_dropout: float = 0.0,
        pad_id: int | None = None,
        end_id: int | None = None,
        mask_pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        if not isinstance(encoder_channels, Iterable):
            raise ValueError(f"encoder_channels must be several sizes, got {encoder_channels!r}")
        encoder_channels = tuple(encoder_channels)
        super().__init__(constructor_arguments(locals()))
        _check_blocks(length, encoder_channels)
        factory_kwargs = {"device": device, "dtype": dtype}
        self.encoder = ConvEncoder(
            vocab_size, length, latent_size, encoder_channels, **factory_kwargs
        )
        self.deconvolution = DeconvDecoder(
            latent_size, length, encoder_channels, feature_channels, **factory_kwargs
        )
        self.head = Linear(feature_channels, vocab_size, **factory_kwargs)
        if decoder == "lstm":
            self.decoder = LSTMDecoder(feature_channels, vocab_size, hidden_size, **factory_kwargs)
        elif decoder == "bytenet":
            self.decoder = ByteNetDecoder(
                feature_channels,
                vocab_size,
                conv_channels,
                conv_layers,
                carry=carry,
                **factory_kwargs,
            )
        elif decoder != "none":
            raise ValueError(f"decoder must be 'lstm', 'bytenet' or 'none', got {decoder!r}")

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> mean, log-variance [B, Z]."""
        return self.encoder(tokens)

    def _expand(self, z: Tensor) -> tuple[Tensor, None]:
        """z [B, Z] -> features [L, B, D], no decoder state."""
        return self.deconvolution(z), None


def _check_blocks(length: int, channels: tuple[int, ...]) -> None:
    """Raise ValueError unless the length can be halved once per block."""
    if not channels:
        raise ValueError("encoder_channels must be one or more positive sizes, got none")
    unit = 2 ** len(channels)
    if length % unit:
        below, above = length // unit * unit, (length // unit + 1) * unit
        nearest = f"{below} or {above}" if below else above
        raise ValueError(
            f"length {length} is not divisible by {unit}, as {len(channels)} encoder blocks need: "
            f"take {nearest}, or fewer encoder_channels"
        )
