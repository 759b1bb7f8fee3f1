"""The run log, the choice of trackers, and the trackers themselves, run for real."""

import importlib.util
import json
import math
import sys
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from wcitrain import files, tracking
from wcitrain.tracking import RunLog, choose_trackers, end_trackers, log_epoch, start_trackers

METRICS = {
    "step": 20,
    "train/loss": 1.25,
    "note": "text is not a number",
    "missing": None,
    "wci/total": 7.0,
    "wci/total_stderr": 0.5,
    "wci/conv1": 3.0,
    "wci/layer1.0.conv1": 4.0,
    "curvature/trace/conv1": 2.0,
    "frobenius/conv1": 4.5,
}


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
    log = RunLog(tmp_path / "run")
    for step in (1, 2):
        log.append({"step": step, "loss": 0.1 + 0.2, "layers": {"a": (1, 1e-300, math.nan, -math.inf)}})
        assert len(read_lines(tmp_path / "run")) == step
    layers = {"a": [1, 1e-300, None, None]}
    assert read_lines(tmp_path / "run")[-1] == {"step": 2, "loss": 0.1 + 0.2, "layers": layers}
    files.write_json(tmp_path / "summary.json", {"wci": math.nan})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"wci": None}


def test_a_line_without_a_step_or_with_a_tensor_is_refused_and_not_written(tmp_path):
    """It could never be dropped on resume and would appear twice; half a line would damage the file."""
    log = RunLog(tmp_path)
    with pytest.raises(ValueError, match=r'metrics\["step"\]: got None; expected an int'):
        log.append({"loss": 1.0})
    with pytest.raises(TypeError, match="Tensor is not JSON"):
        log.append({"step": 1, "loss": [1.0, torch.tensor(1.0)]})
    assert not (tmp_path / "metrics.jsonl").exists()


def test_truncate_drops_later_lines_and_an_unfinished_one(tmp_path):
    """A resumed run would log the same steps twice, or glue its first line to half of an old one."""
    log = RunLog(tmp_path)
    log.truncate(0)  # nothing logged yet: nothing to do
    for step in (10, 20, 30):
        log.append({"step": step})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4')
    log.truncate(20)
    log.append({"step": 30, "again": True})
    assert read_lines(tmp_path) == [{"step": 10}, {"step": 20}, {"step": 30, "again": True}]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_truncate_refuses_damage_before_the_last_line(tmp_path):
    """Dropping such a line silently would leave a gap that looks like an epoch without evaluation."""
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"line 2: got .*; expected a JSON object with a step"):
        RunLog(tmp_path).truncate(1)
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_crash_while_replacing_leaves_the_former_file(error, tmp_path, monkeypatch):
    """A run killed while it writes its summary, or resumes, would lose the results it had."""
    log = RunLog(tmp_path)
    log.append({"step": 1})
    files.write_json(tmp_path / "summary.json", {"status": "first"})

    def crash(*_):
        raise error

    monkeypatch.setattr(files.os, "replace", crash)
    with pytest.raises(error):
        files.write_json(tmp_path / "summary.json", {"status": "second"})
    with pytest.raises(error):
        log.truncate(0)
    assert json.loads((tmp_path / "summary.json").read_text()) == {"status": "first"}
    assert read_lines(tmp_path) == [{"step": 1}]


def mode(wandb: str) -> str:
    """Return the W&B mode that is chosen."""
    return choose_trackers(wandb, tensorboard=False)[1]


def test_auto_goes_online_only_with_a_key(monkeypatch, tmp_path):
    """Without a key an online run stops at a prompt, on a cluster for ever; nobody may upload unasked."""
    home = tmp_path / "home"
    home.mkdir()
    assert mode("auto") == "offline"
    entries = {"machine other.org": "offline", "default": "offline", "machine api.wandb.ai": "online"}
    for machine, expected in entries.items():
        (home / ".netrc").write_text(f"{machine} login user password x\n")
        (home / ".netrc").chmod(0o600)
        assert mode("auto") == expected
    (home / ".netrc").write_text("not a netrc file")
    assert mode("auto") == "offline"
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
    with pytest.warns(UserWarning, match="wandb is not installed"):
        assert mode("auto") == "disabled"
    with pytest.raises(ModuleNotFoundError, match=r"tracking\.wandb: got 'online'; .*`pip install 'wandb'`"):
        mode("online")
    with pytest.raises(
        ModuleNotFoundError, match=r"tracking\.tensorboard: got True; .*wcitrain\[tensorboard\]"
    ):
        choose_trackers("disabled", tensorboard=True)


def run_trackers(accelerator: Accelerator, folder: Path) -> str | None:
    """Track one epoch and return the W&B id, if W&B took part."""
    config = {"optimizer": {"lr": 0.1, "base": "sgd"}, "layers": ["a", "b"], "path": None, "amp": True}
    start_trackers(accelerator, "tests", folder, config, "offline")
    runs = [tracker.tracker for tracker in accelerator.trackers if tracker.name == "wandb"]
    log_epoch(accelerator, METRICS, step=20)
    end_trackers(accelerator)
    end_trackers(accelerator)
    assert accelerator.trackers == []  # a second finish would fail on some trackers
    return runs[0].id if runs else None


def test_wandb_offline_keeps_the_id_of_the_run_and_writes_the_layer_table(tmp_path):
    """A resumed run would open a second page, and a new run in a new folder write on the old one's."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        accelerators = [Accelerator(cpu=True, log_with=["wandb"]) for _ in range(3)]
        places = [tmp_path / name for name in ("a", "a", "b")]
        first, resumed, elsewhere = map(run_trackers, accelerators, places)
    assert not [str(warning.message) for warning in caught]
    assert first == resumed != elsewhere
    (stored,) = (tmp_path / "b").glob("wandb/offline-run-*/run-*.wandb")
    assert stored.stat().st_size > 0
    (table,) = (tmp_path / "b").rglob("*.table.json")
    assert json.loads(table.read_text()) == {
        "columns": ["layer", "wci", "trace", "frobenius"],
        "data": [["conv1", 3.0, 2.0, 4.5], ["layer1.0.conv1", 4.0, None, None]],
    }


def test_tensorboard_stores_every_number_at_its_step(tmp_path):
    """Text, None and nested settings make TensorBoard raise or write rubbish; numbers return as logged."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run_trackers(Accelerator(cpu=True, log_with=["tensorboard"], project_dir=tmp_path), tmp_path)
    events = EventAccumulator(str(tmp_path / "tests"))
    events.Reload()
    numbers = {name: value for name, value in METRICS.items() if isinstance(value, (int, float))}
    assert set(events.Tags()["scalars"]) == set(numbers)
    assert not [tag for tag in events.Tags()["tensors"] if tag.startswith("note")]
    for name, value in numbers.items():
        (event,) = events.Scalars(name)
        assert (event.step, event.value) == (20, value)  # all exact in float32
    (settings,) = tmp_path.rglob("hparams.yml")
    assert "optimizer.lr: 0.1" in settings.read_text()
    assert not (tmp_path / "wandb").exists()


def test_without_trackers_nothing_is_written_and_neither_is_imported(tmp_path, monkeypatch):
    """Both are optional and slow to import; a run that uses neither must start without them."""
    assert run_trackers(Accelerator(cpu=True), tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    for name in ("wandb", "tensorboard", "tensorboardX", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    spec = importlib.util.spec_from_file_location("tracking_afresh", tracking.__file__)
    afresh = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(afresh)
    assert afresh.choose_trackers("disabled", tensorboard=False) == ([], "disabled")
