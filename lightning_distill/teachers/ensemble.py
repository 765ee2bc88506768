"""Several teachers as one."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_distill.functional import combine_teachers
from lightning_distill.models.calling import call_model, logits_of
from lightning_distill.models.class_names import are_placeholders, class_names, class_order

How = Literal["logits", "probabilities", "sample"]


class TeacherEnsemble(nn.Module):
    """A committee of teachers that gives the logits of one.

    Teachers may have any widths and depths, as long as they read the same inputs and answer the same classes. Each is
    given what it takes of a batch, and its classes are put, by their names, in the order of :attr:`class_names`. Their
    inner signals are reached by module path, such as ``"teachers.0.bert.encoder.layer.2"``.

    Args:
        teachers: The teachers.
        how: ``"logits"``: the mean of the logits; ``"probabilities"``: logits of the mean prediction at
            ``temperature``; ``"sample"``: one teacher, drawn anew for each batch from PyTorch's global generator.
        weights: One number per teacher, at least 0: its share in the mean, or how often it is drawn. Equal where None.
        temperature: Used by ``"probabilities"``: that of the objective that reads the logits.
        multi_label: Whether each logit is that of a label which is there or not, so that probabilities are sigmoids,
            each label's own. None: as the teachers' configs say by ``problem_type``.

    Raises:
        ValueError: If there are no teachers, an argument is out of its range, or the teachers' configs name other
            classes, or other numbers of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lightning_distill.teachers.ensemble import TeacherEnsemble
        >>> ensemble = TeacherEnsemble([nn.Identity(), nn.Linear(2, 2)], weights=[1.0, 0.0])
        >>> ensemble(torch.tensor([[1.0, 2.0]])).tolist()
        [[1.0, 2.0]]

    Source: You et al., "Learning from Multiple Teacher Networks", 2017 (mean); Fukuda et al., "Efficient Knowledge
    Distillation from an Ensemble of Teachers", 2017 (one drawn per batch).
    """

    def __init__(
        self,
        teachers: list[nn.Module],
        how: How = "logits",
        *,
        weights: list[float] | None = None,
        temperature: float = 1.0,
        multi_label: bool | None = None,
    ) -> None:
        super().__init__()
        if how not in get_args(How):
            raise ValueError(f"Expected argument `how` to be one of {get_args(How)}, but got {how!r}.")
        configs = [getattr(teacher, "config", None) for teacher in teachers]
        problems = [getattr(config, "problem_type", None) for config in configs]
        # As in transformers: one logit is a value, unless the config says that it classifies.
        values = [
            p == "regression" or (p is None and getattr(c, "num_labels", 2) == 1)
            for p, c in zip(problems, configs, strict=True)
        ]
        if how == "probabilities" and any(values):
            raise ValueError(
                "Expected argument `how` to be 'logits' or 'sample' for regression, but got 'probabilities'."
            )
        self.teachers = nn.ModuleList(teachers)
        self.multi_label = "multi_label_classification" in problems if multi_label is None else multi_label
        self.how, self.weights, self.temperature = how, weights or [1.0] * len(teachers), temperature
        named = {f"teachers[{i}]": class_names(teacher, f"teachers[{i}]") for i, teacher in enumerate(teachers)}
        known = {role: names for role, names in named.items() if names is not None}
        #: The names of the classes in the order of the logits: the first teacher's that has names; None if none has.
        self.class_names: list[str] | None = None
        self._orders: list[Tensor | None] = [None] * len(teachers)
        if known:
            first = next((role for role, names in known.items() if not are_placeholders(names)), next(iter(known)))
            own = self.class_names = known[first]
            self._orders = [class_order(own, known[role], first, role) if role in known else None for role in named]
        # Says now what would be wrong at the first batch.
        combine_teachers([torch.zeros(1, 2)] * len(teachers), weights=self.weights, temperature=temperature)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Logits of the committee for the inputs that each teacher takes."""
        if self.how == "sample":
            return self._answer(int(torch.multinomial(torch.tensor(self.weights), 1)), args, kwargs)
        logits = [self._answer(index, args, kwargs) for index in range(len(self.teachers))]
        options: dict[str, Any] = {"how": self.how, "weights": self.weights, "temperature": self.temperature}
        if self.multi_label:  # a single logit is that of two classes: a label that is there or not
            return combine_teachers([each.unsqueeze(-1) for each in logits], **options).squeeze(-1)
        return combine_teachers(logits, **options)

    def _answer(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        teacher, order = self.teachers[index], self._orders[index]
        logits = logits_of(teacher(*args, **kwargs) if args else call_model(teacher, kwargs))
        return logits if order is None else logits[..., order.to(logits.device)]
