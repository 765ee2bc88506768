"""Every objective with an independent oracle, run by the shared tests of this folder.

An oracle, see `oracles.py`, returns the mean over the items that count.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.functional.attention import Attention
from lightning_distill.objectives import (
    AttentionMap,
    AttentionRelation,
    AttentionTransfer,
    Contrastive,
    Correlation,
    CoSENT,
    CurriculumTemperature,
    Decoupled,
    EmbeddingDistance,
    EmbeddingSimilarity,
    Flow,
    HardLabel,
    HiddenState,
    HiddenStateCosine,
    ListwiseKL,
    LogitsCosine,
    LogitsMSE,
    Loss,
    MarginMSE,
    NeuronSelectivity,
    Objective,
    PatientHiddenState,
    RelationalAngle,
    RelationalDistance,
    SimilarityPreserving,
    SoftTarget,
    TopKSoftTarget,
    UniversalLogit,
)
from lightning_distill.signals.description import ModelInfo
from lightning_distill.signals.signals import Signals
from tests.objectives import oracles
from tests.objectives.oracles import DEPTH

CLASSES = 7


@dataclass
class Case:
    """An objective and what is true of it."""

    name: str
    make: Callable[[], Objective]
    oracle: Callable[[Signals, Signals], Tensor]
    #: The value of a row depends on the other rows: no invariance to how a batch is split.
    batch_coupled: bool = False
    #: Loss and gradient are 0 where student equals teacher.
    zero_when_equal: bool = True
    #: Student and teacher may have other widths and heads.
    any_width: bool = False
    #: A part of the value is a constant to the gradient, which no numerical derivative can know.
    has_constants: bool = False

    def bound(self, teacher_width: int = 6, teacher_heads: int = 2) -> Objective:
        objective = self.make()
        student = ModelInfo(DEPTH, 6, 2, 2, 3)
        objective.bind(student, ModelInfo(DEPTH, teacher_width, teacher_heads, teacher_heads, 3))
        return objective


def signals(
    rows: int = 3, tokens: int = 5, *, width: int = 6, heads: int = 2, seed: int = 0, masked: bool = True
) -> Signals:
    """Random float64 signals; two calls with the same rows and tokens have the same labels and masks."""
    shared = torch.Generator().manual_seed(99)
    lengths = torch.randint(2, tokens + 1, (rows,), generator=shared)
    token_mask = torch.arange(tokens) < lengths[:, None]
    labels = torch.randint(0, CLASSES, (rows, tokens), generator=shared)
    mask = token_mask & (torch.rand(rows, tokens, generator=shared) < 0.8)
    mask[0, 0] = True
    labels = labels.masked_fill(~mask, -100) if masked else labels

    own = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=own, dtype=torch.float64)

    attention_mask = token_mask[:, None, None, :] if masked else None
    return Signals(
        logits=2 * normal(rows, tokens, CLASSES),
        labels=labels,
        mask=mask if masked else None,
        token_mask=token_mask if masked else None,
        hidden_states={layer: normal(rows, tokens, width) for layer in range(DEPTH)},
        embedding=normal(rows, tokens, width),
        attention={
            layer: Attention(*(normal(rows, heads, tokens, 3) for _ in range(3)), attention_mask, 3**-0.5, False)
            for layer in range(DEPTH)
        },
    )


def tensors(signals: Signals) -> list[Tensor]:
    """The floating point tensors of signals, which a gradient may reach."""
    found = [signals.logits, *signals.hidden_states.values()]
    if signals.embedding is not None:
        found.append(signals.embedding)
    for attention in signals.attention.values():
        found += [attention.query, attention.key, attention.value]
    return found


def changed(signals: Signals, change: Callable[[Tensor], Tensor], on_mask: Callable[[Tensor], Tensor]) -> Signals:
    """Signals with a function applied to every tensor, and another to every mask and to the labels."""
    mask = None if signals.mask is None else on_mask(signals.mask)
    token_mask = None if signals.token_mask is None else on_mask(signals.token_mask)
    assert signals.labels is not None
    assert signals.embedding is not None
    return Signals(
        logits=change(signals.logits),
        labels=on_mask(signals.labels),
        mask=mask,
        token_mask=token_mask,
        hidden_states={layer: change(state) for layer, state in signals.hidden_states.items()},
        embedding=change(signals.embedding),
        attention={
            layer: Attention(
                *(change(x) for x in (attention.query, attention.key, attention.value)),
                mask=None if attention.mask is None else on_mask(attention.mask),
                scaling=attention.scaling,
                is_causal=attention.is_causal,
            )
            for layer, attention in signals.attention.items()
        },
    )


def _soft_target(name: str, temperature: float, formula: Callable[[Tensor, Tensor], Tensor]) -> Case:
    case = f"{name}_at_{temperature:g}"
    make = lambda: SoftTarget(temperature, name, beta=0.3, alpha=0.2)  # noqa: E731
    return Case(case, make, oracles.divergence(formula, temperature), has_constants=name == "adaptive_kl")


def _cosent_of_others() -> CoSENT:
    """The signals of this file have a label for each text; of the first one, which is compared, there is none."""
    objective = CoSENT()
    own = objective.forward

    def forward(student: Signals, teacher: Signals) -> Loss:
        assert student.labels is not None
        return own(replace(student, labels=student.labels[:, 1:]))

    objective.forward = forward  # type: ignore[assignment, method-assign]
    return objective


ALL_TEMPERATURES = (0.5, 1.0, 4.0)
CASES = [
    *(
        _soft_target(name, temperature, formula)
        for temperature in ALL_TEMPERATURES
        for name, formula in {
            "forward_kl": oracles.kl,
            "reverse_kl": lambda p, q: oracles.kl(q, p),
            "jeffreys": lambda p, q: (oracles.kl(p, q) + oracles.kl(q, p)) / 2,
            "js": lambda p, q: 0.3 * oracles.kl(p, 0.3 * p + 0.7 * q) + 0.7 * oracles.kl(q, 0.3 * p + 0.7 * q),
            "skew_forward_kl": lambda p, q: oracles.kl(p, 0.2 * p + 0.8 * q),
            "skew_reverse_kl": lambda p, q: oracles.kl(q, 0.2 * q + 0.8 * p),
            "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
            # Equation 6 of ABKD.
            "alpha_beta": lambda p, q: (p**0.2 * q**0.3 - 0.4 * p**0.5 - 0.6 * q**0.5).sum(-1) / -0.06,
            "adaptive_kl": oracles.adaptive,
        }.items()
    ),
    Case("hard_label", lambda: HardLabel(0.1), oracles.hard_label, zero_when_equal=False),
    Case(
        "logits_mse",
        LogitsMSE,
        lambda s, t: F.mse_loss(s.logits[oracles.items(s)], t.logits[oracles.items(s)]),
    ),
    Case(
        "logits_cosine",
        LogitsCosine,
        lambda s, t: F.cosine_embedding_loss(
            s.logits[oracles.items(s)],
            t.logits[oracles.items(s)],
            torch.ones(int(oracles.items(s).sum()), dtype=torch.float64),
        ),
    ),
    Case("decoupled", lambda: Decoupled(3.0), oracles.decoupled),
    Case("decoupled_standardized", lambda: Decoupled(3.0, standardize=True), oracles.standardized(oracles.decoupled)),
    Case(
        "standardized",
        lambda: SoftTarget(2.0, standardize=True),
        oracles.standardized(oracles.divergence(oracles.kl, 2.0)),
    ),
    Case("correlation", lambda: Correlation(4.0, beta=2.0, gamma=3.0), oracles.correlation, True),
    Case("curriculum", lambda: CurriculumTemperature(4.0), oracles.divergence(oracles.kl, 4.0)),
    Case("top_k", lambda: TopKSoftTarget(3, 2.0), oracles.top_k),
    Case("universal_logit", UniversalLogit, oracles.universal_logit),
    Case(
        "universal_logit_matched",
        lambda: UniversalLogit([(0, 0), (1, 1), (2, 2)], matched_weight=2.0, unmatched_weight=0.5),
        lambda s, t: oracles.universal_logit(s, t, 3),
    ),
    Case(
        "embedding_cosine",
        EmbeddingDistance,
        lambda s, t: oracles.texts(s, t, lambda a, b: (1 - F.cosine_similarity(a, b)).mean()),
    ),
    Case("embedding_mse", lambda: EmbeddingDistance("mse"), lambda s, t: oracles.texts(s, t, F.mse_loss)),
    Case("embedding_similarity", EmbeddingSimilarity, lambda s, t: oracles.texts(s, t, oracles.similarities), True),
    Case("margin_mse", MarginMSE, oracles.margins),
    Case("listwise_kl", lambda: ListwiseKL(temperature=3.0), oracles.listwise),
    Case("cosent", _cosent_of_others, oracles.cosent, True, zero_when_equal=False),
    Case("hidden_state", lambda: HiddenState("first"), oracles.per_layer(oracles.hidden_mse)),
    Case("embedding", lambda: HiddenState(None, embedding=True), oracles.per_layer(oracles.hidden_mse, range(-1, 0))),
    Case(
        "hidden_and_embedding",
        lambda: HiddenState(embedding=True),
        oracles.per_layer(oracles.hidden_mse, range(-1, DEPTH)),
    ),
    Case("hidden_cosine", lambda: HiddenStateCosine("first"), oracles.per_layer(oracles.hidden_cosine)),
    Case("patient", lambda: PatientHiddenState("first"), oracles.per_layer(oracles.patient)),
    Case("flow", lambda: Flow("first"), oracles.flow),
    Case("selectivity", lambda: NeuronSelectivity("first"), oracles.per_layer(oracles.selectivity), any_width=True),
    Case("transfer", lambda: AttentionTransfer("first"), oracles.per_layer(oracles.transfer), any_width=True),
    Case(
        "similarity",
        lambda: SimilarityPreserving("first", pooling="mean"),
        oracles.per_layer(oracles.similarity),
        True,
        any_width=True,
    ),
    Case("distance", lambda: RelationalDistance("first"), oracles.per_layer(oracles.distance), True, any_width=True),
    Case("angle", lambda: RelationalAngle("first"), oracles.per_layer(oracles.angle), True, any_width=True),
    Case(
        "contrastive", lambda: Contrastive("first"), oracles.per_layer(oracles.contrastive), True, zero_when_equal=False
    ),
    Case(
        "map_mse", lambda: AttentionMap("first"), lambda s, t: oracles.attention(s, t, oracles.map_mse), any_width=True
    ),
    Case(
        "map_kl",
        lambda: AttentionMap("first", "kl"),
        lambda s, t: oracles.attention(s, t, oracles.map_kl),
        any_width=True,
    ),
    Case("minilm2", AttentionRelation, oracles.relation(("qq", "kk", "vv"), 2), any_width=True),
    Case(
        "relation_qk_3_heads",
        lambda: AttentionRelation(("qk",), relation_heads=3),
        oracles.relation(("qk",), 3),
        any_width=True,
    ),
]
