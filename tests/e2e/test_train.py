"""The trainer end to end on digits: it learns, repeats itself, resumes bit for bit, refuses what is wrong."""

import json
import os
import re
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits
from tiny_run import TINY as BASE

from wcitrain import files
from wcitrain import train as training
from wcitrain.__main__ import main
from wcitrain.checkpoint import CheckpointError, load_checkpoint
from wcitrain.models import load_exported
from wcitrain.monitoring import NonFiniteLossError
from wcitrain.progress import StopRequest, run_folder
from wcitrain.recipe import Recipe, load_recipe, recipe_from_dict
from wcitrain.run import load, start_run
from wcitrain.train import Interrupted, finish_epoch, fit, open_run, train, train_epoch

TINY = BASE | {
    "data": {"source": "digits", "val_size": 100, "max_train": 300, "max_test": 100, "crop_padding": 1},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "train": {"epochs": 3, "batch_size": 50, "device": "cpu"},
    "evaluation": {"train_size": 100, "num_steps": 2, "step_size": 0.06},
}
METHODS = {
    "wci": ["perturbation.name=wci"],
    "penalty": ["penalty={name: wci, strength: 1e-4, schedule: {every: 2}}", "train.accumulate=2"],
    "ema": ["perturbation.name=wci", "averaging={name: ema, decay: 0.9}", "model.kwargs.drop_path_rate=0.2",
            "optimizer.name=adamw", "optimizer.lr=0.003", "train.max_norm=1.0"],
    "free, swa": ["objective={name: free, num_replays: 3}", "averaging={name: swa, start_epoch: 1}",
                  "train.eps_zero_epochs=1", "train.eps_warmup_epochs=2", "perturbation.name=awp"],
    "trades, mixing": ["objective={name: trades, num_steps: 2}", "mixing={mixup_alpha: 1, cutmix_alpha: 1}",
                       "augment={policy: cutout, cutout_size: 3}", "label_noise.share=0.2",
                       "perturbation.name=vasso", "data.num_workers=0"],
    "fgsm, guard": ["objective.name=fgsm_rs", "input_regularizer={name: input_gradient, weight: 0.01}",
                    "perturbation.name=wci_adversary"],
}  # fmt: skip
TIMES = ("seconds", "train_seconds", "images_per_second")


def tiny(tmp_path: Path, *settings: str, name: str = "tiny") -> Recipe:
    return recipe_from_dict(TINY | {"output": str(tmp_path), "name": name}, settings)


def metrics(recipe: Recipe) -> list[dict]:
    lines = (run_folder(recipe) / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMES} for line in lines]


def final_state(recipe: Recipe) -> dict:
    return load_checkpoint(run_folder(recipe) / "checkpoints")[0]


def saved_bits(recipe: Recipe) -> tuple[bytes, dict]:
    """What the last checkpoint holds, bit for bit, without the clocks and the recipe, which has the name."""
    folder = run_folder(recipe) / "checkpoints" / "last"
    state = json.loads((folder / "state.json").read_text())["state"]
    progress = {k: v for k, v in state["progress"].items() if k not in (*TIMES, "epoch_seconds")}
    return (folder / "tensors.safetensors").read_bytes(), state | {"progress": progress, "recipe": None}


def interrupt(recipe: Recipe, step: int) -> None:
    """Start a run and stop it as if Ctrl-C came during its k-th optimizer step."""
    run = open_run(recipe)

    class Pressed(StopRequest):
        is_set = property(lambda self: run.progress.step == step, lambda self, value: None)

    run.stop = Pressed()
    with pytest.raises(Interrupted, match="wcitrain train --resume"):
        train(run)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Recipe:
    """The recipe of a run that was never interrupted."""
    recipe = tiny(tmp_path_factory.mktemp("whole"), name="whole")
    fit(recipe)
    return recipe


@pytest.mark.parametrize("method", METHODS)
def test_stop_and_resume_equals_uninterrupted_bitwise(method, tmp_path):
    """Stopped amid an epoch: weights, momentum, running averages, EMA, metrics must not notice."""
    whole = tiny(tmp_path, *METHODS[method], name="whole")
    summary = fit(whole)
    parts = tiny(tmp_path, *METHODS[method], name="parts")
    interrupt(parts, 6)  # 4 steps an epoch: in the second one
    assert final_state(parts)["progress"]["step"] == 6
    resumed = fit(parts, resume=True)
    assert saved_bits(parts) == saved_bits(whole)
    assert metrics(parts) == metrics(whole)
    for key in ("last", "best", "method", "cost"):
        assert resumed[key] == summary[key]


def test_the_saved_recipe_repeats_the_run_and_another_seed_does_not(whole, tmp_path):
    """recipe.yaml in the run folder is the run; hidden randomness would make every ablation a lottery."""
    path = run_folder(whole) / "recipe.yaml"
    again, other = (load_recipe(path, [f"output={tmp_path}", *more]) for more in ([], ["seed=1"]))
    fit(again)
    fit(other)
    assert metrics(again) == metrics(whole) != metrics(other)


def test_monitoring_changes_no_number_of_the_run_and_says_how_it_measures(whole, tmp_path, capsys):
    """Strength 0 logs curvature and trains exactly the plain run."""
    monitored = tiny(tmp_path, "penalty.name=wci", name="monitored")
    fit(monitored)
    assert "penalty estimator: gauss_newton (the dry run passed)" in capsys.readouterr().out
    extra = ("running/", "curvature/negative")
    logged = [{k: v for k, v in m.items() if not k.startswith(extra)} for m in metrics(monitored)]
    assert logged == metrics(whole)
    assert any(k.startswith("running/wci/") for k in metrics(monitored)[-1])


def test_digits_are_learnt_robustly(tmp_path):
    """The whole chain has to learn: accuracies far above chance on test images nobody selected on."""
    recipe = tiny(
        tmp_path, "perturbation={name: wci, relative_size: 0.5}", "train.epochs=12", "data.max_train=800",
        "evaluation.every=6", "model.kwargs.channels=[8, 16, 16, 32]", "data.crop_padding=0",
    )  # fmt: skip
    summary = fit(recipe)
    test = summary["last"]["test"]
    assert test["clean_accuracy"] > 0.7
    assert 0.3 < test["robust_accuracy"] < test["clean_accuracy"]
    low, high = test["robust_accuracy_interval"]
    assert low < test["robust_accuracy"] < high
    assert summary["best"]["val"]["robust_accuracy"] >= summary["last"]["val"]["robust_accuracy"]
    assert [m["epoch"] for m in metrics(recipe) if "val/robust_accuracy" in m] == [6, 12]
    written = json.loads((run_folder(recipe) / "summary.json").read_text())
    assert [written[key] for key in ("status", "method", "stopped_early")] == ["finished", "WCI r=0.5", None]
    # Documented cost: PGD-2 (2+2), plain 3; the posterior adds a forward and a backward (2).
    passes, relative = {"forward_passes": 4, "backward_passes": 4}, {"relative": 10 / 7}
    assert written["cost"] == passes | relative | {"relative_to_pgd10_at": 10 / 23}


@pytest.mark.parametrize(
    ("stem", "other"), [("default", "train.gradient_checkpointing=true"), ("cifar", "model.resize_inside=12")]
)
def test_the_export_is_the_measured_model_and_test_images_are_read_at_the_end(stem, other, tmp_path):
    """What users take away must be what the table reports; nobody can select on images that nobody has read.

    timm alone cannot build the small-image stem, and leaves the normalisation out.
    """
    settings = ("train.epochs=1", "averaging={name: ema, decay: 0.5}", f"model.stem={stem}", other)
    recipe = tiny(tmp_path, *settings)
    run = open_run(recipe)
    train_epoch(run)
    finish_epoch(run)
    assert "test" not in vars(run.splits)
    train(run)
    assert "test" in vars(run.splits)
    export, x = run_folder(recipe) / "model" / "last", torch.rand(3, 1, 8, 8)
    logits = run.measured.eval()(x)
    assert torch.equal(load_exported(export)(x), logits)
    if stem == "default":
        kwargs = TINY["model"]["kwargs"] | {"checkpoint_path": str(export / "model.safetensors")}
        model = timm.create_model("resnet18", num_classes=10, in_chans=1, **kwargs)
        assert torch.equal(model.eval()((x - run.bare.mean) / run.bare.std), logits)
    with pytest.raises(ValueError, match="expected an export"):
        load_exported(tmp_path)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(whole, tmp_path):
    """And the result is still bitwise that of the uninterrupted run."""
    broken = tiny(tmp_path, name="broken")
    interrupt(broken, 10)
    tensors = run_folder(broken) / "checkpoints" / "last" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged.*epoch 2"):
        fit(broken, resume=True)
    assert saved_bits(broken) == saved_bits(whole)
    assert metrics(broken) == metrics(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A real SIGINT during training, as from a terminal."""
    recipe, handler = tiny(tmp_path, "train.epochs=500"), signal.getsignal(signal.SIGINT)

    def press():
        while not (run_folder(recipe) / "metrics.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press).start()
    with pytest.raises(Interrupted, match="everything is saved"):
        fit(recipe)
    assert signal.getsignal(signal.SIGINT) is handler
    assert final_state(recipe)["progress"]["step"] >= 4


def test_a_non_finite_loss_stops_before_the_weights_are_touched(tmp_path, monkeypatch):
    """NaN must not be trained on: the step, the images, and the last good checkpoint are named."""
    recipe = tiny(tmp_path, "train.epochs=2")
    original = training.step

    def patched(run, micro_batches):
        if run.progress.step == 5:
            micro_batches[0].x[3] = float("nan")
        return original(run, micro_batches)

    monkeypatch.setattr(training, "step", patched)
    text = r"step 5 \(epoch 2\).*training images \[.*last good checkpoint is"
    with pytest.raises(NonFiniteLossError, match=text):
        fit(recipe)
    state = final_state(recipe)
    assert state["progress"]["step"] == 4
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_full_disk_keeps_the_old_checkpoint(whole, tmp_path, monkeypatch):
    """The run stops with what to do; the checkpoint before survives and the run can go on."""
    recipe, original = tiny(tmp_path), files.write

    def full(path, content):
        log = run_folder(recipe) / "metrics.jsonl"
        if log.exists() and len(log.read_text().splitlines()) == 2:
            raise OSError(28, "No space left on device")
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", full)
        with pytest.raises(CheckpointError, match="No space left"):
            fit(recipe)
    assert final_state(recipe)["progress"]["epoch"] == 1
    fit(recipe, resume=True)
    assert metrics(recipe) == metrics(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.source=folder", "data.root=nowhere"], "nowhere"),
        (["train.batch_size=5000"], "train.batch_size: got 5000"),
        (["perturbation=awp", "wrapper.layers=nope"], "layers: got 'nope'"),
        (["output=tiny.yaml"], "tiny.yaml is a file; expected folders"),
        (["train.channels_last=true"], "train.channels_last: got true on a CPU"),
        (["model={name: vit_tiny_patch16_224, stem: default, kwargs: {}}"], "images of 8x8 pixels"),
    ],
)
def test_wrong_input_is_one_clear_message_and_exit_2(arguments, message, tmp_path, capsys, monkeypatch):
    """Before the first batch, and nothing is left behind that blocks the next try."""
    monkeypatch.chdir(tmp_path)
    Path("tiny.yaml").write_text(tiny(Path("runs")).to_yaml())
    assert main(["train", "tiny.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.yaml"]


def test_a_method_without_a_base_is_refused(tmp_path, monkeypatch, capsys):
    """`wcitrain train wci` would train on the default images in silence."""
    monkeypatch.chdir(tmp_path)
    assert main(["train", "wci"]) == 2
    assert "got a recipe without a data section; expected a base below" in capsys.readouterr().err
    assert main(["train", "wci", "data.source=digits", "train.batch_size=5000"]) == 2
    assert "train.batch_size: got 5000" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_run_is_never_overwritten(tmp_path, capsys):
    """Starting a recipe again must not mix two runs in one folder; a missing run cannot be resumed."""
    recipe = tiny(tmp_path, "train.epochs=1")
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe.to_yaml())
    assert main(["train", str(path)]) == 0
    before = (run_folder(recipe) / "metrics.jsonl").read_text()
    assert main(["train", str(path)]) == 2
    assert "--resume" in capsys.readouterr().err
    assert (run_folder(recipe) / "metrics.jsonl").read_text() == before
    assert main(["train", "--resume", str(tmp_path / "nothing")]) == 2
    assert main(["train", "--resume", str(run_folder(recipe)), "optimizer.lr=0.5"]) == 2
    assert "got optimizer.lr=0.5; expected 0.1, as this run has" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"got objective.name='trades'; expected 'pgd_at', as this run has"):
        fit(tiny(tmp_path, "train.epochs=1", "objective.name=trades"), resume=True)
    saved = run_folder(recipe) / "recipe.yaml"
    saved.write_text(saved.read_text().replace("eps: 0.1", "eps: 0.09"))
    assert main(["train", "--resume", str(run_folder(recipe))]) == 2
    assert "got threat.eps=0.09; expected 0.1, as this run has" in capsys.readouterr().err
    older = re.sub(r"\n  trace_decay: null", "", saved.read_text().replace("eps: 0.09", "eps: 0.1"))
    saved.write_text(older)
    assert main(["train", "--resume", str(run_folder(recipe))]) == 2
    assert "got no wrapper.trace_decay, of an older version" in capsys.readouterr().err
    assert main(["train"]) == 2


def test_a_sweep_trains_all_keeps_what_is_finished_and_reports(tmp_path, capsys):
    """The quickstart's command: methods x seeds, one table."""
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path / "runs", "train.epochs=1").to_yaml())
    (tmp_path / "at.yaml").write_text("name: at\n")
    (tmp_path / "wci.yaml").write_text("name: wci\nperturbation: wci\n")
    sweep, base = tmp_path / "both.yaml", "bases: [tiny.yaml]\n"
    sweep.write_text(base + "methods: [at.yaml, wci.yaml]\nseeds: [0, 1]\n")
    assert main(["sweep", str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "| AT" in out
    assert "| WCI r=0.5" in out
    assert main(["sweep", str(sweep)]) == 0
    assert capsys.readouterr().out.count("finished, kept") == 4
    assert main(["sweep", str(sweep), "train.epochs=2"]) == 2
    assert "got train.epochs=2; expected 1, as this run has" in capsys.readouterr().err
    sweep.write_text("bases: [gone.yaml]\nmethods: [at.yaml, wci.yaml]\nseeds: [0, 1]\n")
    assert main(["sweep", str(sweep)]) == 2
    assert "gone.yaml: got [Errno 2]" in capsys.readouterr().err
    assert main(["sweep", str(sweep), "--bases", "tiny.yaml"]) == 0
    assert capsys.readouterr().out.count("finished, kept") == 4
    # the report's own folder among them
    assert main(["report", *map(str, (tmp_path / "runs").iterdir())]) == 0
    assert "Left out, no runs" in capsys.readouterr().err
    sweep.write_text(base + "methods: [at.yaml optimizer.lr=1e30 name=diverging]\n")
    assert main(["sweep", str(sweep)]) == 1
    assert "no run has finished" in capsys.readouterr().out


def test_trackers_get_every_epoch(tmp_path, monkeypatch):
    """W&B offline and TensorBoard from a recipe; Accelerate drops a missing tracker without a word."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = tiny(tmp_path, "train.epochs=2", "tracking.wandb=offline", "tracking.tensorboard=true")
    fit(recipe)
    assert list(run_folder(recipe).glob("wandb/offline-run-*/*.wandb"))
    events = next(run_folder(recipe).rglob("events.out.tfevents.*"))
    scalars = EventAccumulator(str(events.parent)).Reload().Scalars("val/robust_accuracy")
    assert [one.step for one in scalars] == [one["step"] for one in metrics(recipe)]


@pytest.mark.parametrize("settings", [
    ["train.precision=bf16", "perturbation.name=wci"],
    ["train.precision=bf16", "penalty.name=trace", "penalty.strength=1e-6"],
    ["threat.norm=l2", "threat.eps=0.5", "objective.step_size=0.3", "evaluation.step_size=0.3"],
    ["schedule.name=one_cycle", "optimizer.name=lamb", "optimizer.lr=0.01", "perturbation.name=wci",
     "perturbation.schedule={every: 2, start: 1, ramp: 0.5}"],
    ["data.in_memory=false", "data.num_workers=0"],
])  # fmt: skip
def test_the_options_run_and_stay_finite(settings, tmp_path):
    """Each option has to work in a run, not only to parse."""
    recipe = tiny(tmp_path, "train.epochs=2", *settings)
    summary = fit(recipe)
    assert 0 <= summary["last"]["test"]["robust_accuracy"] <= summary["last"]["test"]["clean_accuracy"] <= 1
    assert summary["last"]["wci"] > 0
    assert all(torch.isfinite(v).all() for v in final_state(recipe)["model"].values())


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_eager_one(tmp_path):
    """torch.compile changes speed, not results (beyond rounding)."""
    for compiled in ("false", "true"):
        fit(tiny(tmp_path, "train.epochs=1", f"train.compile={compiled}", name=compiled))
    eager, compiled = (metrics(tiny(tmp_path, name=name))[0]["train/loss"] for name in ("false", "true"))
    assert compiled == pytest.approx(eager, rel=1e-3)


def test_a_moved_run_is_resumed_where_it_is_with_as_many_processes(tmp_path):
    """The recipe's name and output say where the run was born, not where it is.

    Batches and random numbers are shared out by process: fewer would train another run.
    """
    recipe = tiny(tmp_path)
    interrupt(recipe, 6)
    run = start_run(recipe, resume=True)
    run.world = 2
    with pytest.raises(ValueError, match="got 2 processes; expected the 1 it began with"):
        load(run)
    moved = run_folder(recipe).rename(tmp_path / "moved")
    assert main(["train", "--resume", str(moved)]) == 0
    assert not run_folder(recipe).exists()
    assert json.loads((moved / "summary.json").read_text())["last"]["epoch"] == 3


def test_a_run_killed_before_its_first_checkpoint_starts_again(whole, tmp_path):
    """kill -9 in the first epoch leaves a recipe only: neither a retry nor --resume may be blocked by it."""
    killed = tiny(tmp_path, name="killed")
    run_folder(killed).mkdir()
    (run_folder(killed) / "recipe.yaml").write_text(killed.to_yaml())
    fit(killed, resume=True)
    assert metrics(killed) == metrics(whole)
    shutil.rmtree(run_folder(killed) / "checkpoints")  # of an epoch that was logged before it was saved
    (run_folder(killed) / "summary.json").unlink()
    fit(killed, resume=True)
    assert metrics(killed) == metrics(whole)


def test_a_diverged_epoch_is_not_saved_over_a_good_one(tmp_path, monkeypatch):
    """Weights can be lost after the last finite loss: what is measured must be finite before it is saved."""
    recipe = tiny(tmp_path)
    original = training.train_epoch

    def patched(run):
        original(run)
        if run.progress.epoch == 1:
            with torch.no_grad():
                run.bare.backbone.fc.weight.fill_(float("inf"))

    monkeypatch.setattr(training, "train_epoch", patched)
    with pytest.raises(NonFiniteLossError, match=r"end of epoch 2.*last good checkpoint"):
        fit(recipe)
    assert final_state(recipe)["epoch"] == 1
    assert len(metrics(recipe)) == 1


def write_digits(root: Path, num: int = 12) -> Path:
    """Write digits 0 to 3 as folders of PNGs, ``num`` of each for training and a third for testing."""
    digits = load_digits()
    for label in range(4):
        images = digits.images[digits.target == label][: num + num // 3]
        for place, pixels in enumerate(images):
            folder = root / ("train" if place < num else "test") / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray((pixels * 15).astype("uint8")).save(folder / f"{place:02d}.png")
    return root


def test_a_run_goes_on_with_moved_data_other_workers_and_another_evaluation_batch(tmp_path, capsys):
    """'Start a new one' for a path costs a week; with these the weights are the same, bit for bit."""
    root = write_digits(tmp_path / "here")
    data = (
        f"data={{source: folder, root: {root}, val_size: 8, num_workers: 0, max_train: null, max_test: null}}"
    )
    size = ["train.batch_size=10", "train.epochs=2", "evaluation.train_size=20", "evaluation.batch_size=20"]
    settings = [data, *size, "evaluation.every=2", "perturbation.name=wci", "data.flip=true"]
    whole, broken = (tiny(tmp_path, *settings, name=name) for name in ("whole", "broken"))
    fit(whole)
    interrupt(broken, 6)
    there = (tmp_path / "here").rename(tmp_path / "there")
    other = [f"data.root={there}", "data.num_workers=1", "data.in_memory=false", "evaluation.batch_size=7"]
    assert main(["train", "--resume", str(run_folder(broken)), *other]) == 0
    assert f"with data.root='{there}' (was '{root}'), data." in capsys.readouterr().out
    assert saved_bits(broken)[0] == saved_bits(whole)[0]
    assert load_recipe(run_folder(broken) / "recipe.yaml").data.root == str(there)  # for later commands
    assert main(["train", "--resume", str(run_folder(broken)), "data.max_train=30"]) == 2
    assert "got data.max_train=30" in capsys.readouterr().err
