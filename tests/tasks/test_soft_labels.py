"""Labels that are probabilities, as mixup and annotators give them: torch's own losses are the oracles."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.objectives import HardLabel
from tests.helpers.models import bert
from tests.tasks.test_labels import Squeezed, linear, points, trainer

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")


@pytest.mark.parametrize("kind", [nn.Linear, Squeezed])
@pytest.mark.parametrize("column", [False, True])
def test_one_logit_learns_probabilities(kind: Any, column: bool) -> None:
    x, y = points(), torch.tensor([0.0, 0.3, 1.0, -100.0, 0.9, 0.5])
    torch.manual_seed(0)
    given = y[:, None] if column else y
    module = DistillationModule(None, kind(4, 1), [HardLabel(0.1, pos_weight=3.0)])
    s, known = module.student(x).flatten(), y >= 0
    smoothed, weight = 0.9 * y[known] + 0.05, torch.tensor(3.0)
    expected = F.binary_cross_entropy_with_logits(s[known], smoothed, pos_weight=weight)
    torch.testing.assert_close(module.losses((x, given))["hard_label"], expected)
    whole = module.student.state_dict()
    found = []
    for parts, steps in (([(x, given)], 1), ([(x[:2], given[:2]), (x[2:], given[2:])], 2)):
        module = DistillationModule(None, kind(4, 1), optimizer=lambda p: torch.optim.SGD(p, 1.0))
        module.student.load_state_dict(whole)
        trainer(accumulate_grad_batches=steps).fit(module, DataLoader(parts, batch_size=None))  # type: ignore[arg-type]
        found.append(module.student.weight.detach())
    torch.testing.assert_close(*found)
    with pytest.raises(ValueError, match=r"to be probabilities of class 1, but got 1.2.*task='regression'"):
        module.losses((x, given * 1.5 + 0.75))


def test_a_model_of_one_logit_that_is_exported_loads_again(tmp_path: Path) -> None:
    for task in ("classification", "regression", "multi_label"):
        folder = DistillationModule(None, bert(num_labels=1), task=task).export(tmp_path / task)  # type: ignore[arg-type]
        assert DistillationModule(None, str(folder), task=task).task == task  # type: ignore[arg-type]


@pytest.mark.parametrize("weights", [None, [0.5, 1.0, 3.0]])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_soft_labels_of_some_rows_alone(weights: list[float] | None, smoothing: float) -> None:
    """As mixup and annotators give them; a row of -100 has none, as in ``ignore_index``."""
    student, x = linear(4, 3), points()
    y = torch.rand(6, 3, generator=torch.Generator().manual_seed(0)).softmax(-1)
    y[2] = -100
    objective = HardLabel(smoothing, class_weights=weights)
    known, weight = torch.arange(6) != 2, None if weights is None else torch.tensor(weights)
    expected = F.cross_entropy(student(x)[known], y[known], weight, label_smoothing=smoothing)
    torch.testing.assert_close(DistillationModule(None, student, [objective]).losses((x, y))["hard_label"], expected)
    logged = trainer().validate(DistillationModule(None, student), DataLoader([(x, y)], batch_size=None), verbose=False)
    right = (student(x).argmax(-1) == y.argmax(-1))[known].float().mean().item()
    assert logged[0]["val_accuracy"] == pytest.approx(right)
