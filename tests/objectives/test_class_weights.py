"""Weights of classes in the loss on labels: as torch defines them, exact however a step is split into batches."""

from typing import Any

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule, functional
from lightning_distill.objectives import HardLabel
from lightning_distill.signals.signals import Signals

WEIGHTS = [0.2, 3.0, 1.0]


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_mean_is_that_of_torch(smoothing: float) -> None:
    logits, labels = torch.randn(6, 5, 3), torch.randint(3, (6, 5))
    labels[0] = -100
    weights = torch.tensor(WEIGHTS)
    expected = nn.CrossEntropyLoss(weights, label_smoothing=smoothing)(logits.flatten(0, 1), labels.flatten())
    objective = HardLabel(smoothing, class_weights=WEIGHTS)
    signals = Signals(logits, labels=labels)
    torch.testing.assert_close(objective(signals).mean(), expected)
    torch.testing.assert_close(objective.count(signals, signals), objective(signals).count())
    found = functional.hard_label(logits, labels, label_smoothing=smoothing, class_weights=weights)
    torch.testing.assert_close(found, expected)
    nothing = functional.hard_label(logits[:1], labels[:1], class_weights=weights)
    assert nothing.item() == objective(Signals(logits[:1], labels=labels[:1])).mean().item() == 0


def test_probabilities_count_one_each_as_in_torch() -> None:
    logits, labels = torch.randn(6, 3), torch.rand(6, 3).softmax(-1)
    expected = nn.CrossEntropyLoss(torch.tensor(WEIGHTS))(logits, labels)
    torch.testing.assert_close(HardLabel(class_weights=WEIGHTS)(Signals(logits, labels=labels)).mean(), expected)


def test_what_cannot_be_right_is_refused() -> None:
    for weights in ([], [0.0, 0.0], [-1.0, 1.0], [float("nan"), 1.0]):
        with pytest.raises(ValueError, match="`class_weights`"):
            HardLabel(class_weights=weights)
    with pytest.raises(ValueError, match=r"`class_weights` .* 3 weights, one a class"):
        HardLabel(class_weights=[1.0, 2.0])(Signals(torch.zeros(2, 3), labels=torch.tensor([0, 2])))
    with pytest.raises(ValueError, match=r"`class_weights` .* values and no classes"):
        HardLabel(class_weights=[1.0])(Signals(torch.zeros(2, 1), labels=torch.zeros(2)))
    with pytest.raises(ValueError, match=r"`class_weights` .* for each of 3 classes"):
        functional.hard_label(torch.zeros(2, 3), torch.tensor([0, 2]), class_weights=torch.ones(2))


@pytest.mark.parametrize("size", [12, 4, 3])
def test_accumulated_batches_are_one_batch(size: int, tmp_path: Any) -> None:
    inputs, labels = torch.randn(12, 4), torch.tensor([0] * 8 + [1, 2, 2, 1])
    student = nn.Linear(4, 3)
    nn.CrossEntropyLoss(torch.tensor(WEIGHTS))(student(inputs), labels).backward()
    assert student.weight.grad is not None
    expected = student.weight.detach() - 0.1 * student.weight.grad
    student.zero_grad()
    module = DistillationModule(
        None, student, [HardLabel(class_weights=WEIGHTS)], optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=12 // size,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    data = DataLoader([(x, y) for x, y in zip(inputs, labels, strict=True)], batch_size=size)
    trainer.fit(module, data)
    torch.testing.assert_close(student.weight.detach(), expected)
    loss = nn.CrossEntropyLoss(torch.tensor(WEIGHTS))(student(inputs), labels)
    (found,) = trainer.validate(module, data, verbose=False)
    assert found["val_hard_label"] == pytest.approx(loss.item())
