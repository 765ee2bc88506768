"""What a model writes, and what the batch of it says."""

import copy
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from lightning_distill.generation import generate, teacher_documents
from lightning_distill.generation.prompts import prompts_of
from tests.helpers.models import llama

PROMPTS = [[1, 5, 9, 12], [1, 7], [1, 8, 3]]


def model(**config: Any) -> Any:
    torch.manual_seed(0)
    return llama(attention_dropout=0.5, **config)


@pytest.mark.parametrize("cache", [None, "dynamic", "static", "offloaded"])
def test_greedy_text_of_a_batch_is_that_of_each_prompt_alone_without_a_cache(cache: str | None) -> None:
    if cache == "offloaded" and not torch.cuda.is_available():
        pytest.skip("an offloaded cache needs an accelerator")
    teacher = model(eos_token_id=None).eval()
    batch = generate(teacher, PROMPTS, max_new_tokens=10, do_sample=False, cache_implementation=cache)
    for row, prompt in enumerate(PROMPTS):
        ids = list(prompt)
        for _ in range(10):
            ids.append(int(teacher(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        real = batch["attention_mask"][row].bool()
        assert batch["input_ids"][row][real].tolist() == ids
        assert batch["labels"][row][real].tolist() == [-100] * len(prompt) + ids[len(prompt) :]
        assert batch["position_ids"][row][real].tolist() == list(range(len(ids)))


def test_left_padded_text_gets_the_logits_it_gets_alone() -> None:
    student = model(eos_token_id=None).eval()
    batch = generate(student, PROMPTS, max_new_tokens=8, seed=0)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    together = student(**inputs, use_cache=False).logits
    for row in range(3):
        real = batch["attention_mask"][row].bool()
        alone = student(batch["input_ids"][row][real][None]).logits[0]
        torch.testing.assert_close(together[row][real], alone, atol=1e-5, rtol=1e-4)


def test_the_end_is_a_label_and_nothing_behind_it_is_although_padding_is_the_same_token() -> None:
    student = model(eos_token_id=2, pad_token_id=2)
    batch = generate(student, [[1]] * 64, max_new_tokens=20, temperature=3.0, seed=0)
    ended = 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        written = ids[1:].tolist()
        length = written.index(2) + 1 if 2 in written else len(written)
        ended += 2 in written[:-1]
        assert labels[1:].tolist() == written[:length] + [-100] * (len(written) - length)
        assert int(mask.sum()) == 1 + length
    assert ended > 5


def test_modes_and_random_numbers_are_as_before_and_dropout_is_off() -> None:
    student = nn.Sequential(model()).train()[0]
    student.model.layers[1].eval()
    modes = [module.training for module in student.modules()]
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first, second = (generate(student, PROMPTS, max_new_tokens=12, seed=3)["input_ids"] for _ in range(2))
    assert torch.equal(torch.rand(3), expected)
    assert torch.equal(first, second)
    assert not torch.equal(first, generate(student, PROMPTS, max_new_tokens=12, seed=4)["input_ids"])
    assert [module.training for module in student.modules()] == modes
    greedy = [generate(student, PROMPTS, max_new_tokens=12, do_sample=False)["input_ids"] for _ in range(2)]
    assert torch.equal(*greedy)


def test_temperature_and_nucleus_narrow_the_draw_and_the_models_own_settings_do_not() -> None:
    student = model(eos_token_id=None)
    student.generation_config.top_k = 1
    student.generation_config.repetition_penalty = 9.0
    wide = generate(student, [[1, 5]] * 200, max_new_tokens=1, seed=0)["labels"][:, -1]
    for narrow in ({"top_p": 0.05}, {"temperature": 0.01}):
        drawn = generate(student, [[1, 5]] * 200, max_new_tokens=1, seed=0, **narrow)["labels"][:, -1]
        assert len(drawn.unique()) <= 4
    assert len(wide.unique()) > 30
    probabilities = student.eval()(torch.tensor([[1, 5]])).logits[0, -1].softmax(-1)
    counts = torch.bincount(wide, minlength=64)
    # A chi-square of 63 degrees of freedom is above 112 once in ten thousand.
    assert ((counts - 200 * probabilities) ** 2 / (200 * probabilities)).sum() < 112


OWN_SETTINGS: dict[str, Any] = {
    "repetition_penalty": 1.3,
    "no_repeat_ngram_size": 2,
    "min_p": 0.3,
    "typical_p": 0.3,
    "epsilon_cutoff": 0.05,
    "eta_cutoff": 0.05,
    "top_h": 0.3,
    "top_k": 1,
    "top_p": 0.3,
    "temperature": 0.3,
    "num_beams": 3,
    "num_return_sequences": 2,
    "suppress_tokens": list(range(3, 40)),
    "begin_suppress_tokens": list(range(3, 40)),
    "bad_words_ids": [[token] for token in range(3, 40)],
    "sequence_bias": [[[7], 50.0]],
    "min_length": 11,
    "min_new_tokens": 8,
    "forced_bos_token_id": 5,
    "forced_eos_token_id": 2,
    "exponential_decay_length_penalty": (1, 9.0),
    "guidance_scale": 1.5,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "stop_strings": ["a"],
    "max_length": 5,
    "max_time": 0.0,
    "watermarking_config": {"bias": 9.0, "seeding_scheme": "selfhash", "greenlist_ratio": 0.1},
    "prompt_lookup_num_tokens": 2,
    "return_dict_in_generate": True,
    "output_scores": True,
    "cache_implementation": "static",
    "use_cache": False,
    "a_field_to_come": 3,
}


def with_settings(writer: Any, names: Any = OWN_SETTINGS) -> Any:
    other = copy.deepcopy(writer)
    for name in names:
        setattr(other.generation_config, name, OWN_SETTINGS[name])
    return other


@pytest.mark.parametrize("do_sample", [True, False])
def test_nothing_that_a_model_ships_changes_what_it_writes(do_sample: bool) -> None:
    student = model()
    options: dict[str, Any] = {"max_new_tokens": 10, "do_sample": do_sample, "seed": 0}
    expected = generate(student, PROMPTS, **options)["input_ids"]
    for names in ([name] for name in OWN_SETTINGS):
        other = with_settings(student, names)
        shipped = other.generation_config
        assert torch.equal(generate(other, PROMPTS, **options)["input_ids"], expected), names
        assert other.generation_config is shipped
        assert hasattr(shipped, names[0])
    assert torch.equal(generate(with_settings(student), PROMPTS, **options)["input_ids"], expected)


def test_the_tokens_that_end_a_text_are_still_the_models() -> None:
    student = model(eos_token_id=2)
    free = generate(student, [[1]] * 32, max_new_tokens=12, seed=0)
    student.generation_config.eos_token_id = [2, *range(20, 40)]
    ended = generate(student, [[1]] * 32, max_new_tokens=12, seed=0)
    assert ended["attention_mask"].sum() < 0.6 * free["attention_mask"].sum()


def test_a_teachers_documents_are_its_own_too(tmp_path: Any) -> None:
    teacher = model()
    expected = teacher_documents(teacher, PROMPTS, tmp_path / "a", max_new_tokens=6)
    assert teacher_documents(with_settings(teacher), PROMPTS, tmp_path / "b", max_new_tokens=6) == expected


def test_an_encoder_decoder_is_no_causal_model() -> None:
    config = transformers.T5Config(d_model=8, d_ff=8, num_layers=1, vocab_size=8, decoder_start_token_id=0)
    with pytest.raises(TypeError, match="causal language model"):
        generate(transformers.T5ForConditionalGeneration(config), [[1]], max_new_tokens=2)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_a_peft_model_writes_with_its_adapter_and_without_its_bases_settings() -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(with_settings(model()), lora)
    expected = copy.deepcopy(adapted).merge_and_unload()
    expected.generation_config = transformers.GenerationConfig()
    texts = [generate(m, PROMPTS, max_new_tokens=10, do_sample=False)["input_ids"] for m in (adapted, expected)]
    assert torch.equal(*texts)
    assert adapted.generation_config.min_p == 0.3


def test_a_teachers_text_is_made_once_and_again_when_anything_changes(tmp_path: Any, monkeypatch: Any) -> None:
    teacher = model(eos_token_id=2)
    first = teacher_documents(teacher, PROMPTS, tmp_path, max_new_tokens=6, batch_size=2)
    greedy = generate(teacher, PROMPTS, max_new_tokens=6, do_sample=False)
    for document, prompt, ids, mask in zip(
        first, PROMPTS, greedy["input_ids"], greedy["attention_mask"].bool(), strict=True
    ):
        assert document.ids == ids[mask].tolist()
        assert document.num_given == len(prompt)
    (file,) = tmp_path.iterdir()
    made = file.stat().st_mtime_ns
    monkeypatch.setattr(type(teacher), "generate", lambda *_, **__: pytest.fail("it wrote again"))
    assert teacher_documents(teacher, PROMPTS, tmp_path, max_new_tokens=6, batch_size=2) == first
    assert file.stat().st_mtime_ns == made
    monkeypatch.undo()
    with torch.no_grad():
        teacher.lm_head.weight.add_(torch.randn_like(teacher.lm_head.weight))
    teacher_documents(teacher, PROMPTS, tmp_path, max_new_tokens=6, batch_size=2)
    teacher_documents(teacher, PROMPTS[:2], tmp_path, max_new_tokens=6, batch_size=2)
    assert len(list(tmp_path.iterdir())) == 3
    teacher.generation_config.eos_token_id = 7
    teacher_documents(teacher, PROMPTS, tmp_path, max_new_tokens=6, batch_size=2)
    assert len(list(tmp_path.iterdir())) == 4


def test_prompts_are_instructions_or_beginnings_of_documents() -> None:
    import random

    ids = torch.arange(1, 13).view(1, 12)
    packed = {
        "input_ids": ids,
        "position_ids": torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]]),
        "labels": torch.tensor([[-100, 2, 3, 4, 5, -100, -100, -100, 9, -100, -100, -100]]),
    }
    drawn = {tuple(prompts_of(packed, 2, random.Random(seed))[0].tolist()) for seed in range(20)}
    assert drawn == {(1, 2), (6, 7, 8)}  # plain text is cut, an instruction is whole, padding is no document
    padded = {"input_ids": ids, "attention_mask": torch.tensor([[0] * 4 + [1] * 8])}
    assert prompts_of(padded, 3, random.Random(0))[0].tolist() == [5, 6, 7]
    packed["labels"] = torch.full((1, 12), -100)
    with pytest.raises(ValueError, match="row 0 has none"):
        prompts_of(packed, 2, random.Random(0))


@pytest.mark.parametrize(
    ("prompts", "arguments", "message"),
    [
        ([], {}, "`prompts` to have at least one"),
        ([[1], []], {}, "prompt 1 has shape"),
        ([[1]], {"temperature": 0}, "pass `do_sample=False`"),
        ([[1]], {"temperature": float("inf")}, "`temperature`"),
        ([[1]], {"top_p": 0.0}, "`top_p`"),
        ([[1]], {"max_new_tokens": 0}, "`max_new_tokens`"),
        ([[1] * 20], {"max_new_tokens": 13}, "the 32 positions of the model, but got 20 \\+ 13"),
        ([[1]], {"num_beams": 0}, "`num_beams`"),
        ([[1]], {"cache_implementation": "paged"}, "`cache_implementation` to be one of 'dynamic', 'static'"),
    ],
)
def test_bad_input(prompts: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(model(), prompts, **{"max_new_tokens": 4, **arguments})


def test_a_model_that_cannot_write_and_a_cache_without_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TypeError, match="causal language model of transformers"):
        generate(nn.Linear(2, 2), [[1]])
    for name in ("is_optimum_quanto_available", "is_hqq_available"):
        monkeypatch.setattr(f"lightning_distill.generation.sampling.{name}", lambda: False)
    with pytest.raises(ModuleNotFoundError, match=r"pip install .lightning-distill\[quantized-cache\]"):
        generate(model(), [[1]], max_new_tokens=2, cache_implementation="quantized")


def test_a_quantised_cache_writes_nearly_what_the_exact_one_does() -> None:
    pytest.importorskip("optimum.quanto", reason="needs the extra `quantized-cache`")
    teacher = model(eos_token_id=None)
    exact, coarse = (
        generate(teacher, PROMPTS, max_new_tokens=8, do_sample=False, cache_implementation=cache)["input_ids"]
        for cache in (None, "quantized")
    )
    assert (exact == coarse).float().mean() > 0.8


def test_the_old_name_of_vocab_size_is_taken_with_a_warning() -> None:
    options: dict[str, Any] = {"max_new_tokens": 4, "seed": 0}
    with pytest.warns(DeprecationWarning, match="`words` is called `vocab_size` now"):
        found = generate(model(), [[1, 4]], words=5, **options)
    assert torch.equal(found["input_ids"], generate(model(), [[1, 4]], vocab_size=5, **options)["input_ids"])
    assert int(found["input_ids"].max()) < 5
