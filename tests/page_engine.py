"""The page's engine outside a browser: the module under wasmtime, and its source natively."""

import ctypes
import shutil
import subprocess
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "csrc" / "wasm"


class Engine:
    """What both have: arrays in, arrays out."""

    def __init__(self, file: bytes, capacity: int = 16):
        header = np.frombuffer(file[:28], np.int32)
        self.length, self.latent, self.capacity = int(header[5]), int(header[6]), capacity
        self.status = self.load(file, capacity)

    def encode(self, tokens) -> tuple[np.ndarray, np.ndarray]:
        """tokens [N, L] -> mean, log-variance [N, Z]."""
        tokens = np.ascontiguousarray(tokens, np.int32)
        return self._encode(tokens)

    def decode(self, z, temperature=0.0, seeds=None, forced=None, steps=None) -> np.ndarray:
        """z [N, Z] -> tokens [N, L], so many steps a call."""
        z = np.ascontiguousarray(z, np.float32)
        seeds = np.zeros(len(z), np.int64) if seeds is None else np.asarray(seeds, np.int64)
        out = []
        for start in range(0, len(z), self.capacity):
            part = slice(start, start + self.capacity)
            forced_part = None if forced is None else np.ascontiguousarray(forced[part], np.int32)
            out.append(
                self._decode(z[part], temperature, seeds[part], forced_part, steps or self.length)
            )
        return np.concatenate(out)


class WasmEngine(Engine):
    """The committed engine.wasm."""

    path = ROOT / "fastvae" / "page" / "engine.wasm"

    def load(self, file, capacity):
        wasmtime, module = _compiled()
        self.store = wasmtime.Store(module.engine)
        exports = wasmtime.Instance(self.store, module.module, []).exports(self.store)
        self.exports, self.memory = exports, exports["memory"]
        return self.call("load", self.place(np.frombuffer(file, np.uint8)), len(file), capacity)

    def call(self, name, *arguments):
        return self.exports[f"engine_{name}"](self.store, *arguments)

    def place(self, array):
        """Copy an array into the engine's memory -> its address; 0 for None."""
        if array is None:
            return 0
        address = self.call("alloc", array.nbytes)
        self.memory.write(self.store, array.tobytes(), address)
        return address

    def read(self, address, dtype, shape):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        data = self.memory.read(self.store, address, address + size)
        return np.frombuffer(bytes(data), dtype).reshape(shape)

    def _encode(self, tokens):
        shape = len(tokens), self.latent
        out = [self.place(np.zeros(shape, np.float32)) for _ in range(2)]
        self.call("encode", self.place(tokens), len(tokens), *out)
        return tuple(self.read(address, np.float32, shape) for address in out)

    def _decode(self, z, temperature, seeds, forced, steps):
        arrays = self.place(z), len(z), temperature, self.place(seeds), self.place(forced)
        self.call("begin", *arrays)
        while self.call("step", steps):
            pass
        return self.read(self.call("tokens"), np.int32, (len(z), self.length))


class NativeEngine(Engine):
    """The same source, compiled for this machine without fused multiply-add."""

    library = None

    @classmethod
    def build(cls, folder: Path):
        cls.library = folder / "engine.so"
        cls.compile(SOURCE / "engine.c", cls.library)

    @staticmethod
    def compile(source: Path, library: Path, *flags: str):
        compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
        if compiler is None:
            pytest.skip("no C compiler")
        flags = ["-O2", "-std=c11", "-ffp-contract=off", "-shared", "-fPIC", "-Wno-psabi", *flags]
        subprocess.run([compiler, *flags, source, "-o", library], check=True)

    def load(self, file, capacity):
        # A copy for each engine: the library holds one model.
        copy = self.library.with_name(f"engine-{id(self)}.so")
        shutil.copy(self.library, copy)
        self.c = ctypes.CDLL(str(copy))
        copy.unlink()
        self.c.engine_tokens.restype = ctypes.POINTER(ctypes.c_int32)
        self.file = ctypes.create_string_buffer(file, len(file))
        return self.c.engine_load(self.file, len(file), capacity)

    def _encode(self, tokens):
        mean, logvar = (np.zeros((len(tokens), self.latent), np.float32) for _ in range(2))
        self.c.engine_encode(_at(tokens), len(tokens), _at(mean), _at(logvar))
        return mean, logvar

    def _decode(self, z, temperature, seeds, forced, steps):
        arrays = _at(z), len(z), ctypes.c_float(temperature), _at(seeds), _at(forced)
        self.c.engine_begin(*arrays)
        while self.c.engine_step(steps):
            pass
        found = np.ctypeslib.as_array(self.c.engine_tokens(), (len(z), self.length))
        return found.copy()


@cache
def _compiled():
    """wasmtime, and the module with the engine it was compiled for."""
    wasmtime = pytest.importorskip("wasmtime")
    engine = wasmtime.Engine()
    return wasmtime, SimpleNamespace(
        engine=engine, module=wasmtime.Module.from_file(engine, str(WasmEngine.path))
    )


def _at(array):
    return None if array is None else array.ctypes.data_as(ctypes.c_void_p)
