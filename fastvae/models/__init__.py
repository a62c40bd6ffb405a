"""The models of the paper, composed from `fastvae.nn` and `fastvae.objective`."""

from pathlib import Path

from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.models.pretrained import load_as
from fastvae.models.text_vae import TextVAE
from fastvae.text import Vocabulary

__all__ = ["LSTMVAE", "MODELS", "HybridVAE", "TextVAE", "load"]

MODELS: dict[str, type[TextVAE]] = {cls.__name__: cls for cls in (HybridVAE, LSTMVAE)}


def load(folder: str | Path, *, best: bool = False) -> tuple[TextVAE, Vocabulary | None]:
    """Load a saved model: folder -> (model in eval mode, its vocabulary or None).

    Args:
        folder: a run directory, or a folder written by `save_pretrained`; config.json names the
            class. Where no folder has that name, "places" is the packaged model of place names.
        best: load the weights of the run's best checkpoint (lowest validation bound) instead of the
            last ones.

    Returns:
        the model, on torch's default device, and its vocabulary; None if vocabulary.json is
        missing.

    Raises:
        FileNotFoundError: the folder, its config.json or its weights do not exist.
        ValueError: a file is damaged or does not match the others; the message names it.
    """
    return load_as(MODELS, folder, best)
