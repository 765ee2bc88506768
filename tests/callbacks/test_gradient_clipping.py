"""GradientClipping: numerics against torch, timm and numpy, and what happens around the optimizer's step."""

import importlib.util
import math
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lightning.pytorch.plugins.precision import MixedPrecision
from torch import Tensor, nn

from lightning_distill.callbacks import GradientClipping
from lightning_distill.functional.clipping import (
    all_finite,
    clip_adaptively_,
    clip_by_value_,
    group_tensors,
    norm_coefficient,
    percentile_threshold,
    running_moments,
    scale_,
    total_norm,
    zscore_threshold,
)
from tests.callbacks.registry import Regression, trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers.*"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Using ModelCheckpoint with manual optimization"),
]


def timm_agc() -> Any:
    """timm's own function, from its file: importing the package would need torchvision."""
    package = importlib.util.find_spec("timm")
    if package is None or package.origin is None:
        pytest.skip("needs `timm` of benchmarks/requirements.txt, which is absent")
    spec = importlib.util.spec_from_file_location("timm_agc", Path(package.origin).parent / "utils" / "agc.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.adaptive_clip_grad


shapes = st.lists(st.lists(st.integers(1, 5), min_size=0, max_size=4), min_size=1, max_size=5)
magnitudes = st.floats(1e-4, 1e4)
seeds = st.integers(0, 2**31)


def parameters_like(shapes: list[list[int]], magnitude: float, seed: int) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator) * magnitude
    return parameters


def twice(*arguments: Any) -> tuple[list[nn.Parameter], list[nn.Parameter], list[list[Tensor]]]:
    ours, theirs = parameters_like(*arguments), parameters_like(*arguments)
    return ours, theirs, group_tensors(parameter.grad for parameter in ours if parameter.grad is not None)


def assert_same_gradients(ours: list[nn.Parameter], theirs: list[nn.Parameter], **tolerance: float) -> None:
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, **tolerance)


class TestNumerics:
    @given(shapes, magnitudes, seeds, st.floats(1e-3, 1e3))
    @settings(deadline=None, max_examples=50)
    def test_norm_equals_torch(self, shapes: list[list[int]], magnitude: float, seed: int, threshold: float) -> None:
        ours, theirs, groups = twice(shapes, magnitude, seed)
        norm = total_norm(groups)
        scale_(groups, norm_coefficient(norm, threshold))
        assert torch.equal(norm, nn.utils.clip_grad_norm_(theirs, threshold))
        assert_same_gradients(ours, theirs, rtol=0.0, atol=0.0)

    @given(shapes, magnitudes, seeds, st.floats(1e-3, 1e3))
    @settings(deadline=None, max_examples=50)
    def test_value_equals_torch(self, shapes: list[list[int]], magnitude: float, seed: int, threshold: float) -> None:
        ours, theirs, groups = twice(shapes, magnitude, seed)
        clip_by_value_(groups, threshold)
        nn.utils.clip_grad_value_(theirs, threshold)
        assert_same_gradients(ours, theirs, rtol=0.0, atol=0.0)

    @given(shapes, magnitudes, seeds, st.floats(1e-3, 1.0), st.floats(1e-5, 1.0))
    @settings(deadline=None, max_examples=50)
    def test_adaptive_equals_timm(
        self, shapes: list[list[int]], magnitude: float, seed: int, threshold: float, eps: float
    ) -> None:
        ours, theirs, _ = twice(shapes, magnitude, seed)
        clip_adaptively_(group_tensors(ours), threshold, eps)
        timm_agc()(theirs, threshold, eps)
        assert_same_gradients(ours, theirs, rtol=1e-5, atol=0.0)

    @given(
        st.lists(st.floats(2**-10, 2**10, width=32), min_size=1, max_size=30), st.floats(0.1, 100), st.integers(0, 9)
    )
    @settings(deadline=None, max_examples=50)
    def test_percentile_equals_numpy(self, norms: list[float], percentile: float, empty: int) -> None:
        history = torch.tensor(norms + [math.nan] * empty)
        wanted = np.percentile(np.array(norms), percentile)
        assert percentile_threshold(history, percentile).item() == pytest.approx(wanted, rel=1e-5)

    @given(st.lists(st.floats(2**-6, 2**7, width=32), min_size=6, max_size=20), st.floats(0.5, 3), st.floats(0.5, 0.99))
    @settings(deadline=None, max_examples=50)
    def test_zscore_equals_the_papers_arithmetic_on_numbers(
        self, norms: list[float], threshold: float, decay: float
    ) -> None:
        norms64 = [float(norm) for norm in norms]
        mean, variance = float(np.mean(norms64[:4])), float(np.var(norms64[:4]))
        state = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
        for count, norm in enumerate(norms64):
            value = torch.tensor(norm, dtype=torch.float64)
            bound = zscore_threshold(value, *state, threshold) if count >= 4 else torch.tensor(math.inf).double()
            if count >= 4:
                z = (norm - mean) / (math.sqrt(variance) + 1e-6)
                wanted = mean + threshold / z * threshold * math.sqrt(variance) if z > threshold else math.inf
                assert bound.item() == pytest.approx(wanted, rel=1e-6)
                effective = min(norm, wanted)
                mean = decay * mean + (1 - decay) * effective
                variance = decay * variance + (1 - decay) * (effective - mean) ** 2
            state = running_moments(value.minimum(bound), *state, torch.tensor(count), 4, decay)
            if count == 3:
                # Both are exact up to rounding; from here on the two take the same steps from the same place.
                assert state[0].item() == pytest.approx(mean, rel=1e-6)
                assert state[1].item() == pytest.approx(variance, rel=1e-6, abs=1e-6 * mean**2)
                state = torch.tensor(mean).double(), torch.tensor(variance).double()

    def test_half_precision_norms_do_not_overflow(self) -> None:
        gradient = torch.full((4,), 60000.0, dtype=torch.float16)
        assert total_norm([[gradient]]).item() == pytest.approx(120000, rel=1e-3)

    @given(
        st.lists(st.floats(width=16), min_size=1, max_size=6),
        st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    )
    @settings(deadline=None, max_examples=50)
    def test_all_finite_says_what_isfinite_says_and_changes_nothing(
        self, values: list[float], dtype: torch.dtype
    ) -> None:
        tensor = torch.tensor(values, dtype=dtype)
        copy = tensor.clone()
        assert all_finite([[torch.ones(3, 2, dtype=dtype), tensor], [torch.ones(1)]]) == tensor.isfinite().all()
        assert torch.equal(tensor.view(torch.uint8), copy.view(torch.uint8))

    def test_gradients_of_several_types_count_as_one_vector(self) -> None:
        groups = group_tensors([torch.tensor([3.0]), torch.tensor([4.0], dtype=torch.float64)])
        assert len(groups) == 2
        assert total_norm(groups).item() == pytest.approx(5.0)


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
