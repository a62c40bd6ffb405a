"""Files replaced atomically: JSON, and safetensors with a digest of all they hold.

A reader, or a run started after a kill, finds the old file or the new one, never a part of either.
"""

import glob
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "I64": torch.int64,
    "I8": torch.int8,
}

LARGEST = 1 << 24  # bytes of a JSON file or of a header
LONGEST_NAME = 240  # bytes of a file's name before .<thread>.tmp


class DamagedFileError(ValueError):
    """A file whose content is not what was written."""


def write_bytes(path: Path, content: bytes, keep: Path | None = None) -> None:
    """Replace a file atomically; what it replaces becomes `keep` where that is given.

    Raises OSError in one line; the old file is then kept, perhaps as `keep`, and nothing else is
    left behind.
    """
    # Of this thread alone: another writer's file, or a person's, is not touched.
    temporary = path.with_name(f"{_shortened(path)}.{threading.get_native_id()}.tmp")
    with replaced(path, temporary, keep) as file:
        file.write(content)


def remove_temporaries(paths: Iterable[Path]) -> None:
    """Remove what processes that were killed while they wrote these files have left beside them."""
    for path in paths:
        pattern = re.compile(re.escape(_shortened(path)) + r"\.\d+\.tmp")
        for other in path.parent.glob(f"{glob.escape(_shortened(path))}.*.tmp"):
            if pattern.fullmatch(other.name):
                other.unlink(missing_ok=True)


def _shortened(path: Path) -> str:
    return os.fsdecode(os.fsencode(path.name)[:LONGEST_NAME])


@contextmanager
def replaced(path: Path, temporary: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    """A file to write under a temporary name, which replaces `path` at the end, as `write_bytes`.

    OSErrors in the block that name no file are those of writing it. A device or pipe is refused,
    because it would be replaced too.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OSError(f"cannot write {path}: it is not a regular file")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        # A kill between the two renames leaves `keep`, which is whole.
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        if error.errno is None or error.filename not in (None, str(temporary), str(path)):
            raise  # of another file
        kept = "; the file that was there is kept" if path.exists() else ""
        raise OSError(f"cannot write {path}: {error.strerror}{kept}") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """OSErrors in the block that name no file are those of writing `path`, and say so."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename is not None:
            raise
        raise OSError(f"cannot write {path}: {error.strerror}") from error


def write_json(path: Path, content: Any) -> None:
    """Replace a JSON file atomically, unless it is that already. Raises OSError in one line."""
    encoded = (json.dumps(content, indent=2) + "\n").encode()
    if not path.is_file() or path.read_bytes() != encoded:
        write_bytes(path, encoded)


def read_limited(path: Path) -> bytes:
    """A file's bytes, LARGEST at most. Raises ValueError where it has more."""
    with open(path, "rb") as file:
        content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise ValueError(f"{path} is too large: it may have {LARGEST >> 20} MiB")
    return content


def read_json(path: Path, schema: Any = object) -> Any:
    """A JSON file of at most 16 MiB. Raises ValueError where it is none, or not of the schema."""
    return parse_json(read_limited(path), str(path), schema)


def parse_json(content: bytes | str, name: str, schema: Any = object) -> Any:
    """A JSON document; ValueError calls it `name` where it is none, or not of the schema.

    A schema is a type or several; [schema], a list of any length; or {key: schema}, exactly these
    keys, of which those that end in "?" may be missing, and "..." is the schema of all others. A
    whole number is a float too.
    """
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not valid JSON: {first_line(error)}") from error
    _check_schema(value, schema, name, "")
    return value


def _check_schema(value: Any, schema: Any, name: str, place: str) -> None:
    if isinstance(schema, dict) and isinstance(value, dict):
        schemas = {key.removesuffix("?"): kind for key, kind in schema.items()}
        others = schemas.pop("...", None)
        for key in schemas:
            if key not in value and key in schema:
                raise ValueError(f"{name} lacks {place}{key}")
        for key, item in value.items():
            if (kind := schemas.get(key, others)) is None:
                raise ValueError(f"{name} has an unknown key {place}{key}")
            _check_schema(item, kind, name, f"{place}{key}.")
    elif isinstance(schema, list) and isinstance(value, list):
        for n, item in enumerate(value):
            _check_schema(item, schema[0], name, f"{place}{n}.")
    else:
        kinds = {dict: (dict,), list: (list,)}.get(type(schema)) or (
            schema if isinstance(schema, tuple) else (schema,)
        )
        fits = isinstance(value, kinds) or (float in kinds and isinstance(value, int))
        if not fits or (isinstance(value, bool) and not {bool, object} & set(kinds)):
            wanted = " or ".join(_KINDS[kind] for kind in kinds)
            what = place.rstrip(".") or "it"
            raise ValueError(f"{name}: {what} must be {wanted}, got {json.dumps(value)[:40]}")


_KINDS = {
    str: "a string",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    type(None): "null",
}


def digest_json(content: Any) -> str:
    """A digest of what a JSON document says, however it is written."""
    canonical = json.dumps(content, sort_keys=True).encode()
    return hashlib.blake2b(canonical, digest_size=16).hexdigest()


def write_tensors(
    path: Path, tensors: dict[str, Tensor], metadata: dict[str, str], keep: Path | None = None
) -> None:
    """Replace a safetensors file atomically; what it replaces becomes `keep` where that is given.

    The metadata gains a digest of the tensors and of itself. Raises OSError in one line.
    """
    whole: dict[str, Tensor] = {}
    places: set[int] = set()
    for name, tensor in tensors.items():
        t = tensor.detach().cpu().contiguous()
        # The format takes no tensor twice: weights that are tied are written under each name.
        whole[name] = t.clone() if t.data_ptr() in places else t
        places.add(t.data_ptr())
    tensors = whole
    write_bytes(path, save(tensors, {**metadata, "digest": _digest(tensors, metadata)}), keep)


def open_tensors(path: Path):
    """A safetensors file with its header read, no tensor yet. DamagedFileError where it is none."""
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
        if size > LARGEST:
            raise DamagedFileError(f"{path} is damaged (a header of {size:,} bytes)")
        return safe_open(path, framework="pt")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise DamagedFileError(f"{path} is damaged ({first_line(error)})") from error


def check_tensors(path: Path, file, expected: dict[str, Tensor], prefix: str = "") -> None:
    """The header must name exactly the expected tensors under `prefix`, shapes and dtypes included.

    Reads no tensor. Raises ValueError naming the first one that differs.
    """
    names = {name for name in file.keys() if name.startswith(prefix)}  # noqa: SIM118
    for name in sorted(names ^ expected.keys()):
        problem = "holds an unknown tensor" if name in names else "lacks the tensor"
        raise ValueError(f"{path} {problem} {name}: it belongs to another model")
    for name, t in expected.items():
        part = file.get_slice(name)
        shape, dtype = part.get_shape(), DTYPES.get(part.get_dtype(), part.get_dtype())
        if (shape, dtype) != (list(t.shape), t.dtype):
            raise ValueError(
                f"{path}: {name} is {dtype} {shape}, this model has {t.dtype} {list(t.shape)}"
            )


def check_signature(path: Path, content: Any, weights: Path) -> None:
    """The JSON file's content must be the one that `weights` was written with, where it tells.

    None is that of a file that does not exist. Raises DamagedFileError where it is another.
    """
    with open_tensors(weights) as file:
        signature = (file.metadata() or {}).get(path.name)
    if signature is not None and content is None:
        raise DamagedFileError(f"{path} is missing, which {weights.name} was written with")
    if signature is not None and signature != digest_json(content):
        raise DamagedFileError(f"{path} is damaged or not the one that {weights.name} belongs to")


def read_tensors(path: Path, file) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata. Raises DamagedFileError where a digest in it does not match."""
    metadata = dict(file.metadata() or {})
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    signed = {key: value for key, value in metadata.items() if key != "digest"}
    if "digest" in metadata and metadata["digest"] != _digest(tensors, signed):
        raise DamagedFileError(f"{path} is damaged (its digest does not match)")
    return tensors, metadata


def check_utf8(path: Path) -> None:
    """Raise ValueError unless a path's name is text: safetensors and matplotlib take no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise ValueError(f"the name of the folder {str(path)!r} is not UTF-8: rename it") from None


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises OSError in one line."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(f"cannot make the folder {folder}: {error.strerror}") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _sync_folder(folder: Path) -> None:
    # A rename survives a power cut only once its folder is on disk; not every system can do that.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _digest(tensors: dict[str, Tensor], metadata: dict[str, str]) -> str:
    digest = hashlib.blake2b(json.dumps(metadata, sort_keys=True).encode(), digest_size=16)
    for name in sorted(tensors):
        t = tensors[name]
        digest.update(f"{name} {t.dtype} {tuple(t.shape)}".encode())
        digest.update(t.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
