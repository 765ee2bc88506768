"""A fast tokenizer with fewer tokens, which splits what it still knows as before."""

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_SPACE = "\u2581"  # that of SentencePiece, which stands before a word


def state_of(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What a fast tokenizer is made of, as it is written into ``tokenizer.json``.

    Args:
        tokenizer: A tokenizer of transformers.

    Raises:
        ValueError: If it is no fast one, or of a kind whose tokens cannot be taken away.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"Expected argument `tokenizer` to be a fast one, which keeps its tokens in `tokenizer.json`, but got a "
            f"{type(tokenizer).__name__}. Load it by `AutoTokenizer.from_pretrained`."
        )
    state: dict[str, Any] = json.loads(backend.to_str())
    model = state["model"]
    if model["type"] == "BPE" and model.get("continuing_subword_prefix"):
        raise ValueError(
            "Expected argument `tokenizer` to merge plain pieces, but got BPE with the prefix "
            f"{model['continuing_subword_prefix']!r} for pieces inside of a word, which cannot be pruned here."
        )
    return state


def vocabulary_of(state: dict[str, Any]) -> dict[str, int]:
    """The id of each token, added ones too."""
    vocabulary = state["model"]["vocab"]
    if isinstance(vocabulary, list):  # of a unigram model: its tokens in the order of their ids, each with its score
        vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
    return {**vocabulary, **{token["content"]: token["id"] for token in state["added_tokens"]}}


def fixed_ids(state: dict[str, Any]) -> set[int]:
    """The tokens that a tokenizer cannot be without: added ones, the unknown one, and those it puts around text."""
    model, known = state["model"], vocabulary_of(state)
    found = {token["id"] for token in state["added_tokens"]} | set(_around(state.get("post_processor")))
    if model.get("unk_id") is not None:
        found.add(model["unk_id"])
    if model.get("unk_token") in known:
        found.add(known[model["unk_token"]])
    return found


def character_ids(state: dict[str, Any]) -> set[int]:
    """The tokens of one character or byte, of which a word can be spelt that has no token."""
    model = state["model"]
    inside, end = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""

    def is_character(token: str) -> bool:
        plain = token.removesuffix(end) if len(token) > len(end) else token
        plain = plain.removeprefix(inside) if len(plain) > len(inside) else plain
        plain = plain.removeprefix(_SPACE) if len(plain) > 1 else plain
        return len(plain) == 1 or _BYTE.fullmatch(token) is not None

    return {index for token, index in vocabulary_of(state).items() if is_character(token)}


def closed(state: dict[str, Any], ids: set[int]) -> set[int]:
    """Tokens together with those that they are merged from, without which a BPE model never reaches them.

    A token inside of a word is merged as it is alone: a merge across its border would have taken part of it away. So
    the words that need only these tokens are split as before.
    """
    model = state["model"]
    if model["type"] != "BPE":
        return ids
    known = vocabulary_of(state)
    ranks = {pair: rank for rank, pair in enumerate(_merges(model))}
    suffix = model.get("end_of_word_suffix") or ""
    of_id = {index: token for token, index in known.items()}
    parts = {part for index in ids for part in _parts(of_id.get(index, ""), ranks, suffix)}
    return ids | {known[part] for part in parts if part in known}


def _parts(token: str, ranks: dict[tuple[str, str], int], suffix: str) -> Iterator[str]:
    """Everything that stands on the way from the characters of a token to it."""
    ends = bool(suffix) and token.endswith(suffix) and len(token) > len(suffix)
    pieces = list(token.removesuffix(suffix) if ends else token)
    if ends:
        pieces[-1] += suffix
    yield from pieces
    while len(pieces) > 1:
        best = min(range(len(pieces) - 1), key=lambda i: ranks.get((pieces[i], pieces[i + 1]), len(ranks)))
        if (pieces[best], pieces[best + 1]) not in ranks:
            return
        pieces[best : best + 2] = [pieces[best] + pieces[best + 1]]
        yield pieces[best]


def restricted(tokenizer: PreTrainedTokenizerBase, state: dict[str, Any], new: dict[int, int]) -> Any:
    """The same tokenizer with some of its tokens, under other ids.

    Args:
        tokenizer: The tokenizer, which stays as it is.
        state: What it is made of, see :func:`state_of`.
        new: The new id of each token that stays, in the order of the old ones.

    Returns:
        A tokenizer of the same class.
    """
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        (Path(folder) / "tokenizer.json").write_text(json.dumps(_renumbered(state, new), ensure_ascii=False), "utf-8")
        file = Path(folder) / "tokenizer_config.json"
        config = json.loads(file.read_text("utf-8"))
        if added := config.get("added_tokens_decoder"):
            config["added_tokens_decoder"] = {str(new[int(index)]): token for index, token in added.items()}
        file.write_text(json.dumps(config, ensure_ascii=False), "utf-8")
        for other in ("vocab.json", "vocab.txt", "merges.txt"):  # the same tokens once more
            (Path(folder) / other).unlink(missing_ok=True)
        smaller = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    smaller.name_or_path = ""
    return smaller


def _renumbered(state: dict[str, Any], new: dict[int, int]) -> dict[str, Any]:
    state = json.loads(json.dumps(state))
    model = state["model"]
    if isinstance(model["vocab"], list):
        model["vocab"] = [entry for index, entry in enumerate(model["vocab"]) if index in new]
        model["unk_id"] = None if model.get("unk_id") is None else new[model["unk_id"]]
    else:
        model["vocab"] = {token: new[index] for token, index in model["vocab"].items() if index in new}
    if model["type"] == "BPE":
        left = model["vocab"]
        pairs = [(a, b) for a, b in _merges(model) if a in left and b in left and a + b in left]
        model["merges"] = [list(pair) for pair in pairs]
    for token in state["added_tokens"]:
        token["id"] = new[token["id"]]
    if state.get("padding"):
        state["padding"]["pad_id"] = new[state["padding"]["pad_id"]]
    _renumber(state.get("post_processor"), new)
    return state


def _merges(model: dict[str, Any]) -> list[tuple[str, str]]:
    return [tuple(pair.split(" ") if isinstance(pair, str) else pair) for pair in model["merges"]]


def _around(processor: Any) -> Iterator[int]:
    """The ids that a post-processor puts around a text."""
    for part in _processors(processor):
        for token in (part.get("special_tokens") or {}).values():
            yield from token["ids"]
        yield from (part[role][1] for role in ("sep", "cls") if role in part)


def _renumber(processor: Any, new: dict[int, int]) -> None:
    for part in _processors(processor):
        for token in (part.get("special_tokens") or {}).values():
            token["ids"] = [new[index] for index in token["ids"]]
        for role in ("sep", "cls"):
            if role in part:
                part[role][1] = new[part[role][1]]


def _processors(processor: Any) -> Iterator[dict[str, Any]]:
    """A post-processor, or those that it is a sequence of."""
    if processor is not None:
        yield processor
        for part in processor.get("processors") or []:
            yield from _processors(part)
