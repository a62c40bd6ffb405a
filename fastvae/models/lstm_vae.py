"""The baseline: a VAE of two LayerNorm-LSTMs, with word dropout in the decoder.

Bowman et al. 2016, "Generating Sentences from a Continuous Space", arXiv:1511.06349.
"""

from torch import Tensor

from fastvae.models.decoders import LSTMDecoder
from fastvae.models.packing import token_lengths
from fastvae.models.text_vae import State, TextVAE, constructor_arguments
from fastvae.nn import LayerNormLSTM, Linear


class LSTMVAE(TextVAE):
    """The paper's baseline, two LayerNorm-LSTMs: tokens [B, L] -> `fastvae.VAEOutput`.

    The encoder's last h, with `mask_pad` that of each sequence's last token, gives the posterior of
    z. z gives the decoder's h0 and c0, and nothing else. Bowman et al. 2016, arXiv:1511.06349.

    Args:
        vocab_size: V, the number of token ids.
        length: L, tokens of a sequence.
        latent_size: Z.
        hidden_size: units of both LSTMs.
        word_dropout: probability of hiding a token from the decoder in training. 1 hides all of
            them, in evaluation and generation too.
        pad_id: the id that fills a sequence after its end, or None.
        end_id: the id that ends a sequence, or None; requires `pad_id`.
        mask_pad: leave pads out of the loss, and end the encoder at a sequence's last token;
            requires `pad_id`, other than `end_id`. On a CPU, positions after that are not computed.
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
        hidden_size: int = 1000,
        word_dropout: float = 0.5,
        pad_id: int | None = None,
        end_id: int | None = None,
        mask_pad: bool = False,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(constructor_arguments(locals()))
        factory_kwargs = {"device": device, "dtype": dtype}
        self.encoder = LayerNormLSTM(vocab_size, hidden_size, **factory_kwargs)
        self.posterior_linear = Linear(hidden_size, 2 * latent_size, **factory_kwargs)
        self.initial_state = Linear(latent_size, 2 * hidden_size, **factory_kwargs)
        self.decoder = LSTMDecoder(0, vocab_size, hidden_size, **factory_kwargs)

    def _encode(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, L] -> mean, log-variance [B, Z]."""
        packing = self._packing(tokens)
        if packing is not None:
            packed = packing.pack(tokens.T)
            _, (h_n, _) = self.encoder(None, tokens=packed, lengths=packing.lengths)
            h_n = packing.restore(h_n)
        else:
            lengths = token_lengths(tokens, self.pad_id) if self.mask_pad else None
            _, (h_n, _) = self.encoder(None, tokens=tokens.T, lengths=lengths)
        return self.posterior_linear(h_n).chunk(2, -1)

    def _expand(self, z: Tensor) -> tuple[None, State]:
        """z [B, Z] -> no features, the decoder's h0, c0 [B, H]."""
        z = z.to(self.initial_state.weight.dtype)
        h0, c0 = self.initial_state(z).tanh().chunk(2, -1)
        return None, (h0, c0)
