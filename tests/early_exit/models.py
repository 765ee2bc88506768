"""Small models of many architectures with ramps that disagree, for the tests of this folder."""

from typing import Any

import torch
import transformers
from torch import Tensor, nn

from lightning_distill.early_exit import Criterion, EarlyExitModel, make_ramps
from tests.helpers.models import SMALL, tokens

DEPTH = 4

#: Class prefix, and what its config needs beside or instead of the usual.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Bert": {},
    "DistilBert": {"dim": 16, "hidden_dim": 32, "n_heads": 2, "n_layers": DEPTH, "vocab_size": 64},
    "Roberta": {"max_position_embeddings": 40},
    "Electra": {"embedding_size": 16},
    "DebertaV2": {"relative_attention": True, "position_buckets": 4, "pos_att_type": ["p2c", "c2p"]},
    "ModernBert": {"cls_token_id": 1, "sep_token_id": 2},
    "GPT2": {"n_embd": 16, "n_layer": DEPTH, "n_head": 2, "n_positions": 32},
    "Llama": {"num_key_value_heads": 1},
    "Qwen3": {"num_key_value_heads": 1, "head_dim": 8},
}


def student(architecture: str = "Bert", head: str = "SequenceClassification", **config: Any) -> Any:
    """A model of four layers whose layers say different things."""
    settings = {**SMALL, "num_hidden_layers": DEPTH, **ARCHITECTURES[architecture], **config}
    made = getattr(transformers, f"{architecture}Config")(**settings)
    model = getattr(transformers, f"{architecture}For{head}")(made).eval()
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
