"""Classes of two models, or of a model and data, are put in one order by their names, or refused."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from lightning_distill import DistillationModule
from lightning_distill.data import TextClassificationData
from lightning_distill.early_exit import EarlyExitModel, make_ramps
from lightning_distill.models.class_names import class_names, class_order, names_of_config
from lightning_distill.teachers.ensemble import TeacherEnsemble
from tests.helpers.models import batch, bert


def named(names: list[str], head: str = "SequenceClassification", **config: Any) -> Any:
    return bert(head, id2label=dict(enumerate(names)), label2id={name: i for i, name in enumerate(names)}, **config)


def sure_of(name: str, names: list[str]) -> Any:
    """A model that answers one class, whatever it reads."""
    model = named(names, layers=1)
    model.classifier.weight.data.zero_()
    model.classifier.bias.data = torch.tensor([5.0 if each == name else -5.0 for each in names])
    return model


def answer(teacher: nn.Module, student: nn.Module) -> str:
    logits = DistillationModule(teacher, student).teacher_step(batch("classification")).logits
    assert len(set(logits.argmax(-1).tolist())) == 1
    return (class_names(student) or ["LABEL_0", "LABEL_1", "LABEL_2"])[int(logits[0].argmax())]


@pytest.mark.parametrize(
    ("names", "other", "index"),
    [
        (["a", "b"], ["a", "b"], None),
        (["a", "b", "c"], ["c", "a", "b"], [1, 2, 0]),
        (["NEG", "POS"], ["pos", "neg"], [1, 0]),
        (["NEG", "POS"], ["neg", "pos"], None),
        (["a", "A"], ["A", "a"], [1, 0]),  # told apart, so both are names
        (["LABEL_0", "LABEL_1"], ["b", "a"], None),
        (["b", "a"], ["LABEL_0", "LABEL_1"], None),
        ([f"LABEL_{i}" for i in range(12)], [f"LABEL_{i}" for i in range(12)], None),
        (["a", "LABEL_1", "c"], ["a", "b", "c"], None),
        (["a", "LABEL_1", "c"], ["c", "b", "a"], [2, 1, 0]),
        (["x", "x"], ["x", "x"], None),
        (["b", "a"], [], ValueError),
        (["a", "b"], ["a", "c"], ValueError),
        (["a", "b"], ["a", "b", "c"], ValueError),
        (["a", "LABEL_1"], ["b", "a"], ValueError),  # a is class 1, and class 1 is something else
        (["x", "x"], ["x", "y"], ValueError),
    ],
)
def test_order(names: list[str], other: list[str], index: Any) -> None:
    if index is ValueError:
        with pytest.raises(ValueError, match="Expected student and teacher to"):
            class_order(names, other)
        return
    found = class_order(names, other)
    assert (found if found is None else found.tolist()) == index


@pytest.mark.parametrize(
    ("id2label", "label2id", "names"),
    [
        ({0: "a", 1: "b"}, None, ["a", "b"]),
        ({"1": "b", "0": "a"}, {"a": "0", "b": "1"}, ["a", "b"]),
        ({0: "LABEL_0", 1: "LABEL_1"}, {"b": 0, "a": 1}, ["b", "a"]),
        ({0: "a", 1: "b"}, {"LABEL_0": 0, "LABEL_1": 1}, ["a", "b"]),
        ({0: "a", 1: "b"}, {"a": 0, "b": 1, "alias of b": 1}, ["a", "b"]),
        ({0: "x", 1: "x"}, {"x": 1}, ["x", "x"]),
        (None, None, None),
        ({0: "a", 1: "b"}, {"a": 1, "b": 0}, "one number for 'a'"),
        ({0: "a", 1: "b"}, {"c": 0, "d": 1}, "one number for 'a'"),
        ({0: "a", 2: "b"}, None, "classes 0 to 1"),
        ({0: "LABEL_1", 1: "LABEL_0"}, None, "'LABEL_1' as the name of class 1 alone"),
        ({"zero": "a", "one": "b"}, None, "numbers in `id2label`"),
    ],
)
def test_names_of_a_config(id2label: Any, label2id: Any, names: Any) -> None:
    config = SimpleNamespace(id2label=id2label, label2id=label2id)
    if isinstance(names, str):
        with pytest.raises(ValueError, match=f"Expected the config of the teacher to have .*{names}"):
            names_of_config(config, "teacher")
    else:
        assert names_of_config(config, "teacher") == names


def test_a_teacher_with_id2label_alone_is_aligned() -> None:
    teacher = sure_of("neg", ["pos", "neg"])
    teacher.config.label2id = None  # as transformers leaves it
    assert answer(teacher, named(["neg", "pos"])) == "neg"


def test_an_ensemble_speaks_in_one_order() -> None:
    orders = ["pos", "neut", "neg"], ["neg", "pos", "neut"], ["NEUT", "NEG", "POS"]
    teachers = [sure_of(order[index], order) for order, index in zip(orders, (2, 0, 1), strict=True)]
    student = named(["neut", "neg", "pos"])

    def answers(teacher: nn.Module) -> torch.Tensor:
        return DistillationModule(teacher, student).teacher_step(batch("classification")).logits.softmax(-1)

    alone = answers(teachers[0])
    for how in ("logits", "probabilities", "sample"):
        ensemble = TeacherEnsemble(teachers, how)
        assert ensemble.class_names == orders[0]
        torch.testing.assert_close(answers(ensemble), alone)
    nested = TeacherEnsemble([TeacherEnsemble(teachers[1:]), teachers[0]])
    torch.testing.assert_close(answers(nested), alone)


def test_an_ensemble_per_token() -> None:
    teacher = named(["O", "B", "I"], "TokenClassification", layers=1)
    student = named(["B", "I", "O"], "TokenClassification", layers=1)
    rows = batch("token_classification", classes=3)
    alone = DistillationModule(teacher, student).teacher_step(rows).logits
    torch.testing.assert_close(DistillationModule(TeacherEnsemble([teacher]), student).teacher_step(rows).logits, alone)
    inputs = {key: value for key, value in rows.items() if key != "labels"}
    torch.testing.assert_close(alone, teacher(**inputs).logits[..., [1, 2, 0]])


def test_an_ensemble_of_other_classes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"teachers\[0\] and teachers\[1\] to name the same classes.*'x'.*'u'"):
        TeacherEnsemble([named(["x", "y"]), named(["u", "v"])])
    with pytest.raises(ValueError, match=r"teachers\[0\] and teachers\[1\] to have the same number of classes"):
        TeacherEnsemble([named(["x", "y"]), named(["x", "y", "z"])])
    with pytest.raises(ValueError, match="student and teacher to name the same classes"):
        DistillationModule(TeacherEnsemble([named(["x", "y"])]), named(["u", "v"]))
    with pytest.raises(ValueError, match="student and teacher to have the same number"):
        DistillationModule(TeacherEnsemble([named(["x", "y", "z"])]), named(["x", "y"]))


def test_teachers_of_an_ensemble_get_what_they_take() -> None:
    from transformers import DistilBertConfig, DistilBertForSequenceClassification

    small = DistilBertForSequenceClassification(
        DistilBertConfig(vocab_size=64, dim=16, hidden_dim=16, n_layers=1, n_heads=2)
    )
    rows = batch("classification") | {"token_type_ids": torch.zeros(4, 8, dtype=torch.long)}
    module = DistillationModule(TeacherEnsemble([small, bert()]), bert())
    expected = module.teacher.teachers[0](rows["input_ids"], rows["attention_mask"]).logits
    expected = (expected + module.teacher.teachers[1](rows["input_ids"], rows["attention_mask"]).logits) / 2
    torch.testing.assert_close(module.teacher_step(rows).logits, expected)


def test_ramps_behind_a_student_of_another_order_are_refused(tmp_path: Path) -> None:
    student = named(["a", "b"], layers=2)
    EarlyExitModel(student, make_ramps(student)).save_pretrained(tmp_path)
    assert EarlyExitModel.from_pretrained(tmp_path).class_names == ["a", "b"]
    with pytest.raises(ValueError, match=r"the ramps' classes in their order, \['a', 'b'\], but got \['b', 'a'\]"):
        EarlyExitModel.from_pretrained(tmp_path, named(["b", "a"], layers=2))
    with pytest.raises(ValueError, match="ramps and student to name the same classes"):
        EarlyExitModel.from_pretrained(tmp_path, named(["b", "c"], layers=2))


def test_an_early_exit_teacher_is_aligned() -> None:
    teacher = named(["a", "b"], layers=2)
    module = DistillationModule(EarlyExitModel(teacher, make_ramps(teacher)), named(["b", "a"]))
    rows = batch("classification")
    inputs = {key: value for key, value in rows.items() if key != "labels"}
    torch.testing.assert_close(module.teacher_step(rows).logits, teacher.eval()(**inputs).logits.flip(-1))


def test_data_of_another_order_are_refused(tmp_path: Path) -> None:
    class Data(L.LightningDataModule):
        label_names = ("pos", "neg")

        def train_dataloader(self) -> Any:
            return [batch("classification")]

    trainer = L.Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path
    )
    with pytest.raises(
        ValueError, match=r"number their classes as the student does, \['neg', 'pos'\].*Pass `label_names"
    ):
        trainer.fit(DistillationModule(None, named(["neg", "pos"])), datamodule=Data())
    with pytest.raises(ValueError, match="student and the data to name the same classes"):
        trainer.fit(DistillationModule(None, named(["neg", "fine"])), datamodule=Data())


def test_placeholder_labels_of_a_file_say_which_class_they_are(tmp_path: Path) -> None:
    def write(name: str, labels: list[Any]) -> Path:
        file = tmp_path / name
        file.write_text("sentence\tlabel\n" + "".join(f"text {label}\t{label}\n" for label in labels))
        return file

    everything = write("all.tsv", [f"LABEL_{i}" for i in range(12)])
    assert TextClassificationData(everything).label_names == [f"LABEL_{i}" for i in range(12)]
    gap = TextClassificationData(write("gap.tsv", ["LABEL_2", "LABEL_0"]))
    assert gap.label2id == {"LABEL_0": 0, "LABEL_1": 1, "LABEL_2": 2}
    names = ["a", "b", "c"]
    follows = TextClassificationData(write("named.tsv", ["LABEL_2", "LABEL_0"] * 2), label_names=names)
    rows = [*follows.rows("train"), *follows.rows("val")]
    assert {text: label for (text,), label in rows} == {"text LABEL_0": 0, "text LABEL_2": 2}
    for labels in (["LABEL_1", "neg"], ["LABEL_0", "LABEL_99999999999"]):
        with pytest.raises(ValueError, match="set `label_names` to their names in order"):
            _ = TextClassificationData(write("mixed.tsv", labels)).label_names


def test_committees_of_one_logit() -> None:
    torch.manual_seed(0)
    one, other, x = nn.Linear(4, 1), nn.Linear(4, 1), torch.randn(5, 4)
    torch.testing.assert_close(TeacherEnsemble([one, other])(x), (one(x) + other(x)) / 2)
    mean = TeacherEnsemble([one, other], "probabilities", weights=[1.0, 3.0])(x).sigmoid()
    torch.testing.assert_close(mean, 0.25 * one(x).sigmoid() + 0.75 * other(x).sigmoid())
    with pytest.raises(ValueError, match="'logits' or 'sample' for regression"):
        TeacherEnsemble([bert(num_labels=1)], "probabilities")
