"""Stretches of text that two tokenizers cut differently: where they are, and what the models say of them."""

from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule, functional
from lightning_distill.models.batch import batch_of
from lightning_distill.objectives import HardLabel, UniversalLogit
from lightning_distill.signals.signals import Signals
from lightning_distill.step.counting import before
from lightning_distill.tasks import TASKS
from tests.helpers.models import llama

TEXTS = ["the tokenizers tokenize the tokenized token", "zwölf  Boxkämpfer jagen 東京 🙂🙂 tokens", "a b  ab a"]


def tokenizer(size: int, *, bytes_: bool) -> Tokenizer:
    made = Tokenizer(models.BPE(byte_fallback=False, unk_token=None if bytes_ else "<unk>"))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if bytes_ else pre_tokenizers.Metaspace()
    made.decoder = decoders.ByteLevel() if bytes_ else decoders.Metaspace()
    alphabet = pre_tokenizers.ByteLevel.alphabet() if bytes_ else []
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    made.train_from_iterator(TEXTS, trainer)
    return made


def encoded(made: Tokenizer, first: bool) -> dict[str, Tensor]:
    """A batch of the texts, padded; with a token that begins each row, or without."""
    rows = [made.encode(text) for text in TEXTS]
    ids = [[0] * first + row.ids for row in rows]
    offsets = [[(0, 0)] * first + row.offsets for row in rows]
    length = max(map(len, ids))
    return {
        "input_ids": torch.tensor([row + [0] * (length - len(row)) for row in ids]),
        "attention_mask": torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in ids]),
        "offset_mapping": torch.tensor([row + [(0, 0)] * (length - len(row)) for row in offsets]),
    }


def both() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    return encoded(tokenizer(270, bytes_=True), True), encoded(tokenizer(60, bytes_=False), False)


def test_a_stretch_is_the_same_text_of_two_real_tokenizers() -> None:
    offsets = [one["offset_mapping"] for one in both()]
    spans = functional.shared_spans(*offsets)
    for row, text in enumerate(TEXTS):
        found = []
        for own, of in zip(spans, offsets, strict=True):
            texts = []
            for number in range(int(own[row].max()) + 1):
                pieces = of[row][own[row] == number]
                texts.append(text[int(pieces[:, 0].min()) : int(pieces[:, 1].max())].strip())
            found.append(texts)
        assert found[0] == found[1]
        assert "".join(found[0]) == text.replace(" ", "")
        assert len(found[0]) >= len(text.split())


@pytest.mark.parametrize(
    ("student", "teacher", "expected"),
    [
        # Three pieces of one character, as byte-level tokenizers have them.
        ([(0, 1), (0, 1), (0, 1), (1, 2)], [(0, 1), (1, 2)], ([0, 0, 0, 1], [0, 1])),
        # No cut in common but the last; one that only one of them has.
        ([(0, 2), (2, 4)], [(0, 1), (1, 3), (3, 4)], ([0, 0], [0, 0, 0])),
        # What follows the last common end; empty tokens anywhere.
        ([(0, 0), (0, 2), (0, 0), (2, 4)], [(0, 2), (2, 5)], ([-1, 0, -1, -1], [0, -1])),
        # One begins later in the text: its first stretch is none of the other's.
        ([(2, 4), (4, 6)], [(0, 4), (4, 6)], ([-1, 1], [-1, 1])),
        # White space belongs to the second token of one and to none of the other.
        ([(0, 1), (1, 3)], [(0, 1), (2, 3)], ([0, 1], [0, 1])),
        # A token that reaches over the next one.
        ([(0, 4), (1, 2), (4, 5)], [(0, 2), (2, 4), (4, 5)], ([0, 0, 1], [0, 0, 1])),
        ([(0, 0)], [(0, 3)], ([-1], [-1])),
    ],
)
def test_stretches(student: Any, teacher: Any, expected: Any) -> None:
    spans = functional.shared_spans(torch.tensor([student]), torch.tensor([teacher]))
    assert tuple(one[0].tolist() for one in spans) == expected


def case(dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Logits, labels and stretches of two rows: of 2 and 1 pieces, 1 and 1, 1 and 3, and one of no text."""
    generator = torch.Generator().manual_seed(0)
    logits = [torch.randn(2, length, words, dtype=dtype, generator=generator) for length, words in ((5, 6), (6, 9))]
    labels = [torch.randint(0, one.shape[-1], one.shape[:-1], generator=generator) for one in logits]
    spans = [[[0, 0, 1, 2, -1], [0, 1, 1, -1, -1]], [[0, 1, 2, 2, 2, -1], [-1, 0, 1, -1, -1, -1]]]
    return [one.requires_grad_() for one in logits], labels, [torch.tensor(one) for one in spans]


def by_hand(logits: list[Tensor], labels: list[Tensor], spans: list[Tensor], row: int, number: int) -> Tensor:
    """Of a stretch, as a distribution of whole words: the stretch itself first, then the first piece's vocabulary."""
    sides = []
    for own_logits, own_labels, own_spans in zip(logits, labels, spans, strict=True):
        at = (own_spans[row] == number).nonzero()[:, 0].tolist()
        p = torch.ones((), dtype=own_logits.dtype)
        for place in at:
            p = p * own_logits[row, place].softmax(-1)[own_labels[row, place]]
        rest = own_logits[row, at[0]].softmax(-1).clone()
        rest[own_labels[row, at[0]]] = rest[own_labels[row, at[0]]] - p
        sides.append((p, rest))
        torch.testing.assert_close(p + rest.sum(), torch.ones_like(p))
        assert rest.min() > -1e-12
    (stretch, q), (other, p) = sides
    # Word 0 of the student is word 2 of the teacher, and 4 is 1.
    matched = (stretch - other).abs() + (q[0] - p[2]).abs() + (q[4] - p[1]).abs()
    q, p = q[[1, 2, 3, 5]].sort(descending=True).values, p[[0, 3, 4, 5, 6, 7, 8]].sort(descending=True).values
    return 3 * matched + 0.5 * ((q - p[:4]).abs().sum() + p[4:].sum())


OPTIONS: dict[str, Any] = {"words": torch.tensor([[0, 2], [4, 1]]), "matched_weight": 3.0, "unmatched_weight": 0.5}


def test_is_the_definition_written_out() -> None:
    logits, labels, spans = case()
    values = functional.merged_universal_logit(*logits, *labels, *spans, reduction="none", **OPTIONS)
    places = {(0, 0): (0, 0), (0, 2): (0, 1), (0, 3): (0, 2), (1, 0): (1, 0), (1, 1): (1, 1)}
    expected = torch.zeros(2, 5, dtype=torch.float64)
    for place, stretch in places.items():
        expected[place] = by_hand(logits, labels, spans, *stretch)
    torch.testing.assert_close(values, expected)
    for reduction, total in (("mean", 5), ("sum", 1)):
        ours = functional.merged_universal_logit(*logits, *labels, *spans, reduction=reduction, **OPTIONS)
        torch.testing.assert_close(ours, expected.sum() / total)
    outside = functional.merged_universal_logit(*logits, *labels, *spans, num_items=20, **OPTIONS)
    torch.testing.assert_close(outside, expected.sum() / 20)


def test_gradcheck() -> None:
    logits, labels, spans = case()
    assert torch.autograd.gradcheck(
        lambda *both: functional.merged_universal_logit(*both, *labels, *spans, **OPTIONS), logits
    )


def test_a_stretch_with_a_token_that_does_not_count_counts_nothing() -> None:
    logits, labels, spans = case()
    whole = functional.merged_universal_logit(*logits, *labels, *spans, reduction="none", **OPTIONS)
    labels[1][0, 3] = -100  # the second of three pieces
    labels[0][1, 2] = -100
    with torch.no_grad():
        for row, place in ((0, 3), (1, 1), (1, 2), (0, 4)):
            logits[0][row, place] = torch.nan
    values = functional.merged_universal_logit(*logits, *labels, *spans, reduction="none", **OPTIONS)
    whole[0, 3] = whole[1, 1] = 0
    assert torch.equal(values, whole)
    (gradient,) = torch.autograd.grad(values.sum(), logits[0])
    assert gradient.isfinite().all()
    nothing = [torch.full_like(one, -100) for one in labels]
    loss = functional.merged_universal_logit(*logits, *nothing, *spans, **OPTIONS)
    assert loss == 0
    assert not torch.autograd.grad(loss, logits[0])[0].any()


def test_a_stretch_of_one_token_each_is_a_matched_word() -> None:
    student, teacher = torch.randn(1, 4, 7), torch.randn(1, 4, 7)
    tokens, spans = torch.tensor([[0, 3, 6, 2]]), torch.arange(4)[None]
    words = torch.arange(7)[:, None].expand(7, 2)
    ours = functional.merged_universal_logit(student, teacher, tokens, tokens, spans, spans, words=words)
    torch.testing.assert_close(ours, functional.universal_logit(student, teacher, words=words))
    torch.testing.assert_close(ours, (student.softmax(-1) - teacher.softmax(-1)).abs().sum(-1).mean())


def test_a_stretch_whose_first_piece_is_not_predicted_counts_nothing() -> None:
    # A causal model of three tokens has two answers; the first stretch is its first two tokens and one of the
    # teacher's, which begins with a token of no text.
    offsets = torch.tensor([[[0, 1], [1, 2], [2, 4]]]), torch.tensor([[[0, 0], [0, 2], [2, 4]]])
    labels = torch.zeros(1, 2, dtype=torch.long)
    student, teacher = (Signals(torch.randn(1, 2, words), labels) for words in (5, 7))
    student.offsets, teacher.offsets = offsets
    loss = UniversalLogit()(student, teacher)
    assert loss.mask is not None
    assert loss.mask.tolist() == [[False, True]]
    assert loss.count() == UniversalLogit().count(student, teacher) == 1
    student.offsets = offsets[0][:, :1]
    with pytest.raises(ValueError, match="one pair of offsets per token of the input, but got 1 for 2 labels"):
        UniversalLogit()(student, teacher)


def test_from_the_batch_to_the_loss_and_through_accumulation(tmp_path: Path) -> None:
    torch.manual_seed(0)
    own, other = both()
    batch = own | {f"teacher_{key}": value for key, value in other.items()}
    words = functional.matched_words(tokenizer(270, bytes_=True).get_vocab(), tokenizer(60, bytes_=False).get_vocab())
    student, teacher = llama(vocab_size=270), llama(vocab_size=60)
    for model in (student, teacher):
        model.config.max_position_embeddings = 128
    objective = UniversalLogit(words, matched_weight=2.0)
    module = DistillationModule(teacher, student, [objective, HardLabel(weight=0.1)])
    spans = functional.shared_spans(own["offset_mapping"], other["offset_mapping"])
    # The student's rows begin with a token of no text; the teacher cannot predict its first.
    spans = spans[0][:, 1:], spans[1][:, 1:].masked_fill(spans[1][:, 1:] == 0, -1)
    labels = [one["input_ids"].masked_fill(one["attention_mask"] == 0, -100)[:, 1:] for one in (own, other)]
    with torch.no_grad():
        logits = [
            model(**{key: one[key] for key in ("input_ids", "attention_mask")}).logits[:, :-1]
            for model, one in ((student, own), (teacher, other))
        ]
        expected = functional.merged_universal_logit(*logits, *labels, *spans, words=words, matched_weight=2.0)
        torch.testing.assert_close(module.losses(batch)["universal_logit"], expected)
    told = (before(TASKS["causal_lm"], batch_of(role, batch)) for role in ("student", "teacher"))
    assert objective.count(*told) == sum(int(one.max()) for one in spans[1])
    run = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        accumulate_grad_batches=2,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    run.fit(module, DataLoader([batch, batch], batch_size=None))
    assert "words" not in str(list(module.state_dict()))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: UniversalLogit(matched_weight=-1.0), "`matched_weight` of objective `universal_logit`.*-1.0"),
        (lambda: UniversalLogit(unmatched_weight=float("nan")), "`unmatched_weight` of objective"),
        (lambda: UniversalLogit([(0, 1), (0, 2)]), "`words` of objective.*each once"),
        (lambda: UniversalLogit([(0, 1, 2)]), "`words` of objective"),
        (lambda: functional.shared_spans(torch.zeros(1, 2), torch.zeros(1, 2)), "`student_offsets` to be integers"),
        (
            lambda: functional.shared_spans(torch.tensor([[[0, 2]]]), torch.tensor([[[0, 3], [0, 0], [3, 5], [0, 2]]])),
            "`teacher_offsets` to rise along each row.*one text",
        ),
        (
            lambda: UniversalLogit()(
                Signals(torch.zeros(1, 1, 3), torch.zeros(1, 1).long(), offsets=torch.tensor([[[0, 1]]])),
                Signals(torch.zeros(1, 1, 3), torch.zeros(1, 1).long()),
            ),
            "the student alone",
        ),
    ],
)
def test_bad_input(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
