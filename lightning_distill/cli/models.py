"""The teachers and students that flags name, and how large a student they describe."""

import copy
from typing import Any

import transformers
from torch import nn

from lightning_distill.cli.parser import Flags
from lightning_distill.data import RowData
from lightning_distill.models.class_names import are_placeholders, class_names, class_order
from lightning_distill.models.heads import HEAD_CLASSES
from lightning_distill.models.pretrained import has_head, load_pretrained, load_with_new_head, read_config
from lightning_distill.models.tokenizers import check_vocabulary
from lightning_distill.students.depth import half_depth
from lightning_distill.students.sizes import depths
from lightning_distill.tasks import TASKS, infer_task
from lightning_distill.teachers.precision import load_teacher

#: The flags of ``--model`` that say how large a student is that is made of the teacher.
STUDENT_SIZE = ("num_layers", "num_decoder_layers", "width", "compression_ratio", "layers", "init")


def with_new_head(flags: Flags, data: RowData) -> transformers.PreTrainedModel | None:
    """The teacher of ``--model.teacher`` with a head for the data's task, where it is to be fine-tuned and needs one.

    None where it comes with what answers the task, as a language model does.
    """
    if not flags.model.finetune_teacher or data.task not in HEAD_CLASSES:
        return None
    names = {"id2label": data.id2label, "label2id": data.label2id} if data.label_names else {}
    size = {} if data.num_labels is None else {"num_labels": data.num_labels}
    problem = {"problem_type": TASKS[data.task].problem_type}
    teacher: Any = load_with_new_head(flags.model.teacher, "--model.teacher", data.task, **size, **names, **problem)
    return teacher


def align(flags: Flags, data: RowData, teacher: nn.Module) -> None:
    """Give the data the teacher's tokenizer, and number their classes, if they have any, as the teacher does.

    Raises:
        ValueError: If the tokenizer is another model's, the teacher was made for another task, or nobody can know which
            class of the data is which of the teacher's.
    """
    data.read_as(flags.model.teacher, "--model.teacher", teacher)
    if flags.model.finetune_teacher or data.task not in HEAD_CLASSES:
        return  # the classes are those of the data, or there are none
    path, own, given = flags.model.teacher, class_names(teacher, "--model.teacher") or [], flags.data.label_names
    # Other names may say what the data call the teacher's classes; the same in another order cannot.
    same = given and sorted(map(str.casefold, given)) == sorted(map(str.casefold, own))
    if same and class_order(own, given, "--model.teacher", "--data.label_names") is not None:
        raise ValueError(f"--data.label_names has the classes {given}, and --model.teacher {own}, in this order")
    if given is None and not are_placeholders(own):
        data.label_names = own
    elif given is None and data.label_names:
        found = data.label_names
        if are_placeholders(found):
            data.label_names = [*own, *found[len(own) :]]  # a class of the teacher may have no row
        elif data.hub_dataset is None and not data.labels_are_ids:
            raise ValueError(
                f"the config of {path} does not name the teacher's classes, so the labels {found} of the "
                "data could mean any of them; name them in the teacher's order with --data.label_names"
            )
    num_labels = getattr(getattr(teacher, "config", teacher), "num_labels", None)
    if None not in (data.num_labels, num_labels) and data.num_labels != num_labels:
        raise ValueError(
            f"the data have {data.num_labels} classes and the teacher {num_labels}; "
            "--model.finetune_teacher true gives it a new head"
        )
    if TASKS[data.task].problem_type is not None and infer_task(teacher) != data.task:
        raise ValueError(
            f"the data ask for {data.task}, and the teacher was made for {infer_task(teacher)} (`problem_type` in its "
            "config.json says so); --model.finetune_teacher true gives it a new head"
        )


def _are_numbers(names: list[str]) -> bool:
    """Whether labels are numbers, which have an order of their own and are the names of nothing."""
    return all(name.lstrip("-").isdigit() for name in names)


def in_own_precision(flags: Flags, teacher: Any) -> nn.Module:
    """What students imitate: in ``--model.teacher_precision`` a copy, as the report is of the teacher as it is."""
    precision = flags.model.teacher_precision
    return teacher if precision is None else load_teacher(copy.deepcopy(teacher), precision)


def student_size(flags: Flags, teacher: Any) -> dict[str, Any]:
    """What :func:`~lightning_distill.student_from_teacher` takes: half of the layers, if no flag says otherwise."""
    asked = {name: flags.model[name] for name in STUDENT_SIZE}
    if all(asked[name] is None for name in ("num_layers", "num_decoder_layers", "width", "compression_ratio")):
        asked |= half_depth(depths(type(teacher), teacher.config))
    return asked


def named_student(flags: Flags, teacher: Any, data: Any) -> transformers.PreTrainedModel:
    """The student of ``--model.student``; a classifier has a new head for the teacher's classes where it has none.

    Raises:
        ValueError: If the student numbers classes otherwise, or reads text in other words.
    """
    path: str = flags.model.student
    student: Any
    if data.task in HEAD_CLASSES and not has_head(read_config(path, "--model.student")):
        names = {"id2label": teacher.config.id2label, "label2id": teacher.config.label2id}
        problem = {"problem_type": teacher.config.problem_type}
        student = load_with_new_head(path, "--model.student", data.task, **names, **problem)
    else:
        student = load_pretrained(path, "--model.student")
    if data.task in HEAD_CLASSES:
        own, theirs = class_names(student, "--model.student"), class_names(teacher, "--model.teacher")
        for others, what in ((theirs, "--model.teacher"), (data.label_names, "the data")):
            if not own or not others or _are_numbers(others):
                continue
            if class_order(own, others, "--model.student", what) is not None:
                raise ValueError(f"--model.student has the classes {own}, and {what} {others}, in this order")
    if data.tokenizer is None:
        return student
    advice = "--model.student must read text in the words of --model.teacher, whose tokenizer the data have."
    check_vocabulary(student, teacher, padded=True, advice=advice)
    return student
