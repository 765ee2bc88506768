"""Packing loses no token, shows each as a label once, and keeps documents apart."""

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_distill.data import Document, PackedText
from lightning_distill.data.packing import check_packing
from tests.helpers.models import SMALL, llama

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data"
documents_of_any_length = st.lists(st.integers(1, 40), min_size=1, max_size=30).filter(lambda lengths: max(lengths) > 1)


def numbered(lengths: list[int], num_given: int = 1) -> list[Document]:
    """Documents in which no token comes twice."""
    ends = torch.tensor(lengths).cumsum(0).tolist()
    return [Document(list(range(end - n + 1, end + 1)), num_given) for n, end in zip(lengths, ends, strict=True)]


@given(documents_of_any_length, st.integers(2, 16), st.integers(1, 5))
@settings(deadline=None, max_examples=60)
def test_every_token_that_is_not_given_is_a_label_once_behind_its_own_past(
    lengths: list[int], max_length: int, num_given: int
) -> None:
    documents = numbered(lengths, num_given)
    data = PackedText(documents, max_length, pad_token_id=0)
    labels: Counter[int] = Counter()
    for row in data:
        for place in (row["labels"] != -100).nonzero().flatten().tolist():
            token = int(row["labels"][place])
            labels[token] += 1
            assert row["input_ids"][place] == token
            # What predicts it is the token before it in its own document.
            assert row["input_ids"][place - 1] == token - 1
            assert row["position_ids"][place] == row["position_ids"][place - 1] + 1
    assert labels == Counter(token for ids, given in documents for token in ids[given:])
    assert data.num_labels == labels.total()


@given(documents_of_any_length)
@settings(deadline=None, max_examples=30)
def test_rows_are_at_least_half_full_but_for_one(lengths: list[int]) -> None:
    data = PackedText(numbered(lengths), 40, pad_token_id=0)
    filled = sorted(int((row["input_ids"] != 0).sum()) for row in data)
    assert all(first + second > 40 for first, second in itertools.pairwise(filled))


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_packed_documents_get_the_logits_they_get_alone(implementation: str) -> None:
    torch.manual_seed(0)
    model = llama(attn_implementation=implementation).eval()
    documents = [Document(torch.randint(3, 60, (n,)).tolist()) for n in (5, 9, 3, 12, 2)]
    (row,) = list(PackedText(documents, 32, pad_token_id=0))
    batch = {name: row[name][None] for name in ("input_ids", "position_ids")}
    packed = model(**batch, use_cache=False).logits[0]
    for document in documents:
        begin = next(i for i in range(32) if row["input_ids"][i : i + len(document.ids)].tolist() == document.ids)
        alone = model(torch.tensor([document.ids])).logits[0]
        torch.testing.assert_close(packed[begin : begin + len(document.ids)], alone, atol=1e-5, rtol=1e-4)


def test_a_model_that_mixes_documents_is_refused() -> None:
    class Mixing(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, use_cache: bool = False) -> Any:  # type: ignore[override]
            return super().forward(input_ids, use_cache=use_cache)

    torch.manual_seed(0)
    check_packing(llama())
    with pytest.raises(ValueError, match=r"Expected argument `teacher` to keep packed documents apart"):
        check_packing(Mixing(transformers.LlamaConfig(**SMALL, num_hidden_layers=2)), "teacher")


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="Expected argument `documents`"):
        PackedText([([1], 1)], 8, 0)
    with pytest.raises(ValueError, match="Expected argument `max_length`"):
        PackedText([([1, 2], 1)], 1, 0)


def test_a_real_model_scores_packed_stories_as_it_does_one_by_one() -> None:
    if not (SHARED / "stories260k").is_dir():
        pytest.skip("needs ../shared/data, which is absent")
    model = transformers.AutoModelForCausalLM.from_pretrained(SHARED / "stories260k").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(SHARED / "stories260k")
    stories = (SHARED / "text" / "tinystories.txt").read_text().split("<|endoftext|>")[:300]
    ids = tokenizer([story.strip() for story in stories], verbose=False)["input_ids"]
    documents = [Document(row[:512]) for row in ids]
    data = PackedText(documents, 512, tokenizer.pad_token_id)
    assert data.num_labels == sum(len(document.ids) - 1 for document in documents)
    nats = 0.0
    with torch.inference_mode():
        for row in data:
            logits = model(row["input_ids"][None], position_ids=row["position_ids"][None], use_cache=False).logits
            nats += F.cross_entropy(logits[0, :-1], row["labels"][1:], reduction="sum").item()
    assert nats / data.num_labels == pytest.approx(1.500, abs=5e-4)
