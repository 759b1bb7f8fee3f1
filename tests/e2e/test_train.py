"""The trainer end to end on digits: it learns, repeats itself, resumes bit for bit, refuses what is wrong."""

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from wcitrain.__main__ import main
from wcitrain.checkpoint import load_checkpoint
from wcitrain.recipe import Recipe, recipe_from_dict
from wcitrain.train import Interrupted, NonFiniteLossError, Trainer, fit, run_folder

TINY = {
    "name": "tiny",
    "data": {"source": "digits", "val_size": 100, "max_train": 300, "max_test": 100, "crop_padding": 1},
    "model": {"name": "resnet18", "stem": "cifar", "kwargs": {"layers": [1, 1, 1, 1], "channels": [4, 4, 8, 8]}},
    "threat": {"eps": 0.1},
    "objective": {"num_steps": 2, "step_size": 0.06},
    "schedule": {"name": "cosine", "warmup_epochs": 0.5},
    "train": {"epochs": 3, "batch_size": 50, "device": "cpu"},
    "evaluation": {"train_size": 100, "num_steps": 2, "step_size": 0.06},
    "tracking": {"wandb": "disabled"},
}
METHODS = {
    "at": [],
    "awp": ["perturbation.name=awp"],
    "wci": ["perturbation.name=wci"],
    "noise": ["perturbation.name=noise", "perturbation.statistics=clean"],
    "penalty": ["penalty.name=wci", "penalty.strength=1e-4", "penalty.every=2", "train.accumulate=2"],
    "ema": ["perturbation.name=wci", "train.ema_decay=0.9", "model.kwargs.drop_path_rate=0.2", "optimizer.name=adamw",
            "optimizer.lr=0.003", "train.max_norm=1.0"],
    "free, swa": ["objective={name: free, num_replays: 3}", "train.swa_start_epoch=1", "threat.warmup_epochs=2",
                  "perturbation.name=awp"],
    "trades, mixing": ["objective={name: trades, num_steps: 2}", "mixing.mixup_alpha=1", "mixing.cutmix_alpha=1",
                       "augment={policy: cutout, cutout_size: 3}", "label_noise.share=0.2", "perturbation.name=vasso",
                       "data.num_workers=0"],
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
            if key not in ("seconds", "train_seconds", "epoch_seconds", "recipe"):  # clocks; the recipe's name
                assert_equal_trees(left[key], right[key], f"{place}.{key}")
    elif isinstance(left, (list, tuple)):
        assert len(left) == len(right), place
        for i, pair in enumerate(zip(left, right, strict=True)):
            assert_equal_trees(*pair, f"{place}[{i}]")
    elif isinstance(left, torch.Tensor):
        assert torch.equal(left, right), place
    else:
        assert left == right, place


class StopAt:
    """Make a trainer behave as if Ctrl-C came during its k-th optimizer step."""

    def __init__(self, monkeypatch, step: int) -> None:
        original = Trainer._step

        def patched(trainer, micro_batches):
            trainer.stop.is_set = trainer.progress.step + 1 == step
            return original(trainer, micro_batches)

        monkeypatch.setattr(Trainer, "_step", patched)


SLOW = ("at", "awp", "noise")  # less state than the others: left to the long run


@pytest.mark.parametrize("method", [pytest.param(m, marks=pytest.mark.slow) if m in SLOW else m for m in METHODS])
def test_stop_and_resume_equals_uninterrupted_bitwise(method, tmp_path, monkeypatch):
    """Stopped in the middle of an epoch: weights, momentum, running averages, EMA, metrics must not notice."""
    whole = tiny(tmp_path, *METHODS[method], name="whole")
    summary = fit(whole)
    parts = tiny(tmp_path, *METHODS[method], name="parts")
    with monkeypatch.context() as patch:
        StopAt(patch, 6)  # 4 steps an epoch: in the second one
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
    from wcitrain.recipe import load_recipe

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
        {k: v for k, v in m.items() if not k.startswith(("running/", "curvature/negative"))} for m in metrics(monitored)
    ]
    assert logged == metrics(plain)
    assert any(k.startswith("running/wci/") for k in metrics(monitored)[-1])


def test_digits_are_learnt_robustly(tmp_path):
    """The whole chain has to learn: accuracies far above chance on test images nobody selected on."""
    recipe = tiny(
        tmp_path, "perturbation.name=wci", "perturbation.relative_size=0.5", "train.epochs=12", "data.max_train=800",
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
    expected = {"forward_passes": 4, "backward_passes": 4, "relative": 10 / 7, "relative_to_pgd10_at": 10 / 23}
    assert written["cost"] == expected
    assert written["stopped_early"] is None


def test_the_export_loads_into_timm_and_is_the_measured_model(tmp_path):
    """What users take away must be what the table reports."""
    import timm

    recipe = tiny(tmp_path, "train.epochs=1", "train.ema_decay=0.5", "model.stem=default")
    trainer = Trainer(recipe)
    trainer.fit()
    model = timm.create_model(
        "resnet18", num_classes=10, in_chans=1, **TINY["model"]["kwargs"],
        checkpoint_path=str(run_folder(recipe) / "model" / "last" / "model.safetensors"),
    )  # fmt: skip
    x = torch.rand(3, 1, 8, 8)
    assert torch.equal(model.eval()((x - trainer.bare.mean) / trainer.bare.std), trainer.measured.eval()(x))


def test_test_images_are_read_only_at_the_end(tmp_path, monkeypatch):
    """Selecting on test data is impossible while nobody has read them."""
    recipe = tiny(tmp_path, "train.epochs=1")
    trainer = Trainer(recipe)
    trainer._train_epoch()
    trainer._finish_epoch()
    assert "test" not in vars(trainer.splits)
    trainer.fit()
    assert "test" in vars(trainer.splits)


def test_a_damaged_checkpoint_falls_back_to_the_previous_one(tmp_path, monkeypatch):
    """And the result is still bitwise that of the uninterrupted run."""
    whole, broken = tiny(tmp_path, name="whole"), tiny(tmp_path, name="broken")
    fit(whole)
    with monkeypatch.context() as patch:
        StopAt(patch, 10)
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
    original = Trainer._step

    def patched(trainer, micro_batches):
        if trainer.progress.step == 5:
            micro_batches[0].x[3] = float("nan")
        return original(trainer, micro_batches)

    monkeypatch.setattr(Trainer, "_step", patched)
    with pytest.raises(NonFiniteLossError, match=r"step 5 \(epoch 2\).*training images \[.*last good checkpoint is"):
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
    assert "optimizer.lr=0.5; expected the run's own" in capsys.readouterr().err
    assert main(["train"]) == 2
    assert main(["report", str(run_folder(recipe))]) == 0
    assert "AT" in capsys.readouterr().out
    assert (run_folder(recipe) / "figures" / "curves.png").exists()


def test_a_sweep_trains_all_keeps_what_is_finished_and_reports(tmp_path, capsys):
    """The quickstart's command: recipes x seeds, one table."""
    for name, setting in (("at", "penalty.name=none"), ("wci", "perturbation.name=wci")):
        recipe = tiny(tmp_path / "runs", "train.epochs=1", setting, name=name)
        (tmp_path / f"{name}.yaml").write_text(recipe.to_yaml())
    sweep = tmp_path / "both.yaml"
    sweep.write_text("recipes: [at.yaml, wci.yaml]\nseeds: [0, 1]\n")
    assert main(["sweep", str(sweep)]) == 0
    out = capsys.readouterr().out
    assert "| AT" in out
    assert "| WCI r=1" in out
    assert main(["sweep", str(sweep)]) == 0
    assert capsys.readouterr().out.count("finished, kept") == 4
    assert main(["sweep", str(sweep), "train.epochs=2"]) == 2
    assert "other settings" in capsys.readouterr().err
    sweep.write_text("recipes: [at.yaml, at.yaml]\nseeds: [0]\n")
    assert main(["sweep", str(sweep)]) == 2
    for wrong in ("recipe: at.yaml", "recipes: at.yaml", "recipes: [at.yaml]\nsettings: train.epochs=1"):
        sweep.write_text(wrong + "\n")
        assert main(["sweep", str(sweep)]) == 2
    sweep.write_text("recipes: [at.yaml]\nseeds: [0]\n")
    assert main(["sweep", str(sweep), "seed=7"]) == 2
    capsys.readouterr()
    assert (
        main(["report", *map(str, (tmp_path / "runs").iterdir()), "--at", "best"]) == 0
    )  # the report's own folder among them
    assert "Left out, no runs" in capsys.readouterr().err


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
    ["train.channels_last=true", "objective.name=standard"],
    ["threat.norm=l2", "threat.eps=0.5", "objective.step_size=0.3", "evaluation.step_size=0.3"],
    ["schedule.name=one_cycle", "optimizer.name=lamb", "optimizer.lr=0.01", "perturbation.name=wci", "perturbation.every=2",
     "perturbation.start_epoch=1", "perturbation.ramp_epochs=0.5"],
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
        StopAt(patch, 6)
        with pytest.raises(Interrupted):
            fit(recipe)
    moved = run_folder(recipe).rename(tmp_path / "moved")
    assert main(["train", "--resume", str(moved)]) == 0
    assert not run_folder(recipe).exists()
    assert json.loads((moved / "summary.json").read_text())["last"]["epoch"] == 3


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path):
    """kill -9 in the first epoch leaves a recipe only: neither a retry nor --resume may be blocked by it."""
    whole, killed = tiny(tmp_path, "train.epochs=1", name="whole"), tiny(tmp_path, "train.epochs=1", name="killed")
    fit(whole)
    run_folder(killed).mkdir()
    (run_folder(killed) / "recipe.yaml").write_text(killed.to_yaml())
    fit(killed, resume=True)
    assert metrics(killed) == metrics(whole)


def test_a_diverged_epoch_is_not_saved_over_a_good_one(tmp_path, monkeypatch):
    """Weights can be lost after the last finite loss: what is measured must be finite before it is saved."""
    recipe = tiny(tmp_path)
    original = Trainer._train_epoch

    def patched(trainer):
        original(trainer)
        if trainer.progress.epoch == 1:
            with torch.no_grad():
                trainer.bare.backbone.fc.weight.fill_(float("inf"))

    monkeypatch.setattr(Trainer, "_train_epoch", patched)
    with pytest.raises(NonFiniteLossError, match=r"end of epoch 2.*last good checkpoint"):
        fit(recipe)
    assert final_state(recipe)["epoch"] == 1
    assert len(metrics(recipe)) == 1


def test_exported_models_load_with_stem_and_normalisation(tmp_path):
    """timm alone cannot build the small-image stem, and would leave the normalisation out."""
    from wcitrain.models import load_exported

    recipe = tiny(tmp_path, "train.epochs=1")
    trainer = Trainer(recipe)
    trainer.fit()
    x = torch.rand(3, 1, 8, 8)
    loaded = load_exported(run_folder(recipe) / "model" / "last")
    assert torch.equal(loaded(x), trainer.measured.eval()(x))
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
        (["penalty.name=wci", "penalty.strength=1e-3"], "gauss_newton (the loss gives its outputs"),
        (["penalty.name=trace", "penalty.strength=1e-4", "penalty.estimator=hutchinson"], "hutchinson (as asked)"),
        (["penalty.name=wci", "penalty.strength=1e-3", "penalty.estimator=top_layer"], "top_layer (as asked)"),
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
    recipe = tiny(tmp_path, "model.name=mobilenetv3_small_050", "data.image_size=32", "penalty.name=wci", "name=mobile")
    changed = recipe_from_dict(
        recipe.model_dump(mode="json") | {"model": {"name": "mobilenetv3_small_050"}},
        ["penalty.strength=0.1", "penalty.estimator=gauss_newton"],
    )
    with pytest.raises(ValueError, match="Hardsigmoid"):
        fit(changed)
    assert not run_folder(changed).exists()
