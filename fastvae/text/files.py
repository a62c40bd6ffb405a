"""Reads text files and streams; keeps what was read in a cache and memory-maps it from there."""

import codecs
import gzip
import hashlib
import io
import json
import mmap
import os
import re
import shutil
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

import numpy as np

from fastvae.atomic_files import writing

try:
    import fcntl
except ImportError:  # Windows: folders of killed builds stay
    fcntl = None

CHUNK = 1 << 20  # bytes read at once
HEAD = 1 << 12  # bytes read to recognize a format
FORMAT = 5  # of the cache's files: part of every key
LONGEST_STEM = 128  # bytes of the source's name in those of the cache's files
LARGEST_NOTES = 1 << 24  # bytes: a vocabulary of every character there is fits
PARTIAL = "fastvae-partial-"  # folders of files that are being written begin with it
RESIDENT = 128 << 20  # bytes of a mapped file that may stay in this process's memory
ROWS_AT_ONCE = 64  # from a larger file: a page fault may map as much as 2 MiB around a row

GZIP = rb"\x1f\x8b\x08[\0-\x1f].{6}"
_UNPACK, _EXPORT, _CONVERT = "unpack it first", "export its text first", "convert it to UTF-8 first"
# First bytes of files that are not text, what the file is, and what the user can do.
_FORMATS = [
    (re.compile(begin, re.DOTALL), what, advice)
    for begin, what, advice in (
        (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _CONVERT),
        # A mark alone may begin a line of Latin-1; without a mark, every other byte is zero.
        (rb"(?:\xff\xfe|\xfe\xff).*\0|(?:[^\0]\0){4}|(?:\0[^\0]){4}", "UTF-16 text", _CONVERT),
        (GZIP, "a gzip file", _UNPACK),
        (rb"\xfd7zXZ\0", "an xz file", _UNPACK),
        (rb"\]\0\0..\xff{8}", "an LZMA file", _UNPACK),
        (rb"LZIP[\x00\x01]", "an lzip file", _UNPACK),
        (rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)", "a bzip2 file", _UNPACK),
        (rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18", "a Zstandard file", _UNPACK),
        (rb"\x04\x22\x4d\x18", "an LZ4 file", _UNPACK),
        (rb"\xff\x06\0\0sNaPpY", "a Snappy file", _UNPACK),
        (rb"\x1f\x9d[\x89-\x90]", "a file packed by compress", _UNPACK),
        (rb"PK(?:\x03\x04|\x05\x06|\x07\x08)", "a zip file", _UNPACK),
        (rb"7z\xbc\xaf\x27\x1c", "a 7z file", _UNPACK),
        (rb"Rar!\x1a\x07", "a RAR file", _UNPACK),
        (rb"PAR1\x15", "a Parquet file", _EXPORT),
        (rb"ARROW1\0\0", "an Arrow file", _EXPORT),
        (rb"Obj\x01", "an Avro file", _EXPORT),
        (rb"\x89HDF\r\n\x1a\n", "an HDF5 file", _EXPORT),
        (rb"SQLite format 3\0", "an SQLite file", _EXPORT),
        (rb"\x93NUMPY", "a NumPy file", _EXPORT),
        (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an Office file", _EXPORT),
        (rb"%PDF-\d", "a PDF file", _EXPORT),
    )
]


def check_exists(path: Path) -> None:
    """Raise FileNotFoundError or ValueError unless the path is a regular file."""
    if not path.exists():
        raise FileNotFoundError(f"no such file: {path}")
    if not path.is_file():
        pipe = ": pipe it in with --data -" if path.is_fifo() or path.is_char_device() else ""
        raise ValueError(f"{path} is not a regular file{pipe}")


def byte_chunks(path: Path) -> Iterator[bytes]:
    """File -> its bytes without a byte-order mark, a MiB at a time; gzip is unpacked.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, a damaged gzip file, or of a known format that is not
            text.
    """
    return _without_mark(_file_chunks(path))


def stream_chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Open file -> its bytes as from `byte_chunks`.

    Args:
        file: a buffered binary stream; it stays open.
        name: its name, for error messages.

    Raises:
        ValueError: it is a damaged gzip file, or of a known format that is not text.
    """
    return _without_mark(_raw_chunks(file, name))


def text_chunks(path: Path) -> Iterator[str]:
    """File -> its characters, a chunk at a time, line ends unchanged; gzip is unpacked.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not UTF-8 (the message names the first bad byte), or as in `byte_chunks`.
    """
    offset, pending = 0, b""
    for chunk in chain(_file_chunks(path), [b""]):  # after the last, b"", nothing may be pending
        data = pending + chunk
        if not offset and data.startswith(codecs.BOM_UTF8):
            offset, data = len(codecs.BOM_UTF8), data.removeprefix(codecs.BOM_UTF8)
        try:
            text, used = codecs.utf_8_decode(data, "strict", not chunk)
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path} is not UTF-8 at byte {offset + error.start} ({error.reason}): "
                "convert it, or read it as bytes"
            ) from None
        offset, pending = offset + used, data[used:]
        if text:
            yield text


def lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Chunks of bytes -> lines without their ends (\\n, \\r\\n or \\r), cut after a MiB."""
    rest = b""
    for chunk in chunks:
        content = rest + chunk
        whole, rest = content.splitlines(), b""
        if not content.endswith(b"\n"):  # a final \r may be a half of \r\n
            rest = whole.pop()[:CHUNK] + (b"\r" if content.endswith(b"\r") else b"")
        yield from (line[:CHUNK] for line in whole)
    if rest:
        yield rest.removesuffix(b"\r")


def _file_chunks(path: Path) -> Iterator[bytes]:
    """File -> chunks of its text, unpacked."""
    check_exists(path)
    with open(path, "rb") as file:
        yield from _raw_chunks(file, str(path), packed=path.suffix.lower() == ".gz")


def _raw_chunks(file: BinaryIO, name: str, packed: bool = False) -> Iterator[bytes]:
    """Stream -> chunks of its text, unpacked if `packed` or if it begins like a gzip file."""
    head = _read(file, HEAD, name)
    whole = _Rest(head, file)
    if packed or re.match(GZIP, head, re.DOTALL):
        yield from _unpacked_chunks(whole, name)
    else:
        yield from _checked_chunks(whole, name)


def _unpacked_chunks(packed: BinaryIO, name: str) -> Iterator[bytes]:
    """Gzip stream -> chunks of its unpacked text; raises ValueError if it is damaged."""
    try:
        with gzip.GzipFile(fileobj=packed) as file:
            yield from _checked_chunks(file, f"{name}, unpacked,")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{name} is a damaged gzip file: {error}") from error


def _checked_chunks(file: BinaryIO, name: str) -> Iterator[bytes]:
    """Stream -> chunks; raises ValueError if it begins like a known format that is not text."""
    chunk = _read(file, CHUNK, name)
    for begin, what, advice in _FORMATS:
        if begin.match(chunk, 0, HEAD):
            raise ValueError(f"{name} is {what}, not text in UTF-8: {advice}")
    with suppress(tarfile.HeaderError):  # its checksum tells a header of any kind of tar
        tarfile.TarInfo.frombuf(chunk[: tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
        raise ValueError(f"{name} is a tar file, not text in UTF-8: {_UNPACK}")
    while chunk:
        yield chunk
        chunk = _read(file, CHUNK, name)


def _read(file: BinaryIO, size: int, name: str) -> bytes:
    """The next bytes of a stream, less than `size` at its end only; OSErrors name it.

    `file.read` would not look at signals between the parts of a pipe, and could wait for ever.
    """
    found = bytearray()
    try:
        while len(found) < size and (part := file.read1(size - len(found))):
            found += part
    except OSError as error:
        if error.errno is None:  # of gzip
            raise
        raise OSError(error.errno, error.strerror, name) from error
    return bytes(found)


class _Rest(io.RawIOBase):
    """A stream from its beginning, of which `head` was read already; closing it does nothing."""

    def __init__(self, head: bytes, file: BinaryIO) -> None:
        self._head, self._file = head, file

    def readable(self) -> bool:
        return True

    def read1(self, size: int) -> bytes:
        if not self._head:
            return self._file.read1(size)
        part, self._head = self._head[:size], self._head[size:]
        return part

    def readinto(self, buffer: memoryview) -> int:
        part = self.read1(len(buffer))
        buffer[: len(part)] = part
        return len(part)


def _without_mark(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Chunks -> the same without a byte-order mark at the beginning."""
    if first := next(chunks, b"").removeprefix(codecs.BOM_UTF8):
        yield first
    yield from chunks


@contextmanager
def unchanged(path: Path) -> Iterator[None]:
    """Raise ValueError at the end if the file is another one than at the beginning."""
    check_exists(path)
    before = path.stat()
    yield
    after = path.stat()
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise ValueError(f"{path} changed while it was read: start again when it is complete")


def stored(
    path: Path, cache: Path, settings: dict, write: Callable[[Path], dict]
) -> tuple[Callable[[str], Path], dict]:
    """Build files from a source with `write`, or reuse those in the cache.

    Files are reused while the source (path, size, modification time) and the settings stay the
    same, unless a digest shows damage. Several processes may do this at once: each file appears
    whole, the notes last, and all processes write the same bytes. Only the user may read the files,
    because they hold the text.

    Args:
        path: the source file.
        cache: directory of the cached files; created if missing.
        settings: JSON values that the result depends on, besides the source.
        write: folder -> notes, JSON values; puts files into the folder.

    Returns:
        a function, file name -> path in the cache, and the notes.

    Raises:
        FileNotFoundError: the source does not exist.
        ValueError: the source is not a regular file.
    """
    check_exists(path)
    status = path.stat()
    source = [str(path.resolve()), status.st_size, status.st_mtime_ns]
    key = json.dumps([FORMAT, source, settings], sort_keys=True)
    name = os.fsencode(path.name)[:LONGEST_STEM].decode(errors="ignore")
    stem = f"{name}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"

    def locate(name: str) -> Path:
        return cache / f"{stem}.{name}"

    notes = _read_notes(locate)
    if notes is None:
        cache.mkdir(parents=True, exist_ok=True)
        with _partial_folder(cache) as folder:
            with unchanged(path), writing(cache):
                notes = write(folder)
            digests = {file.name: file_digest(file) for file in folder.iterdir()}
            content = json.dumps({"notes": notes, "digests": digests})
            with writing(cache):
                (folder / "json").write_text(f"{_digest(content)}\n{content}", encoding="ascii")
            for name in (*digests, "json"):
                (folder / name).chmod(0o600)
                os.replace(folder / name, locate(name))
    return locate, notes


def _read_notes(locate: Callable[[str], Path]) -> dict | None:
    """The notes in the cache; None if they or a file that they name are missing or damaged."""
    try:
        with open(locate("json"), encoding="ascii") as file:
            digest, _, content = file.read(LARGEST_NOTES).partition("\n")
        if digest != _digest(content):
            return None
        found = json.loads(content)
        whole = all(file_digest(locate(n)) == d for n, d in found["digests"].items())
    except (OSError, ValueError):
        return None
    return found["notes"] if whole else None


def _digest(text: str) -> str:
    """Text -> hex digest."""
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def file_digest(path: Path) -> str:
    """File -> hex digest."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


@contextmanager
def _partial_folder(cache: Path) -> Iterator[Path]:
    """An empty folder in the cache, removed in the end; removes those of killed builds first.

    A lock on each such folder, which the system releases at any exit, shows those still in use.
    """
    with ExitStack() as stack:
        with _locked(cache):
            for left in cache.glob(f"{PARTIAL}*"):
                with _locked(left, wait=False) as unused:
                    if unused:
                        shutil.rmtree(left, ignore_errors=True)
            folder = Path(stack.enter_context(TemporaryDirectory(prefix=PARTIAL, dir=cache)))
            stack.enter_context(_locked(folder))
        yield folder


@contextmanager
def _locked(folder: Path, wait: bool = True) -> Iterator[bool]:
    """Lock a folder; yields False if another process holds it or locks do not work."""
    with ExitStack() as stack:
        held = False
        if fcntl is not None:
            with suppress(OSError):
                handle = os.open(folder, os.O_RDONLY)
                stack.callback(os.close, handle)
                fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                held = True
        yield held


class MappedArray:
    """A file of numbers, read by index arrays [n, ...] with bounded memory.

    The pages of a large file are released after every few rows; otherwise random reads would in
    time map all of it into this process. They stay in the system's page cache while there is room.
    A pickle or copy holds the path only.

    Args:
        path: the file; it must not be empty.
        dtype: NumPy dtype of its numbers, such as "<i4".
    """

    def __init__(self, path: Path, dtype: str):
        self.path, self.dtype = path, dtype
        with open(path, "rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._values = np.frombuffer(self._map, dtype)
        self._drops = len(self._map) > RESIDENT and hasattr(mmap, "MADV_DONTNEED")

    def __reduce__(self) -> tuple:
        return _mapped_again, (self.path.absolute(), self.dtype, len(self))

    def __len__(self) -> int:
        return len(self._values)

    def __getitem__(self, index: np.ndarray) -> np.ndarray:
        if not self._drops:
            return self._values[index]
        values = np.empty(index.shape, self._values.dtype)
        for i in range(0, len(index), ROWS_AT_ONCE):
            values[i : i + ROWS_AT_ONCE] = self._values[index[i : i + ROWS_AT_ONCE]]
            self._map.madvise(mmap.MADV_DONTNEED)
        return values


def _mapped_again(path: Path, dtype: str, size: int) -> MappedArray:
    """Unpickle an array; raises FileNotFoundError, or ValueError if the file has changed."""
    try:
        array = MappedArray(path, dtype)
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} is gone, which a pickled corpus was read from: "
            "give the corpus a cache folder that stays"
        ) from None
    if len(array) != size:
        raise ValueError(f"{path} has changed since a corpus that reads it was pickled")
    return array
