"""Checkpoints of a student with adapters: what was trained, and not the frozen base that it was put onto."""

import sys
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

# What lies below these parts of peft's layers and models is the base's, and all else there is the adapter's.
_OF_BASE = ("base_layer", "original_module", "base_model", "word_embeddings")
_KEY, _SAMPLES = "frozen_base", 8


def frozen_base(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a model with adapters that belong to its base and are not trained.

    It may be a peft model, a transformers model with ``add_adapter``, or any other. Parameters with several names stand
    under each; there are none where the model has no adapters, or is sharded (FSDP2).

    Example:
        >>> from torch import nn
        >>> from lightning_distill.training.adapters import frozen_base
        >>> frozen_base(nn.Linear(2, 2).requires_grad_(False))
        {}
    """
    layers = _layers_of_peft(model)
    return {
        name: found
        for name, found in (model.named_parameters(remove_duplicate=False) if layers else ())
        # Lightning loads a whole file into sharded weights by itself, and asks for a key of each.
        if not (found.requires_grad or isinstance(found, DTensor)) and _is_of_base(name, layers)
    }


def _layers_of_peft(model: nn.Module) -> set[str]:
    peft, tuners = sys.modules.get("peft"), sys.modules.get("peft.tuners.tuners_utils")
    other = sys.modules.get("peft.utils.other")
    if peft is None or tuners is None or other is None:
        return set()  # nobody can have made one
    wrapper = getattr(other, "AuxiliaryTrainingWrapper", None) or other.ModulesToSaveWrapper
    kinds = (peft.PeftModel, tuners.BaseTunerLayer, wrapper)
    return {name for name, module in model.named_modules() if isinstance(module, kinds)}


def _is_of_base(name: str, layers: set[str]) -> bool:
    """Whether a parameter is one of the base, by where it lies in the innermost part of peft around it."""
    path = name.split(".")
    for length in range(len(path) - 1, -1, -1):
        if ".".join(path[:length]) in layers:
            return path[length] in _OF_BASE
    return True


class AdapterCheckpoints(L.LightningModule):
    """A LightningModule whose state leaves out the frozen base of a student with adapters.

    ``state_dict`` has the adapters, what else is trained (a head, ``modules_to_save``) and the buffers.
    ``load_state_dict`` takes such a state, or a whole one, into a module whose student has the same base; keys of
    anything else that are missing are missing. A checkpoint holds a few numbers of each weight that was left out, by
    which another base is refused.
    """

    student: nn.Module

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The state of the module without the frozen base of a student with adapters."""
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        base = {f"{kwargs.get('prefix', '')}student.{name}" for name in frozen_base(self.student)}
        for key in list(state):
            # bitsandbytes keeps what it needs to read a weight below the weight's name.
            if key in base or any(key[:end] in base for end, sign in enumerate(key) if sign == "."):
                del state[key]
        return state

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # The children, which come after this, find in their state what they have.
        for name, parameter in frozen_base(self.student).items():
            state_dict.setdefault(f"{prefix}student.{name}", parameter)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep by what the frozen base is known again."""
        super().on_save_checkpoint(checkpoint)
        samples = {name: _samples(parameter) for name, parameter in frozen_base(self.student).items()}
        if base := {name: values for name, values in samples.items() if values is not None}:
            checkpoint[_KEY] = base

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse the checkpoint of adapters that were trained on another base.

        Raises:
            ValueError: If a weight that the checkpoint leaves out is another, or is not there.
        """
        super().on_load_checkpoint(checkpoint)
        base = frozen_base(self.student)
        for name, saved in checkpoint.get(_KEY, {}).items():
            there = _samples(base[name]) if name in base else []
            if there is None or f"student.{name}" in checkpoint.get("state_dict", {}):
                continue
            # Another precision, or an average of a weight with itself, is no other base.
            same = len(there) == len(saved) and np.allclose(there, saved, rtol=1e-2, atol=1e-6, equal_nan=True)
            if not same:
                raise ValueError(
                    f"Expected argument `student` to have the frozen base that the adapters of the checkpoint were "
                    f"trained on, but got {'another' if name in base else 'none'} in `{name}`. Give the same base, "
                    "loaded from its folder, with the same adapters on it."
                )


def _samples(parameter: Tensor) -> list[float] | None:
    """A few values from all over a weight; None of one that is quantised."""
    if not parameter.is_floating_point() or parameter.is_meta:
        return None
    flat = parameter.detach().flatten()
    values: list[float] = flat[:: max(1, len(flat) // _SAMPLES)].tolist()
    return values
