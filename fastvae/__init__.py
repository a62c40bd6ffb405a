"""fastvae: custom kernels for the hybrid convolutional text VAE (arXiv:1702.02390)."""

import sys

# The rest of `python -m fastvae` begins once the package, which takes a second, is imported.
if sys.argv[:1] == ["-m"] and sys.orig_argv[-len(sys.argv) :][:1] in (["fastvae"], ["-mfastvae"]):
    from fastvae_command import end_at_once

    end_at_once()

import torch

try:
    import fastvae._C as _C  # registers torch.ops.fastvae.*; needs torch's libraries loaded
except ModuleNotFoundError:
    raise ImportError(
        "fastvae's native module is missing: run `pip install .` and import from outside the "
        "source tree"
    ) from None

from fastvae import nn, ops, presets, reference, text
from fastvae.allocator import keep_freed_memory
from fastvae.models import LSTMVAE, HybridVAE, load
from fastvae.objective import KLSchedule, VAEOutput
from fastvae.page import export_page
from fastvae.training import TrainingConfig, train
from fastvae.training.recorded_step import RecordedStep

if torch.version.cuda or torch.version.hip:
    import fastvae.kernels  # noqa: F401  registers the Triton kernels

__version__ = "0.1.0"
cpu_capability = _C.cpu_capability

__all__ = [
    "LSTMVAE",
    "HybridVAE",
    "KLSchedule",
    "RecordedStep",
    "TrainingConfig",
    "VAEOutput",
    "cpu_capability",
    "export_page",
    "keep_freed_memory",
    "load",
    "nn",
    "ops",
    "presets",
    "reference",
    "text",
    "train",
]
