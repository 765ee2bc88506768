"""Sequence-level distillation: text that the teacher writes once, kept on disk, for the student to train on."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from lightning_distill.arguments import integer, renamed
from lightning_distill.data.packing import Document
from lightning_distill.generation.sampling import Prompt, end_tokens, generate
from lightning_distill.models.fingerprints import add_tensors


def teacher_documents(
    teacher: nn.Module,
    prompts: Sequence[Prompt],
    folder: str | os.PathLike[str],
    *,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    num_beams: int = 1,
    vocab_size: int | None = None,
    batch_size: int = 32,
    seed: int = 0,
    words: int | None = None,
) -> list[Document]:
    """What a teacher writes to prompts, as documents to train a student on; made once, and read from disk after that.

    The file's name holds a digest of the teacher's weights, the tokens that end its texts, the prompts and every
    other argument: if any of them changes, the text is made anew. The file appears whole or not at all, so several
    processes may ask for it.

    Args:
        teacher: A causal language model of transformers.
        prompts: Token ids of each prompt.
        folder: Where the file is kept; made if it does not exist.
        max_new_tokens: At most this many are written to each prompt.
        do_sample: Whether to draw. The paper takes the most probable text (a beam search); for open-ended text, where
            that repeats itself, draw.
        temperature: Divides the logits, above 0.
        top_p: Only the most probable tokens whose mass reaches this are drawn from, in (0, 1].
        num_beams: Width of the beam search, 1 for none.
        vocab_size: As many words, the first of the vocabulary, may be written, where the student does not have the
            teacher's padding; None: all.
        batch_size: Prompts at a time; the text drawn depends on it.
        seed: Seed of the draws.
        words: The old name of ``vocab_size``.

    Returns:
        A document per prompt, in their order: prompt and text, of which the prompt is given and no label.

    Raises:
        ValueError: As for :func:`lightning_distill.generation.generate`.

    Example:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> config = LlamaConfig(vocab_size=9, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        ...                      num_attention_heads=2)
        >>> teacher, folder = LlamaForCausalLM(config), tempfile.mkdtemp()
        >>> documents = teacher_documents(teacher, [[1, 4], [1]], folder, max_new_tokens=5)
        >>> documents == teacher_documents(teacher, [[1, 4], [1]], folder, max_new_tokens=5)
        True
        >>> documents[0].ids[:2], documents[0].num_given
        ([1, 4], 2)

    Source: Kim, Rush, "Sequence-Level Knowledge Distillation", 2016.
    """
    options: dict[str, Any] = {
        "max_new_tokens": max_new_tokens,
        "do_sample": do_sample,
        "temperature": temperature,
        "top_p": top_p,
        "num_beams": num_beams,
        "vocab_size": renamed("words", words, "vocab_size", vocab_size),
    }
    integer("batch_size", batch_size, 1)
    rows = [[int(token) for token in prompt] for prompt in prompts]
    # The tokens that end a text are all that a model's own settings say.
    ends = end_tokens(teacher)
    digest = hashlib.sha256(repr((sorted(options.items()), batch_size, seed, rows, ends)).encode())
    add_tensors(digest, teacher.state_dict().items())
    file = Path(folder) / f"teacher-{digest.hexdigest()[:16]}.safetensors"
    if not file.is_file():
        _write(file, rows, _generations(teacher, rows, batch_size, seed, options))
    kept = safetensors.torch.load_file(file)
    texts = kept["ids"].split(kept["lengths"].tolist())
    return [Document(ids.tolist(), given) for ids, given in zip(texts, kept["num_given"].tolist(), strict=True)]


def _generations(
    teacher: nn.Module, rows: list[list[int]], batch_size: int, seed: int, options: dict[str, Any]
) -> list[list[int]]:
    """Prompt and text of each row. Rows of one length go together, so that little is padding."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    found: list[list[int]] = [[] for _ in rows]
    for begin in range(0, max(len(order), 1), batch_size):
        chosen = order[begin : begin + batch_size]
        batch = generate(teacher, [rows[index] for index in chosen], **options, seed=seed + begin)
        for index, ids, mask in zip(chosen, batch["input_ids"], batch["attention_mask"].bool(), strict=True):
            found[index] = ids[mask].tolist()
    return found


def _write(file: Path, rows: list[list[int]], texts: list[list[int]]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f"{file.name}.{os.getpid()}.tmp")
    tensors = {
        "ids": torch.tensor([token for ids in texts for token in ids], dtype=torch.int32),
        "lengths": torch.tensor([len(ids) for ids in texts]),
        "num_given": torch.tensor([len(ids) for ids in rows]),
    }
    safetensors.torch.save_file(tensors, draft)
    draft.replace(file)
