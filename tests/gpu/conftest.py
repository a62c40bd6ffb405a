"""Fixtures of the tests that need a GPU, which are skipped where there is none."""

import pytest
import torch


@pytest.fixture(autouse=True)
def ieee():
    """float32 convolutions round as those of the CPU do."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = before


@pytest.fixture
def kept():
    """The graphs that are kept: none at first."""
    from fastvae.kernels import graphs

    graphs._graphs.clear()
    torch.cuda.empty_cache()
    yield graphs._graphs
    graphs._graphs.clear()
