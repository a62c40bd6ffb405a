"""The models of the paper: composition of `fastvae.nn` and `fastvae.objective`, nothing else."""

from pathlib import Path

from fastvae.models.hybrid import HybridVAE
from fastvae.models.lstm_vae import LSTMVAE
from fastvae.models.pretrained import load_as
from fastvae.models.text_vae import TextVAE
from fastvae.text import Vocabulary

MODELS: dict[str, type[TextVAE]] = {cls.__name__: cls for cls in (HybridVAE, LSTMVAE)}


def load(folder: str | Path, *, best: bool = False) -> tuple[TextVAE, Vocabulary | None]:
    """A saved folder -> (model in eval mode, vocabulary or None); the class comes from config.json.

    `best` takes the weights of a run's best checkpoint instead of its last ones. Raises ValueError
    where a file is not what it should be, FileNotFoundError where there is none.
    """
    return load_as(MODELS, folder, best)
