"""The trainer end to end on digits: it learns, repeats itself, resumes bit for bit, refuses what is wrong."""

import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from tiny_run import TINY as BASE

from wcitrain import train as training
from wcitrain.__main__ import main
from wcitrain.checkpoint import load_checkpoint
from wcitrain.monitoring import NonFiniteLossError
from wcitrain.progress import run_folder
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
    "at": [],
    "awp": ["perturbation.name=awp"],
    "wci": ["perturbation.name=wci"],
    "noise": ["perturbation.name=noise", "perturbation.statistics=clean"],
    "penalty": ["penalty={name: wci, strength: 1e-4, schedule: {every: 2}}", "train.accumulate=2"],
    "ema": ["perturbation.name=wci", "averaging={name: ema, decay: 0.9}", "model.kwargs.drop_path_rate=0.2",
            "optimizer.name=adamw", "optimizer.lr=0.003", "train.max_norm=1.0"],
    "free, swa": ["objective={name: free, num_replays: 3}", "averaging={name: swa, start_epoch: 1}",
                  "train.eps_warmup_epochs=2", "perturbation.name=awp"],
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


def assert_equal_trees(left, right, place="state"):
    """Bitwise equality of nested states, without the clock."""
    assert type(left) is type(right), place
    if isinstance(left, dict):
        assert left.keys() == right.keys(), place
        for key in left:
            # clocks; the recipe's name
            if key not in ("seconds", "train_seconds", "epoch_seconds", "recipe"):
                assert_equal_trees(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_equal_trees(*pair, f"{place}[{i}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left.nan_to_num(-1.0), right.nan_to_num(-1.0)), place  # NaN: not known
    else:
        assert left == right, place


def stop_at(monkeypatch, step: int) -> None:
    """Make a run behave as if Ctrl-C came during its k-th optimizer step."""
    original = training.step

    def patched(run, micro_batches):
        run.stop.is_set = run.progress.step + 1 == step
        return original(run, micro_batches)

    monkeypatch.setattr(training, "step", patched)


SLOW = ("at", "awp", "noise")  # less state than the others: left to the long run


@pytest.mark.parametrize(
    "method", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in METHODS]
)
def test_stop_and_resume_equals_uninterrupted_bitwise(method, tmp_path, monkeypatch):
    """Stopped amid an epoch: weights, momentum, running averages, EMA, metrics must not notice."""
    whole = tiny(tmp_path, *METHODS[method], name="whole")
    summary = fit(whole)
    parts = tiny(tmp_path, *METHODS[method], name="parts")
    with monkeypatch.context() as patch:
        stop_at(patch, 6)  # 4 steps an epoch: in the second one
        with pytest.raises(Interrupted, match="wcitrain train --resume"):
            fit(parts)
    assert final_state(parts)["progress"]["step"] == 6
    resumed = fit(parts, resume=True)
    assert_equal_trees(final_state(parts), final_state(whole))
    assert metrics(parts) == metrics(whole)
    for key in ("last", "best", "method", "cost"):
        assert resumed[key] == summary[key]


def test_two_identical_runs_give_identical_metrics(tmp_path):
    """Hidden randomness would make every ablation a lottery."""
    first, second = (tiny(tmp_path, "perturbation.name=wci", name=n) for n in ("a", "b"))
    other = tiny(tmp_path, "perturbation.name=wci", "seed=1", name="a")
    for recipe in (first, second, other):
        fit(recipe)
    assert metrics(first) == metrics(second)
    assert metrics(first) != metrics(other)


def test_the_saved_recipe_repeats_the_run(tmp_path):
    """recipe.yaml in the run folder is the run."""
    recipe = tiny(tmp_path, "perturbation.name=awp")
    fit(recipe)
    again = load_recipe(run_folder(recipe) / "recipe.yaml", ["name=again"])
    fit(again)
    assert metrics(again) == metrics(recipe)


def test_monitoring_changes_no_number_of_the_run(tmp_path):
    """Strength 0 logs curvature and trains exactly the plain run."""
    plain, monitored = tiny(tmp_path, name="plain"), tiny(tmp_path, "penalty.name=wci", name="monitored")
    fit(plain)
    fit(monitored)
    logged = [
        {k: v for k, v in m.items() if not k.startswith(("running/", "curvature/negative"))}
        for m in metrics(monitored)
    ]
    assert logged == metrics(plain)
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
    written = json.loads((run_folder(recipe) / "summary.json").read_text())
    assert written["status"] == "finished"
    assert written["method"] == "WCI r=0.5"
    evaluated = [m["epoch"] for m in metrics(recipe) if "val/robust_accuracy" in m]
    assert evaluated == [6, 12]
    # Documented cost: PGD-2 (2+2), plain 3; the posterior adds a forward and a backward (2).
    expected = {
        "forward_passes": 4,
        "backward_passes": 4,
        "relative": 10 / 7,
        "relative_to_pgd10_at": 10 / 23,
    }
    assert written["cost"] == expected
    assert written["stopped_early"] is None


def test_the_export_loads_into_timm_and_is_the_measured_model(tmp_path):
    """What users take away must be what the table reports."""
    import timm

    recipe = tiny(tmp_path, "train.epochs=1", "averaging={name: ema, decay: 0.5}", "model.stem=default")
    run = open_run(recipe)
    train(run)
    weights = str(run_folder(recipe) / "model" / "last" / "model.safetensors")
    small = TINY["model"]["kwargs"]
    model = timm.create_model("resnet18", num_classes=10, in_chans=1, **small, checkpoint_path=weights)
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(model.eval()((x - run.bare.mean) / run.bare.std), run.measured.eval()(x))


def test_test_images_are_read_only_at_the_end(tmp_path, monkeypatch):
    """Selecting on test data is impossible while nobody has read them."""
    recipe = tiny(tmp_path, "train.epochs=1")
    run = open_run(recipe)
    train_epoch(run)
    finish_epoch(run)
    assert "test" not in vars(run.splits)
    train(run)
    assert "test" in vars(run.splits)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, monkeypatch):
    """And the result is still bitwise that of the uninterrupted run."""
    whole, broken = tiny(tmp_path, name="whole"), tiny(tmp_path, name="broken")
    fit(whole)
    with monkeypatch.context() as patch:
        stop_at(patch, 10)
        with pytest.raises(Interrupted):
            fit(broken)
    tensors = run_folder(broken) / "checkpoints" / "last" / "tensors.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-100])
    with pytest.warns(UserWarning, match="damaged.*epoch 2"):
        fit(broken, resume=True)
    assert_equal_trees(final_state(broken), final_state(whole))
    assert metrics(broken) == metrics(whole)


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    """A real SIGINT during training, as from a terminal."""
    recipe = tiny(tmp_path, "train.epochs=500")

    def interrupt():
        while not (run_folder(recipe) / "metrics.jsonl").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    handler = signal.getsignal(signal.SIGINT)
    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Interrupted, match="everything is saved"):
        fit(recipe)
    thread.join()
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
    with pytest.raises(
        NonFiniteLossError, match=r"step 5 \(epoch 2\).*training images \[.*last good checkpoint is"
    ):
        fit(recipe)
    state = final_state(recipe)
    assert state["progress"]["step"] == 4
    assert all(torch.isfinite(v).all() for v in state["model"].values())


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path, monkeypatch):
    """The run stops with what to do; the checkpoint before survives and the run can go on."""
    from wcitrain import checkpoint

    recipe = tiny(tmp_path)
    original = checkpoint._write

    def full(path, content):
        if len((run_folder(recipe) / "metrics.jsonl").read_text().splitlines()) == 2:
            raise OSError(28, "No space left on device")
        original(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write", full)
        with pytest.raises(checkpoint.CheckpointError, match="are free"):
            fit(recipe)
    assert final_state(recipe)["progress"]["epoch"] == 1
    whole = tiny(tmp_path, name="whole")
    fit(whole)
    fit(recipe, resume=True)
    assert metrics(recipe) == metrics(whole)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["trian.epochs=1"], "train"),
        (["train.epochs=many"], "train.epochs"),
        (["threat.eps=8"], "Did you mean 8/255"),
        (["optimizer.name=adahessian"], "first-order"),
        (["data.source=folder", "data.root=nowhere"], "nowhere"),
        (["model.name=resnet81"], "Did you mean"),
        (["train.batch_size=5000"], "train.batch_size: got 5000"),
        (["optimizer.name=sgdd"], "Did you mean"),
        (["train.precision=fp16"], "bf16"),
        (["perturbation.name=wci", "penalty.name=wci"], "penalty"),
    ],
)
def test_wrong_input_is_one_clear_message_and_exit_2(arguments, message, tmp_path, capsys):
    """Before the first batch, and nothing is left behind that blocks the next try."""
    recipe = tiny(tmp_path)
    path = tmp_path / "tiny.yaml"
    path.write_text(recipe.to_yaml())
    assert main(["train", str(path), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not run_folder(recipe).exists()


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
    saved.write_text(recipe.to_yaml())
    assert main(["train"]) == 2
    assert main(["report", str(run_folder(recipe))]) == 0
    assert "AT" in capsys.readouterr().out
    assert (run_folder(recipe) / "figures" / "curves.png").exists()


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
    assert "| WCI r=1" in out
    assert main(["sweep", str(sweep)]) == 0
    assert capsys.readouterr().out.count("finished, kept") == 4
    assert main(["sweep", str(sweep), "train.epochs=2"]) == 2
    assert "got train.epochs=2; expected 1, as this run has" in capsys.readouterr().err
    sweep.write_text(base + "methods: [at.yaml, at.yaml]\nseeds: [0]\n")
    assert main(["sweep", str(sweep)]) == 2
    for wrong in ("method: at.yaml", "methods: at.yaml", "methods: [at.yaml]\nsettings: train.epochs=1"):
        sweep.write_text(base + wrong + "\n")
        assert main(["sweep", str(sweep)]) == 2
    sweep.write_text("methods: [at.yaml]\n")  # no base
    assert main(["sweep", str(sweep)]) == 2
    sweep.write_text("bases: [gone.yaml]\nmethods: [at.yaml, wci.yaml]\nseeds: [0, 1]\n")
    assert main(["sweep", str(sweep), "seed=7"]) == 2
    assert main(["sweep", str(sweep)]) == 2
    assert "bases: got 'gone.yaml'" in capsys.readouterr().err
    assert main(["sweep", str(sweep), "--bases", "tiny.yaml"]) == 0
    assert capsys.readouterr().out.count("finished, kept") == 4
    capsys.readouterr()
    # the report's own folder among them
    assert main(["report", *map(str, (tmp_path / "runs").iterdir()), "--at", "best"]) == 0
    assert "Left out, no runs" in capsys.readouterr().err


def test_a_sweep_whose_runs_all_diverge_says_so(tmp_path, capsys):
    """There is nothing to report."""
    (tmp_path / "tiny.yaml").write_text(tiny(tmp_path / "runs", "train.epochs=1").to_yaml())
    (tmp_path / "at.yaml").write_text("name: at\n")
    sweep = tmp_path / "one.yaml"
    sweep.write_text("bases: [tiny.yaml]\nmethods: [at.yaml optimizer.lr=1e30]\n")
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
    accumulator = EventAccumulator(str(events.parent)).Reload()
    logged = [event.value for event in accumulator.Scalars("val/robust_accuracy")]
    assert logged == pytest.approx([m["val/robust_accuracy"] for m in metrics(recipe)])


@pytest.mark.parametrize("settings", [
    ["train.precision=bf16", "perturbation.name=wci"],
    ["train.precision=bf16", "penalty.name=trace", "penalty.strength=1e-6"],
    ["train.channels_last=true", "objective.name=standard", "model.kwargs.channels=[8,8,8,8]"],
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


def test_channels_last_is_refused_where_it_would_damage_memory(tmp_path):
    """The process would die in its first backward pass, or go on with wrong gradients."""
    with pytest.raises(
        ValueError, match=r"train.channels_last: got true .* backbone.layer2.0.downsample.0, "
    ):
        open_run(tiny(tmp_path, "train.channels_last=true"))
    assert not (tmp_path / "tiny-s0").exists()


@pytest.mark.slow
def test_a_compiled_model_trains_like_the_eager_one(tmp_path):
    """torch.compile changes speed, not results (beyond rounding)."""
    eager, compiled = (
        tiny(tmp_path, "train.epochs=1", name="eager"),
        tiny(tmp_path, "train.epochs=1", "train.compile=true", name="c"),
    )
    fit(eager)
    fit(compiled)
    assert metrics(compiled)[0]["train/loss"] == pytest.approx(metrics(eager)[0]["train/loss"], rel=1e-3)


def test_a_moved_run_is_resumed_where_it_is(tmp_path, monkeypatch):
    """The recipe's name and output say where the run was born, not where it is."""
    recipe = tiny(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 6)
        with pytest.raises(Interrupted):
            fit(recipe)
    moved = run_folder(recipe).rename(tmp_path / "moved")
    assert main(["train", "--resume", str(moved)]) == 0
    assert not run_folder(recipe).exists()
    assert json.loads((moved / "summary.json").read_text())["last"]["epoch"] == 3


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    """kill -9 in the first epoch leaves a recipe only: neither a retry nor --resume may be blocked by it."""
    whole, killed = (
        tiny(tmp_path, "train.epochs=1", name="whole"),
        tiny(tmp_path, "train.epochs=1", name="killed"),
    )
    fit(whole)
    run_folder(killed).mkdir()
    (run_folder(killed) / "recipe.yaml").write_text(killed.to_yaml())
    fit(killed, resume=True)
    assert metrics(killed) == metrics(whole)
    shutil.rmtree(run_folder(killed) / "checkpoints")  # of an epoch that was logged before it was saved
    (run_folder(killed) / "summary.json").unlink()
    fit(killed, resume=True)
    assert metrics(killed) == metrics(whole)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.batch_size=1"], r"train\.batch_size: got passes over a single image"),
        (["train.accumulate=50"], r"train\.batch_size: got passes over a single image"),
        (["averaging={name: swa, start_epoch: 0}", "evaluation.train_size=1"], "single image"),
        (["augment={policy: cutout, cutout_size: 9}"], r"augment\.cutout_size: got 9 for images of 8x8"),
        (["perturbation=awp", "wrapper.layers=nope"], r"wrapper\.layers: got 'nope'"),
    ],
)
def test_settings_that_do_not_fit_data_or_model_leave_no_folder(settings, message, tmp_path):
    """torch's own words come at the first batch or after the first epoch, without a key."""
    recipe = tiny(tmp_path, *settings)
    with pytest.raises(ValueError, match=message):
        fit(recipe)
    assert not run_folder(recipe).exists()


def test_a_folder_below_a_file_is_refused(tmp_path):
    """Nothing can be written there."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"output: got .*file is a file; expected folders"):
        fit(tiny(tmp_path / "file"))


def test_a_run_goes_on_with_as_many_processes(tmp_path, monkeypatch):
    """Batches and random numbers are shared out by process: fewer would train another run."""
    recipe = tiny(tmp_path)
    with monkeypatch.context() as patch:
        stop_at(patch, 2)
        with pytest.raises(Interrupted):
            fit(recipe)
    run = start_run(recipe, resume=True)
    run.world = 2
    with pytest.raises(ValueError, match="got 2 processes; expected the 1 it began with"):
        load(run)


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


def test_exported_models_load_with_stem_and_normalisation(tmp_path):
    """timm alone cannot build the small-image stem, and would leave the normalisation out."""
    from wcitrain.models import load_exported

    recipe = tiny(tmp_path, "train.epochs=1")
    run = open_run(recipe)
    train(run)
    x = torch.rand(3, 1, 8, 8)
    loaded = load_exported(run_folder(recipe) / "model" / "last")
    assert torch.equal(loaded(x), run.measured.eval()(x))
    with pytest.raises(ValueError, match="expected an export"):
        load_exported(tmp_path)


def test_a_model_that_does_not_fit_the_images_is_refused_before_anything_is_written(tmp_path):
    """timm's own complaint comes at the first batch, and names no key."""
    settings = TINY | {"output": str(tmp_path), "model": {"name": "vit_tiny_patch16_224"}}
    recipe = recipe_from_dict(settings)
    with pytest.raises(ValueError, match=r"images of 8x8 pixels.*model.kwargs.img_size"):
        fit(recipe)
    assert not run_folder(recipe).exists()


@pytest.mark.parametrize(
    ("settings", "chosen"),
    [
        (["penalty.name=wci", "penalty.strength=1e-3"], "gauss_newton (the dry run passed)"),
        (
            ["penalty.name=trace", "penalty.strength=1e-4", "penalty.estimator=hutchinson"],
            "hutchinson (as asked)",
        ),
        (
            ["penalty.name=wci", "penalty.strength=1e-3", "penalty.estimator=top_layer"],
            "top_layer (as asked)",
        ),
    ],
)
def test_a_penalty_says_how_it_measures_and_trains(settings, chosen, tmp_path, capsys):
    """The choice is made before the first step and printed, or nobody knows what was penalised."""
    recipe = tiny(tmp_path, *settings, "train.epochs=1")
    fit(recipe)
    assert f"penalty estimator: {chosen}" in capsys.readouterr().out
    assert metrics(recipe)[0]["running/wci/total"] > 0


def test_an_impossible_estimator_stops_before_anything_is_written(tmp_path, capsys):
    """hardsigmoid has no second derivative: the layers are named, and no run folder is left behind."""
    recipe = tiny(
        tmp_path, "model.name=mobilenetv3_small_050", "data.image_size=32", "penalty.name=wci", "name=mobile"
    )
    changed = recipe_from_dict(
        recipe.model_dump(mode="json") | {"model": {"name": "mobilenetv3_small_050"}},
        ["penalty.strength=0.1", "penalty.estimator=gauss_newton"],
    )
    with pytest.raises(ValueError, match="Hardsigmoid"):
        fit(changed)
    assert not run_folder(changed).exists()
