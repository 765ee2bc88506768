"""GradientClipping: what happens around the optimizer's step."""

import math
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_distill.callbacks import GradientClipping
from lightning_distill.functional.clipping import total_norm
from tests.callbacks.registry import Regression, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]


class Recorded(GradientClipping):
    """Keeps what the optimizer is about to use at every step: the learning rates inside its step, the gradients."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self.lrs: list[float] = []
        self.scheduled: list[float] = []
        self.gradients: list[list[Tensor | None]] = []
        # A hook on the step registered after the callback's own sees what the step sees.
        trainer.optimizers[0].register_step_pre_hook(
            lambda optimizer, *_: self.lrs.append(optimizer.param_groups[0]["lr"])
        )

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        super().on_before_optimizer_step(trainer, pl_module, optimizer)
        gradients = [parameter.grad for parameter in pl_module.parameters()]
        self.gradients.append([None if gradient is None else gradient.clone() for gradient in gradients])

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        self.scheduled.append(trainer.optimizers[0].param_groups[0]["lr"])


class Broken(Regression):
    """Makes the loss of one batch infinite: of step 0 or of step 2."""

    def __init__(self, optimizer: Any, broken: tuple[int, ...] = (2,)) -> None:
        super().__init__()
        self.optimizer, self.broken = optimizer, broken

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss * math.nan if self.global_step in self.broken else loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


class Witness(L.Callback):
    """Copies weights and optimizer state before and after every batch."""

    def __init__(self) -> None:
        self.before: list[Any] = []
        self.after: list[Any] = []

    @staticmethod
    def look(trainer: L.Trainer, pl_module: L.LightningModule) -> Any:
        optimizer = trainer.optimizers[0]
        states = [
            value.clone() for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)
        ]
        numbers = [value for group in optimizer.param_groups for name, value in group.items() if name != "params"]
        return [parameter.detach().clone() for parameter in pl_module.parameters()] + states, numbers

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.before.append(self.look(trainer, pl_module))

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *_: Any) -> None:
        self.after.append(self.look(trainer, pl_module))


def unchanged(witness: Witness, step: int) -> bool:
    (tensors, numbers), (after, numbers_after) = witness.before[step], witness.after[step]
    same = len(tensors) == len(after) and all(torch.equal(a, b) for a, b in zip(tensors, after, strict=True))
    return same and numbers == numbers_after


def optimizers() -> dict[str, Any]:
    from pytorch_optimizer import Lion
    from schedulefree import AdamWScheduleFree

    def schedule_free(parameters: Any) -> Any:
        optimizer = AdamWScheduleFree(parameters, lr=0.01, weight_decay=0.1)
        optimizer.train()
        return optimizer

    return {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1),
        "fused sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.1, fused=True),
        "adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1),
        "fused adamw": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.1, fused=True),
        "lion": lambda p: Lion(p, 0.01, weight_decay=0.1),
        "schedule-free": schedule_free,
    }


class TestNonFinite:
    @pytest.mark.parametrize("scaled", [False, True])
    @pytest.mark.parametrize("name", list(optimizers()))
    def test_a_skipped_step_changes_nothing(self, name: str, scaled: bool, tmp_path: Path) -> None:
        plugins = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0)) if scaled else None
        clipping, witness = GradientClipping("zscore", 0.5, warmup_steps=1), Witness()
        run = trainer(tmp_path, witness, clipping, plugins=plugins)
        run.fit(Broken(optimizers()[name], broken=(2,)))
        assert [unchanged(witness, step) for step in range(5)] == [False, False, True, False, False]
        assert not hasattr(run.optimizers[0], "found_inf")
        statistics = clipping.state_dict()["statistics"][0]
        assert (statistics["nonfinite"].item(), statistics["count"].item(), statistics["steps"]) == (1, 4, 5)
        assert statistics["mean"].isfinite().all()
        assert statistics["smoothed"].isfinite().all()

    @pytest.mark.parametrize("name", ["fused sgd", "fused adamw"])
    def test_a_skipped_first_step_leaves_a_sound_state(self, name: str, tmp_path: Path) -> None:
        module = Broken(optimizers()[name], broken=(0,))
        start = [parameter.detach().clone() for parameter in module.parameters()]
        trainer(tmp_path, GradientClipping(), max_steps=1).fit(module)
        assert all(torch.equal(a, b) for a, b in zip(start, module.parameters(), strict=True))
        module = Broken(optimizers()[name], broken=(0,))
        trainer(tmp_path, GradientClipping(), max_steps=4).fit(module)
        assert all(parameter.isfinite().all() and parameter.abs().max() < 10 for parameter in module.parameters())

    def test_zero_takes_the_step_with_zero_gradients(self, tmp_path: Path) -> None:
        module = Broken(lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.5), broken=(0,))
        start = [parameter.detach().clone() for parameter in module.parameters()]
        trainer(tmp_path, GradientClipping(nonfinite="zero"), max_steps=1).fit(module)
        for before, after in zip(start, module.parameters(), strict=True):
            torch.testing.assert_close(after.detach(), before * 0.95)

    def test_raise_names_step_and_parameters(self, tmp_path: Path) -> None:
        run = trainer(tmp_path, GradientClipping(nonfinite="raise"))
        with pytest.raises(RuntimeError, match=r"finite gradients at step 2.*6 parameters.*body\.0\.weight"):
            run.fit(Broken(optimizers()["adamw"]))

    @pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
    def test_an_overflow_under_a_scaler_lowers_the_scale_and_does_not_raise(self, tmp_path: Path) -> None:
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
        clipping = GradientClipping(nonfinite="raise")
        trainer(tmp_path, clipping, plugins=MixedPrecision("16-mixed", "cpu", scaler)).fit(Regression())
        assert scaler.get_scale() < 2.0**40
        assert clipping.state_dict()["statistics"][0]["nonfinite"] > 0


class TestAroundTheStep:
    def test_the_optimizer_gets_what_torch_would_give_it(self, tmp_path: Path) -> None:
        recorded = Recorded("norm", 0.05)
        module, plain = Regression(), Regression()
        trainer(tmp_path, recorded).fit(module)
        trainer(tmp_path, gradient_clip_val=0.05).fit(plain)
        for ours, lightnings in zip(module.parameters(), plain.parameters(), strict=True):
            assert torch.equal(ours, lightnings)

    @pytest.mark.parametrize("name", ["sgd", "adamw"])
    def test_fused_under_a_scaler_equals_unfused(self, name: str, tmp_path: Path) -> None:
        modules = [Broken(optimizers()[kind + name], broken=()) for kind in ("", "fused ")]
        for module in modules:
            scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
            trainer(tmp_path, GradientClipping("norm", 0.05), plugins=MixedPrecision("16-mixed", "cpu", scaler)).fit(
                module
            )
        for unfused, fused in zip(*(module.parameters() for module in modules), strict=True):
            torch.testing.assert_close(fused, unfused)

    def test_accumulated_gradients_are_clipped_once_and_whole(self, tmp_path: Path) -> None:
        recorded = Recorded("norm", 0.05)
        module = Regression()
        run = trainer(tmp_path, recorded, accumulate_grad_batches=2, limit_train_batches=4, max_steps=1)
        run.fit(module)
        fresh = Regression()
        batches = list(module.train_dataloader())[:2]
        (sum(nn.functional.mse_loss(fresh.head(fresh.body(x)), y) for x, y in batches) / 2).backward()
        nn.utils.clip_grad_norm_(fresh.parameters(), 0.05)
        assert len(recorded.gradients) == 1
        for ours, wanted in zip(recorded.gradients[0], fresh.parameters(), strict=True):
            torch.testing.assert_close(ours, wanted.grad)

    def test_manual_optimization_with_two_optimizers_keeps_two_statistics(self, tmp_path: Path) -> None:
        class Manual(Regression):
            automatic_optimization = False

            def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:  # type: ignore[override]
                loss = nn.functional.mse_loss(self.head(self.body(batch[0])), batch[1])
                self.manual_backward(loss)
                for optimizer in self.optimizers():  # type: ignore[union-attr]
                    optimizer.step()
                for optimizer in self.optimizers():  # type: ignore[union-attr]
                    optimizer.zero_grad()

            def configure_optimizers(self) -> Any:
                return [torch.optim.SGD(part.parameters(), 0.1) for part in (self.body, self.head)]

        recorded = Recorded("norm", 0.01)
        run = trainer(tmp_path, recorded, max_steps=6)
        run.fit(Manual())
        norms = [total_norm([[g for g in gradients[4:] if g is not None]]).item() for gradients in recorded.gradients]
        assert norms[1::2] == pytest.approx([0.01] * 3, rel=1e-3)
        assert [of_one["steps"] for of_one in recorded.state_dict()["statistics"].values()] == [3, 3]
        logged = {name for name in run.callback_metrics if name.startswith("clipped_share")}
        assert logged == {"clipped_share/optimizer0", "clipped_share/optimizer1"}

    def test_per_parameter_group_bounds_each_group(self, tmp_path: Path) -> None:
        recorded = Recorded("norm", 0.01, per="parameter_group")
        run = trainer(tmp_path, recorded, max_steps=1)
        run.fit(Regression())
        body, head = recorded.gradients[0][:4], recorded.gradients[0][4:]
        assert total_norm([body]).item() == pytest.approx(0.01, rel=1e-3)  # type: ignore[list-item]
        assert total_norm([head]).item() == pytest.approx(0.01, rel=1e-3)  # type: ignore[list-item]
        assert {"clip_coefficient/group0", "clip_coefficient/group1"} <= set(run.callback_metrics)

    def test_excluded_parameters_keep_their_gradient(self, tmp_path: Path) -> None:
        recorded, untouched = Recorded("adaptive", 1e-6, exclude=["head.*", "*.bias"]), Recorded("norm", 1e9)
        trainer(tmp_path, recorded, max_steps=1).fit(Regression())
        trainer(tmp_path, untouched, max_steps=1).fit(Regression())
        kept = [torch.equal(a, b) for a, b in zip(recorded.gradients[0], untouched.gradients[0], strict=True)]  # type: ignore[arg-type]
        names = [name for name, _ in Regression().named_parameters()]
        assert dict(zip(names, kept, strict=True)) == {n: n.startswith("head") or n.endswith("bias") for n in names}

    def test_by_value_looks_at_the_norm_on_logged_steps_and_clips_on_all(self, tmp_path: Path) -> None:
        recorded, every = Recorded("value", 0.01, patience=4), Recorded("value", 0.01)
        for number, (callback, steps) in enumerate(((recorded, 2), (every, 1))):
            trainer(tmp_path / str(number), callback, log_every_n_steps=steps).fit(Regression())
        for some, all_ in zip(recorded.gradients, every.gradients, strict=True):
            assert all(torch.equal(a, b) and a.abs().max() <= 0.01 for a, b in zip(some, all_, strict=True))  # type: ignore[arg-type, union-attr]
        statistics = recorded.state_dict()["statistics"][0]
        assert (statistics["steps"], statistics["count"].item(), statistics["clipped"].item()) == (5, 2, 2)

    def test_by_value_leaves_out_a_step_between_two_logged_ones(self, tmp_path: Path) -> None:
        clipping, witness = GradientClipping("value"), Witness()
        trainer(tmp_path, witness, clipping, log_every_n_steps=4).fit(Broken(optimizers()["sgd"], broken=(2,)))
        assert [unchanged(witness, step) for step in range(5)] == [False, False, True, False, False]
        assert clipping.state_dict()["statistics"][0]["nonfinite"] == 1

    def test_a_pattern_that_matches_nothing_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"`exclude` to match names of parameters, but got 'classifier\.\*'"):
            trainer(tmp_path, GradientClipping("adaptive", exclude="classifier.*")).fit(Regression())

    def test_what_is_logged(self, tmp_path: Path) -> None:
        recorded, untouched = Recorded("norm", 0.3), Recorded("norm", 1e9)
        run = trainer(tmp_path, recorded, max_steps=1)
        run.fit(Regression())
        trainer(tmp_path, untouched, max_steps=1).fit(Regression())
        norm = total_norm([untouched.gradients[0]])  # type: ignore[list-item]
        assert run.callback_metrics["grad_norm"].item() == pytest.approx(norm.item())
        assert run.callback_metrics["clip_coefficient"].item() == pytest.approx(0.3 / norm.item(), rel=1e-4)
        assert run.callback_metrics["clipped_share"] == 1
        assert run.callback_metrics["nonfinite_steps"] == 0

    def test_it_refuses_to_clip_twice(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="`gradient_clip_val` of the Trainer to be left out"):
            trainer(tmp_path, GradientClipping(), gradient_clip_val=1.0).fit(Regression())

    @pytest.mark.parametrize("algorithm", ["norm", "value", "adaptive", "percentile", "zscore"])
    def test_with_a_fused_optimizer_the_host_waits_for_nothing(self, algorithm: Any) -> None:
        # A meta tensor has no value: to read one on the host is an error, whichever way it is read.
        module = Regression().to("meta")
        optimizer = torch.optim.AdamW(module.parameters())
        optimizer.defaults["fused"] = True  # torch refuses to fuse on meta; the callback only asks
        clipping = GradientClipping(algorithm)
        run = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, log_every_n_steps=1000)
        run.strategy.optimizers = [optimizer]
        for _ in range(3):
            for parameter in module.parameters():
                parameter.grad = torch.ones_like(parameter)
            clipping.on_before_optimizer_step(run, module, optimizer)
        with pytest.raises(RuntimeError, match="meta tensors"):
            bool(clipping.state_dict()["statistics"][0]["count"])


def schedules() -> dict[str, Any]:
    schedules = torch.optim.lr_scheduler
    return {
        "LambdaLR": lambda o: schedules.LambdaLR(o, lambda step: 0.9**step),
        "StepLR": lambda o: schedules.StepLR(o, 2),
        "CosineAnnealingLR": lambda o: schedules.CosineAnnealingLR(o, 6),
        "OneCycleLR": lambda o: schedules.OneCycleLR(o, 0.02, total_steps=8),
        "CyclicLR": lambda o: schedules.CyclicLR(o, 0.001, 0.01, step_size_up=2),
    }


class Scheduled(Regression):
    def __init__(self, schedule: Any) -> None:
        super().__init__()
        self.schedule = schedule

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), 0.001, momentum=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self.schedule(optimizer), "interval": "step"}}


class TestWatching:
    @pytest.mark.parametrize("name", list(schedules()))
    def test_a_lowered_rate_is_the_schedules_times_the_factor_and_survives_resuming(
        self, name: str, tmp_path: Path
    ) -> None:
        plain = Recorded(warn_norm=None)
        trainer(tmp_path / "plain", plain).fit(Scheduled(schedules()[name]))
        watched = Recorded(warn_norm=1e-3, patience=2, reduce_lr=0.5)
        with pytest.warns(UserWarning, match="above warn_norm=0.001 for 2 steps.*multiplied by 0.5"):
            trainer(tmp_path / "watched", watched).fit(Scheduled(schedules()[name]))
        assert watched.scheduled == plain.scheduled
        # Looked at after steps 2 and 4; a step's own rate is set when it begins.
        factors = [1.0, 1.0, 0.5, 0.5, 0.25]
        assert watched.lrs == pytest.approx([lr * factor for lr, factor in zip(plain.lrs, factors, strict=True)])

        resumed = Recorded(warn_norm=1e-3, patience=2, reduce_lr=0.5)
        with pytest.warns(UserWarning, match="above warn_norm"):
            trainer(tmp_path / "resumed", resumed).fit(
                Scheduled(schedules()[name]), ckpt_path=tmp_path / "watched" / "step=3.ckpt"
            )
        assert resumed.lrs == pytest.approx(watched.lrs[3:])
        assert resumed.scheduled == watched.scheduled[3:]
        assert resumed.lr_factor == 0.25

    def test_no_warning_below_the_norm(self, tmp_path: Path) -> None:
        recorded = Recorded(warn_norm=1e3, patience=1, reduce_lr=0.5)
        trainer(tmp_path, recorded).fit(Regression())
        assert recorded.lr_factor == 1.0
