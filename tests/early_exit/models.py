"""Small models of many architectures with ramps that disagree, for the tests of this folder."""

from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.early_exit import Criterion, EarlyExitModel, make_ramps
from tests.helpers.models import tokens
from tests.models.registry import build

DEPTH = 4


def student(architecture: str = "Bert", head: str = "SequenceClassification", **config: Any) -> Any:
    """A model of four layers whose layers say different things."""
    model = build(architecture, head, layers=config.pop("num_hidden_layers", DEPTH), **config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(3.0)
    return model


class Residual(nn.Sequential):
    """A layer on ``[B, D]``."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Stack(nn.Module):
    """A stack of layers that is not from transformers."""

    def __init__(self, width: int = 8, classes: int = 3) -> None:
        super().__init__()
        self.body = nn.ModuleList(
            Residual(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, width)) for _ in range(DEPTH)
        )
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = layer(x)
        return self.head(x)


def early(
    model: nn.Module, share: float = 0.4, criterion: Criterion | None = None, *, batch: Any = None, **options: Any
) -> EarlyExitModel:
    """An EarlyExitModel in which about a share of the rows leaves at each exit, halfway between two measures.

    So no row's measure is as near to a threshold as rounding goes.
    """
    made = EarlyExitModel(model, make_ramps(model, criterion=criterion, **options))
    if batch is None:
        batch = tokens(64, 10, seed=7) if hasattr(model, "config") else torch.randn(64, 8)
    asked, _ = made.answers(batch)
    thresholds = {}
    for layer, (logits, gate) in asked.items():
        state = made.criterion.begin(logits.shape[:-1], logits.device)
        values = made.criterion.measure(logits, gate, state)[0].flatten().sort().values
        place = int((1 - share if made.criterion.rising else share) * (len(values) - 1))
        thresholds[layer] = float((values[place] + values[place + 1]) / 2)
    made.thresholds = thresholds
    return made
