"""Speculative decoding: the distilled student drafts, its teacher checks, the text is the teacher's."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distill.arguments import integer
from lightning_distill.generation.sampling import Prompt, pad_prompts, pad_token, seeded, settings, without_own_settings
from lightning_distill.generation.speed import tokens_per_second
from lightning_distill.models.calling import evaluating
from lightning_distill.models.tokenizers import check_vocabulary
from lightning_distill.step.pairing import check_not_shared


@dataclass
class Speculation:
    """What speculative decoding wrote, and what it took.

    Args:
        sequences: Prompt and text of each prompt, ``[T]`` int64.
        num_new_tokens: Tokens written to all prompts together.
        num_drafted: Tokens that the student proposed.
        num_teacher_calls: Forwards of the teacher.
        tokens_per_second: Median over the repeats, NaN where none was timed.
        teacher_tokens_per_second: Likewise, of the teacher alone.
    """

    sequences: list[Tensor]
    num_new_tokens: int
    num_drafted: int
    num_teacher_calls: int
    tokens_per_second: float = float("nan")
    teacher_tokens_per_second: float = float("nan")

    @property
    def acceptance(self) -> float:
        """Share of the student's proposals that are in the text."""
        # Each forward of the teacher adds one token of its own; what else is in the text was drafted.
        return (self.num_new_tokens - self.num_teacher_calls) / max(self.num_drafted, 1)

    @property
    def tokens_per_teacher_call(self) -> float:
        """Tokens that one forward of the teacher brings; 1 without a draft."""
        return self.num_new_tokens / self.num_teacher_calls

    @property
    def speedup(self) -> float:
        """Tokens per second over those of the teacher alone, NaN where none was timed."""
        return self.tokens_per_second / self.teacher_tokens_per_second


def speculative(
    teacher: nn.Module,
    student: nn.Module,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 128,
    num_draft_tokens: int = 5,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    cache_implementation: str | None = None,
    seed: int | None = None,
    repeats: int = 0,
) -> Speculation:
    """Write as the teacher would, with the student proposing tokens that the teacher checks several at a time.

    It is transformers' assisted generation, one prompt after the other. Greedy text is the teacher's own, token by
    token; drawn text has the teacher's distribution. The teacher stands first here because it is the one that writes,
    as in ``teacher.generate(assistant_model=student)``.

    Args:
        teacher: A causal language model of transformers.
        student: One with the same vocabulary; if it is padded to another size, a copy of the teacher's size drafts.
        prompts: Token ids of each prompt.
        max_new_tokens: At most this many are written to each.
        num_draft_tokens: Tokens the student proposes at a time.
        do_sample: Whether to draw; otherwise the most probable token is taken.
        temperature: Divides the logits, above 0.
        top_p: Only the most probable tokens whose mass reaches this are drawn from, in (0, 1].
        cache_implementation: ``"dynamic"`` or None. Rejected proposals are taken back out of the cache, which
            transformers can do with no other.
        seed: Seed of the draws; None: the global generator.
        repeats: How often to time it against the teacher alone, in turns; 0: not at all.

    Returns:
        The text, the acceptance rate, tokens per forward of the teacher and, with ``repeats``, the speed.

    Raises:
        ValueError: If the vocabularies differ, a prompt is empty, prompt and text do not fit into the positions of one
            of the models, or an argument is out of its range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=None)
        >>> teacher = LlamaForCausalLM(config)
        >>> found = speculative(teacher, copy.deepcopy(teacher), [[1, 4, 5]], max_new_tokens=12, num_draft_tokens=3)
        >>> found.num_new_tokens, found.num_teacher_calls, found.acceptance
        (12, 3, 1.0)

    Source: Leviathan, Kalman, Matias, "Fast Inference from Transformers via Speculative Decoding", 2023; Zhou et al.,
    "DistillSpec", 2024.
    """
    check_not_shared(student, teacher)
    check_vocabulary(student, teacher, padded=True)
    student = _with_words_of(student, teacher)
    integer("num_draft_tokens", num_draft_tokens, 1)
    if cache_implementation not in (None, "dynamic"):
        raise ValueError(
            f"Expected argument `cache_implementation` to be 'dynamic' beside a draft, but got "
            f"{cache_implementation!r}: rejected tokens cannot be taken back out of it. Use `generate(...)` for the "
            "teacher alone."
        )
    device = next(teacher.parameters()).device
    rows = [pad_prompts([prompt], pad_token(teacher), device) for prompt in (prompts if len(prompts) else [[]])]
    longest, prompt_tokens = max(ids.shape[1] for ids, _ in rows), sum(ids.shape[1] for ids, _ in rows)
    options: dict[str, Any] = {"do_sample": do_sample, "temperature": temperature, "top_p": top_p}
    settings(student, longest, max_new_tokens=max_new_tokens, **options)
    config = settings(teacher, longest, max_new_tokens=max_new_tokens, **options)

    def write(draft: Any = None) -> list[Tensor]:
        given: dict[str, Any] = {"generation_config": config, "assistant_model": draft}
        return [teacher.generate(input_ids=ids, attention_mask=mask, **given)[0] for ids, mask in rows]  # type: ignore[operator]

    def count_new(sequences: list[Tensor]) -> int:
        return sum(map(len, sequences)) - prompt_tokens

    with torch.no_grad(), evaluating(teacher, student), without_own_settings(teacher, student), seeded(seed, device):
        _draft(student, num_draft_tokens)
        with _counting(teacher) as teacher_calls, _counting(student) as drafted:
            sequences = write(student)
        found = Speculation(sequences, count_new(sequences), drafted[0], teacher_calls[0])
        if repeats:
            writers = {"both": lambda: count_new(write(student)), "alone": lambda: count_new(write())}
            speed = tokens_per_second(writers, repeats=repeats, device=device)
            found.tokens_per_second, found.teacher_tokens_per_second = speed["both"], speed["alone"]
    return found


@torch.no_grad()
def _with_words_of(student: Any, teacher: Any) -> Any:
    """The student, or a copy of the teacher's number of words where one of the two is padded."""
    words = teacher.config.get_text_config().vocab_size
    if student.config.get_text_config().vocab_size == words:
        return student
    draft = copy.deepcopy(student)
    own = student.config.get_text_config().vocab_size
    with seeded(0, next(student.parameters()).device):
        draft.resize_token_embeddings(words, mean_resizing=False)
    # As probable as words are on average: of random weights, padding would beat all words of a model whose logits are
    # far below 0, as GPT-2's are, and every proposal would be refused.
    head = draft.get_output_embeddings()
    for of_words in (head.weight, getattr(head, "bias", None)):
        if of_words is not None:
            of_words[own:] = of_words[:own].mean(0)
    return draft


def _draft(student: Any, num_draft_tokens: int) -> None:
    """Have the student propose a fixed number of tokens; transformers reads that off the student's own settings."""
    student.generation_config.num_assistant_tokens = num_draft_tokens
    student.generation_config.num_assistant_tokens_schedule = "constant"
    student.generation_config.assistant_confidence_threshold = 0.0


@contextmanager
def _counting(model: nn.Module) -> Iterator[list[int]]:
    """Forwards of a model inside the block."""
    calls = [0]

    def count(*_: Any) -> None:
        calls[0] += 1

    handle = model.register_forward_hook(count)
    try:
        yield calls
    finally:
        handle.remove()
