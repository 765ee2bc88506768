"""What the labels are decides the loss, the metric and the agreement, or the run is refused in one sentence."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics import MetricCollection
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from lightning_distill import DistillationModule
from lightning_distill.callbacks import GPTQ, EarlyExit, TeacherCache
from lightning_distill.early_exit import Confidence, EarlyExitModel, Entropy, Margin, Patience, calibrate, make_ramps
from lightning_distill.objectives import Decoupled, HardLabel, LogitsMSE, SoftTarget, TopKSoftTarget
from lightning_distill.tasks import TASKS
from tests.helpers.models import batch, bert, llama

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")


def trainer(**options: Any) -> L.Trainer:
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return L.Trainer(accelerator="cpu", max_epochs=1, **{**quiet, **options})


def linear(inputs: int, outputs: int, seed: int = 0) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(inputs, outputs)


def points(rows: int = 6, inputs: int = 4) -> Tensor:
    return torch.randn(rows, inputs, generator=torch.Generator().manual_seed(3))


class Squeezed(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).squeeze(-1)


# -- one logit for two classes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.Linear, Squeezed])
@pytest.mark.parametrize("make", [Tensor.long, Tensor.bool, Tensor.float, lambda y: y[:, None].float()])
def test_one_logit_is_that_of_two_classes(kind: Any, make: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    teacher, student, x = kind(4, 1), kind(4, 1), points()
    y = torch.tensor([0, 1, 1, 0, 1, 0])
    module = DistillationModule(teacher, student, [SoftTarget(temperature=3.0), HardLabel()])
    found = module.losses((x, make(y)))
    s, t = (model(x).flatten() for model in (student, teacher))
    torch.testing.assert_close(found["hard_label"], F.binary_cross_entropy_with_logits(s, y.float()))
    p = torch.sigmoid(t / 3)
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    coins = F.binary_cross_entropy_with_logits(s / 3, p) - entropy
    torch.testing.assert_close(found["soft_target"], 9 * coins)
    scores = trainer().validate(module, DataLoader([(x, make(y))], batch_size=None), verbose=False)[0]
    assert scores["val_accuracy"] == pytest.approx(((s > 0).long() == y).float().mean().item())
    assert scores["val_agreement"] == pytest.approx(((s > 0) == (t > 0)).float().mean().item())


def test_one_logit_beside_two_and_in_a_transformers_model() -> None:
    one, two, x = linear(4, 1), nn.Linear(4, 2), points()
    with torch.no_grad():
        two.weight.copy_(torch.stack([torch.zeros(4), one.weight[0]]))
        two.bias.copy_(torch.stack([torch.zeros(()), one.bias[0]]))
    for teacher, student in ((one, two), (two, one)):
        assert DistillationModule(teacher, student).losses((x, torch.ones(6)))["soft_target"] < 1e-6
    model = bert(num_labels=1)
    rows = batch("classification")
    assert DistillationModule(None, model).task == "regression"
    with pytest.raises(ValueError, match="pass `task='classification'`"):
        DistillationModule(None, model).losses({**rows, "labels": rows["labels"].bool()})
    found = DistillationModule(None, model, task="classification").eval().losses(rows)["hard_label"]
    logits = model(rows["input_ids"], rows["attention_mask"]).logits[:, 0]
    torch.testing.assert_close(found, F.binary_cross_entropy_with_logits(logits, rows["labels"].float()))


@pytest.mark.parametrize("criterion", [Confidence(0.9), Margin(0.8), Entropy(0.4), Patience(1)])
def test_a_student_with_one_logit_leaves_early_where_it_is_sure(criterion: Any) -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    student = nn.Sequential(body, nn.Linear(4, 1))
    ramps = make_ramps(student, layers="0", criterion=criterion)
    model = EarlyExitModel(student, ramps)
    x = 3 * points(64)
    logits, left = model.predict(x)
    assert logits.shape == (64, 1)
    answers = [ramps.ask(layer, body[: layer + 1](x), None)[0][:, 0].sigmoid() for layer in (0, 1)]
    if isinstance(criterion, Patience):
        expected = torch.where((answers[0] > 0.5) == (answers[1] > 0.5), 1, 2)
    else:
        sure = [
            criterion.sure(criterion.measure(torch.stack([1 - p, p], -1).log(), None, ())[0], criterion.threshold)
            for p in answers
        ]
        expected = torch.where(sure[0], 0, torch.where(sure[1], 1, 2))
    assert left.tolist() == expected.tolist()
    assert len(set(left.tolist())) > 1


def test_ramps_of_one_logit_are_trained_and_calibrated() -> None:
    torch.manual_seed(0)
    x = points(200)
    y = (x[:, 0] > 0).long()
    student = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 1))
    module = DistillationModule(linear(4, 1), student, optimizer=lambda p: torch.optim.Adam(p, 0.05))
    run = trainer(callbacks=[EarlyExit(layers="0", teacher_weight=0.1)], log_every_n_steps=1)
    rows = list(zip(x, y, strict=True))
    run.fit(module, DataLoader(rows * 5, 20), DataLoader(rows, 50))
    assert run.callback_metrics["val_exit0_accuracy"] > 0.9
    report = calibrate(EarlyExitModel(student), DataLoader(rows, 50), max_drop=0.2)
    assert report.guarantee["holds"]
    assert report.accuracy[0] > 0.9


# -- kinds of labels -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda y: y.to(torch.int8),
        lambda y: y.to(torch.uint8),
        lambda y: y.to(torch.int16),
        lambda y: y.to(torch.int32),
        lambda y: y.to(torch.uint16),
        lambda y: y.double(),
        lambda y: y.half(),
        lambda y: y.bfloat16(),
        lambda y: y[:, None],
        lambda y: y.tolist(),
        lambda y: tuple(y.tolist()),
        lambda y: y.numpy(),
        lambda y: list(y),
        lambda y: F.one_hot(y, 3),
        lambda y: F.one_hot(y, 3).float(),
    ],
)
def test_classes_of_any_type(make: Callable[[Tensor], Any]) -> None:
    student, x, y = linear(4, 3), points(), torch.tensor([0, 2, 1, 1, 0, 2])
    found = DistillationModule(linear(4, 3, 1), student).losses((x, make(y)))["hard_label"]
    torch.testing.assert_close(found, F.cross_entropy(student(x), y))
    logged = trainer().validate(
        DistillationModule(None, student), DataLoader([(x, make(y))], batch_size=None), verbose=False
    )
    assert logged[0]["val_accuracy"] == pytest.approx((student(x).argmax(-1) == y).float().mean().item())


def test_labels_that_do_not_count() -> None:
    student, x = linear(4, 3), points()
    for y in (torch.tensor([0, -100, 1, -100, 2, 2]), torch.tensor([0.0, -100, 1, -100, 2, 2])):
        found = DistillationModule(None, student).losses((x, y))["hard_label"]
        torch.testing.assert_close(found, F.cross_entropy(student(x), y.long(), ignore_index=-100))
        module = DistillationModule(None, student, metrics=MulticlassF1Score(3, average="micro"))
        logged = trainer().validate(module, DataLoader([(x, y)], batch_size=None), verbose=False)[0]
        right = (student(x).argmax(-1) == y)[y >= 0].float().mean().item()
        assert logged["val_f1"] == pytest.approx(right)


def test_soft_labels_are_learned_as_probabilities() -> None:
    student, x = linear(4, 3), points()
    y = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    module = DistillationModule(None, student, [HardLabel(label_smoothing=0.1)])
    torch.testing.assert_close(module.losses((x, y))["hard_label"], F.cross_entropy(student(x), y, label_smoothing=0.1))
    logged = trainer().validate(module, DataLoader([(x, y)], batch_size=None), verbose=False)[0]
    assert logged["val_accuracy"] == pytest.approx((student(x).argmax(-1) == y.argmax(-1)).float().mean().item())
    rows = batch("token_classification", classes=3)
    model = bert("TokenClassification", num_labels=3)
    soft = F.one_hot(rows["labels"].clamp(min=0), 3).float()
    real = rows["attention_mask"].bool()
    found = DistillationModule(None, model).eval().losses({**rows, "labels": soft})["hard_label"]
    torch.testing.assert_close(
        found, F.cross_entropy(model(rows["input_ids"], rows["attention_mask"]).logits[real], soft[real])
    )


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0.5, 1.0, 0, 0, 0, 0]), "to be classes, but got 0.5.*task='regression'"),
        (torch.tensor([0.0, 1, 2, float("nan"), 0, 0]), "to be finite, but got nan as label 3"),
        (torch.tensor([0.0, 1, 2, float("inf"), 0, 0]), "to be finite, but got inf as label 3"),
        (torch.tensor([[1, 1, 0]] * 6), r"sum to 1 in each row, but got \[1.0, 1.0, 0.0\] in row 0.*multi-label"),
        (torch.tensor([[1.5, -0.5, 0.0]] * 6), "probabilities that sum to 1"),
        (torch.tensor([[True, True, False]] * 6), "multi-label"),
        (torch.zeros(6, 3), "probabilities that sum to 1"),
        (torch.zeros(6, 2), r"to have the shape \[6\].*float32 of shape \[6, 2\]"),
        (torch.zeros(6, 2, dtype=torch.long), r"to have the shape \[6\].*int64 of shape \[6, 2\]"),
        (torch.zeros(5, dtype=torch.long), r"to have the shape \[6\]"),
        (torch.tensor([0, 1, 2, 3, 0, 0]), r"in \[0, 2\], but got 3"),
        (torch.tensor([0, 1, 2, -1, 0, 0], dtype=torch.int8), r"in \[0, 2\], but got -1"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Tensor, message: str) -> None:
    for student in (linear(4, 3), bert(num_labels=3)):
        x: Any = points()
        given: Any = (x, labels)
        if isinstance(student, nn.Linear) is False:
            given = {"input_ids": torch.ones(6, 4, dtype=torch.long), "labels": labels}
        with pytest.raises(ValueError, match=message):
            DistillationModule(None, student).losses(given)


def test_classes_that_a_float_cannot_tell_apart_are_refused() -> None:
    for dtype, classes in ((torch.bfloat16, 300), (torch.float16, 3000)):
        with pytest.raises(ValueError, match=f"to tell {classes} classes apart, but got {dtype}"):
            DistillationModule(None, linear(4, classes)).losses((points(), torch.zeros(6, dtype=dtype)))


@pytest.mark.parametrize("labels", [["a", "b"], "ab", b"ab", [b"a", b"b"], [0, None], {"x": 1}, np.array(["a", "b"])])
def test_labels_that_are_no_numbers_are_refused(labels: Any) -> None:
    for given in ((points(2), labels), {"input": points(2), "label": labels}):
        with pytest.raises(TypeError, match=r"labels of a batch to be numbers, but got a .*Number the classes from 0"):
            DistillationModule(None, linear(4, 3)).losses(given)


@pytest.mark.parametrize("shape", [(3, 6, 7), (3, 7), (3, 3), (3, 5, 5, 5)])
def test_classes_in_another_dimension_than_the_last_are_refused(shape: tuple[int, ...]) -> None:
    kind: Any = {2: nn.Conv1d, 3: nn.Conv2d, 4: nn.Conv3d}[len(shape)]
    x = torch.randn(2, *shape)
    for labels in (None, torch.zeros(2, *shape[1:], dtype=torch.long)):
        module = DistillationModule(kind(3, 7, 1), kind(3, 7, 1), [SoftTarget()] if labels is None else None)
        with pytest.raises(ValueError, match=r"shape \[rows, classes\], but got .*task='segmentation'"):
            module.losses((x, labels))
    with pytest.raises(ValueError, match="shape"):
        trainer().validate(module, DataLoader([(x, labels)], batch_size=None), verbose=False)


def test_dense_answers_with_classes_last() -> None:
    class Segmenter(nn.Conv2d):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).movedim(1, -1)

    torch.manual_seed(0)
    teacher, student, x, y = (
        Segmenter(3, 5, 1),
        Segmenter(3, 5, 1),
        torch.randn(2, 3, 6, 5),
        torch.randint(5, (2, 6, 5)),
    )
    y[0, 0] = -100
    module = DistillationModule(teacher, student, [SoftTarget(1.0), HardLabel()], task="token_classification")
    found = module.losses((x, y))
    torch.testing.assert_close(found["hard_label"], F.cross_entropy(student(x).movedim(-1, 1), y))
    p, q = teacher(x).log_softmax(-1)[y >= 0], student(x).log_softmax(-1)[y >= 0]
    torch.testing.assert_close(found["soft_target"], F.kl_div(q, p, log_target=True, reduction="batchmean"))


# -- regression ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outputs", [1, 3])
def test_real_values(outputs: int) -> None:
    settings = {"num_labels": outputs, "problem_type": "regression", "initializer_range": 0.5}
    teacher, student, rows = bert(**settings), bert(**settings), batch("regression", 8)
    y = torch.randn(8, outputs)
    rows["labels"] = y.squeeze(-1)
    module = DistillationModule(teacher, student).eval()
    found = module.losses(rows)
    with torch.no_grad():
        s, t = (model(rows["input_ids"], rows["attention_mask"]).logits for model in (student, teacher.eval()))
    torch.testing.assert_close(found["soft_target"], F.mse_loss(s, t))
    torch.testing.assert_close(found["hard_label"], F.mse_loss(s, y))
    halves = [{key: value[i : i + 4] for key, value in rows.items()} for i in (0, 4)]
    logged = trainer().validate(module, DataLoader(halves, batch_size=None), verbose=False)[0]
    for name, other in (("val_pearson", y), ("val_agreement", t)):
        each = [np.corrcoef(s[:, i].numpy(), other[:, i].numpy())[0, 1] for i in range(outputs)]
        assert logged[name] == pytest.approx(np.mean(each), abs=1e-4)


def test_real_values_of_a_plain_module() -> None:
    student, x, y = linear(4, 2), points(), points(6, 2)
    module = DistillationModule(linear(4, 2, 1), student, task="regression")
    torch.testing.assert_close(module.losses((x, y))["hard_label"], F.mse_loss(student(x), y))
    ints = DistillationModule(None, linear(4, 1), task="regression").losses((x, torch.arange(6)))["hard_label"]
    torch.testing.assert_close(ints, F.mse_loss(linear(4, 1)(x)[:, 0], torch.arange(6.0)))
    for labels, message in (
        (torch.full((6, 2), float("nan")), r"to be finite.* Leave the row out\.$"),
        (torch.ones(6, 2, dtype=torch.bool), "numbers, but got torch.bool"),
        (torch.ones(6), r"to be \[6, 2\] numbers"),
        (torch.ones(4, 3), r"to be \[6, 2\] numbers"),
    ):
        with pytest.raises(ValueError, match=message):
            module.losses((x, labels))
    assert TASKS["regression"].has_label((x, torch.full((6, 2), -100.0)))
    for objective in (TopKSoftTarget(), Decoupled()):
        with pytest.raises(ValueError, match="objectives on real values in regression"):
            DistillationModule(linear(4, 2), linear(4, 2, 1), [objective], task="regression")
    DistillationModule(linear(4, 2), linear(4, 2, 1), [LogitsMSE()], task="regression").losses((x, None))


# -- batches without labels ------------------------------------------------------------------------------------------


def test_a_batch_without_labels_counts_nothing() -> None:
    x, y = points(4), torch.tensor([0, 1, 2, 0])
    for nothing in (None, torch.full((4,), -100)):
        found = []
        for batches in ([(x, y)], [(x, y), (x + 1, nothing)]):
            torch.manual_seed(0)
            student = linear(4, 3)
            module = DistillationModule(None, student, optimizer=lambda p: torch.optim.SGD(p, 0.1))
            run = trainer()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                run.fit(module, DataLoader(batches * 2, batch_size=None), DataLoader(batches, batch_size=None))
            said = [str(w.message) for w in caught if "has no label" in str(w.message)]
            assert len(said) == len(batches) - 1
            found.append((student.weight, run.callback_metrics["val_hard_label"], run.callback_metrics["val_accuracy"]))
        for one, other in zip(*found, strict=True):
            torch.testing.assert_close(one, other)


@pytest.mark.filterwarnings("ignore:A batch of the .* data has no label")
@pytest.mark.parametrize("where", ["train", "validate"])
def test_data_without_any_label_are_an_error(where: str) -> None:
    for batches in ([(points(4), None)] * 2, [(points(4), torch.full((4,), -100))] * 2):
        module, loader = DistillationModule(linear(4, 3), linear(4, 3, 1)), DataLoader(batches, batch_size=None)
        with pytest.raises(ValueError, match=rf"data to {where} on to have labels for the objectives \['hard_label'\]"):
            getattr(trainer(), "fit" if where == "train" else where)(module, loader)
        trainer().fit(DistillationModule(linear(4, 3), linear(4, 3, 1), [SoftTarget()]), loader, loader)


@pytest.mark.filterwarnings("ignore:A batch of the .* data has no label")
def test_language_models_without_labels() -> None:
    full, nothing = batch("causal_lm"), batch("causal_lm")
    nothing["labels"] = torch.full_like(nothing["labels"], -100)
    run = trainer(accumulate_grad_batches=2)
    loader = DataLoader([full, nothing], batch_size=None)
    run.fit(DistillationModule(llama(), llama()), loader, loader)
    assert run.callback_metrics["val_loss"].isfinite()
    with pytest.raises(ValueError, match="not one item of them counts"):
        trainer().fit(DistillationModule(llama(), llama(), [SoftTarget()]), DataLoader([nothing], batch_size=None))


def test_sentences_without_labels_are_learned_from_the_teacher() -> None:
    make = lambda: bert("TokenClassification", num_labels=3)  # noqa: E731
    rows = batch("token_classification", classes=3)
    labelled = rows["labels"][:2]
    module = DistillationModule(make(), make(), [SoftTarget(1.0), HardLabel()]).eval()
    mixed = {**rows, "labels": torch.cat([labelled, torch.full_like(labelled, -100)])}
    student, _ = module.signals(mixed, with_teacher=True)
    assert student.mask is not None
    assert student.mask.tolist() == rows["attention_mask"].bool().tolist()
    found = module.losses(mixed)
    halves = [module.losses({key: value[half] for key, value in mixed.items()}) for half in (slice(2), slice(2, 4))]
    torch.testing.assert_close(found["hard_label"], halves[0]["hard_label"])
    counts = [int(rows["attention_mask"][half].sum()) for half in (slice(2), slice(2, 4))]
    mean = sum(n * half["soft_target"] for n, half in zip(counts, halves, strict=True)) / sum(counts)
    torch.testing.assert_close(found["soft_target"], mean)


@pytest.mark.filterwarnings("ignore:.* of .* calibration rows have no label")
def test_calibration_leaves_rows_without_labels_out() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2))
    x = points(60)
    y = (x[:, 0] > 0).long()
    reports = []
    for batches in (
        [(x[:40], y[:40])],
        [(x[:40], y[:40]), (x[40:], torch.full((20,), -100)), (x[40:], None)],
    ):
        reports.append(calibrate(EarlyExitModel(student, make_ramps(student, layers="0")), batches, max_drop=0.6))
        del student.ramps
    assert reports[0].as_dict() == reports[1].as_dict()


# -- where inputs and labels are in a batch, what is logged ----------------------------------------------------------


@pytest.mark.parametrize("key", ["labels", "label", "label_ids"])
def test_batches_that_are_mappings_for_a_plain_module(key: str, tmp_path: Path) -> None:
    student, x, y = nn.Sequential(linear(4, 3)), points(), torch.tensor([0, 2, 1, 1, 0, 2])
    module = DistillationModule(None, student)
    torch.testing.assert_close(module.losses({"image": x, key: y})["hard_label"], F.cross_entropy(student(x), y))
    torch.testing.assert_close(module({"image": x, key: y}), student(x))
    with pytest.raises(ValueError, match=r"inputs \['input'\] of `Sequential.forward`, but got the keys \['a', 'b', "):
        module.losses({"a": x, "b": x, key: y})


def test_callbacks_read_mappings_for_a_plain_module(tmp_path: Path) -> None:
    make = lambda: nn.Sequential(nn.Linear(4, 32), nn.Linear(32, 32), nn.Linear(32, 1))  # noqa: E731
    rows = [{"image": x, "label": torch.tensor(1.0)} for x in points(64)]
    callbacks = [
        TeacherCache(str(tmp_path / "cache"), top_k=1),
        GPTQ(8, group_size=32, include=["1"], folder=str(tmp_path / "gptq")),
    ]
    run = trainer(callbacks=callbacks, log_every_n_steps=1)
    run.fit(DistillationModule(make(), make()), DataLoader(rows, 32), DataLoader(rows, 32))
    assert run.callback_metrics["val_agreement"].isfinite()


def test_several_loaders_are_scored_apart() -> None:
    student, x = linear(4, 3), points(12)
    right = student(x).argmax(-1)
    good, bad = [(x, right)], [(x, (right + 1) % 3)]
    run = trainer()
    loaders = [DataLoader(rows, batch_size=None) for rows in (good, bad, good + bad)]
    run.validate(DistillationModule(linear(4, 3, 1), student), loaders, verbose=False)
    accuracy = [run.callback_metrics[f"val_accuracy/dataloader_idx_{i}"].item() for i in range(3)]
    assert accuracy == [1.0, 0.0, 0.5]
    assert "val_agreement/dataloader_idx_2" in run.callback_metrics
    run.test(DistillationModule(None, student), loaders[:2], verbose=False)
    assert run.callback_metrics["test_accuracy/dataloader_idx_1"] == 0.0
    assert len(run.predict(DistillationModule(None, student), loaders)) == 3


def test_metrics_are_logged_by_the_names_people_expect() -> None:
    student, x, y = linear(4, 2), points(), torch.tensor([0, 1, 1, 0, 1, 0])
    for metrics, names in (
        (MulticlassF1Score(2), ["val_f1"]),
        ({"macro_f1": MulticlassF1Score(2), "auc": BinaryAUROC()}, ["val_macro_f1", "val_auc"]),
        (MetricCollection({"acc": MulticlassAccuracy(2)}), ["val_acc"]),
        (MetricCollection([MulticlassAccuracy(2)]), ["val_MulticlassAccuracy"]),
        (BinaryAUROC(), ["val_auroc"]),
        ([BinaryAUROC(), MulticlassF1Score(2)], ["val_auroc", "val_f1"]),
        (MetricCollection({"f": MulticlassF1Score(2)}, prefix="p_", postfix="_end"), ["val_f_end"]),
    ):
        for model in (student, linear(4, 1)):
            module = DistillationModule(None, model, metrics=metrics)
            logged = trainer().validate(module, DataLoader([(x, y)], batch_size=None), verbose=False)[0]
            assert logged.keys() == {"val_loss", "val_hard_label", *names}
    with pytest.raises(TypeError, match="`metrics` to be a torchmetrics metric"):
        DistillationModule(None, student, metrics={"f1": "f1"})  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="different names"):
        DistillationModule(None, student, metrics=[MulticlassF1Score(2), MulticlassF1Score(2)])


def test_an_early_exit_model_is_tested_on_several_loaders() -> None:
    torch.manual_seed(0)
    student, x = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 2)), points()
    model = EarlyExitModel(student, make_ramps(student, layers="0"))
    right = student(x).argmax(-1)
    loaders = [DataLoader([(x, y)], batch_size=None) for y in (right, 1 - right, right.float())]
    found = trainer().test(model, loaders, verbose=False)
    assert [f"{scores[f'test_accuracy/dataloader_idx_{i}']:.0f}" for i, scores in enumerate(found)] == ["1", "0", "1"]
