"""On-policy distillation: whose text, which loss; resuming and two processes change nothing."""

import importlib
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor

from lightning_distill import DistillationModule
from lightning_distill.data import Document, LanguageModelData, PackedText, train_causal_tokenizer
from lightning_distill.generation import OnPolicyDistillation, generate
from lightning_distill.objectives import AttentionRelation, HardLabel, HiddenState, SoftTarget
from tests.helpers.models import llama

TOKENIZER = train_causal_tokenizer(["text"], vocab_size=262)


class Data(LanguageModelData):
    """Packed documents of random tokens."""

    def __init__(self, batch_size: int = 2) -> None:
        super().__init__(tokenizer=TOKENIZER, max_length=24, batch_size=batch_size)
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(4, 20, (24,), generator=generator).tolist()
        self.rows = [Document([1, *torch.randint(3, 64, (n,), generator=generator).tolist()]) for n in lengths]

    def setup(self, stage: str | None = None) -> None:
        for split in ("train", "val", "test"):
            self._datasets[split] = PackedText(self.rows, self.max_length, 0)


class Watch(L.Callback):
    """Writes down, of every step, whether it was on-policy, and the mode of the student."""

    def __init__(self) -> None:
        self.on_policy: list[float] = []
        self.training: set[bool] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.on_policy.append(float(trainer.callback_metrics["train_on_policy"]))
        self.training |= {module.training for module in pl_module.student.modules()}


def module(objectives: Any = None, **arguments: Any) -> OnPolicyDistillation:
    torch.manual_seed(0)
    teacher, student = llama(layers=3), llama(attention_dropout=0.2)
    objectives = objectives or [SoftTarget(1.0, "js", beta=0.7), HardLabel(weight=0.5)]
    settings = {"on_policy": 0.5, "prompt_length": 3, "max_new_tokens": 6, **arguments}
    return OnPolicyDistillation(
        teacher, student, objectives, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **settings
    )


def fit(made: Any, folder: Path, *callbacks: L.Callback, ckpt_path: Any = None, **arguments: Any) -> L.Trainer:
    settings: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "max_epochs": 2,
        "limit_train_batches": 4,
        "limit_val_batches": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "default_root_dir": folder,
        "log_every_n_steps": 1,
        **arguments,
    }
    if not callbacks:
        settings["enable_checkpointing"] = False
    trainer = L.Trainer(**settings, callbacks=list(callbacks))
    L.seed_everything(1, verbose=False)
    trainer.fit(made, datamodule=Data(), ckpt_path=ckpt_path, weights_only=True)
    return trainer


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_that_share_of_the_batches_is_the_students_and_it_is_in_train_mode(share: float, tmp_path: Path) -> None:
    watch = Watch()
    fit(module(on_policy=share), tmp_path, watch, max_epochs=3, enable_checkpointing=False)
    assert watch.training == {True}
    mean = sum(watch.on_policy) / len(watch.on_policy)
    assert mean == share if share in (0.0, 1.0) else 0.2 < mean < 0.8
    assert len(watch.on_policy) == 12


def test_without_on_policy_batches_it_is_the_module_it_extends(tmp_path: Path) -> None:
    one = module(on_policy=0.0)
    objectives = [SoftTarget(1.0, "js", beta=0.7), HardLabel(weight=0.5)]
    torch.manual_seed(0)
    teacher, student = llama(layers=3), llama(attention_dropout=0.2)
    other = DistillationModule(teacher, student, objectives, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
    for made in (one, other):
        fit(made, tmp_path)
    for name, value in one.state_dict().items():
        assert torch.equal(value, other.state_dict()[name])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft's own
def test_a_peft_student_trains_its_adapter_on_its_own_text(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    teacher, base = llama(layers=3), llama()
    frozen = {name: value.clone() for name, value in base.state_dict().items()}
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    student = peft.get_peft_model(base, lora)
    objectives = [SoftTarget(1.0, "reverse_kl")]
    made = OnPolicyDistillation(teacher, student, objectives, on_policy=1.0, prompt_length=3, max_new_tokens=6)
    fit(made, tmp_path, max_epochs=1)
    after = student.state_dict()
    assert any(bool(value.any()) for name, value in after.items() if "lora_B" in name)
    merged = student.merge_and_unload().state_dict()
    assert {name for name in frozen if not torch.equal(frozen[name], merged[name])} == {
        f"model.layers.{layer}.self_attn.{name}_proj.weight" for layer in (0, 1) for name in "qv"
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("divergence", "beta"), [("forward_kl", 0.0), ("js", 0.3), ("reverse_kl", 1.0)])
def test_the_loss_on_the_students_text_is_that_of_trl_with_prompts_masked(divergence: Any, beta: float) -> None:
    try:
        trl = importlib.import_module("trl.experimental.gkd.gkd_trainer").GKDTrainer
    except Exception as error:
        pytest.skip(f"needs `trl` of benchmarks/requirements.txt: {error}")
    made = module([SoftTarget(1.0, divergence, beta=beta if divergence == "js" else 0.5)]).eval()
    batch = next(iter(_loader()))
    written = made.write(batch, seed=3)
    inputs = {name: written[name] for name in ("input_ids", "attention_mask", "position_ids")}
    with torch.no_grad():
        logits = [model(**inputs, use_cache=False).logits[:, :-1] for model in (made.student, made.teacher)]
    theirs = trl.generalized_jsd_loss(*logits, labels=written["labels"][:, 1:], beta=beta, temperature=1.0)
    ours = made.losses(written)["soft_target"]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    # It is the mean over written tokens alone.
    assert int((written["labels"] != -100).sum()) < int(written["attention_mask"].sum())
    assert torch.equal(made.write(batch, seed=3)["input_ids"], written["input_ids"])


def _loader() -> Any:
    data = Data()
    data.setup()
    return data.train_dataloader()


def test_labels_of_its_own_text_are_not_learned() -> None:
    losses = {"soft_target": torch.tensor(2.0), "hard_label": torch.tensor(4.0)}
    made = module()
    assert made.total_loss(losses) == 4.0
    made._written = True
    assert made.total_loss(losses) == 2.0


class Kill(L.Callback):
    """Kills the process before a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def every_step(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("step", [2, 5])
def test_a_run_killed_and_resumed_equals_the_run_without_a_break(step: int, tmp_path: Path) -> None:
    def made() -> OnPolicyDistillation:
        # Without dropout: its masks come from the global generator, which a killed process takes with it.
        found = module()
        for layer in found.student.model.layers:
            layer.self_attn.attention_dropout = 0.0
        return found

    whole, resumed = Watch(), Watch()
    fit(made(), tmp_path / "whole", every_step(tmp_path / "whole"), whole)
    folder = tmp_path / "broken"
    process = multiprocessing.get_context("fork").Process(
        target=fit, args=(made(), folder, every_step(folder), Kill(step))
    )
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    fit(made(), tmp_path / "on", every_step(tmp_path / "on"), resumed, ckpt_path=folder / f"step={step}.ckpt")
    assert resumed.on_policy == whole.on_policy[step:]
    assert {0.0, 1.0} == set(whole.on_policy)
    last = [torch.load(tmp_path / run / "step=8.ckpt", weights_only=True) for run in ("whole", "on")]
    for name, value in last[0]["state_dict"].items():
        assert torch.equal(value, last[1]["state_dict"][name]), name


class Texts(OnPolicyDistillation):
    """Keeps what each rank wrote and which batches that were."""

    def write(self, batch: Any, seed: int) -> dict[str, Tensor]:
        written = super().write(batch, seed)
        name = f"{self.global_rank} of {self.trainer.world_size}, {self.current_epoch}, {self.global_step}.pt"
        torch.save(written, Path(self.trainer.default_root_dir) / name)
        return written


@pytest.mark.forks
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_two_processes_write_at_the_same_steps_different_text_and_stay_together(tmp_path: Path) -> None:
    torch.manual_seed(0)
    made = Texts(
        llama(layers=3), llama(), [SoftTarget(1.0)], on_policy=0.5, prompt_length=3, max_new_tokens=6,
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1),
    )  # fmt: skip
    fit(made, tmp_path, devices=2, strategy="ddp_fork")
    files = sorted(path.name for path in tmp_path.glob("*.pt"))
    steps = [{name.partition(", ")[2] for name in files if name[0] == rank} for rank in "01"]
    assert steps[0] == steps[1]
    assert 1 <= len(steps[0]) < 8
    texts = [[torch.load(tmp_path / f"{rank} of 2, {step}")["labels"] for step in sorted(steps[0])] for rank in (0, 1)]
    assert not any(torch.equal(a, b) for a, b in zip(*texts, strict=True))


def test_accumulated_on_policy_batches_train_with_objectives_on_layers_too(tmp_path: Path) -> None:
    made = module([SoftTarget(1.0), HiddenState(weight=0.1), AttentionRelation(weight=0.1)], on_policy=1.0)
    start = {name: value.clone() for name, value in made.state_dict().items()}
    fit(made, tmp_path, accumulate_grad_batches=2)
    assert made.global_step == 4
    assert all(bool(torch.isfinite(value).all()) for value in made.state_dict().values())
    assert any(not torch.equal(value, start[name]) for name, value in made.state_dict().items())


def test_it_learns_its_teacher_by_its_own_text(tmp_path: Path) -> None:
    made = module([SoftTarget(1.0, "reverse_kl")], on_policy=1.0)
    made._optimizer = lambda p: torch.optim.AdamW(p, lr=1e-2)
    batch = made.write(next(iter(_loader())), seed=11)
    before = made.eval().losses(batch)["soft_target"]
    made.train()
    fit(made, tmp_path, max_epochs=12)
    assert made.eval().losses(batch)["soft_target"] < 0.8 * before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"on_policy": 1.5}, "`on_policy`"),
        ({"prompt_length": 0}, "`prompt_length`"),
        ({"max_new_tokens": 40}, "32 positions"),
        ({"sampling_temperature": 0.0}, "`temperature`"),
        ({"top_p": 2.0}, "`top_p`"),
        ({"objectives": [HardLabel()]}, "`objectives` to have one that reads the teacher"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        module(**arguments)


def test_vocabularies_that_differ_and_rows_that_are_too_long(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"same `vocab_size`.*objectives\.UniversalLogit"):
        OnPolicyDistillation(llama(vocab_size=65), llama())
    short = OnPolicyDistillation(
        llama(max_position_embeddings=8), llama(max_position_embeddings=8), prompt_length=2, max_new_tokens=2
    )
    with pytest.raises(ValueError, match="to fit into the 8 positions of the models"):
        fit(short, tmp_path)


@pytest.mark.filterwarnings("ignore:A batch of the train data has no label")
def test_data_in_which_every_label_is_masked_are_refused(tmp_path: Path) -> None:
    class Masked(Data):
        def __init__(self) -> None:
            super().__init__()
            self.rows = [Document(row.ids, len(row.ids)) for row in self.rows]

    with pytest.raises(ValueError, match="label"):
        L.Trainer(
            accelerator="cpu", logger=False, enable_checkpointing=False, max_epochs=1, default_root_dir=tmp_path,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0,
        ).fit(module(on_policy=0.0), datamodule=Masked())  # fmt: skip


def test_its_arguments_are_in_its_checkpoint(tmp_path: Path) -> None:
    for name, layers in (("teacher", 3), ("student", 2)):
        llama(layers=layers).save_pretrained(tmp_path / name)
    made = OnPolicyDistillation(
        str(tmp_path / "teacher"),
        str(tmp_path / "student"),
        on_policy=0.25,
        prompt_length=3,
        max_new_tokens=7,
        top_p=0.9,
    )
    trainer = L.Trainer(logger=False, accelerator="cpu", barebones=False, enable_checkpointing=False)
    trainer.strategy.connect(made)
    trainer.save_checkpoint(tmp_path / "module.ckpt")
    again = OnPolicyDistillation.load_from_checkpoint(tmp_path / "module.ckpt", weights_only=True)
    assert (again.on_policy, again.prompt_length, again.sampling) == (0.25, 3, made.sampling)
    for name, value in made.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])


def test_a_student_does_not_write_words_that_its_teacher_does_not_have() -> None:
    torch.manual_seed(0)
    teacher, student = llama(vocab_size=1088), llama(vocab_size=1536)
    made = OnPolicyDistillation(teacher, student, on_policy=1.0, prompt_length=2, max_new_tokens=12)
    batch = {"input_ids": torch.tensor([[1, 5, 6, 7]] * 8)}
    written = made.write(batch, seed=0)
    assert int(written["input_ids"].max()) < 1088
    assert made.losses(written)["soft_target"].isfinite()
    # Without the bound it would: a third of the words are padding.
    assert int(generate(student, [[1, 5]] * 8, max_new_tokens=12, seed=0)["input_ids"].max()) >= 1088
