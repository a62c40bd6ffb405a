"""Compile engine.c to WebAssembly with ziglang's clang: the same bytes on every machine.

python csrc/wasm/build.py [fastvae/page/engine.wasm]
"""

import subprocess
import sys
import tempfile
from pathlib import Path

FOLDER = Path(__file__).parent
OUTPUT = FOLDER.parents[1] / "fastvae" / "page" / "engine.wasm"
FLAGS = [
    *("-target", "wasm32-freestanding", "-mcpu=generic+simd128+bulk_memory", "-O3", "-std=c11"),
    *(
        "-ffp-contract=off",
        "-fno-sanitize=all",
        "-g0",
        "-nostdlib",
        "-Wl,--no-entry",
        "-Wl,--strip-all",
    ),
    "-fno-ident",
]


def build(output: Path) -> None:
    """Write the module. Raises ImportError without ziglang, CalledProcessError if it fails."""
    import ziglang

    zig = Path(ziglang.__file__).parent / "zig"
    with tempfile.TemporaryDirectory() as cache:
        command = [zig, "cc", *FLAGS, "engine.c", "-o", output.resolve()]
        environment = {"ZIG_LOCAL_CACHE_DIR": cache, "ZIG_GLOBAL_CACHE_DIR": cache, "PATH": ""}
        subprocess.run(command, cwd=FOLDER, env=environment, check=True)


if __name__ == "__main__":
    build(Path(sys.argv[1]) if len(sys.argv) > 1 else OUTPUT)
