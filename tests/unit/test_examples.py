"""Every example in a docstring runs, and everything a user is meant to call without the trainer has one."""

import doctest
import importlib
import pkgutil

import pytest

import wcitrain

MODULES = sorted(module.name for module in pkgutil.walk_packages(wcitrain.__path__, "wcitrain."))
WITH_AN_EXAMPLE = "Attack RegularizedOptimizer correlate evaluate measure_wci"


@pytest.mark.parametrize("name", [name for name in MODULES if not name.endswith("__main__")])
def test_examples_in_docstrings_run(name):
    """An example that fails is worse than none: it is the first thing a user tries."""
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("name", WITH_AN_EXAMPLE.split())
def test_what_is_used_without_the_trainer_has_an_example(name):
    """Found through help(), kept right by the test above: one for each room."""
    assert ">>>" in getattr(wcitrain, name).__doc__
