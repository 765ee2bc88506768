"""Thresholds from data: the promise holds, and what cannot be promised is said."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binom
from torch import Tensor

from lightning_distill.early_exit import (
    AnyOf,
    Confidence,
    Criterion,
    EarlyExitModel,
    Entropy,
    LearnedGate,
    Margin,
    Patience,
    calibrate,
    make_ramps,
)
from lightning_distill.early_exit.answers import Answers, collect
from lightning_distill.early_exit.calibration import choose
from lightning_distill.early_exit.guarantee import harm_p_value, rows_needed
from lightning_distill.early_exit.search import exits_of, fit_temperature, threshold_path
from tests.early_exit.models import Stack, early, student
from tests.helpers.models import tokens

LAYERS = [0, 1, 2, 3]


def population(rows: int, *, seed: int = 0, noise: tuple[float, ...] = (2.5, 1.5, 1.0, 0.8)) -> Answers:
    """Rows of two classes that deeper exits see more clearly; lower ones are too sure of themselves."""
    generator = torch.Generator().manual_seed(seed)
    signal = 3 * torch.randn(rows, generator=generator)
    seen = torch.stack([signal + level * torch.randn(rows, generator=generator) for level in noise])
    labels = (signal + 0.5 * torch.randn(rows, generator=generator) > 0).long()
    return Answers(torch.stack([-seen, seen], -1), None, labels, torch.arange(rows))


def applied(report: Any, answers: Answers, criterion: Criterion | None = None) -> tuple[float, float]:
    """Drop and mean depth of the chosen thresholds on other rows."""
    criterion = criterion or Confidence()
    temperatures = [report.temperatures[layer] for layer in LAYERS[:-1]]
    thresholds = torch.tensor([report.thresholds.get(layer, math.inf) for layer in LAYERS[:-1]])
    leaves = exits_of(answers.measures(criterion, temperatures), thresholds)
    right = (answers.logits.argmax(-1) == answers.labels).float()
    drop = right[-1].mean() - right.gather(0, leaves[None]).mean()
    return float(drop), float((leaves + 1).float().mean())


def test_over_200_random_splits_the_promise_is_broken_no_more_often_than_promised() -> None:
    everybody = population(20_000)
    broken, depths = 0, []
    for split in range(200):
        generator = torch.Generator().manual_seed(split)
        rows = everybody.take(torch.randperm(len(everybody), generator=generator)[:600])
        report = choose(
            rows, Confidence(), LAYERS, max_drop=0.02, confidence=0.9, seed=split, path_size=15
        )  # fmt: skip
        assert report.guarantee["holds"]
        drop, depth = applied(report, everybody)
        broken += drop > 0.02
        depths.append(depth)
    assert broken <= 0.1 * 200
    assert sum(depths) / 200 < 0.75 * len(LAYERS)  # a promise is easily kept by leaving nowhere


@settings(deadline=None)
@given(rows=st.integers(1, 3000), rate=st.floats(0.001, 0.5), spoiled=st.integers(0, 100))
def test_the_p_value_is_the_exact_binomial_one(rows: int, rate: float, spoiled: int) -> None:
    spoiled = min(spoiled, rows)
    harm = torch.cat([torch.ones(spoiled), torch.zeros(rows - spoiled)])
    assert harm_p_value(harm, rate) == pytest.approx(binom.cdf(spoiled, rows, rate), rel=1e-6, abs=1e-12)
    if spoiled < rows:
        upper = beta.ppf(0.95, spoiled + 1, rows - spoiled)  # Clopper and Pearson
        assert (harm_p_value(harm, rate) <= 0.05) == (upper <= rate) or upper == pytest.approx(rate, rel=1e-6)


def test_a_share_of_harm_is_promised_by_hoeffding_and_bentkus() -> None:
    harm = torch.rand(400, generator=torch.Generator().manual_seed(0)) * 0.1
    assert harm_p_value(harm, 0.02) == pytest.approx(1.0)
    assert harm_p_value(harm, 0.10) < 0.05
    # For rows that happen to have 0 and 1 only but one half, it is near the exact one and not below it.
    ones = torch.cat([torch.ones(5), torch.zeros(395)])
    mixed = torch.cat([ones[:-2], torch.tensor([0.5, 0.5])])
    assert harm_p_value(ones, 0.04) <= harm_p_value(mixed, 0.04) < 0.2


@pytest.mark.parametrize(("drop", "confidence", "rate"), [(0.01, 0.95, 0.0), (0.02, 0.9, 0.005), (0.1, 0.99, 0.04)])
def test_the_rows_needed_are_enough_and_one_less_is_not(drop: float, confidence: float, rate: float) -> None:
    needed = rows_needed(drop, confidence, rate)
    assert needed is not None
    for rows, enough in ((needed, True), (needed - 1, False)):
        assert bool(binom.cdf(math.ceil(rows * rate), rows, drop) <= 1 - confidence) is enough


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(
    ("drop", "rate"),
    [(0.005, 0.004), (0.01, 0.002), (0.02, 0.0), (0.32, 0.3), (0.1, 0.08), (0.03, 0.0123), (0.5, 0.01), (0.07, 0.05)],
)
def test_from_the_rows_needed_on_every_number_is_enough(drop: float, rate: float, confidence: float) -> None:
    needed = rows_needed(drop, confidence, rate)
    assert needed is not None
    rows = np.arange(1, 3 * needed + 100)
    harmed = np.array([math.ceil(count * rate) for count in rows.tolist()])
    short = rows[binom.cdf(harmed, rows, drop) > 1 - confidence]
    assert needed == (short[-1] + 1 if len(short) else 1)


def test_the_path_goes_from_careful_to_fast_and_beats_one_threshold_for_all() -> None:
    answers = population(2000, noise=(3.0, 0.9, 0.85, 0.8))
    measures = answers.measures(Confidence(), [1.0] * 3)
    losses = answers.harm()
    depths = torch.tensor([1.0, 2.0, 3.0, 4.0])

    def costs(thresholds: Tensor) -> tuple[float, float]:
        leaves = exits_of(measures, thresholds)
        return float(depths[leaves].mean()), float(losses.gather(0, leaves[None]).mean())

    path = [costs(thresholds) for thresholds in threshold_path(measures, losses, depths)]
    assert all(a[0] > b[0] and a[1] <= b[1] + 1e-3 for a, b in itertools.pairwise(path))
    single = [costs(torch.full((3,), t)) for t in torch.linspace(0.5, 0.999, 40).tolist()]
    for depth, loss in single:
        if 0.001 < loss < 0.05:
            assert min(d for d, at in path if at <= loss + 2e-3) <= depth


def test_temperature_scaling_lowers_the_calibration_error() -> None:
    answers = population(4000)
    report = choose(answers, Confidence(), LAYERS, max_drop=0.02, confidence=0.9)
    before, after = report.calibration_error[0]
    assert after < 0.5 * before
    assert report.temperatures[0] > 1.5
    logits = answers.logits[0].clone()
    logits[:10] = math.nan
    whole = fit_temperature(answers.logits[0], answers.labels)
    assert fit_temperature(logits, answers.labels) == pytest.approx(whole, rel=0.1)


@pytest.mark.parametrize("criterion", [Confidence(), Entropy(), Margin(), Patience()], ids=str)
def test_every_criterion_gets_thresholds_that_the_model_keeps(criterion: Criterion) -> None:
    model = early(student(num_labels=3), criterion=Confidence())
    net = model.student
    model = EarlyExitModel(net, net.ramps, criterion=criterion)
    data = []
    for seed in range(4):
        batch = tokens(100, 10, seed=seed)
        data.append({**batch, "labels": net(**batch).logits.argmax(-1)})
    report = calibrate(model, data, max_drop=0.9, confidence=0.9)
    assert report.guarantee["holds"]
    assert report.mean_depth < 4
    answers = collect(model, data)
    logits, exits = (torch.cat(parts) for parts in zip(*(model.predict(batch) for batch in data), strict=True))
    # What was found offline, on all rows, is what the model does.
    temperatures = [model.temperatures[layer] for layer in LAYERS[:-1]]
    sign = 1 if criterion.rising else -1
    thresholds = torch.tensor([sign * model.thresholds.get(layer, sign * math.inf) for layer in LAYERS[:-1]])
    if criterion.remembers:
        thresholds = thresholds - 0.5
    assert (exits == exits_of(answers.measures(criterion, temperatures), thresholds)).float().mean() > 0.99
    assert logits.shape == (400, 3)


@pytest.mark.parametrize("criterion", [Confidence(), Patience()], ids=str)
def test_only_the_exits_that_are_named_are_used(criterion: Criterion) -> None:
    model = early(student(num_labels=3), criterion=Confidence())
    net = model.student
    model = EarlyExitModel(net, net.ramps, criterion=criterion)
    batch = tokens(400, 10)
    data = [{**batch, "labels": net(**batch).logits.argmax(-1)}]
    report = calibrate(model, data, exits=[2, 0], max_drop=0.9)
    assert set(model.thresholds) <= {0, 2}
    assert list(report.exit_share) == list(report.accuracy) == [0, 2, 3]
    every, two = net.ramps, make_ramps(net, [0, 2])
    for layer in ("0", "2"):
        two[layer].load_state_dict(every[layer].state_dict())
    alone = EarlyExitModel(net, two, criterion=criterion)
    # As if there were no other ramps.
    assert calibrate(alone, data, max_drop=0.9) == report
    assert set(alone.predict(batch).exit_layer.unique().tolist()) <= {0, 2, 3}


def test_gates_and_tokens_are_calibrated_too() -> None:
    net = student(num_labels=3)
    gated = EarlyExitModel(net, make_ramps(net, criterion=LearnedGate()))
    batch = tokens(300, 10)
    report = calibrate(gated, [{**batch, "labels": net(**batch).logits.argmax(-1)}], max_drop=0.8)
    assert report.guarantee["holds"]
    tagger = student(head="TokenClassification", num_labels=3)
    model = EarlyExitModel(tagger, make_ramps(tagger))
    labels = tagger(**batch).logits.argmax(-1).masked_fill(batch["attention_mask"] == 0, -100)
    report = calibrate(model, [{**batch, "labels": labels}], max_drop=0.9)
    assert report.metric_full == 1.0
    assert report.guarantee["rows"] == 240  # sequences are independent, tokens are not


def test_too_few_rows_are_said_with_the_number_and_nothing_leaves() -> None:
    answers = population(300, noise=(0.9, 0.8, 0.8, 0.8))
    with pytest.warns(UserWarning, match=r"300 rows cannot, so nothing leaves early; about \d+ rows are needed"):
        report = choose(answers, Confidence(), LAYERS, max_drop=0.005, confidence=0.95)
    assert report.thresholds == {}
    assert report.mean_depth == 4
    assert report.guarantee["holds"] is False
    assert report.guarantee["rows_needed"] >= math.ceil(598 / 0.8)
    more = population(2 * report.guarantee["rows_needed"], seed=1, noise=(0.9, 0.8, 0.8, 0.8))
    assert choose(more, Confidence(), LAYERS, max_drop=0.005, confidence=0.95).guarantee["holds"]


def test_without_labels_the_promise_is_about_the_full_models_answers() -> None:
    model = early(Stack(), layers="body")
    report = calibrate(model, [torch.randn(400, 8)], max_drop=0.9)
    assert report.metric_full == 1.0
    assert 1 - report.metric_early <= 0.9


def test_report_and_picture_are_written_and_load(tmp_path: Path) -> None:
    net = student(num_labels=3)
    model = EarlyExitModel(net, make_ramps(net))
    batch = tokens(300, 10)
    report = model.calibrate([{**batch, "labels": net(**batch).logits.argmax(-1)}], max_drop=0.9, folder=tmp_path)
    written = json.loads((tmp_path / "early_exit.json").read_text())
    assert written["calibration"]["guarantee"]["max_drop"] == 0.9
    assert written["calibration"]["frontier"][0][0] == 4.0
    assert {int(layer): value for layer, value in written["thresholds"].items()} == report.thresholds
    assert (tmp_path / "early_exit.png").read_bytes()[:4] == b"\x89PNG"
    model.save_pretrained(tmp_path)
    loaded = EarlyExitModel.from_pretrained(tmp_path)
    assert loaded.thresholds == model.thresholds
    assert loaded.temperatures == model.temperatures
    for one, other in zip(loaded.predict(batch), model.predict(batch), strict=True):
        torch.testing.assert_close(one, other)


def test_bad_input_is_refused() -> None:
    model = early(student(num_labels=3))
    batch = tokens(20, 8)
    with pytest.raises(ValueError, match="at least two classes, but all 20 have the label 1"):
        model.calibrate([{**batch, "labels": torch.ones(20, dtype=torch.long)}])
    with pytest.raises(ValueError, match="to give calibration rows, but got none"):
        model.calibrate([])
    for exits in ([], [0, 3], [7]):
        with pytest.raises(ValueError, match=r"`exits` to name exits of \[0, 1, 2\]"):
            model.calibrate([batch], exits=exits)
    with pytest.raises(ValueError, match="`max_drop`"):
        model.calibrate([batch], max_drop=2.0)
    either = EarlyExitModel(model.student, criterion=AnyOf(Confidence(0.9), Patience(2)))
    with pytest.raises(ValueError, match="one criterion"):
        either.calibrate([batch])
