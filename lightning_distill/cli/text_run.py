"""One run of a text classification recipe: its data and teacher, the phases it trains, the report at its end."""

import copy
import json
import time
from dataclasses import dataclass
from typing import Any

import transformers
from jsonargparse import ArgumentParser, Namespace
from torch import nn

from lightning_distill.callbacks import GPTQ
from lightning_distill.cli.report import Column
from lightning_distill.cli.run import Run, student_parser
from lightning_distill.cli.trainer import make_trainer
from lightning_distill.data import TextClassificationData
from lightning_distill.measure import latency_ms
from lightning_distill.models.class_names import are_placeholders, class_names, class_order
from lightning_distill.models.pretrained import (
    check_words,
    has_head,
    load_pretrained,
    load_tokenizer,
    load_with_new_head,
    read_config,
)
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import HardLabel, Objective
from lightning_distill.optim import LRRange, recommended_lr
from lightning_distill.quantization import load, use_kernels

# Small models from scratch want a higher learning rate than pretrained ones, and a teacher wants to be trained out.
GIVEN = {"lr": 8e-5, "epochs": 3, "teacher_epochs": 3}
EMBEDDED = {"lr": 1e-3, "epochs": 2, "teacher_epochs": 4}
EMBEDDED_ROWS_PER_CLASS = 700


def text_parser(description: str | None, *, output_dir: str) -> ArgumentParser:
    """Make the parser of a recipe that distils a text classifier.

    Args:
        description: The recipe's docstring, shown by ``--help``.
        output_dir: Default of ``--output_dir``.

    Returns:
        A parser to which the recipe may add flags of its own.
    """
    parser = student_parser(description, output_dir=output_dir, data=TextClassificationData, baseline=False)
    parser.add_argument("--gptq.bits", type=int | None, help="quantise the student in the end: 2, 3, 4 or 8")
    parser.add_argument("--gptq.group_size", type=int, default=128, help="inputs that share a scale; -1: all")
    parser.add_argument("--gptq.embedding_bits", type=int | None, help="8 or 4; none leaves the embeddings")
    parser.add_argument("--gptq.num_samples", type=int, default=256, help="rows of training data to calibrate on")
    return parser


@dataclass
class TextRun(Run):
    """A run of a text classification recipe.

    Args:
        quantized: The student in few bits, where it was asked for.
    """

    quantized: nn.Module | None = None

    @classmethod
    def folders(cls, config: Namespace) -> list[str]:
        """Those of every recipe, and that of the quantised student."""
        return [*super().folders(config), *(["student-gptq"] if config.gptq.bits is not None else [])]

    @classmethod
    def read(cls, config: Namespace) -> tuple[TextClassificationData, transformers.PreTrainedModel, dict[str, Any]]:
        """The embedded text where the flags name neither teacher nor data, else what they name."""
        files = ("train_file", "val_file", "test_file", "hub_dataset")
        if config.model.teacher or any(config.data[name] for name in files):
            return *_given(config), GIVEN
        return *_embedded(config), EMBEDDED

    def check(self) -> None:
        """Refuse wrong ``--gptq.*`` and ``--data.class_weights``."""
        asked = self.objectives
        if self.data.class_weights is not None and asked and not any(isinstance(one, HardLabel) for one in asked):
            raise ValueError("--data.class_weights needs the objective HardLabel, which learns from labels")
        if self.config.gptq.bits is not None:
            self._gptq()

    def module(self, teacher: Any, student: Any, objectives: list[Objective] | None) -> DistillationModule:
        """The module of a phase, whose hard labels weigh classes as the data ask for."""
        module = super().module(teacher, student, objectives)
        for objective in module.objectives.values():
            if isinstance(objective, HardLabel) and objective.class_weights is None:
                objective.class_weights = self.data.class_weights
        return module

    @property
    def metric(self) -> str:
        """Name of the metric that decides."""
        return "pearson" if self.data.task == "regression" else "accuracy"

    @property
    def recommended(self) -> LRRange | None:
        """The learning rates commonly recommended for the task; None for small models from scratch."""
        if self.defaults is EMBEDDED:
            return None
        task: Any = "regression" if self.data.task == "regression" else "classification"
        rows: Any = self.data.train_dataloader().dataset
        return recommended_lr(task, optimizer=self.config.optimizer.name, num_examples=len(rows))

    def load_student(self, path: str) -> transformers.PreTrainedModel:
        """The student of ``--model.student``, with a new head for the data's classes where it has none."""
        teacher = self.teacher.config
        if not has_head(read_config(path, "--model.student")):
            named: Any = load_with_new_head(
                path, "--model.student", id2label=teacher.id2label, label2id=teacher.label2id
            )
            return named
        student = super().load_student(path)
        # The labels of the data are numbered as the teacher numbers them.
        own = class_names(student, "--model.student")
        names = [class_names(self.teacher, "--model.teacher"), self.data.label_names]
        for others, what in zip(names, ("--model.teacher", "the data"), strict=True):
            if (
                own
                and others
                and not _are_numbers(others)
                and class_order(own, others, "--model.student", what) is not None
            ):
                raise ValueError(f"--model.student has the classes {own}, and {what} {others}, in this order")
        return student

    def quantize(self) -> None:
        """Write a GPTQ student to ``<output_dir>/student-gptq`` and test it, where ``--gptq.bits`` asks for it."""
        if self.config.gptq.bits is None:
            return
        callback = self._gptq()
        trainer = make_trainer(self.parser, self.config, "student-gptq", callbacks=[callback], logger=False)
        module = DistillationModule(None, copy.deepcopy(self.models["student"]), tokenizer=self.data.tokenizer)
        trainer.validate(module, datamodule=self.data, verbose=False)
        # From the folder: that is what was written, and forked processes bring nothing else back.
        self.quantized = load(self.config.output_dir / "student-gptq")
        use_kernels(self.quantized)
        self._test("student-gptq", DistillationModule(None, self.quantized))

    def _gptq(self) -> GPTQ:
        return GPTQ(
            **self.config.gptq.as_dict(),
            monitor=f"val_{self.metric}",
            max_drop=None,
            folder=str(self.config.output_dir),
        )

    def _gptq_summary(self, latency_ms_batch1: float) -> dict[str, Any]:
        written = json.loads((self.config.output_dir / "student-gptq" / "gptq.json").read_text())
        scores = (self.scores[phase][f"test_{self.metric}"] for phase in ("student-gptq", "student"))
        metric, metric_before = scores
        kept = {key: written[key] for key in ("bits", "group_size", "bytes")}
        measured = {"metric": metric, "metric_before": metric_before, "seconds": round(written["seconds"], 1)}
        return {**kept, **measured, "latency_ms_batch1": latency_ms_batch1}

    def test_batches(self, size: int, count: int) -> list[Any]:
        """Batches of test rows in the order of the file.

        Args:
            size: Rows of each.
            count: How many at most; a trial run that tests on a few batches gets as few.
        """
        rows: Any = self.data.predict_dataloader().dataset
        limit = self.config.trainer.limit_test_batches
        count = min(count, limit) if isinstance(limit, int) and limit > 0 else count
        groups = [range(i, min(i + size, len(rows))) for i in range(0, len(rows), size)][:count]
        return [self.data.collate([rows[row] for row in group]) for group in groups]

    def report(self, **more: Any) -> None:
        """Measure the models side by side on rank 0; print the table, write ``summary.json`` and ``curves.png``.

        Args:
            **more: What else ``summary.json`` holds.
        """
        assert self.trainer is not None
        if not self.trainer.is_global_zero:
            return
        metric = self.metric
        seconds = time.perf_counter() - self.started
        timed = self.models if self.quantized is None else {**self.models, "student-gptq": self.quantized}
        options: dict[str, Any] = {"device": self.trainer.strategy.root_device, "progress": self.shows_progress}
        latency = {
            size: latency_ms(timed, self.test_batches(size, count), **options) for size, count in ((1, 64), (32, 8))
        }
        rows = {
            name: {
                **self.sizes(model),
                "metric_name": metric,
                "metric": self.scores[name][f"test_{metric}"],
                "agreement": self.scores[name].get("test_agreement", 1.0),
                "latency_ms_batch1": latency[1][name],
                "latency_ms_batch32": latency[32][name],
            }
            for name, model in self.models.items()
        }
        if self.quantized is not None:
            more["gptq"] = self._gptq_summary(latency[1]["student-gptq"])
        columns = [
            Column("parameters", "parameters", "{:.2f} M", 1e-6),
            Column("on disk", "bytes", "{:.1f} MB", 1e-6),
            Column(f"{metric} (test)", "metric", "{:.4f}", name="metric_retained"),
            Column("agreement", "agreement", "{:.4f}", name=None),
            Column("batch 1", "latency_ms_batch1", "{:.2f} ms", name="latency_batch1"),
            Column("batch 32", "latency_ms_batch32", "{:.1f} ms", name="latency_batch32"),
        ]
        rows_of_test: Any = self.data.predict_dataloader().dataset
        self.write_report(rows, columns, what="rows", available=len(rows_of_test), seconds=seconds, **more)
        if self.quantized is not None:
            print(f"\nThe student in {self.config.gptq.bits} bits: {json.dumps(more['gptq'])}")


def _embedded(config: Namespace) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """Text of the installed packages, and an untrained small BERT for it."""
    data = TextClassificationData.embedded(
        max_rows_per_class=EMBEDDED_ROWS_PER_CLASS, seed=config.seed, **config.data.as_dict()
    )
    assert isinstance(data.tokenizer, transformers.PreTrainedTokenizerBase)
    bert = transformers.BertConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=max(128, data.max_length),
        pad_token_id=data.tokenizer.pad_token_id,
        id2label=data.id2label,
        label2id=data.label2id,
    )
    return data, transformers.BertForSequenceClassification(bert)


def _given(config: Namespace) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """The user's data and teacher; the data number their classes as the teacher does."""
    path = config.model.teacher
    teacher: Any
    given = {"--model.teacher": path, "--data.train_file": config.data.train_file or config.data.hub_dataset}
    if missing := [flag for flag, value in given.items() if not value]:
        raise ValueError(
            "--model.teacher and --data.train_file (or --data.hub_dataset) go together; one is missing: there is no "
            f"{' and no '.join(missing)}"
        )
    with_head = has_head(read_config(path, "--model.teacher"))
    tokenizer = load_tokenizer(path, "--model.teacher")
    arguments = config.data.as_dict() | {"tokenizer": tokenizer, "seed": config.seed}
    if config.model.finetune_teacher:
        data = TextClassificationData(**arguments)
        names = {"id2label": data.id2label, "label2id": data.label2id} if data.label_names else {}
        teacher = load_with_new_head(path, "--model.teacher", num_labels=data.num_labels, **names)
        check_words(tokenizer, teacher, path, "--model.teacher")
        return data, teacher
    if not with_head:
        raise ValueError(
            f"{path}: the teacher has no fine-tuned head; --model.finetune_teacher true fine-tunes it on the data first"
        )
    teacher = load_pretrained(path, "--model.teacher")
    check_words(tokenizer, teacher, path, "--model.teacher")
    own, given = class_names(teacher, "--model.teacher") or [], arguments["label_names"]
    if given is None and not are_placeholders(own):
        arguments["label_names"] = own
    # Other names may say what the data call the teacher's classes; the same in another order cannot.
    same = given and sorted(map(str.casefold, given)) == sorted(map(str.casefold, own))
    if same and class_order(own, given, "--model.teacher", "--data.label_names") is not None:
        raise ValueError(f"--data.label_names has the classes {given}, and --model.teacher {own}, in this order")
    data = TextClassificationData(**arguments)
    if given is None and are_placeholders(own) and data.label_names:
        if are_placeholders(data.label_names):
            # A class of the teacher may have no row.
            data = TextClassificationData(**{**arguments, "label_names": [*own, *data.label_names[len(own) :]]})
        elif data.hub_dataset is None and not _are_numbers(data.label_names):
            raise ValueError(
                f"the config of {path} does not name the teacher's classes, so the labels {data.label_names} of the "
                "data could mean any of them; name them in the teacher's order with --data.label_names"
            )
    if data.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"the data have {data.num_labels} classes and the teacher {teacher.config.num_labels}; "
            "--model.finetune_teacher true gives it a new head"
        )
    return data, teacher


def _are_numbers(names: list[str]) -> bool:
    """Whether labels are numbers, which have an order of their own and are the names of nothing."""
    return all(name.lstrip("-").isdigit() for name in names)
