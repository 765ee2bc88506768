"""Phases of a recipe: a student as the flags describe it, each phase trained, taken back to its best epoch, tested."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import transformers
from jsonargparse import ArgumentParser, Namespace
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_distill.callbacks import TeacherCache
from lightning_distill.cli.dry_run import check_flags, check_trainer, dry_run
from lightning_distill.cli.evidence import CONFIDENCE, ItemCount, OneAnswer, Outcome, remarks
from lightning_distill.cli.report import (
    Column,
    Curves,
    plot_curves,
    print_table,
    ratios,
    read_curves,
    versions,
    write_summary,
)
from lightning_distill.cli.run_folder import begin_run, best_weights, check_run, content_digest, end_run
from lightning_distill.cli.trainer import (
    best_checkpoint,
    build_callbacks,
    make_trainer,
    one_line_errors,
    optimizer_from_flags,
    quiet,
    recipe_parser,
    resume_from,
    say,
    schedule_from_flags,
)
from lightning_distill.measure import count_bytes, count_parameters
from lightning_distill.models.folders import check_folder
from lightning_distill.models.heads import LANGUAGE_MODELS
from lightning_distill.models.pretrained import load_pretrained
from lightning_distill.models.tokenizers import check_vocabulary
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import HardLabel, Objective
from lightning_distill.optim import LRRange
from lightning_distill.students.from_teacher import student_from_teacher
from lightning_distill.teachers.precision import TeacherPrecision, load_teacher

BASELINE = "student_without_distillation"
AnyRun = TypeVar("AnyRun", bound="Run")


def student_parser(
    description: str | None, *, output_dir: str, data: type[L.LightningDataModule], baseline: bool
) -> ArgumentParser:
    """Make the parser of a recipe that makes a student of a teacher.

    Args:
        description: The recipe's docstring, shown by ``--help``.
        output_dir: Default of ``--output_dir``.
        data: The class that ``--data.*`` describe.
        baseline: Default of ``--model.baseline``.

    Returns:
        A parser to which the recipe may add flags of its own.
    """
    defaults = {"trainer.enable_model_summary": False, "trainer.gradient_clip_val": 1.0}
    parser = recipe_parser(description, output_dir=output_dir, defaults=defaults, data=data)
    parser.add_argument("--model.teacher", type=str | None, help="folder or hub id; none: trained on the embedded text")
    parser.add_argument("--model.student", type=str | None, help="folder or hub id; none: made of the teacher")
    parser.add_argument("--model.num_layers", type=int | None, help="layers of the student (default: half of them)")
    parser.add_argument("--model.width", type=float | None, help="width of the student as a share of the teacher's")
    parser.add_argument("--model.compression_ratio", type=float | None, help="teacher parameters / student parameters")
    parser.add_argument("--model.layers", type=str, default="uniform", help="layers kept: uniform, last, first, skip")
    parser.add_argument("--model.init", type=str, default="teacher", help="weights to begin with: teacher or random")
    parser.add_argument("--model.finetune_teacher", type=bool, default=False, help="fine-tune the teacher first")
    parser.add_argument("--model.teacher_epochs", type=int | None, help="epochs of a teacher trained here")
    parser.add_argument("--model.baseline", type=bool, default=baseline, help="train a student without a teacher, too")
    parser.add_argument(
        "--model.teacher_precision",
        type=TeacherPrecision | None,
        help="what the teacher computes in, whatever --trainer.precision is (none: the same)",
    )
    parser.add_argument(
        "--model.gradient_checkpointing", type=bool, default=False, help="less memory of the student, for more time"
    )
    parser.add_argument("--objectives", type=list[Objective] | None, help="what the student learns from (see README)")
    return parser


@dataclass
class Run:
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
        imitated: The teacher in the precision that was asked for; None: as it is.
    """

    parser: ArgumentParser
    config: Namespace
    data: Any
    teacher: transformers.PreTrainedModel
    defaults: dict[str, Any]
    started: float
    models: dict[str, transformers.PreTrainedModel] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    curves: dict[str, Curves] = field(default_factory=dict)
    trainer: L.Trainer | None = None
    imitated: nn.Module | None = None

    @classmethod
    def start(cls: type[AnyRun], parser: ArgumentParser, argv: list[str] | None = None) -> AnyRun:
        """Parse the flags, read the data and the teacher, and find what is wrong with them.

        Args:
            parser: From the recipe's own maker of parsers.
            argv: The command line, without the program; None: ``sys.argv``.

        Returns:
            A run; its teacher may still have to be trained, see :meth:`prepare`.

        Raises:
            SystemExit: With code 2, after one line on stderr, before anything is written.
        """
        config = parser.parse_args(argv)
        started = time.perf_counter()
        quiet()
        with one_line_errors(parser.prog):
            check_run(parser, config)
            check_flags(config)
            cls.check_folders(config)
            L.seed_everything(config.seed, workers=True, verbose=False)
            data, teacher, defaults = cls.read(config)
            data.setup()
            run = cls(parser, config, data, teacher, defaults, started)
            run.new_student()
            run.check()
            build_callbacks(config, "student")
            check_trainer(make_trainer(parser, config, "student", logger=False))
        return run

    @classmethod
    def folders(cls, config: Namespace) -> list[str]:
        """Names of the folders in ``--output_dir`` that models will be written to."""
        model = config.model
        taught = ["teacher"] if model.finetune_teacher or not model.teacher else []
        return [*taught, "student", *([BASELINE] if model.baseline else [])]

    @classmethod
    def check_folders(cls, config: Namespace) -> None:
        """Refuse folders that hold what was not written here, or a model that the flags name.

        Args:
            config: The parsed flags.

        Raises:
            ValueError: If one does.
        """
        sources = [path for path in (config.model.teacher, config.model.student) if path is not None]
        if Path().resolve().is_relative_to(config.output_dir.resolve()):
            raise ValueError(f"--output_dir {config.output_dir} is the working folder or holds it; name one in it")
        for name in cls.folders(config):
            check_folder(config.output_dir / name, "--output_dir", sources=sources)

    @classmethod
    def read(cls, config: Namespace) -> tuple[Any, transformers.PreTrainedModel, dict[str, Any]]:
        """Data, teacher and defaults that the flags ask for.

        Args:
            config: The parsed flags.

        Raises:
            ValueError: If they do not fit together.
        """
        raise NotImplementedError

    def check(self) -> None:
        """Find what is wrong with the recipe's own flags.

        Raises:
            ValueError: If something is.
        """

    @property
    def metric(self) -> str:
        """Name of the metric that decides."""
        raise NotImplementedError

    @property
    def recommended(self) -> LRRange | None:
        """The learning rates commonly recommended for the task; None where nobody recommends any."""
        return None

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
                for callback in build_callbacks(self.config, "student"):
                    if isinstance(callback, TeacherCache):
                        callback.attach(module)
                        callback.detach()
            self._dry_run()
            begin_run(self.parser, self.config, self._contents())
        if self._trains_teacher:
            epochs = self.teacher_epochs
            say(f"\nTraining the teacher first, for {epochs} epochs: {_describe(self.teacher)}")
            self.teacher.requires_grad_(True)  # the modules above froze it
            self._fit("teacher", self.teacher, teacher=None, objectives=None, epochs=epochs)
        else:
            self._test("teacher", DistillationModule(None, self.teacher))
        self.models["teacher"] = self.teacher
        self._imitate()

    def _dry_run(self) -> None:
        """Take a step of each kind of phase: what is wrong with Trainer, data and models is seen now."""

        def student() -> DistillationModule:
            return self.module(self.imitated or self.teacher, self.new_student(), self.objectives)

        def teacher() -> DistillationModule:
            return self.module(None, copy.deepcopy(self.teacher).requires_grad_(True), None)

        dry_run(self.parser, self.config, student, self.data, self.epochs)
        if self._trains_teacher:
            dry_run(self.parser, self.config, teacher, self.data, self.teacher_epochs)

    def _contents(self) -> dict[str, str]:
        """Digests of what is read and is no file that a flag names: rows of the hub or of packages, a hub model."""
        found = {}
        if not (self.config.data.get("train_file") or self.config.data.get("text_files")):
            rows = (tree_leaves(data[index]) for data in self.data._datasets.values() for index in range(len(data)))
            found["the rows of the data"] = content_digest(
                bytes(str(leaf.tolist()), "utf-8") for row in rows for leaf in row
            )
        commit = getattr(self.teacher.config, "_commit_hash", None)
        return found | ({"--model.teacher": commit} if commit else {})

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
    def shows_progress(self) -> bool:
        """Whether what takes long shows a bar, as training does."""
        return self.config.trainer.enable_progress_bar is not False

    @property
    def epochs(self) -> int:
        """Epochs of a phase of the student."""
        asked: int | None = self.config.trainer.max_epochs
        return self.defaults["epochs"] if asked is None else asked

    @property
    def teacher_epochs(self) -> int:
        """Epochs of a teacher that is trained here."""
        asked: int | None = self.config.model.teacher_epochs
        return self.defaults["teacher_epochs"] if asked is None else asked

    @property
    def _trains_teacher(self) -> bool:
        return self.config.model.finetune_teacher or not self.config.model.teacher

    def new_student(self) -> transformers.PreTrainedModel:
        """A student as the flags describe it; the same one each time.

        Raises:
            ValueError: If they name a student and describe another, or one that reads text in other words.
        """
        L.seed_everything(self.config.seed, workers=True, verbose=False)
        model = self.config.model
        if model.student is not None:
            if model.teacher is None:
                raise ValueError("--model.student goes with --model.teacher, whose text it reads; that is missing")
            for flag in ("num_layers", "width", "compression_ratio", "layers", "init"):
                if model[flag] != self.parser.get_default(f"model.{flag}"):
                    raise ValueError(f"--model.student is trained as it is; leave --model.{flag} out")
            named = self.load_student(model.student)
            advice = "--model.student must read text in the words of --model.teacher, whose tokenizer the data have."
            check_vocabulary(named, self.teacher, padded=True, advice=advice)
            return named
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

    def load_student(self, path: str) -> transformers.PreTrainedModel:
        """The student of ``--model.student``.

        Args:
            path: Folder or hub id.
        """
        student: Any = load_pretrained(path, "--model.student")
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
        epochs = self.epochs if epochs is None else epochs
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
            self.recommended.warn_if_far(self.defaults["lr"] if config.optimizer.lr is None else config.optimizer.lr)
        module = self.module(teacher, student, objectives)
        # A finished phase resumes from its last step: there is nothing left to train, and its best epoch is taken.
        trainer.fit(module, datamodule=self.data, ckpt_path=resume_from(config, phase))
        best = best_weights(config, phase, checkpoint.best_model_path)
        if best is not None:
            module.load_state_dict(best)
        self._test(phase, module)
        if trainer.is_global_zero:
            module.export(config.output_dir / phase)
            self.curves[phase] = read_curves(config.output_dir / "logs" / phase / "metrics.csv")

    def module(self, teacher: Any, student: Any, objectives: list[Objective] | None) -> DistillationModule:
        """The module of a phase; optimizer and schedule are made when its Trainer is there."""
        module = DistillationModule(teacher, student, objectives, **self.training(teacher, lambda: module))
        return module

    def training(self, teacher: nn.Module | None, module: Callable[[], DistillationModule]) -> dict[str, Any]:
        """What the module of a phase takes beside models and objectives.

        Args:
            teacher: Its teacher.
            module: Gives the module, once it is there.
        """
        precise = teacher is self.imitated is not None
        return {
            "optimizer": lambda _: optimizer_from_flags(self.config, module(), self.defaults["lr"]),
            "lr_scheduler": lambda optimizer: schedule_from_flags(self.config, module(), optimizer),
            "tokenizer": self.data.tokenizer,
            "teacher_precision": self.config.model.teacher_precision if precise else None,
            "gradient_checkpointing": teacher is not None and self.config.model.gradient_checkpointing,
        }

    def _test(self, phase: str, module: DistillationModule) -> None:
        counts = module.scores("test").metrics
        counts["num_items"] = ItemCount()
        if module.task not in LANGUAGE_MODELS:  # what is one answer to a text?
            counts["one_answer"] = OneAnswer()
        # Without a logger: in forked processes a second CSVLogger of one folder would begin its file anew.
        self.trainer = make_trainer(self.parser, self.config, phase, logger=False)
        (scores,) = self.trainer.test(module, datamodule=self.data, verbose=False)
        self.scores[phase] = dict(scores)

    def sizes(self, model: transformers.PreTrainedModel) -> dict[str, int]:
        """What every row of a report begins with: ``parameters`` and ``bytes``."""
        return {"parameters": count_parameters(model), "bytes": count_bytes(model)}

    def write_report(
        self,
        rows: dict[str, dict[str, Any]],
        columns: list[Column],
        *,
        what: str,
        available: int,
        seconds: float,
        **more: Any,
    ) -> None:
        """Print the table, write ``summary.json`` and ``curves.png``; called on rank 0.

        Args:
            rows: What was measured of each model, by phase.
            columns: What the table shows of it.
            what: What the models were tested on: rows or tokens.
            available: How many of these the test data have, of which ``--trainer.limit_test_batches`` may take a part.
            seconds: How long the run took.
            **more: What else ``summary.json`` holds.
        """
        output_dir, metric = self.config.output_dir, self.metric
        tested = {name: Outcome.of(self.scores[name], metric) for name in rows}
        items = tested["student"].items
        intervals = {name: test.interval for name, test in tested.items()}
        one_answer = [name for name, test in tested.items() if test.one_answer]
        summary = rows | {
            "ratios": ratios(rows["student"], rows["teacher"], columns),
            "tested": {
                "items": items,
                "available": available,
                "intervals": intervals,  # Wilson's, of accuracies; other metrics have none
                "confidence": CONFIDENCE,
                "one_answer": one_answer,
            },
            "versions": versions(),
            "seed": self.config.seed,
            "seconds": round(seconds, 1),
            **more,
        }
        write_summary(output_dir / "summary.json", summary)
        panels = {
            "training loss": ["train_loss"],
            f"validation {metric}": [f"val_{metric}"],
            "agreement": ["val_agreement"],
        }
        plot_curves(output_dir / "curves.png", self.curves, panels=panels)
        part = f"{items}" if items == available else f"{items} of {available}"
        print()
        print_table(
            rows,
            columns,
            reference="teacher",
            title=f"{part} test {what}, seed {self.config.seed}, {seconds:.0f} s",
            intervals=intervals,
            meaningless=one_answer,
        )
        for remark in remarks(tested, {name: row.get("metric") for name, row in rows.items()}, metric):
            print(remark)
        print(f"\nThe student is in {output_dir / 'student'}, the numbers are in {output_dir / 'summary.json'}.")
        end_run(self.config)


def _describe(model: transformers.PreTrainedModel) -> str:
    config = model.config
    parameters = count_parameters(model) / 1e6
    return f"{config.num_hidden_layers} layers, width {config.hidden_size}, {parameters:.2f} M parameters"
