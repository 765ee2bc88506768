"""Keys of rows: the same for what a teacher answers in the same way, and others for whatever may change its answer."""

import dataclasses
from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import BatchEncoding

from lightning_distill.models.fingerprints import model_fingerprint
from lightning_distill.teachers.cache.row_keys import count_rows, row_keys
from lightning_distill.teachers.ensemble import TeacherEnsemble
from tests.helpers.models import bert, llama

Pair = namedtuple("Pair", ["left", "right"])


@dataclasses.dataclass
class Inputs:
    x: Tensor
    scale: float = 1.0


def ids(row: list[int], mask: list[Any] | None = None, **more: Any) -> dict[str, Any]:
    made = {"input_ids": torch.tensor([row])} | {name: torch.tensor([value]) for name, value in more.items()}
    return made if mask is None else made | {"attention_mask": torch.tensor([mask])}


X, Y = torch.zeros(2, 4), torch.tensor([[0.0, 0, 0, 0], [0, 0, 0, 1]])

APART = {
    "holes": (ids([5, 9, 6, 7], [1, 0, 1, 1]), ids([5, 6, 7], [1, 1, 1])),
    "another hole": (ids([5, 9, 6, 7], [1, 0, 1, 1]), ids([5, 9, 6, 7], [1, 1, 0, 1])),
    "the side of the padding": (ids([5, 6, 7, 0], [1, 1, 1, 0]), ids([0, 5, 6, 7], [0, 1, 1, 1])),
    "more padding on the left": (ids([0, 5, 6], [0, 1, 1]), ids([0, 0, 5, 6], [0, 0, 1, 1])),
    "nothing real": (ids([5, 6], [0, 0]), ids([7, 8], [0, 0])),
    "a mask of weights": (ids([5, 6], [1.0, 0.5]), ids([5, 6], [1.0, 1.0])),
    "a mask of documents": (ids([5, 6, 7], [1, 1, 2]), ids([5, 6, 7], [1, 2, 2])),
    "an additive mask": (ids([5, 6], [0.0, -1e9]), ids([5, 6], [0.0, 0.0])),
    "no mask": (ids([5, 0]), ids([5, 0], [1, 0])),
    "position ids": (ids([5, 6], [1, 1], position_ids=[0, 1]), ids([5, 6], [1, 1], position_ids=[3, 4])),
    "no position ids": (ids([5, 6], [1, 1], position_ids=[0, 1]), ids([5, 6], [1, 1])),
    "token types": (ids([5, 6], [1, 1], token_type_ids=[0, 1]), ids([5, 6], [1, 1], token_type_ids=[0, 0])),
    "what is no token": (ids([5, 0], [1, 0], features=[1.0, 2.0]), ids([5, 0], [1, 0], features=[1.0, 3.0])),
    "a channel beyond the mask": (
        ids([5, 6, 0], [1, 1, 0], pixel_values=[[[1.0]], [[1.0]], [[1.0]]]),
        ids([5, 6, 0], [1, 1, 0], pixel_values=[[[1.0]], [[1.0]], [[2.0]]]),
    ),
    "pixels": ({"pixel_values": torch.zeros(1, 3, 2, 2)}, {"pixel_values": torch.ones(1, 3, 2, 2)}),
    "the name of an input": ({"x": X}, {"y": X}),
    "the type": ({"x": torch.zeros(1, dtype=torch.float32)}, {"x": torch.zeros(1, dtype=torch.int32)}),
    "the shape": ({"x": torch.zeros(1, 4)}, {"x": torch.zeros(1, 2, 2)}),
    "a text": ({"x": X[:1], "text": ["a"]}, {"x": X[:1], "text": ["b"]}),
    "where a text ends": ({"x": X[:1], "a": [["a", "bc"]]}, {"x": X[:1], "a": [["ab", "c"]]}),
    "a text that is no unicode": ({"x": X[:1], "text": ["\ud800"]}, {"x": X[:1], "text": ["\udfff"]}),
    "a number of the whole batch": ({"x": X, "scale": 1}, {"x": X, "scale": 2}),
    "a flag": ({"x": X, "causal": True}, {"x": X, "causal": 1}),
    "nothing": ({"x": X, "y": None}, {"x": X}),
    "bytes": ({"x": X[:1], "image": [b"a"]}, {"x": X[:1], "image": [b"b"]}),
    "an array": ({"x": X, "a": np.zeros(3)}, {"x": X, "a": np.ones(3)}),
    "an array of objects": (
        {"x": X[:1], "a": np.array(["a"], object)},
        {"x": X[:1], "a": np.array(["b"], object)},
    ),
    "one tensor of the whole batch": ({"x": X, "t": torch.zeros(())}, {"x": X, "t": torch.ones(())}),
    "a mapping in a mapping": ({"x": X, "y": {"z": X}}, {"x": X, "y": {"z": X + 1}}),
    "a mapping in a pair": (({"x": X}, torch.zeros(2)), ({"x": X + 1}, torch.zeros(2))),
    "a pair in a pair": (((X, X), torch.zeros(2)), ((X, X + 1), torch.zeros(2))),
    "the order in a pair": (((X, X + 1), torch.zeros(2)), ((X + 1, X), torch.zeros(2))),
    "a named tuple": ({"x": Pair(X, X)}, {"x": Pair(X, X + 1)}),
    "a dataclass": (Inputs(X), Inputs(X, 2.0)),
    "pictures of each row": (
        {"x": X, "p": [torch.zeros(3, 2, 2), torch.zeros(3, 1, 1)]},
        {"x": X, "p": [torch.ones(3, 2, 2), torch.ones(3, 1, 1)]},
    ),
    "boxes of each row": ({"x": X, "b": [{"box": [1, 2]}] * 2}, {"x": X, "b": [{"box": [1, 3]}] * 2}),
    "bfloat16": ({"x": X.bfloat16()}, {"x": X.bfloat16() + 1}),
    "float8": ({"x": X.to(torch.float8_e4m3fn)}, {"x": (X + 1).to(torch.float8_e4m3fn)}),
    "complex": ({"x": X + 0j}, {"x": X + 1j}),
    "a conjugate": ({"x": (X + 1j).conj()}, {"x": X + 1j}),
    "a sparse tensor": ({"x": torch.eye(2).to_sparse()}, {"x": (2 * torch.eye(2)).to_sparse()}),
    "rows of other lengths": (
        {
            "x": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)], layout=torch.jagged),
            "labels": torch.zeros(2),
        },
        {
            "x": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged),
            "labels": torch.zeros(2),
        },
    ),
    "the teacher's own words": ({**ids([5]), **ids([5], teacher_input_ids=[1])}, ids([5], teacher_input_ids=[2])),
}


@pytest.mark.parametrize("name", APART)
def test_what_changes_an_answer_changes_the_key(name: str) -> None:
    one, other = APART[name]
    assert not set(row_keys(one, None)) & set(row_keys(other, None))
    assert row_keys(one, None) == row_keys(one, None)


def test_a_row_has_one_key_in_every_batch() -> None:
    two = {"x": Y, "text": ["a", "b"], "n": {"y": (Y, 3, None)}, "p": [torch.zeros(1), torch.ones(5)]}
    first, second = row_keys(two, None)
    assert first != second
    alone = {"x": Y[1:], "text": ["b"], "n": {"y": (Y[1:], 3, None)}, "p": [torch.ones(5)]}
    assert row_keys(alone, None) == [second]
    # A mapping of another kind, another order of the names, and labels are no other content.
    same = BatchEncoding(
        {"text": ["b"], "x": Y[1:], "p": [torch.ones(5)], "n": {"y": (Y[1:], 3, None)}, "labels": X[:1]}
    )
    assert row_keys(same, None) == [second]
    short, padded = ids([5, 6], [1, 1], token_type_ids=[0, 1]), ids([5, 6, 0], [1, 1, 0], token_type_ids=[0, 1, 0])
    assert row_keys(short, None) == row_keys(padded, None) == row_keys(padded, None, padding=0)


def test_two_inputs_of_two_rows_are_not_taken_for_one_of_each() -> None:
    for wrap in (tuple, list, lambda pair: [{"a": pair[0]}, {"a": pair[1]}]):
        keys = [row_keys((wrap((left, X)), torch.zeros(2)), None) for left in (X, Y)]
        # Whatever is in another's key, the second row's answer depends on the second row of each input.
        assert keys[0][1] != keys[1][1]


def test_padding_that_a_model_does_not_take_for_padding_is_in_the_key() -> None:
    # A Llama that classifies looks for the last token that is not `pad_token_id`.
    one, other = ids([5, 6, 9], [1, 1, 0]), ids([5, 6, 8], [1, 1, 0])
    assert row_keys(one, None) == row_keys(other, None)
    assert row_keys(one, None, padding=0) != row_keys(other, None, padding=0)
    counted = torch.tensor([[False, False, True]])
    assert row_keys(one, counted) != row_keys(other, counted)


@pytest.mark.parametrize("value", [object(), {1, 2}, nn.Linear(1, 1), lambda: 0, torch.zeros(1, device="meta")])
def test_what_cannot_be_told_is_refused_by_its_name(value: Any) -> None:
    with pytest.raises(TypeError, match=r"to be tensors, numbers or texts.* at `outer\.inner`"):
        row_keys({"x": X, "outer": {"inner": value}}, None)


def test_the_number_of_rows() -> None:
    assert count_rows({"text": ["a", "b", "c"], "labels": torch.zeros(3)}) == 3
    assert count_rows(((X, torch.zeros(5, 2)), None)) == 2
    with pytest.raises(ValueError, match="a batch with labels or a tensor"):
        count_rows({"text": ["a"]})


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.scale, self.calls = scale, 0


OTHER_MODELS = {
    "weights": lambda: (nn.Linear(2, 2), nn.Linear(2, 2)),
    "activation": lambda: (nn.Sequential(nn.ReLU()), nn.Sequential(nn.Tanh())),
    "epsilon": lambda: (nn.LayerNorm(2), nn.LayerNorm(2, eps=0.1)),
    "heads": lambda: [nn.TransformerEncoderLayer(4, heads, 4) for heads in (1, 2)],
    "a setting of the user's own": lambda: (Scaled(1.0), Scaled(2.0)),
    "a config": lambda: (bert(hidden_act="gelu"), bert(hidden_act="relu")),
    "rotary base": lambda: [llama(rope_parameters={"rope_type": "default", "rope_theta": x}) for x in (1e4, 1e5)],
    "weights of an ensemble": lambda: [TeacherEnsemble([nn.ReLU(), nn.Tanh()], weights=w) for w in ([1, 0], [0, 1])],
}


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("name", OTHER_MODELS)
def test_models_that_answer_differently_have_other_fingerprints(name: str) -> None:
    torch.manual_seed(0)
    one, other = OTHER_MODELS[name]()
    if name != "weights":
        other.load_state_dict(one.state_dict())
    assert model_fingerprint(one) != model_fingerprint(other)


def test_a_model_that_answers_the_same_keeps_its_fingerprint(tmp_path: Any) -> None:
    model = bert()
    fingerprint = model_fingerprint(model)
    model.save_pretrained(tmp_path)
    assert model_fingerprint(type(model).from_pretrained(tmp_path)) == fingerprint
    model(torch.ones(1, 3, dtype=torch.long), labels=torch.tensor([0]))
    assert model_fingerprint(torch.compile(model, backend="eager")) == fingerprint
    model.config.id2label = {0: "no", 1: "yes"}
    assert model_fingerprint(model.train()) == fingerprint
    counting = Scaled(1.0)
    fingerprint = model_fingerprint(counting)
    counting.calls += 1
    assert model_fingerprint(counting) == fingerprint
