"""The ops that carry the speed: each is one call for a whole sequence.

Letters used throughout: B batch, T time (length L), C channels, H hidden size, D feature channels,
V tokens, N layers, Z latent size. Sequences are time-major, as in `torch.nn.LSTM`.
"""

from fastvae.ops.decode_bytenet import decode_bytenet, decode_bytenet_pack
from fastvae.ops.decode_lstm import decode_lstm, decode_lstm_pack
from fastvae.ops.gumbel_noise import gumbel_noise
from fastvae.ops.highway_conv import highway_conv, highway_conv_gate, highway_conv_project
from fastvae.ops.layer_norm_lstm import layer_norm_lstm
from fastvae.ops.linear import linear
from fastvae.ops.unfold import fold, unfold

__all__ = [
    "decode_bytenet",
    "decode_bytenet_pack",
    "decode_lstm",
    "decode_lstm_pack",
    "fold",
    "gumbel_noise",
    "highway_conv",
    "highway_conv_gate",
    "highway_conv_project",
    "layer_norm_lstm",
    "linear",
    "unfold",
]
