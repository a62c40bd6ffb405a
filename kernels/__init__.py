"""What serves the CUDA device: the GPU side's table of contents; other ops run as plain PyTorch."""

import torch

from fastvae.kernels import layer_norm_lstm

torch.library.register_kernel("fastvae::layer_norm_lstm", "cuda", layer_norm_lstm.layer_norm_lstm)
torch.library.register_kernel(
    "fastvae::layer_norm_lstm_backward", "cuda", layer_norm_lstm.layer_norm_lstm_backward
)
