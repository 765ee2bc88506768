"""What holds under each precision of the Trainer, and under each precision of the teacher."""

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any, get_args

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, MixedPrecision
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_distill import DistillationModule
from lightning_distill.callbacks import GradientClipping
from lightning_distill.objectives import AttentionMap, AttentionRelation, HardLabel, HiddenState, SoftTarget
from lightning_distill.teachers.precision import TeacherPrecision, cpu_capabilities, emulates_bf16
from tests.helpers.models import batch, bert, llama
from tests.objectives.registry import CASES, Case, changed, signals

TRAINER = ["32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true"]
TEACHER = list(get_args(TeacherPrecision))
DTYPES = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device, and there is none here")


def trainer(folder: Path, precision: str = "32-true", **settings: Any) -> L.Trainer:
    scale = settings.pop("scale", 256.0)
    if precision == "16-mixed":
        # As a plugin, because the Trainer turns the flag into bf16-mixed on a CPU.
        settings["plugins"] = MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    else:
        settings["precision"] = precision
    defaults: dict[str, Any] = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    defaults |= {"enable_progress_bar": False, "enable_model_summary": False, "default_root_dir": folder}
    return L.Trainer(**{**defaults, "log_every_n_steps": 1, **settings})


def loader(task: str = "classification", batches: int = 4) -> DataLoader[Any]:
    return DataLoader([batch(task, classes=3, seed=i) for i in range(batches)], batch_size=None)


def still(layers: int = 2, **config: Any) -> nn.Module:
    """A tiny BERT without dropout."""
    rest = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return bert(num_labels=3, layers=layers, **rest, **config)


def pair(task: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return (llama(layers=3), llama()) if task == "causal_lm" else (still(3), still())


def distance(one: nn.Module, other: nn.Module) -> float:
    differences = [(a.double() - b.double()).norm() for a, b in zip(one.parameters(), other.parameters(), strict=True)]
    return torch.stack(differences).norm().item()


@pytest.mark.parametrize("precision", TRAINER)
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_every_precision_trains_as_float32_does(task: str, precision: str, tmp_path: Path) -> None:
    students = []
    for used in ("32-true", precision):
        teacher, student = pair(task)
        objectives = [SoftTarget(), HardLabel(), HiddenState(), AttentionMap(), AttentionRelation()]
        module = DistillationModule(teacher, student, objectives, optimizer=lambda p: torch.optim.SGD(p, lr=0.1))
        run = trainer(tmp_path, used)
        run.fit(module, loader(task), loader(task, 1))
        logged = run.callback_metrics
        assert all(logged[f"train_{objective.name}"].isfinite() for objective in objectives)
        # The type of the numbers that are summed up and logged, whatever the models compute in.
        assert module.losses(batch(task, classes=3))["soft_target"].dtype == torch.float32 or used == "64-true"
        assert {p.dtype for p in module.parameters()} == {DTYPES.get(used, torch.float32)}
        students.append(student)
    moved = distance(students[0], pair(task)[1])
    assert moved > 0.05
    tolerance = {"32-true": 0.0, "64-true": 1e-5, "16-mixed": 0.02, "16-true": 0.05}.get(precision, 0.2)
    assert distance(*students) <= tolerance * moved


def test_an_eps_that_is_0_in_float16_is_refused(tmp_path: Path) -> None:
    def module(eps: float) -> DistillationModule:
        return DistillationModule(*pair("causal_lm"), optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, eps=eps))

    with pytest.raises(ValueError, match=r"`eps` of the optimizer to be above 0 in torch.float16, but got 1e-08"):
        trainer(tmp_path, "16-true").fit(module(1e-8), loader("causal_lm"))
    good = module(1e-4)
    trainer(tmp_path, "16-true").fit(good, loader("causal_lm"))
    assert all(parameter.isfinite().all() for parameter in good.student.parameters())


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_objectives_are_computed_in_float32_inside_autocast_and_under_a_half_default(
    case: Case, dtype: torch.dtype
) -> None:
    student, teacher = (changed(signals(seed=seed), lambda x: x.to(dtype), lambda mask: mask) for seed in (1, 2))
    objective = case.bound()
    exact = objective(*(changed(x, lambda y: y.double(), lambda mask: mask) for x in (student, teacher))).mean()
    torch.set_default_dtype(dtype)  # as bf16-true and 16-true do around a step
    try:
        with torch.autocast("cpu", dtype):
            loss = objective(student, teacher).mean()
    finally:
        torch.set_default_dtype(torch.float32)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), exact, rtol=2e-5, atol=2e-6)


class Norms(L.Callback):
    """Keeps the norm of the gradient as callbacks see it."""

    def __init__(self) -> None:
        self.logged: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.logged.append(trainer.callback_metrics["grad_norm"].item())


@pytest.mark.parametrize("clips", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_scaled_gradients_reach_neither_norms_nor_clipping_nor_logs(fused: bool, clips: bool, tmp_path: Path) -> None:
    norms, students = [], []
    for precision in ("32-true", "16-mixed"):
        teacher, student = pair("classification")
        watch, clipping = Norms(), GradientClipping("norm", 0.05)
        module = DistillationModule(teacher, student, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=fused))
        callbacks = [clipping, watch] if clips else [watch]
        trainer(tmp_path, precision, scale=1024.0, callbacks=callbacks).fit(module, loader())
        norms.append(watch.logged)
        students.append(student)
        if clips:
            assert clipping.state_dict()["statistics"][0]["clipped"] == 4
    assert norms[1] == pytest.approx(norms[0], rel=0.05)
    assert distance(*students) < 0.2 * distance(students[0], pair("classification")[1])


def test_the_trainers_own_clipping_refuses_a_fused_optimizer_under_a_scaler(tmp_path: Path) -> None:
    module = DistillationModule(*pair("classification"), optimizer=lambda p: torch.optim.AdamW(p, fused=True))
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping because it performs unscaling"):
        trainer(tmp_path, "16-mixed", gradient_clip_val=1.0).fit(module, loader())


class State(L.Callback):
    """What there is before each step, schedules included."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Any]] = []

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        clipping = next(c for c in trainer.callbacks if isinstance(c, GradientClipping)).state_dict()["statistics"]
        state = {
            "scale": trainer.precision_plugin.scaler.get_scale(),
            "weights": module.student.state_dict(),
            "optimizer": trainer.optimizers[0].state_dict(),
            "clipping": {key: value for key, value in clipping.get(0, {}).items() if key not in ("steps", "nonfinite")},
            "schedule": trainer.lr_scheduler_configs[0].scheduler.state_dict(),
        }
        self.steps.append(copy.deepcopy(state))

    on_train_end = on_train_batch_start


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("algorithm", ["norm", "percentile", "zscore"])
def test_an_overflow_step_changes_nothing(algorithm: Any, fused: bool, tmp_path: Path) -> None:
    watch = State()
    teacher, student = pair("classification")
    module = DistillationModule(
        teacher,
        student,
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-3, fused=fused),
        lr_scheduler=lambda optimizer: {
            "scheduler": torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step),
            "interval": "step",
        },
    )
    # So large a scale that gradients overflow in float16 until the scaler has backed off.
    run = trainer(tmp_path, "16-mixed", scale=2.0**24, callbacks=[GradientClipping(algorithm), watch])
    run.fit(module, loader(batches=16))
    skipped = 0
    for before, after in itertools.pairwise(watch.steps):
        if after["scale"] < before["scale"]:
            skipped += 1
            if not before["clipping"]:  # the first step makes it
                before["clipping"] = after["clipping"]
                assert after["clipping"]["count"] == 0
            if fused and not before["optimizer"]["state"]:  # made by the first step, taken or not
                made = after["optimizer"]["state"]
                assert not any(tensor.any() for state in made.values() for tensor in state.values())
                before["optimizer"]["state"] = made
            same = [{key: value for key, value in state.items() if key != "scale"} for state in (before, after)]
            torch.testing.assert_close(*same, rtol=0, atol=0, equal_nan=True)
        else:
            assert after["schedule"]["last_epoch"] == before["schedule"]["last_epoch"] + 1
            assert after["clipping"]["count"] == before["clipping"].get("count", 0) + 1
            assert not torch.equal(after["weights"]["classifier.weight"], before["weights"]["classifier.weight"])
    assert 2 <= skipped <= 14


def wide(layers: int = 2) -> nn.Module:
    """At least 64 inputs of each linear layer, as bitsandbytes needs."""
    return still(layers, hidden_size=64, intermediate_size=64)


@pytest.mark.parametrize("precision", TRAINER)
@pytest.mark.parametrize("own", TEACHER)
def test_the_teacher_answers_in_its_own_precision(own: Any, precision: str, tmp_path: Path) -> None:
    answers: list[Tensor] = []

    class Watch(DistillationModule):
        def teacher_step(self, batch: Any) -> Any:
            found = super().teacher_step(batch)
            answers.append(found.logits.clone())
            return found

    teacher = wide(3)
    sgd = lambda parameters: torch.optim.SGD(parameters, lr=0.1)  # noqa: E731
    module = Watch(teacher, wide(), [SoftTarget(), HiddenState()], optimizer=sgd, teacher_precision=own)
    data = batch("classification", classes=3, seed=0)
    alone = module.teacher_step(data).logits
    tensors = {name: tensor.clone() for name, tensor in module.teacher.named_parameters()}
    answers.clear()
    trainer(tmp_path, precision).fit(module, loader(batches=2))
    assert torch.equal(answers[0], alone)
    assert answers[0].dtype == {"bf16": torch.bfloat16, "16": torch.float16}.get(own, torch.float32)
    for name, tensor in module.teacher.named_parameters():
        assert tensor.dtype == tensors[name].dtype
        assert torch.equal(tensor, tensors[name])
    assert {p.dtype for p in module.student.parameters()} == {DTYPES.get(precision, torch.float32)}


@pytest.mark.parametrize("own", TEACHER)
def test_a_teacher_of_lower_precision_is_smaller_near_and_keeps_its_classifier(own: Any, tmp_path: Path) -> None:
    teacher = wide(3)
    data = batch("classification", classes=3)
    exact = DistillationModule(teacher, wide()).teacher_step(data).logits
    size = sum(tensor.nbytes for tensor in teacher.parameters())
    teacher.save_pretrained(tmp_path)
    for given in (str(tmp_path), copy.deepcopy(teacher)):
        module = DistillationModule(given, wide(), teacher_precision=own)
        smaller = sum(tensor.nbytes for tensor in module.teacher.parameters())
        assert smaller == size if own == "32" else smaller < 0.7 * size
        error = (module.teacher_step(data).logits.float() - exact).norm() / exact.norm()
        assert error < {"32": 1e-6, "bf16": 0.02, "16": 0.01, "int8": 0.05}.get(own, 0.25)
        assert type(module.teacher.classifier) is nn.Linear
        assert module.teacher.classifier.weight.is_floating_point()
    assert teacher.classifier.weight.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16-true", "64-true", "bf16-mixed"])
def test_a_plain_teacher_gets_inputs_of_its_own_type(precision: str, tmp_path: Path) -> None:
    teacher, student = (nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)) for _ in range(2))
    rows = [(torch.randn(6, 4), torch.arange(6) % 3)]
    module = DistillationModule(teacher, student, teacher_precision="32")
    trainer(tmp_path, precision).fit(module, DataLoader(rows, batch_size=None))
    assert teacher[0].weight.dtype == torch.float32


def test_a_teacher_that_cannot_have_the_precision_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`teacher_precision` to be one of .*'nf4'"):
        DistillationModule(still(3), still(), teacher_precision="int4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="`teacher` to be a transformers model, its folder or hub id"):
        DistillationModule(nn.Linear(4, 3), nn.Linear(4, 3), teacher_precision="nf4")


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("task", ["classification", "causal_lm"])
def test_gradient_checkpointing_trains_the_same_student(task: str, precision: str, tmp_path: Path) -> None:
    students, layers_run = [], []
    for flag in (False, True):
        teacher, student = pair(task)
        objectives = [SoftTarget(), HiddenState(), AttentionMap(), AttentionRelation(("qk", "vv"))]
        module = DistillationModule(
            teacher, student, objectives, optimizer=lambda p: torch.optim.SGD(p, lr=0.1), gradient_checkpointing=flag
        )
        runs: list[bool] = []
        inside = "model.layers.0.mlp.down_proj" if task == "causal_lm" else "bert.encoder.layer.0.output.dense"
        student.get_submodule(inside).register_forward_pre_hook(lambda *_, runs=runs: runs.append(True))
        trainer(tmp_path, precision).fit(module, loader(task))
        students.append(student)
        layers_run.append(len(runs))
    assert layers_run == [4, 8]
    assert distance(students[0], pair(task)[1]) > 0.05
    for one, other in zip(*(student.parameters() for student in students), strict=True):
        torch.testing.assert_close(other, one)


def test_gradient_checkpointing_of_a_plain_module_is_refused() -> None:
    with pytest.raises(ValueError, match="`gradient_checkpointing` to come with a transformers model"):
        DistillationModule(nn.Linear(4, 3), nn.Linear(4, 3), gradient_checkpointing=True)


def test_what_the_trainer_makes_of_float16_and_bitsandbytes_on_a_cpu() -> None:
    with pytest.warns(UserWarning, match="AMP with fp16 is not supported on CPU. Using `precision='bf16-mixed'`"):
        run = L.Trainer(accelerator="cpu", precision="16-mixed", logger=False)
    assert run.precision == "bf16-mixed"
    plugin = BitsandbytesPrecision("nf4", torch.bfloat16)
    with pytest.raises(RuntimeError, match="Bitsandbytes is only supported on CUDA GPUs"):
        L.Trainer(accelerator="cpu", plugins=plugin)


@pytest.mark.gpu
@needs_gpu
def test_bitsandbytes_precision_of_the_student_leaves_the_teacher(tmp_path: Path) -> None:
    plugin = BitsandbytesPrecision("nf4", torch.bfloat16, ignore_modules={"student.classifier"})
    module = DistillationModule(wide(3), wide(), teacher_precision="32")
    run = trainer(tmp_path, plugins=plugin, accelerator="gpu", devices=1)
    run.fit(module, loader())
    assert type(module.teacher.bert.encoder.layer[0].output.dense) is nn.Linear
    assert run.callback_metrics["train_loss"].isfinite()


AVX2 = {"architecture": "x86_64", "avx2": True, "avx512_f": False, "avx512_bf16": False, "amx_bf16": False}


@pytest.mark.parametrize(
    ("capabilities", "emulates"),
    [
        (AVX2, True),
        ({**AVX2, "avx512_f": True}, True),
        ({**AVX2, "avx512_bf16": True}, False),
        ({**AVX2, "amx_bf16": True}, False),
        ({"architecture": "arm64", "neon": True, "bf16": False}, True),
        ({"architecture": "aarch64", "bf16": True}, False),
        ({"architecture": "riscv64"}, False),
    ],
)
def test_which_processors_emulate_bf16(capabilities: dict[str, Any], emulates: bool) -> None:
    assert emulates_bf16(capabilities) is emulates


def test_this_machine_is_asked() -> None:
    assert str(cpu_capabilities()["architecture"])


@pytest.mark.parametrize(
    ("precision", "arguments", "said"),
    [
        ("bf16-mixed", {}, "got `precision='bf16-mixed'`. Use `precision='32-true'`."),
        ("bf16-true", {}, "got `precision='bf16-true'`"),
        (
            "32-true",
            {"teacher_precision": "bf16"},
            "got the teacher in bfloat16. Use the teacher in float32 (`teacher_p",
        ),
        ("bf16-mixed", {"teacher_precision": "bf16"}, "got `precision='bf16-mixed'` and the teacher in bfloat16. Use"),
        ("32-true", {}, None),
        ("64-true", {}, None),
    ],
)
@pytest.mark.parametrize("run", ["fit", "test"])
def test_a_cpu_that_emulates_bf16_is_said_before_the_first_step(
    precision: str, arguments: Any, said: str | None, run: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Stop(L.Callback):
        """Ends the run before its first step."""

        def on_sanity_check_start(self, *_: Any) -> None:
            raise KeyError("a step")

        on_train_start = on_test_start = on_sanity_check_start

    monkeypatch.setattr("lightning_distill.teachers.precision.cpu_capabilities", lambda: AVX2)
    module = DistillationModule(*pair("classification"), **arguments)
    start = getattr(trainer(tmp_path, precision, callbacks=[Stop()]), run)
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        with pytest.raises(KeyError):
            start(module, loader())
    texts = [str(warning.message) for warning in found if "no instructions for bfloat16" in str(warning.message)]
    assert len(texts) == (said is not None)
    assert said is None or said in texts[0]
