"""The one thing pyproject.toml cannot say: how csrc/ becomes fastvae._C."""

import os
import shutil
import sys
from glob import glob

import pybind11
from setuptools import setup
from torch.utils.cpp_extension import BuildExtension, CppExtension

compiler = os.environ.get("CXX", "c++").split()[0]
if {"bdist_wheel", "build_ext", "editable_wheel"} & set(sys.argv) and not shutil.which(compiler):
    sys.exit(
        f"fastvae needs a C++20 compiler and found no `{compiler}`: install one "
        "(Debian and Ubuntu: apt install g++) or name yours in CXX."
    )

native = CppExtension(
    "fastvae._C",
    sorted(glob("csrc/*.cpp")),
    depends=glob("csrc/*.h"),
    include_dirs=[pybind11.get_include()],
    # Stable ABI of torch 2.10: built against one torch, runs under every later one.
    extra_compile_args=[
        "-O3",
        "-std=c++20",
        "-fopenmp",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
    ],
    extra_link_args=["-fopenmp"],
)
setup(ext_modules=[native], cmdclass={"build_ext": BuildExtension})
