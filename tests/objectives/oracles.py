"""Values of objectives by code of others: PyTorch's own losses, or a paper's formula in loops over what counts."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_distill.signals.signals import Signals

DEPTH = 2


def items(signals: Signals) -> Tensor:
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


def per_layer(
    oracle: Callable[[list[tuple[Tensor, Tensor]]], Tensor], layers: range = range(DEPTH)
) -> Callable[..., Tensor]:
    return lambda student, teacher: _mean([oracle(_rows(student, teacher, layer)) for layer in layers])


def kl(p: Tensor, q: Tensor) -> Tensor:
    """PyTorch's own KL(p || q), per item."""
    return F.kl_div(q.log(), p, reduction="none").sum(-1)


def divergence(formula: Callable[[Tensor, Tensor], Tensor], temperature: float) -> Callable[..., Tensor]:
    def oracle(student: Signals, teacher: Signals) -> Tensor:
        q, p = (torch.softmax(x.logits[items(student)] / temperature, -1) for x in (student, teacher))
        return temperature**2 * formula(p, q).mean()

    return oracle


def adaptive(p: Tensor, q: Tensor) -> Tensor:
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
        values.append(share * kl(of_teacher, of_student) + (1 - share) * kl(of_student, of_teacher))
    return torch.stack(values)


def decoupled(student: Signals, teacher: Signals, temperature: float = 3.0) -> Tensor:
    values = []
    for s, t, label in zip(*(x[items(student)] for x in (student.logits, teacher.logits, student.labels)), strict=True):
        q, p = torch.softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
        others = torch.arange(len(q)) != label
        target = kl(torch.stack([p[label], p[others].sum()]), torch.stack([q[label], q[others].sum()]))
        values.append(target + 8 * kl(p[others] / p[others].sum(), q[others] / q[others].sum()))
    return temperature**2 * _mean(values)


def correlation(student: Signals, teacher: Signals, temperature: float = 4.0) -> Tensor:
    """PyTorch's own correlation coefficients, of rows and of columns."""
    q, p = (torch.softmax(x.logits[items(student)] / temperature, -1) for x in (student, teacher))
    between, within = (
        _mean([1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(*both, strict=True)])
        for both in ((q, p), (q.T, p.T))
    )
    return temperature**2 * (2 * between + 3 * within)


def _z_scores(signals: Signals) -> Signals:
    deviation, mean = torch.std_mean(signals.logits, -1, keepdim=True)
    return replace(signals, logits=(signals.logits - mean) / deviation)


def standardized(oracle: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda student, teacher: oracle(_z_scores(student), _z_scores(teacher))


def top_k(student: Signals, teacher: Signals, k: int = 3, temperature: float = 2.0) -> Tensor:
    values = []
    for s, t in zip(student.logits[items(student)], teacher.logits[items(student)], strict=True):
        q, p = torch.softmax(s / temperature, -1), torch.softmax(t / temperature, -1)
        best = p.argsort(descending=True)
        p, q = (torch.cat([x[best[:k]], x[best[k:]].sum(0, keepdim=True)]) for x in (p, q))
        values.append(kl(p, q))
    return temperature**2 * _mean(values)


def universal_logit(student: Signals, teacher: Signals, matched: int = 0) -> Tensor:
    """The first words matched, with weight 2, and the others sorted, with weight 0.5 (of all: 1)."""
    values = []
    for s, t in zip(student.logits[items(student)], teacher.logits[items(student)], strict=True):
        q, p = torch.softmax(s, -1), torch.softmax(t, -1)
        rest = F.l1_loss(q[matched:].sort().values, p[matched:].sort().values, reduction="sum")
        values.append(2 * (q - p)[:matched].abs().sum() + 0.5 * rest if matched else rest)
    return _mean(values)


def hard_label(student: Signals, teacher: Signals) -> Tensor:
    return F.cross_entropy(student.logits.transpose(1, 2), student.labels, label_smoothing=0.1)


def hidden_mse(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    s, t = (torch.cat(x) for x in zip(*rows, strict=True))
    return F.mse_loss(s, t)


def hidden_cosine(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    s, t = (torch.cat(x) for x in zip(*rows, strict=True))
    return F.cosine_embedding_loss(s, t, s.new_ones(len(s)))


def patient(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    return _mean([(s[0] / s[0].norm() - t[0] / t[0].norm()).norm() ** 2 for s, t in rows])


def flow(student: Signals, teacher: Signals) -> Tensor:
    values = []
    for (s1, t1), (s2, t2) in zip(_rows(student, teacher, 0), _rows(student, teacher, 1), strict=True):
        student_gram = torch.einsum("ni,nj->ij", s1, s2) / len(s1)
        teacher_gram = torch.einsum("ni,nj->ij", t1, t2) / len(t1)
        values.append(F.mse_loss(student_gram, teacher_gram))
    return _mean(values)


def selectivity(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return torch.stack([(x @ y) ** 2 for x in a for y in b]).mean()

    values = []
    for s, t in rows:
        a, b = (torch.stack([neuron / neuron.norm() for neuron in x.T]) for x in (s, t))
        values.append(kernel(a, a) + kernel(b, b) - 2 * kernel(a, b))
    return _mean(values)


def transfer(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    values = []
    for s, t in rows:
        a, b = (x.pow(2).sum(1) for x in (s, t))
        values.append(F.mse_loss(a / a.norm(), b / b.norm()))
    return _mean(values)


def _pooled(rows: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    s, t = zip(*((s.mean(0), t.mean(0)) for s, t in rows), strict=True)
    return torch.stack(s), torch.stack(t)


def similarity(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    grams = []
    for x in _pooled(rows):
        gram = x @ x.T
        grams.append(torch.stack([row / row.norm() for row in gram]))
    return (grams[0] - grams[1]).norm() ** 2 / len(rows) ** 2


def distance(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    n = len(rows)
    scaled = []
    for x in _pooled(rows):
        distances = [[(x[i] - x[j]).norm() if i != j else x.new_zeros(()) for j in range(n)] for i in range(n)]
        matrix = torch.stack([torch.stack(row) for row in distances])
        scaled.append(matrix / (matrix.sum() / (n * (n - 1))))
    return F.smooth_l1_loss(*scaled)


def angle(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
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


def contrastive(rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    s, t = _pooled(rows)
    similarity = F.cosine_similarity(s[:, None], t[None], dim=-1) / 0.1
    return -similarity.log_softmax(-1).diagonal().mean()


def texts(student: Signals, teacher: Signals, distance: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return distance(*(x.logits[items(student)] for x in (student, teacher)))


def similarities(student: Tensor, teacher: Tensor) -> Tensor:
    return F.mse_loss(*(F.cosine_similarity(x[:, None], x[None], dim=-1) for x in (student, teacher)))


def _candidates(student: Signals, teacher: Signals) -> list[list[list[Tensor]]]:
    """Inner products of the query and each candidate there is, of both models, for each row that has a query."""
    found = []
    for s, t, there in zip(student.logits, teacher.logits, items(student), strict=True):
        places = [i for i in range(1, len(there)) if there[0] and there[i]]
        found.append([[x[0] @ x[i] for i in places] for x in (s, t)])
    return found


def margins(student: Signals, teacher: Signals) -> Tensor:
    values = []
    for (s, t), there in zip(_candidates(student, teacher), items(student), strict=True):
        if there[1] and len(s) > 1:
            values += [((s[0] - a) - (t[0] - b)) ** 2 for a, b in zip(s[1:], t[1:], strict=True)]
    return _mean(values) if values else 0 * student.logits.sum()


def listwise(student: Signals, teacher: Signals) -> Tensor:
    rows = [(torch.stack(s), torch.stack(t)) for s, t in _candidates(student, teacher) if len(s) > 1]
    return _mean([9 * kl(torch.softmax(t / 3, -1), torch.softmax(s / 3, -1)) for s, t in rows])


def cosent(student: Signals, teacher: Signals) -> Tensor:
    scored = [
        (F.cosine_similarity(row[0], row[i], dim=0), labels[i])
        for row, labels, there in zip(student.logits, student.labels, items(student), strict=True)  # type: ignore[arg-type]
        for i in range(1, len(there))
        if there[0] and there[i]
    ]
    wrong = [torch.exp(20 * (a - b)) for a, low in scored for b, high in scored if low < high]
    return torch.log(1 + sum(wrong, student.logits.new_zeros(())))


def attention(student: Signals, teacher: Signals, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
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


def map_mse(s: Tensor, t: Tensor) -> Tensor:
    if s.shape[0] != t.shape[0]:
        s, t = s.mean(0, keepdim=True), t.mean(0, keepdim=True)
    return (s - t).square().mean((0, 2))


def map_kl(s: Tensor, t: Tensor) -> Tensor:
    if s.shape[0] != t.shape[0]:
        s, t = s.mean(0, keepdim=True), t.mean(0, keepdim=True)
    return kl(t, s).mean(0)


def relation(kinds: tuple[str, ...], heads: int) -> Callable[..., Tensor]:
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
                values.append(kl(relations[1], relations[0]).mean(0))
            total = total + torch.cat(values).mean()
        return total

    return oracle
