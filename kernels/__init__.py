"""What serves the CUDA device: the GPU side's table of contents; other ops run as plain PyTorch."""

from collections.abc import Callable

import torch

from fastvae.kernels import decode_bytenet, highway_conv, layer_norm_lstm

KERNELS = {
    "layer_norm_lstm": layer_norm_lstm.layer_norm_lstm,
    "layer_norm_lstm_backward": layer_norm_lstm.layer_norm_lstm_backward,
    "highway_conv_project": highway_conv.highway_conv_project,
    "highway_conv_project_backward": highway_conv.highway_conv_project_backward,
    "highway_conv_gate": highway_conv.highway_conv_gate,
    "highway_conv_gate_backward": highway_conv.highway_conv_gate_backward,
    "highway_conv": highway_conv.highway_conv,
    "decode_bytenet": decode_bytenet.decode_bytenet,
}


def _on_its_device(kernel: Callable) -> Callable:
    """`kernel` launched where its tensors are, its products in their dtype and not autocast's."""

    def run(first, *rest):
        with torch.cuda.device_of(first), torch.autocast("cuda", enabled=False):
            return kernel(first, *rest)

    return run


for _name, _kernel in KERNELS.items():
    torch.library.register_kernel(f"fastvae::{_name}", "cuda", _on_its_device(_kernel))
