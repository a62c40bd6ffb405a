"""The paper's settings as named presets, and overriding a preset's fields by name.

Semeniuta, Severyn, Barth 2017, arXiv:1702.02390; its released code where the paper gives no value.
"""

import inspect
import types
import typing
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fastvae.device import check_fits
from fastvae.models import MODELS, TextVAE
from fastvae.names import suggestion
from fastvae.text import (
    Corpus,
    LineCorpus,
    Reading,
    Vocabulary,
    WindowCorpus,
    survey,
)
from fastvae.text.reading import LINES, NORMALIZERS, WINDOWS
from fastvae.training.config import LEAST, TrainingConfig


@dataclass(frozen=True)
class Text:
    """A kind of text.

    Args:
        description: one line for people.
        reading: how a file becomes samples.
        unit: what a token is: "character" or "byte".
    """

    description: str
    reading: Reading
    unit: str


TEXTS = {
    "lines": Text("each line is a text", Reading(LINES), "character"),
    "byte-lines": Text("each line is a text", Reading(LINES), "byte"),
    "windows": Text("a stream, of which each window is a text", Reading(WINDOWS), "character"),
    "tweets": Text("each line is a text, normalized as a tweet", Reading(LINES, "tweets"), "byte"),
}


@dataclass(frozen=True)
class Preset:
    """A model's class and arguments, the kind of text it reads, and fields of `TrainingConfig`.

    Args:
        description: one line for people.
        model: the class, "HybridVAE" or "LSTMVAE".
        length: L, tokens of a sequence; None is chosen from the text.
        model_arguments: arguments of the class that differ from its defaults.
        text: the kind of text, a key of `TEXTS`.
        training: fields of `TrainingConfig` that differ from its defaults.
        shares: fields of `TrainingConfig` in steps, as shares of all steps; `training` goes first.
    """

    description: str
    model: str = "HybridVAE"
    length: int | None = 48
    model_arguments: Mapping[str, Any] = field(default_factory=dict)
    text: str = "windows"
    training: Mapping[str, Any] = field(default_factory=dict)
    shares: Mapping[str, float] = field(default_factory=dict)

    def model_for(self, vocabulary: Vocabulary, length: int | None = None) -> TextVAE:
        """Build the preset's model for a vocabulary, initialized from torch's global generator.

        Args:
            vocabulary: gives V and the ids of pad and end.
            length: L, tokens of a sequence; None is the preset's.

        Returns:
            the model, in training mode.

        Raises:
            ValueError: this machine has too little memory to train it, an argument is out of range,
                or neither the preset nor `length` gives the length.
        """
        return build_model(self if length is None else replace(self, length=length), vocabulary)

    def config(self, **fields: Any) -> TrainingConfig:
        """The preset's training settings, with these fields replaced -> `TrainingConfig`.

        Raises:
            ValueError: a field does not exist or its value is out of range.
        """
        given = {**self.training, **fields}
        steps = given.get("steps", TrainingConfig.steps)
        shares = {k: max(LEAST.get(k, 0), round(v * steps)) for k, v in self.shares.items()}
        return TrainingConfig.from_dict({**shares, **given})


def load(name: str) -> Preset:
    """Name -> the preset of this name.

    Raises:
        ValueError: no preset has this name; the message suggests the closest or lists all.
    """
    if name not in PRESETS:
        raise ValueError(f"no preset {name!r}: {suggestion(name, PRESETS)}")
    return PRESETS[name]


_PTB_MODEL = {"latent_size": 50, "encoder_channels": (128, 256), "aux_weight": 0.2}
_PTB_TRAINING = {
    "steps": 100_000,
    "batch_size": 64,
    "kl_floor": 0.001,
    "kl_start": 1000,
    "kl_end": 8000,
    "lr_decay": 0.95,
    "lr_decay_start": 20_000,
}
_BASELINE_TRAINING = {
    "steps": 100_000,
    "batch_size": 64,
    "kl_start": 10_000,
    "kl_end": 17_000,
}

PRESETS: dict[str, Preset] = {
    "lines": Preset(
        "a hybrid for a file of names, sentences or other short lines",
        length=None,
        model_arguments={
            "latent_size": 64,
            "encoder_channels": (128, 256),
            "feature_channels": 100,
            "hidden_size": 320,
            "mask_pad": True,
        },
        text="lines",
        training={
            "steps": 10_000,
            "batch_size": 64,
            "kl_target": 0.85,
            "lr_decay": 0.8,
            "lr_floor": 1e-4,
        },
        shares={"kl_end": 0.7, "lr_decay_start": 0.7, "lr_decay_every": 0.03},
    ),
    "small": Preset(
        "a small hybrid for quick runs on any text file",
        model_arguments={
            "latent_size": 32,
            "encoder_channels": (64, 128),
            "feature_channels": 100,
            "hidden_size": 200,
        },
        training={"steps": 3000, "batch_size": 32, "kl_floor": 0.001, "kl_end": 2000},
    ),
    "ptb-lstm": Preset(
        "the paper's hybrid with an LSTM decoder, on characters",
        model_arguments={**_PTB_MODEL, "hidden_size": 500},
        training=_PTB_TRAINING,
    ),
    "ptb-bytenet": Preset(
        "the paper's hybrid with masked convolutions, on characters",
        length=56,
        model_arguments={**_PTB_MODEL, "decoder": "bytenet", "conv_layers": 3},
        training=_PTB_TRAINING,
    ),
    "ptb-conv": Preset(
        "the paper's feed-forward VAE without history, on characters",
        length=52,
        model_arguments={
            "latent_size": 100,
            "encoder_channels": (128, 256),
            "decoder": "none",
            "aux_weight": 0.0,
        },
        training=_BASELINE_TRAINING,
    ),
    "ptb-lstm-vae": Preset(
        "the LSTM VAE that the paper compares with, on characters",
        model="LSTMVAE",
        model_arguments={"latent_size": 100, "hidden_size": 500, "word_dropout": 0.5},
        training={**_BASELINE_TRAINING, "clip_norm": 100.0},
    ),
    "tweets": Preset(
        "the paper's hybrid for tweets, on lines of bytes",
        length=128,
        model_arguments={"latent_size": 100},
        text="tweets",
        training={
            "steps": 100_000,
            "batch_size": 32,
            "kl_floor": 0.001,
            "kl_start": 50_000,
            "kl_end": 60_000,
            "lr_decay": 0.95,
            "lr_decay_start": 70_000,
        },
    ),
    "tweets-lstm-vae": Preset(
        "the LSTM VAE that the paper compares with, on lines of bytes",
        model="LSTMVAE",
        length=128,
        model_arguments={"latent_size": 100, "hidden_size": 1000, "word_dropout": 0.5},
        text="tweets",
        training={**_BASELINE_TRAINING, "batch_size": 32, "clip_norm": 100.0},
    ),
}


MEANINGS = {
    "length": "Tokens of a text; preset lines chooses it by the file.",
    "latent_size": "Size of a latent vector.",
    "encoder_channels": "Channels of each block of the encoder; each halves the length.",
    "feature_channels": "Channels of the features that the decoder reads.",
    "decoder": "lstm, bytenet (masked convolutions) or none (no history).",
    "hidden_size": "Units of an LSTM.",
    "conv_layers": "Layers of the bytenet decoder.",
    "conv_channels": "Channels of the bytenet decoder.",
    "carry": "Whether its highway layers carry their input on.",
    "aux_weight": "Weight of the auxiliary loss, of the features alone.",
    "word_dropout": "Share of history hidden from the decoder; 1 hides all.",
    "mask_pad": "Whether pads are left out of the loss.",
    "steps": "Training steps.",
    "batch_size": "Texts of a step, over all processes.",
    "learning_rate": "Adam's learning rate.",
    "lr_decay": "What multiplies it every lr_decay_every steps.",
    "lr_decay_every": "Steps between two decays.",
    "lr_decay_start": "Step that the decays begin at.",
    "lr_floor": "The learning rate that decays do not lead below.",
    "kl_floor": "Weight of the KL before kl_start.",
    "kl_start": "Step that the weight begins to rise at.",
    "kl_end": "Step that it reaches kl_target at.",
    "kl_cycles": "How many times it rises, from kl_start to kl_end.",
    "kl_rise": "Share of a cycle in which it rises.",
    "kl_target": "Weight of the KL at the end.",
    "kl_nats": "Hold the KL at so many nats instead of following that schedule.",
    "free_bits": "Nats of KL that cost nothing, a latent dimension.",
    "clip_norm": "Largest norm of a gradient; none for no limit.",
    "precision": "fp32, or bf16 (autocast).",
    "accumulate": "Micro-batches of a step.",
    "seed": "Seed of everything drawn at random.",
    "log_every": "Steps between two records of training.",
    "eval_every": "Steps between two evaluations; 0 for none.",
    "eval_samples": "Texts of an evaluation; none for all.",
    "checkpoint_every": "Steps between two checkpoints.",
    "sample_every": "Steps between two prints of samples; 0 for none.",
    "samples": "How many samples are printed.",
}


def defaults(preset: Preset) -> tuple[dict[str, Any], dict[str, Any]]:
    """Preset -> the value of each field of its model, and of its training.

    Args:
        preset: the preset.

    Returns:
        `length` and the model's fields by name; the fields of `TrainingConfig` by name. Both
        include defaults that the preset does not change.
    """
    parameters = inspect.signature(MODELS[preset.model].__init__).parameters
    model = {name: parameters[name].default for name in _model_fields(preset.model)}
    return {"length": preset.length, **model, **preset.model_arguments}, asdict(preset.config())


def configure(name: str, overrides: Mapping[str, str]) -> Preset:
    """Name and overrides as text -> the preset of this name with these fields replaced.

    Args:
        name: name of the preset.
        overrides: field -> value as text, such as {"steps": "500"}. Fields are `length`, arguments
            of the model and fields of `TrainingConfig`.

    Returns:
        a new preset.

    Raises:
        ValueError: no preset or field has this name (the message suggests the closest), or a value
            is not of its field's type.
    """
    preset = load(name)
    kinds = field_types(preset)
    for key in overrides:
        if key not in kinds:
            raise ValueError(f"{name} has no field {key!r}: {suggestion(key, kinds)}")
    return changed(preset, {key: parse(key, text, kinds[key]) for key, text in overrides.items()})


# Fields of HybridVAE that not all of its decoders have.
_DECODERS_OF = {
    "hidden_size": ("lstm",),
    **dict.fromkeys(("conv_layers", "conv_channels", "carry"), ("bytenet",)),
    **dict.fromkeys(("word_dropout", "aux_weight"), ("lstm", "bytenet")),
}
_SCHEDULE = "kl_floor", "kl_start", "kl_end", "kl_cycles", "kl_rise", "kl_target"


def check_effect(preset: Preset, names: Iterable[str]) -> None:
    """Check that fields that a person has set can change the preset's model or training.

    Args:
        preset: the preset with these fields.
        names: the fields.

    Raises:
        ValueError: another field keeps one of them from having any effect; the message names both.
    """
    model, training = defaults(preset)
    idle = {}
    if (decoder := model.get("decoder")) in ("lstm", "bytenet", "none"):
        for field, decoders in _DECODERS_OF.items():
            if decoder not in decoders:
                idle[field] = f"decoder {decoder}"
    if training["kl_nats"] is not None:
        idle |= dict.fromkeys(_SCHEDULE, "kl_nats, which takes the place of the schedule")
    if training["lr_decay"] == 1:
        idle |= dict.fromkeys(("lr_decay_every", "lr_decay_start", "lr_floor"), "lr_decay 1")
    for name in names:
        if name in idle:
            raise ValueError(f"{name} has no effect with {idle[name]}: leave it out")


def changed(preset: Preset, values: Mapping[str, Any]) -> Preset:
    """Preset and values -> the preset with these fields replaced.

    Args:
        preset: the preset to start from.
        values: values by field: `length`, arguments of its model or fields of `TrainingConfig`; not
            checked here.

    Returns:
        a new preset.
    """
    training = {k: v for k, v in values.items() if k in _training_fields()}
    model = {k: v for k, v in values.items() if k != "length" and k not in training}
    return replace(
        preset,
        length=values.get("length", preset.length),
        model_arguments={**preset.model_arguments, **model},
        training={**preset.training, **training},
    )


def field_types(preset: Preset) -> dict[str, Any]:
    """Preset -> the type of each field that may be overridden, by name."""
    return {"length": int, **_model_fields(preset.model), **_training_fields()}


def open_corpus(
    path: Path,
    length: int,
    vocabulary: Vocabulary | None = None,
    *,
    text: str,
    cache: Path | None = None,
) -> Corpus:
    """Open a file as a corpus of one kind of text.

    Args:
        path: path of the file; gzip is unpacked.
        length: L, tokens of a sample.
        vocabulary: the vocabulary to use; None is that of the file, or a `ByteVocabulary`.
        text: the kind of text, a key of `TEXTS`.
        cache: directory that keeps the encoded text for the next run; None is a temporary one.

    Returns:
        a `WindowCorpus` or a `LineCorpus`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: no kind of text has this name, or the file cannot be read like this; see
            `WindowCorpus` and `LineCorpus`.
    """
    if text not in TEXTS:
        raise ValueError(f"no text {text!r}: {suggestion(text, TEXTS)}")
    kind = TEXTS[text]
    if vocabulary is None and kind.reading.kind == LINES:
        vocabulary = survey(path, unit=kind.unit, cache=cache).vocabulary
    return read_corpus(path, length, kind.reading, vocabulary, cache=cache)


def read_corpus(
    path: Path,
    length: int,
    reading: Reading,
    vocabulary: Vocabulary | None = None,
    *,
    cache: Path | None = None,
) -> Corpus:
    """Open a file as a corpus, read as a `Reading` says; for example that of a run.

    Args:
        path: path of the file; gzip is unpacked.
        length: L, tokens of a sample.
        reading: how the file becomes samples.
        vocabulary: the vocabulary to use; None is that of the file (windows) or a `ByteVocabulary`
            (lines).
        cache: directory that keeps the encoded text for the next run; None is a temporary one.

    Returns:
        a `WindowCorpus` or a `LineCorpus`.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read like this; see `WindowCorpus` and `LineCorpus`.
    """
    if reading.kind == WINDOWS:
        return WindowCorpus(path, length, vocabulary=vocabulary, cache=cache)
    return LineCorpus(
        path,
        length,
        vocabulary=vocabulary,
        normalize=NORMALIZERS[reading.normalization],
        column=reading.column,
        field=reading.field,
        part=reading.part,
        cache=cache,
    )


def build_model(preset: Preset, vocabulary: Vocabulary) -> TextVAE:
    """Build a preset's model for a vocabulary, initialized from torch's global generator.

    Args:
        preset: class and sizes.
        vocabulary: gives V and the ids of pad and end.

    Returns:
        the model, on torch's default device, in training mode.

    Raises:
        ValueError: this machine has too little memory to train it, an argument is out of range, or
            the preset has no length.
    """
    if preset.length is None:
        raise ValueError("the preset takes its length from the text: give one")
    arguments = {
        "vocab_size": vocabulary.size,
        "length": preset.length,
        "pad_id": vocabulary.pad_id,
        "end_id": vocabulary.end_id,
        **preset.model_arguments,
    }
    trial = MODELS[preset.model](**arguments, device="meta")
    weights = sum(p.numel() * p.element_size() for p in trial.parameters())
    check_fits(4 * weights, "the model's weights, their gradients and Adam's moments")
    return MODELS[preset.model](**arguments)


def _model_fields(name: str) -> dict[str, Any]:
    """Keyword arguments of a model that a user may set -> their types."""
    # These follow from the text or cannot be set on the command line.
    given = {"self", "vocab_size", "length", "pad_id", "end_id", "device", "dtype"}
    parameters = inspect.signature(MODELS[name].__init__, eval_str=True).parameters
    return {k: p.annotation for k, p in parameters.items() if k not in given}


def _training_fields() -> dict[str, Any]:
    """Fields of `TrainingConfig` -> their types."""
    hints = typing.get_type_hints(TrainingConfig)
    return {f.name: hints[f.name] for f in fields(TrainingConfig)}


def parse(name: str, text: str, hint: Any) -> Any:
    """Text -> value: `12`, `0.5`, `true`, `64,128`, `none`.

    Args:
        name: name of the field, for the message.
        text: its value as text.
        hint: its type; for a union the first type that fits is used.

    Returns:
        the value.

    Raises:
        ValueError: the text is not a value of this type.
    """
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    for kind in kinds:
        try:
            return _parse_one(text.strip(), kind)
        except (KeyError, ValueError):
            continue
    wanted = " or ".join(_DESCRIPTIONS.get(kind, "numbers such as 64,128") for kind in kinds)
    raise ValueError(f"{name} = {text!r}: expected {wanted}")


_DESCRIPTIONS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    type(None): "none",
}


def _parse_one(text: str, kind: Any) -> Any:
    """Text -> value of one type; raises ValueError or KeyError if it is none."""
    if kind is bool:
        return {"true": True, "false": False}[text.lower()]
    if kind is type(None):
        return {"none": None}[text.lower()]
    if kind in (int, float, str):
        return kind(text)
    return tuple(int(part) for part in text.strip("()[] ,").split(","))
