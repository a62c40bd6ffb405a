"""What an installation must get right; .ci/run covers building and installing for real."""

import importlib.metadata
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def python(*arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_bare_source_tree_gives_one_clear_import_error(tmp_path):
    shutil.copytree(ROOT / "fastvae", tmp_path / "fastvae", ignore=shutil.ignore_patterns("*.so"))
    # Where the tests run on an editable install, its finder would supply the native module.
    program = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if "__editable__" not in getattr(f, "__module__", "")]
import fastvae
"""
    result = python("-c", program, cwd=tmp_path)
    assert result.returncode == 1
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: fastvae's native module is missing: run `pip install .`")
    assert "circular" not in result.stderr


def test_missing_compiler_gives_one_clear_sentence(tmp_path):
    for name in ("setup.py", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    # A build dependency that need not be installed where the tests run, and is not reached.
    (tmp_path / "pybind11.py").write_text("def get_include(): return ''\n")
    result = python("setup.py", "build_ext", cwd=tmp_path, CXX="no-such-compiler")
    assert result.returncode != 0
    assert "Traceback" not in result.stderr
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("fastvae needs a C++20 compiler and found no `no-such-compiler`")


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "cuda, hip, nvcc, reason",
    [
        ("13.0", None, ("13.0", [], ""), None),
        ("12.8", None, ("12.4", [], ""), None),
        (
            "13.0",
            None,
            ("12.4", [], "bad"),
            "nvcc is of CUDA 12.4, but this torch is for CUDA 13.0",
        ),
        ("13.0", None, ("13.1", [], "bad"), "nvcc of CUDA 13.1 does not compile here: bad"),
        ("13.0", None, None, "found no nvcc of CUDA 13.0, which this torch is for"),
        (None, None, ("13.0", [], ""), "this torch is for CPUs alone"),
        (None, "7.1", ("13.0", [], ""), "this torch is for ROCm 7.1"),
    ],
)
def test_cuda_kernels_are_built_or_one_line_says_why_not(setup, cuda, hip, nvcc, reason):
    assert setup.why_not_cuda(cuda, hip, nvcc and setup.Nvcc(*nvcc)) == reason


@pytest.mark.parametrize("end, complaint", [("", ""), ("echo bad; echo worse; exit 1", "bad")])
def test_nvcc_is_asked_before_it_is_needed(setup, tmp_path, end, complaint):
    assert setup.find_nvcc(None) is setup.find_nvcc(str(tmp_path)) is None
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(f"""#!/bin/sh
[ "$1" = --version ] && echo 'Cuda compilation tools, release 12.8, V12.8.93' && exit
exec >&2
echo '#$ LIBRARIES=  "-L/cuda/lib/stubs" "-L/cuda/lib"'
{end}
""")
    nvcc.chmod(0o755)
    libraries = ["/cuda/lib/stubs", "/cuda/lib"]
    assert setup.find_nvcc(str(tmp_path)) == ("12.8", libraries, complaint)


def test_kernels_are_built_for_what_limits_are_measured_on(setup):
    limits = (ROOT / "benchmarks" / "gpu_limits.py").read_text()
    assert all(gpu.removeprefix("-gencode=") in limits for gpu in setup.GPUS)


def test_every_package_of_the_tree_is_installed():
    folders = [path.parent for path in (ROOT / "fastvae").rglob("__init__.py")]
    setuptools = PYPROJECT["tool"]["setuptools"]
    placed = {path: name for name, path in setuptools["package-dir"].items()}
    names = [str(folder.relative_to(ROOT)) for folder in folders]
    models = (ROOT / "fastvae" / "pretrained").glob("*/config.json")
    names += [str(path.parent.relative_to(ROOT)) for path in models]
    in_tree = {placed.get(name, name.replace("/", ".")) for name in names}
    assert sorted(setuptools["packages"]) == sorted(in_tree | {"fastvae.kernels"})


def test_version_is_stated_once_and_the_same(tmp_path):
    import fastvae

    assert importlib.metadata.version("fastvae") == fastvae.__version__
    assert PYPROJECT["project"]["version"] == fastvae.__version__


def test_core_dependencies_are_enough(tmp_path):
    extras = PYPROJECT["project"]["optional-dependencies"]
    names = {
        re.split(r"[\s>=<;]", line)[0].replace("-", "_") for e in extras.values() for line in e
    }
    program = f"""
import sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names - {"triton"}!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Refuse())
import fastvae, fastvae.cli, fastvae.cli.demo, fastvae.plots, fastvae.training
"""
    result = python("-c", program, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert {"pytest", "tensorboard", "hypothesis"} <= names
