"""The two forwards of a step, and what they leave behind for the objectives."""

import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lightning_distill import tasks
from lightning_distill.models.batch import batch_of, decoder_token_mask, labels_of, offsets, token_mask
from lightning_distill.models.calling import call_model, logits_of, no_logits
from lightning_distill.models.heads import LANGUAGE_MODELS, TOKEN_TASKS, Task
from lightning_distill.models.inputs import InputCheck
from lightning_distill.objectives.deferred import can_defer
from lightning_distill.objectives.objective import Objective
from lightning_distill.signals.description import find_decoder
from lightning_distill.signals.head import Deferred, Head, find_head, is_known, withheld
from lightning_distill.signals.recorder import Recorder
from lightning_distill.signals.signals import Request, Signals


def before(task: Task, batch: Any) -> Signals:
    """What a batch says before a model runs on it: labels and masks, with logits of width 0.

    Args:
        task: What it asks for.
        batch: What the model reads, see :func:`lightning_distill.models.batch.batch_of`.

    Returns:
        Signals for :meth:`lightning_distill.objectives.Objective.count`.

    Example:
        >>> import torch
        >>> from lightning_distill.step.forwards import before
        >>> before("classification", (torch.zeros(5, 4), torch.arange(5))).logits.shape
        torch.Size([5, 0])
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    dims = 2 if task in TOKEN_TASKS else 1
    first = next(x for x in (labels_of(batch), ids, *tree_leaves(batch)) if isinstance(x, Tensor))
    logits, labels, mask = tasks.align(task, torch.empty(*first.shape[:dims], 0, device=first.device), batch)
    real = token_mask(batch)
    if real is None and ids is not None:
        real = torch.ones_like(ids, dtype=torch.bool)
    return Signals(logits, labels, mask, real, regression=task == "regression", offsets=offsets(batch))


class Forwards:
    """Runs student and teacher on batches and keeps the signals that objectives ask for.

    Args:
        task: What a batch asks for.
        objectives: By name.
        shared_words: Number of words that both vocabularies have, where the larger one is padded.
        headless: The roles, ``"student"`` or ``"teacher"``, whose model gives no logits.
        own_teacher_inputs: Whether a batch without the teacher's own inputs is refused.
    """

    def __init__(
        self,
        task: Task,
        objectives: Mapping[str, Objective],
        shared_words: int | None,
        headless: Collection[str] = (),
        own_teacher_inputs: bool = False,
    ) -> None:
        self.task, self.objectives, self.shared_words, self.headless = task, objectives, shared_words, headless
        self.own_teacher_inputs = own_teacher_inputs
        self._recorders: dict[str, Recorder] = {}
        self._checks: dict[str, InputCheck] = {}
        # Heads onto a large vocabulary that are kept from making logits during this step, their inputs, and the roles
        # whose heads turned out to be understood (or, False, not to be).
        self._heads: dict[str, Head] = {}
        self._head_inputs: dict[str, Tensor] = {}
        self._known_heads: dict[str, bool] = {}

    def run(self, role: str, model: nn.Module, batch: Any) -> Signals:
        """One model's forward.

        Args:
            role: ``"student"`` or ``"teacher"``.
            model: The model.
            batch: The batch.

        Returns:
            What it leaves behind, with empty logits where they are deferred.
        """
        own = batch_of(role, batch)
        if role == "teacher" and self.own_teacher_inputs and own is batch:
            raise ValueError(
                "Expected a batch to have the teacher's own inputs, because its tokenizer is not the student's, but "
                f"got {sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__}. Add `teacher_input_ids` "
                "and `teacher_attention_mask`."
            )
        recorder, batch = self._recorder(role, model), own
        self.look(role, model, batch)
        with ExitStack() as failed:
            failed.callback(self.release_hooks)  # which hold what ran before the failure
            output = call_model(model, batch)
            failed.pop_all()
        self._checks[role].after()
        logits = no_logits(self.task, output) if role in self.headless else logits_of(output)
        captured = recorder.take()
        deferred = None
        head = self._heads.get(role)
        if head is not None and role not in self._head_inputs:
            # Its class reads the weight by itself, and the logits are whole.
            self._known_heads[role], head = False, None
            warnings.warn(
                f"The {role} does not call its last linear layer, so whole logits are computed.", stacklevel=2
            )
        if head is not None:
            if role not in self._known_heads:
                self._known_heads[role] = is_known(head, self._head_inputs[role], logits)
            logits = self._head_inputs[role]
        logits, labels, mask = tasks.align(self.task, logits, batch)
        if head is not None:
            deferred, logits = Deferred(head, logits, self.shared_words), logits[..., :0]
        elif self.shared_words is not None:
            logits = logits[..., : self.shared_words]
        signals = Signals(
            logits, labels, mask, token_mask(batch), deferred=deferred, offsets=offsets(batch), **captured
        )
        if (decoder := find_decoder(model)) is not None:
            signals.decoder, signals.decoder_token_mask = decoder, decoder_token_mask(batch)
        return signals

    @contextmanager
    def deferring(self, models: Mapping[str, nn.Module]) -> Iterator[None]:
        """Let models with a large vocabulary make no logits meanwhile, where nothing needs them whole.

        Args:
            models: By role; without the student nothing is deferred.
        """
        self._heads = self._deferrable(models)
        try:
            with withheld(self._heads) as self._head_inputs:
                yield
        finally:
            self._heads = {}

    def _deferrable(self, models: Mapping[str, nn.Module]) -> dict[str, Head]:
        if self.task not in LANGUAGE_MODELS or not can_defer(self.objectives):
            return {}
        if not all(self._known_heads.values()):
            return {}
        heads = {role: head for role, model in models.items() if (head := find_head(model)) is not None}
        return heads if "student" in heads else {}

    def was_wrong(self, student: Signals, teacher: Signals | None) -> bool:
        """Whether the step must be run again with whole logits: a head was met and not understood.

        Args:
            student: What the student left behind.
            teacher: What the teacher left behind, if it ran.
        """
        signals = {"student": student} | ({} if teacher is None else {"teacher": teacher})
        deferred = [role for role, one in signals.items() if one.deferred is not None]
        if not deferred or all(self._known_heads.values()):
            return False
        if unknown := [role for role in deferred if not self._known_heads[role]]:
            warnings.warn(
                f"The {' and the '.join(unknown)} change their logits after the last linear layer in a way that is not "
                "known here, so whole logits are computed.",
                stacklevel=3,
            )
        return True

    def _recorder(self, role: str, model: nn.Module) -> Recorder:
        if role not in self._recorders:
            request = Request()
            for objective in self.objectives.values():
                request |= getattr(objective, f"{role}_request")
            self._recorders[role] = Recorder(model, request)
        return self._recorders[role]

    def look(self, role: str, model: nn.Module, batch: Any) -> None:
        """Refuse what a model cannot read, see :class:`~lightning_distill.models.inputs.InputCheck`.

        Args:
            role: ``"student"`` or ``"teacher"``.
            model: The model.
            batch: As the model reads it.
        """
        if role not in self._checks:
            rotary_limit = role == "student" and self.task == "causal_lm"
            self._checks[role] = InputCheck(model, role, rotary_limit=rotary_limit)
        self._checks[role].before(batch)

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
