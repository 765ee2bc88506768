"""build_lr_scheduler: schedules by name as Lightning wants them, with explicit units."""

from functools import partial
from typing import Any, Literal

import lightning as L
import transformers
from torch.optim import Optimizer, lr_scheduler

from lightning_distill.arguments import between, one_of, typed

# `transformers.X` here, and no import of X: its schedules load peft and bitsandbytes, seconds of every start.
_TORCH = ("step", "reduce_on_plateau", "one_cycle", "cyclic", "wsd")
_PLATEAU = ("reduce_on_plateau", "reduce_lr_on_plateau", "ReduceLROnPlateau", "greedy")
_NO_LENGTH: dict[str, Any] = {
    "step": lr_scheduler.StepLR,
    "reduce_on_plateau": lr_scheduler.ReduceLROnPlateau,
    "reduce_lr_on_plateau": lr_scheduler.ReduceLROnPlateau,
    "greedy": lambda optimizer, **options: transformers.get_scheduler(
        "greedy", optimizer, scheduler_specific_kwargs=options
    ),
}


@typed
def build_lr_scheduler(
    module: L.LightningModule,
    optimizer: Optimizer,
    name: str = "linear",
    *,
    interval: Literal["step", "epoch"] = "step",
    warmup: float = 0.0,
    min_lr_ratio: float = 0.0,
    num_training_steps: int | None = None,
    monitor: str | None = None,
    options: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Make what ``configure_optimizers`` returns as ``lr_scheduler``.

    Args:
        module: The module; its Trainer knows how many steps or epochs there will be.
        optimizer: The optimizer.
        name: ``"step"``, ``"reduce_on_plateau"``, ``"one_cycle"``, ``"cyclic"`` (torch), ``"wsd"`` (warm-up, stable,
            decay over the last fifth), any name of ``transformers.get_scheduler`` (``"linear"``, ``"cosine"``, ...), or
            any class of ``torch.optim.lr_scheduler`` (``"ExponentialLR"``), whose arguments are all in ``options``.
        interval: The unit of the schedule: it moves on every optimizer step or every epoch, and every length given here
            is counted in it.
        warmup: Length of the linear warm-up: below 1 a share of the whole, from 1 on a number of units. ``"step"``,
            plateaus and torch's classes have none.
        min_lr_ratio: For ``"cosine"`` and ``"wsd"``: where it ends, as a share of the learning rate.
        num_training_steps: Length of the whole in units; None takes it from the Trainer.
        monitor: For plateaus: the logged metric that should fall.
        options: More arguments of the schedule, by the names its library gives them (``{"step_size": 10}``).

    Returns:
        A dictionary with ``scheduler``, ``interval``, ``frequency``, ``name`` and, for plateaus, ``monitor``.

    Raises:
        ValueError: If an argument is out of its range, the metric to monitor is missing, or the Trainer has no end.

    Example:
        >>> import lightning as L, torch
        >>> from lightning_distill.optim import build_lr_scheduler
        >>> optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
        >>> made = build_lr_scheduler(L.LightningModule(), optimizer, "linear", num_training_steps=10, warmup=0.2)
        >>> made["interval"], made["scheduler"].lr_lambdas[0](1), made["scheduler"].lr_lambdas[0](6)
        ('step', 0.5, 0.5)
    """
    own = getattr(lr_scheduler, name, None)
    by_class = isinstance(own, type) and issubclass(own, lr_scheduler.LRScheduler) and name[0] != "_"
    if not by_class:
        one_of("name", name, [*_TORCH, *(kind.value for kind in transformers.SchedulerType)])
    one_of("interval", interval, ("step", "epoch"))
    between("warmup", warmup, 0, closed=True)
    between("min_lr_ratio", min_lr_ratio, 0, 1, closed=True)
    if min_lr_ratio and name not in ("cosine", "wsd"):
        raise ValueError(f"Expected argument `min_lr_ratio` to be left out for {name!r}; it is for 'cosine' and 'wsd'.")
    if name in _PLATEAU and monitor is None:
        raise ValueError(f"Expected argument `monitor` to be a logged metric for {name!r}, but got None.")
    config: dict[str, Any] = {"interval": interval, "frequency": 1, "name": f"lr-{name}"}
    if name in _PLATEAU:
        config |= {"monitor": monitor, "reduce_on_plateau": True}
    options = dict(options or {})
    if name in _NO_LENGTH or by_class:
        make: Any = partial(_NO_LENGTH.get(name) or own, optimizer, **options)  # type: ignore[arg-type, misc]
    else:
        total = _total(module, interval) if num_training_steps is None else num_training_steps
        between("num_training_steps", total, 0)
        steps = round(warmup * total) if warmup < 1 else int(warmup)
        if steps >= total:
            raise ValueError(
                f"Expected argument `warmup` to be shorter than the {total} {interval}s, but got {warmup!r}."
            )
        make = partial(_of_length, optimizer, name, total, steps, min_lr_ratio, options)
    try:
        return {**config, "scheduler": make()}
    except TypeError as error:
        raise ValueError(f"Expected argument `options` to fit {name!r}, but got {options}: {error}.") from error


def _of_length(
    optimizer: Optimizer, name: str, total: int, warmup: int, min_lr_ratio: float, options: dict[str, Any]
) -> Any:
    """A schedule that is told how long it is."""
    rates = [group["lr"] for group in optimizer.param_groups]
    if name == "one_cycle":
        options = {"max_lr": rates, "total_steps": total, "pct_start": warmup / total or 0.3, **options}
        return lr_scheduler.OneCycleLR(optimizer, **options)
    if name == "cyclic":
        options = {"base_lr": [rate / 10 for rate in rates], "max_lr": rates, **options}
        momentum = optimizer.defaults.get("momentum", 0) > 0
        return lr_scheduler.CyclicLR(
            optimizer, **{"step_size_up": max(1, total // 10), "cycle_momentum": momentum, **options}
        )
    if name == "wsd":
        name, options = "warmup_stable_decay", {"num_decay_steps": max(1, total // 5), **options}
        options["min_lr_ratio"] = min_lr_ratio
    elif min_lr_ratio:
        name, options = "cosine_with_min_lr", {**options, "min_lr_rate": min_lr_ratio}
    return transformers.get_scheduler(name, optimizer, warmup, total, options)


def _total(module: L.LightningModule, interval: str) -> int:
    if module._trainer is None:
        raise ValueError("Expected argument `num_training_steps` to be given for a module without a Trainer.")
    trainer = module.trainer
    total = trainer.estimated_stepping_batches if interval == "step" else trainer.max_epochs
    if total is None or total == float("inf") or total < 0:
        raise ValueError("Expected argument `num_training_steps` to be given where the Trainer has no end.")
    return int(total)
