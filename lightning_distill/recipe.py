"""One run of a text classification recipe: its data and teacher, the phases it trains, the report at its end."""

import copy
import json
import time
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
import transformers
from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from torch import nn

from lightning_distill.callbacks import GPTQ
from lightning_distill.cli import (
    best_checkpoint,
    build_callbacks,
    make_trainer,
    one_line_errors,
    optimizer_from_flags,
    quiet,
    recipe_parser,
    schedule_from_flags,
)
from lightning_distill.data import TextClassificationData
from lightning_distill.measure import count_bytes, count_parameters, latency_ms
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import HardLabel, Objective
from lightning_distill.optim import LRRange, recommended_lr
from lightning_distill.precision import TeacherPrecision, load_teacher
from lightning_distill.pretrained import has_head, load_pretrained, read_config
from lightning_distill.quantization import load, use_kernels
from lightning_distill.report import Curves, plot_curves, print_table, ratios, read_curves, versions, write_summary
from lightning_distill.student import student_from_teacher
from lightning_distill.teacher import has_placeholder_labels

# Small models from scratch want a higher learning rate than pretrained ones, and a teacher wants to be trained out.
GIVEN = {"lr": 8e-5, "epochs": 3, "teacher_epochs": 3}
EMBEDDED = {"lr": 1e-3, "epochs": 2, "teacher_epochs": 4}
EMBEDDED_ROWS_PER_CLASS = 700
say = rank_zero_only(print)
BASELINE = "student_without_distillation"


def text_parser(description: str | None, *, output_dir: str) -> ArgumentParser:
    """Make the parser of a recipe that distils a text classifier.

    Args:
        description: The recipe's docstring, shown by ``--help``.
        output_dir: Default of ``--output_dir``.

    Returns:
        A parser to which the recipe may add flags of its own.
    """
    defaults = {"trainer.enable_model_summary": False, "trainer.gradient_clip_val": 1.0}
    parser = recipe_parser(description, output_dir=output_dir, defaults=defaults)
    parser.add_argument("--model.teacher", type=str | None, help="folder or hub id; none: trained on the embedded text")
    parser.add_argument("--model.num_layers", type=int | None, help="layers of the student (default: half of them)")
    parser.add_argument("--model.width", type=float | None, help="width of the student as a share of the teacher's")
    parser.add_argument("--model.compression_ratio", type=float | None, help="teacher parameters / student parameters")
    parser.add_argument("--model.layers", type=str, default="uniform", help="layers kept: uniform, last, first, skip")
    parser.add_argument("--model.init", type=str, default="teacher", help="weights to begin with: teacher or random")
    parser.add_argument("--model.finetune_teacher", type=bool, default=False, help="fine-tune the teacher first")
    parser.add_argument("--model.teacher_epochs", type=int | None, help="epochs of a teacher trained here")
    parser.add_argument("--model.baseline", type=bool, default=False, help="train a student on the labels alone, too")
    parser.add_argument(
        "--model.teacher_precision",
        type=TeacherPrecision | None,
        help="what the teacher computes in, whatever --trainer.precision is (none: the same)",
    )
    parser.add_argument(
        "--model.gradient_checkpointing", type=bool, default=False, help="less memory of the student, for more time"
    )
    parser.add_argument("--gptq.bits", type=int | None, help="quantise the student in the end: 2, 3, 4 or 8")
    parser.add_argument("--gptq.group_size", type=int, default=128, help="inputs that share a scale; -1: all")
    parser.add_argument("--gptq.embedding_bits", type=int | None, help="8 or 4; none leaves the embeddings")
    parser.add_argument("--gptq.num_samples", type=int, default=256, help="rows of training data to calibrate on")
    parser.add_argument("--objectives", type=list[Objective] | None, help="what the student learns from (see README)")
    return parser


@dataclass
class TextRun:
    """What the phases of one run share: the flags, the data, the teacher, the scores so far.

    Args:
        parser: The parser that made ``config``.
        config: The parsed flags.
        data: The data, read and tokenised.
        teacher: The teacher.
        defaults: Learning rate and epochs where no flag says them.
        started: When the run began, as :func:`time.perf_counter` says it.
        models: The models to report, by phase.
        scores: What each was logged with on the test rows, by phase.
        curves: What each phase of training logged, on rank 0.
        trainer: The one that tested the last phase.
        quantized: The student in few bits, where it was asked for.
        imitated: The teacher in the precision that was asked for; None: as it is.
    """

    parser: ArgumentParser
    config: Namespace
    data: TextClassificationData
    teacher: transformers.PreTrainedModel
    defaults: dict[str, Any]
    started: float
    models: dict[str, transformers.PreTrainedModel] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    trainer: L.Trainer | None = None
    quantized: nn.Module | None = None
    imitated: nn.Module | None = None

    @classmethod
    def start(cls, parser: ArgumentParser, argv: list[str] | None = None) -> "TextRun":
        """Parse the flags, read the data and the teacher, and find what is wrong with them.

        Args:
            parser: From :func:`text_parser`.
            argv: The command line, without the program; None: ``sys.argv``.

        Returns:
            A run; its teacher may still have to be trained, see :meth:`prepare`.

        Raises:
            SystemExit: With code 2, after one line on stderr, before anything is written.
        """
        config = parser.parse_args(argv)
        started = time.perf_counter()
        quiet()
        L.seed_everything(config.seed, workers=True, verbose=False)
        on_the_spot = not (config.model.teacher or config.data.train_file or config.data.hub_dataset)
        with one_line_errors(parser.prog):
            data, teacher = _embedded(config) if on_the_spot else _given(config)
            data.setup()
            run = cls(parser, config, data, teacher, EMBEDDED if on_the_spot else GIVEN, started)
            run.new_student()
            if config.gptq.bits is not None:
                run._gptq()
            build_callbacks(config, "student")
            trainer = make_trainer(parser, config, "student", logger=False)
            if isinstance(trainer.strategy, ModelParallelStrategy):
                raise ValueError("--trainer.strategy: a recipe writes whole models; shard in a script of your own")
        return run

    def prepare(self, *stages: list[Objective] | None) -> None:
        """Find what is wrong with the objectives, then make sure that the teacher knows its task, and score it.

        Args:
            *stages: What each phase learns from.

        Raises:
            SystemExit: With code 2, after one line on stderr, before anything is written.
        """
        with one_line_errors(self.parser.prog):
            self._imitate()
            for objectives in (*stages, self.objectives):
                module = self.module(self.imitated or self.teacher, self.new_student(), copy.deepcopy(objectives))
            optimizer = optimizer_from_flags(self.config, module, self.defaults["lr"])
            # As if for a long training: how long it will be, its Trainer knows.
            schedule_from_flags(self.config, module, optimizer, num_training_steps=10**9)
        if self.config.model.finetune_teacher or not self.config.model.teacher:
            epochs = self.config.model.teacher_epochs or self.defaults["teacher_epochs"]
            say(f"\nTraining the teacher first, for {epochs} epochs: {_describe(self.teacher)}")
            self.teacher.requires_grad_(True)  # the modules above froze it
            self._fit("teacher", self.teacher, teacher=None, objectives=None, epochs=epochs)
        else:
            self._test("teacher", DistillationModule(None, self.teacher))
        self.models["teacher"] = self.teacher
        self._imitate()

    def _imitate(self) -> None:
        """Make the teacher that students see: a copy, as students are made of the one that the report is about."""
        if self.config.model.teacher_precision is not None:
            self.imitated = load_teacher(copy.deepcopy(self.teacher), self.config.model.teacher_precision)

    @property
    def objectives(self) -> list[Objective] | None:
        """What ``--objectives`` asks for, made anew for each phase; None where it asks for nothing."""
        objectives: list[Objective] | None = self.parser.instantiate(self.config).objectives
        return objectives

    @property
    def epochs(self) -> int:
        """Epochs of a phase of the student."""
        return self.config.trainer.max_epochs or self.defaults["epochs"]

    @property
    def metric(self) -> str:
        """Name of the metric that decides."""
        return "pearson" if self.data.task == "regression" else "accuracy"

    def new_student(self) -> transformers.PreTrainedModel:
        """A student as the flags describe it; the same one each time."""
        L.seed_everything(self.config.seed, workers=True, verbose=False)
        model = self.config.model
        num_layers = model.num_layers
        if num_layers is None and model.width is None and model.compression_ratio is None:
            num_layers = max(1, self.teacher.config.num_hidden_layers // 2)
        student: Any = student_from_teacher(
            self.teacher,
            num_layers=num_layers,
            width=model.width,
            compression_ratio=model.compression_ratio,
            layers=model.layers,
            init=model.init,
        )
        return student

    def fit(
        self,
        phase: str,
        student: transformers.PreTrainedModel,
        objectives: list[Objective] | None,
        *,
        epochs: int | None = None,
        monitor: str | None = None,
        report: bool = True,
    ) -> None:
        """Train a student by the teacher, go back to its best epoch, test it, write it to ``<output_dir>/<phase>``.

        Args:
            phase: Name of the phase, and of the row in the report.
            student: The student; trained in place.
            objectives: What it learns from; None: the module's default.
            epochs: How long; None: what the flags say.
            monitor: The validation metric that says which epoch is best; None: that of the task.
            report: Whether the student as it is now has a row in the report; a later phase may train it on.
        """
        epochs = epochs or self.epochs
        say(f"\nTraining {phase.replace('_', ' ')}, for {epochs} epochs: {_describe(student)}")
        self._fit(phase, student, self.imitated or self.teacher, objectives, epochs, monitor)
        if report:
            self.models[phase] = student

    def fit_baseline(self) -> None:
        """Train a student on the labels alone, where ``--model.baseline`` asks for it."""
        if self.config.model.baseline:
            self.fit(BASELINE, self.new_student(), [HardLabel()])

    def _fit(
        self,
        phase: str,
        student: transformers.PreTrainedModel,
        teacher: nn.Module | None,
        objectives: list[Objective] | None,
        epochs: int,
        monitor: str | None = None,
    ) -> None:
        config = self.config
        L.seed_everything(config.seed, workers=True, verbose=False)
        checkpoint = best_checkpoint(config, phase, monitor or f"val_{self.metric}")
        callbacks = build_callbacks(config, phase, recommended=self.recommended, with_teacher=teacher is not None)
        trainer = make_trainer(self.parser, config, phase, callbacks=[*callbacks, checkpoint], max_epochs=epochs)
        if self.recommended is not None and config.lr_finder.suggestion is None:
            self.recommended.warn_if_far(config.optimizer.lr or self.defaults["lr"])
        module = self.module(teacher, student, objectives)
        trainer.fit(module, datamodule=self.data)
        if checkpoint.best_model_path:
            module.load_state_dict(torch.load(checkpoint.best_model_path, weights_only=True)["state_dict"])
        self._test(phase, module)
        if trainer.is_global_zero:
            module.export(config.output_dir / phase)
            self.curves[phase] = read_curves(config.output_dir / "logs" / phase / "metrics.csv")

    def module(self, teacher: Any, student: Any, objectives: list[Objective] | None) -> DistillationModule:
        """The module of a phase; optimizer and schedule are made when its Trainer is there."""
        module = DistillationModule(
            teacher,
            student,
            objectives,
            optimizer=lambda _: optimizer_from_flags(self.config, module, self.defaults["lr"]),
            lr_scheduler=lambda optimizer: schedule_from_flags(self.config, module, optimizer),
            tokenizer=self.data.tokenizer,
            teacher_precision=self.config.model.teacher_precision if teacher is self.imitated is not None else None,
            gradient_checkpointing=teacher is not None and self.config.model.gradient_checkpointing,
        )
        return module

    @property
    def recommended(self) -> LRRange | None:
        """The learning rates commonly recommended for the task; None for small models from scratch."""
        if self.defaults is EMBEDDED:
            return None
        task: Any = "regression" if self.data.task == "regression" else "classification"
        rows: Any = self.data.train_dataloader().dataset
        return recommended_lr(task, optimizer=self.config.optimizer.name, num_examples=len(rows))

    def _test(self, phase: str, module: DistillationModule) -> None:
        # Without a logger: in forked processes a second CSVLogger of one folder would begin its file anew.
        self.trainer = make_trainer(self.parser, self.config, phase, logger=False)
        (scores,) = self.trainer.test(module, datamodule=self.data, verbose=False)
        self.scores[phase] = dict(scores)

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
        config, data, models, metric = self.config, self.data, self.models, self.metric
        seconds = time.perf_counter() - self.started
        rows_of_test: Any = data.predict_dataloader().dataset
        timed = models if self.quantized is None else {**models, "student-gptq": self.quantized}
        latency = {
            size: latency_ms(timed, self.test_batches(size, count), device=self.trainer.strategy.root_device)
            for size, count in ((1, 64), (32, 8))
        }
        rows = {
            name: {
                "parameters": count_parameters(model),
                "bytes": count_bytes(model),
                "metric_name": metric,
                "metric": self.scores[name][f"test_{metric}"],
                "agreement": self.scores[name].get("test_agreement", 1.0),
                "latency_ms_batch1": latency[1][name],
                "latency_ms_batch32": latency[32][name],
            }
            for name, model in models.items()
        }
        summary = rows | {
            "ratios": ratios(rows["student"], rows["teacher"]),
            "versions": versions(),
            "seed": config.seed,
            "seconds": round(seconds, 1),
            **more,
        }
        if self.quantized is not None:
            summary["gptq"] = self._gptq_summary(latency[1]["student-gptq"])
        write_summary(config.output_dir / "summary.json", summary)
        panels = {
            "training loss": ["train_loss"],
            f"validation {metric}": [f"val_{metric}"],
            "agreement": ["val_agreement"],
        }
        plot_curves(config.output_dir / "curves.png", self.curves, panels=panels)
        title = f"{len(rows_of_test)} test rows, seed {config.seed}, {seconds:.0f} s"
        print()
        print_table(rows, reference="teacher", title=title)
        student, numbers = config.output_dir / "student", config.output_dir / "summary.json"
        if self.quantized is not None:
            print(f"\nThe student in {config.gptq.bits} bits: {json.dumps(summary['gptq'])}")
        print(f"\nThe student is in {student}, the numbers are in {numbers}.")


def _embedded(config: Namespace) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """Text of the installed packages, and an untrained small BERT for it."""
    data = TextClassificationData.embedded(
        max_rows_per_class=EMBEDDED_ROWS_PER_CLASS, batch_size=config.data.batch_size, seed=config.seed
    )
    assert isinstance(data.tokenizer, transformers.PreTrainedTokenizerBase)
    bert = transformers.BertConfig(
        vocab_size=len(data.tokenizer),
        hidden_size=192,
        num_hidden_layers=4,
        num_attention_heads=6,
        intermediate_size=768,
        max_position_embeddings=128,
        pad_token_id=data.tokenizer.pad_token_id,
        id2label=data.id2label,
        label2id=data.label2id,
    )
    return data, transformers.BertForSequenceClassification(bert)


def _given(config: Namespace) -> tuple[TextClassificationData, transformers.PreTrainedModel]:
    """The user's data and teacher; the data number their classes as the teacher does."""
    path = config.model.teacher
    teacher: Any
    if path is None or not (config.data.train_file or config.data.hub_dataset):
        raise ValueError("--model.teacher and --data.train_file (or --data.hub_dataset) go together; one is missing")
    with_head = has_head(read_config(path, "--model.teacher"))
    arguments = config.data.as_dict() | {"tokenizer": path, "seed": config.seed}
    if config.model.finetune_teacher:
        data = TextClassificationData(**arguments)
        names = {"id2label": data.id2label, "label2id": data.label2id} if data.label_names else {}
        teacher = transformers.AutoModelForSequenceClassification.from_pretrained(
            path, num_labels=data.num_labels, dtype="float32", use_safetensors=True, **names
        )
        return data, teacher
    if not with_head:
        raise ValueError(
            f"{path}: the teacher has no fine-tuned head; --model.finetune_teacher true fine-tunes it on the data first"
        )
    teacher = load_pretrained(path, "--model.teacher")
    if arguments["label_names"] is None and not has_placeholder_labels(teacher.config.label2id):
        arguments["label_names"] = [teacher.config.id2label[index] for index in range(teacher.config.num_labels)]
    data = TextClassificationData(**arguments)
    if data.num_labels != teacher.config.num_labels:
        raise ValueError(
            f"the data have {data.num_labels} classes and the teacher {teacher.config.num_labels}; "
            "--model.finetune_teacher true gives it a new head"
        )
    return data, teacher


def _describe(model: transformers.PreTrainedModel) -> str:
    config = model.config
    parameters = count_parameters(model) / 1e6
    return f"{config.num_hidden_layers} layers, width {config.hidden_size}, {parameters:.2f} M parameters"
