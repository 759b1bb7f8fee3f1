"""The run log, the choice of trackers, and the trackers themselves, run for real."""

import json
import math
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from wcitrain import files
from wcitrain.tracking import append, choose_trackers, end_trackers, start_trackers, truncate

METRICS = {"train/loss": 1.25, "wci/total": 7.0, "wci/conv1": 3.0}


@pytest.fixture(autouse=True)
def _bare_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Hide the W&B settings and the home of whoever runs the tests."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("WANDB_SILENT", "true")


def read_lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_every_line_is_on_the_disk_as_soon_as_it_is_appended(tmp_path):
    """A killed run would lose epochs; rounded floats would not match a resumed run; `NaN` is not JSON."""
    log = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        append(log, {"step": step, "loss": 0.1 + 0.2, "layers": {"a": (1, 1e-300, math.nan, -math.inf)}})
        assert len(read_lines(tmp_path)) == step
    layers = {"a": [1, 1e-300, None, None]}
    assert read_lines(tmp_path)[-1] == {"step": 2, "loss": 0.1 + 0.2, "layers": layers}
    with pytest.raises(TypeError, match="Tensor is not JSON"):
        append(log, {"step": 3, "loss": [1.0, torch.tensor(1.0)]})
    assert len(read_lines(tmp_path)) == 2  # half a line would damage the file
    files.write_json(tmp_path / "summary.json", {"wci": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"wci": None}


def test_truncate_drops_later_lines_and_an_unfinished_one_and_refuses_other_damage(tmp_path):
    """A resumed run would log steps twice, glue its line to half of an old one, or hide that one is gone."""
    log = tmp_path / "metrics.jsonl"
    truncate(log, 0)  # nothing logged yet: nothing to do
    for step in (10, 20, 30):
        append(log, {"step": step})
    log.write_text(log.read_text() + '{"step": 4')
    truncate(log, 20)
    append(log, {"step": 30, "again": True})
    assert read_lines(tmp_path) == [{"step": 10}, {"step": 20}, {"step": 30, "again": True}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: got .*; expected a JSON object with a step"):
        truncate(log, 1)
    assert len(log.read_text().splitlines()) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_crash_while_replacing_leaves_the_former_file(error, tmp_path, monkeypatch):
    """A run killed while it writes its summary, or resumes, would lose the results it had."""
    append(tmp_path / "metrics.jsonl", {"step": 1})
    files.write_json(tmp_path / "summary.json", {"status": "first"})

    def crash(*_):
        raise error

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(error):
        files.write_json(tmp_path / "summary.json", {"status": "second"})
    with pytest.raises(error):
        truncate(tmp_path / "metrics.jsonl", 0)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "first"}
    assert read_lines(tmp_path) == [{"step": 1}]


def mode(wandb: str) -> str:
    return choose_trackers(wandb, tensorboard=False)[1]


def test_auto_goes_online_only_with_a_key(monkeypatch, tmp_path):
    """Without a key an online run stops at a prompt, on a cluster for ever; nobody may upload unasked."""
    keys = tmp_path / "home" / ".netrc"
    keys.parent.mkdir()
    assert mode("auto") == "offline"
    for machine in ("machine other.org", "default", "machine api.wandb.ai", "no machine"):
        keys.write_text(f"{machine} login user password x\n")
        keys.chmod(0o600)
        assert mode("auto") == ("online" if machine == "machine api.wandb.ai" else "offline")
    monkeypatch.setenv("WANDB_API_KEY", "x")
    assert mode("auto") == "online"
    for asked in ("online", "offline", "disabled"):  # the environment wins over auto, not over the recipe
        monkeypatch.setenv("WANDB_MODE", asked)
        assert (mode("auto"), mode("offline")) == (asked, "offline")
    monkeypatch.setenv("WANDB_MODE", "ofline")
    with pytest.raises(ValueError, match=r"WANDB_MODE: got 'ofline'; expected"):
        mode("auto")


def test_a_missing_tracker_stops_and_auto_warns(monkeypatch):
    """Accelerate drops a missing tracker silently: the user would wait for a page that never comes."""
    assert choose_trackers("disabled", tensorboard=False) == ([], "disabled")
    assert choose_trackers("offline", tensorboard=True) == (["wandb", "tensorboard"], "offline")
    for name in ("wandb", "tensorboard", "tensorboardX"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.warns(UserWarning, match="without wandb installed"):
        assert mode("auto") == "disabled"
    with pytest.raises(ModuleNotFoundError, match=r"tracking\.wandb: .*`pip install wandb`"):
        mode("online")
    with pytest.raises(ModuleNotFoundError, match=r"tracking\.tensorboard: .*`pip install tensorboard`"):
        choose_trackers("disabled", tensorboard=True)


def run_trackers(accelerator: Accelerator, folder: Path) -> str | None:
    """Track one epoch and return the W&B id, if W&B took part."""
    start_trackers(accelerator, "tests", folder, {"optimizer.lr": 0.1, "layers": "[1]"}, "offline")
    runs = [tracker.tracker for tracker in accelerator.trackers if tracker.name == "wandb"]
    accelerator.log(METRICS, step=20)
    end_trackers(accelerator)
    end_trackers(accelerator)
    assert accelerator.trackers == []  # a second finish would fail on some trackers
    return runs[0].id if runs else None


def test_wandb_offline_keeps_the_id_of_the_run(tmp_path):
    """A resumed run would open a second page, and a new run in a new folder write on the old one's."""
    accelerators = [Accelerator(cpu=True, log_with=["wandb"]) for _ in range(3)]
    first, resumed, elsewhere = map(run_trackers, accelerators, (tmp_path / name for name in ("a", "a", "b")))
    assert first == resumed != elsewhere
    (stored,) = (tmp_path / "b").glob("wandb/offline-run-*/run-*.wandb")
    end = time.monotonic() + 30  # older versions of wandb write from a process of their own
    while not stored.stat().st_size and time.monotonic() < end:
        time.sleep(0.1)
    assert stored.stat().st_size > 0


def test_tensorboard_stores_every_number_at_its_step(tmp_path):
    """Numbers return as logged, and the settings beside them."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_trackers(Accelerator(cpu=True, log_with=["tensorboard"], project_dir=tmp_path), tmp_path)
    events = EventAccumulator(str(tmp_path / "tests"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS)
    for name, value in METRICS.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (20, value)  # all exact in float32
    (settings,) = tmp_path.rglob("hparams.yml")
    assert "optimizer.lr: 0.1" in settings.read_text()
    assert not (tmp_path / "wandb").exists()


def test_without_trackers_nothing_is_written(tmp_path):
    """A run that uses neither leaves nothing of them behind."""
    assert run_trackers(Accelerator(cpu=True), tmp_path) is None
    assert list(tmp_path.iterdir()) == []
