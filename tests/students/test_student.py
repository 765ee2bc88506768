"""Students made from teachers: what is copied, which slices are kept, what is refused."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_distill import student_from_teacher
from lightning_distill.signals.description import find_layers
from tests.helpers.models import bert, llama
from tests.models.registry import ARCHITECTURES, build

KINDS = [name for name, row in ARCHITECTURES.items() if row.has_students]
# A model whose first layer differs is allowed to say so; the test of that message is below.
pytestmark = pytest.mark.filterwarnings("ignore:The student's first layer is the teacher's layer")


def make(kind: str, head: str = "SequenceClassification", *, layers: int = 4, **config: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = build(kind, head, layers=layers, **config)
    # Norms of ones and biases of zeros would hide a wrong slice.
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(model: nn.Module) -> torch.Tensor:
    ids = torch.randint(3, 64, (3, 7), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits


CASES = [(kind, head) for kind in KINDS for head in ARCHITECTURES[kind].heads]


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_a_full_copy_is_the_teacher_and_shares_nothing(kind: str, head: str) -> None:
    teacher = make(kind, head)
    student = student_from_teacher(teacher)
    assert type(student) is type(teacher)
    assert student.training
    torch.testing.assert_close(logits(student), logits(teacher), rtol=0, atol=0)
    owned = {parameter.data_ptr() for parameter in teacher.parameters()}
    assert not owned & {parameter.data_ptr() for parameter in student.parameters()}


@pytest.mark.parametrize(("kind", "head"), CASES)
def test_depth_and_width_survive_a_round_trip(kind: str, head: str, tmp_path: Path) -> None:
    student = student_from_teacher(make(kind, head), num_layers=2, width=1.0 if kind == "Qwen3" else 0.5)
    assert len(find_layers(student)) == 2
    student.save_pretrained(tmp_path)
    loaded = type(student).from_pretrained(tmp_path)
    torch.testing.assert_close(logits(loaded), logits(student), rtol=0, atol=0)
    assert bool(torch.isfinite(logits(student)).all())


@pytest.mark.parametrize("kind", KINDS)
def test_layers_are_those_of_the_map(kind: str) -> None:
    teacher = make(kind)
    student = student_from_teacher(teacher, num_layers=2, layers=[0, 3])
    for mine, theirs in zip(find_layers(student), (find_layers(teacher)[i] for i in (0, 3)), strict=True):
        expected = theirs.state_dict()
        for name, value in mine.state_dict().items():
            assert torch.equal(value, expected[name]), name


def test_layer_types_go_with_their_layers() -> None:
    teacher = make("ModernBert", layers=6, layer_types=["full_attention", *["sliding_attention"] * 2] * 2)
    student = student_from_teacher(teacher, num_layers=3, layers=[0, 2, 3])
    assert student.config.layer_types == ["full_attention", "sliding_attention", "full_attention"]
    with pytest.warns(UserWarning, match="teacher's layer 1 without its `attn_norm`"):
        student_from_teacher(teacher, num_layers=3)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("layers", [[0, 3], [1, 3], [0, 3, 1], [2], [3, 2, 1, 0]])
def test_shared_layers_are_counted_as_they_are_run(groups: int, layers: list[int]) -> None:
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "embedding_size": 8}
    torch.manual_seed(0)
    config = transformers.AlbertConfig(vocab_size=64, num_hidden_layers=4, num_hidden_groups=groups, **sizes)
    teacher = transformers.AlbertModel(config).eval()
    with torch.no_grad():
        for parameter in teacher.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    student: Any = student_from_teacher(teacher, num_layers=len(layers), layers=layers).eval()
    ids, encoder = torch.randint(3, 64, (2, 7)), teacher.encoder
    with torch.no_grad():
        hidden = encoder.embedding_hidden_mapping_in(teacher.embeddings(ids))
        for layer in layers:
            hidden = encoder.albert_layer_groups[layer * groups // 4](hidden, None)
        torch.testing.assert_close(student(ids).last_hidden_state, hidden, rtol=0, atol=0)
    assert student.config.num_hidden_layers == len(layers)
    assert student.config.num_hidden_groups <= len(layers)
    with pytest.raises(ValueError, match="from 1 to 4, the teacher's depth, but got 5"):
        student_from_teacher(teacher, num_layers=5)


def test_albert_by_width_names_the_nearest_that_its_embedding_has() -> None:
    config = transformers.AlbertConfig(
        vocab_size=64,
        hidden_size=24,
        num_attention_heads=3,
        intermediate_size=48,
        embedding_size=10,
        num_hidden_layers=1,
    )
    teacher = transformers.AlbertForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"`width`.*'embedding_size': 10.* The nearest is 1/1"):
        student_from_teacher(teacher, width=0.5)


def test_width_keeps_what_weighs_most_by_plain_indexing() -> None:
    teacher = make("Bert", layers=1)
    layer = teacher.bert.encoder.layer[0]
    with torch.no_grad():  # channels 8 to 15, head 1 and the odd neurons are made the heavy ones
        for parameter in teacher.parameters():
            parameter.mul_(0.01)
        for name, parameter in teacher.named_parameters():
            for axis, size in enumerate(parameter.shape):
                if size == 16 and "self" not in name and not (name.endswith("attention.output.dense.weight") and axis):
                    parameter.movedim(axis, 0)[8:].mul_(10)
        for projection in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            projection.weight[8:].mul_(100)
        layer.intermediate.dense.weight[1::2].mul_(100)
    student = student_from_teacher(teacher, width=0.5)
    small = student.bert.encoder.layer[0]
    assert torch.equal(
        student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight[:, 8:]
    )
    assert torch.equal(small.attention.self.query.weight, layer.attention.self.query.weight[8:, 8:])
    assert torch.equal(small.attention.self.value.bias, layer.attention.self.value.bias[8:])
    assert torch.equal(small.attention.output.dense.weight, layer.attention.output.dense.weight[8:, 8:])
    assert torch.equal(small.intermediate.dense.weight, layer.intermediate.dense.weight[1::2, 8:])
    assert torch.equal(small.output.dense.weight, layer.output.dense.weight[8:, 1::2])
    assert torch.equal(student.classifier.weight, teacher.classifier.weight[:, 8:])


def permuted(teacher: nn.Module) -> nn.Module:
    """The same function with its channels, neurons and heads in another order, for BERT and Llama."""
    generator = torch.Generator().manual_seed(5)
    channels = torch.randperm(16, generator=generator)
    model = copy.deepcopy(teacher)
    prefix = next(path for path, module in model.named_modules() if module is find_layers(model))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            inside = name.startswith(prefix)
            for axis, size in enumerate(parameter.shape):
                heads = any(part in name for part in ("self.query", "self.key", "self.value", "_proj")) and inside
                reads = axis == 1 or "o_proj" in name or "down_proj" in name
                if size != 16 or (heads and not reads) or (axis == 1 and "attention.output.dense" in name):
                    continue
                if "o_proj" in name and axis == 1:
                    continue
                parameter.copy_(parameter.index_select(axis, channels))
        for layer in find_layers(model):
            neurons = torch.randperm(32, generator=generator)
            for parameter in layer.parameters():
                for axis, size in enumerate(parameter.shape):
                    if size == 32:
                        parameter.copy_(parameter.index_select(axis, neurons))
    return model


@pytest.mark.parametrize("make_teacher", [lambda: make("Bert"), lambda: make("Llama", num_key_value_heads=2)])
def test_the_order_of_channels_and_neurons_does_not_matter(make_teacher: Any) -> None:
    teacher = make_teacher()
    other = permuted(teacher)
    torch.testing.assert_close(logits(other), logits(teacher))
    students = [student_from_teacher(model, num_layers=2, width=0.5) for model in (teacher, other)]
    torch.testing.assert_close(logits(students[0]), logits(students[1]))


def test_grouped_heads_are_kept_as_groups() -> None:
    teacher = make("Llama", num_attention_heads=4, num_key_value_heads=2)
    attention = find_layers(teacher)[0].self_attn
    with torch.no_grad():
        attention.k_proj.weight[4:].mul_(100)  # the second group
    small = find_layers(student_from_teacher(teacher, width=0.5))[0].self_attn
    assert small.config.num_attention_heads == 2
    assert small.config.num_key_value_heads == 1
    assert small.q_proj.weight.shape == (8, 8)
    kept = [i for i in range(16) if any(torch.equal(attention.q_proj.weight[8, i], w) for w in small.q_proj.weight[0])]
    assert torch.equal(small.q_proj.weight, attention.q_proj.weight[8:][:, kept])
    assert torch.equal(small.k_proj.weight, attention.k_proj.weight[4:][:, kept])


@settings(deadline=None, max_examples=40)
@given(width=st.floats(-0.5, 1.5, allow_nan=False))
def test_any_width_is_met_or_the_nearest_is_named(width: float) -> None:
    teacher = bert(layers=1, hidden_size=32, num_attention_heads=8, intermediate_size=64)
    try:
        student = student_from_teacher(teacher, width=width)
    except ValueError as error:
        message = str(error)
        assert "Expected argument `width`" in message
        if 0 < width <= 1:
            nearest = float(message.split("= ")[-1].rstrip("."))
            assert abs(nearest - width) <= 1 / 16 + 1e-3 or nearest == 1 / 8
            assert student_from_teacher(teacher, width=nearest).config.hidden_size == round(32 * nearest)
    else:
        assert student.config.hidden_size == round(32 * width)
        assert student.config.hidden_size // student.config.num_attention_heads == 4


@pytest.mark.parametrize("ratio", [1.2, 1.5, 2.0, 3.0, 8.0])
def test_compression_ratio_is_the_nearest_that_can_be_had(ratio: float) -> None:
    teacher = llama(layers=6, vocab_size=32)

    def count(model: nn.Module) -> int:
        return sum(parameter.numel() for parameter in model.parameters())

    size = {
        (layers, width): count(student_from_teacher(teacher, num_layers=layers, width=width, init="random"))
        for layers in range(1, 7)
        for width in (0.5, 1.0)
        if (layers, width) != (6, 1.0)
    }
    target = count(teacher) / ratio
    by_depth = {shape: parameters for shape, parameters in size.items() if shape[1] == 1.0}
    candidates = by_depth if min(by_depth.values()) <= target else size
    best = min(abs(math.log(parameters / target)) for parameters in candidates.values())
    student = student_from_teacher(teacher, compression_ratio=ratio)
    assert abs(math.log(count(student) / target)) == pytest.approx(best)


def test_random_init_is_not_the_teacher() -> None:
    teacher = make("Bert")
    student = student_from_teacher(teacher, num_layers=2, init="random")
    assert not torch.equal(
        student.bert.embeddings.word_embeddings.weight, teacher.bert.embeddings.word_embeddings.weight
    )


def test_label_names_are_kept() -> None:
    teacher = bert(id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert student_from_teacher(teacher, num_layers=1).config.label2id == {"a": 0, "b": 1, "c": 2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_layers": 5}, "`num_layers` to be from 1 to 4, the teacher's depth, but got 5"),
        ({"num_layers": 0}, "`num_layers`"),
        ({"num_decoder_layers": 1}, "`num_decoder_layers` to be None for a `BertForSequenceClassification`"),
        ({"width": 0.3}, r"`width`.* The nearest is 1/2"),
        ({"width": 0.0}, "`width`"),
        ({"compression_ratio": 0.5}, "`compression_ratio`.* pass 2"),
        ({"compression_ratio": 2.0, "num_layers": 2}, "`compression_ratio` to stand alone"),
        ({"num_layers": 2, "layers": "every_third"}, "`layers`"),
        ({"num_layers": 2, "layers": [(0, 1)]}, "`layers` to name a teacher layer per student layer"),
        ({"init": "zeros"}, "`init`"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        student_from_teacher(make("Bert"), **arguments)


def test_what_cannot_be_followed_is_made_narrower_by_hand_but_shorter_here() -> None:
    config = transformers.FNetConfig(hidden_size=16, num_hidden_layers=2, intermediate_size=32, vocab_size=64)
    teacher = transformers.FNetForSequenceClassification(config)
    with pytest.raises(ValueError, match=r"followed past .*fft.*Make the student by hand.*DistillationModule"):
        student_from_teacher(teacher, width=0.5)
    assert len(find_layers(student_from_teacher(teacher, num_layers=1))) == 1
    with pytest.raises(ValueError, match="but got a `Linear`"):
        student_from_teacher(nn.Linear(2, 2))
