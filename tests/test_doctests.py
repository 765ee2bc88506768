"""Every example in a public docstring runs."""

import doctest
import importlib
import pkgutil

import pytest

import lightning_distill

NAMES = [module.name for module in pkgutil.walk_packages(lightning_distill.__path__, "lightning_distill.")]


@pytest.mark.parametrize("name", ["lightning_distill", *NAMES])
def test_doctests(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert result.failed == 0, f"{result.failed} of {result.attempted} examples of {name} failed; see the output above"
