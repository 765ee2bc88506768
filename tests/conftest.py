"""Fixtures every test may use."""

from pathlib import Path

import pytest
import torch

# Models of a few hundred parameters: a second thread costs more than it gives.
torch.set_num_threads(1)

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def shared() -> Path:
    """The folder of real data and a real teacher beside the checkout; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder of real data at {SHARED}, which is not here")
    return SHARED
