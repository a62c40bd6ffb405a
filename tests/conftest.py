"""Fixtures for every test: one seed, and no uninitialised memory that happens to be good."""

import os

import pytest
import torch

# Without it, products on a GPU refuse to run where only deterministic algorithms may.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is imported: run kernels/ on CPU tensors


@pytest.fixture(autouse=True)
def strict():
    """Fixed seed; every uninitialised buffer starts as NaN, in Python and in C++."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)  # implies deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)
