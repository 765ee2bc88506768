"""Text that a model writes to prompts, as a batch that a model can be trained on."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers.utils import is_hqq_available, is_optimum_quanto_available

from lightning_distill.arguments import between, integer, one_of, renamed
from lightning_distill.models.batch import IGNORE_INDEX
from lightning_distill.models.calling import evaluating
from lightning_distill.models.wrapped import inside
from lightning_distill.signals.description import describe

CACHES = ("dynamic", "static", "offloaded", "offloaded_static", "quantized")
Prompt = Sequence[int] | Tensor


@contextmanager
def seeded(seed: int | None, device: torch.device) -> Iterator[None]:
    """Draw from a seed inside the block; the random numbers after it are those that would have come without it.

    Without a seed, draw from the global generator, and leave it where it stops.
    """
    if seed is None:
        yield
        return
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def settings(
    model: Any,
    prompt_length: int,
    *,
    max_new_tokens: int,
    do_sample: bool,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    cache_implementation: str | None = None,
    vocab_size: int | None = None,
) -> transformers.GenerationConfig:
    """Check how a model is to write, and say it in transformers' form; it holds inside :func:`without_own_settings`.

    Arguments are those of :func:`generate`, but for the tokens of the longest prompt.

    Raises:
        TypeError: If it is no causal language model of transformers, nor a peft model of one.
        ValueError: If an argument is out of its range, or the text would be longer than the model's positions.
        ModuleNotFoundError: If the kind of cache needs a package that is missing.
    """
    base = inside(model)
    writes = isinstance(base, transformers.PreTrainedModel) and base.can_generate()
    if not writes or model.config.is_encoder_decoder:
        raise TypeError(
            f"Expected a causal language model of transformers, such as `LlamaForCausalLM`, but got "
            f"`{type(model).__name__}`."
        )
    integer("max_new_tokens", max_new_tokens, 1)
    integer("num_beams", num_beams, 1)
    if not (isinstance(temperature, int | float) and 0 < temperature < math.inf):
        raise ValueError(
            f"Expected argument `temperature` to be finite and above 0, but got {temperature!r}. For the most probable "
            "token, which temperature 0 would mean, pass `do_sample=False`."
        )
    between("top_p", top_p, 0, 1)
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and prompt_length + max_new_tokens > positions:
        raise ValueError(
            f"Expected prompt and new tokens to fit into the {positions} positions of the model, but got "
            f"{prompt_length} + {max_new_tokens}. Lower `max_new_tokens`, or shorten the prompt."
        )
    own_size = model.config.get_text_config().vocab_size
    drawn = {"temperature": float(temperature), "top_p": float(top_p), "top_k": 0} if do_sample else {}
    return transformers.GenerationConfig(
        do_sample=do_sample,
        max_new_tokens=max_new_tokens,
        num_beams=num_beams,
        eos_token_id=end_tokens(model) or None,
        pad_token_id=pad_token(model),
        use_cache=True,
        suppress_tokens=None if vocab_size is None else list(range(vocab_size, own_size)) or None,
        **drawn,
        **_cache(model, cache_implementation),
    )


def _cache(model: Any, kind: str | None) -> dict[str, Any]:
    """What transformers is told of the KV cache."""
    if kind is None:
        return {}
    one_of("cache_implementation", kind, CACHES)
    if kind != "quantized":
        return {"cache_implementation": kind}
    info = describe(model)
    # Tokens share a scale in groups that must divide what a token keeps: its key-value heads.
    kept = (info.num_key_value_heads or 1) * (info.head_width or 1)
    backend = "quanto" if is_optimum_quanto_available() else "hqq" if is_hqq_available() else None
    if backend is None:
        raise ModuleNotFoundError(
            "Expected argument `cache_implementation` to name a cache that can be had, but 'quantized' needs "
            'optimum-quanto or hqq; run: pip install "lightning-distill[quantized-cache]"'
        )
    config = {"backend": backend, "q_group_size": math.gcd(64, kept)}
    return {"cache_implementation": kind, "cache_config": config}


@contextmanager
def without_own_settings(*models: nn.Module) -> Iterator[None]:
    """Have models write by the settings they are called with alone, and not by what they ship, while the block lasts.

    ``generate`` fills what its caller leaves open from the model's ``generation_config``: a repetition penalty, words
    that are never written, a least length. A list of all that to switch off would be as old as its day.
    """
    # A peft model has those of the model inside it.
    owners: list[Any] = [part for model in models for part in model.modules() if "generation_config" in vars(part)]
    own = [(owner, owner.generation_config) for owner in owners]
    for owner in owners:
        owner.generation_config = transformers.GenerationConfig()
    try:
        yield
    finally:
        for owner, config in own:
            owner.generation_config = config


def end_tokens(model: Any) -> list[int]:
    """The tokens that end a text of a model; none where its settings name none."""
    eos = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    eos = model.config.get_text_config().eos_token_id if eos is None else eos
    return [] if eos is None else [eos] if isinstance(eos, int) else list(eos)


def pad_token(model: Any) -> int:
    """A token to fill with; masks, not its value, say what is filling."""
    pad = model.config.get_text_config().pad_token_id
    return pad if isinstance(pad, int) else next(iter(end_tokens(model)), 0)


def pad_prompts(prompts: Sequence[Prompt], pad_token_id: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Put prompts of different lengths into ``input_ids`` and ``attention_mask`` ``[B, P]`` that end at the right side.

    Raises:
        ValueError: If there is no prompt, or one is empty.

    Example:
        >>> ids, mask = pad_prompts([[5, 6], [7]], pad_token_id=0, device=torch.device("cpu"))
        >>> ids.tolist(), mask.tolist()
        ([[5, 6], [0, 7]], [[1, 1], [0, 1]])
    """
    if len(prompts) == 0:
        raise ValueError("Expected argument `prompts` to have at least one prompt, but got none.")
    rows = [torch.as_tensor(prompt, dtype=torch.int64, device=device) for prompt in prompts]
    for index, row in enumerate(rows):
        if row.ndim != 1 or not len(row):
            raise ValueError(
                f"Expected argument `prompts` to hold rows of at least one token, but prompt {index} has shape "
                f"{list(row.shape)}. Begin with the tokenizer's first token."
            )
    ids = pad_sequence(rows, True, pad_token_id, "left")
    mask = pad_sequence([torch.ones_like(row) for row in rows], True, 0, "left")
    return ids, mask


@torch.no_grad()
def generate(
    model: nn.Module,
    prompts: Sequence[Prompt],
    *,
    max_new_tokens: int = 64,
    do_sample: bool = True,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    cache_implementation: str | None = None,
    vocab_size: int | None = None,
    seed: int | None = None,
    synced_gpus: bool = False,
    words: int | None = None,
) -> dict[str, Tensor]:
    """Let a model write to prompts, in one batch with a KV cache, in eval and without gradients.

    Of the model's own ``generation_config`` only the tokens that end a text count. Every module is in its mode again
    afterwards, and with a seed the global random numbers are as if nothing had been drawn.

    Args:
        model: A causal language model of transformers, or a peft model of one.
        prompts: Token ids of each prompt, of any lengths.
        max_new_tokens: At most this many are written to each.
        do_sample: Whether to draw; otherwise the most probable token is taken.
        temperature: Divides the logits, above 0.
        top_p: Only the most probable tokens whose mass reaches this are drawn from, in (0, 1].
        num_beams: Width of a beam search, 1 for none.
        cache_implementation: ``"dynamic"``, ``"static"``, ``"offloaded"``, ``"offloaded_static"`` or ``"quantized"``.
        vocab_size: As many words, the first of the vocabulary, may be written, where the last ones are padding that who
            reads the text does not have; None: all.
        seed: Seed of the draws; None: the global generator.
        synced_gpus: Whether ranks that share one sharded model must run equally many forwards.
        words: The old name of ``vocab_size``.

    Returns:
        A batch to train on: ``input_ids``, ``attention_mask``, ``position_ids`` and ``labels``, each ``[B, T]`` int64,
        prompts padded on the left, texts on the right. Labels are the written tokens, the one that ends a text among
        them, and -100 at prompts and padding.

    Raises:
        ValueError: If a prompt is empty, prompt and text do not fit into the model's positions, or an argument is out
            of its range.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2, eos_token_id=2)
        >>> batch = generate(LlamaForCausalLM(config), [[1, 4, 5], [1]], max_new_tokens=6, seed=0)
        >>> batch["attention_mask"][:, :3].tolist(), batch["labels"][:, :3].unique().tolist()
        ([[1, 1, 1], [0, 0, 1]], [-100])
    """
    writer: Any = model
    vocab_size = renamed("words", words, "vocab_size", vocab_size)
    device = next(model.parameters()).device
    ids, mask = pad_prompts(prompts, pad_token(model) if hasattr(model, "config") else 0, device)
    config = settings(
        model,
        ids.shape[1],
        max_new_tokens=max_new_tokens,
        do_sample=do_sample,
        temperature=temperature,
        top_p=top_p,
        num_beams=num_beams,
        cache_implementation=cache_implementation,
        vocab_size=vocab_size,
    )
    ends = end_tokens(model)
    with evaluating(model), without_own_settings(model), seeded(seed, device):
        sequences = writer.generate(
            input_ids=ids, attention_mask=mask, generation_config=config, synced_gpus=synced_gpus
        )
    return _as_batch(sequences, mask, ends)


def _as_batch(sequences: Tensor, prompt_mask: Tensor, ends: list[int]) -> dict[str, Tensor]:
    written = sequences[:, prompt_mask.shape[1] :]
    is_end = torch.isin(written, torch.tensor(ends, device=written.device))
    # The padding token may be the one that ends a text, so what counts is what no end stands before.
    real = is_end.cumsum(-1) - is_end.long() == 0
    mask = torch.cat([prompt_mask, real.long()], dim=1)
    labels = torch.cat([torch.full_like(prompt_mask, IGNORE_INDEX), written.masked_fill(~real, IGNORE_INDEX)], dim=1)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    return {"input_ids": sequences, "attention_mask": mask, "position_ids": positions, "labels": labels}
