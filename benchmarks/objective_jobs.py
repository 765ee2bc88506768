"""What benchmarks/objectives.py trains: data, teacher and students of each job, and the lists of objectives."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import default_collate

from lightning_distill import student_from_teacher
from lightning_distill.data import BucketBatchSampler, ImageData, TextClassificationData
from lightning_distill.models.cifar_resnet import CifarResNet
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.objectives import (
    AttentionMap,
    AttentionRelation,
    AttentionTransfer,
    Contrastive,
    Correlation,
    CurriculumTemperature,
    Decoupled,
    Flow,
    HardLabel,
    HiddenState,
    HiddenStateCosine,
    LogitsCosine,
    LogitsMSE,
    NeuronSelectivity,
    Objective,
    PatientHiddenState,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTarget,
    TopKSoftTarget,
    UniversalLogit,
)

SHARED = Path(__file__).resolve().parents[2] / "shared"
# The order in memory that convolutions are fastest in on a CPU.
CHANNELS_LAST: dict[str, Any] = {"memory_format": torch.channels_last}
#: By name: makes a list of objectives a stage; stages share the steps evenly.
Combinations = dict[str, Callable[[], list[list[Objective]]]]


@dataclass
class Job:
    """A task to be learned, by one or more kinds of student.

    Args:
        data: Gives the batches.
        teacher: The model; one without a head for the task is fine-tuned first, with ``teacher_lr``.
        students: How each kind of student is made of the teacher, and its learning rate.
        combinations: What is compared, each under its name; one is "hard labels only".
        test: What the accuracy is measured on, in words.
        teacher_lr: Learning rate of the teacher's fine-tuning; None for a teacher that has its head.
    """

    data: "TextData | ImageBatches"
    teacher: Callable[[], nn.Module]
    students: dict[str, tuple[Callable[[nn.Module], nn.Module], float]]
    combinations: Combinations
    test: str
    teacher_lr: float | None = None


class TextData:
    """Batches of sentences.

    Args:
        **options: Of :class:`TextClassificationData`.
    """

    def __init__(self, **options: Any) -> None:
        self.module = TextClassificationData(**options)
        self.module.setup()

    def training(self, rows: int | None, epochs: int, seed: int) -> list[dict[str, Tensor]]:
        """All batches of a training on some rows, in order."""
        dataset: Any = self.module.train_dataloader().dataset
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
        sampler = BucketBatchSampler([dataset.lengths[row] for row in chosen], self.module.batch_size, seed=seed)
        batches = []
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            batches += [self.module.collate([dataset[chosen[index]] for index in group]) for group in sampler]
        return batches

    def test(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the test rows."""
        return iter(self.module.test_dataloader())


class ImageBatches:
    """Batches of pictures, their views drawn by the seed of the training; each is made when it is asked for.

    Args:
        **options: Of :class:`ImageData`.
    """

    def __init__(self, **options: Any) -> None:
        self.module = ImageData(**options)
        self.module.setup()

    def training(self, rows: int | None, epochs: int, seed: int) -> "Views":
        """All batches of a training on some rows, in order."""
        dataset: Any = self.module.train_dataloader().dataset
        dataset.seed = seed
        chosen = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(seed))[:rows].tolist()
        sampler = BucketBatchSampler([1] * len(chosen), self.module.batch_size, seed=seed)
        keys = []
        for epoch in range(epochs):
            sampler.set_epoch(epoch)
            keys += [[(chosen[index], epoch) for index in group] for group in sampler]
        return Views(dataset, keys)

    def test(self) -> Iterator[dict[str, Tensor]]:
        """The batches of the test rows."""
        return iter(self.module.test_dataloader())


@dataclass
class Views:
    """Batches of a dataset by the rows and epochs of each."""

    dataset: Any
    keys: list[list[tuple[int, int]]]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return (default_collate([self.dataset[key] for key in keys]) for keys in self.keys)


def predictions() -> list[Objective]:
    return [SoftTarget(temperature=2.0, weight=0.7), HardLabel(weight=0.3)]


def _instead(make: Callable[[], Objective], label: float = 0.3) -> Callable[[], list[list[Objective]]]:
    """An objective on predictions in the place of the soft target."""
    return lambda: [[make(), HardLabel(weight=label)]]


def _beside(make: Callable[[], Objective]) -> Callable[[], list[list[Objective]]]:
    """An objective, with its defaults and weight 1, beside the two predictions."""
    return lambda: [[*predictions(), make()]]


BASE: Combinations = {"hard labels only": lambda: [[HardLabel()]], "SoftTarget": lambda: [predictions()]}

SST2: Combinations = {
    "hard labels only": BASE["hard labels only"],
    "soft": BASE["SoftTarget"],
    "soft + hidden": _beside(lambda: HiddenState("uniform")),
    "soft + attention": _beside(lambda: AttentionMap("uniform", "kl")),
    "soft + relations": _beside(AttentionRelation),
    "TinyBERT, two stages": lambda: [
        [HiddenState("uniform", embedding=True), AttentionMap("uniform")],
        [SoftTarget(temperature=1.0)],
    ],
    "all": lambda: [[*predictions(), HiddenState("uniform"), AttentionMap("uniform", "kl"), AttentionRelation()]],
}

# Objectives on predictions stand in the place of the soft target. Where the authors published weights (of the soft and
# the hard part) and a temperature, these are taken; the others have the weight and the temperature of the soft target.
ON_LOGITS: Combinations = {
    "SoftTarget, reverse_kl": _instead(lambda: SoftTarget(2.0, "reverse_kl", weight=0.7)),
    "SoftTarget, skew_forward_kl": _instead(lambda: SoftTarget(2.0, "skew_forward_kl", weight=0.7)),
    "SoftTarget, skew_reverse_kl": _instead(lambda: SoftTarget(2.0, "skew_reverse_kl", weight=0.7)),
    "SoftTarget, total_variation": _instead(lambda: SoftTarget(2.0, "total_variation", weight=0.7)),
    "SoftTarget, alpha_beta": _instead(lambda: SoftTarget(2.0, "alpha_beta", weight=0.7)),
    "SoftTarget, adaptive_kl": _instead(lambda: SoftTarget(2.0, "adaptive_kl", weight=0.7)),
    "SoftTarget, standardize": _instead(lambda: SoftTarget(2.0, standardize=True, weight=9.0), 0.5),
    "Decoupled": _instead(lambda: Decoupled(4.0), 1.0),
    "Correlation": _instead(lambda: Correlation(4.0), 1.0),
    "CurriculumTemperature": _instead(lambda: CurriculumTemperature(4.0, weight=0.7)),
    "TopKSoftTarget": _instead(lambda: TopKSoftTarget(2, 2.0, weight=0.7)),
    "LogitsMSE": _instead(lambda: LogitsMSE(weight=0.7)),
    "LogitsCosine": _beside(LogitsCosine),
    "UniversalLogit": _beside(UniversalLogit),
}
ON_LAYERS: Combinations = {
    "HiddenState": _beside(lambda: HiddenState("uniform")),
    "HiddenStateCosine": _beside(lambda: HiddenStateCosine([(3, 5)])),  # of the last layers, as DistilBERT has it
    "AttentionMap": _beside(lambda: AttentionMap("uniform", "kl")),
    "AttentionRelation": _beside(AttentionRelation),
    "AttentionTransfer": _beside(AttentionTransfer),
    "NeuronSelectivity": _beside(NeuronSelectivity),
    "PatientHiddenState": _beside(PatientHiddenState),
    "Flow": _beside(Flow),
    "SimilarityPreserving": _beside(SimilarityPreserving),
    "RelationalDistance": _beside(RelationalDistance),
    "RelationalAngle": _beside(RelationalAngle),
    "Contrastive": _beside(Contrastive),
}

# Of convolutions. The weights of HiddenState (FitNets) and AttentionTransfer are those of RepDistiller, whose formulas
# are the same.
_STAGES = [("layer2", "layer2"), ("layer3", "layer3")]
_LAST = _STAGES[-1:]
ON_MAPS: Combinations = {
    "HiddenState": _beside(lambda: HiddenState(_LAST, weight=100.0)),
    "HiddenStateCosine": _beside(lambda: HiddenStateCosine(_LAST)),
    "AttentionTransfer": _beside(lambda: AttentionTransfer(_STAGES, weight=1000.0)),
    "NeuronSelectivity": _beside(lambda: NeuronSelectivity(_LAST)),
    "SimilarityPreserving": _beside(lambda: SimilarityPreserving(_LAST)),
    "RelationalDistance": _beside(lambda: RelationalDistance(_LAST)),
    "Contrastive": _beside(lambda: Contrastive(_LAST)),
}


def _cut(**options: Any) -> Callable[[nn.Module], nn.Module]:
    return lambda teacher: student_from_teacher(teacher, layers="uniform", **options)


NARROW = (_cut(num_layers=4, width=0.5), 5e-4)


def sst2(batch_size: int) -> Job:
    path = SHARED / "models" / "sst2-minilm-l6"
    names = (("train", "train"), ("val", "dev"), ("test", "test"))
    files = {f"{split}_file": SHARED / "data" / "sst2" / f"{name}.tsv" for split, name in names}
    return Job(
        TextData(**files, tokenizer=path, batch_size=batch_size),
        lambda: load_pretrained(path),
        {"3 layers, width 384": (_cut(num_layers=3), 8e-5), "4 layers, width 192": NARROW},
        SST2,
        "1,821 sentences of SST-2",
    )


def trec(batch_size: int) -> Job:
    path = SHARED / "models" / "minilm-l6"
    files = {f"{split}_file": SHARED / "data" / "trec" / f"{split}.tsv" for split in ("train", "test")}
    data = TextData(**files, tokenizer=path, batch_size=batch_size)
    classes = {"num_labels": data.module.num_labels, "id2label": data.module.id2label}
    return Job(
        data,
        lambda: transformers.AutoModelForSequenceClassification.from_pretrained(
            path, trust_remote_code=False, use_safetensors=True, dtype=torch.float32, **classes
        ),
        {"4 layers, width 192": NARROW},
        BASE | ON_LOGITS | ON_LAYERS,
        "500 questions of TREC",
        teacher_lr=8e-5,
    )


def cifar10(batch_size: int) -> Job:
    path = SHARED / "models" / "cifar10-resnet56" / "resnet56.safetensors"
    files = {f"{split}_file": SHARED / "data" / "cifar10" / f"{split}.parquet" for split in ("train", "test")}
    return Job(
        ImageBatches(**files, batch_size=batch_size, padding=4, flip=True),
        lambda: CifarResNet.from_pretrained(path).to(**CHANNELS_LAST),
        {"ResNet-8": (lambda _: CifarResNet(8).to(**CHANNELS_LAST), 3e-3)},
        BASE | ON_LOGITS | ON_MAPS,
        "5,000 pictures of CIFAR-10",
    )


JOBS: dict[str, Callable[[int], Job]] = {"sst2": sst2, "trec": trec, "cifar10": cifar10}
