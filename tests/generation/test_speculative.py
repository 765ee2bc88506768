"""With a draft the text is the teacher's own: token by token where it is greedy, in distribution where it is drawn."""

import copy
from typing import Any

import pytest
import torch
import transformers

from lightning_distill.generation import generate, speculative
from lightning_distill.generation.speculative import _with_words_of
from tests.helpers.models import llama

PROMPTS = [[1, 5, 9, 12], [1, 7], [1, 8, 3]]


def pair(**config: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    teacher, student = llama(layers=3, **config), llama(layers=1, **config)
    return teacher, student


@pytest.mark.parametrize("num_draft_tokens", [1, 4])
@pytest.mark.parametrize("eos", [None, 2])
def test_greedy_text_is_the_teachers_token_by_token(num_draft_tokens: int, eos: int | None) -> None:
    teacher, student = pair(eos_token_id=eos)
    # A draft that is right now and then: halfway between the teacher and something else.
    half = copy.deepcopy(teacher)
    with torch.no_grad():
        for weight in half.parameters():
            weight.add_(0.3 * weight.std() * torch.randn_like(weight)) if weight.ndim > 1 else None
    acceptance = []
    for draft in (student, half, copy.deepcopy(teacher)):
        found = speculative(teacher, draft, PROMPTS, max_new_tokens=20, num_draft_tokens=num_draft_tokens)
        for prompt, sequence in zip(PROMPTS, found.sequences, strict=True):
            alone = generate(teacher, [prompt], max_new_tokens=20, do_sample=False)["input_ids"][0]
            assert sequence.tolist() == alone.tolist()
        acceptance.append(found.acceptance)
    assert acceptance[0] < acceptance[1] < acceptance[2]
    assert found.tokens_per_teacher_call > 1 + 0.6 * num_draft_tokens


@pytest.mark.parametrize("do_sample", [False, True])
def test_what_the_two_models_ship_changes_nothing(do_sample: bool) -> None:
    teacher, student = pair(eos_token_id=2)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": do_sample, "seed": 0}
    expected = speculative(teacher, student, PROMPTS, **options)
    for model in (teacher, student):
        shipped = model.generation_config
        shipped.repetition_penalty, shipped.no_repeat_ngram_size, shipped.min_p, shipped.suppress_tokens = (
            3.0,
            1,
            0.4,
            [5],
        )
        shipped.prompt_lookup_num_tokens, shipped.stop_strings, shipped.top_k, shipped.min_new_tokens = 3, ["a"], 2, 10
        found = speculative(teacher, student, PROMPTS, **options)
        assert [ids.tolist() for ids in found.sequences] == [ids.tolist() for ids in expected.sequences]
        assert (found.num_drafted, found.num_teacher_calls) == (expected.num_drafted, expected.num_teacher_calls)
        assert model.generation_config is shipped


@pytest.mark.parametrize("words", [1088, 1216])
@pytest.mark.parametrize("tied", [False, True])
def test_a_padded_student_drafts(words: int, tied: bool) -> None:
    torch.manual_seed(0)
    settings: dict[str, Any] = {"eos_token_id": None, "tie_word_embeddings": tied}
    teacher = llama(vocab_size=1152, **settings)
    # The first words are the teacher's; the others are padding, of whatever weights.
    student = llama(vocab_size=words, **settings)
    shared = min(words, 1152)
    with torch.no_grad():
        for own, of_teacher in zip(student.parameters(), teacher.parameters(), strict=True):
            part = slice(shared if len(own) == words else None)
            own[part] = of_teacher[part] + 1e-3 * torch.randn_like(own[part])
    before = {name: value.clone() for name, value in student.state_dict().items()}
    state = torch.get_rng_state()
    logits = _with_words_of(student, teacher)(torch.tensor(PROMPTS[:1])).logits
    assert torch.equal(torch.get_rng_state(), state)
    assert logits.shape[-1] == 1152
    # Padding is no word that anybody would propose, wherever the logits lie.
    average = logits[..., :shared].mean(-1, keepdim=True).expand_as(logits[..., shared:])
    torch.testing.assert_close(logits[..., shared:] if words < 1152 else average, average, rtol=1e-4, atol=1e-6)
    found = speculative(teacher, student, PROMPTS, max_new_tokens=12, num_draft_tokens=3)
    alone = [generate(teacher, [prompt], max_new_tokens=12, do_sample=False) for prompt in PROMPTS]
    for sequence, prompt, written in zip(found.sequences, PROMPTS, alone, strict=True):
        assert sequence[len(prompt) :].tolist() == written["input_ids"][0, len(prompt) :].tolist()
    assert found.acceptance > 0.5
    assert student.config.vocab_size == words
    assert all(torch.equal(value, before[name]) for name, value in student.state_dict().items())


def test_drawn_text_has_the_teachers_distribution() -> None:
    teacher, student = pair(vocab_size=6, eos_token_id=None, initializer_range=0.5)
    rows, new = 600, 3
    found = speculative(
        teacher, student, [[1]] * rows, max_new_tokens=new, num_draft_tokens=2, do_sample=True, temperature=0.8, seed=0
    )
    # Of all 216 texts, the probability under the teacher and under the student, exactly.
    texts = torch.cartesian_prod(*[torch.arange(6)] * new)
    ids = torch.cat([torch.ones(len(texts), 1, dtype=torch.int64), texts], dim=1)
    expected = {}
    for name, model in (("teacher", teacher), ("student", student)):
        with torch.no_grad():
            log_probs = (model.eval()(ids).logits[:, :-1] / 0.8).log_softmax(-1)
        expected[name] = log_probs.gather(-1, ids[:, 1:, None]).sum((1, 2)).exp()
    drawn = torch.stack(found.sequences)[:, 1:]
    counts = torch.bincount((drawn * torch.tensor([36, 6, 1])).sum(1), minlength=216)

    def p_value(probabilities: torch.Tensor) -> float:
        scipy = pytest.importorskip("scipy.stats")
        often = probabilities * rows >= 5
        observed = [*counts[often].tolist(), int(counts[~often].sum())]
        wanted = [*(probabilities[often] * rows).tolist(), float(probabilities[~often].sum() * rows)]
        scale = sum(observed) / sum(wanted)
        return float(scipy.chisquare(observed, [value * scale for value in wanted]).pvalue)

    assert 0.05 < found.acceptance < 0.95
    assert p_value(expected["teacher"]) > 1e-3
    assert p_value(expected["student"]) < 1e-9


def test_both_models_are_as_before_and_speed_is_measured_where_asked() -> None:
    teacher, student = pair(eos_token_id=None)
    student.train()
    own = student.generation_config
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    found = speculative(teacher, student, PROMPTS[:1], max_new_tokens=6, do_sample=True, seed=1, repeats=1)
    assert torch.equal(torch.rand(2), expected)
    assert student.training
    assert student.generation_config is own
    assert found.num_new_tokens == 6
    assert found.speedup == pytest.approx(found.tokens_per_second / found.teacher_tokens_per_second)
    assert found.tokens_per_second > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompts": []}, "prompt 0 has shape"),
        ({"prompts": [[]]}, "prompt 0 has shape"),
        ({"prompts": [[1] * 30]}, "32 positions"),
        ({"temperature": 0.0, "do_sample": True}, "pass `do_sample=False`"),
        ({"num_draft_tokens": 0}, "`num_draft_tokens`"),
        ({"cache_implementation": "static"}, "rejected tokens cannot be taken back"),
        ({"cache_implementation": "quantized"}, "rejected tokens cannot be taken back"),
    ],
)
def test_bad_input(arguments: dict[str, Any], message: str) -> None:
    teacher, student = pair()
    with pytest.raises(ValueError, match=message):
        speculative(teacher, student, **{"prompts": PROMPTS, "max_new_tokens": 4, **arguments})


def test_vocabularies_that_differ(tmp_path: Any) -> None:
    from lightning_distill.data import train_causal_tokenizer

    teacher, student = pair()
    with pytest.raises(ValueError, match=r"same `vocab_size`.*objectives\.UniversalLogit"):
        speculative(teacher, llama(vocab_size=65), PROMPTS)
    # Of the same size, but with other tokens.
    for name, model, text in (("teacher", teacher, "abcabcab"), ("student", student, "xyzxyzxy")):
        model.save_pretrained(tmp_path / name)
        train_causal_tokenizer([text], vocab_size=262).save_pretrained(tmp_path / name)
    teacher, student = (transformers.AutoModelForCausalLM.from_pretrained(tmp_path / n) for n in ("teacher", "student"))
    with pytest.raises(ValueError, match=r"same tokenizer.*objectives\.UniversalLogit"):
        speculative(teacher, student, PROMPTS)
    with pytest.raises(ValueError, match="to have its own parameters"):
        speculative(teacher, teacher, PROMPTS)
