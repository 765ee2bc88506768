"""Another tokenizer: pairs of tokens, vocabularies, a training."""

from pathlib import Path

import lightning as L
import pytest
import torch
from scipy.stats import wasserstein_distance
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule, functional
from lightning_distill.objectives import HardLabel, SoftTarget, UniversalLogit
from lightning_distill.signals.signals import Signals
from tests.helpers.models import batch, llama


def test_is_scipys_wasserstein_distance_of_the_probabilities_times_their_number() -> None:
    student, teacher = torch.randn(4, 9, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    ours = functional.universal_logit(student, teacher, reduction="none")
    for value, s, t in zip(
        ours, student.softmax(-1), torch.nn.functional.pad(teacher.softmax(-1), (0, 3)), strict=True
    ):
        assert value.item() == pytest.approx(9 * wasserstein_distance(s, t), abs=1e-12)


def test_tokens_are_paired_in_their_order_as_far_as_both_go() -> None:
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(2, 4, 5, generator=generator).requires_grad_()
    teacher = torch.randn(2, 3, 7, generator=generator)
    masks = torch.tensor([[0, 1, 0, 1], [1, 1, 1, 0]]).bool(), torch.tensor([[1, 1, 1], [0, 0, 1]]).bool()
    loss = UniversalLogit()(Signals(student, mask=masks[0]), Signals(teacher, mask=masks[1]))
    pairs = [((0, 1), (0, 0)), ((0, 3), (0, 1)), ((1, 0), (1, 2))]
    expected = [functional.universal_logit(student[s][None], teacher[t][None]) for s, t in pairs]
    assert loss.count() == 3
    torch.testing.assert_close(loss.mean(), torch.stack(expected).mean())
    torch.testing.assert_close(torch.stack([loss.values[s] for s, _ in pairs]), torch.stack(expected))


def test_a_training_with_a_teacher_of_other_words(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher, student = llama(layers=3, vocab_size=96), llama()
    with torch.no_grad():
        # A teacher that is surer than the student, which is hardly surer than nothing.
        teacher.lm_head.weight.mul_(50)
    rows = []
    for seed in range(4):
        own, other = batch("causal_lm", seed=seed), batch("causal_lm", length=11, seed=seed + 9)
        rows.append(own | {f"teacher_{key}": value for key, value in other.items()})
    module = DistillationModule(teacher, student, [UniversalLogit(weight=1.0), HardLabel(weight=0.0)])
    before = module.losses(rows[0])["universal_logit"].item()
    run = L.Trainer(
        accelerator="cpu",
        max_epochs=8,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        log_every_n_steps=1,
    )
    module._optimizer = lambda parameters: torch.optim.AdamW(parameters, lr=1e-2)
    run.fit(module, DataLoader(rows, batch_size=None), DataLoader(rows, batch_size=None))
    assert "val_agreement" not in run.callback_metrics
    assert module.losses(rows[0])["universal_logit"].item() < 0.8 * before


def test_the_way_through_is_named_where_vocabularies_differ() -> None:
    with pytest.raises(ValueError, match=r"same `vocab_size`, but got 64 and 96\..*`objectives\.UniversalLogit`"):
        DistillationModule(llama(vocab_size=96), llama(), [SoftTarget(), UniversalLogit()])
