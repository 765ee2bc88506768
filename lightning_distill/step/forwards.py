"""The two forwards of a step, and what they leave behind for the objectives."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from lightning_distill.models.batch import batch_of, decoder_token_mask, offsets, token_mask
from lightning_distill.models.calling import call_model, evaluating, logits_of, no_logits
from lightning_distill.models.inputs import InputCheck
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.description import find_decoder
from lightning_distill.signals.head import Deferred, withheld
from lightning_distill.signals.recorder import Recorder
from lightning_distill.signals.signals import Request, Signals
from lightning_distill.step.large_vocabulary import LargeVocabulary
from lightning_distill.step.pairing import Pairing
from lightning_distill.tasks import Task
from lightning_distill.teachers.precision import cast_floats, own_precision


class Forwards:
    """Runs student and teacher on batches and keeps the signals that objectives ask for.

    Args:
        task: What a batch asks for.
        objectives: By name; read anew where hooks have been released.
        pairing: What student and teacher are to each other.
    """

    def __init__(self, task: Task, objectives: Mapping[str, Objective], pairing: Pairing) -> None:
        self.task, self.objectives, self.pairing = task, objectives, pairing
        self.vocabulary = LargeVocabulary(objectives)
        self._recorders: dict[str, Recorder] = {}
        self._checks: dict[str, InputCheck] = {}

    @property
    def shared_vocab_size(self) -> int | None:
        """Number of words that both vocabularies have, where the larger one is padded."""
        return self.pairing.shared_vocab_size

    def run(self, role: str, model: nn.Module, batch: Any) -> Signals:
        """One model's forward.

        Args:
            role: ``"student"`` or ``"teacher"``.
            model: The model.
            batch: The batch.

        Returns:
            What it leaves behind, with empty logits where they are deferred.
        """
        batch = self._own_inputs(role, batch)
        recorder = self._recorder(role, model)
        self.look(role, model, batch)
        head = self.vocabulary.head(role, model, batch)
        with ExitStack() as failed:
            failed.callback(self.release_hooks)  # which hold what ran before the failure
            with withheld({} if head is None else {role: head}) as hidden:
                output = call_model(model, batch)
            captured = recorder.take()
            failed.pop_all()
        self._checks[role].after()
        if role in self.pairing.headless:
            logits = no_logits(output, of_tokens=self.task.of_tokens)
        else:
            logits = logits_of(output) if head is None else hidden[role]
        logits, labels, mask = self.task.align(logits, batch)
        deferred = None
        if head is not None:
            deferred, logits = Deferred(head, logits, self.shared_vocab_size), logits[..., :0]
        elif self.shared_vocab_size is not None:
            logits = logits[..., : self.shared_vocab_size]
        decoder = find_decoder(model)
        return Signals(
            logits,
            labels,
            mask,
            token_mask(batch),
            deferred=deferred,
            vectors=self.task.of_vectors,
            offsets=offsets(batch),
            decoder=decoder,
            decoder_token_mask=None if decoder is None else decoder_token_mask(batch),
            **captured,
        )

    def own_step(self, step: Callable[[Any], Signals], student: nn.Module, batch: Any) -> Signals:
        """A step of the user's own, completed by what objectives ask of modules and it does not say.

        Args:
            step: Calls the student.
            student: The student.
            batch: The batch.
        """
        asked = self._request("student").modules
        recorder = Recorder(student, Request(modules=asked))
        try:
            signals = step(batch)
            if asked - signals.modules.keys():
                signals.modules = recorder.take()["modules"] | signals.modules
        finally:
            recorder.remove()
        return signals

    @contextmanager
    def step(self, student: nn.Module, batch: Any) -> Iterator[None]:
        """What the two forwards of a step have in common: bad input is said first, and logits may be deferred.

        Args:
            student: The student.
            batch: The batch.
        """
        # Before the teacher runs, so that what the student cannot read is said first.
        self.look("student", student, batch)
        if self.task.of_words:
            with self.vocabulary.during_step(student, batch):
                yield
        else:
            yield

    def _own_inputs(self, role: str, batch: Any) -> Any:
        own = batch_of(role, batch)
        if role == "teacher" and self.pairing.own_teacher_inputs and own is batch:
            raise ValueError(
                "Expected a batch to have the teacher's own inputs, because its tokenizer is not the student's, but "
                f"got {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}. Add `teacher_input_ids` "
                "and `teacher_attention_mask`."
            )
        return own

    def _recorder(self, role: str, model: nn.Module) -> Recorder:
        if role not in self._recorders:
            self._recorders[role] = Recorder(model, self._request(role))
        return self._recorders[role]

    def _request(self, role: str) -> Request:
        request = Request()
        for objective in self.objectives.values():
            request |= getattr(objective, f"{role}_request")
        return request

    def look(self, role: str, model: nn.Module, batch: Any) -> None:
        """Refuse what a model cannot read, see :class:`~lightning_distill.models.inputs.InputCheck`.

        Args:
            role: ``"student"`` or ``"teacher"``.
            model: The model.
            batch: The batch.
        """
        if role not in self._checks:
            rotary_limit = role == "student" and self.task.labels_itself
            self._checks[role] = InputCheck(model, role, rotary_limit=rotary_limit)
        self._checks[role].before(batch_of(role, batch))

    def look_again(self) -> None:
        """Look at the next batch too where a look is not free: it is of other data."""
        for check in self._checks.values():
            check.look_again()

    def release_hooks(self) -> None:
        """Take every hook off the two models until the next forward."""
        for recorder in self._recorders.values():
            recorder.remove()
        for check in self._checks.values():
            check.remove()
        self._recorders, self._checks = {}, {}


#: A teacher: gives the signals of a batch as its task aligns them, its classes in its own order.
TeacherSource = Callable[[Any], Signals]


@torch.no_grad()
def teacher_forward(module: Any, batch: Any) -> Signals:
    """The forward of a module's teacher: in eval, in its own precision, its classes in its own order.

    Args:
        module: A DistillationModule with a teacher.
        batch: The batch.
    """
    precision = module.teacher_precision
    with ExitStack() as stack:
        if any(part.training for part in module.teacher.modules()):  # outside a run
            stack.enter_context(evaluating(module.teacher))
        if precision is not None:
            batch = cast_floats(batch, stack.enter_context(own_precision(precision, module.device)))
        signals: Signals = module.forwards.run("teacher", module.teacher, batch)
        return signals
