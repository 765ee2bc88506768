"""The flags of the recipes, and what is refused of them before anything is read."""

from collections.abc import Collection
from pathlib import Path
from typing import Any

import lightning as L

from lightning_distill.arguments import integer
from lightning_distill.callbacks import GPTQ, FiniteLoss, GradientClipping, InitPolicy, LRFinder, TeacherCache
from lightning_distill.cli.models import STUDENT_SIZE
from lightning_distill.cli.parser import SWITCHES, FlagParser, Flags
from lightning_distill.cli.run_folder import check_run
from lightning_distill.cli.trainer import build_callbacks
from lightning_distill.data import LanguageModelData, RowData, TextClassificationData
from lightning_distill.models.folders import check_folder
from lightning_distill.models.heads import HEAD_CLASSES
from lightning_distill.models.pretrained import has_head, is_of_module, read_config
from lightning_distill.objectives import Objective
from lightning_distill.optim import build_lr_scheduler, build_optimizer, recommended_lr
from lightning_distill.tasks import TASKS
from lightning_distill.teachers.precision import TeacherPrecision

#: The student that is trained on the labels alone, where ``--model.baseline`` asks for one.
BASELINE = "student_without_distillation"
# What `--help` lists beside the recipe's own.
_JOB = (
    *("config", "output_dir", "seed", "resume", "model.*", "objectives", "optimizer.name", "optimizer.lr"),
    *("lr_scheduler.name", "trainer.max_epochs", "trainer.precision", "data.hub_dataset", "data.batch_size"),
    "data.max_length",
)


def text_parser(description: str | None, *, output_dir: str) -> FlagParser:
    """Make the parser of a recipe that distils a text classifier; see :func:`task_parser`."""
    return task_parser(description, output_dir=output_dir, data=TextClassificationData)


def task_parser(
    description: str | None, *, output_dir: str, data: type[RowData], baseline: bool = False, quantises: bool = True
) -> FlagParser:
    """Make the parser of a recipe of any task that a data module of rows is for.

    Args:
        description: The recipe's docstring; its first line is shown by ``--help``.
        output_dir: Default of ``--output_dir``.
        data: The class that ``--data.*`` describe; its :attr:`~lightning_distill.data.RowData.task` is the recipe's.
        baseline: Default of ``--model.baseline``.
        quantises: Whether there are ``--gptq.*``.

    Returns:
        A parser to which the recipe may add flags of its own.

    Example:
        >>> from lightning_distill.cli import task_parser
        >>> from lightning_distill.data import TextClassificationData
        >>> parser = task_parser("A recipe.", output_dir="runs/mine", data=TextClassificationData)
        >>> parser.parse_args(["--data.label_column=kind"]).data.label_column
        'kind'
    """
    job = ("data.*_file", "data.*_column", "data.*_columns", "metric", "gptq.bits")
    parser = recipe_parser(description, output_dir=output_dir, data=data, job=job)
    _add_model(parser, baseline=baseline)
    parser.add_argument("--metric", type=str | None, help="metrics by name, as a,b; the first says which epoch is best")
    if not quantises:
        return parser
    parser.add_argument("--gptq.bits", type=int | None, help="quantise the student in the end: 2, 3, 4 or 8")
    parser.add_argument("--gptq.group_size", type=int, default=128, help="inputs that share a scale; -1: all")
    parser.add_argument("--gptq.embedding_bits", type=int | None, help="8 or 4; none leaves the embeddings")
    parser.add_argument("--gptq.num_samples", type=int, default=256, help="rows of training data to calibrate on")
    return parser


def language_parser(description: str | None, *, output_dir: str) -> FlagParser:
    """Make the parser of a recipe that distils a causal language model.

    Args:
        description: The recipe's docstring; its first line is shown by ``--help``.
        output_dir: Default of ``--output_dir``.

    Returns:
        A parser to which the recipe may add flags of its own.
    """
    job = ("data.text_files", "data.val_files", "data.test_files", "generation.on_policy", "generation.sequence_level")
    parser = recipe_parser(description, output_dir=output_dir, data=LanguageModelData, job=job)
    _add_model(parser, baseline=True)
    for flag, kind, default, text in (
        ("on_policy", float, 0.0, "share of batches that the student writes and the teacher scores"),
        ("sequence_level", bool, False, "train the student on text that the teacher writes once"),
        ("prompt_length", int, 16, "tokens of a document that are a prompt"),
        ("max_new_tokens", int, 64, "tokens written to a prompt at most"),
        ("temperature", float, 1.0, "divides the logits that are drawn from"),
        ("top_p", float, 1.0, "mass of the tokens that are drawn from"),
        ("num_draft_tokens", int, 5, "tokens the student proposes to its teacher at a time"),
        ("num_prompts", int, 16, "prompts that speed and acceptance are measured on; 0: neither is"),
    ):
        parser.add_argument(f"--generation.{flag}", type=kind, default=default, help=text)
    return parser


def recipe_parser(
    description: str | None, *, output_dir: str, data: type[L.LightningDataModule], job: Collection[str] = ()
) -> FlagParser:
    """Make the parser that all recipes begin with: ``--data.*``, ``--trainer.*``, ``--config`` and the rest.

    ``--optimizer lion``, ``--lr_scheduler cosine`` and ``--init_policy auto`` are short for ``--optimizer.name lion``
    and so on. ``--gradient_clipping.algorithm``, ``--lr_finder.suggestion``, ``--init_policy`` and
    ``--teacher_cache.path`` ask for the callback; without them it is left out. See :func:`build_callbacks`.

    Args:
        description: The recipe's docstring; its first line is shown by ``--help``.
        output_dir: Default of ``--output_dir``.
        data: The class that ``--data.*`` describe; its tokenizer and seed are the recipe's.
        job: What ``--help`` lists beside the flags of every recipe.

    Returns:
        A parser to which more flags may be added.
    """
    parser = _RecipeParser(description=description, job=[*_JOB, *job])
    parser.data = data
    parser.add_argument("--config", action="config", help="a YAML file with any of these flags")
    parser.add_argument("--output_dir", type=Path, default=output_dir, help="where everything is written")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything random")
    parser.add_argument("--resume", action="store_true", help="go on with the run in --output_dir that was cut")
    parser.add_argument("--save_every_n_steps", type=int, default=500, help="steps that a crash costs at most")
    parser.add_class_arguments(data, "data", instantiate=False, skip={"tokenizer", "seed"})
    parser.add_function_arguments(build_optimizer, "optimizer", skip={"module"})
    parser.add_function_arguments(build_lr_scheduler, "lr_scheduler", skip={"module", "optimizer"})
    parser.add_class_arguments(GradientClipping, "gradient_clipping", instantiate=False)
    parser.add_class_arguments(LRFinder, "lr_finder", instantiate=False, skip={"output_dir"})
    parser.add_class_arguments(InitPolicy, "init_policy", instantiate=False, skip={"output_dir", "teacher"})
    parser.add_class_arguments(FiniteLoss, "finite_loss", instantiate=False)
    parser.add_class_arguments(TeacherCache, "teacher_cache", instantiate=False, skip={"path"})
    parser.add_argument("--teacher_cache.path", type=str | None, help="folder of what the teacher says (none: none)")
    parser.add_class_arguments(L.Trainer, "trainer", instantiate=False, skip={"default_root_dir"})
    parser.set_defaults({"optimizer.lr": None, "optimizer.weight_decay": 0.01, "lr_scheduler.warmup": 0.06})
    parser.set_defaults({"trainer.enable_model_summary": False, "trainer.gradient_clip_val": 1.0})
    parser.set_defaults(dict.fromkeys(SWITCHES.values()))
    return parser


def _add_model(parser: FlagParser, *, baseline: bool) -> None:
    for flag, kind, default, text in (
        ("teacher", str | None, None, "folder or hub id; none: trained on the embedded text"),
        ("student", str | None, None, "folder or hub id; none: made of the teacher"),
        ("num_layers", int | None, None, "layers of the student (default: half of them)"),
        ("num_decoder_layers", int | None, None, "those of its decoder, where it has one"),
        ("width", float | None, None, "width of the student as a share of the teacher's"),
        ("compression_ratio", float | None, None, "teacher parameters / student parameters"),
        ("layers", str, "uniform", "layers kept: uniform, last, first, skip"),
        ("init", str, "teacher", "weights to begin with: teacher or random"),
        ("finetune_teacher", bool, False, "fine-tune the teacher first"),
        ("teacher_epochs", int | None, None, "epochs of a teacher trained here"),
        ("baseline", bool, baseline, "train a student without a teacher, too"),
        ("teacher_precision", TeacherPrecision | None, None, "what the teacher computes in (none: as the Trainer)"),
        ("gradient_checkpointing", bool, False, "less memory of the student, for more time"),
    ):
        parser.add_argument(f"--model.{flag}", type=kind, default=default, help=text)
    parser.add_argument("--objectives", type=list[Objective] | None, help="what the student learns from (see README)")


class _RecipeParser(FlagParser):
    """Knows the class of its data, and what gives way."""

    data: type[Any]

    def parse_args(self, *args: Any, **options: Any) -> Flags:  # type: ignore[override]
        flags = super().parse_args(*args, **options)
        clips = flags.get(SWITCHES["gradient_clipping"]) is not None
        if clips and flags.trainer.gradient_clip_val is not None:
            if flags.trainer.gradient_clip_val != self.get_default("trainer.gradient_clip_val"):
                self.error("--gradient_clipping.* and --trainer.gradient_clip_val would clip twice: leave one out")
            # The recipe's own default gives way.
            flags.trainer.gradient_clip_val = flags.given.trainer.gradient_clip_val = None
        return flags


def names_nothing(flags: Flags) -> bool:
    """Whether the flags name neither a teacher nor data, so that a recipe takes the embedded text."""
    named = ("train_file", "val_file", "test_file", "text_files", "val_files", "test_files", "hub_dataset")
    return not flags.model.teacher and not any(flags.data.get(name) for name in named)


def trains_teacher(flags: Flags) -> bool:
    """Whether the teacher has to learn its task first."""
    return bool(flags.model.finetune_teacher or not flags.model.teacher)


def set_defaults(flags: Flags, *, lr: float, max_epochs: int, teacher_epochs: int, rows: RowData | None = None) -> None:
    """Fill in what no flag says.

    Args:
        flags: The parsed flags; changed, while ``flags.given`` stays as it was.
        lr: The learning rate.
        max_epochs: Epochs of a student, and of every other training but the teacher's.
        teacher_epochs: Epochs of a teacher that is trained here.
        rows: Data whose task has learning rates that are commonly recommended; None where nobody recommends any.
    """
    if flags.optimizer.lr is None:
        flags.optimizer.lr = lr
    if flags.trainer.max_epochs is None:
        flags.trainer.max_epochs = max_epochs
    if flags.model.teacher_epochs is None:
        flags.model.teacher_epochs = teacher_epochs
    for name, epochs in list(flags.model.items()):
        if name.endswith("epochs") and epochs is None:
            flags.model[name] = flags.trainer.max_epochs
    if rows is not None:
        task: Any = "generation" if TASKS[rows.task].of_words else rows.task
        flags.recommended = recommended_lr(task, "full", flags.optimizer.name, rows.num_rows("train"))


def check_flags(flags: Flags, *folders: str) -> None:
    """Refuse, before anything is read, what a recipe cannot do, and numbers that Lightning takes and stumbles over.

    Args:
        flags: The parsed flags.
        *folders: Folders in ``--output_dir`` that models will be written to, beside those of all recipes.

    Raises:
        ValueError: If there is such a flag, another run is at work in ``--output_dir``, a folder holds what was not
            written here, or ``--resume`` comes with other flags than the run that is there.
    """
    check_run(flags)
    _check_numbers(flags)
    if not names_nothing(flags):
        _check_named(flags)
    if Path().resolve().is_relative_to(flags.output_dir.resolve()):
        raise ValueError(f"--output_dir {flags.output_dir} is the working folder or holds it; name one in it")
    sources = [path for path in (flags.model.teacher, flags.model.student) if path is not None]
    asked = {"teacher": trains_teacher(flags), BASELINE: flags.model.baseline, "student-gptq": flags.get("gptq.bits")}
    for name in ("student", *(name for name, wanted in asked.items() if wanted), *folders):
        check_folder(flags.output_dir / name, "--output_dir", sources=sources)
    if flags.model.student is not None:
        if flags.model.teacher is None:
            raise ValueError("--model.student goes with --model.teacher, whose text it reads; that is missing")
        for name in STUDENT_SIZE:
            if flags.model[name] != flags.parser.get_default(f"model.{name}"):
                raise ValueError(f"--model.student is trained as it is; leave --model.{name} out")
    build_callbacks(flags, "student")
    if flags.get("gptq.bits") is not None:
        GPTQ(**flags.gptq.as_dict())


def _check_named(flags: Flags) -> None:
    """A teacher goes with data, and one without a head is fine-tuned."""
    path, file = flags.model.teacher, "train_file" if "train_file" in flags.data else "text_files"
    given = {"--model.teacher": path, f"--data.{file}": flags.data[file] or flags.data.hub_dataset}
    if missing := [flag for flag, value in given.items() if not value]:
        raise ValueError(
            f"--model.teacher and --data.{file} (or --data.hub_dataset) go together; one is missing: there is no "
            f"{' and no '.join(missing)}"
        )
    parser: Any = flags.parser
    task = flags.data.get("task") or parser.data.task
    needs_head = task in HEAD_CLASSES and not flags.model.finetune_teacher and not is_of_module(path)
    if needs_head and not has_head(read_config(path, "--model.teacher")):
        raise ValueError(
            f"{path}: the teacher has no fine-tuned head; --model.finetune_teacher true fine-tunes it on the data first"
        )


def _check_numbers(flags: Flags) -> None:
    trainer = flags.trainer
    integer("--seed", flags.seed, 0, 2**32 - 1)
    integer("--save_every_n_steps", flags.save_every_n_steps, 1)
    integer("--trainer.accumulate_grad_batches", trainer.accumulate_grad_batches, 1)
    epochs = {f"--model.{name}": value for name, value in flags.model.items() if name.endswith("epochs")}
    lengths = {f"--trainer.{name}": trainer[name] for name in ("max_epochs", "max_steps")}
    for flag, value in (epochs | lengths).items():
        if value is not None and not (value == -1 and flag in lengths):  # the Trainer's word for no end
            integer(flag, value, 1)
    for name in ("limit_train_batches", "limit_test_batches"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} is 0: a recipe trains and tests on at least a batch")
    for name in ("val_check_interval", "check_val_every_n_epoch"):
        if trainer[name] == 0:
            raise ValueError(f"--trainer.{name} is 0; --trainer.limit_val_batches 0 trains without validation")
    if trainer.barebones:
        raise ValueError("--trainer.barebones keeps no checkpoint and logs nothing; a recipe needs both")
    if isinstance(trainer.strategy, str) and "spawn" in trainer.strategy:
        raise ValueError(f"--trainer.strategy {trainer.strategy} starts processes without the recipe; ddp_fork has it")
