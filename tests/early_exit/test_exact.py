"""A row's answer and exit are those it has alone: whatever the batch, the padding, the order, the cost of a cut."""

import copy
from typing import Any

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lightning_distill.early_exit import (
    AllOf,
    AnyOf,
    Confidence,
    Criterion,
    EarlyExitModel,
    Entropy,
    LearnedGate,
    Margin,
    Patience,
    make_ramps,
)
from tests.early_exit.models import DEPTH, Stack, early, student
from tests.helpers.models import tokens
from tests.models.registry import ARCHITECTURES


def alone(model: EarlyExitModel, batch: dict[str, Tensor]) -> tuple[list[Tensor], Tensor]:
    """Each row by itself, without its padding."""
    logits, exits = [], []
    for row, mask in enumerate(batch["attention_mask"].bool()):
        one = {key: value[row : row + 1, mask] for key, value in batch.items()}
        answer, exit_layer = model.predict(one)
        logits.append(answer[0])
        exits.append(exit_layer)
    return logits, torch.cat(exits)


def near_threshold(model: EarlyExitModel, batch: dict[str, Tensor], distance: float = 1e-4) -> Tensor:
    """Rows whose measure is so near to a threshold that rounding may decide."""
    near = torch.zeros(len(batch["input_ids"]), dtype=torch.bool)
    for layer, (logits, gate) in model.answers(batch)[0].items():
        if layer in model.thresholds:
            state = model.criterion.begin(logits.shape[:-1], logits.device)
            measure = model.criterion.measure(logits / model.temperatures.get(layer, 1.0), gate, state)[0]
            close = (measure - model.thresholds[layer]).abs() < distance
            near |= close if close.ndim == 1 else close.any(1)
    return near


def check(model: EarlyExitModel, batch: dict[str, Tensor]) -> Tensor:
    """Compare a batch with its rows alone; returns the exits."""
    logits, exits = model.predict(batch)
    expected, expected_exits = alone(model, batch)
    sound = ~near_threshold(model, batch)
    assert torch.equal(exits[sound], expected_exits[sound])
    for row in sound.nonzero().flatten().tolist():
        own = logits[row] if logits.ndim == 2 else logits[row, batch["attention_mask"][row].bool()]
        torch.testing.assert_close(own, expected[row], rtol=1e-4, atol=1e-4)
    return exits


@pytest.mark.parametrize("architecture", [name for name, row in ARCHITECTURES.items() if row.has_exits])
def test_a_batch_answers_as_its_rows_alone(architecture: str) -> None:
    model = early(student(architecture, num_labels=3))
    exits = check(model, tokens(64, 12))
    assert len(exits.unique()) == DEPTH  # every exit is used, and the end


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    architecture=st.sampled_from(["Bert", "DistilBert", "Llama"]),
    thresholds=st.lists(st.floats(0.3, 1.0), min_size=3, max_size=3),
    rows=st.integers(1, 64),
    length=st.integers(3, 16),
    sort=st.booleans(),
    cutting=st.sampled_from(["measured", "always", "never"]),
    kind=st.sampled_from(["linear", "pooler", "attention"]),
)
def test_any_net_any_thresholds_any_batch(
    seed: int, architecture: str, thresholds: list[float], rows: int, length: int, sort: bool, cutting: str, kind: Any
) -> None:
    torch.manual_seed(seed)
    net = student(architecture, num_labels=3)
    model = EarlyExitModel(net, make_ramps(net, kind=kind, seed=seed), dict(enumerate(thresholds)), sort=sort)
    model.ramps.requires_grad_(False)
    for ramp in model.ramps.values():
        ramp.output.weight.mul_(4)
    if cutting != "measured":
        model.cost.worth_cutting = lambda *_: cutting == "always"  # type: ignore[method-assign]
    check(model, tokens(rows, length, seed=seed))


@pytest.mark.parametrize(
    "criterion",
    [
        Entropy(),
        Margin(),
        LearnedGate(),
        Patience(1),
        AnyOf(Confidence(0.9), Patience(2)),
        AllOf(Entropy(0.9), Patience(1)),
    ],
    ids=lambda criterion: type(criterion).__name__,
)
def test_every_criterion_remembers_the_right_rows(criterion: Criterion) -> None:
    net = student(num_labels=3)
    if criterion.threshold is None:
        model = early(net, criterion=criterion)
    else:
        model = EarlyExitModel(net, make_ramps(net, criterion=criterion))
    assert len(check(model, tokens(64, 12)).unique()) >= 2


def test_token_classification_leaves_when_all_its_tokens_are_sure() -> None:
    model = early(student(head="TokenClassification", num_labels=3), share=0.85)
    batch = tokens(64, 6)
    exits = check(model, batch)
    assert len(exits.unique()) == DEPTH
    asked, _ = model.answers(batch)
    sure = asked[0][0].softmax(-1).amax(-1) > model.thresholds[0]
    assert torch.equal(exits == 0, (sure | ~batch["attention_mask"].bool()).all(1))


def test_regression_by_patience() -> None:
    net = student(num_labels=1, problem_type="regression")
    model = EarlyExitModel(net, make_ramps(net, criterion=Patience(1, tolerance=0.5)))
    exits = check(model, tokens(64, 12))
    assert len(exits.unique()) >= 2


def test_a_stack_by_path_and_rows_that_look_like_a_batch() -> None:
    model = early(Stack(), layers="body")
    x = torch.randn(8, 8)  # as many rows as columns: nothing may be guessed from a size
    logits, exits = model.predict(x)
    assert len(exits.unique()) >= 3
    for row in range(8):
        answer, exit_layer = model.predict(x[row : row + 1])
        torch.testing.assert_close(answer[0], logits[row])
        assert exit_layer == exits[row]


class SumsOutside(Stack):
    def forward(self, x: Tensor) -> Tensor:
        for layer in self.body:
            x = x + layer(x)
        return self.head(x)


def test_a_model_that_computes_between_its_layers_is_refused() -> None:
    model = early(SumsOutside(), layers="body")
    with pytest.raises(ValueError, match="to hand what layer 0 gives to layer 1 as it is"):
        model.predict(torch.randn(8, 8))


class Shared(nn.Module):
    """Layers that get a table of as many rows as the batch, which is not of the batch, and the batch in dimension 1."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(DEPTH))
        for index, layer in enumerate(self.layers):
            self.layers[index] = _Layer(layer)
        self.head = nn.Linear(8, 3)
        self.table = nn.Parameter(torch.randn(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        beside = x.flip(-1)[None]
        for layer in self.layers:
            x, beside = layer(x, table=self.table, beside=beside)
        return self.head(x)


class _Layer(nn.Module):
    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: Tensor, table: Tensor, beside: Tensor) -> tuple[Tensor, Tensor]:
        return torch.tanh(self.linear(x) @ table.T @ table / 6 + beside[0]), beside * 0.9


def test_the_batch_dimension_is_learned_not_guessed() -> None:
    x = torch.randn(6, 8)
    model = early(Shared(), 0.2, batch=x, layers="layers", widths=8, num_outputs=3)
    logits, exits = model.predict(x)
    assert len(exits.unique()) >= 2
    assert (exits == DEPTH - 1).sum() > 1
    rows = [model.predict(x[row : row + 1]) for row in range(6)]
    torch.testing.assert_close(logits, torch.cat([answer for answer, _ in rows]))
    assert torch.equal(exits, torch.cat([exit_layer for _, exit_layer in rows]))


def test_caches_shrink_with_the_batch_and_the_callers_stays() -> None:
    net = student("Llama", num_labels=3)
    model = early(net, kind="linear")  # the last token; attention would weigh those in the cache, too
    prompt, rest = tokens(16, 4), tokens(16, 6, seed=3)
    prompt["attention_mask"].fill_(1)
    with torch.no_grad():
        cache = net.model(**prompt, use_cache=True).past_key_values
    mask = torch.cat([prompt["attention_mask"], rest["attention_mask"]], 1)
    logits, exits = model.predict({"input_ids": rest["input_ids"], "attention_mask": mask, "past_key_values": cache})
    assert len(exits.unique()) >= 3
    assert cache.get_seq_length() == 4
    whole = {"input_ids": torch.cat([prompt["input_ids"], rest["input_ids"]], 1), "attention_mask": mask}
    expected, expected_exits = model.predict(whole)
    assert torch.equal(exits, expected_exits)
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


def test_without_exits_the_model_is_the_student() -> None:
    net = student()
    model = EarlyExitModel(net, make_ramps(net))
    batch = tokens(8, 8)
    logits, exits = model.predict(batch)
    assert torch.equal(logits, net(**batch).logits)
    assert exits.tolist() == [DEPTH - 1] * 8


def test_the_forward_is_the_models_own_again() -> None:
    net = student()
    model = early(net)
    before = {name: dict(vars(module)) for name, module in net.named_modules()}
    batch = tokens(8, 8)
    model.predict(batch)
    broken = copy.copy(batch)
    broken["input_ids"] = batch["input_ids"] + 1000
    with pytest.raises(IndexError):
        model.predict(broken)
    assert {name: dict(vars(module)) for name, module in net.named_modules()} == before
    assert isinstance(net, transformers.BertForSequenceClassification)


def test_where_all_have_left_no_layer_runs() -> None:
    net = student()
    model = EarlyExitModel(net, make_ramps(net), {0: 0.0, 2: 0.0})
    ran = []
    for index, layer in enumerate(model.layers):
        layer.register_forward_hook(lambda *_, index=index: ran.append(index))
    exits = model.predict(tokens(8, 8)).exit_layer
    assert exits.tolist() == [0] * 8
    assert ran == [0]


def test_rows_that_leave_are_taken_out_and_few_are_carried() -> None:
    net = student()
    model = EarlyExitModel(net, make_ramps(net), {0: 0.0, 2: 0.0})
    sizes: list[int] = []
    model.layers[3].register_forward_pre_hook(lambda _, args: sizes.append(len(args[0])))
    model.thresholds = early(net).thresholds
    batch = tokens(32, 8)
    exits = model.predict(batch).exit_layer
    staying = int((exits == DEPTH - 1).sum())
    assert sizes[-1] == staying < 32
    # A cut that costs as much as a thousand layers is not made, and changes nothing but that.
    model.cost.cut = 1000 * model.cost.layer
    again = model.predict(batch).exit_layer
    assert sizes[-1] == 32
    assert torch.equal(again, exits)


def test_a_batch_of_mixed_precision_and_compiled_stages() -> None:
    net = student()
    model = early(net)
    batch = tokens(32, 8)
    expected = model.predict(batch)
    with torch.autocast("cpu", torch.bfloat16):
        logits, exits = model.predict(batch)
    assert logits.dtype == torch.bfloat16
    assert (exits == expected.exit_layer).float().mean() > 0.8
    model.compile(backend="eager")
    compiled = model.predict(batch)
    assert torch.equal(compiled.exit_layer, expected.exit_layer)
    torch.testing.assert_close(compiled.logits, expected.logits, rtol=1e-4, atol=1e-5)
