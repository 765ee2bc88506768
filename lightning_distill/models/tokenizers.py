"""Whether two models read text in the same tokens."""

import json
from pathlib import Path
from typing import Any

import transformers
from torch import nn

ANOTHER_TOKENIZER = (
    "Give the student the teacher's tokenizer, or, where they read text in different words, learn by "
    "`objectives.UniversalLogit` in place of the objectives that compare word with word."
)


OWN_INPUTS = (
    "Give the student the teacher's tokenizer, or put what the teacher reads into the batch as `teacher_input_ids`, "
    "`teacher_attention_mask` and so on, and pass `own_teacher_inputs=True`."
)


def check_vocabulary(
    student: nn.Module, teacher: nn.Module, *, padded: bool = False, advice: str = ANOTHER_TOKENIZER
) -> None:
    """Refuse two models whose token ids do not mean the same.

    Args:
        student: The model that learns, or drafts.
        teacher: The model that is imitated.
        padded: Whether one may have unused words at its end, see :func:`shared_vocab_size`.
        advice: What to do, said with the error.

    Raises:
        ValueError: If their vocabularies differ in size, or the tokenizers beside their weights differ.
    """
    check_sizes(student, teacher, padded=padded, advice=advice)
    check_tokenizers(student, teacher, advice)


def check_sizes(student: nn.Module, teacher: nn.Module, *, padded: bool, advice: str) -> None:
    """Refuse vocabularies of different sizes, see :func:`check_vocabulary`."""
    if not padded or shared_vocab_size(student, teacher) is None:
        check_equal("vocab_size", getattr(student, "config", None), getattr(teacher, "config", None), advice)


def check_tokenizers(student: nn.Module, teacher: nn.Module, advice: str) -> None:
    """Refuse tokenizers that give other ids to the same tokens, see :func:`check_vocabulary`."""
    if other_tokenizers(student, teacher):
        paths = [model.config.name_or_path for model in (student, teacher)]  # type: ignore[union-attr]
        raise ValueError(
            "Expected arguments `student` and `teacher` to have the same tokenizer, but those of "
            f"{paths[0]!r} and {paths[1]!r} give other ids to the same tokens. {advice}"
        )


def other_tokenizers(student: nn.Module, teacher: nn.Module) -> bool:
    """Whether the tokenizers beside the weights of two models are known to differ.

    Args:
        student: The model that learns.
        teacher: The model that is imitated.

    Returns:
        False also where one of them has no tokenizer on this machine.
    """
    paths = [getattr(getattr(model, "config", None), "name_or_path", "") for model in (student, teacher)]
    if paths[0] == paths[1] or not all(paths):
        return False
    first, second = (_vocabulary(path) for path in paths)
    if first is None or second is None or type(first[0]) is not type(second[0]):
        return False
    # Tokens added to one of them alone are ids that the other model has not, or has and never saw.
    added = first[1].keys() & second[1].keys()
    return first[0] != second[0] or any(first[1][index] != second[1][index] for index in added)


def _vocabulary(path: str) -> tuple[Any, dict[int, str]] | None:
    """The tokens of the tokenizer in a model's folder, and those added to it by id; None where there is none here."""
    file = _local_file(path, "tokenizer.json")
    if file is not None:
        tokenizer = json.loads(file.read_text(encoding="utf-8"))
        vocabulary = tokenizer["model"].get("vocab")
        # A unigram model lists its tokens in the order of their ids, each with a score that is no part of its meaning.
        if isinstance(vocabulary, list):
            vocabulary = {token: index for index, (token, _) in enumerate(vocabulary)}
        return vocabulary, {token["id"]: token["content"] for token in tokenizer.get("added_tokens") or []}
    if (file := _local_file(path, "vocab.json")) is not None:
        return json.loads(file.read_text(encoding="utf-8")), {}
    if (file := _local_file(path, "vocab.txt")) is not None:
        words = file.read_text(encoding="utf-8").splitlines()
        return {word: index for index, word in enumerate(words)}, {}
    return None


def _local_file(path: str, name: str) -> Path | None:
    try:
        file = transformers.utils.cached_file(
            path, name, local_files_only=True, _raise_exceptions_for_missing_entries=False
        )
    except OSError:  # a folder that is no longer there
        return None
    return None if file is None else Path(file)


def shared_vocab_size(student: nn.Module, teacher: nn.Module) -> int | None:
    """Number of words that two vocabularies of different sizes share, if the larger is padded.

    A vocabulary is padded to a round number for speed, and models of one family differ in it: Qwen 2.5 has 151,936
    words at 0.5 billion parameters and 152,064 at 7 billion, of the same tokenizer.

    Args:
        student: The model that learns.
        teacher: The model that is imitated.

    Returns:
        The smaller size where the larger is a multiple of 64 that is less than 512 above it; otherwise None.
    """
    sizes = [getattr(getattr(model, "config", None), "vocab_size", None) for model in (student, teacher)]
    known = sorted(size for size in sizes if isinstance(size, int))
    if len(known) < 2:
        return None
    smaller, larger = known
    padded = smaller > 1024 and larger % 64 == 0 and 0 < larger - smaller < 512
    return smaller if padded else None


def check_equal(field: str, student_config: Any, teacher_config: Any, advice: str) -> None:
    """Refuse two configs that both have a field and differ in it."""
    student_value, teacher_value = getattr(student_config, field, None), getattr(teacher_config, field, None)
    if student_value is not None and teacher_value is not None and student_value != teacher_value:
        raise ValueError(
            f"Expected arguments `student` and `teacher` to have the same `{field}`, but got {student_value} and "
            f"{teacher_value}. {advice}"
        )
