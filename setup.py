"""The one thing pyproject.toml cannot say: how csrc/ becomes fastvae._C."""

import os
import re
import shutil
import subprocess
import sys
from glob import glob

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


def why_not_cuda(torch_cuda: str | None, torch_hip: str | None, nvcc: str | None) -> str | None:
    """Why csrc/cuda/ is left out, from versions, None where there is none; None: it is built."""
    if torch_hip:
        return f"this torch is for ROCm {torch_hip}"
    if not torch_cuda:
        return "this torch is for CPUs alone"
    if not nvcc:
        return f"found no nvcc of CUDA {torch_cuda}, which this torch is for"
    if nvcc.split(".")[0] != torch_cuda.split(".")[0]:
        return f"nvcc is of CUDA {nvcc}, but this torch is for CUDA {torch_cuda}"
    return None


def find_nvcc(cuda_home: str | None) -> tuple[str | None, list[str]]:
    """Version of the nvcc that torch would call, and where it has its libraries."""
    nvcc = os.path.join(cuda_home or "", "bin", "nvcc")
    if not os.path.exists(nvcc):
        return None, []
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", version)
    steps = subprocess.run(
        [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True
    ).stderr
    return found and found[1], list(dict.fromkeys(re.findall(r'"-L([^"]+)"', steps)))


def main() -> None:
    import pybind11
    import torch
    from setuptools import setup
    from torch.utils.cpp_extension import CUDA_HOME, BuildExtension, CppExtension

    building = {"bdist_wheel", "build", "build_ext", "editable_wheel"} & set(sys.argv)
    compiler = os.environ.get("CXX", "c++").split()[0]
    if building and not shutil.which(compiler):
        sys.exit(
            f"fastvae needs a C++20 compiler and found no `{compiler}`: install one "
            "(Debian and Ubuntu: apt install g++) or name yours in CXX."
        )

    nvcc, libraries = find_nvcc(CUDA_HOME)
    reason = why_not_cuda(torch.version.cuda, torch.version.hip, nvcc)
    if reason and building:
        print(f"fastvae is built without its CUDA C++ kernels: {reason}.", file=sys.stderr)
    native = CppExtension(
        "fastvae._C",
        sorted(glob("csrc/*.cpp") + ([] if reason else glob("csrc/cuda/*.cu"))),
        depends=glob("csrc/**/*.h", recursive=True),
        include_dirs=[pybind11.get_include()],
        library_dirs=libraries,
        extra_compile_args={"cxx": [*FLAGS, "-fopenmp"], "nvcc": NVCC_FLAGS},
        extra_link_args=["-fopenmp", *([] if reason else CUDA_LINK)],
    )
    setup(ext_modules=[native], cmdclass={"build_ext": BuildExtension})


if __name__ == "__main__":
    main()
