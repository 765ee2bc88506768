"""Language models with a large vocabulary train without their logits, and nobody can tell from the numbers."""

import copy
import os
import socket
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
import transformers
from lightning.pytorch.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule, functional
from lightning_distill.callbacks import TeacherCache
from lightning_distill.functional.terms import Term
from lightning_distill.objectives import (
    Decoupled,
    HardLabel,
    HiddenState,
    LinearSchedule,
    LogitsCosine,
    Loss,
    Objective,
    SoftTarget,
)
from lightning_distill.objectives.schedule import Scheduled
from lightning_distill.signals import head as vocabulary
from lightning_distill.signals.signals import Signals
from tests.helpers.models import SMALL, batch, bert, llama

STILL = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def _with(kind: str, layers: int, **config: Any) -> Any:
    settings = {**SMALL, "num_hidden_layers": layers, "num_key_value_heads": 2, **config}
    return getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**settings))


MODELS = {
    "causal_lm": lambda layers: llama(layers=layers),
    "tied": lambda layers: llama(layers=layers, tie_word_embeddings=True),
    "masked_lm": lambda layers: bert("MaskedLM", layers=layers, **STILL),
    "softcap": lambda layers: _with("Gemma2", layers, final_logit_softcapping=0.5, head_dim=8),
    "multiplied": lambda layers: _with("Cohere", layers, logit_scale=0.3),
    "divided": lambda layers: _with("Granite", layers, logits_scaling=3.0),
}


def objectives() -> list[Objective]:
    return [SoftTarget(2.0, weight=0.7), HardLabel(0.1, weight=0.3), HiddenState(weight=0.2)]


def pair(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return MODELS[kind](3), MODELS[kind](2)


def fit(kind: str, folder: Path, *, words: int, monkeypatch: pytest.MonkeyPatch, **settings: Any) -> dict[str, Any]:
    """Weights and logs of a training in which a vocabulary of more than ``words`` words is large."""
    monkeypatch.setattr(vocabulary, "LARGE", words)
    task = "masked_lm" if kind == "masked_lm" else "causal_lm"
    teacher, student = pair(kind)
    module = DistillationModule(
        teacher, student, settings.pop("objectives", objectives)(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1)
    )
    widths: list[int] = []
    student.get_output_embeddings().register_forward_hook(lambda *args: widths.append(args[2].shape[:-1].numel()))
    run = L.Trainer(
        max_epochs=2,
        logger=False,
        accelerator="cpu",
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        default_root_dir=folder,
        **settings,
    )
    data = DataLoader([batch(task, seed=seed) for seed in range(4)], batch_size=None)
    run.fit(module, data, data)
    return {"weights": student.state_dict(), "logs": run.callback_metrics, "widths": widths}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    assert one["logs"].keys() == two["logs"].keys()
    for kind in ("logs", "weights"):
        for name, value in one[kind].items():
            torch.testing.assert_close(two[kind][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", list(MODELS))
def test_losses_gradients_and_logs_are_those_of_whole_logits(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = fit(kind, tmp_path, words=16_000, monkeypatch=monkeypatch)
    deferred = fit(kind, tmp_path, words=10, monkeypatch=monkeypatch)
    assert {"train_soft_target", "train_hard_label", "train_loss", "val_agreement", "val_perplexity"} <= set(
        whole["logs"]
    )
    assert_same(whole, deferred)
    # The head was asked for one token by the model and for the two losses after it, and never for a batch.
    assert set(deferred["widths"]) == {1}
    assert min(whole["widths"]) > 1


def test_the_cosine_of_logits_that_were_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def both() -> list[Objective]:
        return [LogitsCosine(weight=0.7), HardLabel(weight=0.3)]

    whole = fit("softcap", tmp_path, words=16_000, monkeypatch=monkeypatch, objectives=both)
    deferred = fit("softcap", tmp_path, words=10, monkeypatch=monkeypatch, objectives=both)
    assert "train_logits_cosine" in whole["logs"]
    assert_same(whole, deferred)
    assert set(deferred["widths"]) == {1}


@pytest.mark.parametrize("settings", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}])
def test_accumulation_and_precision(settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fit("causal_lm", tmp_path, words=16_000, monkeypatch=monkeypatch, **settings)
    deferred = fit("causal_lm", tmp_path, words=10, monkeypatch=monkeypatch, **settings)
    if "precision" not in settings:
        return assert_same(whole, deferred)
    for name, value in whole["logs"].items():
        torch.testing.assert_close(deferred["logs"][name], value, rtol=2e-2, atol=2e-3)
    return None


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*sampler.*DistributedSampler.*")
def test_two_processes_keep_their_gradients_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False}
    whole = fit("tied", tmp_path, words=16_000, monkeypatch=monkeypatch, **settings)
    assert_same(whole, fit("tied", tmp_path, words=10, monkeypatch=monkeypatch, **settings))


class _Sharded(DistillationModule):
    """Every layer of both models cut over two processes, the heads apart from the rest."""

    def configure_model(self) -> None:
        mesh = self.device_mesh["data_parallel"]
        for model in (self.student, self.teacher):
            assert isinstance(model, nn.Module)
            layers: Any = model.model.layers  # type: ignore[union-attr]
            for layer in (*layers, model.get_output_embeddings()):  # type: ignore[operator]
                fully_shard(layer, mesh=mesh)
            fully_shard(model, mesh=mesh)


def _rank(rank: int, port: int, folder: Path, words: int) -> None:
    elastic = {"RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": 0, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    elastic |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "TORCHELASTIC_RUN_ID": "test"}
    os.environ |= {name: str(value) for name, value in elastic.items()}
    torch.set_num_threads(1)
    vocabulary.LARGE = words
    teacher, student = pair("causal_lm")
    module = _Sharded(
        teacher, student, [SoftTarget(2.0, weight=0.7), HardLabel(weight=0.3)], optimizer=lambda p: torch.optim.SGD(p)
    )
    run = L.Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy=ModelParallelStrategy(data_parallel_size=2, tensor_parallel_size=1),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        use_distributed_sampler=False,
        log_every_n_steps=1,
    )
    data = DataLoader([batch("causal_lm", seed=10 * rank + seed) for seed in range(3)], batch_size=None)
    run.fit(module, data, data)
    weights = {name: _full(weight) for name, weight in module.student.named_parameters()}
    if rank == 0:
        torch.save((weights, dict(run.callback_metrics)), folder / f"{words}.pt")


def _full(weight: Tensor) -> Tensor:
    return (weight.full_tensor() if isinstance(weight, DTensor) else weight).detach().clone()


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_sharded_heads(tmp_path: Path) -> None:
    for words in (16_000, 10):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        torch.multiprocessing.start_processes(_rank, (port, tmp_path, words), nprocs=2, start_method="fork")
    (whole, logs), (deferred, other_logs) = (torch.load(tmp_path / f"{words}.pt") for words in (16_000, 10))
    start = pair("causal_lm")[1].state_dict()
    assert (whole["lm_head.weight"] - start["lm_head.weight"]).abs().max() > 1e-5
    for name, weight in whole.items():
        torch.testing.assert_close(deferred[name], weight, rtol=1e-5, atol=1e-7)
    for name, value in logs.items():
        torch.testing.assert_close(other_logs[name], value, rtol=1e-5, atol=1e-6)


def test_what_needs_whole_logits_gets_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for made in (
        lambda: [SoftTarget(), Decoupled()],
        lambda: [_OtherForward(), HardLabel()],
        lambda: [SoftTarget(), HardLabel(class_weights=[1.0] * 64)],
    ):
        run = fit("causal_lm", tmp_path, words=10, monkeypatch=monkeypatch, objectives=made)
        assert min(run["widths"]) > 1


class _OtherForward(SoftTarget):
    """Its chunks are no longer what it computes."""

    def forward(self, student: Signals, teacher: Signals) -> Loss:
        loss = super().forward(student, teacher)
        return Loss(2 * loss.values, loss.mask)


class _LogitsSize(Objective):
    """A user's own, of the student's logits alone, whole and chunk by chunk."""

    needs_teacher = False

    def forward(self, student: Signals, teacher: Signals | None = None) -> Loss:
        return Loss(student.logits.square().mean(-1), student.mask)

    def chunked_term(self) -> Term:
        return lambda chunk: (chunk.logits.square().mean(1), lambda: 2 * chunk.logits / chunk.logits.shape[1])


@pytest.mark.parametrize("weight", [0.3, LinearSchedule(0.0, 1.0)], ids=["constant", "scheduled"])
def test_any_objectives_with_a_chunked_form(weight: Scheduled, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def made() -> list[Objective]:
        two = [SoftTarget(1.0, name="sharp", weight=weight), SoftTarget(4.0, "js", name="soft")]
        return [
            *two,
            LogitsCosine(),
            _LogitsSize(weight=0.1, name="logits_size"),
            HardLabel(0.1),
            HardLabel(name="plain", weight=0.2),
        ]

    whole, deferred = (
        fit("softcap", tmp_path, words=words, monkeypatch=monkeypatch, objectives=made, precision="64-true")
        for words in (16_000, 10)
    )
    assert {"train_sharp", "train_soft", "train_logits_size", "train_plain"} <= set(whole["logs"])
    assert_same(whole, deferred)
    assert set(deferred["widths"]) == {1}


def test_a_model_that_changes_its_logits_in_its_own_way_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "LARGE", 10)

    class OddForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            output = super().forward(input_ids, attention_mask, **kwargs)
            output.logits = output.logits + 0.1 * output.logits**2
            return output

    teacher, student = pair("causal_lm")
    odd = OddForCausalLM(student.config)
    with pytest.warns(UserWarning, match="The student change their logits"):
        losses = (module := DistillationModule(teacher, odd)).losses(data := batch("causal_lm"))
    monkeypatch.setattr(vocabulary, "LARGE", 16_000)
    for name, value in DistillationModule(teacher, odd).losses(data).items():
        torch.testing.assert_close(losses[name], value)
    assert module.losses(data)["soft_target"] == losses["soft_target"]


@pytest.mark.parametrize("role", ["student", "teacher", "both"])
def test_a_class_that_reads_the_weight_of_its_head_by_itself_has_whole_logits(
    role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class OwnForCausalLM(transformers.LlamaForCausalLM):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
            hidden = self.model(input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state
            return {"logits": nn.functional.linear(hidden, self.lm_head.weight)}

    def made() -> DistillationModule:
        teacher, student = pair("causal_lm")
        owns = {}
        for name, model in (("teacher", teacher), ("student", student)):
            owns[name] = OwnForCausalLM(model.config) if role in (name, "both") else model
            owns[name].load_state_dict(model.state_dict())
        return DistillationModule(owns["teacher"], owns["student"])

    data = batch("causal_lm")
    whole = made().losses(data)
    monkeypatch.setattr(vocabulary, "LARGE", 10)
    module = made()
    with pytest.warns(UserWarning, match="does not call its last linear layer"):
        losses = module.losses(data)
    for name, value in whole.items():
        torch.testing.assert_close(losses[name], value)
        torch.testing.assert_close(module.losses(data)[name], value)  # without a warning


@pytest.mark.parametrize("objectives", [[HardLabel()], [SoftTarget()], [SoftTarget(), HardLabel()]], ids=len)
@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("padded", ["student", "teacher"])
def test_padding_words_of_either_take_no_part(
    padded: str, cached: bool, objectives: list[Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    sizes = {"student": 1088, "teacher": 1088, padded: 1088 + 64}
    teacher, student = llama(layers=3, vocab_size=sizes["teacher"]), llama(vocab_size=sizes["student"])
    data = batch("causal_lm")
    found = []
    for large in (10**6, 10):
        monkeypatch.setattr(vocabulary, "LARGE", large)
        module = DistillationModule(teacher, student, copy.deepcopy(objectives))
        cache = TeacherCache(tmp_path / "cache", top_k=8, dtype="float32")
        if cached:
            cache.attach(module)
        student.zero_grad()
        losses = module.losses(data)
        module.total_loss(losses).backward()
        weight = student.lm_head.weight.grad
        assert not weight[1088:].any()
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False)
        (scores,) = trainer.validate(module, DataLoader([data], batch_size=None), verbose=False)
        cache.detach()
        found.append(({**losses, **{k: torch.tensor(v) for k, v in scores.items()}}, weight.clone()))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_padded_vocabularies(monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = llama(layers=3, vocab_size=1088 + 64), llama(vocab_size=1088)
    module = DistillationModule(teacher, student)
    data = batch("causal_lm")
    whole = module.losses(data)
    with torch.no_grad():
        logits = [model(**data).logits for model in (student, teacher)]
    mask = data["labels"][:, 1:] != -100
    pair_ = (logits[0][:, :-1], logits[1][:, :-1, :1088])
    expected = functional.soft_target(*pair_, temperature=2.0, mask=mask)
    torch.testing.assert_close(whole["soft_target"], expected)
    monkeypatch.setattr(vocabulary, "LARGE", 10)
    for name, value in module.losses(data).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"same `vocab_size`, but got 1088 and 1151\..*objectives\.UniversalLogit"):
        DistillationModule(llama(vocab_size=1151), llama(vocab_size=1088))
