"""Fixtures every test may use."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Before transformers is imported: a name that is no folder would be asked of the hub, with minutes of retries.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from matplotlib.figure import Figure

# Models of a few hundred parameters: a second thread costs more than it gives.
torch.set_num_threads(1)

# Two processes of a test talk over the loopback, whatever the name of the machine resolves to.
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

DRAW = Figure.savefig
SHARED = Path(__file__).resolve().parents[2] / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run the tests that fork first: a fork inherits the locks of its parent's threads but not the threads."""
    items.sort(key=lambda item: item.get_closest_marker("forks") is None)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _empty_pictures() -> Iterator[None]:
    """Pictures are empty files: drawing them was a third of the time of the tests that train."""

    def touch(figure: Figure, path: Any, **_: Any) -> None:
        Path(path).touch()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", touch)
        yield


@pytest.fixture(autouse=True)
def _drawn_pictures(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that names a picture gets it drawn."""
    if request.function is not None and ".png" in str(request.function.__code__.co_consts):
        monkeypatch.setattr(Figure, "savefig", DRAW)


@pytest.fixture
def shared() -> Path:
    """The folder of real data and a real teacher beside the checkout; the test skips where it is absent."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the folder of real data at {SHARED}, which is not here")
    return SHARED
