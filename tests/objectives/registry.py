"""Every objective with an independent oracle, run by the shared tests of this folder.

An oracle is PyTorch's own loss where there is one, and otherwise the paper's formula written out, in loops over the
items that count. It returns the mean over these items.
"""

import math
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

CLASSES, DEPTH = 7, 2


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


def _items(signals: Signals) -> Tensor:
    assert signals.labels is not None
    return torch.ones_like(signals.labels, dtype=torch.bool) if signals.mask is None else signals.mask


def _rows(student: Signals, teacher: Signals, layer: int) -> list[tuple[Tensor, Tensor]]:
    """The real tokens of each row that has any, of a layer (-1: the embedding)."""
    s, t = (x.embedding if layer < 0 else x.hidden_states[layer] for x in (student, teacher))
    if student.token_mask is None:
        return list(zip(s, t, strict=True))
    return [(s[i][m], t[i][m]) for i, m in enumerate(student.token_mask) if m.any()]


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()


def _per_layer(
    oracle: Callable[[list[tuple[Tensor, Tensor]]], Tensor], layers: range = range(DEPTH)
) -> Callable[..., Tensor]:
    return lambda student, teacher: _mean([oracle(_rows(student, teacher, layer)) for layer in layers])


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """PyTorch's own KL(p || q), per item."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def _divergence(formula: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Callable[..., Tensor]:
    def oracle(student: Signals, teacher: Signals) -> Tensor:
        q, p = (torch.softmax(x.logits[_items(student)] / temperature, -1) for x in (student, teacher))
        return temperature**2 * formula(p, q).mean()

    return oracle


def _soft_target(name: str, temperature: float, formula: Callable[[Tensor, Tensor], Tensor]) -> Case:
    case = f"{name}_at_{temperature:g}"
    make = lambda: SoftTarget(temperature, name, beta=0.3, alpha=0.2)  # noqa: E731
    return Case(case, make, _divergence(formula, temperature), has_constants=name == "adaptive_kl")


def _adaptive(p: Tensor, q: Tensor) -> Tensor:
    """Class by class, from the teacher's best on, until the head has a mass of 0.2."""
    values = []
    for of_teacher, of_student in zip(p, q, strict=True):
        head, mass = [], 0.0
        for index in of_teacher.argsort(descending=True).tolist():
            if mass < 0.2:
                head.append(index)
                mass += of_teacher[index].item()
        gap = (of_teacher - of_student).abs().detach()
        share = gap[head].sum() / gap.sum() if gap.any() else 0.0
        values.append(share * _kl(of_teacher, of_student) + (1 - share) * _kl(of_student, of_teacher))
    return torch.stack(values)


def _decoupled(student: Signals, teacher: Signals, temperature: float = 3.0) -> Tensor:
    values = []
    for s, t, label in zip(
        *(x[_items(student)] for x in (student.logits, teacher.logits, student.labels)), strict=True
    ):
        q, p = torch.softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
        others = torch.arange(CLASSES) != label
        target = _kl(torch.stack([p[label], p[others].sum()]), torch.stack([q[label], q[others].sum()]))
        values.append(target + 8 * _kl(p[others] / p[others].sum(), q[others] / q[others].sum()))
    return temperature**2 * _mean(values)


def _correlation(student: Signals, teacher: Signals, temperature: float = 4.0) -> Tensor:
    """PyTorch's own correlation coefficients, of rows and of columns."""
    q, p = (torch.softmax(x.logits[_items(student)] / temperature, -1) for x in (student, teacher))
    between, within = (
        _mean([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*both, strict=True)])
        for both in ((q, p), (q.T, p.T))
    )
    return temperature**2 * (2 * between + 3 * within)


def _z_scores(signals: Signals) -> Signals:
    deviation, mean = torch.std_mean(signals.logits, -1, keepdim=True)
    return replace(signals, logits=(signals.logits - mean) / deviation)


def _standardized(oracle: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda student, teacher: oracle(_z_scores(student), _z_scores(teacher))


def _top_k(student: Signals, teacher: Signals, k: int = 3, temperature: float = 2.0) -> Tensor:
    values = []
    for s, t in zip(student.logits[_items(student)], teacher.logits[_items(student)], strict=True):
        q, p = torch.softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
        best = p.argsort(descending=True)
        p, q = (torch.cat([x[best[:k]], x[best[k:]].sum(0, keepdim=True)]) for x in (p, q))
        values.append(_kl(p, q))
    return temperature**2 * _mean(values)


def _universal_logit(student: Signals, teacher: Signals, matched: int = 0) -> Tensor:
    """The first words matched, with weight 2, and the others sorted, with weight 0.5 (of all: 1)."""
    values = []
    for s, t in zip(student.logits[_items(student)], teacher.logits[_items(student)], strict=True):
        q, p = torch.softmax(s, -1), torch.softmax(t, -1)
        rest = F.l1_loss(q[matched:].sort().values, p[matched:].sort().values, reduction="sum")
        values.append(2 * (q - p)[:matched].abs().sum() + 0.5 * rest if matched else rest)
    return _mean(values)


def _hard_label(student: Signals, teacher: Signals) -> Tensor:
    return F.cross_entropy(student.logits.transpose(1, 2), student.labels, label_smoothing=0.1)


def _hidden_mse(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    s, t = (torch.cat(x) for x in zip(*rows, strict=True))
    return F.mse_loss(s, t)


def _hidden_cosine(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    s, t = (torch.cat(x) for x in zip(*rows, strict=True))
    return F.cosine_embedding_loss(s, t, s.new_ones(len(s)))


def _patient(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    return _mean([(s[0] / s[0].norm() - t[0] / t[0].norm()).norm() ** 2 for s, t in rows])


def _flow(student: Signals, teacher: Signals) -> Tensor:
    values = []
    for (s1, t1), (s2, t2) in zip(_rows(student, teacher, 0), _rows(student, teacher, 1), strict=True):
        student_gram = torch.einsum("ni,nj->ij", s1, s2) / len(s1)
        teacher_gram = torch.einsum("ni,nj->ij", t1, t2) / len(t1)
        values.append(F.mse_loss(student_gram, teacher_gram))
    return _mean(values)


def _selectivity(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(x @ y) ** 2 for x in a for y in b]).mean()

    values = []
    for s, t in rows:
        a, b = (torch.stack([neuron / neuron.norm() for neuron in x.T]) for x in (s, t))
        values.append(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    return _mean(values)


def _transfer(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    values = []
    for s, t in rows:
        a, b = (x.pow(2).sum(1) for x in (s, t))
        values.append(F.mse_loss(a / a.norm(), b / b.norm()))
    return _mean(values)


def _pooled(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    s, t = zip(*((s.mean(0), t.mean(0)) for s, t in rows), strict=True)
    return torch.stack(s), torch.stack(t)


def _similarity(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    grams = []
    for x in _pooled(rows):
        gram = x @ x.T
        grams.append(torch.stack([row / row.norm() for row in gram]))
    return (grams[0] - grams[1]).norm() ** 2 / len(rows) ** 2


def _distance(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    n = len(rows)
    scaled = []
    for x in _pooled(rows):
        distances = [[(x[i] - x[j]).norm() if i != j else x.new_zeros(()) for j in range(n)] for i in range(n)]
        matrix = torch.stack([torch.stack(row) for row in distances])
        scaled.append(matrix / (matrix.sum() / (n * (n - 1))))
    return F.smooth_l1_loss(*scaled)


def _angle(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    n = len(rows)
    cosines = []
    for x in _pooled(rows):
        found = [
            F.cosine_similarity(x[j] - x[i], x[k] - x[i], dim=0) if i not in (j, k) else x.new_zeros(())
            for i in range(n)
            for j in range(n)
            for k in range(n)
        ]
        cosines.append(torch.stack(found))
    return F.smooth_l1_loss(*cosines)


def _contrastive(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    s, t = _pooled(rows)
    similarity = F.cosine_similarity(s[:, None], t[None], dim=-1) / 0.1
    return -similarity.log_softmax(-1).diagonal().mean()


def _texts(student: Signals, teacher: Signals, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return distance(*(x.logits[_items(student)] for x in (student, teacher)))


def _similarities(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(*(F.cosine_similarity(x[:, None], x[None], dim=-1) for x in (student, teacher)))


def _candidates(student: Signals, teacher: Signals) -> list[list[list[Tensor]]]:
    """Inner products of the query and each candidate there is, of both models, for each row that has a query."""
    found = []
    for s, t, there in zip(student.logits, teacher.logits, _items(student), strict=True):
        places = [i for i in range(1, len(there)) if there[0] and there[i]]
        found.append([[x[0] @ x[i] for i in places] for x in (s, t)])
    return found


def _margins(student: Signals, teacher: Signals) -> Tensor:
    values = []
    for (s, t), there in zip(_candidates(student, teacher), _items(student), strict=True):
        if there[1] and len(s) > 1:
            values += [((s[0] - a) - (t[0] - b)) ** 2 for a, b in zip(s[1:], t[1:], strict=True)]
    return _mean(values) if values else 0 * student.logits.sum()


def _listwise(student: Signals, teacher: Signals) -> Tensor:
    rows = [(torch.stack(s), torch.stack(t)) for s, t in _candidates(student, teacher) if len(s) > 1]
    return _mean([9 * _kl(torch.softmax(t / 3, -1), torch.softmax(s / 3, -1)) for s, t in rows])


def _cosent(student: Signals, teacher: Signals) -> Tensor:
    scored = [
        (F.cosine_similarity(row[0], row[i], dim=0), labels[i])
        for row, labels, there in zip(student.logits, student.labels, _items(student), strict=True)  # type: ignore[arg-type]
        for i in range(1, len(there))
        if there[0] and there[i]
    ]
    wrong = [torch.exp(20 * (a - b)) for a, low in scored for b, high in scored if low < high]
    return torch.log(1 + sum(wrong, student.logits.new_zeros(())))


def _cosent_of_others() -> CoSENT:
    """The signals of this file have a label for each text; of the first one, which is compared, there is none."""
    objective = CoSENT()
    own = objective.forward

    def forward(student: Signals, teacher: Signals) -> Loss:
        assert student.labels is not None
        return own(replace(student, labels=student.labels[:, 1:]))

    objective.forward = forward  # type: ignore[assignment, method-assign]
    return objective


def _attention(student: Signals, teacher: Signals, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Mean over the real queries of a loss of two maps ``[H, T, T]`` of the real tokens, over the layers."""
    values = []
    for layer in range(DEPTH):
        for row in range(len(student.logits)):
            real = slice(None) if student.token_mask is None else student.token_mask[row]
            maps = []
            for attention in (student.attention[layer], teacher.attention[layer]):
                q, k = attention.query[row][:, real], attention.key[row][:, real]
                maps.append(torch.softmax(torch.einsum("htd,hsd->hts", q, k) / math.sqrt(q.shape[-1]), -1))
            values.append(loss(maps[0], maps[1]))
    return torch.cat([x for x in values if x.numel()]).mean()


def _map_mse(s: Tensor, t: Tensor) -> Tensor:
    if s.shape[0] != t.shape[0]:
        s, t = s.mean(0, keepdim=True), t.mean(0, keepdim=True)
    return (s - t).square().mean((0, 2))


def _map_kl(s: Tensor, t: Tensor) -> Tensor:
    if s.shape[0] != t.shape[0]:
        s, t = s.mean(0, keepdim=True), t.mean(0, keepdim=True)
    return _kl(t, s).mean(0)


def _relation(kinds: tuple[str, ...], heads: int) -> Callable[..., Tensor]:
    fields = {"q": "query", "k": "key", "v": "value"}

    def oracle(student: Signals, teacher: Signals) -> Tensor:
        total = torch.zeros((), dtype=torch.float64)
        for kind in kinds:
            values = []
            for row in range(len(student.logits)):
                real = slice(None) if student.token_mask is None else student.token_mask[row]
                relations = []
                for signals in (student, teacher):
                    a, b = (
                        # Joined heads [T, H * D], cut again into relation heads.
                        torch.cat(list(getattr(signals.attention[DEPTH - 1], fields[end])[row][:, real]), -1)
                        for end in kind
                    )
                    pairs = zip(a.chunk(heads, -1), b.chunk(heads, -1), strict=True)
                    maps = [torch.softmax(x @ y.T / math.sqrt(x.shape[-1]), -1) for x, y in pairs]
                    relations.append(torch.stack(maps))
                values.append(_kl(relations[1], relations[0]).mean(0))
            total = total + torch.cat(values).mean()
        return total

    return oracle


ALL_TEMPERATURES = (0.5, 1.0, 4.0)
CASES = [
    *(
        _soft_target(name, temperature, formula)
        for temperature in ALL_TEMPERATURES
        for name, formula in {
            "forward_kl": _kl,
            "reverse_kl": lambda p, q: _kl(q, p),
            "jeffreys": lambda p, q: (_kl(p, q) + _kl(q, p)) / 2,
            "js": lambda p, q: 0.3 * _kl(p, 0.3 * p + 0.7 * q) + 0.7 * _kl(q, 0.3 * p + 0.7 * q),
            "skew_forward_kl": lambda p, q: _kl(p, 0.2 * p + 0.8 * q),
            "skew_reverse_kl": lambda p, q: _kl(q, 0.2 * q + 0.8 * p),
            "total_variation": lambda p, q: (p - q).abs().sum(-1) / 2,
            # Equation 6 of ABKD.
            "alpha_beta": lambda p, q: (p**0.2 * q**0.3 - 0.4 * p**0.5 - 0.6 * q**0.5).sum(-1) / -0.06,
            "adaptive_kl": _adaptive,
        }.items()
    ),
    Case("hard_label", lambda: HardLabel(0.1), _hard_label, zero_when_equal=False),
    Case(
        "logits_mse",
        LogitsMSE,
        lambda s, t: F.mse_loss(s.logits[_items(s)], t.logits[_items(s)]),
    ),
    Case(
        "logits_cosine",
        LogitsCosine,
        lambda s, t: F.cosine_embedding_loss(
            s.logits[_items(s)], t.logits[_items(s)], torch.ones(int(_items(s).sum()), dtype=torch.float64)
        ),
    ),
    Case("decoupled", lambda: Decoupled(3.0), _decoupled),
    Case("decoupled_standardized", lambda: Decoupled(3.0, standardize=True), _standardized(_decoupled)),
    Case("standardized", lambda: SoftTarget(2.0, standardize=True), _standardized(_divergence(_kl, 2.0))),
    Case("correlation", lambda: Correlation(4.0, beta=2.0, gamma=3.0), _correlation, True),
    Case("curriculum", lambda: CurriculumTemperature(4.0), _divergence(_kl, 4.0)),
    Case("top_k", lambda: TopKSoftTarget(3, 2.0), _top_k),
    Case("universal_logit", UniversalLogit, _universal_logit),
    Case(
        "universal_logit_matched",
        lambda: UniversalLogit([(0, 0), (1, 1), (2, 2)], matched_weight=2.0, unmatched_weight=0.5),
        lambda s, t: _universal_logit(s, t, 3),
    ),
    Case(
        "embedding_cosine",
        EmbeddingDistance,
        lambda s, t: _texts(s, t, lambda a, b: (1 - F.cosine_similarity(a, b)).mean()),
    ),
    Case("embedding_mse", lambda: EmbeddingDistance("mse"), lambda s, t: _texts(s, t, F.mse_loss)),
    Case("embedding_similarity", EmbeddingSimilarity, lambda s, t: _texts(s, t, _similarities), True),
    Case("margin_mse", MarginMSE, _margins),
    Case("listwise_kl", lambda: ListwiseKL(temperature=3.0), _listwise),
    Case("cosent", _cosent_of_others, _cosent, True, zero_when_equal=False),
    Case("hidden_state", lambda: HiddenState("first"), _per_layer(_hidden_mse)),
    Case("embedding", lambda: HiddenState(None, embedding=True), _per_layer(_hidden_mse, range(-1, 0))),
    Case("hidden_and_embedding", lambda: HiddenState(embedding=True), _per_layer(_hidden_mse, range(-1, DEPTH))),
    Case("hidden_cosine", lambda: HiddenStateCosine("first"), _per_layer(_hidden_cosine)),
    Case("patient", lambda: PatientHiddenState("first"), _per_layer(_patient)),
    Case("flow", lambda: Flow("first"), _flow),
    Case("selectivity", lambda: NeuronSelectivity("first"), _per_layer(_selectivity), any_width=True),
    Case("transfer", lambda: AttentionTransfer("first"), _per_layer(_transfer), any_width=True),
    Case(
        "similarity",
        lambda: SimilarityPreserving("first", pooling="mean"),
        _per_layer(_similarity),
        True,
        any_width=True,
    ),
    Case("distance", lambda: RelationalDistance("first"), _per_layer(_distance), True, any_width=True),
    Case("angle", lambda: RelationalAngle("first"), _per_layer(_angle), True, any_width=True),
    Case("contrastive", lambda: Contrastive("first"), _per_layer(_contrastive), True, zero_when_equal=False),
    Case("map_mse", lambda: AttentionMap("first"), lambda s, t: _attention(s, t, _map_mse), any_width=True),
    Case("map_kl", lambda: AttentionMap("first", "kl"), lambda s, t: _attention(s, t, _map_kl), any_width=True),
    Case("minilm2", AttentionRelation, _relation(("qq", "kk", "vv"), 2), any_width=True),
    Case(
        "relation_qk_3_heads",
        lambda: AttentionRelation(("qk",), relation_heads=3),
        _relation(("qk",), 3),
        any_width=True,
    ),
]
