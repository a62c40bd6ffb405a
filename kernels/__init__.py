"""What serves the CUDA device: the GPU side's table of contents; other ops run as plain PyTorch."""

from collections.abc import Callable

import torch

from fastvae.kernels import (
    decode_bytenet,
    decode_lstm,
    gumbel_noise,
    highway_conv,
    layer_norm_lstm,
)

KERNELS = {
    "gumbel_noise": gumbel_noise.gumbel_noise,
    "layer_norm_lstm": layer_norm_lstm.layer_norm_lstm,
    "layer_norm_lstm_backward": layer_norm_lstm.layer_norm_lstm_backward,
    "highway_conv_project": highway_conv.highway_conv_project,
    "highway_conv_project_backward": highway_conv.highway_conv_project_backward,
    "highway_conv_gate": highway_conv.highway_conv_gate,
    "highway_conv_gate_backward": highway_conv.highway_conv_gate_backward,
    "highway_conv": highway_conv.highway_conv,
    "decode_lstm": decode_lstm.decode_lstm,
    "decode_bytenet": decode_bytenet.decode_bytenet,
}


def _in_place(kernel: Callable) -> Callable:
    """`kernel` on its tensors' device, with products in the dtype given, not in autocast's."""

    def run(first, *rest):
        plain = torch.autocast("cuda", enabled=False)
        with torch.cuda.device_of(first), plain, torch.no_grad():  # ops have their own derivatives
            return kernel(first, *rest)

    return run


for _name, _kernel in KERNELS.items():
    torch.library.register_kernel(f"fastvae::{_name}", "cuda", _in_place(_kernel))
