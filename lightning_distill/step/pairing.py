"""What a student and a teacher are to each other, found out once, before the first step."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import lightning as L
from torch import Tensor, nn

from lightning_distill.models.calling import gives_logits
from lightning_distill.models.class_names import class_names, class_order
from lightning_distill.models.tokenizers import (
    ANOTHER_TOKENIZER,
    OWN_INPUTS,
    check_equal,
    check_sizes,
    check_tokenizers,
    other_tokenizers,
    shared_vocab_size,
)
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.description import describe
from lightning_distill.tasks import Task
from lightning_distill.teachers.ensemble import TeacherEnsemble


@dataclass(frozen=True)
class Pairing:
    """What a student and its teacher are to each other.

    Args:
        class_index: Int64 ``[classes]``, which of the teacher's classes each of the student's is; None: the same.
        shared_vocab_size: Number of words that both vocabularies have, where the larger one is padded.
        headless: The roles, ``"student"`` or ``"teacher"``, whose model gives no logits.
        same_answers: Whether the classes of both mean the same, so that their predictions can be compared.
        own_teacher_inputs: Whether a batch has the teacher's own inputs beside the student's.
    """

    class_index: Tensor | None = None
    shared_vocab_size: int | None = None
    headless: frozenset[str] = frozenset()
    same_answers: bool = True
    own_teacher_inputs: bool = False


def pair(
    student: nn.Module,
    teacher: nn.Module | None,
    task: Task,
    objectives: Mapping[str, Objective],
    *,
    own_steps: Collection[str] = (),
    own_teacher_inputs: bool = False,
) -> Pairing:
    """Refuse what does not fit together, and tell the objectives the two models, and the student its task.

    Args:
        student: The model that learns.
        teacher: The model that is imitated, or None.
        task: What a batch asks for.
        objectives: By name; each is bound to the pair.
        own_steps: The roles whose model is called by a step of the user's own, who knows what it gives.
        own_teacher_inputs: Whether the teacher reads inputs of its own, so that the tokenizers may differ.

    Raises:
        ValueError: If the two share a parameter, their vocabularies, tokenizers, numbers of classes or label names
            differ, or an objective does not fit the task, the pair or the lack of a teacher.
        TypeError: If a model has no forward, or gives no logits and an objective reads them.
    """
    models = {"student": student} | ({} if teacher is None else {"teacher": teacher})
    headless = set()
    for role, model in models.items():
        if role not in own_steps:
            _check_forward(model, role)
            if not _gives_answers(model, role, objectives):
                headless.add(role)
    if task.of_vectors and teacher is not None:
        _check_widths(student, teacher, objectives)
    pairing = Pairing(headless=frozenset(headless), own_teacher_inputs=own_teacher_inputs)
    if teacher is not None:
        pairing = _compare(student, teacher, task, objectives, pairing)
    bind(student, teacher, task, objectives)
    task.tell(student)
    return pairing


def bind(student: nn.Module, teacher: nn.Module | None, task: Task, objectives: Mapping[str, Objective]) -> None:
    """Tell objectives the two models, which are a pair already.

    Args:
        student: The model that learns.
        teacher: The model that is imitated, or None.
        task: What a batch asks for.
        objectives: By name.

    Raises:
        ValueError: If an objective does not fit the task, the pair or the lack of a teacher.
    """
    _check_classes(task, objectives)
    needy = [name for name, objective in objectives.items() if objective.needs_teacher]
    if teacher is None and needy:
        raise ValueError(f"Expected argument `teacher` to be a model, because {needy} learn from it, but got None.")
    student_info = describe(student)
    teacher_info = student_info if teacher is None else describe(teacher)
    for objective in objectives.values():
        objective.bind(student_info, teacher_info)


def _compare(
    student: nn.Module, teacher: nn.Module, task: Task, objectives: Mapping[str, Objective], pairing: Pairing
) -> Pairing:
    comparing = [o.any_vocabulary for o in objectives.values() if o.needs_teacher and o.reads_logits]
    any_vocabulary = bool(comparing) and all(comparing)
    own_inputs, both_answer = pairing.own_teacher_inputs, not pairing.headless
    index = _check_pair(
        student, teacher, task, any_vocabulary=any_vocabulary, same_answers=both_answer, own_inputs=own_inputs
    )
    return Pairing(
        class_index=index,
        shared_vocab_size=shared_vocab_size(student, teacher) if task.of_words and not any_vocabulary else None,
        headless=pairing.headless,
        same_answers=both_answer and not any_vocabulary,
        own_teacher_inputs=own_inputs or (any_vocabulary and other_tokenizers(student, teacher)),
    )


def _check_forward(model: nn.Module, name: str) -> None:
    """Refuse a module without a forward of its own, such as a LightningModule that computes all in its steps."""
    # A module says that it has none by a function of its base class that raises.
    if type(model).forward in (nn.Module.forward, L.LightningModule.forward) and "forward" not in vars(model):
        raise TypeError(
            f"Expected argument `{name}` to be a module with a forward, but got a `{type(model).__name__}` that "
            "has none. Define `forward` to return logits, or pass the network inside it."
        )


def _gives_answers(model: nn.Module, name: str, objectives: Mapping[str, Objective]) -> bool:
    """Whether a model gives logits; one without a head is refused where an objective reads them."""
    if gives_logits(model):
        return True
    if readers := [key for key, o in objectives.items() if o.reads_logits and (name == "student" or o.needs_teacher)]:
        raise TypeError(
            f"Expected argument `{name}` to be a model that gives `logits`, which {readers} read, but got a "
            f"`{type(model).__name__}`. Load it with a head, for example by `AutoModelForSequenceClassification`, "
            "make embeddings of it by `EmbeddingModel.of`, or leave only objectives on hidden states, attention or "
            "modules."
        )
    return False


def _check_classes(task: Task, objectives: Mapping[str, Objective]) -> None:
    """Refuse objectives that compare one class with the others where a task has no such classes."""
    wrong = [name for name, objective in objectives.items() if objective.needs_classes]
    if wrong and not task.exclusive:
        what = "labels one by one" if task.has_classes else "real values"
        weights = ", and `pos_weight` in the place of `class_weights`" if task.has_classes else ""
        raise ValueError(
            f"Expected objectives on {what} in {task.name}, but got {wrong}, which compare classes. Use `SoftTarget` "
            f"or `LogitsMSE`{weights}."
        )


def _check_widths(student: nn.Module, teacher: nn.Module, objectives: Mapping[str, Objective]) -> None:
    """Refuse objectives that compare embeddings number by number where they are not as many."""
    widths = [describe(model).embedding_width for model in (student, teacher)]
    strict = [name for name, o in objectives.items() if o.needs_teacher and o.reads_logits and not o.any_width]
    if None not in widths and widths[0] != widths[1] and strict:
        raise ValueError(
            f"Expected student and teacher to give embeddings of one width for the objectives {strict}, but got "
            f"{widths[0]} and {widths[1]}. Pass `objectives=[EmbeddingDistance()]`, which learns a projection, or "
            "`EmbeddingSimilarity()`, which needs none."
        )


def _check_pair(
    student: nn.Module,
    teacher: nn.Module,
    task: Task,
    *,
    any_vocabulary: bool,
    same_answers: bool,
    own_inputs: bool,
) -> Tensor | None:
    """Refuse two models that cannot be compared; returns what puts the teacher's classes in the student's order."""
    check_not_shared(student, teacher)
    words = task.of_words
    if words and same_answers and not any_vocabulary:
        check_sizes(student, teacher, padded=True, advice=ANOTHER_TOKENIZER)
    if not any_vocabulary and not own_inputs:
        check_tokenizers(student, teacher, ANOTHER_TOKENIZER if words else OWN_INPUTS)
    if words or not same_answers or task.of_vectors:
        return None
    _check_ensemble(teacher, task)
    student_config, teacher_config = getattr(student, "config", None), getattr(teacher, "config", None)
    check_equal("num_labels", student_config, teacher_config, "Load both with the same number of classes.")
    names, teacher_names = class_names(student, "student"), class_names(teacher, "teacher")
    return None if names is None or teacher_names is None else class_order(names, teacher_names)


def _check_ensemble(teacher: nn.Module, task: Task) -> None:
    """Refuse a mean of probabilities that are those of another task."""
    several = task.has_classes and not task.exclusive
    if isinstance(teacher, TeacherEnsemble) and teacher.how == "probabilities" and teacher.multi_label != several:
        raise ValueError(
            f"Expected argument `multi_label` of the `TeacherEnsemble` to be {several} for the task {task.name}, but "
            f"got {teacher.multi_label}: a softmax is over classes, a sigmoid of a label alone."
        )


def check_not_shared(student: nn.Module, teacher: nn.Module) -> None:
    """Refuse a student that would train the teacher with it, because they share a parameter."""
    owned = {parameter.data_ptr(): name for name, parameter in teacher.named_parameters() if not parameter.is_meta}
    owned.pop(0, None)
    for name, parameter in student.named_parameters():
        if not parameter.is_meta and parameter.data_ptr() in owned:
            raise ValueError(
                f"Expected argument `student` to have its own parameters, but got `{name}`, which is the teacher's "
                f"`{owned[parameter.data_ptr()]}`. Copy the teacher first (`copy.deepcopy`), or make the student with "
                "`student_from_teacher`."
            )
