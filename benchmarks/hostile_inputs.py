"""The inputs of hostile.py: flags, data files and model folders that somebody will try."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import hostile_data

from tests.helpers.hostile import CONFIGS as MODEL_CONFIGS
from tests.helpers.hostile import TOKENIZERS, WEIGHT_FILES, hostile
from tests.helpers.models import bert
from tests.helpers.text import write_sentiment, write_tokenizer


class Given:
    """A teacher of two layers and its data, which every input spoils in one place.

    Args:
        folder: Where they are written.
    """

    def __init__(self, folder: Path) -> None:
        self.teacher = folder / "teacher"
        tokenizer = write_tokenizer(self.teacher)
        names = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
        model = bert(layers=2, vocab_size=len(tokenizer), max_position_embeddings=64, **names)
        model.save_pretrained(self.teacher)
        self.files = {name: write_sentiment(folder / f"{name}.tsv", seed=i) for i, name in enumerate(("train", "val"))}

    def flags(self, out: Path) -> list[str]:
        """A run of one step."""
        return [
            f"--model.teacher={self.teacher}",
            f"--output_dir={out}",
            *(f"--data.{name}_file={path}" for name, path in self.files.items()),
            "--data.batch_size=8",
            "--trainer.max_epochs=1",
            "--trainer.max_steps=1",
            "--trainer.accelerator=cpu",
            "--trainer.enable_progress_bar=false",
        ]


class Attempt(NamedTuple):
    """One input.

    Attributes:
        name: What is bad about it.
        prepare: Writes what it needs into a folder of its own; returns the command line.
        program: A recipe, or a command of ``lightning-distill``.
        result: What is there, under that folder, if it is taken.
    """

    name: str
    prepare: Callable[[Path], list[str]]
    program: str = "distilbert"
    result: str = "out/summary.json"

    def done(self, folder: Path) -> bool:
        """Whether what was asked for is there."""
        return (folder / self.result).exists()


# What somebody types without meaning harm.
TYPED = {
    "trainer.max_epochs": ["0", "-2", "1.5", "null"],
    "trainer.max_steps": ["0", "-2", "1.5"],
    "trainer.max_time": ["00:00:00:00", "soon"],
    "trainer.limit_train_batches": ["0", "-1", "0.0", "2.5", "0.001"],
    "trainer.limit_val_batches": ["0", "0.001", "-1"],
    "trainer.limit_test_batches": ["0", "0.0", "0.001", "-1"],
    "trainer.overfit_batches": ["1", "0.001", "-1"],
    "trainer.enable_checkpointing": ["false", "maybe"],
    "trainer.barebones": ["true"],
    "trainer.fast_dev_run": ["true", "2", "-1"],
    "trainer.val_check_interval": ["99999", "0", "0.5", "1.5", "-1", "00:00:01:00"],
    "trainer.check_val_every_n_epoch": ["0", "null", "5", "-1"],
    "trainer.num_sanity_val_steps": ["-1", "-2", "3"],
    "trainer.log_every_n_steps": ["0", "-1", "1"],
    "trainer.strategy": ["ddp_spawn", "fsdp", "deepspeed", "nonsense", "ddp_notebook", "dp", "ddp_fork", "auto"],
    "trainer.devices": ["0", "-1", "[0]", "[0, 0]", "auto", "two", "999"],
    "trainer.num_nodes": ["0", "-1", "two"],
    "trainer.accelerator": ["gpu", "tpu", "mps", "nonsense", "auto"],
    "trainer.precision": ["16-true", "16-mixed", "16", "32", "64-true", "bf16-true", "transformer-engine", "8", "x"],
    "trainer.gradient_clip_val": ["-1", "0", "nan", "inf", "x"],
    "trainer.gradient_clip_algorithm": ["value", "nonsense"],
    "trainer.accumulate_grad_batches": ["0", "-1", "1.5", "{0: 2}", "99"],
    "trainer.deterministic": ["true", "warn", "x"],
    "trainer.benchmark": ["true"],
    "trainer.inference_mode": ["false"],
    "trainer.detect_anomaly": ["true"],
    "trainer.profiler": ["simple", "nonsense"],
    "trainer.reload_dataloaders_every_n_epochs": ["1", "-1"],
    "trainer.callbacks": ["EarlyStopping", "nonsense", "[{}]", "[1]", "LearningRateMonitor",
                          "StochasticWeightAveraging"],
    "trainer.plugins": ["nonsense", "[{}]", "[1]"],
    "trainer.logger": ["true", "false", "nonsense", "[]", "[1]"],
    "trainer.sync_batchnorm": ["true"],
    "trainer.use_distributed_sampler": ["false"],
    "trainer.enable_model_summary": ["true"],
    "trainer.enable_progress_bar": ["true"],
    "trainer.model_registry": ["x"],
    "trainer": ["3", "x", "[]", "{nonsense: 1}", "null"],
    "lr_scheduler": ["nonsense", "cosine", "3", "step", "reduce_on_plateau", "one_cycle", "cyclic", "wsd",
                     "null", "greedy"],
    "lr_scheduler.warmup": ["1000000", "-1", "nan", "inf", "1", "0.99", "1.5", "x"],
    "lr_scheduler.interval": ["epoch", "batch"],
    "lr_scheduler.min_lr_ratio": ["2", "-1", "nan", "0.1"],
    "lr_scheduler.num_training_steps": ["0", "-1", "1", "x"],
    "lr_scheduler.monitor": ["nonsense", "3"],
    "lr_scheduler.options": ["{}", "{nonsense: 1}", "3", "[]"],
    "optimizer": ["nonsense", "3", "sgd", "muon", "adafactor", "adamw_8bit", "null", "{}", "lion.yaml"],
    "optimizer.lr": ["0", "-1", "nan", "inf", "x", "1e-400", "1e400", "true"],
    "optimizer.weight_decay": ["-1", "nan", "inf", "x"],
    "optimizer.betas": ["[0.9]", "[2, 2]", "[0.9, 0.99, 0.9]", "0.9", "[nan, nan]"],
    "optimizer.eps": ["0", "-1", "nan", "inf"],
    "optimizer.momentum": ["0.9", "-1"],
    "optimizer.lr_by_name": ["{}", "{nonsense: 1}", "3", "{'(': 1}", "{classifier: -1}", "{classifier: nan}"],
    "optimizer.layer_decay": ["0", "-1", "2", "nan"],
    "objectives": [
        "[{}]", "[]", "{}", "3", "null", "SoftTarget", "nonsense", "[SoftTarget, SoftTarget]", "[1]", "[null]", "[[]]",
        "lightning_distill.objectives.SoftTarget", "torch.nn.Linear", "[{class_path: SoftTarget}]", "HardLabel",
        "[{class_path: SoftTarget, init_args: {temperature: 0}}]", "[{class_path: SoftTarget, init_args: {x: 1}}]",
        "[{class_path: SoftTarget, init_args: {weight: 0}}]", "[{class_path: SoftTarget, init_args: {weight: -1}}]",
        "[{class_path: SoftTarget, init_args: {weight: nan}}]",
        "[{class_path: HiddenState, init_args: {layers: [[9, 9]]}}]",
        "[{init_args: {}}]", "[{class_path: torch.nn.Linear}]", "[{class_path: os.system}]", "[{class_path: 3}]",
        "[HiddenState, AttentionMap]", "[UniversalLogit]",
    ],
    "model.teacher": ["nonsense", "", "null", "3", "/", ".", "~", "https://example.invalid", "a/b/c"],
    "model.student": ["nonsense", "", "3", "/"],
    "model.num_layers": ["0", "-1", "99", "1.5", "x", "1"],
    "model.width": ["0", "-1", "2", "nan", "0.001", "x", "0.5"],
    "model.compression_ratio": ["0", "-1", "0.5", "1e9", "nan", "x", "1.2"],
    "model.layers": ["nonsense", "last", "[0]", "[0, 9]", "[]", "0,1"],
    "model.init": ["nonsense", "random"],
    "model.finetune_teacher": ["true", "maybe", "3"],
    "model.teacher_epochs": ["0", "-1", "1.5", "x"],
    "model.baseline": ["true", "x"],
    "model.teacher_precision": ["int8", "nf4", "bf16", "16", "8", "x", "32"],
    "model.gradient_checkpointing": ["true", "x"],
    "gradient_clipping.algorithm": ["nonsense", "zscore", "norm", "value", "agc"],
    "gradient_clipping.threshold": ["-1", "0", "nan"],
    "lr_finder.suggestion": ["nonsense", "valley", "steepest"],
    "lr_finder.num_steps": ["0", "-1", "1"],
    "lr_finder.min_lr": ["0", "-1", "9", "nan"],
    "init_policy": ["nonsense", "auto", "3", "orthogonal", "from_teacher"],
    "init_policy.std": ["-1", "nan", "0"],
    "finite_loss.max_skipped": ["-1", "x", "1.5", "3"],
    "teacher_cache.path": ["/dev/null", "/proc/x", "", "/root/../dev/null/x", "cache"],
    "teacher_cache.top_k": ["0", "-1", "99", "1.5"],
    "teacher_cache.dtype": ["int4", "object", "float16"],
    "gptq.bits": ["5", "0", "-4", "x", "4.0", "4"],
    "gptq.group_size": ["0", "-2", "3", "x"],
    "gptq.num_samples": ["0", "-1", "x"],
    "gptq.embedding_bits": ["3", "8"],
    "seed": ["-1", "1.5", "x", "99999999999", "null", "7"],
    "save_every_n_steps": ["0", "-1", "x"],
    "output_dir": ["/dev/null", "/proc/x", "", "/dev/full/x", "/"],
    "config": ["nonsense.yaml", "/", "", "/dev/null"],
    "resume": ["x", "true"],
    "data.train_file": ["nonsense.tsv", "/", "", "/dev/null", "null", "3"],
    "data.val_file": ["nonsense.tsv", "/", ""],
    "data.test_file": ["nonsense.tsv", "/", ""],
    "data.text_columns": ["nonsense", "[]", "", "sentence,sentence", "[sentence, label]", "label", "3"],
    "data.label_column": ["nonsense", "", "sentence", "3"],
    "data.batch_size": ["0", "-1", "1.5", "x", "1000000", "1"],
    "data.max_length": ["0", "-1", "1", "2", "3", "99999", "x"],
    "data.val_split": ["-1", "2", "nan", "0.5", "x"],
    "data.num_workers": ["-1", "x", "1.5", "1"],
    "data.max_train_rows": ["0", "-1", "1", "x"],
    "data.label_names": ["[]", "[x]", "[negative, positive]", "[positive, negative]", "[a, a]", "3",
                         "negative,positive"],
    "data.task": ["nonsense", "regression", "classification"],
    "data.hub_dataset": ["nonsense", "", "a/b/c/d"],
    "nonsense": ["1"],
    "model.teachr": ["x"],
    "optimzer.lr": ["1"],
    "trainer.max_epoch": ["1"],
    "model.num_layer": ["1"],
    "objective": ["SoftTarget"],
}  # fmt: skip

CONFIGS = [
    "trainer: 3", "trainer: [1]", "- 1", "3", "", "{", "model:\n  teacher: {a: 1}", "nonsense: 1", "trainer: {x: 1}",
    "optimizer: {name: [1]}", "data: 3", "model: null", "objectives: 3", "\x00", "a: *b", "a: &a [*a]",
    "trainer: !!python/object/apply:os.system ['touch pwned']", "trainer:\n  callbacks:\n  - class_path: os.system",
    "[" * 3000, "seed: 1\nseed: 2", "trainer:\n  max_epochs: !!float 1", "config: other.yaml",
]  # fmt: skip


def flags(given: Given) -> Iterator[Attempt]:
    """One flag more than a run that works has."""

    def attempt(name: str, *more: str) -> Attempt:
        return Attempt(name, lambda folder: [*given.flags(folder / "out"), *more])

    for flag, values in TYPED.items():
        for value in values:
            yield attempt(f"--{flag}={value}", f"--{flag}={value}")
    yield attempt("a word without a flag", "nonsense")
    yield attempt("a flag without its value", "--model.num_layers")
    yield attempt("abbreviated", "--model.teach=x")
    yield attempt("the same flag twice", "--seed=1", "--seed=2")
    yield attempt("monitor without a plateau", "--lr_scheduler=cosine", "--lr_scheduler.monitor=nonsense")
    yield attempt("a plateau on nothing", "--lr_scheduler=reduce_on_plateau", "--lr_scheduler.monitor=nonsense")
    yield attempt("a plateau by epoch", "--lr_scheduler=reduce_on_plateau", "--lr_scheduler.monitor=val_loss",
                  "--lr_scheduler.interval=epoch")  # fmt: skip
    yield attempt("no output folder", "--output_dir")
    yield Attempt("no flags but a teacher", lambda folder: [f"--model.teacher={given.teacher}"])
    yield Attempt("no flags but data", lambda folder: [f"--data.train_file={given.files['train']}"])
    for text in CONFIGS:

        def prepare(folder: Path, text: str = text) -> list[str]:
            (folder / "config.yaml").write_text(text)
            return [*given.flags(folder / "out"), f"--config={folder / 'config.yaml'}"]

        yield Attempt(f"config {text[:40]!r}", prepare)


def data(given: Given) -> Iterator[Attempt]:
    """A training file in the place of a good one; and files where folders stand, folders where files do."""
    for name, file, content in hostile_data.inputs():

        def prepare(folder: Path, file: str = file, content: bytes = content) -> list[str]:
            (folder / file).write_bytes(content)
            return [*given.flags(folder / "out"), f"--data.train_file={folder / file}"]

        yield Attempt(name, prepare)

    def unreadable(folder: Path) -> list[str]:
        (folder / "train.tsv").mkdir()
        return [*given.flags(folder / "out"), f"--data.train_file={folder / 'train.tsv'}"]

    yield Attempt("a folder named as a file", unreadable)

    def dangling(folder: Path) -> list[str]:
        (folder / "train.tsv").symlink_to(folder / "nowhere")
        return [*given.flags(folder / "out"), f"--data.train_file={folder / 'train.tsv'}"]

    yield Attempt("a link to nothing", dangling)
    for split in ("val", "test"):
        for name, rows in {"other classes": [("a film", "x"), ("a", "y")], "one class": [("a film", 1)] * 3}.items():

            def other(folder: Path, split: str = split, rows: list[tuple[str, object]] = rows) -> list[str]:
                (folder / "other.tsv").write_text(hostile_data.tsv(rows))
                return [*given.flags(folder / "out"), f"--data.{split}_file={folder / 'other.tsv'}"]

            yield Attempt(f"{split} file of {name}", other)
        alone = [f"--data.{split}_file={given.files['val']}", f"--model.teacher={given.teacher}"]
        yield Attempt(f"{split} file alone", lambda folder, a=alone: [*a, f"--output_dir={folder / 'out'}"])


QUANTIZE = [
    "--bits=5",
    "--bits=x",
    "--bits=0",
    "--group-size=0",
    "--group-size=-2",
    "--group-size=3",
    "--embedding-bits=3",
    "--num-samples=0",
    "--num-samples=-1",
    "--max-length=0",
    "--max-length=99999",
    "--batch-size=0",
    "--batch-size=-1",
    "--model=nowhere",
    "--model=",
    "--model=/",
    "--model=/dev/null",
    "--data=nowhere",
    "--data=",
    "--data=/",
    "--data=/dev/null",
    "--output=.",
    "--output=..",
    "--output=/",
    "--output=",
    "--output=/dev/null",
    "--output=/proc/x",
    "--output=TEACHER",
    "--output=full",
    "--output=file",
    "--nonsense=1",
    "nonsense",
    "--bits",
    "--mode=x",
]
CACHE = [
    "--teacher=nowhere",
    "--teacher=",
    "--teacher=/",
    "--cache.path=/dev/null",
    "--cache.path=/proc/x",
    "--cache.path=",
    "--cache.path=full",
    "--cache.top_k=0",
    "--cache.top_k=x",
    "--cache.dtype=object",
    "--cache.signals=[x]",
    "--data=3",
    "--data=nonsense",
    "--data=torch.nn.Linear",
    "--data.train_file=nowhere.tsv",
    "--data.train_file=",
    "--data.batch_size=0",
    "--objectives=nonsense",
    "--objectives=[{}]",
    "--objectives=AttentionMap",
    "--trainer.devices=x",
    "--trainer.max_epochs=x",
    "--trainer.accelerator=gpu",
    "--nonsense=1",
    "--cache.temperatures=[0]",
    "--trainer.limit_val_batches=0",
]


def commands(given: Given) -> Iterator[Attempt]:
    """``lightning-distill`` with a flag that is wrong, missing or harmful."""

    def here(folder: Path) -> None:
        (folder / "full").mkdir()
        (folder / "full" / "thesis.txt").write_text("mine")
        (folder / "file").write_text("mine")
        (folder / "lines.txt").write_text("a warm film\na dull one\n")

    for flag in QUANTIZE:

        def quantize(folder: Path, flag: str = flag) -> list[str]:
            here(folder)
            data, out = folder / "lines.txt", folder / "out"
            words = [f"--model={given.teacher}", f"--data={data}", f"--output={out}", "--group-size=-1"]
            return [*words, flag.replace("TEACHER", str(given.teacher))]

        yield Attempt(f"quantize {flag}", quantize, "lightning-distill quantize", "out/config.json")
    for flag in CACHE:

        def cache(folder: Path, flag: str = flag) -> list[str]:
            here(folder)
            words = [f"--teacher={given.teacher}", "--data=TextClassificationData", f"--cache.path={folder / 'out'}"]
            words += [f"--data.{name}_file={path}" for name, path in given.files.items()]
            return [*words, "--trainer.accelerator=cpu", "--trainer.enable_progress_bar=false", flag]

        yield Attempt(f"cache {flag}", cache, "lightning-distill cache", "out")
    for name, words in {"no flag": [], "--help x": ["--nonsense"], "a word": ["x"]}.items():
        for command in ("quantize", "cache"):
            yield Attempt(f"{command}, {name}", lambda folder, w=words: w, f"lightning-distill {command}")


def models(given: Given) -> Iterator[Attempt]:
    """A damaged or harmful folder as a recipe's teacher, as its student, and as what ``quantize`` is to read."""
    for name, make in {**WEIGHT_FILES, **MODEL_CONFIGS, **TOKENIZERS}.items():
        for role in ("teacher", "student"):

            def train(folder: Path, make: Callable[[Path], None] = make, role: str = role) -> list[str]:
                bad = hostile(given.teacher, make, folder / "mine")
                return [*given.flags(folder / "out"), f"--model.{role}={bad}"]

            yield Attempt(f"{name}, as {role}", train)

        def quantize(folder: Path, make: Callable[[Path], None] = make) -> list[str]:
            bad = hostile(given.teacher, make, folder / "mine")
            (folder / "lines.txt").write_text("a warm film\na dull one\n")
            words = [f"--model={bad}", f"--data={folder / 'lines.txt'}", f"--output={folder / 'out'}"]
            return [*words, "--group-size=-1"]

        yield Attempt(f"{name}, to quantise", quantize, "lightning-distill quantize", "out/config.json")


KINDS: dict[str, Callable[[Given], Iterator[Attempt]]] = {
    "flags": flags,
    "data": data,
    "commands": commands,
    "models": models,
}
