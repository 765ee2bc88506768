"""Classes in dimension 1: pictures, series and volumes, of plain modules and of SegFormer."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassJaccardIndex

from lightning_distill import DistillationModule
from lightning_distill.callbacks import TeacherCache
from lightning_distill.objectives import HardLabel, SoftTarget
from lightning_distill.tasks import infer_task
from lightning_distill.tasks.named_metrics import named_metrics
from tests.helpers.models import pictures, segformer
from tests.tasks.test_labels import trainer

pytestmark = pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
CONVOLUTIONS: dict[int, Any] = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def conv(dims: int = 2, classes: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    made: nn.Module = CONVOLUTIONS[dims](3, classes, 1)
    return made


def data(dims: int = 2, rows: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (3, 5, 4)[:dims]  # as many steps as classes, too: shapes alone do not tell
    y = torch.randint(3, (rows, *size), generator=generator)
    y[0, 0] = 255
    y[1, 1] = -100
    return torch.randn(rows, 3, *size, generator=generator), y


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_losses_are_those_of_torch(dims: int) -> None:
    (x, y), student, teacher = data(dims), conv(dims), conv(dims, seed=1)
    module = DistillationModule(teacher, student, [SoftTarget(2.0), HardLabel(0.1)], task="segmentation")
    found = module.losses((x, y))
    known = y.masked_fill(y == 255, -100)
    torch.testing.assert_close(found["hard_label"], F.cross_entropy(student(x), known, label_smoothing=0.1))
    p, q = ((model(x) / 2).movedim(1, -1).log_softmax(-1)[known >= 0] for model in (teacher, student))
    torch.testing.assert_close(found["soft_target"], 4 * F.kl_div(q, p, log_target=True, reduction="batchmean"))
    scores = trainer().validate(
        DistillationModule(teacher, student, task="segmentation", metrics=named_metrics("mean_iou", "segmentation", 3)),
        DataLoader([(x, y)], batch_size=None),  # type: ignore[arg-type]
        verbose=False,
    )[0]
    index = MulticlassJaccardIndex(3, ignore_index=-100)
    assert scores["val_mean_iou"] == pytest.approx(index(student(x).argmax(1), known).item())
    same = (student(x).argmax(1) == teacher(x).argmax(1))[known >= 0].float().mean()
    assert scores["val_agreement"] == pytest.approx(same.item())


def test_one_logit_is_that_of_two_classes() -> None:
    (x, y), student = data(), conv(classes=1)
    y = y.masked_fill(y == 2, 255)
    found = DistillationModule(None, student, task="segmentation").losses((x, y.to(torch.int16)))["hard_label"]
    known = (y >= 0) & (y < 2)
    expected = F.binary_cross_entropy_with_logits(student(x)[:, 0][known], y[known].float())
    torch.testing.assert_close(found, expected)


def test_accumulated_batches_train_as_one() -> None:
    x, y = data()
    found = []
    for parts in ([(x, y)], [(x[:1], y[:1]), (x[1:], y[1:])]):
        arguments: dict[str, Any] = {"task": "segmentation", "optimizer": lambda p: torch.optim.SGD(p, 1.0)}
        module = DistillationModule(conv(seed=1), conv(), **arguments)
        trainer(accumulate_grad_batches=len(parts)).fit(module, DataLoader(parts, batch_size=None))  # type: ignore[arg-type]
        found.append(module.student.weight.detach())
    torch.testing.assert_close(*found)


def test_a_cache_keeps_what_counts(tmp_path: Path) -> None:
    rows = pictures()
    assert infer_task(segformer()) == "segmentation"
    module = DistillationModule(segformer(num_labels=3, layers=3), segformer(num_labels=3)).eval()
    expected = module.losses(rows)
    cache = TeacherCache(tmp_path / "cache", dtype="float32")
    cache.attach(module)
    for _ in range(2):
        torch.testing.assert_close(module.losses(rows), expected)
    assert (cache.hits, cache.misses) == (4, 4)
    cache.detach()


@pytest.mark.parametrize(
    ("student", "labels", "said"),
    [
        (conv(), torch.zeros(4, 2, 2, 2, dtype=torch.long), r"labels of segmentation to have the shape \[4, 3, 5\]"),
        (conv(), torch.full((4, 3, 5), 3), r"in \[0, 2\], but got 3"),
        (conv(1), torch.zeros(4, 4, dtype=torch.long), r"labels of segmentation to have the shape \[4, 3\]"),
        (nn.Linear(3, 3), torch.zeros(4, dtype=torch.long), r"shape \[rows, classes, ...\].*task='classification'"),
        (conv(classes=300), torch.zeros(4, 3, 5, dtype=torch.long), "at most 255 classes in segmentation"),
    ],
)
def test_what_does_not_fit_is_refused(student: nn.Module, labels: Tensor, said: str) -> None:
    x = torch.randn(4, 3) if isinstance(student, nn.Linear) else data(student.weight.ndim - 2)[0]
    with pytest.raises(ValueError, match=said):
        DistillationModule(None, student, task="segmentation").losses((x, labels))


def test_the_guide_of_labels_runs() -> None:
    text = (Path(__file__).parents[2] / "docs" / "labels.md").read_text()
    scope: dict[str, Any] = {}
    for snippet in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
        exec(snippet, scope)
    assert all(loss.isfinite() for loss in scope["losses"].values())
