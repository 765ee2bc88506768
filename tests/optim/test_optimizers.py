"""Optimizers and parameter groups: every name trains, options reach the library, groups are right."""

import inspect
from typing import Any, get_args

import jsonargparse
import pytest
import torch
import yaml
from torch import nn
from transformers import BertConfig, BertForSequenceClassification

from lightning_distill.optim import build_optimizer, parameter_groups
from lightning_distill.optim.optimizers import Name

CPU_NAMES = [name for name in get_args(Name) if "8bit" not in name]


def bert() -> BertForSequenceClassification:
    config = BertConfig(
        vocab_size=11, hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    return BertForSequenceClassification(config)


@pytest.mark.parametrize("name", CPU_NAMES)
def test_every_optimizer_lowers_a_loss(name: Any) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
    x = torch.randn(32, 4)
    y = x.sum(1, keepdim=True).sin()
    optimizer = build_optimizer(model, name, lr=0.01, weight_decay=0.01)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("sgd", {"momentum": 0.8, "nesterov": True}),
        ("sgd", {"momentum": 0.8, "dampening": 0.1}),
        ("adam", {"amsgrad": True, "betas": (0.8, 0.9)}),
        ("rmsprop", {"alpha": 0.9, "momentum": 0.1}),
        ("adagrad", {"eps": 1e-3}),
        ("lion", {"betas": (0.8, 0.9)}),
        ("schedule_free_adamw", {"warmup_steps": 7}),
    ],
)
def test_options_reach_the_library(name: Any, options: dict[str, Any]) -> None:
    group = build_optimizer(nn.Linear(3, 2), name, lr=0.01, **options).param_groups[0]
    assert {option: group[option] for option in options} == options


@pytest.mark.parametrize(("name", "option"), [("adamw", {"momentum": 0.9}), ("sgd", {"betas": (0.9, 0.99)})])
def test_an_option_of_another_optimizer_is_refused(name: Any, option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"Expected argument `{next(iter(option))}` to be left out for '{name}'"):
        build_optimizer(nn.Linear(3, 2), name, **option)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(ValueError, match="Expected argument `name` to be one of 'sgd'"):
        build_optimizer(nn.Linear(3, 2), "adamax")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["torch.optim.Adamax", torch.optim.Adamax])
def test_any_class_is_taken_by_its_path_or_as_such(name: Any) -> None:
    optimizer = build_optimizer(nn.Linear(3, 2), name, lr=0.01, betas=(0.8, 0.9))
    assert isinstance(optimizer, torch.optim.Adamax)
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(ValueError, match="`momentum` to be left out"):
        build_optimizer(nn.Linear(3, 2), name, momentum=0.9)


@pytest.mark.parametrize("path", ["nowhere.Adam", "torch.optim.Nothing", "torch.nn.Linear", "torch.relu"])
def test_a_path_to_no_optimizer_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match=f"`name` to be an optimizer class that can be imported, but got '{path}'"):
        build_optimizer(nn.Linear(3, 2), path)  # type: ignore[arg-type]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without CUDA")
@pytest.mark.parametrize("name", ["adamw_8bit", "paged_adamw_8bit"])
def test_8_bits_need_cuda(name: Any) -> None:
    with pytest.raises(ValueError, match="needs CUDA"):
        build_optimizer(nn.Linear(3, 2), name)


def test_muon_takes_the_hidden_matrices_and_adamw_the_rest() -> None:
    model = bert()
    optimizer = build_optimizer(model, "muon", lr=0.02, adamw_lr=1e-3)
    named = {id(parameter): name for name, parameter in model.named_parameters()}
    muon = {named[id(p)] for group in optimizer.param_groups if group["use_muon"] for p in group["params"]}
    rest = {named[id(p)] for group in optimizer.param_groups if not group["use_muon"] for p in group["params"]}
    assert muon | rest == set(named.values())
    assert all("encoder.layer" in name or "pooler" in name for name in muon)
    assert {"classifier.weight", "bert.embeddings.word_embeddings.weight"} <= rest
    assert {group["lr"] for group in optimizer.param_groups} == {0.02, 1e-3}


def test_layer_decay_follows_the_models_depth() -> None:
    model = bert()
    for parameter in model.bert.encoder.layer[0].parameters():
        parameter.requires_grad_(False)
    groups = parameter_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    rate = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert rate[id(model.bert.embeddings.word_embeddings.weight)] == 0.5**4
    assert rate[id(model.bert.encoder.layer[1].output.dense.weight)] == 0.5**2
    assert rate[id(model.bert.encoder.layer[2].output.dense.weight)] == 0.5
    assert rate[id(model.classifier.weight)] == rate[id(model.bert.pooler.dense.weight)] == 1.0
    assert id(model.bert.encoder.layer[0].output.dense.weight) not in rate


def test_biases_and_norms_are_not_decayed() -> None:
    model = bert()
    decay = {id(p): g["weight_decay"] for g in parameter_groups(model, 1e-5, 0.1) for p in g["params"]}
    for name, parameter in model.named_parameters():
        assert decay[id(parameter)] == (0.0 if name.endswith("bias") or "LayerNorm" in name else 0.1)


def test_a_pattern_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`lr_by_name` to match names .* got 'head\.\*'"):
        parameter_groups(nn.Linear(2, 2), 1e-3, lr_by_name={"head.*": 1e-2})


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")
def test_a_peft_student_trains_its_adapters_alone() -> None:
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(bert(), peft.LoraConfig(r=2, target_modules=["query", "value"]))
    optimizer = build_optimizer(model, "adamw", lr=1e-3)
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert count == 3 * 2 * 2 * (8 + 8)


def test_flags_and_yaml_reach_it(tmp_path: Any) -> None:
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_function_arguments(build_optimizer, "optimizer", skip={"module"})
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"optimizer": {"name": "sgd", "lr": 0.5, "momentum": 0.5}}))
    config = parser.parse_args(["--config", str(file), "--optimizer.lr", "0.25"])
    optimizer = build_optimizer(nn.Linear(2, 2), **config.optimizer.as_dict())
    assert isinstance(optimizer, torch.optim.SGD)
    assert (optimizer.param_groups[0]["lr"], optimizer.param_groups[0]["momentum"]) == (0.25, 0.5)
    assert "module" in inspect.signature(build_optimizer).parameters
