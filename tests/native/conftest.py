"""The builds of the native code, and threads to run them on."""

import pytest
import torch

from knnmoe_hf import native
from tests.builds import BUILDS, use_build_for


@pytest.fixture(params=BUILDS)
def kernels(request, monkeypatch):
    """Each build in turn."""
    use_build_for(request.param, monkeypatch)
    return native.kernels


@pytest.fixture
def four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)
