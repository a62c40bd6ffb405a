"""The models of the paper: composition of `fastvae.nn` and `fastvae.objective`, nothing else."""

from pathlib import Path

from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.models.pretrained import load_as
from fastvae.models.text_vae import TextVAE
from fastvae.text import Vocabulary

__all__ = ["LSTMVAE", "MODELS", "HybridVAE", "TextVAE", "load"]

MODELS: dict[str, type[TextVAE]] = {cls.__name__: cls for cls in (HybridVAE, LSTMVAE)}


def load(folder: str | Path, *, best: bool = False) -> tuple[TextVAE, Vocabulary | None]:
    """Load a saved model: its folder -> the model in eval mode, and its vocabulary or None.

    Args:
        folder: a run directory, or what `save_pretrained` wrote; config.json names the class.
        best: take the weights of the run's best checkpoint instead of its last ones.

    Returns:
        the model, on the CPU, and its vocabulary, or None where none was saved.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: a file is damaged or not what it should be; the message names it.
    """
    return load_as(MODELS, folder, best)
