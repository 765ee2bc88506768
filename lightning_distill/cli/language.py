"""What the recipe of language models needs that teaches nothing: embedded text, checks, speed, rows of a report."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import transformers

from lightning_distill.cli.flags import BASELINE
from lightning_distill.cli.parser import Flags
from lightning_distill.cli.report import Column, write_report
from lightning_distill.cli.screen import say
from lightning_distill.data import LanguageModelData
from lightning_distill.data.packing import check_packing
from lightning_distill.generation import generate, speculative
from lightning_distill.generation.sampling import settings
from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.objectives import Objective

_ROWS_PER_CLASS, _LENGTH = 1300, 128


def embedded_documents(flags: Flags) -> tuple[LanguageModelData, transformers.PreTrainedModel]:
    """Text of the installed packages, and an untrained small Llama for it."""
    arguments = flags.data.as_dict() | {"max_length": _LENGTH, "seed": flags.seed}
    data = LanguageModelData.embedded(max_rows_per_class=_ROWS_PER_CLASS, **arguments)
    tokenizer = data.tokenizer
    assert isinstance(tokenizer, transformers.PreTrainedTokenizerBase)
    llama = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=_LENGTH,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=True,
    )
    return data, transformers.LlamaForCausalLM(llama)


def check_lengths(flags: Flags, data: LanguageModelData, models: Mapping[str, Any]) -> None:
    """Refuse rows longer than the models' positions, models that mix documents of a row, wrong ``--generation.*``.

    Raises:
        ValueError: If it is so.
    """
    for name, model in models.items():
        settings(model, flags.generation.prompt_length, **sampling(flags))
        positions = getattr(model.config.get_text_config(), "max_position_embeddings", data.max_length)
        if data.max_length > positions:
            raise ValueError(
                f"--data.max_length is {data.max_length}, and the {name} has {positions} positions; lower it"
            )
        check_packing(model, f"--model.{name}")


def sampling(flags: Flags) -> dict[str, Any]:
    """How text is drawn, as ``--generation.*`` say it."""
    drawn = {name: flags.generation[name] for name in ("max_new_tokens", "temperature", "top_p")}
    return {**drawn, "do_sample": True}


def on_policy_arguments(flags: Flags, objectives: list[Objective]) -> dict[str, Any]:
    """What ``OnPolicyDistillation`` takes beside what any module takes, as ``--generation.*`` say it.

    Raises:
        ValueError: If none of the objectives reads the teacher.
    """
    if not any(objective.needs_teacher for objective in objectives):
        raise ValueError(
            "--generation.on_policy needs an objective that reads the teacher: the student's own text has no other "
            "score"
        )
    drawn = {name: flags.generation[name] for name in ("on_policy", "prompt_length", "max_new_tokens", "top_p")}
    return {**drawn, "sampling_temperature": flags.generation.temperature, "seed": flags.seed}


def prompts_of(flags: Flags, documents: Sequence[Any]) -> list[Any]:
    """The first ``--generation.prompt_length`` tokens of documents."""
    return [document.ids[: flags.generation.prompt_length] for document in documents]


def writer(flags: Flags, model: Any, prompts: Sequence[Any]) -> Callable[[], int]:
    """What writes on from one prompt after the other, and returns how many tokens that were."""
    length = flags.generation.max_new_tokens

    def write() -> int:
        batches = (generate(model, [prompt], max_new_tokens=length, do_sample=False) for prompt in prompts)
        return sum(int((batch["labels"] != IGNORE_INDEX).sum()) for batch in batches)

    return write


def measure_draft(flags: Flags, models: Mapping[str, Any], before: Any, prompts: Sequence[Any]) -> dict[str, float]:
    """What the student is worth as its teacher's draft: distilled, as it was made before, and without a teacher."""
    say(f"\nMeasuring the student as a draft, on {len(prompts)} prompts")
    teacher = models["teacher"]
    options = {name: flags.generation[name] for name in ("max_new_tokens", "num_draft_tokens")}
    found = speculative(teacher, models["student"], prompts, **options, repeats=3)
    others = {"acceptance_before": before}
    if BASELINE in models:
        others["acceptance_without_distillation"] = models[BASELINE]
    return {
        "acceptance": round(found.acceptance, 4),
        "tokens_per_teacher_call": round(found.tokens_per_teacher_call, 4),
        "speedup": round(found.speedup, 4),
        **{
            name: round(speculative(teacher, draft, prompts, **options).acceptance, 4) for name, draft in others.items()
        },
    }


def report_language(
    flags: Flags,
    data: LanguageModelData,
    models: Mapping[str, Any],
    scores: Mapping[str, Mapping[str, float]],
    speed: Mapping[str, float],
    *,
    seconds: float,
    **more: Any,
) -> None:
    """Print the table, write ``summary.json`` and ``curves.png``; see ``write_report``.

    ``speed`` is empty where tokens per second were not measured.
    """
    rows = {
        name: {
            "perplexity": scores[name]["test_perplexity"],
            "agreement": scores[name].get("test_agreement", 1.0),
            "tokens_per_second": speed.get(name),
        }
        for name in models
    }
    columns = [
        Column("parameters", "parameters", "{:.2f} M", 1e-6),
        Column("on disk", "bytes", "{:.1f} MB", 1e-6),
        Column("perplexity (test)", "perplexity", "{:.3f}"),
        Column("agreement", "agreement", "{:.4f}", name=None),
        *([Column("tokens / s", "tokens_per_second", "{:.0f}")] if speed else []),
    ]
    write_report(
        flags, models, scores, rows, columns, metric="perplexity", what="tokens",
        available=data.dataset("test").num_labels, seconds=seconds, **more,
    )  # fmt: skip
    if found := more.get("speculative"):
        print(
            f"As a draft: {found['acceptance']:.1%} accepted, {found['acceptance_before']:.1%} before "
            f"distillation; {found['tokens_per_teacher_call']:.2f} tokens per teacher call, speed x "
            f"{found['speedup']:.2f}"
        )
