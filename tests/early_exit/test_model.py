"""EarlyExitModel: Trainer, folders, quantised layers, and what it says of wrong input."""

import json
import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill.early_exit import Confidence, EarlyExitModel, LearnedGate, Patience, make_ramps
from lightning_distill.models.pretrained import export
from lightning_distill.quantization import quantize
from lightning_distill.quantization import save as save_quantized
from tests.early_exit.models import DEPTH, Stack, early, student
from tests.helpers.models import tokens


def trainer(folder: Path) -> L.Trainer:
    return L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, default_root_dir=folder)


def rows(count: int = 40) -> list[dict[str, torch.Tensor]]:
    batch = {**tokens(count, 8), "labels": torch.arange(count) % 2}
    return [{key: value[row] for key, value in batch.items()} for row in range(count)]


def test_trainer_predict_and_test_run_it(tmp_path: Path) -> None:
    model = early(student())
    loader = DataLoader(rows(), batch_size=16)
    predicted = trainer(tmp_path).predict(model, loader)
    assert predicted is not None
    exits = torch.cat([exit_layer for _, exit_layer in predicted])
    logits = torch.cat([logits for logits, _ in predicted])
    assert len(exits.unique()) == DEPTH
    (scores,) = trainer(tmp_path).test(model, loader, verbose=False)
    assert scores["test_mean_depth"] == pytest.approx((exits + 1).float().mean().item())
    right = (logits.argmax(-1) == torch.arange(40) % 2).float().mean().item()
    assert scores["test_accuracy"] == pytest.approx(right)


def test_thresholds_can_be_changed_at_any_time() -> None:
    model = early(student())
    batch = tokens(16, 8)
    for thresholds, expected in (({1: 0.0}, 1), (0.0, 0), ({}, DEPTH - 1), (1.0, DEPTH - 1)):
        model.thresholds = thresholds
        assert model.predict(batch).exit_layer.tolist() == [expected] * 16


def test_a_folder_holds_the_plain_student_and_its_ramps(tmp_path: Path, recwarn: Any) -> None:
    model = early(student(), kind="pooler")
    model.temperatures = {1: 1.5}
    model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path)
    assert sorted(plain.state_dict()) == sorted(key for key in model.student.state_dict() if "ramps" not in key)
    loaded = EarlyExitModel.from_pretrained(tmp_path)
    batch = tokens(32, 8)
    assert all(torch.equal(a, b) for a, b in zip(loaded.predict(batch), model.predict(batch), strict=True))
    assert isinstance(loaded.criterion, Confidence)
    assert model.student.ramps is model.ramps  # put back after writing


def test_a_stack_that_is_not_from_transformers_is_loaded_into(tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = early(Stack(), layers="body")
    model.save_pretrained(tmp_path)
    loaded = EarlyExitModel.from_pretrained(tmp_path, student=model.student)
    x = torch.randn(32, 8)
    assert torch.equal(loaded.predict(x).logits, model.predict(x).logits)
    described = json.loads((tmp_path / "config.json").read_text())
    assert described["class_path"].endswith("models.Stack")


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_layers_leave_early_and_load(tmp_path: Path, bits: int) -> None:
    net = student(hidden_size=32, intermediate_size=64)
    model = early(net)
    batch = tokens(64, 8)
    quantized, _ = quantize(net, None, bits=bits, group_size=32)
    model = EarlyExitModel(quantized, thresholds=model.thresholds)
    assert model.ramps is not net.ramps
    logits, exits = model.predict(batch)
    assert len(exits.unique()) == DEPTH
    one = model.predict({key: value[:1] for key, value in batch.items()})
    torch.testing.assert_close(one.logits[0], logits[0], rtol=1e-3, atol=1e-4)
    save_quantized(quantized, tmp_path / "quantized")
    loaded = EarlyExitModel.from_pretrained(tmp_path / "quantized")
    loaded.thresholds = model.thresholds
    again = loaded.predict(batch)
    assert (again.exit_layer == exits).float().mean() > 0.95
    torch.testing.assert_close(again.logits, logits, rtol=1e-2, atol=1e-2)


def test_rows_that_are_not_finite_fall_through_and_are_counted() -> None:
    model = early(student())
    model.thresholds = 0.0
    with torch.no_grad():
        model.ramps["0"].output.bias.fill_(math.nan)
        model.ramps["2"].output.bias[0] = math.inf
    model.thresholds = {0: 0.0, 2: 0.0}
    batch = tokens(8, 8)
    with pytest.warns(UserWarning, match="finite logits"):
        logits, exits = model.predict(batch)
    assert exits.tolist() == [DEPTH - 1] * 8
    torch.testing.assert_close(logits, model.student(**batch).logits)
    assert model.nonfinite_rows == 16
    model.thresholds = {0: 0.0, 1: 0.0}
    assert model.predict(batch).exit_layer.tolist() == [1] * 8
    assert model.nonfinite_rows == 24


def test_a_student_in_training_is_asked_in_eval_and_goes_on_training() -> None:
    model = early(student(hidden_dropout_prob=0.5))
    expected = model.predict(tokens(8, 8)).logits
    model.train()
    assert torch.equal(model.predict(tokens(8, 8)).logits, expected)
    assert model.student.training


def test_export_of_a_student_without_ramps_is_as_ever(tmp_path: Path) -> None:
    export(student(), tmp_path)
    assert not (tmp_path / "early_exit.json").exists()
    with pytest.raises(ValueError, match=r"to hold a student with ramps, but .* has no early_exit.json"):
        EarlyExitModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: EarlyExitModel(student()), "`student` to hold ramps"),
        (lambda: make_ramps(student(), [1, 3]), r"layers from 0 to 2 of a student of 4 layers .* got \[1, 3\]"),
        (lambda: make_ramps(student(), [-1]), "from 0 to 2"),
        (lambda: make_ramps(student(), [1, 1]), "different layers"),
        (lambda: make_ramps(student(), "every_9"), "got 'every_9'"),
        (lambda: make_ramps(student(), "some"), "'all', 'every_<n>' or layers"),
        (lambda: make_ramps(Stack()), r"Name it by path, `layers=...`; there are .*'body'"),
        (lambda: make_ramps(nn.Linear(2, 2)), "no ModuleList and no Sequential"),
        (lambda: make_ramps(Stack(), layers="head"), "a `Linear`. There are"),
        (lambda: make_ramps(Stack(), layers="bodi"), r"got 'bodi'; near it are"),
        (lambda: make_ramps(student(), kind="deep"), "`kind` to be one of"),
        (lambda: make_ramps(student(head="TokenClassification"), kind="attention"), "`kind`"),
        (lambda: make_ramps(student(head="MaskedLM")), "Language models do not leave early"),
        (lambda: early(student()).__setattr__("thresholds", {1: 1.5}), r"`thresholds\[1\]` to be at least 0"),
        (lambda: early(student()).__setattr__("thresholds", {3: 0.5}), "name exits of .*, but got 3"),
        (lambda: EarlyExitModel(student(), make_ramps(student()), criterion=LearnedGate(0.5)), "need no gate"),
        (lambda: EarlyExitModel(student(), make_ramps(student()), temperatures={0: 0.0}), "temperatures"),
        (
            lambda: EarlyExitModel(student(num_labels=1), make_ramps(student(num_labels=1)), criterion=Patience(1)),
            "Patience with a `tolerance`",
        ),
    ],
)
def test_wrong_input_is_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
