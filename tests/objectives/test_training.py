"""Objectives inside DistillationModule and a Trainer, on real models and real images."""

from pathlib import Path

import lightning as L
import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_distill import DistillationModule, functional
from lightning_distill.objectives import (
    AttentionMap,
    AttentionRelation,
    AttentionTransfer,
    CurriculumTemperature,
    Flow,
    HardLabel,
    HiddenState,
    HiddenStateCosine,
    NeuronSelectivity,
    PatientHiddenState,
    RelationalDistance,
    SimilarityPreserving,
    SoftTarget,
)
from lightning_distill.teachers.ensemble import TeacherEnsemble
from tests.helpers import models

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:.*`isinstance.treespec, LeafSpec.` is deprecated.*"),
]


QUIET = {"enable_progress_bar": False, "enable_model_summary": False}


def fit(module: L.LightningModule, loader: DataLoader, **flags: object) -> L.Trainer:
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, **QUIET, **flags)
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_the_combined_loss_is_one_line_for_any_heads_and_width(kind: str) -> None:
    make = models.bert if kind == "bert" else models.llama
    teacher = make(layers=4, hidden_size=32, num_attention_heads=4)
    student = make(layers=2)
    module = DistillationModule(
        teacher,
        student,
        [SoftTarget(weight=0.3), HardLabel(weight=0.3), AttentionMap(weight=0.2), HiddenState(weight=0.2)],
    )
    losses = module.losses(models.batch("classification" if kind == "bert" else "causal_lm"))
    assert list(losses) == ["soft_target", "hard_label", "attention_map", "hidden_state"]
    module.total_loss(losses).backward()
    assert all(loss > 0 for loss in losses.values())
    assert module.objectives["hidden_state"].projections[0].weight.grad.abs().sum() > 0
    assert sum("projections" in key for key in module.state_dict()) == 4


def test_relations_take_any_heads_and_width() -> None:
    teacher, student = models.bert(layers=3, hidden_size=48, num_attention_heads=6), models.bert(layers=2)
    module = DistillationModule(teacher, student, [AttentionRelation(), AttentionRelation(("qk",), name="qk")])
    losses = module.losses(models.batch("classification"))
    module.total_loss(losses).backward()
    assert student.bert.encoder.layer[1].attention.self.value.weight.grad.abs().sum() > 0
    module.teardown("fit")
    assert not student.bert.encoder.layer[1]._forward_hooks
    assert student.config._attn_implementation == "sdpa"


def digits() -> tuple[Tensor, Tensor]:
    datasets = pytest.importorskip("sklearn.datasets")
    images, labels = datasets.load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32).view(-1, 1, 8, 8), torch.tensor(labels)


def cnn(width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(1, width, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * width, 10),
    )


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model.eval()(images).argmax(-1) == labels).float().mean().item()


def test_a_cnn_learns_digits_from_another_through_module_paths() -> None:
    images, labels = digits()
    train, test = slice(0, 1400), slice(1400, None)
    L.seed_everything(0, verbose=False)
    teacher, student = cnn(24), cnn(12)
    loader = DataLoader(TensorDataset(images[train], labels[train]), batch_size=64, shuffle=True)
    adam = lambda parameters: torch.optim.Adam(parameters, lr=1e-2)  # noqa: E731
    fit(DistillationModule(None, teacher, [HardLabel()], optimizer=adam), loader, max_epochs=6)
    convolutions = [("0", "0"), ("2", "2")]
    # No label at all: everything that the student knows comes from the teacher.
    objectives = [
        SoftTarget(temperature=2.0),
        HiddenState(convolutions),
        HiddenStateCosine(convolutions),
        AttentionTransfer(convolutions),
        NeuronSelectivity(convolutions, weight=0.1),
        SimilarityPreserving(convolutions),
        RelationalDistance(convolutions),
        Flow(convolutions),
        PatientHiddenState([("6", "6")]),
    ]
    module = DistillationModule(teacher, student, objectives, optimizer=adam)
    trainer = fit(module, loader, max_epochs=6)
    assert accuracy(teacher, images[test], labels[test]) > 0.85
    assert accuracy(student, images[test], labels[test]) > 0.8
    assert all(f"train_{objective.name}" in trainer.callback_metrics for objective in objectives)


def test_a_cnn_of_other_widths_and_sizes_is_projected_and_pooled() -> None:
    torch.manual_seed(0)
    student = nn.Sequential(nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU()), nn.Flatten(), nn.Linear(4 * 36, 3))
    teacher = nn.Sequential(nn.Sequential(nn.Conv2d(1, 6, 3, 2), nn.ReLU()), nn.Flatten(), nn.Linear(6 * 9, 3))
    fitnet = HiddenState([("0", "0")], widths=(4, 6), pool_maps=True)
    objectives = [fitnet, AttentionTransfer([("0", "0")], pool_maps=True)]
    images = torch.randn(5, 1, 8, 8)
    losses = DistillationModule(teacher, student, objectives).losses((images, torch.zeros(5, dtype=torch.long)))
    projection = fitnet.projections[0]
    maps, wanted = nn.functional.adaptive_avg_pool2d(student[0](images), 3), teacher[0](images)
    projected = nn.functional.conv2d(maps, projection.weight[:, :, None, None], projection.bias)
    torch.testing.assert_close(losses["hidden_state"], nn.functional.mse_loss(projected, wanted))
    where = (nn.functional.normalize(x.square().mean(1).flatten(1), dim=1) for x in (maps, wanted))
    torch.testing.assert_close(losses["attention_transfer"], nn.functional.mse_loss(*where))


def test_a_learned_temperature_makes_it_harder_and_is_resumed(tmp_path: Path) -> None:
    def module(warmup: float = 0.01) -> DistillationModule:
        torch.manual_seed(0)
        teacher, student = nn.Linear(4, 3), nn.Linear(4, 3)
        sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
        return DistillationModule(teacher, student, [CurriculumTemperature(4.0, warmup=warmup)], optimizer=sgd)

    batch = (torch.randn(6, 4), torch.zeros(6, dtype=torch.long))
    made = module(warmup=0.5)
    objective = made.objectives["curriculum_temperature"]
    for progress, strength in ((0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (1.0, 1.0)):
        objective.set_progress(progress)
        loss = made.losses(batch)["curriculum_temperature"]
        (found,) = torch.autograd.grad(loss, objective.position)
        with torch.no_grad():
            step = 1e-2
            objective.position += step
            above = made.losses(batch)["curriculum_temperature"]
            objective.position -= 2 * step
            slope = (above - made.losses(batch)["curriculum_temperature"]) / (2 * step)
            objective.position += step
        torch.testing.assert_close(found, -strength * slope, rtol=1e-2, atol=1e-6)
    loader = DataLoader(TensorDataset(*batch), batch_size=2)
    whole = module()
    fit(whole, loader, max_epochs=4)
    first = module()
    fit(first, loader, max_epochs=4, max_steps=6).save_checkpoint(tmp_path / "half.ckpt")
    second = module()
    trainer = L.Trainer(accelerator="cpu", max_epochs=4, logger=False, enable_checkpointing=False, **QUIET)
    trainer.fit(second, loader, ckpt_path=tmp_path / "half.ckpt")
    temperatures = [each.objectives["curriculum_temperature"].temperature for each in (whole, second)]
    assert temperatures[0] == pytest.approx(temperatures[1], rel=1e-6)
    assert temperatures[0] != pytest.approx(4.0, rel=1e-4)


def test_combined_teachers() -> None:
    logits = [torch.randn(3, 5, generator=torch.Generator().manual_seed(seed)) for seed in range(3)]
    shares = torch.tensor([0.2, 0.3, 0.5])[:, None, None]
    mean = functional.combine_teachers(logits, weights=[2.0, 3.0, 5.0])
    torch.testing.assert_close(mean, (shares * torch.stack(logits)).sum(0))
    combined = functional.combine_teachers(logits, how="probabilities", weights=[2.0, 3.0, 5.0], temperature=3.0)
    expected = (shares * (torch.stack(logits) / 3).softmax(-1)).sum(0)
    torch.testing.assert_close((combined / 3).softmax(-1), expected)
    with pytest.raises(ValueError, match=r"`weights`.*2 teachers"):
        functional.combine_teachers(logits[:2], weights=[1.0, -1.0])
    with pytest.raises(ValueError, match="`weights`"):
        TeacherEnsemble([nn.Linear(2, 2)], weights=[0.0])


def test_an_ensemble_of_teachers_of_different_widths_teaches() -> None:
    torch.manual_seed(0)
    teachers = [nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3)) for width in (8, 16)]
    student = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    x = torch.randn(5, 4)
    for how in ("logits", "probabilities", "sample"):
        ensemble = TeacherEnsemble(teachers, how)
        module = DistillationModule(ensemble, student, [SoftTarget(), HiddenState([("0", "teachers.1.0")])])
        if how != "sample":
            losses = module.losses((x, torch.zeros(5, dtype=torch.long)))
            assert losses["soft_target"] > 0
    drawn = {tuple(TeacherEnsemble(teachers, "sample")(x)[0].tolist()) for _ in range(20)}
    assert drawn == {tuple(teacher(x)[0].tolist()) for teacher in teachers}


def test_the_decoder_of_an_encoder_decoder_is_distilled_over_its_own_tokens() -> None:
    def t5(layers: int) -> transformers.T5ForConditionalGeneration:
        sizes = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": models.VOCAB}
        return transformers.T5ForConditionalGeneration(transformers.T5Config(**sizes, num_layers=layers))

    objectives = [
        HiddenState([("decoder.block.1", "decoder.block.3")], name="states"),
        AttentionMap([("decoder.block.1", "decoder.block.3")], "kl"),
        HardLabel(),
    ]
    module = DistillationModule(t5(4), t5(2), objectives, task="masked_lm").eval()
    batch = models.tokens()  # rows of the encoder are of other lengths than those of the decoder
    decoder = models.batch("causal_lm", length=6, seed=3)
    batch |= {"decoder_input_ids": decoder["input_ids"], "labels": decoder["labels"]}
    losses = module.losses(batch)
    assert all(loss > 0 for loss in losses.values())

    real = decoder["attention_mask"].bool()
    assert not real.all()
    other = batch | {"decoder_input_ids": torch.where(real, decoder["input_ids"], 7)}
    for name, loss in module.losses(other).items():
        torch.testing.assert_close(loss, losses[name])
