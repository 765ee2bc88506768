"""What was imported from a module that has moved is there for a release, with a warning that says where it is."""

import importlib
import importlib.util

import pytest

from lightning_distill.moved import MOVED


@pytest.mark.parametrize(
    ("old", "name"),
    [
        ("adapters", "frozen_base"),
        ("attention", "Attention"),
        ("cache", "SignalStore"),
        ("cache", "row_keys"),
        ("checkpoint", "newest_checkpoint"),
        ("class_names", "class_order"),
        ("ensemble", "TeacherEnsemble"),
        ("initialization", "initialize"),
        ("inputs", "InputCheck"),
        ("layer_map", "layer_map"),
        ("precision", "load_teacher"),
        ("pretrained", "load_pretrained"),
        ("student", "student_from_teacher"),
        ("teacher", "freeze"),
        ("teacher", "evaluating"),
        ("vocabulary", "find_head"),
        ("callbacks.finite_loss", "FiniteLoss"),
        ("functional.lr_suggestion", "lr_suggestion"),
        ("preflight", "check_vocabulary"),
        ("tasks", "labels_of"),
        ("tasks", "call_model"),
        ("signals", "near"),
    ],
)
def test_an_old_name_is_the_new_one(old: str, name: str) -> None:
    module = importlib.import_module(f"lightning_distill.{old}")
    with pytest.warns(DeprecationWarning, match=rf"`lightning_distill\.{old}\.{name}` is in `lightning_distill\."):
        found = getattr(module, name)
    assert found is getattr(importlib.import_module(found.__module__), name)


@pytest.mark.parametrize("old", MOVED)
def test_every_new_place_is_there(old: str) -> None:
    names = importlib.import_module(f"lightning_distill.{old}").__all__
    for place in MOVED[old]:
        module = importlib.import_module(f"lightning_distill.{place}")
        assert any(getattr(module, name, None) is not None for name in names), place


def test_it_is_found_as_modules_are() -> None:
    import lightning_distill.parallel

    assert importlib.util.find_spec("lightning_distill.stops") is not None
    with pytest.warns(DeprecationWarning, match="training.parallel"):
        assert callable(lightning_distill.parallel.shard)
    names: dict[str, object] = {}
    with pytest.warns(DeprecationWarning, match="teachers.ensemble"):
        exec("from lightning_distill.ensemble import *", names)
    assert "TeacherEnsemble" in names


def test_a_name_that_never_was_is_no_attribute() -> None:
    with pytest.raises(ImportError, match="cannot import name 'nothing'"):
        from lightning_distill.ensemble import nothing  # noqa: F401
