"""fastvae: custom kernels for the hybrid convolutional text VAE (arXiv:1702.02390)."""

import torch  # noqa: F401  its libraries must be loaded before ours

try:
    from fastvae import _C  # noqa: F401  registers torch.ops.fastvae.*
except ImportError as error:
    raise ImportError(
        "fastvae's native module is missing: run `pip install .` and import from outside the source "
        f"tree ({error})"
    ) from error

from fastvae import ops

if torch.version.cuda or torch.version.hip:
    import fastvae.kernels  # noqa: F401  registers the Triton kernels

__version__ = "0.1.0"
__all__ = ["ops"]
