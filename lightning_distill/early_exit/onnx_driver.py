"""Runs the stages of an early-exit model in onnxruntime; needs numpy and onnxruntime, nothing else.

from early_exit_onnx import EarlyExit
logits, exit_layer = EarlyExit("folder").predict({"input_ids": ..., "attention_mask": ...})
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnxruntime


class EarlyExit:
    """The stages of a folder, one after the other, on the rows that are still under way.

    Args:
        folder: What ``EarlyExitModel.export_onnx`` wrote.
        providers: Execution providers of onnxruntime.
    """

    def __init__(self, folder: str | os.PathLike[str], providers: Sequence[str] = ("CPUExecutionProvider",)) -> None:
        folder = Path(folder)
        config = json.loads((folder / "onnx.json").read_text())
        self.inputs, self.depth = config["inputs"], config["depth"]
        self.rising = config["rising"]
        #: Per stage: the exit layer, and its threshold, which may be changed; None for the last.
        self.exits = [(stage["layer"], stage["threshold"]) for stage in config["stages"]]
        self.sessions = [
            onnxruntime.InferenceSession(str(folder / stage["file"]), providers=list(providers))
            for stage in config["stages"]
        ]

    def predict(self, batch: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """Logits ``[B, C]`` and exit layer (from 0) ``[B]`` of a batch of numpy arrays, rows first."""
        batch = {name: np.asarray(batch[name]) for name in self.inputs}
        rows = np.arange(len(batch[self.inputs[0]]))
        hidden: np.ndarray | None = None
        found: np.ndarray | None = None
        exit_layer = np.full(len(rows), self.depth - 1, dtype=np.int64)
        for (layer, threshold), session in zip(self.exits, self.sessions, strict=True):
            wanted = {node.name for node in session.get_inputs()}
            feed = {name: value for name, value in {**batch, "hidden_state": hidden}.items() if name in wanted}
            if threshold is None:
                (logits,) = session.run(["logits"], feed)
                sure = np.ones(len(rows), dtype=bool)
            else:
                logits, measure, hidden = session.run(["logits", "measure", "next_hidden_state"], feed)
                sure = measure > threshold if self.rising else measure < threshold  # False where it is NaN
            if found is None:
                found = np.zeros((len(rows), *logits.shape[1:]), dtype=logits.dtype)
            found[rows[sure]] = logits[sure]
            exit_layer[rows[sure]] = layer
            if sure.all():
                break
            if sure.any() and hidden is not None:
                rows, hidden = rows[~sure], hidden[~sure]
                batch = {name: value[~sure] for name, value in batch.items()}
        assert found is not None
        return found, exit_layer
