"""Sentence embeddings: pooling as sentence-transformers has it, rows of several texts, and what is refused."""

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule, functional, student_from_teacher
from lightning_distill.callbacks import EarlyExit, TeacherCache
from lightning_distill.models.embedding import EmbeddingModel, pool
from lightning_distill.models.pretrained import export, load_pretrained
from lightning_distill.objectives import (
    CoSENT,
    EmbeddingDistance,
    EmbeddingSimilarity,
    HardLabel,
    HiddenState,
    ListwiseKL,
    LogitsMSE,
    MarginMSE,
    SoftTarget,
)
from tests.helpers.models import SMALL, embedder, texts, tokens

POOLINGS = ("mean", "cls", "max", "lasttoken")


def trainer(**options: Any) -> L.Trainer:
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "log_every_n_steps": 1, "max_epochs": 1}
    return L.Trainer(accelerator="cpu", **(quiet | options))


# -- sentence-transformers is the oracle -------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("left", [False, True])
def test_pooling_is_that_of_sentence_transformers(pooling: Any, left: bool) -> None:
    modules = pytest.importorskip("sentence_transformers.sentence_transformer.modules")
    torch.manual_seed(0)
    states, mask = torch.randn(4, 8, 6), tokens()["attention_mask"]
    mask = mask.flip(1) if left else mask
    expected = modules.Pooling(6, pooling)({"token_embeddings": states, "attention_mask": mask})["sentence_embedding"]
    torch.testing.assert_close(pool(states, mask, pooling), expected)


def test_losses_are_those_of_sentence_transformers() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 4, 6), torch.randn(5, 4, 6)
    scores = functional.candidate_scores(teacher, "dot")
    columns = list(student.unbind(1))
    embedded: Any = nn.Identity()
    ours = functional.candidate_scores(student, "dot")
    found = losses.MarginMSELoss(embedded).compute_loss_from_embeddings(columns, scores)
    torch.testing.assert_close(functional.margin_mse(ours, scores), found)
    found = losses.DistillKLDivLoss(embedded, temperature=2.0).compute_loss_from_embeddings(columns, scores)
    torch.testing.assert_close(functional.listwise_kl(ours, scores, temperature=2.0), found)
    for distance in ("cosine", "mse"):
        loss = losses.EmbedDistillLoss(embedded, distance_metric=distance)
        found = loss.compute_loss_from_embeddings(columns, list(teacher.unbind(1)))
        measure = functional.logits_cosine if distance == "cosine" else functional.logits_mse
        torch.testing.assert_close(measure(student, teacher), found)
    labels = torch.tensor([0.1, 0.5, 0.5, 0.9, 0.0])
    cosines = functional.candidate_scores(student[:, :2])
    found = losses.CoSENTLoss(embedded).compute_loss_from_embeddings(columns[:2], labels)
    torch.testing.assert_close(functional.cosent(cosines, labels[:, None]), found)
    found = losses.CosineSimilarityLoss(embedded).compute_loss_from_embeddings(columns[:2], labels)
    torch.testing.assert_close(F.mse_loss(cosines[:, 0], labels), found)


@pytest.mark.parametrize("normalize", [True, False])
def test_an_export_is_read_by_auto_model_and_sentence_transformers(tmp_path: Path, normalize: bool) -> None:
    model: Any = EmbeddingModel.of(embedder(), pooling="max", normalize=normalize, max_length=16).eval()
    folder = export(model, tmp_path / "model")
    batch = tokens()
    expected = model(**batch)
    again: Any = load_pretrained(str(folder)).eval()
    assert isinstance(again, EmbeddingModel)
    assert again.config.sentence_embedding == model.config.sentence_embedding
    assert torch.equal(again(**batch).logits, expected.logits)
    encoder = transformers.AutoModel.from_pretrained(folder).eval()
    assert type(encoder) is transformers.BertModel
    assert torch.equal(encoder(**batch).last_hidden_state, expected.last_hidden_state)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied) is type(model)
        assert torch.equal(copied(**batch).logits, expected.logits)


def test_a_model_of_sentence_transformers_gives_the_same_vectors() -> None:
    sentence_transformers = pytest.importorskip("sentence_transformers")
    folder = Path(__file__).parents[2] / ".." / "shared" / "models" / "minilm-l6"
    if not folder.exists():
        pytest.skip("needs ../shared/models/minilm-l6")
    sentences = ["A man plays a guitar.", "A cat sits on a long, long wall, and looks down.", "No."]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    batch = tokenizer(sentences, return_tensors="pt", padding="longest")
    model: Any = load_pretrained(str(folder)).eval()
    expected = torch.tensor(sentence_transformers.SentenceTransformer(str(folder), device="cpu").encode(sentences))
    with torch.no_grad():
        torch.testing.assert_close(model(**batch).logits, expected, atol=1e-6, rtol=1e-5)


# -- rows of several texts ---------------------------------------------------------------------------------------------


def test_rows_of_several_texts_are_texts() -> None:
    model, batch = embedder().eval(), texts(several=3)
    flat = {name: batch[name].flatten(0, 1) for name in ("input_ids", "attention_mask")}
    together = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    torch.testing.assert_close(together, model(**flat).logits.view(4, 3, -1))
    assert model(inputs_embeds=torch.randn(2, 5, 16)).logits.shape == (2, 16)


def test_a_candidate_that_is_all_padding_is_none() -> None:
    batch = texts(several=4)
    batch["attention_mask"][1, 3] = 0
    teacher, student = embedder(layers=3), embedder()
    objectives = [SoftTarget(), HardLabel(), EmbeddingSimilarity(), MarginMSE(), ListwiseKL(), CoSENT(), LogitsMSE()]
    module = DistillationModule(teacher, student, objectives).eval()
    ours, _ = module.signals(batch, with_teacher=True)
    assert not ours.logits[1, 3].any()
    assert ours.logits.isfinite().all()
    found = module.losses(batch)
    torch.stack(list(found.values())).sum().backward()
    assert all(p.grad.isfinite().all() for p in student.parameters() if p.grad is not None)
    cosines = F.cosine_similarity(ours.logits[:, :1], ours.logits[:, 1:], dim=-1)
    there = batch["attention_mask"].any(-1)[:, 1:]
    torch.testing.assert_close(found["hard_label"], F.mse_loss(cosines[there], batch["labels"][there]))
    changed = {**batch, "labels": batch["labels"].masked_fill(~there, 0.9), "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][1, 3] = 7
    for name, loss in module.losses(changed).items():
        torch.testing.assert_close(loss, found[name], msg=lambda text, name=name: f"{name}: {text}")


def test_accumulated_batches_train_as_one() -> None:
    whole = texts(6, 3)
    halves = [{name: x[rows] for name, x in whole.items()} for rows in (slice(0, 2), slice(2, 6))]
    weights = []
    for batches, steps in (([whole], 1), (halves, 2)):
        torch.manual_seed(0)
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        student = embedder(**off)
        objectives = [
            SoftTarget(),
            HardLabel(),
            MarginMSE(),
            ListwiseKL(),
            EmbeddingDistance("mse"),
            HiddenState("last"),
        ]
        module = DistillationModule(
            embedder(layers=3, **off), student, objectives, optimizer=lambda p: torch.optim.SGD(p, 0.1)
        )
        trainer(accumulate_grad_batches=steps).fit(module, DataLoader(batches, batch_size=None))
        weights.append(student.encoder.layer[0].output.dense.weight)
    torch.testing.assert_close(*weights)


def test_texts_alone_are_learned_from_a_teacher_of_another_width(tmp_path: Path) -> None:
    torch.manual_seed(0)
    teacher = embedder(layers=3, num_attention_heads=4)
    student: Any = student_from_teacher(teacher, num_layers=2, width=0.5)
    assert (student.embedding_width, teacher.embedding_width) == (8, 16)
    assert not any(p.requires_grad for p in student.pooler.parameters())
    with pytest.raises(
        ValueError, match=r"one width for the objectives \['soft_target'\], but got 8 and 16.*EmbeddingD"
    ):
        DistillationModule(teacher, student, [SoftTarget()])
    with pytest.raises(ValueError, match=r"`projection` .* to be left out or True, as the embeddings .* 8 .* 16"):
        DistillationModule(teacher, student, [EmbeddingDistance(projection=False)])
    module = DistillationModule(teacher, student, [EmbeddingDistance(), EmbeddingSimilarity()])
    assert [p.shape for p in module.objectives["embedding_distance"].parameters()] == [(16, 8), (16,)]
    loader = DataLoader([tokens(seed=seed) for seed in range(3)], batch_size=None)
    run = trainer()
    run.fit(module, loader, loader)
    above = torch.ones(4, 4).triu(1) > 0
    cosines = [
        torch.cat([(model(**rows).logits @ model(**rows).logits.T)[above] for rows in loader])
        for model in (student.eval(), teacher.eval())
    ]
    expected = torch.corrcoef(torch.stack(cosines))[0, 1]
    torch.testing.assert_close(run.callback_metrics["val_agreement"], expected, atol=1e-4, rtol=1e-4)


def test_a_cache_answers_for_pairs_however_they_are_padded(tmp_path: Path) -> None:
    batches = [texts(seed=seed) for seed in range(3)]
    longer = [{name: x if name == "labels" else F.pad(x, (0, 3)) for name, x in batch.items()} for batch in batches]
    teacher = embedder(layers=3)
    found = []
    for data in (batches, longer):
        cache = TeacherCache(str(tmp_path / "cache"), dtype="float32")
        run = trainer(callbacks=[cache])
        run.fit(DistillationModule(teacher, embedder(), [SoftTarget()]), DataLoader(data, batch_size=None))
        found.append(cache)
    assert (found[0].misses, found[1].misses, found[1].hits) == (12, 0, 12)
    run = trainer(callbacks=[TeacherCache(str(tmp_path / "other"), signals=["logits", "hidden_states"])])
    with pytest.raises(ValueError, match="hidden states by row, but got rows of 2 texts"):
        run.fit(DistillationModule(teacher, embedder(), [HiddenState("last")]), DataLoader(batches, batch_size=None))


@pytest.mark.filterwarnings("ignore:The .*_dataloader' does not have many workers")
def test_the_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    guide = Path(__file__).resolve().parents[2] / "docs" / "embeddings.md"
    snippets = re.findall(r"^```python\n(.*?)^```", guide.read_text(), flags=re.MULTILINE | re.DOTALL)
    names: dict[str, Any] = {"__name__": "guide"}
    for snippet in snippets:
        exec(compile(snippet, guide.name, "exec"), names)
    assert len(snippets) == 3
    assert isinstance(load_pretrained("student"), EmbeddingModel)


# -- what is refused ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda b: b["labels"].mul_(5), r"scores of .* to be in \[-1, 1\].*by 5 where"),
        (lambda b: b["labels"].__setitem__(2, float("nan")), r"to be finite, but got nan|in \[-1, 1\]"),
        (lambda b: b["attention_mask"].__setitem__((2, 1), 0), "one of row 2 is all padding"),
        (lambda b: b.update(labels=torch.rand(3)), r"a score for each pair of texts.*shape \[3\]"),
        (lambda b: b.update(tokens()), r"a score for each pair.*Leave labels out where a row is one text"),
    ],
)
def test_bad_batches_are_refused(change: Any, message: str) -> None:
    batch = texts()
    change(batch)
    with pytest.raises(ValueError, match=message):
        trainer().fit(DistillationModule(embedder(layers=3), embedder()), DataLoader([batch], batch_size=None))


def test_models_that_cannot_are_refused() -> None:
    config = transformers.BertConfig(**SMALL, num_hidden_layers=1)
    with pytest.raises(ValueError, match=r"without head and decoder .* BertForMaskedLM"):
        EmbeddingModel.of(transformers.BertForMaskedLM(config))
    with pytest.raises(ValueError, match=r"`pooling` to be one of .* 'median'"):
        EmbeddingModel.of(transformers.BertModel(config), pooling="median")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"EmbeddingModel\.of"):
        DistillationModule(embedder(), transformers.BertModel(config), task="sentence_embedding")
    with pytest.raises(ValueError, match="do not leave early"):
        trainer(callbacks=[EarlyExit()]).fit(
            DistillationModule(embedder(layers=3), embedder()), DataLoader([texts()], batch_size=None)
        )


def test_a_reranker_is_scored_by_its_logits() -> None:
    class Reranker(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = nn.Sequential(nn.Embedding(64, 4), nn.Flatten(2), nn.Linear(32, 1))

        def forward(self, input_ids: Tensor) -> Tensor:
            scores: Tensor = self.model(input_ids).squeeze(-1)
            return scores

    teacher, student = Reranker(), Reranker()
    batch = texts(several=3)
    ids = batch["input_ids"]
    module = DistillationModule(teacher, student, [MarginMSE(), ListwiseKL()], task="regression")
    found = module.losses({"input_ids": ids})
    s, t = student(ids), teacher(ids)
    torch.testing.assert_close(found["margin_mse"], F.mse_loss(s[:, :1] - s[:, 1:], t[:, :1] - t[:, 1:]))
    torch.testing.assert_close(found["listwise_kl"], F.kl_div(s.log_softmax(-1), t.softmax(-1), reduction="batchmean"))
    of_labels = DistillationModule(None, embedder(), [MarginMSE(of_labels=True)]).eval()
    logits = of_labels.student(**{k: v for k, v in batch.items() if k != "labels"}).logits
    scores = functional.candidate_scores(logits, "dot")
    margins = (scores[:, :1] - scores[:, 1:], batch["labels"][:, :1] - batch["labels"][:, 1:])
    torch.testing.assert_close(of_labels.losses(batch)["margin_mse"], F.mse_loss(*margins))
