"""Vocabulary pruning: a model and its tokenizer without the tokens that the data do not need."""

import copy
from collections import Counter
from collections.abc import Iterable
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lightning_distill.compression.tokenizer import (
    character_ids,
    closed,
    fixed_ids,
    restricted,
    state_of,
    vocabulary_of,
)
from lightning_distill.models.files import some
from lightning_distill.models.wrapped import inside

#: Fields of a config that are ids, or lists of ids, or tell what is done at an id.
_IDS = ("_token_id", "_token_ids", "_token_index")
_LISTS = ("suppress_tokens", "begin_suppress_tokens")


class PrunedVocabulary(NamedTuple):
    """What :func:`prune_vocabulary` gives.

    Args:
        model: The smaller model.
        tokenizer: Its tokenizer.
        kept: Int64 ``[vocab_size]``, for each of its tokens the id that it had, rising.
    """

    model: PreTrainedModel
    tokenizer: Any
    kept: Tensor


def prune_vocabulary(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Iterable[str],
    *,
    min_count: int = 1,
    keep_characters: bool = True,
) -> PrunedVocabulary:
    """Leave out the tokens that a model's data do not need, from its tokenizer, its embeddings and its head.

    Text that needs only tokens that stay is split as before, and the model answers it as before: with ``min_count=1``
    that holds for all of ``texts``. Other text still reads: a word whose token is gone is spelt in shorter ones. Do it
    before a distillation, to the teacher, and both models read the same ids; or after it, to the student.

    Args:
        model: A transformers model that reads text; it stays as it is.
        tokenizer: Its tokenizer, a fast one; it stays as it is.
        texts: What the model is for, such as all training rows; read once.
        min_count: How often a token must be seen there to stay. Above 1 the rare words of ``texts`` are spelt anew.
        keep_characters: Whether the tokens of a single character stay, seen or not. Without them a character that
            ``texts`` lacks is unknown. A multilingual vocabulary has thousands of them.

    Returns:
        The smaller model, in the mode and precision of the given one, its tokenizer, and the ids that were kept. Both
        are written by ``export(model, folder, tokenizer)`` and load by plain ``from_pretrained``.

    Raises:
        ValueError: If there is no text, the tokenizer is not a fast one or has more tokens than the model, or weights
            of the model follow the size of its vocabulary in no plain way (quantised, wrapped).
        TypeError: If ``texts`` is a single string, or one of them is no string.

    Example:
        >>> from tokenizers import Tokenizer, models
        >>> from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
        >>> from lightning_distill.compression import prune_vocabulary
        >>> vocabulary = {"[UNK]": 0, "a": 1, "##b": 2, "ab": 3, "lost": 4, "abab": 5}
        >>> wordpiece = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=wordpiece, unk_token="[UNK]")
        >>> sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2, "num_hidden_layers": 1}
        >>> small = prune_vocabulary(BertModel(BertConfig(vocab_size=6, **sizes)), tokenizer, ["ab", "abab"])
        >>> small.kept.tolist(), small.model.config.vocab_size
        ([0, 1, 2, 3, 5], 5)
        >>> small.tokenizer("abab").input_ids
        [4]

    Source: Abdaoui et al., "Load What You Need: Smaller Versions of Multilingual BERT", 2020.
    """
    state = state_of(tokenizer)
    known = set(vocabulary_of(state).values())
    config = _checked(model, max(known), min_count)
    kept = {index for index, count in _counts(tokenizer, texts).items() if count >= min_count}
    kept |= fixed_ids(state) | set(tokenizer.all_special_ids) | _ids_of(model, config.vocab_size)
    if keep_characters:
        kept |= character_ids(state)
    kept = closed(state, kept)
    # RoBERTa counts its positions from the id of its padding, so that may not move.
    if (pad := config.pad_token_id) is not None and 0 <= pad < 16:
        kept |= set(range(pad + 1))
    new = {old: index for index, old in enumerate(sorted(kept))}
    ids = torch.tensor(sorted(kept))
    return PrunedVocabulary(_with_rows(model, ids, new), restricted(tokenizer, state, new), ids)


def _checked(model: PreTrainedModel, largest: int, min_count: int) -> Any:
    """The config that says how many tokens a model knows."""
    if min_count < 1:
        raise ValueError(f"Expected argument `min_count` to be at least 1, but got {min_count}.")
    config = model.config.get_text_config() if isinstance(model, PreTrainedModel) else None
    if inside(model) is not model or not isinstance(getattr(config, "vocab_size", None), int):
        raise ValueError(
            "Expected argument `model` to be a plain transformers model whose config says its `vocab_size`, but got a "
            f"{type(model).__name__}. Merge an adapter into its base first: `model.merge_and_unload()`."
        )
    assert config is not None
    if largest >= config.vocab_size:
        raise ValueError(
            f"Expected argument `tokenizer` to give ids below the {config.vocab_size} that the model knows, but it has "
            f"one for {largest}. Give the tokenizer that the model was trained with."
        )
    return config


def _counts(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str]) -> "Counter[int]":
    """How often each token stands in the texts."""
    if isinstance(texts, str):
        raise TypeError(f"Expected argument `texts` to be many strings, but got one: {texts[:40]!r}. Put it in a list.")
    counts: Counter[int] = Counter()
    rows = iter(texts)
    while chunk := list(islice(rows, 1000)):
        for text in chunk:
            if not isinstance(text, str):
                raise TypeError(f"Expected argument `texts` to hold strings, but got {text!r}.")
        # Read whole: no warning that a text is longer than the model takes, for it is not put into the model here.
        encoded = tokenizer(chunk, add_special_tokens=False, truncation=False, padding=False, verbose=False)
        for ids in encoded["input_ids"]:
            counts.update(ids)
    if not counts:
        raise ValueError("Expected argument `texts` to hold text, but got none. Give the rows that the model is for.")
    return counts


def _ids_of(model: PreTrainedModel, vocab_size: int) -> set[int]:
    """The tokens that a model's configs name."""
    configs = [*_configs(model.config), *_configs(getattr(model, "generation_config", None))]
    named = (value for config in configs for name, value in vars(config).items() if name.endswith(_IDS))
    found = {index for value in named for index in (value if isinstance(value, list) else [value])}
    return {index for index in found if isinstance(index, int) and 0 <= index < vocab_size}


def _configs(config: Any) -> list[Any]:
    """A config and those in it."""
    towers = [getattr(config, name, None) for name in getattr(config, "sub_configs", None) or {}]
    return [each for each in (config, *towers) if each is not None]


def _renumber(config: Any, new: dict[int, int]) -> None:
    """Put the new ids into a config. One that names no token of the model, such as a default, stays."""
    for each in _configs(config):
        for name, value in list(vars(each).items()):
            if name.endswith(_IDS):
                ids = [new.get(index, index) for index in value] if isinstance(value, list) else new.get(value, value)
                setattr(each, name, ids)
            elif name in _LISTS and isinstance(value, list):
                setattr(each, name, [new[index] for index in value if index in new])


def _with_rows(model: PreTrainedModel, kept: Tensor, new: dict[int, int]) -> PreTrainedModel:
    """A copy of a model with some rows of all that has a row for each token."""
    config: Any = copy.deepcopy(model.config)
    _renumber(config, new)
    config.get_text_config().vocab_size = len(kept)
    with torch.random.fork_rng(devices=[]):  # what the class draws is overwritten
        small: Any = type(model)(config)
    small.generation_config = copy.deepcopy(getattr(model, "generation_config", None))
    _renumber(small.generation_config, new)
    wanted = {name: weight.shape for name, weight in small.state_dict().items()}
    weights = {name: _rows(weight, wanted.get(name), kept) for name, weight in model.state_dict().items()}
    if others := [
        name for name in {**wanted, **weights} if name not in weights or weights[name].shape != wanted.get(name)
    ]:
        raise ValueError(
            f"Expected argument `model` to be a {type(model).__name__} as its config describes it, but got others: "
            f"{some(others)}. Prune the vocabulary before anything is put onto the model's layers."
        )
    small.load_state_dict(weights, assign=True)  # in the precision of each
    small.tie_weights()
    for parameter, own in zip(small.parameters(), model.parameters(), strict=True):
        parameter.requires_grad_(own.requires_grad)
    small.to(model.device)
    return small.train(model.training)


def _rows(weight: Tensor, shape: torch.Size | None, kept: Tensor) -> Tensor:
    """A weight with the rows of the tokens that stay, along the axis that is to be as long as they are many."""
    if shape is not None and weight.ndim == len(shape):
        for axis, (size, wanted) in enumerate(zip(weight.shape, shape, strict=True)):
            if size != wanted == len(kept):
                weight = weight.index_select(axis, kept.to(weight.device))
    return weight.clone()
