"""What pairs of layers may look like: other widths each, feature maps of other sizes, layers without attention."""

import copy
import re
from itertools import pairwise
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from lightning_distill import DistillationModule
from lightning_distill.objectives import (
    AttentionMap,
    AttentionRelation,
    AttentionTransfer,
    Contrastive,
    Flow,
    HiddenState,
    HiddenStateCosine,
    NeuronSelectivity,
    SimilarityPreserving,
)
from lightning_distill.signals.description import ModelInfo
from lightning_distill.signals.signals import Signals
from lightning_distill.students.config import by_hand
from tests.helpers.models import SMALL, bert


class Unknown(nn.Module):
    """A layer whose class does not tell its width."""

    def __init__(self, width: int, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size, width))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T


def layers(*widths: int) -> nn.Sequential:
    return nn.Sequential(*(Unknown(*pair) for pair in pairwise(widths)))


PATHS = [("0", "0"), ("1", "1")]


@pytest.mark.parametrize("kind", [HiddenState, HiddenStateCosine, Contrastive])
def test_each_pair_of_layers_has_widths_of_its_own(kind: Any) -> None:
    objective = kind(PATHS, widths=[(5, 7), (6, 9)])
    module = DistillationModule(layers(4, 7, 9, 3), layers(4, 5, 6, 3), [objective])
    assert [(p.in_features, p.out_features) for p in objective.projections] == [(5, 7), (6, 9)]
    assert torch.isfinite(sum(module.losses((torch.randn(4, 4), torch.arange(4) % 3)).values()))


def test_the_widths_of_the_embedding_come_first_and_one_pair_holds_for_all() -> None:
    infos = ModelInfo(depth=2, width=None), ModelInfo(depth=2, width=None)
    objective = HiddenState("last", embedding=True, widths=[(2, 3), (4, 5), (6, 6)])
    objective.bind(*infos)
    found = [(p.in_features, p.out_features) for p in objective.projections if isinstance(p, nn.Linear)]
    assert found == [(2, 3), (4, 5)]
    assert isinstance(objective.projections[2], nn.Identity)
    objective = HiddenState("last", widths=(2, 3))
    objective.bind(*infos)
    assert [p.in_features for p in objective.projections] == [2, 2]
    with pytest.raises(ValueError, match=r"`widths` of objective `hidden_state` to be a pair for each of the 2 pairs"):
        HiddenState("last", widths=[(2, 3)]).bind(*infos)


def maps(student: tuple[int, int], teacher: tuple[int, int]) -> tuple[Signals, Signals]:
    torch.manual_seed(0)
    return tuple(Signals(torch.zeros(2, 3), modules={"m": torch.randn(2, 4, *size)}) for size in (student, teacher))  # type: ignore[return-value]


@pytest.mark.parametrize("kind", [HiddenState, HiddenStateCosine, NeuronSelectivity, AttentionTransfer])
@pytest.mark.parametrize("sizes", [((8, 8), (4, 4)), ((4, 4), (8, 8)), ((6, 4), (3, 8)), ((4, 9), (6, 6))])
def test_the_larger_feature_map_is_pooled_where_that_is_asked_for(kind: Any, sizes: Any) -> None:
    student, teacher = maps(*sizes)
    info = ModelInfo(modules={"m": 4})
    asked, not_asked = kind([("m", "m")], pool_maps=True), kind([("m", "m")])
    for objective in (asked, not_asked):
        objective.bind(info, info)
    # Of 36 positions each: as many, and yet others.
    with pytest.raises(ValueError, match=re.escape(f"{sizes[0]} of the student and {sizes[1]}") + ".*`pool_maps=True`"):
        not_asked(student, teacher)
    size = tuple(map(min, *sizes))
    for signals in (student, teacher):
        pooled = nn.functional.adaptive_avg_pool2d(signals.modules["m"], size)
        signals.modules = {"m": pooled}
    expected = not_asked(student, teacher).values
    torch.testing.assert_close(asked(*maps(*sizes)).values, expected)


def test_what_compares_rows_or_flows_takes_maps_of_any_size() -> None:
    student, teacher = maps((8, 8), (4, 4))
    info = ModelInfo(modules={"m": 4})
    rows = SimilarityPreserving([("m", "m")])
    rows.bind(info, info)
    assert rows(student, teacher).values.shape == (2,)
    flow = Flow([("m", "m"), ("m", "m")], pool_maps=True)
    flow.bind(info, info)
    assert flow(student, teacher).values.shape == (2,)


def test_the_layers_of_relations_stand_where_those_of_maps_do_and_the_earlier_order_holds() -> None:
    pair = [(1, 2)]
    for made in (
        AttentionRelation(pair, ("qk",)),
        AttentionRelation(("qk",), pair),
        AttentionRelation(kinds=("qk",), layers=pair),
        AttentionRelation(pair, kinds=["qk"]),
    ):
        assert (made.layers, made.kinds) == (pair, ("qk",))
    assert (AttentionRelation("last").layers, AttentionRelation("last").kinds) == ("last", ("qq", "kk", "vv"))
    assert (AttentionRelation(("vv",)).layers, AttentionRelation(("vv",)).kinds) == (None, ("vv",))
    with pytest.raises(ValueError, match="`kinds`"):
        AttentionRelation(pair, pair)  # type: ignore[arg-type]


def model(name: str, depth: int, **config: Any) -> Any:
    kind = getattr(transformers, name)
    sizes = {key: SMALL[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads")}
    return kind(kind.config_class(**{**sizes, "num_hidden_layers": depth, "pad_token_id": 0, **config}))


@pytest.mark.parametrize("objective", [AttentionMap, AttentionRelation])
@pytest.mark.parametrize(
    "name", ["DebertaV2ForSequenceClassification", "DebertaForSequenceClassification", "MPNetForSequenceClassification"]
)
def test_attention_that_cannot_be_recorded_is_refused_before_a_step_by_its_reason(name: str, objective: Any) -> None:
    with pytest.raises(ValueError, match=r"the student's `\w+Layer` computes its attention in a way of its own"):
        DistillationModule(model(name, 3), model(name, 2), [objective("last")])
    teacher = model(name, 3)
    with pytest.raises(ValueError, match=r"the teacher's `\w+Layer` computes its attention in a way of its own"):
        DistillationModule(teacher, bert(), [objective("last")])


def test_shared_layers_are_named_as_the_reason() -> None:
    name = "AlbertForSequenceClassification"
    pair = model(name, 3, embedding_size=16), model(name, 2, embedding_size=16)
    for objective in (AttentionRelation(), AttentionMap("last"), HiddenState("last")):
        with pytest.raises(ValueError, match="because its layers share their weights"):
            DistillationModule(*pair, [objective])


def test_layers_that_put_tokens_first_are_not_read_as_rows() -> None:
    config = transformers.XLNetConfig(vocab_size=60, d_model=16, n_head=2, d_inner=16, n_layer=2)
    pair = [transformers.XLNetForSequenceClassification(config) for _ in range(2)]
    with pytest.raises(ValueError, match=r"those of XLNet give `\[T, B, D\]`"):
        DistillationModule(*pair, [HiddenState("last")])


TOWER = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 4, "num_attention_heads": 2}
OTHERS: dict[str, dict[str, Any]] = {
    "DebertaV2ForSequenceClassification": {},
    "AlbertForSequenceClassification": {"embedding_size": 16},
    "BartForSequenceClassification": {"d_model": 16, "encoder_layers": 4, "decoder_layers": 4, "encoder_ffn_dim": 8},
    "T5ForConditionalGeneration": {"d_model": 16, "d_kv": 8, "d_ff": 8, "num_layers": 4, "num_heads": 2},
    "CLIPModel": {
        "text_config": {**TOWER, "vocab_size": 60},
        "vision_config": {**TOWER, "image_size": 8, "patch_size": 4},
    },
    "FunnelForSequenceClassification": {"d_model": 16, "d_head": 8, "d_inner": 16, "block_sizes": [2, 2]},
    "ViTForImageClassification": {**TOWER, "image_size": 8, "patch_size": 4},
    "SwinForImageClassification": {
        "embed_dim": 8,
        "depths": [2, 2],
        "num_heads": [1, 2],
        "image_size": 16,
        "window_size": 2,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_the_advice_for_any_architecture_makes_a_smaller_student(name: str) -> None:
    kind = getattr(transformers, name)
    own = {"vocab_size": 60, **OTHERS[name]}
    whole = {"text_config", "block_sizes", "depths", "image_size", "d_model"} & own.keys()
    given = own if whole else {**TOWER, **own}
    teacher = kind(kind.config_class(**copy.deepcopy(given)))
    # It is given where a forward cannot be followed, which those of most of these can.
    names: dict[str, Any] = {"copy": copy, "teacher": teacher}
    exec(by_hand(teacher), names)
    small, large = (sum(p.numel() for p in m.parameters()) for m in (names["student"], teacher))
    assert small < large
