"""Arguments nobody expects: every public constructor refuses them by name, or does what it says."""

import inspect
import math
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn

from lightning_distill import DistillationModule, callbacks, student_from_teacher
from lightning_distill import objectives as of
from lightning_distill.data import BucketBatchSampler, LanguageModelData, TextClassificationData, train_tokenizer
from lightning_distill.early_exit import Confidence, Entropy, Margin, Patience, calibrate, make_ramps
from lightning_distill.optim import build_lr_scheduler, build_optimizer, parameter_groups, recommended_lr
from lightning_distill.quantization import gptq_layer, quantize, quantize_int8
from tests.helpers.models import batch, bert

EXAMPLES = int(os.environ.get("EXAMPLES", "25"))  # of each call
torch.manual_seed(0)
NET = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
BERT = bert()


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD(NET.parameters(), lr=0.1)


def early_exit() -> Any:
    from lightning_distill.early_exit import EarlyExitModel

    model = bert()
    return EarlyExitModel(model, make_ramps(model))


#: What is called, and its arguments that are not tried out, made anew for each try.
CALLS: dict[Callable[..., Any], dict[str, Callable[[], Any]]] = {
    **{
        getattr(of, name): {}
        for name in of.__all__
        if name not in ("Loss", "LinearSchedule", "CosineSchedule", "StepSchedule", "UncertaintyBalance",
                        "GradientNormBalance", "FeatureObjective")
    },
    of.LinearSchedule: {"start": lambda: 1.0, "end": lambda: 0.0},
    of.CosineSchedule: {"start": lambda: 1.0, "end": lambda: 0.0},
    of.StepSchedule: {"values": lambda: [1.0, 2.0], "milestones": lambda: [0.5]},
    of.UncertaintyBalance: {"names": lambda: ["a", "b"]},
    of.GradientNormBalance: {"names": lambda: ["a", "b"]},
    **{getattr(callbacks, name): {} for name in callbacks.__all__},
    callbacks.TeacherCache: {"path": lambda: "cache"},
    BucketBatchSampler: {"lengths": lambda: [3, 4, 5, 6], "batch_size": lambda: 2},
    TextClassificationData: {},
    LanguageModelData: {},
    train_tokenizer: {"texts": lambda: ["a good film", "a bad film"]},
    parameter_groups: {"module": lambda: NET, "lr": lambda: 0.1},
    build_optimizer: {"module": lambda: NET},
    build_lr_scheduler: {
        "module": L.LightningModule, "optimizer": optimizer, "num_training_steps": lambda: 10,
    },
    recommended_lr: {},
    student_from_teacher: {"teacher": lambda: BERT},
    make_ramps: {"student": bert},
    calibrate: {"model": early_exit, "dataloader": lambda: [batch("classification", 8)]},
    Confidence: {}, Entropy: {}, Margin: {}, Patience: {},
    gptq_layer: {"weight": lambda: torch.randn(4, 32), "hessian": lambda: torch.eye(32), "group_size": lambda: 32},
    quantize: {
        "model": lambda: nn.Sequential(nn.Linear(32, 32)), "dataloader": lambda: [torch.randn(4, 32)],
        "group_size": lambda: 32, "num_samples": lambda: 4,
    },
    quantize_int8: {"model": lambda: nn.Sequential(nn.Linear(4, 4))},
    DistillationModule: {"teacher": lambda: nn.Linear(4, 2), "student": lambda: nn.Linear(4, 2)},
}  # fmt: skip
#: Objects that stand for themselves, which no check of a value could judge.
OPAQUE = {"tokenizer", "metrics", "optimizer", "lr_scheduler", "forward", "calibration", "dataloader", "texts"}
ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-3, 3), st.floats(), st.sampled_from([math.nan, math.inf, -math.inf, 1e308]),
    st.text(max_size=3), st.binary(max_size=2),
    st.lists(st.one_of(st.integers(-1, 2), st.text(max_size=2)), max_size=2),
    st.dictionaries(st.text(max_size=2), st.integers(-1, 1), max_size=1), st.builds(object), st.just({1}), st.just(1j),
)  # fmt: skip


def arguments(call: Callable[..., Any]) -> list[str]:
    parameters = inspect.signature(call).parameters.values()
    return [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD) and p.name not in OPAQUE]


def cannot_be_right(value: object) -> bool:
    return isinstance(value, (complex, bytes, set)) or type(value) is object or value != value


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # an odd string may be the name of a folder


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
@settings(deadline=None, max_examples=EXAMPLES, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_odd_arguments_are_refused_by_name(call: Callable[..., Any], data: st.DataObject) -> None:
    names = arguments(call)
    if not names:
        return
    name = data.draw(st.sampled_from(names))
    value = data.draw(ODD)
    given_ = {key: make() for key, make in CALLS[call].items()}
    refused = None
    if isinstance(value, str) and name in ("student", "teacher", "model"):
        return  # the hub would be asked for it
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            call(**{**given_, name: value})
        except (ValueError, TypeError, ImportError) as error:
            refused = str(error)
    if refused is not None:
        assert f"`{name}`" in refused or f"`{name}[" in refused, f"{name}={value!r}: {refused}"
    assert refused or not cannot_be_right(value), f"{name}={value!r} was taken"
