"""What serves the CUDA device: the GPU side's table of contents; other ops run as plain PyTorch.

Kernels, and Triton with them, are imported when they are first called.
"""

from collections.abc import Callable
from functools import cache
from importlib import import_module

import torch

MODULES = {
    "gumbel_noise": "gumbel_noise",
    "layer_norm_lstm": "layer_norm_lstm",
    "layer_norm_lstm_backward": "layer_norm_lstm",
    "highway_conv_project": "highway_conv",
    "highway_conv_project_backward": "highway_conv",
    "highway_conv_gate": "highway_conv",
    "highway_conv_gate_backward": "highway_conv",
    "highway_conv": "highway_conv",
    "decode_lstm": "decode_lstm",
    "decode_lstm_pack": "decode_lstm",
    "decode_bytenet": "decode_bytenet",
}


@cache
def kernel(op: str) -> Callable:
    """The function that computes an op. Raises ImportError in one line where Triton is missing."""
    try:
        return getattr(import_module(f"fastvae.kernels.{MODULES[op]}"), op)
    except ModuleNotFoundError as error:
        if error.name != "triton":
            raise
        raise ImportError(
            f"{op} on a GPU needs Triton, which is not installed: run `pip install triton`, or use "
            "fastvae.reference"
        ) from error


def _in_place(op: str) -> Callable:
    """The kernel on its tensors' device, with products in the dtype given, not in autocast's."""

    def run(first, *rest):
        plain = torch.autocast("cuda", enabled=False)
        with torch.cuda.device_of(first), plain, torch.no_grad():  # ops have their own derivatives
            return kernel(op)(first, *rest)

    return run


for _op in MODULES:
    torch.library.register_kernel(f"fastvae::{_op}", "cuda", _in_place(_op))
