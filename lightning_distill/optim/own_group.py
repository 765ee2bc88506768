"""A parameter group of their own for parameters that came after the optimizer."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_distill.optim.peak_lr import flattened, scale_peak_lrs

#: What schedules keep one of for each parameter group.
_PER_GROUP = ("base_lrs", "lr_lambdas", "_last_lr", "max_lrs", "min_lrs", "base_momentums", "max_momentums")


def give_own_group(
    optimizers: Sequence[torch.optim.Optimizer],
    schedules: Sequence[Any],
    parameters: list[nn.Parameter],
    name: str,
    lr: float | None = None,
) -> None:
    """Move parameters to a last group of their own, which is a copy of the first in everything else.

    Args:
        optimizers: One of them may hold the parameters already.
        schedules: Theirs; they are told of the group.
        parameters: What moves.
        name: Of the group.
        lr: Its peak learning rate; None: that of the first group.

    Example:
        >>> import torch
        >>> from lightning_distill.optim.own_group import give_own_group
        >>> first, second = (torch.nn.Parameter(torch.zeros(1)) for _ in range(2))
        >>> optimizer = torch.optim.SGD([first], lr=0.1)
        >>> give_own_group([optimizer], [], [second], "ramps", lr=0.5)
        >>> [(group.get("name"), group["lr"]) for group in optimizer.param_groups]
        [(None, 0.1), ('ramps', 0.5)]
    """
    own = set(parameters)

    def holds(optimizer: torch.optim.Optimizer) -> bool:
        return any(parameter in own for group in optimizer.param_groups for parameter in group["params"])

    optimizer = next((optimizer for optimizer in optimizers if holds(optimizer)), optimizers[0])
    groups = optimizer.param_groups
    others = [[parameter for parameter in group["params"] if parameter not in own] for group in groups]
    mine = [schedule for schedule in flattened(schedules) if schedule.optimizer is optimizer]
    template = next((group for group in groups if any(p in own for p in group["params"])), groups[0])
    place = groups.index(template)
    for group, rest in zip(groups, others, strict=True):
        group["params"] = rest
    if not any(others):
        # Only the ramps train, and one of the groups is theirs already.
        template["params"] = parameters
        template["name"] = name
        place = groups.index(template)
    else:
        for schedule in mine:
            for kept in _PER_GROUP:
                values = getattr(schedule, kept, None)
                if isinstance(values, list) and len(values) == len(groups):
                    values.append(values[place])
        optimizer.add_param_group({**template, "params": parameters, "name": name})
        place = len(groups) - 1
    if lr is not None:
        factors = [1.0] * len(groups)
        factors[place] = lr / float(groups[place].get("initial_lr", groups[place]["lr"]))
        scale_peak_lrs([optimizer], [schedule for schedule in schedules if schedule.optimizer is optimizer], [factors])
