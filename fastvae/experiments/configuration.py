"""One run of a grid, in a process of its own: train or go on, then measure into result.json."""

import json
import os
import sys
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from fastvae.allocator import keep_freed_memory
from fastvae.atomic_files import read_json, write_json
from fastvae.console import console, one_line
from fastvae.device import find_device
from fastvae.evaluation import measure
from fastvae.metrics import variety
from fastvae.models.text_vae import TextVAE
from fastvae.plots import read_metrics
from fastvae.presets import Preset, build_model, open_corpus
from fastvae.text import Corpus
from fastvae.text.files import file_digest
from fastvae.training import train
from fastvae.training.config import TrainingConfig
from fastvae.training.run_directory import METRICS

RESULT = "result.json"
SAMPLES, SHOWN, INTERPOLATIONS = 1000, 20, 3
CURVES = ("step", "reconstruction", "kl", "bound", "bpc")
SCHEMA = {
    **dict.fromkeys(("settings", "files", "valid", "test?", "curves"), dict),
    **dict.fromkeys(("variety", "variety_of_held_out"), dict),
    **dict.fromkeys(("kl_weight", "steps_per_second"), float),
    **dict.fromkeys(("parameters", "threads"), int),
    **dict.fromkeys(("unit", "device"), str),
    **dict.fromkeys(("samples", "interpolations"), list),
    "limit": (int, type(None)),
    "...": object,
}


@dataclass(frozen=True)
class Job:
    """What a process needs: settings, files by split (train, valid, perhaps test), a folder."""

    preset: Preset
    folder: Path
    files: dict[str, str]
    cache: str
    device: str | None = None
    threads: int | None = None
    limit: int | None = None

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "folder": str(self.folder)})

    @classmethod
    def from_json(cls, text: str) -> "Job":
        values = json.loads(text)
        preset, folder = Preset(**values.pop("preset")), Path(values.pop("folder"))
        return cls(preset=preset, folder=folder, **values)


def run(job: Job) -> bool:
    """Train the job's model to its last step and measure it -> False where a signal came first."""
    if job.threads:
        torch.set_num_threads(job.threads)
    corpora = _open(job)
    config = job.preset.config()
    torch.manual_seed(config.seed)
    model = build_model(job.preset, corpora["train"].vocabulary).to(find_device(job.device))
    result = train(
        model, corpora["train"], config, job.folder, validation=corpora["valid"], resume=True
    )
    if result["interrupted"]:
        return False
    write_json(job.folder / RESULT, _measure(job, model, corpora, config))
    return True


def finished(job: Job) -> dict[str, Any] | None:
    """The result in the job's folder, or None while there is none for its settings and files."""
    try:
        result = read_json(job.folder / RESULT, SCHEMA)
    except (FileNotFoundError, ValueError):  # none yet, or a damaged one: it is measured again
        return None
    wanted = json.loads(json.dumps(_identity(job)))
    return result if wanted.items() <= result.items() else None


def _open(job: Job) -> dict[str, Corpus]:
    corpora: dict[str, Corpus] = {}
    for split, path in job.files.items():
        vocabulary = corpora["train"].vocabulary if corpora else None
        corpora[split] = open_corpus(
            Path(path), job.preset.length, vocabulary, text=job.preset.text, cache=Path(job.cache)
        )
    return corpora


def _measure(
    job: Job, model: TextVAE, corpora: dict[str, Corpus], config: TrainingConfig
) -> dict[str, Any]:
    rows = read_metrics(job.folder / METRICS)
    measured = {
        split: measure(model, corpus, limit=job.limit, nll_texts=256, seed=config.seed)
        for split, corpus in corpora.items()
        if split != "train"
    }
    words = corpora["valid"].vocabulary
    generator = torch.Generator().manual_seed(config.seed)
    samples = torch.cat([_sample(model, generator) for _ in range(SAMPLES // 100)])
    texts = words.batch_decode(samples)
    first = next(corpora["valid"].batches(SAMPLES, SAMPLES))
    ends = torch.randn(INTERPOLATIONS, 2, model.latent_size, generator=generator, device="cpu")
    ends = ends.to(next(model.parameters()))
    return {
        **_identity(job),
        "parameters": sum(p.numel() for p in model.parameters()),
        "vocabulary": words.size,
        "unit": words.unit,
        "kl_weight": rows["train"][-1]["kl_weight"],
        "steps_per_second": median(row["steps_per_second"] for row in rows["train"]),
        "device": _device(model),
        "threads": torch.get_num_threads(),
        "curves": {split: [{k: r[k] for k in CURVES} for r in rows[split]] for split in rows},
        **measured,
        "variety": {**variety(texts), "texts": len(texts)},
        "text": {split: corpus.counts() for split, corpus in corpora.items()},
        "variety_of_held_out": {**variety(words.batch_decode(first)), "texts": len(first)},
        "samples": texts[:SHOWN],
        "interpolations": [words.batch_decode(model.interpolate(a, b, 7)) for a, b in ends],
    }


def _sample(model: TextVAE, generator: torch.Generator) -> Tensor:
    return model.sample(100, generator=generator).cpu()


def _device(model: TextVAE) -> str:
    device = next(model.parameters()).device
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _identity(job: Job) -> dict[str, Any]:
    """What a result depends on; of files the names and contents, and nothing of where they lie."""
    files = {split: [Path(p).name, _content(p)] for split, p in job.files.items()}
    return {"settings": asdict(job.preset), "files": files, "limit": job.limit}


def _content(path: str) -> str:
    """File -> hex digest, which jobs with the same file share."""
    status = os.stat(path)
    return _cached_digest(path, status.st_size, status.st_mtime_ns)


@lru_cache
def _cached_digest(path: str, size: int, modified: int) -> str:
    return file_digest(Path(path))


def main() -> None:
    """Read a job as JSON; exit with 0 when it is measured, 130 on a signal, 2 after one line."""
    keep_freed_memory()
    try:
        status = 0 if run(Job.from_json(sys.stdin.read())) else 130
    except (ValueError, OSError, RuntimeError) as error:
        console(stderr=True).print(f"fastvae: {one_line(error)}", soft_wrap=True)
        status = 2
    except KeyboardInterrupt:  # before training, or while measuring: what is trained is saved
        status = 130
    sys.exit(status)
