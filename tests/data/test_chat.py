"""Conversations: what goes through a chat template, which tokens are learned, what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from lightning_distill.data import LanguageModelData, train_causal_tokenizer
from lightning_distill.data.packing import Conversation
from lightning_distill.models.batch import IGNORE_INDEX

PLAIN = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content | trim }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{% generation %}{{ m.content | trim }}<end>"
    "{% endgeneration %}{% else %}{{ m.content | trim }}<end>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As Qwen3 does, it puts into the last answer what it leaves out of the earlier ones.
LAST_DIFFERS = (
    "{% for m in messages %}<|{{ m.role }}|>{% if loop.last and m.role == 'assistant' %}<think></think>{% endif %}"
    "{{ m.content }}<end>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "what is 1 + 1?"},
    {"role": "assistant", "content": " it is 2 "},
    {"role": "user", "content": "and é 日本?"},
    {"role": "assistant", "content": "it is 2"},
]


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_causal_tokenizer(["what is 1 + 1? it is 2. be brief"] * 3, vocab_size=300)
    made.chat_template = PLAIN
    return made


def learned(tokenizer: PreTrainedTokenizerFast, document: Any) -> list[str]:
    """The stretches of text that are learned."""
    runs: list[list[int]] = [[]]
    for token, mark in zip(document.ids, document.learned, strict=True):
        runs[-1].append(token) if mark else runs.append([])
    return [tokenizer.decode(run) for run in runs if run]


def of(tokenizer: PreTrainedTokenizerFast, rows: list[Any], **kwargs: Any) -> LanguageModelData:
    return LanguageModelData.from_texts(rows, rows[:1], rows[:1], tokenizer=tokenizer, max_length=256, **kwargs)


@pytest.mark.parametrize(
    ("template", "answers"),
    [
        (PLAIN, ["it is 2<end>\n", "it is 2<end>\n"]),
        (MARKED, ["it is 2<end>", "it is 2<end>"]),
        (LAST_DIFFERS, [" it is 2 <end>\n", "<think></think>it is 2<end>\n"]),
    ],
)
def test_the_answers_alone_are_learned_with_what_ends_them(
    tokenizer: PreTrainedTokenizerFast, template: str, answers: list[str]
) -> None:
    tokenizer.chat_template = template
    data = of(tokenizer, [CHAT], add_eos=True)
    (document,) = data.documents("train")
    assert tokenizer.decode(document.ids) == tokenizer.apply_chat_template(CHAT, tokenize=False)
    assert learned(tokenizer, document) == answers
    data.setup()
    labels = next(iter(data.train_dataloader()))["labels"]
    assert tokenizer.decode(labels[labels != IGNORE_INDEX]) == "".join(answers)
    assert labels[0, document.num_given - 1] == IGNORE_INDEX != labels[0, document.num_given]


@pytest.mark.parametrize("template", [PLAIN, MARKED])
def test_answers_in_a_prompt_are_given(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, template: str) -> None:
    tokenizer.chat_template = template
    (tmp_path / "a.json").write_text(json.dumps([{"prompt": CHAT[:4], "completion": CHAT[4:]}] * 3))
    document = LanguageModelData(str(tmp_path / "a.json"), tokenizer=tokenizer).documents("train")[0]
    assert [answer.strip() for answer in learned(tokenizer, document)] == ["it is 2<end>"]


def test_prompts_and_completions_of_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("id,prompt,completion\n" + "1,what is 1 + 1?, it is 2\n" * 3)

    def first() -> Any:
        return LanguageModelData(str(tmp_path / "a.csv"), tokenizer=tokenizer).documents("train")[0]

    assert learned(tokenizer, first()) == ["it is 2<end>\n"]
    tokenizer.chat_template = None
    assert tokenizer.decode(first().ids) == "<s>what is 1 + 1? it is 2</s>"
    assert tokenizer.decode(first().ids[first().num_given :]) == " it is 2</s>"


def test_messages_of_every_kind_of_file(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": CHAT, "id": 1}] * 3
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.NDJSON").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(json.dumps({"dialogue": [CHAT] * 3}))
    with_tools = [*CHAT, {"role": "user", "content": "why?", "tool_calls": None}, {"role": "assistant", "content": "."}]
    parquet.write_table(pyarrow.table({"messages": [CHAT, with_tools, CHAT]}), tmp_path / "a.parquet")
    for name in ("a.jsonl", "a.NDJSON", "a.json", "b.json", "a.parquet"):
        column = "dialogue" if name == "b.json" else "text"
        data = LanguageModelData(str(tmp_path / name), tokenizer=tokenizer, text_column=column)
        first = data.documents("train")[0]
        assert isinstance(first, Conversation)
        assert learned(tokenizer, first)[:2] == ["it is 2<end>\n"] * 2


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        ([], "no message of the role 'assistant'"),
        (CHAT[:2], "no message of the role 'assistant'"),
        (["hello"], "expected messages with 'role' and 'content', but got 'hello'"),
        ([{"from": "human", "value": "hello"}], "expected messages with 'role' and 'content'"),
        ([{"role": "user", "content": None}, *CHAT], "column 'content' holds None, which is not text"),
        ([{"role": "user", "content": "\ud83d"}, *CHAT], "half of a character"),
        ("text", "messages"),
        (5, "column 'messages' holds 5, which is not text"),
    ],
)
def test_wrong_conversations_are_named(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, messages: Any, problem: str
) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text("".join(json.dumps({"messages": each}) + "\n" for each in (CHAT, messages, CHAT)))
    data = LanguageModelData(str(file), tokenizer=tokenizer)
    if messages == "text":  # a column of this name may hold text
        assert len(data.documents("train")) == 1
        return
    with pytest.raises(ValueError, match=r"a\.jsonl:2: ") as caught:
        data.setup()
    assert problem in str(caught.value)
    assert "\n" not in str(caught.value)


def test_templates_that_cannot_be_used_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    for template, problem in (
        (None, "train texts:1: a conversation, and the tokenizer has no chat template; set `tokenizer.chat_template`"),
        ("{{ raise_exception('roles must alternate') }}", "train texts:1: the chat template refuses .*roles must"),
        ("{{ messages[0] + 1 }}", "train texts:1: the chat template refuses the conversation"),
        ("{% for m in messages %}{{ m.content | length }} {% endfor %}", "train texts:1: message 3 cannot be told"),
        (
            "{% if false %}{% generation %}{% endgeneration %}{% endif %}x",
            "train texts:1: the chat template marks no token",
        ),
    ):
        tokenizer.chat_template = template
        with pytest.raises(ValueError, match=problem):
            of(tokenizer, [CHAT]).setup()
