"""A checkpoint of a student with adapters has what was trained, and loads onto the same base."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, WeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.callbacks import Resumable
from lightning_distill.training.adapters import frozen_base
from tests.helpers.models import batch, bert

# Said by peft of itself, with this version of transformers.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated")

LORA: dict[str, Any] = {"r": 2, "target_modules": ["query", "value"]}
ROWS = [{name: value[0] for name, value in batch("classification", 1, seed=seed).items()} for seed in range(4)]
DATA = DataLoader(ROWS, batch_size=2)  # type: ignore[arg-type]


def base() -> Any:
    torch.manual_seed(7)
    return bert(hidden_size=64, intermediate_size=256, vocab_size=1000)


def lora(**settings: Any) -> nn.Module:
    return peft.get_peft_model(base(), peft.LoraConfig(task_type="SEQ_CLS", **{**LORA, **settings}))


def added() -> nn.Module:
    model = base()
    model.add_adapter(peft.LoraConfig(**LORA))
    model.classifier.requires_grad_(True)
    return model  # type: ignore[no-any-return]


def frozen_adapter() -> nn.Module:
    model: Any = lora()
    model.add_adapter("other", peft.LoraConfig(task_type="SEQ_CLS", **LORA))
    return model  # type: ignore[no-any-return]


STUDENTS: dict[str, tuple[Callable[[], nn.Module], set[str]]] = {
    "lora": (lora, {"lora_", "classifier.modules_to_save"}),
    "dora": (lambda: lora(use_dora=True), {"lora_", "classifier.modules_to_save"}),
    "modules to save": (
        lambda: lora(modules_to_save=["classifier", "pooler"]),
        {"lora_", "classifier.modules_to_save", "pooler.modules_to_save"},
    ),
    "an adapter that is not trained": (frozen_adapter, {"lora_", "classifier.modules_to_save"}),
    "tokens": (
        lambda: lora(trainable_token_indices={"word_embeddings": [1, 2]}),
        {"lora_", "classifier.modules_to_save", "token_adapter.trainable_tokens"},
    ),
    "add_adapter, and a head": (added, {"lora_", "classifier"}),
    "prompts": (
        lambda: peft.get_peft_model(base(), peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=3)),
        {"prompt_encoder", "classifier.modules_to_save"},
    ),
}


def module(student: nn.Module) -> DistillationModule:
    torch.manual_seed(1)
    return DistillationModule(bert(layers=3, vocab_size=1000), student)


def trainer(folder: Path, steps: int, *callbacks: L.Callback) -> L.Trainer:
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    saves = ModelCheckpoint(folder, "{step}", every_n_train_steps=2, save_top_k=-1)
    torch.manual_seed(2)
    return L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=[Resumable(0), saves, *callbacks],
        **quiet,
    )


def perturbed(student: nn.Module) -> nn.Module:
    """Another start, from which a key that was not loaded would be seen."""
    with torch.no_grad():
        for parameter in student.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    return student


@pytest.mark.parametrize("kind", STUDENTS)
def test_its_state_is_what_was_trained(kind: str) -> None:
    make, parts = STUDENTS[kind]
    made = module(perturbed(make()))
    state = made.state_dict()
    buffers = {f"student.{name}" for name, _ in made.student.named_buffers()}
    trained = {f"student.{n}" for n, p in made.student.named_parameters() if p.requires_grad}
    kept = set(state) - buffers
    assert trained <= kept
    assert all(any(part in name for part in parts) for name in kept)
    assert all(any(part in name for name in kept) for part in parts)
    other = module(make())
    assert not other.load_state_dict(state).missing_keys
    torch.testing.assert_close(other.student.state_dict(), made.student.state_dict(), rtol=0, atol=0)
    one = next(name for name in kept)
    with pytest.raises(RuntimeError, match="Missing"):
        other.load_state_dict({name: value for name, value in state.items() if name != one})
    with pytest.raises(RuntimeError, match="Unexpected"):
        other.load_state_dict({**state, "student.surprise": torch.ones(1)})
    # A state with the base in it, as earlier versions wrote it, is taken whole.
    whole = {f"student.{name}": value + 1 for name, value in made.student.state_dict().items()}
    other.load_state_dict({**state, **whole})
    assert all(torch.equal(value, whole[f"student.{name}"]) for name, value in other.student.state_dict().items())


def test_other_students_keep_their_frozen_parts() -> None:
    student = base()
    student.bert.requires_grad_(False)
    assert frozen_base(student) == {}
    assert len(module(student).state_dict()) == len(student.state_dict())


def test_a_base_that_is_trained_is_kept() -> None:
    student: Any = lora()
    layer = student.base_model.model.bert.encoder.layer[1]
    layer.output.requires_grad_(True)
    assert "student.base_model.model.bert.encoder.layer.1.output.dense.weight" in module(student).state_dict()


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("averages", [False, True])
def test_a_run_resumes_from_a_small_checkpoint(averages: bool, tmp_path: Path) -> None:
    def extra() -> list[L.Callback]:
        average = lambda average, new, count: (average + new) / 2  # noqa: E731
        return [WeightAveraging(use_buffers=False, avg_fn=average)] if averages else []

    whole = module(lora())
    trainer(tmp_path / "whole", 4, *extra()).fit(whole, DATA)
    trainer(tmp_path / "cut", 2, *extra()).fit(module(lora()), DATA)
    checkpoint = tmp_path / "cut" / "step=2.ckpt"
    trained = sum(p.numel() * 4 for p in whole.student.parameters() if p.requires_grad)
    everything = sum(p.numel() * 4 for p in whole.student.parameters())
    assert (3 + averages) * trained < checkpoint.stat().st_size < everything / 4
    other = module(perturbed(lora()))
    trainer(tmp_path / "cut", 4, *extra()).fit(other, DATA, ckpt_path=checkpoint)
    for name, value in whole.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name

    loaded = DistillationModule.load_from_checkpoint(
        tmp_path / "whole" / "step=4.ckpt", teacher=whole.teacher, student=perturbed(lora()), weights_only=True
    )
    torch.testing.assert_close(loaded.student.state_dict(), whole.student.state_dict())


def test_another_base_is_refused(tmp_path: Path) -> None:
    trainer(tmp_path, 2).fit(module(lora()), DATA)
    checkpoint = tmp_path / "step=2.ckpt"
    torch.manual_seed(8)
    another = peft.get_peft_model(
        bert(hidden_size=64, intermediate_size=256, vocab_size=1000), peft.LoraConfig(task_type="SEQ_CLS", **LORA)
    )
    for student, what in ((another, "another in `base_model.model"), (base(), "none in `base_model.model")):
        with pytest.raises(ValueError, match=f"Expected argument `student`.*{what}"):
            DistillationModule.load_from_checkpoint(checkpoint, teacher=base(), student=student)
    half: Any = lora()
    DistillationModule.load_from_checkpoint(checkpoint, teacher=base(), student=half.to(torch.bfloat16))


def test_a_copy_has_it_all() -> None:
    made = module(lora())
    assert len(copy.deepcopy(made).student.state_dict()) == len(made.student.state_dict())
