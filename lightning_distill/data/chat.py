"""Conversations as token ids, through the chat template of a tokenizer, with the answers alone to learn."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

from transformers import PreTrainedTokenizerBase

from lightning_distill.data.columns import check_text
from lightning_distill.data.packing import Conversation, Document
from lightning_distill.data.table import Table, one_line, shown

#: The columns that hold conversations where there is no column of text.
CHAT_COLUMNS = (["messages"], ["prompt", "completion"])

_MARKS_ANSWERS = re.compile(r"\{%-?\s*generation\s*-?%\}")
_PLACEHOLDER = "\ue000answer\ue000"  # of a private use area: no template strips it, no text has it


class Chat(NamedTuple):
    """A conversation.

    Attributes:
        messages: mappings with ``role`` and ``content``; those of the role ``assistant`` are answers.
        num_given: the answers among so many messages at its beginning are given and not learned.
        place: where it comes from, for errors.
    """

    messages: list[dict[str, Any]]
    num_given: int
    place: str


class Completion(NamedTuple):
    """A text and what is to be written behind it.

    Attributes:
        prompt: what is given.
        completion: what is learned.
        place: where they come from, for errors.
    """

    prompt: str
    completion: str
    place: str


Text: TypeAlias = str | Chat | Completion


def texts_of(table: Table) -> list[Text]:
    """The text of each row of a table with a column of texts or messages, or with prompts and completions.

    Rows of blank text are left out.

    Raises:
        ValueError: a row holds something else, or a conversation without an answer.
    """
    found: list[Text] = []
    for row, values in enumerate(zip(*table.columns.values(), strict=True)):
        match values:
            case [list(messages)]:
                found.append(_chat(table, row, messages, 0))
            case [list(prompt), list(answer)]:
                found.append(_chat(table, row, prompt + answer, len(prompt)))
            case [text] | [str(), str() as text]:
                for column, value in zip(table.columns, values, strict=True):
                    check_text(table, row, column, value)
                if text.strip():
                    found.append(text if len(values) == 1 else Completion(values[0], text, table.place(row)))
                elif len(values) == 2:
                    raise table.error(row, "no text in 'completion'")
            case [prompt, answer]:
                kinds = f"{type(prompt).__name__} and {type(answer).__name__}"
                raise table.error(row, f"expected two texts or two lists of messages, but got {kinds}")
    return found


def _chat(table: Table, row: int, values: Sequence[Any], num_given: int) -> Chat:
    messages = []
    for value in values:
        if not isinstance(value, dict) or not isinstance(value.get("role"), str):
            raise table.error(row, f"expected messages with 'role' and 'content', but got {shown(value)}")
        # Parquet gives each message all keys that any has.
        message = {key: item for key, item in value.items() if item is not None}
        if "content" in message or "tool_calls" not in message:
            check_text(table, row, "content", message.get("content"))
        messages.append(message)
    if not any(message["role"] == "assistant" for message in messages[num_given:]):
        raise table.error(row, "no message of the role 'assistant', so there is no answer to learn")
    return Chat(messages, num_given, table.place(row))


def encode(tokenizer: PreTrainedTokenizerBase, text: Chat | Completion) -> Document | Conversation:
    """Make token ids of a conversation or a completion, and say which are learned.

    A conversation goes through the tokenizer's chat template. What is learned are its answers with the token that ends
    each: as the template marks them with ``{% generation %}``, else found by rendering it with an answer replaced. A
    completion is a user's message and its answer where the tokenizer has a chat template, else it is joined to its
    prompt as it is.

    Raises:
        ValueError: the tokenizer is a slow one, there is no chat template, or it refuses the conversation.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"Expected argument `tokenizer` to be a fast one, which says where tokens stand in a text, to read "
            f"{text.place}, but got a {type(tokenizer).__name__}"
        )
    if isinstance(text, Completion):
        if not tokenizer.chat_template:
            joined = tokenizer(text.prompt + text.completion, return_offsets_mapping=True, verbose=False)
            spans = joined["offset_mapping"]
            num_given = next((i for i, (_, end) in enumerate(spans) if end > len(text.prompt)), len(spans))
            return Document(joined["input_ids"], max(num_given, 1))
        roles = {"user": text.prompt, "assistant": text.completion}
        text = Chat([{"role": role, "content": content} for role, content in roles.items()], 0, text.place)
    if not tokenizer.chat_template:
        raise ValueError(
            f"{text.place}: a conversation, and the tokenizer has no chat template; set `tokenizer.chat_template`, or "
            "take the tokenizer of a model that was trained to chat"
        )
    from jinja2 import TemplateError

    try:
        return _encode_chat(tokenizer, text)
    except (TemplateError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise ValueError(one_line(f"{text.place}: the chat template refuses the conversation ({error})")) from None


def _encode_chat(tokenizer: PreTrainedTokenizerBase, chat: Chat) -> Conversation:
    def render(messages: list[dict[str, Any]], add_generation_prompt: bool = False) -> str:
        text: Any = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
        return str(text)

    text = render(chat.messages)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids, offsets = encoded["input_ids"], encoded["offset_mapping"]
    if _MARKS_ANSWERS.search(tokenizer.get_chat_template()):
        marked: Any = tokenizer.apply_chat_template(chat.messages, return_dict=True, return_assistant_tokens_mask=True)
        learned = [bool(mark) for mark in marked["assistant_masks"]]
        if any(message["role"] == "assistant" for message in chat.messages[: chat.num_given]):
            begin = len(render(chat.messages[: chat.num_given], add_generation_prompt=True))
            learned = [mark and end > begin for mark, (_, end) in zip(learned, offsets, strict=True)]
    else:
        answers = [i for i, m in enumerate(chat.messages) if m["role"] == "assistant" and i >= chat.num_given]
        spans = [_answer_span(chat, answer, text, render) for answer in answers]
        learned = [any(start < last and end > first for first, last in spans) for start, end in offsets]
    learned[:1] = [False]  # nothing precedes it
    if True not in learned:
        raise ValueError(f"{chat.place}: the chat template marks no token of an answer")
    return Conversation(ids, learned)


def _answer_span(chat: Chat, answer: int, text: str, render: Any) -> tuple[int, int]:
    """Where an answer stands in the text of the whole conversation, with what ends it."""
    messages = chat.messages
    blank = {**messages[answer], "content": _PLACEHOLDER}
    head, found, tail = render([*messages[:answer], blank, *messages[answer + 1 :]]).partition(_PLACEHOLDER)
    # Not the text up to the answer: some templates write the last answer otherwise than the same one in the middle.
    closing = render([*messages[:answer], blank]).partition(_PLACEHOLDER)[2]
    before = render(messages[:answer], add_generation_prompt=True) if answer else head
    end, shorter = len(text) - len(tail), min(len(closing), len(tail))
    if not found or not text.startswith(before) or not text.endswith(tail) or end < len(before):
        raise ValueError(
            f"{chat.place}: message {answer + 1} cannot be told from the others in what the chat template writes; mark "
            "the answers in the template with {% generation %}"
        )
    return len(before), end + next((i for i, (a, b) in enumerate(zip(closing, tail, strict=False)) if a != b), shorter)
