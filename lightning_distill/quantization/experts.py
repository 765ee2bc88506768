"""Experts that transformers fuses into one tensor, taken apart into linear layers."""

from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn


class LinearExpert(nn.Module):
    """One expert: ``down_proj(act(gate_proj(x)) * up_proj(x))``, or without the gate."""

    def __init__(self, weights: dict[str, tuple[Tensor, Tensor | None]]) -> None:
        super().__init__()
        for name, (weight, bias) in weights.items():
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone(), requires_grad=False)
            self.add_module(name, layer)


class LinearExperts(nn.ModuleList):
    """Fused experts as a list of :class:`LinearExpert`, by the names that checkpoints of one expert a layer use.

    Args:
        fused: A module that transformers' ``use_experts_implementation`` decorates. It keeps what it does between the
            projections, and gives up its weights.

    Raises:
        ValueError: If its layout is not known here; :func:`why_not_separable` says so beforehand.
    """

    def __init__(self, fused: nn.Module) -> None:
        super().__init__()
        reason = why_not_separable(fused)
        if reason:
            raise ValueError(reason)
        self.has_gate = bool(fused.has_gate)
        self.is_concatenated = bool(fused.is_concatenated)
        down, down_bias = _tensors(fused, "down_proj")
        up, up_bias = _tensors(fused, "gate_up_proj" if self.has_gate else "up_proj")
        for index in range(len(down)):
            weights = {"down_proj": (down[index], None if down_bias is None else down_bias[index])}
            bias = None if up_bias is None else up_bias[index]
            if not self.has_gate:
                weights["up_proj"] = (up[index], bias)
            else:
                for name, rows in zip(("gate_proj", "up_proj"), self._halves(len(up[index])), strict=True):
                    weights[name] = (up[index][rows], None if bias is None else bias[rows])
            self.append(LinearExpert(weights))
        for name in list(fused._parameters):
            del fused._parameters[name]
        # Not a submodule: without its weights it is a function.
        self._between = [fused]

    def _halves(self, rows: int) -> tuple[slice, slice]:
        half = rows // 2
        return (slice(half), slice(half, None)) if self.is_concatenated else (slice(0, None, 2), slice(1, None, 2))

    def _hidden(self, expert: nn.Module, inputs: Tensor) -> Tensor:
        fused: Any = self._between[0]
        if not self.has_gate:
            hidden: Tensor = fused.act_fn(expert.up_proj(inputs))  # type: ignore[operator]
            return hidden
        gate, up = expert.gate_proj(inputs), expert.up_proj(inputs)  # type: ignore[operator]
        both = torch.cat([gate, up], -1) if self.is_concatenated else torch.stack([gate, up], -1).flatten(-2)
        hidden = fused._apply_gate(both)
        return hidden

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Tokens ``[n, width]``, the experts of each ``[n, k]`` and their weights ``[n, k]`` to ``[n, width]``."""
        total = torch.zeros_like(hidden_states)
        for index, expert in enumerate(self):
            token, place = torch.where(top_k_index == index)
            if len(token):
                answer = expert.down_proj(self._hidden(expert, hidden_states[token]))  # type: ignore[operator]
                total.index_add_(0, token, (answer * top_k_weights[token, place, None]).to(total.dtype))
        return total


def separate_experts(model: nn.Module, only: Container[str] | None = None) -> dict[str, str]:
    """Replace fused experts by linear layers, in place.

    Args:
        model: Any module.
        only: Names of those to replace; None for all.

    Returns:
        Names of fused experts that stay as they are, and why.
    """
    left: dict[str, str] = {}
    for name, module in list(model.named_modules()):
        if getattr(module._parameters.get("down_proj"), "ndim", 0) == 3 and (only is None or name in only):
            reason = why_not_separable(module)
            if reason:
                left[name] = reason
            else:
                model.set_submodule(name, LinearExperts(module))
    return left


def why_not_separable(fused: nn.Module) -> str | None:
    """Why fused experts cannot be taken apart here, or None if they can."""
    if not isinstance(getattr(fused, "has_gate", None), bool):
        return "its experts are fused in a layout of their own"
    if fused.has_post_expert_norm:
        return "its experts end in a norm"
    return None


def _tensors(fused: nn.Module, name: str) -> tuple[Tensor, Tensor | None]:
    weight, bias = getattr(fused, name).detach(), getattr(fused, f"{name}_bias", None)
    return weight.mT if fused.is_transposed else weight, None if bias is None else bias.detach()
