"""Layers that are done, kept in a folder so that a run that was killed goes on behind them."""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import safe_open
from torch import Tensor

from lightning_distill.models.fingerprints import add_tensors
from lightning_distill.quantization.linear import QuantLinear


class FinishedLayers:
    """A folder with one safetensors file per quantised layer.

    A file counts only for the settings and the float weights it was made from.

    Args:
        folder: Where; None keeps nothing.
        settings: What the layers depend on, in JSON's types.
        weights: The float weights of all layers.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, settings: Any, weights: list[Tensor]) -> None:
        self.folder = None if folder is None else Path(folder)
        self.signature = ""
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
            add_tensors(digest, (("", weight.float()) for weight in weights))
            self.signature = digest.hexdigest()

    def save(self, name: str, layer: QuantLinear, report: dict[str, Any]) -> None:
        """Keep a layer and its report; the file appears whole or not at all."""
        if self.folder is None:
            return
        self._is_mine(name)
        made = {"bits": layer.bits, "group_size": layer.group_size}
        metadata = {"signature": self.signature, "report": json.dumps(report), "made": json.dumps(made)}
        temporary = self.folder / f".{name}.partial"
        safetensors.torch.save_file(layer.state_dict(), temporary, metadata)
        temporary.replace(self.folder / f"{name}.safetensors")

    def _is_mine(self, name: str) -> bool:
        """Whether there is such a layer; another file of its name is not written over."""
        assert self.folder is not None
        path = self.folder / f"{name}.safetensors"
        if path.exists() and not _is_layer(path):
            raise ValueError(
                f"Expected argument `resume` to be a folder of layers that are quantised, but got {self.folder}, where "
                f"{path.name} is something else. Name another folder."
            )
        return path.exists()

    def load(self, name: str) -> tuple[QuantLinear, dict[str, Any]] | None:
        """A layer that is done, on the CPU, and its report; None if it is not, or was made from something else."""
        path = None if self.folder is None else self.folder / f"{name}.safetensors"
        if path is None or not self._is_mine(name):
            return None
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata["signature"] != self.signature:
                return None
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        width, made = len(state["g_idx"]), json.loads(metadata["made"])
        layer = QuantLinear(width, state["qweight"].shape[1], made["bits"], made["group_size"], "bias" in state)
        layer.load_state_dict(state)
        report = json.loads(metadata["report"])
        return layer, {**report, "shape": tuple(report["shape"])}


def remove_layers(folder: Path) -> None:
    """Remove the files that :class:`FinishedLayers` wrote, and the folder if nothing else is in it."""
    for path in folder.glob("*.safetensors"):
        if _is_layer(path):
            path.unlink()
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def _is_layer(path: Path) -> bool:
    try:
        with safe_open(path, "pt") as file:
            return {"signature", "report", "made"} <= set(file.metadata() or {})
    except (OSError, safetensors.SafetensorError):
        return False
