"""Several labels a row: each is a coin, whose loss, divergence and score are those of others."""

from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributions import Bernoulli, kl_divergence
from torch.utils.data import DataLoader
from torchmetrics.classification import BinaryAccuracy, MultilabelAUROC, MultilabelF1Score
from transformers import AutoModelForSequenceClassification

from lightning_distill import DistillationModule, student_from_teacher
from lightning_distill.callbacks import EarlyExit, TeacherCache
from lightning_distill.early_exit import Confidence, EarlyExitModel, LearnedGate, Patience, calibrate, make_ramps
from lightning_distill.objectives import Decoupled, HardLabel, LogitsCosine, SoftTarget, TopKSoftTarget
from lightning_distill.signals import Signals
from lightning_distill.tasks import infer_task
from lightning_distill.teachers import TeacherEnsemble
from tests.helpers.models import batch, bert
from tests.tasks.test_labels import linear, points, trainer

L = 3


def labels(rows: int = 6, seed: int = 0) -> Tensor:
    return torch.randint(0, 2, (rows, L), generator=torch.Generator().manual_seed(seed))


def module_of(objectives: Any = None, **arguments: Any) -> DistillationModule:
    return DistillationModule(linear(4, L, 1), linear(4, L, 2), objectives, task="multi_label", **arguments)


def one(x: Tensor, y: Tensor) -> DataLoader[Any]:
    return DataLoader([(x, y)], batch_size=None)  # type: ignore[arg-type]


def several(**config: Any) -> Any:
    return bert(num_labels=L, problem_type="multi_label_classification", **config)


def test_the_task_is_read_off_the_config() -> None:
    assert infer_task(several()) == "multi_label"
    assert infer_task(bert(num_labels=1, problem_type="multi_label_classification")) == "multi_label"


@pytest.mark.parametrize("make", [Tensor.bool, Tensor.int, Tensor.float, Tensor.half, Tensor.tolist])
def test_labels_of_any_type(make: Any) -> None:
    x, y, module = points(), labels(), module_of([HardLabel()])
    expected = F.binary_cross_entropy_with_logits(module.student(x), y.float())
    torch.testing.assert_close(module.losses((x, make(y)))["hard_label"], expected)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_soft_target_is_the_divergence_of_coins(temperature: float) -> None:
    x, module = points(), module_of([SoftTarget(temperature=temperature)])
    s, t = (Bernoulli(logits=model(x) / temperature) for model in (module.student, module.teacher))  # type: ignore[misc]
    expected = temperature**2 * kl_divergence(t, s).mean()
    torch.testing.assert_close(module.losses((x, labels()))["soft_target"], expected)
    torch.testing.assert_close(module.losses((x, None))["soft_target"], expected)


def test_soft_and_unknown_labels() -> None:
    x, module = points(), module_of([SoftTarget(), HardLabel()])
    soft = torch.rand(6, L, generator=torch.Generator().manual_seed(0))
    expected = F.binary_cross_entropy_with_logits(module.student(x), soft)
    torch.testing.assert_close(module.losses((x, soft))["hard_label"], expected)
    unknown = torch.zeros(6, L, dtype=torch.bool)
    unknown[0, 1] = unknown[3] = True
    known = F.binary_cross_entropy_with_logits(module.student(x)[~unknown], soft[~unknown])
    found = module.losses((x, soft.masked_fill(unknown, -100)))
    torch.testing.assert_close(found["hard_label"], known)
    torch.testing.assert_close(found["soft_target"], module.losses((x, soft))["soft_target"])
    hard = labels()
    known = F.binary_cross_entropy_with_logits(module.student(x)[~unknown], hard[~unknown].float())
    for kind in (torch.long, torch.float):
        found = module.losses((x, hard.masked_fill(unknown, -100).to(kind)))
        torch.testing.assert_close(found["hard_label"], known)
    scores = trainer().validate(module, one(x, hard.masked_fill(unknown, -100).float()), verbose=False)[0]
    reference = MultilabelF1Score(L, ignore_index=-100)(module.student(x).sigmoid(), hard.masked_fill(unknown, -100))
    assert scores["val_macro_f1"] == pytest.approx(reference.item())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("pos_weight", [4.0, [0.5, 1.0, 8.0]])
@pytest.mark.parametrize("soft", [False, True])
def test_weights_of_labels(smoothing: float, pos_weight: Any, soft: bool) -> None:
    x, y = points(), labels().float()
    y = y * 0.75 + 0.1 if soft else y
    module = module_of([HardLabel(smoothing, pos_weight=pos_weight)])
    target = y * (1 - smoothing) + smoothing / 2
    weight = torch.tensor(pos_weight)
    expected = F.binary_cross_entropy_with_logits(module.student(x), target, pos_weight=weight)
    torch.testing.assert_close(module.losses((x, y))["hard_label"], expected)
    one = DistillationModule(None, linear(4, 1), [HardLabel(pos_weight=4.0)])
    expected = F.binary_cross_entropy_with_logits(one.student(x)[:, 0], y[:, 0].round(), pos_weight=torch.tensor(4.0))
    torch.testing.assert_close(one.losses((x, y[:, 0].round()))["hard_label"], expected)


def test_weights_that_do_not_fit_are_refused() -> None:
    for wrong in (0.0, [1.0, -1.0], float("nan")):
        with pytest.raises(ValueError, match="`pos_weight` of objective `hard_label` to be finite and above 0"):
            HardLabel(pos_weight=wrong)
    with pytest.raises(ValueError, match="without `class_weights`"):
        HardLabel(pos_weight=1.0, class_weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="a number or 3 of them, one a label"):
        module_of([HardLabel(pos_weight=[1.0, 2.0])]).losses((points(), labels()))
    with pytest.raises(ValueError, match=r"`pos_weight`.*beside labels that are there or not"):
        DistillationModule(None, linear(4, 3), [HardLabel(pos_weight=2.0)]).losses((points(), torch.arange(6) % 3))


def test_scores_are_those_of_torchmetrics() -> None:
    x, y = points(40), labels(40)
    metrics = {"auroc": MultilabelAUROC(L), "micro": MultilabelF1Score(L, average="micro"), "cells": BinaryAccuracy()}
    module = module_of(metrics=metrics)
    scores = trainer().validate(module, DataLoader(list(zip(x, y, strict=True)), 7), verbose=False)[0]
    p, of_teacher = module.student(x).sigmoid(), module.teacher(x).sigmoid()  # type: ignore[misc]
    for name, metric in metrics.items():
        assert scores[f"val_{name}"] == pytest.approx(metric.clone()(p, y).item())
    assert scores["val_agreement"] == pytest.approx(((p > 0.5) == (of_teacher > 0.5)).float().mean().item())


def test_one_label_is_scored_too() -> None:
    x, y = points(), labels()[:, :1]
    module = DistillationModule(linear(4, 1), linear(4, 1), task="multi_label")
    scores = trainer().validate(module, one(x, y), verbose=False)[0]
    assert 0 <= scores["val_macro_f1"] <= 1
    assert module.losses((x, y[:, 0]))["hard_label"] == module.losses((x, y))["hard_label"]


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (torch.arange(6) % 3, r"shape \[rows, 3\].*but got torch.int64 of shape \[6\].*one_hot"),
        (torch.zeros(6, 4), r"shape \[rows, 3\].*\[6, 4\]"),
        (torch.full((6, 3), 2), "0, 1 or a probability, or -100.*but got 2"),
        (torch.full((6, 3), -0.5), "but got -0.5"),
        (torch.full((6, 3), float("nan")), "but got nan"),
    ],
)
def test_other_labels_are_refused(wrong: Tensor, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        module_of().losses((points(), wrong))
    rows = batch("multi_label", rows=6, classes=L)
    with pytest.raises(ValueError, match=said):
        trainer().fit(DistillationModule(None, several()), DataLoader([{**rows, "labels": wrong}], batch_size=None))


@pytest.mark.parametrize("objective", [Decoupled(), LogitsCosine(), TopKSoftTarget()])
def test_objectives_on_classes_are_refused(objective: Any) -> None:
    with pytest.raises(ValueError, match=r"labels one by one in multi_label, but got .*, which compare classes"):
        module_of([objective])


def test_the_labels_of_a_teacher_are_put_in_the_order_of_the_student() -> None:
    names = ["joy", "anger", "fear"]
    student = several(id2label=dict(enumerate(names)))
    teacher = several(id2label=dict(enumerate(reversed(names))))
    data = batch("multi_label", classes=L)
    module = DistillationModule(teacher, student, [SoftTarget(temperature=1.0)]).eval()
    inputs = data["input_ids"], data["attention_mask"]
    s, t = Bernoulli(logits=student(*inputs).logits), Bernoulli(logits=teacher.eval()(*inputs).logits.flip(1))
    torch.testing.assert_close(module.losses(data)["soft_target"], kl_divergence(t, s).mean())


def test_accumulated_batches_train_as_one(tmp_path: Path) -> None:
    """Also where one of them has no labels, and only the models say how many it would have."""
    x, y = points(9), labels(9)
    parts = [(x[:1], y[:1]), (x[1:5], None), (x[5:], y[5:])]
    whole = torch.cat([y[:1], torch.full((4, L), -100), y[5:]])
    found = []
    for data, steps in (([(x, whole)], 1), (parts, 3)):
        module = module_of(optimizer=lambda p: torch.optim.SGD(p, 1.0))
        with pytest.warns(UserWarning, match="has no label") if steps == 3 else nullcontext():
            trainer(accumulate_grad_batches=steps).fit(module, DataLoader(data, batch_size=None, collate_fn=None))
        found.append(module.student.weight.detach())
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_cache_keeps_a_number_for_each_label(tmp_path: Path, labelled: bool) -> None:
    names = ["joy", "anger", "fear"]
    student = several(id2label=dict(enumerate(names)))
    teacher = several(id2label=dict(enumerate(reversed(names))))
    data = [batch("multi_label", classes=L, seed=seed) for seed in range(2)]
    data = data if labelled else [{k: v for k, v in one.items() if k != "labels"} for one in data]
    module = DistillationModule(teacher, student, [SoftTarget()]).eval()
    expected = [module.teacher_step(one).logits for one in data]
    cache = TeacherCache(tmp_path / "cache", dtype="float32")
    cache.attach(module)
    for _ in range(2):
        for one, logits in zip(data, expected, strict=True):
            torch.testing.assert_close(module.teacher_step(one).logits, logits)
    assert (cache.hits, cache.misses) == (8, 8)
    cache.detach()


def early(criterion: Any) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4))
    student = nn.Sequential(body, nn.Linear(4, L))
    return body, EarlyExitModel(student, make_ramps(student, layers="0", criterion=criterion, task="multi_label"))


@pytest.mark.parametrize("criterion", [Confidence(0.55), Patience(1)])
def test_a_row_leaves_where_its_least_sure_label_is_sure(criterion: Any) -> None:
    body, model = early(criterion)
    x = 3 * points(64)
    logits, left = model.predict(x)
    assert logits.shape == (64, L)
    answers = [model.ramps.ask(layer, body[: layer + 1](x), None)[0] for layer in (0, 1)]  # type: ignore[index]
    if isinstance(criterion, Patience):
        expected = torch.where(((answers[0] > 0) == (answers[1] > 0)).all(1), 1, 2)
    else:
        sure = [((z.sigmoid() - 0.5).abs() + 0.5 > 0.55).all(1) for z in answers]
        expected = torch.where(sure[0], 0, torch.where(sure[1], 1, 2))
    assert left.tolist() == expected.tolist()
    assert len(set(left.tolist())) > 1


def test_ramps_are_trained_and_calibrated() -> None:
    torch.manual_seed(0)
    x = points(200)
    y = (x[:, :L] > 0).long()
    student = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, L))
    teacher = nn.Linear(4, L)  # knows the task
    teacher.load_state_dict({"weight": 5 * torch.eye(L, 4), "bias": torch.zeros(L)})
    adam = lambda parameters: torch.optim.Adam(parameters, 0.05)  # noqa: E731
    module = DistillationModule(teacher, student, task="multi_label", optimizer=adam)
    exits = EarlyExit(layers="0", teacher_weight=0.1, task="multi_label")
    run = trainer(callbacks=[exits], log_every_n_steps=1)
    rows = list(zip(x, y, strict=True))
    run.fit(module, DataLoader(rows * 20, 20), DataLoader(rows, 50))
    assert run.callback_metrics["val_exit0_accuracy"] > 0.9
    model = EarlyExitModel(student)
    report = calibrate(model, DataLoader(rows, 50), max_drop=0.2)
    assert report.guarantee["holds"]
    tested = trainer().test(model, DataLoader(rows, 50), verbose=False)[0]
    assert tested["test_macro_f1"] > 0.9
    with pytest.raises(ValueError, match="to need no gate in multi_label"):
        make_ramps(student, layers="0", task="multi_label", criterion=LearnedGate())


def test_a_step_of_ones_own_gives_plain_logits() -> None:
    class Own(DistillationModule):
        def student_step(self, batch: Any) -> Signals:
            return Signals(self.student(batch[0]), batch[1])

    x, y = points(), labels().float()
    own = Own(linear(4, L, 1), linear(4, L, 2), task="multi_label")
    for name, loss in own.losses((x, y)).items():
        torch.testing.assert_close(loss, module_of().losses((x, y))[name])


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_mean_of_probabilities_is_that_of_sigmoids(temperature: float) -> None:
    x, teachers = points(), [linear(4, L, seed) for seed in (1, 2)]
    plain = TeacherEnsemble(teachers, "probabilities", weights=[1.0, 3.0], temperature=temperature, multi_label=True)
    p, q = ((teacher(x) / temperature).sigmoid() for teacher in teachers)
    torch.testing.assert_close((plain(x) / temperature).sigmoid(), (p + 3 * q) / 4)
    assert TeacherEnsemble([several(), several()], "probabilities").multi_label
    with pytest.raises(ValueError, match="`multi_label` of the `TeacherEnsemble` to be True for the task multi_label"):
        DistillationModule(TeacherEnsemble(teachers, "probabilities"), linear(4, L), task="multi_label")
    with pytest.raises(ValueError, match="to be False for the task classification"):
        DistillationModule(plain, linear(4, L))


def test_what_is_exported_says_that_it_has_several_labels(tmp_path: Path) -> None:
    student = bert(num_labels=L, id2label=dict(enumerate(["joy", "anger", "fear"])))
    module = DistillationModule(several(), student, task="multi_label")
    module.export(tmp_path / "student")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "student")
    assert (again.config.problem_type, again.config.id2label[1]) == ("multi_label_classification", "anger")
    assert infer_task(again) == "multi_label"
    smaller = student_from_teacher(again, num_layers=1)
    assert DistillationModule(again, smaller).task == "multi_label"


def test_weights_of_classes_are_refused_for_those_of_labels() -> None:
    with pytest.raises(ValueError, match="`pos_weight` in the place of `class_weights`"):
        module_of([HardLabel(class_weights=[1.0, 2.0])])
