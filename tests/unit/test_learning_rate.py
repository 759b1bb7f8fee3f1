"""Learning-rate schedules by hand, and what every small method promises: a round trip, a pickle, a label."""

import pickle

import pytest

from wcitrain.averaging import AVERAGES
from wcitrain.learning_rate import SCHEDULES, Constant, Cosine, OneCycle, Piecewise
from wcitrain.method import Choice

SETTINGS = {"swa": {"start_epoch": 3}}  # of the methods that have no default for something


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (Constant(), [1, 1, 1, 1, 1]),
        (Constant(warmup_epochs=4), [0, 0.625, 1, 1, 1]),
        (Piecewise([5, 8], gamma=0.1), [1, 1, 0.1, 0.1, 0.01]),
        (Piecewise([5], gamma=0.5, warmup_epochs=10), [0, 0.25, 0.25, 0.375, 0.5]),
        (Cosine(), [1, 0.8536, 0.5, 0.1464, 0]),
        (Cosine(final_fraction=0.1, warmup_epochs=5), [0, 0.5, 1, 0.55, 0.1]),
        (OneCycle(), [0, 0.625, 0.8333, 0.4167, 0]),
        (OneCycle(peak_epoch=5, final_fraction=0.1), [0, 0.5, 1, 0.55, 0.1]),
    ],
)
def test_learning_rates_follow_their_schedule(schedule, expected):
    """At 0, 1/4, 1/2, 3/4 and all of ten epochs."""
    assert [schedule.factor(e, 10) for e in (0, 2.5, 5, 7.5, 10)] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("table", [SCHEDULES, AVERAGES], ids=["schedules", "averages"])
def test_methods_come_back_from_recipes_and_pickles_and_have_a_label(table):
    """A resolved recipe would train something else than the run, or a figure would show a class name."""
    choice = Choice(table)
    for name, kind in table.items():
        made = kind(**SETTINGS.get(name, {}))
        assert choice.write(made)["name"] == name
        assert choice.read(choice.write(made)) == made == pickle.loads(pickle.dumps(made))
        assert kind.label
        assert "{" not in str(made)
    assert Choice(SCHEDULES).read({"name": "piecewise", "milestones": [1, 2]}) == Piecewise((1.0, 2.0))
