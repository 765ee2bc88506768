"""InitPolicy: formulas of torch.nn.init, variance through 30 layers, and what is left alone."""

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_distill.callbacks import InitPolicy
from lightning_distill.initialization import following_activations, initialize


def deep(activation: type[nn.Module], width: int = 256) -> nn.Sequential:
    # On the meta device first: torch's own draw would be thrown away.
    layers = (part for _ in range(30) for part in (nn.Linear(width, width, device="meta"), activation()))
    return nn.Sequential(*layers).to_empty(device="cpu")


def variances(model: nn.Module) -> tuple[float, float]:
    hidden = torch.randn(64, model[0].in_features, generator=torch.Generator().manual_seed(1))
    means = []
    for module in model:
        hidden = module(hidden)
        if not isinstance(module, nn.Linear):
            means.append(hidden.pow(2).mean().item())
    return means[4], means[-1]


@pytest.mark.parametrize("activation", [nn.Tanh, nn.ReLU, nn.SELU])
@torch.no_grad()
def test_thirty_layers_keep_their_variance_under_auto(activation: type[nn.Module]) -> None:
    # He keeps the variance in the mean over draws. One draw wanders by sqrt(5 x 25 layers / width) in log variance: by
    # a factor of 2 at width 256 (seen: mean 1.12 with standard error 0.11 over 60 draws), of 1.4 at width 1024.
    model = deep(activation, width=1024)
    initialize(model, "auto")
    early, late = variances(model)
    assert 0.5 < late / early < 2


@torch.no_grad()
def test_thirty_layers_vanish_or_explode_under_the_wrong_rule() -> None:
    model = deep(nn.ReLU)
    initialize(model, "xavier_normal")
    assert variances(model)[1] < 1e-5
    model = deep(nn.SELU)
    initialize(model, "transformer")
    assert variances(model)[1] < 1e-5


@pytest.mark.parametrize(
    ("policy", "arguments"),
    [
        ("xavier_uniform", {"gain": 5 / 3}),
        ("xavier_normal", {"gain": 5 / 3}),
        ("kaiming_uniform", {"a": 0.0}),
        ("kaiming_normal", {"a": 0.0}),
        ("orthogonal", {"gain": 5 / 3}),
    ],
)
def test_values_equal_those_of_torch(policy: Any, arguments: dict[str, float]) -> None:
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh())
    initialize(model, policy, seed=3)
    expected = torch.empty(20, 12)
    getattr(nn.init, f"{policy}_")(expected, **arguments, generator=torch.Generator().manual_seed(3))
    assert torch.equal(model[0].weight, expected)


def test_activations_are_found_through_functions_and_other_modules() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
            self.norm = nn.LayerNorm(4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.c(torch.tanh(self.norm(self.a(nn.functional.leaky_relu(self.b(x), negative_slope=0.3)))))

    expected = {"b": ("leaky_relu", 0.3), "a": ("tanh", 0.0), "c": ("linear", 0.0)}
    assert following_activations(Model()) == expected


def test_tied_weights_padding_rows_norms_and_biases() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(9, 4, padding_idx=2), "head": nn.Linear(4, 9), "n": nn.LayerNorm(4)}
    )
    model["head"].weight = model["embedding"].weight
    nn.init.constant_(model["n"].weight, 3.0)
    audit = initialize(model, "auto")
    assert [line.parameter for line in audit] == ["embedding.weight"]
    assert model["embedding"].weight[2].abs().max() == 0
    assert torch.equal(model["n"].weight, torch.ones(4))


class Net(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        from transformers import BertConfig, BertModel

        config = BertConfig(
            vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
        )
        self.loaded, self.head = BertModel(config), nn.Linear(8, 2)
        self.loaded.name_or_path = self.loaded.config._name_or_path = "somewhere"


def test_new_leaves_loaded_weights_alone(tmp_path: Path) -> None:
    module, policy = Net(), InitPolicy(output_dir=tmp_path)
    before = {name: value.clone() for name, value in module.loaded.state_dict().items()}
    policy.setup(L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False), module, "fit")
    assert all(torch.equal(value, before[name]) for name, value in module.loaded.state_dict().items())
    assert [line["parameter"] for line in json.loads((tmp_path / "init_policy.json").read_text())] == ["head.weight"]


def test_bad_arguments_are_named() -> None:
    for arguments, name in (({"policy": "magic"}, "policy"), ({"std": 0.0}, "std"), ({"only": []}, "only")):
        with pytest.raises(ValueError, match=f"`{name}`"):
            InitPolicy(**arguments)
    with pytest.raises(ValueError, match="`only` to match names of modules, but 'x' matches none"):
        initialize(nn.Linear(1, 1), patterns=["x"])
    with pytest.raises(ValueError, match="on the meta device"):
        initialize(nn.Sequential(nn.Linear(1, 1, device="meta")))
