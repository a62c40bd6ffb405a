"""Saves and loads models: config.json, model.safetensors, vocabulary.json, text.json; the Hub.

No pickle: weights are safetensors, everything else is JSON. Files are replaced atomically. A
model's sizes are checked against its file before memory of that size is allocated.

With `quantization="int8"` a matrix W is saved as int8 values and a scale for each row of its first
dimension, under its name and that name with ".scale":

    W ≈ s q,   q = round(W / s) in [−127, 127],   s = max |W| / 127 of the row
"""

import inspect
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from torch.nn.utils import parametrize

from fastvae.atomic_files import (
    DTYPES,
    check_signature,
    check_tensors,
    check_utf8,
    digest_json,
    first_line,
    make_folder,
    open_tensors,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
)
from fastvae.names import suggestion
from fastvae.ops.int8 import round_rows
from fastvae.ops.precision import accumulate_dtype
from fastvae.text import Vocabulary
from fastvae.text.reading import FILE as READING
from fastvae.text.reading import Reading, load_reading, save_reading

FORMAT = 1
CONFIG, WEIGHTS, VOCABULARY = "config.json", "model.safetensors", "vocabulary.json"
BEST = "best.safetensors"  # a run's best checkpoint, whose tensors' names begin with BEST_PREFIX
BEST_PREFIX = "model."
CONFIG_SCHEMA = {
    "class": str,
    "version": int,
    "dtype": str,
    "quantization?": str,
    "arguments": dict,
}
INT8, SCALE = "int8", ".scale"
PACKAGED = Path(__file__).parents[1] / "pretrained"  # a folder for each model of the package
FLOATS = {str(t).removeprefix("torch."): t for t in DTYPES.values() if t.is_floating_point}
CARD = """---
library_name: fastvae
pipeline_tag: text-generation
tags: [vae, text-vae]
---

# {repo_id}

A variational autoencoder for text, made with fastvae:

```python
import fastvae

model = fastvae.{name}.from_pretrained("{repo_id}")
```

`fastvae.load(huggingface_hub.snapshot_download("{repo_id}"))` reads its vocabulary too.
"""


class PretrainedMixin:
    """Saves and loads a model that keeps its constructor's arguments in `self.config`.

    Has the methods of `huggingface_hub.PyTorchModelHubMixin`, but checks more: the class must
    match, and no argument and no tensor may be missing or unknown.
    """

    config: dict[str, Any]
    reading: Reading | None = None  # of the text that it was trained on

    def save_pretrained(
        self,
        folder: str | Path,
        vocabulary: Vocabulary | None = None,
        *,
        quantization: str | None = None,
    ) -> None:
        """Save the model to a folder: config.json, model.safetensors, vocabulary.json, text.json.

        vocabulary.json is written if a vocabulary is given. text.json is written if `reading` is
        set; it records how the training text was read. Where they are not written, those of a model
        with the same config stay.

        Args:
            folder: where to save; created if missing, existing files are replaced.
            vocabulary: the vocabulary of the model's ids, or None.
            quantization: "int8" rounds matrices to 8 bits, with a scale for each row: a quarter of
                the bytes of float32. Loading multiplies them out again.

        Raises:
            ValueError: the vocabulary has another size than the model, the model mixes dtypes, a
                model made from its config has other tensors or shapes (parametrizations, pruning),
                a tensor is of a subclass (sharded, quantized), `quantization` is unknown, a matrix
                to quantize is not finite, or the folder has a file of another model that would not
                be replaced.
            OSError: a file cannot be written.

        Warns:
            UserWarning: a setting was changed that config.json does not hold.
        """
        if quantization not in (None, INT8):
            raise ValueError(f'quantization must be None or "{INT8}", got {quantization!r}')
        folder, tensors = Path(folder), self.state_dict()
        dtypes = {t.dtype for t in tensors.values() if t.is_floating_point()}
        if len(dtypes) != 1:
            raise ValueError(
                f"the model mixes dtypes {sorted(map(str, dtypes))}: convert it to one"
            )
        if vocabulary is not None:
            _check_vocabulary(vocabulary, self.config, "the vocabulary")
        _check_loadable(self, tensors)
        if quantization:
            tensors = _quantize(tensors)
        config = {
            "class": type(self).__name__,
            "version": FORMAT,
            "dtype": str(dtypes.pop()).removeprefix("torch."),
            **({"quantization": quantization} if quantization else {}),
            "arguments": self.config,
        }
        make_folder(folder)
        _check_left(folder, config, {VOCABULARY: vocabulary, READING: self.reading})
        if vocabulary is not None:
            write_json(folder / VOCABULARY, vocabulary.to_dict())
        write_json(folder / CONFIG, config)
        if self.reading is not None:
            save_reading(folder, self.reading)
        write_tensors(folder / WEIGHTS, tensors, {"format": "pt", **signatures(folder)})

    @classmethod
    def from_pretrained(cls, source: str | Path, **hub: Any) -> Self:
        """Load a model of this class: folder or Hub id -> the model in eval mode.

        Args:
            source: a folder, or the id of a model on the Hugging Face Hub.
            hub: keyword arguments of `huggingface_hub.hf_hub_download`, such as `revision` and
                `token`.

        Returns:
            the model, on torch's default device. `fastvae.load` returns the vocabulary too.

        Raises:
            FileNotFoundError: `source` is neither a folder with these files nor a model on the Hub.
            ValueError: a file is damaged, or holds another class, other arguments or other tensors.
        """
        path = _find(source, CONFIG, hub)
        config = _read_config(path)
        if config["class"] != cls.__name__:
            raise ValueError(f"{source} holds a {config['class']}, not a {cls.__name__}")
        weights = _find(source, WEIGHTS, hub)
        model = _build(cls, config, weights)
        check_signature(path, config, weights)
        try:
            path = _find(source, READING, hub)
        except FileNotFoundError:
            check_signature(weights.parent / READING, None, weights)
        else:
            model.reading = load_reading(path.parent)
            check_signature(path, read_json(path), weights)
        return model

    def push_to_hub(
        self,
        repo_id: str,
        vocabulary: Vocabulary | None = None,
        *,
        private: bool | None = None,
        token: str | None = None,
        branch: str | None = None,
        commit_message: str = "Upload fastvae model",
    ) -> str:
        """Upload the files of `save_pretrained` and a model card -> address of the commit.

        Args:
            repo_id: the Hub repository, "owner/name"; created if missing.
            vocabulary: the vocabulary of the model's ids, or None.
            private: whether a new repository is private; None is the account's default.
            token: access token of the Hub; None is the one that is stored or in the environment.
            branch: branch to upload to; None is the main one.
            commit_message: first line of the commit.

        Returns:
            what `huggingface_hub.HfApi.upload_folder` returns: the address of the commit.

        Raises:
            ValueError: as in `save_pretrained`; the repository is not created then.
        """
        from huggingface_hub import HfApi  # here, or importing fastvae would take twice as long

        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, vocabulary)  # first: it refuses what could not be loaded
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            card = CARD.format(repo_id=repo_id, name=type(self).__name__)
            (Path(folder) / "README.md").write_text(card, encoding="utf-8")
            return api.upload_folder(
                repo_id=repo_id, folder_path=folder, revision=branch, commit_message=commit_message
            )


def find_folder(source: str | Path) -> Path:
    """A folder, or the name of a packaged model where no such folder is -> the folder."""
    folder = Path(source)
    packaged = PACKAGED / folder.name
    is_name = str(source) == folder.name and not folder.exists()
    return packaged if is_name and packaged.is_dir() else folder


def packaged_models() -> list[str]:
    """Names of the models that the package brings."""
    return sorted(path.parent.name for path in PACKAGED.glob(f"*/{CONFIG}"))


def signatures(folder: Path) -> dict[str, str]:
    """Folder of a saved model -> digest of each of its JSON files, for the metadata of weights."""
    there = (folder / name for name in (CONFIG, VOCABULARY, READING))
    return {path.name: digest_json(read_json(path)) for path in there if path.exists()}


def load_as(classes: dict[str, type], folder: str | Path, best: bool) -> tuple[Any, Any]:
    """Implementation of `fastvae.load` -> model, vocabulary or None.

    Args:
        classes: model classes by the name that config.json gives.
        folder: as in `fastvae.load`.
        best: as in `fastvae.load`.

    Raises:
        FileNotFoundError: the folder, its config.json or its weights do not exist.
        ValueError: a file is damaged or does not match the others; the message names it.
    """
    folder = find_folder(folder)
    check_utf8(folder)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"{folder} is not a folder, nor a packaged model ({', '.join(packaged_models())}); for "
            "a model on the Hub, pass what huggingface_hub.snapshot_download returns"
        )
    config = _read_config(_find(folder, CONFIG, {}))
    if config["class"] not in classes:
        hint = suggestion(str(config["class"]), classes)
        raise ValueError(f"{folder / CONFIG}: unknown class {config['class']!r}: {hint}")
    cls = classes[config["class"]]
    weights, prefix = (BEST, BEST_PREFIX) if best else (WEIGHTS, "")
    model, vocabulary = _build(cls, config, _find(folder, weights, {}), prefix), None
    contents = {CONFIG: config}
    if (folder / VOCABULARY).exists():
        vocabulary = Vocabulary.load(folder / VOCABULARY)
        _check_vocabulary(vocabulary, model.config, folder / VOCABULARY)
        contents[VOCABULARY] = vocabulary.to_dict()
    model.reading = load_reading(folder)
    contents[READING] = None if model.reading is None else read_json(folder / READING)
    # Last: an error of what does not fit says more.
    for path in {folder / weights, folder / WEIGHTS}:
        for name, content in contents.items() if path.exists() else ():
            check_signature(folder / name, content, path)
    return model, vocabulary


def _check_vocabulary(vocabulary, config: dict[str, Any], name: Any) -> None:
    """Raise ValueError unless the vocabulary has the model's size."""
    if vocabulary.size != config["vocab_size"]:
        raise ValueError(
            f"{name} has {vocabulary.size} tokens, the model {config['vocab_size']}: "
            "they do not belong together"
        )


def _check_left(folder: Path, config: dict[str, Any], written: dict[str, Any]) -> None:
    """Raise ValueError if a file of another model in the folder would count as this one's."""
    if not (folder / CONFIG).exists():
        return

    def key(content: Any) -> list:
        return [content.get("class"), content.get("arguments")]

    try:
        same = key(read_json(folder / CONFIG, dict)) == key(json.loads(json.dumps(config)))
    except ValueError:  # a damaged file, which is replaced
        same = False
    for name, value in written.items():
        if value is None and not same and (folder / name).exists():
            raise ValueError(
                f"{folder / name} belongs to another model: remove it, or choose another folder"
            )


def _check_loadable(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Raise ValueError if a model of the same config has other tensors; warn of other settings.

    Nothing is known of a class whose constructor takes other arguments than its config holds.
    """
    for name, t in tensors.items():
        if type(t) is not Tensor:
            raise ValueError(
                f"{name} is a {type(t).__name__}: save a model of plain tensors; of a sharded one, "
                "torch.distributed.checkpoint.state_dict.get_model_state_dict gathers them"
            )
    cls = type(model)
    if _arguments_of(cls) != model.config.keys():
        return
    try:
        with torch.device("meta"):
            fresh = cls(**model.config)
    except Exception as error:  # whatever a constructor says
        raise ValueError(
            f"{cls.__name__} cannot be made from its config, and a saved model not be loaded: "
            f"{first_line(error)}"
        ) from error
    expected = fresh.state_dict()
    for name in sorted(expected.keys() ^ tensors.keys()):
        problem = "has a tensor" if name in tensors else "lacks the tensor"
        raise ValueError(
            f"the model {problem} {name!r}, unlike a {cls.__name__} of its config: it could not be "
            f"loaded{_advice(model, name)}"
        )
    for name, t in tensors.items():
        if t.shape != expected[name].shape:
            raise ValueError(
                f"{name} must have shape {list(expected[name].shape)} to be loaded, "
                f"got {list(t.shape)}"
            )
    modules = dict(model.named_modules())
    for name, other in fresh.named_modules():
        found, loaded = _settings(modules.get(name, other)), _settings(other)
        for key in found.keys() & loaded.keys():
            if found[key] != loaded[key]:
                hint = f"; set model.config[{key!r}] to save it" if key in model.config else ""
                warnings.warn(
                    f"{name + '.' if name else ''}{key} is {found[key]!r}, which is not saved: a "
                    f"loaded model has {loaded[key]!r}{hint}",
                    stacklevel=3,
                )


def _advice(model: nn.Module, name: str) -> str:
    """What to do about a tensor of this name, where that is known."""
    if "_orig_mod." in name:
        return ": use module.compile() instead of torch.compile(module)"
    if any(parametrize.is_parametrized(module) for module in model.modules()):
        return ": call torch.nn.utils.parametrize.remove_parametrizations first"
    if any(key.endswith("_orig") for key in model.state_dict()):
        return ": call torch.nn.utils.prune.remove first"
    return ""


def _settings(module: nn.Module) -> dict[str, Any]:
    """A module's plain attributes but for its mode."""
    kinds = bool | int | float | str | None

    def is_plain(value: Any) -> bool:
        parts = value if isinstance(value, tuple) else (value,)
        return all(isinstance(part, kinds) for part in parts)

    return {
        k: v for k, v in vars(module).items() if k[0] != "_" and k != "training" and is_plain(v)
    }


def _arguments_of(cls: type) -> set[str]:
    """The arguments of a model's constructor that its config keeps."""
    return inspect.signature(cls.__init__).parameters.keys() - {"self", "device", "dtype"}


def _find(source: str | Path, name: str, hub: dict[str, Any]) -> Path:
    """The path of a file of a saved model, downloaded from the Hub if `source` is no folder."""
    if Path(source).is_dir():
        if not (Path(source) / name).is_file():
            raise FileNotFoundError(f"{source} holds no {name}")
        return Path(source) / name
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(str(source), name, **hub))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{source} is neither a folder here nor a model on the Hub: {first_line(error)}"
        ) from error


def _read_config(path: Path) -> dict[str, Any]:
    """Read config.json and check its version and dtype."""
    config = read_json(path, CONFIG_SCHEMA)
    if config["version"] != FORMAT:
        raise ValueError(f"{path} has version {config['version']}, this fastvae reads {FORMAT}")
    if config["dtype"] not in FLOATS:
        raise ValueError(f"{path}: unknown dtype {config['dtype']!r}")
    if config.get("quantization", INT8) != INT8:
        raise ValueError(f"{path}: unknown quantization {config['quantization']!r}")
    return config


def _build(cls: type, config: dict[str, Any], weights: Path, prefix: str = "") -> Any:
    """Build the model and load its weights, after `_trial` has shown that sizes match the file."""
    arguments = {
        name: tuple(v) if isinstance(v, list) else v for name, v in config["arguments"].items()
    }
    known = _arguments_of(cls)
    for name in sorted(known ^ arguments.keys()):
        problem = "lacks the argument" if name in known else "has an unknown argument"
        raise ValueError(f"{weights.parent / CONFIG} {problem} {name!r} of {cls.__name__}")
    dtype, int8 = FLOATS[config["dtype"]], config.get("quantization") == INT8
    with open_tensors(weights) as file:
        itemsize = 1 if int8 else dtype.itemsize
        trial = _trial(cls, arguments, dtype, itemsize, weights).state_dict()
        expected = _quantize(trial) if int8 else trial
        check_tensors(weights, file, {prefix + name: t for name, t in expected.items()}, prefix)
        tensors, _ = read_tensors(weights, file)
    if int8:
        tensors = _dequantize(tensors, dtype)
    # Reading a file must not move the caller's generator.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        model = cls(**arguments).to(dtype)
        model.load_state_dict({name: tensors[prefix + name] for name in trial})
    default = torch.get_default_device()
    return model.to("cpu" if default.type == "meta" else default).eval()


def _quantize(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A state dict -> the same with matrices [N, ...] as int8, and their scales [N]."""
    found = {}
    for name, t in tensors.items():
        if t.dim() < 2 or not t.is_floating_point():
            found[name] = t
        elif t.is_meta:
            found[name] = torch.empty_like(t, dtype=torch.int8)
            found[name + SCALE] = t.new_empty(len(t), dtype=accumulate_dtype(t.dtype))
        elif not t.isfinite().all():
            raise ValueError(f"{name} is not finite: it cannot be rounded to 8 bits")
        else:
            q, scale = round_rows(t.flatten(1))
            found[name] = q.to(torch.int8).view_as(t)
            found[name + SCALE] = scale.flatten()
    return found


def _dequantize(tensors: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What `_quantize` gave -> a state dict."""
    found = {}
    for name, t in tensors.items():
        if (scale := tensors.get(name + SCALE)) is not None:
            t = (t.to(scale.dtype) * scale.view(-1, *[1] * (t.dim() - 1))).to(dtype)
        if not name.endswith(SCALE):
            found[name] = t
    return found


def _trial(
    cls: type, arguments: dict[str, Any], dtype: torch.dtype, itemsize: int, weights: Path
) -> nn.Module:
    """Build the model on the meta device; raise ValueError if it needs more bytes than its file.

    `itemsize` is that of a weight in the file.
    """
    room = size = weights.stat().st_size

    def count(module, name, parameter):
        nonlocal room
        room -= parameter.numel() * itemsize if parameter is not None else 0
        if room < 0:
            raise ValueError(f"it needs more bytes than the {size:,} there")

    hook = register_module_parameter_registration_hook(count)
    try:
        with torch.device("meta"):
            return cls(**arguments).to(dtype)
    except Exception as error:  # whatever a constructor says to arguments that make no sense
        raise ValueError(
            f"{weights.parent / CONFIG} does not fit {weights.name}: {first_line(error)}"
        ) from error
    finally:
        hook.remove()
