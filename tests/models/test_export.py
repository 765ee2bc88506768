"""Whatever a student has around it, what is exported loads elsewhere, or nothing is written."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrizations, prune
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from lightning_distill import DistillationModule
from lightning_distill.early_exit import EarlyExitModel, make_ramps
from lightning_distill.models.pretrained import export
from lightning_distill.quantization import load, quantize
from tests.helpers.models import bert, llama, tokens

# Said by peft of itself, with this version of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LORA = {"r": 2, "lora_alpha": 8, "target_modules": ["query", "value"]}


def seen(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model.eval()(**tokens()).logits
    return logits


def loads_as(folder: Path, expected: torch.Tensor, kind: Any = transformers.AutoModelForSequenceClassification) -> None:
    loaded, info = kind.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    torch.testing.assert_close(seen(loaded), expected)


def trained(model: nn.Module) -> nn.Module:
    """Weights that a forgotten adapter would be missed in."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "embeddings" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model


def lora(**settings: Any) -> nn.Module:
    return peft.get_peft_model(bert(), peft.LoraConfig(task_type="SEQ_CLS", **{**LORA, **settings}))


def adapted_by_transformers() -> nn.Module:
    model: Any = bert()
    model.add_adapter(peft.LoraConfig(**LORA))
    return model


def averaged(model: nn.Module) -> nn.Module:
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    average.update_parameters(model)
    average.update_parameters(trained(copy.deepcopy(model)))
    return average


STUDENTS: dict[str, Callable[[], nn.Module]] = {
    "plain": bert,
    "lora": lora,
    "dora": lambda: lora(use_dora=True),
    "lora of every linear layer": lambda: lora(target_modules="all-linear"),
    "lora with a bias": lambda: lora(bias="lora_only"),
    "lora with a module trained whole": lambda: lora(modules_to_save=["classifier", "pooler"]),
    "ia3": lambda: peft.get_peft_model(
        bert(), peft.IA3Config(task_type="SEQ_CLS", target_modules=["key", "value"], feedforward_modules=[])
    ),
    "lora without a task": lambda: peft.get_peft_model(bert(), peft.LoraConfig(**LORA)),
    "an adapter of transformers": adapted_by_transformers,
    "compiled": lambda: torch.compile(bert(), backend="eager"),
    "compiled lora": lambda: torch.compile(lora(), backend="eager"),
    "data parallel": lambda: nn.DataParallel(bert()),
    "averaged": lambda: averaged(bert()),
}  # type: ignore[dict-item]


@pytest.mark.parametrize("kind", STUDENTS)
def test_a_student_with_something_around_it_loads_in_plain_transformers(kind: str, tmp_path: Path) -> None:
    student = trained(STUDENTS[kind]())
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    expected = seen(student)
    student.train()
    folder = export(student, tmp_path / "student")
    loads_as(folder, expected)
    assert student.training
    assert before.keys() == student.state_dict().keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in student.state_dict().items())
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}


def test_a_module_exports_its_peft_student_after_a_step(tmp_path: Path) -> None:
    module = DistillationModule(bert(layers=3), lora())
    trained(module.student)
    batch = {**tokens(), "labels": torch.tensor([0, 1, 0, 1])}
    sum(module.losses(batch).values()).backward()
    loads_as(module.export(tmp_path / "student"), seen(module.student))


def test_a_peft_language_model_loads(tmp_path: Path) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    student = trained(peft.get_peft_model(llama(), config))
    loads_as(export(student, tmp_path / "student"), seen(student), transformers.AutoModelForCausalLM)


def test_a_peft_student_with_ramps_loads_with_them(tmp_path: Path) -> None:
    student = trained(lora())
    early = EarlyExitModel(student, make_ramps(student, layers="base_model.model.bert.encoder.layer"))
    expected = seen(early.student)
    early.save_pretrained(tmp_path / "early")
    loads_as(tmp_path / "early", expected)
    assert (tmp_path / "early" / "ramps.safetensors").exists()


def test_a_quantised_student_is_written_as_one(tmp_path: Path) -> None:
    quantized, _ = quantize(bert(hidden_size=32, intermediate_size=64), None, group_size=32)
    module = DistillationModule(None, bert())
    module.student = quantized
    torch.testing.assert_close(seen(load(module.export(tmp_path / "student"))), seen(quantized))


def pruned() -> nn.Module:
    model = bert()
    prune.l1_unstructured(model.bert.encoder.layer[0].output.dense, "weight", 0.5)
    return model


def parametrised() -> nn.Module:
    model = bert()
    parametrizations.weight_norm(model.classifier)
    return model


def with_another_head() -> nn.Module:
    model = bert()
    model.classifier = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 2))
    return model


def with_more_classes() -> nn.Module:
    model = bert()
    model.classifier = nn.Linear(16, 5)
    return model


def with_fewer_layers() -> nn.Module:
    model = bert()
    del model.bert.encoder.layer[1]
    return model


def with_prompts() -> nn.Module:
    return peft.get_peft_model(bert(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3))


class Net(L.LightningModule):
    def __init__(self, width: int, activation: Any) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.layer = nn.Linear(4, width)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (pruned, r"others: .*weight_mask.*`prune.remove`"),
        (parametrised, r"others: classifier\."),
        (with_another_head, r"others: classifier\."),
        (with_more_classes, r"others: classifier\."),
        (with_fewer_layers, r"others: bert.encoder.layer.1.*and 13 more"),
        (with_prompts, r"can be merged .*PromptTuningConfig.*`save_pretrained`"),
        (lambda: Net(3, torch.relu), r"`activation` is a .*: `save_hyperparameters\(ignore=\['activation'\]"),
        (lambda: Net(3, {1, 2}), r"`activation` is a set"),
    ],
    ids=["pruned", "parametrised", "another head", "more classes", "fewer layers", "prompts", "function", "set"],
)  # fmt: skip
def test_what_would_not_load_is_refused_and_nothing_written(
    make: Callable[[], nn.Module], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(make(), tmp_path / "student")
    assert not list(tmp_path.iterdir())


def test_pruning_that_was_made_permanent_loads(tmp_path: Path) -> None:
    model = pruned()
    prune.remove(model.bert.encoder.layer[0].output.dense, "weight")
    loads_as(export(model, tmp_path / "student"), seen(model))


def test_a_module_is_made_again_from_its_hyper_parameters(tmp_path: Path) -> None:
    net = Net(3, "relu")
    folder = export(torch.compile(net, backend="eager"), tmp_path / "net")
    described = json.loads((folder / "config.json").read_text())
    assert described == {"class_path": f"{__name__}.Net", "init_args": {"width": 3, "activation": "relu"}}
    Net(**described["init_args"]).load_state_dict(load_file(folder / "model.safetensors"))
