"""Training that resumes bit for bit; `loop` draws a batch, steps, records and saves."""

from fastvae.training.config import TrainingConfig
from fastvae.training.loop import train

__all__ = ["TrainingConfig", "train"]
