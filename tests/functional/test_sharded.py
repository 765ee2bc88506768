"""Classes spread over two processes against all of them in one."""

import datetime
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_distill import functional
from lightning_distill.functional.divergences import Divergence

SIZES = (4, 7)


def whole() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    student, teacher = (3 * torch.randn(3, 5, 11, generator=generator, dtype=torch.float64) for _ in range(2))
    student[0, 0, 2] = teacher[0, 0, 2] = float("-inf")
    return student, teacher, torch.rand(3, 5, generator=generator) < 0.7


def losses(loss: Any, student: Tensor, teacher: Tensor, mask: Tensor) -> list[tuple[Tensor, Tensor]]:
    found = []
    for divergence in sorted(set(get_args(Divergence)) - {"adaptive_kl"}):
        leaf = student.clone().requires_grad_()
        value = loss(leaf, teacher, temperature=2.0, divergence=divergence, beta=0.3, alpha=0.2, mask=mask)
        (5 * value).backward()
        assert leaf.grad is not None
        found.append((value.detach(), leaf.grad))
    return found


def work(rank: int, folder: str) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    student, teacher, mask = whole()
    parts = [x.split(SIZES, -1)[rank].contiguous() for x in (student, teacher)]
    torch.save(losses(functional.sharded_soft_target, *parts, mask), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.forks
def test_loss_and_gradient_are_those_of_one_process(tmp_path: Path) -> None:
    mp.start_processes(work, (str(tmp_path),), nprocs=2, start_method="fork")
    expected = losses(functional.soft_target, *whole())
    for rank in range(2):
        for (value, gradient), (whole_value, whole_gradient) in zip(
            torch.load(tmp_path / f"{rank}.pt"), expected, strict=True
        ):
            torch.testing.assert_close(value, whole_value)
            torch.testing.assert_close(gradient, whole_gradient.split(SIZES, -1)[rank])


def test_bad_input_is_said() -> None:
    logits = torch.zeros(2, 3)
    for options, named in (
        ({"divergence": "l2"}, "divergence"),
        (
            {"divergence": "adaptive_kl"},
            "divergence` to be a sum over classes, but got 'adaptive_kl'.*`functional.soft_target",
        ),
        ({"temperature": 0.0}, "temperature"),
    ):
        with pytest.raises(ValueError, match=f"`{named}`"):
            functional.sharded_soft_target(logits, logits, **options)
    with pytest.raises(ValueError, match="same shape"):
        functional.sharded_soft_target(logits, logits[:, :2])
