"""One run of a language model recipe: its text and teacher, on-policy and sequence-level phases, the report."""

import time
from dataclasses import dataclass
from typing import Any

import transformers
from jsonargparse import ArgumentParser, Namespace

from lightning_distill.cli.report import Column
from lightning_distill.cli.run import BASELINE, Run, say, student_parser
from lightning_distill.data import LanguageModelData
from lightning_distill.data.packing import check_packing
from lightning_distill.generation import OnPolicyDistillation, generate, speculative, teacher_documents
from lightning_distill.generation.sampling import settings
from lightning_distill.generation.speed import tokens_per_second
from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.models.pretrained import load_pretrained, load_tokenizer
from lightning_distill.models.tokenizers import shared_words
from lightning_distill.module import DistillationModule
from lightning_distill.objectives import HardLabel, Objective, SoftTarget

# Small models from scratch want a higher learning rate than pretrained ones. A teacher is trained until it learns no
# more: a student begins with its weights, and one of a teacher that is still learning does better on the text alone.
GIVEN = {"lr": 3e-4, "epochs": 1, "teacher_epochs": 1}
EMBEDDED = {"lr": 2e-3, "epochs": 2, "teacher_epochs": 7}
EMBEDDED_ROWS_PER_CLASS, EMBEDDED_LENGTH = 1300, 128


def language_parser(description: str | None, *, output_dir: str) -> ArgumentParser:
    """Make the parser of a recipe that distils a causal language model.

    Args:
        description: The recipe's docstring, shown by ``--help``.
        output_dir: Default of ``--output_dir``.

    Returns:
        A parser to which the recipe may add flags of its own.
    """
    parser = student_parser(description, output_dir=output_dir, data=LanguageModelData, baseline=True)
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


@dataclass
class LanguageRun(Run):
    """A run of a language model recipe."""

    @classmethod
    def read(cls, config: Namespace) -> tuple[LanguageModelData, transformers.PreTrainedModel, dict[str, Any]]:
        """The embedded text where the flags name neither teacher nor data, else what they name."""
        path, text = config.model.teacher, config.data.text_files or config.data.hub_dataset
        if not path and not text and not config.data.val_files and not config.data.test_files:
            return *_embedded(config), EMBEDDED
        if not path or not text:
            raise ValueError(
                "--model.teacher and --data.text_files (or --data.hub_dataset) go together; one is missing"
            )
        teacher: Any = load_pretrained(path, "--model.teacher")
        tokenizer = load_tokenizer(path, "--model.teacher", teacher)
        return LanguageModelData(**config.data.as_dict(), tokenizer=tokenizer, seed=config.seed), teacher, GIVEN

    def check(self) -> None:
        """Refuse rows longer than the models' positions, models that mix them, wrong ``--generation.*``."""
        student = self.new_student()
        for name, model in (("teacher", self.teacher), ("student", student)):
            settings(model, self.config.generation.prompt_length, **self._sampling)
            positions = getattr(model.config.get_text_config(), "max_position_embeddings", self.data.max_length)
            if self.data.max_length > positions:
                raise ValueError(
                    f"--data.max_length is {self.data.max_length}, and the {name} has {positions} positions; lower it"
                )
            check_packing(model, f"--model.{name}")
        if self.config.generation.on_policy and not any(o.needs_teacher for o in self.objectives or ()):
            raise ValueError(
                "--generation.on_policy needs an objective that reads the teacher: the student's own text has no other "
                "score"
            )

    @property
    def _sampling(self) -> dict[str, Any]:
        flags = self.config.generation
        drawn = {name: flags[name] for name in ("max_new_tokens", "temperature", "top_p")}
        return {**drawn, "do_sample": True}

    @property
    def metric(self) -> str:
        """Perplexity: the exponential of the mean over all tokens that are predicted."""
        return "perplexity"

    @property
    def objectives(self) -> list[Objective] | None:
        """What ``--objectives`` asks for, or the teacher's distribution at temperature 1 and some of the labels."""
        return super().objectives or [SoftTarget(temperature=1.0, weight=0.9), HardLabel(weight=0.1)]

    def module(self, teacher: Any, student: Any, objectives: list[Objective] | None) -> DistillationModule:
        """The module of a phase, on-policy where the flags ask for it and there is a teacher to score."""
        flags = self.config.generation
        if flags.on_policy and teacher is not None and any(o.needs_teacher for o in objectives or ()):
            module: DistillationModule = OnPolicyDistillation(
                teacher,
                student,
                objectives,
                on_policy=flags.on_policy,
                prompt_length=flags.prompt_length,
                max_new_tokens=flags.max_new_tokens,
                sampling_temperature=flags.temperature,
                top_p=flags.top_p,
                seed=self.config.seed,
                **self.training(teacher, lambda: module),
            )
            return module
        return super().module(teacher, student, objectives)

    def write_training_text(self) -> None:
        """Put the teacher's continuations in the place of the training documents, where the flags ask for it."""
        flags = self.config.generation
        if not flags.sequence_level:
            return
        documents = self.data.documents("train")
        say(f"\nThe teacher writes {len(documents)} documents, into {self.config.output_dir / 'teacher_text'}")
        prompts = [document.ids[: flags.prompt_length] for document in documents]
        folder = self.config.output_dir / "teacher_text"
        words = shared_words(self.new_student(), self.teacher)
        written = teacher_documents(self.teacher, prompts, folder, **self._sampling, words=words, seed=self.config.seed)
        self.data.replace_training_documents(written)

    def report(self) -> None:
        """Measure the models side by side on rank 0; print the table, write ``summary.json`` and ``curves.png``."""
        assert self.trainer is not None
        if not self.trainer.is_global_zero:
            return
        seconds = time.perf_counter() - self.started
        for model in self.models.values():
            model.to(self.trainer.strategy.root_device)  # type: ignore[arg-type]
        flags = self.config.generation
        documents = self.data.documents("test")[: flags.num_prompts]
        prompts = [document.ids[: flags.prompt_length] for document in documents]
        speed, more = self._speed(prompts), {}
        if prompts:
            say(f"\nMeasuring the student as a draft, on {len(prompts)} prompts")
            more["speculative"] = self._speculative(prompts)
        rows = {
            name: {
                **self.sizes(model),
                "perplexity": self.scores[name]["test_perplexity"],
                "agreement": self.scores[name].get("test_agreement", 1.0),
                "tokens_per_second": speed.get(name),
            }
            for name, model in self.models.items()
        }
        columns = [
            Column("parameters", "parameters", "{:.2f} M", 1e-6),
            Column("on disk", "bytes", "{:.1f} MB", 1e-6),
            Column("perplexity (test)", "perplexity", "{:.3f}"),
            Column("agreement", "agreement", "{:.4f}", name=None),
        ]
        if prompts:
            columns.append(Column("tokens / s", "tokens_per_second", "{:.0f}"))
        tokens = self.data.dataset("test").num_labels
        self.write_report(rows, columns, what="tokens", available=tokens, seconds=seconds, **more)
        if prompts:
            found = more["speculative"]
            print(
                f"As a draft: {found['acceptance']:.1%} accepted, {found['acceptance_before']:.1%} before "
                f"distillation; {found['tokens_per_teacher_call']:.2f} tokens per teacher call, speed x "
                f"{found['speedup']:.2f}"
            )

    def _speed(self, prompts: list[Any]) -> dict[str, float]:
        """Tokens per second that each model writes to one prompt after the other."""
        length = self.config.generation.max_new_tokens

        def writer(model: Any) -> Any:
            def write() -> int:
                batches = (generate(model, [prompt], max_new_tokens=length, do_sample=False) for prompt in prompts)
                return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)

            return write

        writers = {name: writer(model) for name, model in self.models.items()}
        options: dict[str, Any] = {"device": self.teacher.device, "progress": self.shows_progress}
        return tokens_per_second(writers, repeats=3, **options) if prompts else {}

    def _speculative(self, prompts: list[Any]) -> dict[str, float]:
        """What the student is worth as a draft: distilled, as it was made, and trained without a teacher."""
        flags = self.config.generation
        options = {"max_new_tokens": flags.max_new_tokens, "num_draft_tokens": flags.num_draft_tokens}
        found = speculative(self.teacher, self.models["student"], prompts, **options, repeats=3)
        others: dict[str, Any] = {"acceptance_before": self.new_student().to(self.teacher.device)}  # type: ignore[arg-type]
        if BASELINE in self.models:
            others["acceptance_without_distillation"] = self.models[BASELINE]
        return {
            "acceptance": round(found.acceptance, 4),
            "tokens_per_teacher_call": round(found.tokens_per_teacher_call, 4),
            "speedup": round(found.speedup, 4),
            **{
                name: round(speculative(self.teacher, draft, prompts, **options).acceptance, 4)
                for name, draft in others.items()
            },
        }


def _embedded(config: Namespace) -> tuple[LanguageModelData, transformers.PreTrainedModel]:
    """Text of the installed packages, and an untrained small Llama for it."""
    data = LanguageModelData.embedded(
        max_rows_per_class=EMBEDDED_ROWS_PER_CLASS,
        seed=config.seed,
        **{**config.data.as_dict(), "max_length": EMBEDDED_LENGTH},
    )
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=EMBEDDED_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return data, transformers.LlamaForCausalLM(llama)
