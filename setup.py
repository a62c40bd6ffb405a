"""The one thing pyproject.toml cannot say: how csrc/ becomes fastvae._C."""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from functools import partial
from glob import glob
from pathlib import Path
from typing import NamedTuple

# Stable ABI of torch 2.10: built against one torch, runs under every later one.
FLAGS = ["-O3", "-std=c++20", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
# Machine code for two kinds of GPU, and what the driver compiles for all later ones.
GPUS = [
    "-gencode=arch=compute_80,code=sm_80",
    "-gencode=arch=compute_90a,code=sm_90a",
    "-gencode=arch=compute_90,code=compute_90",
]
NVCC_FLAGS = [*FLAGS, "-DUSE_CUDA", *GPUS]
# Nothing of torch's CUDA libraries by name, and CUDA's own runtime inside: what is built beside a
# torch for CUDA is imported beside every other. libtorch.so brings them where they are.
CUDA_LINK = ["-lcudart_static", "-ldl", "-lrt", "-lpthread", "-Wl,--no-as-needed", "-ltorch"]


class Nvcc(NamedTuple):
    version: str
    libraries: list[str]  # where they are
    complaint: str  # if it cannot compile for our GPUs, with the C++ compiler that is here


def find_nvcc(cuda_home: str | None) -> Nvcc | None:
    """The nvcc that torch would call."""
    nvcc = os.path.join(cuda_home or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        return None
    run = partial(subprocess.run, capture_output=True, text=True)
    release = re.search(r"release (\d+\.\d+)", run([nvcc, "--version"]).stdout)
    with tempfile.TemporaryDirectory() as folder:
        empty = Path(folder, "empty.cu")
        empty.touch()
        trial = run([nvcc, *NVCC_FLAGS, "--verbose", "-c", empty, "-o", empty.with_suffix(".o")])
    libraries = re.findall(r'"-L([^"]+)"', trial.stderr)
    said = [line for line in trial.stderr.splitlines() if not line.startswith("#$ ")]
    complaint = (said or [f"exit status {trial.returncode}"])[0] if trial.returncode else ""
    return Nvcc(release[1] if release else "?", list(dict.fromkeys(libraries)), complaint)


def why_not_cuda(torch_cuda: str | None, torch_hip: str | None, nvcc: Nvcc | None) -> str | None:
    """Why csrc/cuda/ is left out, given the versions that torch is for; None: it is built."""
    if torch_hip:
        return f"this torch is for ROCm {torch_hip}"
    if not torch_cuda:
        return "this torch is for CPUs alone"
    if not nvcc:
        return f"found no nvcc of CUDA {torch_cuda}, which this torch is for"
    if nvcc.version.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc.version}, but this torch is for CUDA {torch_cuda}"
    if nvcc.complaint:
        return f"nvcc of CUDA {nvcc.version} does not compile here: {nvcc.complaint}"
    return None


def main() -> None:
    import pybind11
    import torch
    from setuptools import setup
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

    commands = {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel", "install"}
    building = commands & set(sys.argv)
    compiler = os.environ.get("CXX", "c++").split()[0]
    if building and not shutil.which(compiler):
        sys.exit(
            f"fastvae needs a C++20 compiler and found no `{compiler}`: install one "
            "(Debian and Ubuntu: apt install g++) or name yours in CXX."
        )

    nvcc = find_nvcc(CUDA_HOME) if building and torch.version.cuda else None
    reason = why_not_cuda(torch.version.cuda, torch.version.hip, nvcc)
    if reason and building:
        print(f"fastvae is built without its CUDA C++ kernels: {reason}.", file=sys.stderr)
    native = CppExtension(
        "fastvae._C",
        sorted(glob("csrc/**/*.cpp", recursive=True) + ([] if reason else glob("csrc/cuda/*.cu"))),
        depends=[*glob("csrc/**/*.h", recursive=True), *glob("csrc/cuda/*.cuh")],
        include_dirs=[pybind11.get_include()],
        library_dirs=[] if reason else nvcc.libraries,
        extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS},
        extra_link_args=["-lgomp", *([] if reason else CUDA_LINK)],
    )
    setup(ext_modules=[native], cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    main()
