"""Every example in a docstring runs, and everything a user is meant to call without the trainer has one."""

import doctest
import importlib
import pkgutil

import pytest

import wcitrain

MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(wcitrain.__path__, "wcitrain.")
    if not module.name.endswith("__main__")
)


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    """An example that fails is worse than none: it is the first thing a user tries."""
    results = doctest.testmod(importlib.import_module(name))
    assert results.failed == 0


@pytest.mark.parametrize(
    "name",
    [
        "pgd",
        "fgsm",
        "msd",
        "Attack",
        "project",
        "pgd_at",
        "trades",
        "mart",
        "alp",
        "TRADES",
        "MART",
        "ALP",
        "FGSMRS",
        "GradAlign",
        "FreeAT",
        "RotationAT",
        "UnionAT",
        "Standard",
        "PGDAT",
        "WithInputRegularizer",
        "CURE",
        "InputGradient",
        "CatastrophicOverfittingGuard",
        "SAM",
        "ASAM",
        "AWP",
        "VaSSO",
        "GSAM",
        "GradientNorm",
        "CRSAM",
        "WCIAdversary",
        "WCI",
        "UniformNoise",
        "NoiseStability",
        "RWP",
        "WCIPenalty",
        "FrobeniusTracePenalty",
    ],
)
def test_what_is_used_without_the_trainer_has_an_example(name):
    """Found by users through help(), and kept right by the test above."""
    assert name in wcitrain.__all__
    assert ">>>" in getattr(wcitrain, name).__doc__
