"""What methods ask of the trainer: replays, warm-up, mixing, extra images, averages, early stopping."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_train import final_state, metrics, tiny

from wcitrain.averaging import SWA
from wcitrain.objectives import PGDAT, CatastrophicOverfittingGuard, FreeAT
from wcitrain.progress import run_folder
from wcitrain.seeding import seed_from
from wcitrain.train import fit, open_run, threat_factor, train, train_epoch


def spied(monkeypatch, kind: type, name: str) -> list[tuple]:
    """Return a list of the calls of a method: object, arguments and result, with tensors as copies."""
    original, calls = getattr(kind, name), []

    def method(self, *arguments):
        result = original(self, *arguments)
        parts = (self, *arguments, result)
        calls.append(tuple(one.detach().clone() if isinstance(one, torch.Tensor) else one for one in parts))
        return result

    monkeypatch.setattr(kind, name, method)
    return calls


def test_free_training_makes_its_replays_with_the_same_images(tmp_path, monkeypatch):
    """m optimizer steps a batch, the perturbation moving on; the schedule counts steps, not batches."""
    recipe = tiny(tmp_path, "objective={name: free, num_replays: 3}", "train.epochs=2")
    seen = spied(monkeypatch, FreeAT, "perturb")
    run = open_run(recipe)
    train_epoch(run)
    assert len(seen) == 3 * 4  # 200 images in batches of 50
    for number, ((_, _, x, *_, x_adv), (_, _, next_x, *_, next_adv)) in enumerate(pairwise(seen)):
        assert torch.equal(x, next_x) == (number % 3 != 2)
        assert not torch.equal(x_adv, next_adv)
    assert (run.progress.step, run.scheduler.last_epoch) == (12, 12)


def test_the_radius_grows_linearly_and_evaluation_does_not_wait(tmp_path, monkeypatch):
    """A warm-up that never reaches eps, or that weakens the evaluation, flatters the run."""
    warmup = ("train.eps_zero_epochs=0.5", "train.eps_warmup_epochs=1")
    recipe = tiny(tmp_path, *warmup, "train.epochs=2")
    seen = spied(monkeypatch, PGDAT, "perturb")
    run = open_run(recipe)
    passes = spied(monkeypatch, type(run.bare), "forward")
    train_epoch(run)
    assert len(passes) == 2 * 1 + 2 * (2 + 1)  # a loss each; two of the attack
    run.progress.epoch, run.progress.update = 1, 0
    train_epoch(run)
    expected = [0.25, 0.5, 0.75, 1, 1, 1]  # from the third step on
    assert [one.threat.eps / 0.1 for one, *_ in seen] == pytest.approx(expected)
    assert [one.attack.step_size / 0.06 for one, *_ in seen] == pytest.approx(expected)
    reached = [float((x_adv - x).abs().max()) for _, _, x, *_, x_adv in seen]
    assert reached == pytest.approx([0.1 * e for e in expected], abs=1e-6)


@pytest.mark.parametrize(
    ("zero", "warmup", "expected"), [(0, 0, [1] * 4), (0.5, 0, [0, 0, 1, 1]), (0.25, 0.5, [0, 0.5, 1, 1])]
)
def test_the_radius_is_zero_up_to_an_epoch_and_then_grows_or_jumps(zero, warmup, expected, tmp_path):
    """One step more or less is another number of epochs than the one that is written down."""
    recipe = tiny(tmp_path, f"train.eps_zero_epochs={zero}", f"train.eps_warmup_epochs={warmup}")
    assert [threat_factor(recipe, epoch) for epoch in (0.25, 0.5, 0.75, 1)] == expected


def test_soft_labels_and_noise_reach_the_loss(tmp_path, monkeypatch):
    """Mixing after noise, the mixed images attacked and trained on with the mixed labels."""
    noise = "label_noise={share: 1.0, exclude_true: true}"
    recipe = tiny(tmp_path, "mixing.mixup_alpha=1", noise, "train.epochs=1")
    run = open_run(recipe)
    seen = spied(monkeypatch, PGDAT, "loss")
    order = {"shuffle": True, "seed": seed_from(0, "data"), "epoch": 0, "drop_last": True}
    clean = run.train_set.batches(50, **order, crop_padding=recipe.data.crop_padding)
    train_epoch(run)
    assert len(seen) == 4
    for (_, _, x, x_adv, y, _), batch in zip(seen, clean, strict=True):
        noisy = recipe.label_noise.apply(batch.y, batch.index, 10, seed=0, epoch=0)
        hard = torch.nn.functional.one_hot(noisy, 10).float()
        # y = λ hard + (1 − λ) its neighbour
        share = ((y - hard.roll(1, 0)) / (hard - hard.roll(1, 0))).nanmean()
        assert torch.allclose(y, share * hard + (1 - share) * hard.roll(1, 0), atol=1e-5)
        assert torch.allclose(x, share * batch.x + (1 - share) * batch.x.roll(1, 0), atol=1e-5)
        assert 0 < (x_adv - x).abs().max() <= 0.1 + 1e-6


def test_extra_images_take_their_share_and_pseudo_labels_come_from_the_labeler(tmp_path, capsys):
    """An epoch still passes once over the labelled images; evaluation never sees extra ones."""
    teacher = tiny(tmp_path, "objective.name=standard", "train.epochs=1", name="teacher")
    fit(teacher)
    images = np.random.default_rng(0).integers(0, 256, (90, 8, 8), dtype=np.uint8)
    np.savez(tmp_path / "extra.npz", image=images)
    export = run_folder(teacher) / "model" / "last"
    extra = f"extra={{path: {tmp_path / 'extra.npz'}, labels: pseudo, labeler: {export}, fraction: 0.4}}"
    recipe = tiny(tmp_path, extra, "train.epochs=2", name="student")
    run = open_run(recipe)
    assert run.updates == 200 // 30  # 30 labelled and 20 extra images a batch
    assert len(run.monitored) == 100
    batch = next(run.train_set.batches(50, shuffle=True, drop_last=True))
    assert int((batch.index < 0).sum()) == 20
    train(run)
    assert "pseudo-labels of 90 extra images" in capsys.readouterr().out
    assert len(metrics(recipe)) == 2


def test_swa_measures_the_mean_of_the_epochs_with_statistics_of_its_own(tmp_path, monkeypatch):
    """The exported weights are w̄, and running statistics of w̄ are not those of any epoch."""
    averaging = "averaging={name: swa, start_epoch: 1}"
    recipe = tiny(tmp_path, averaging, "train.epochs=4", "schedule={name: piecewise}")
    run, ends, original = open_run(recipe), [], SWA.after_epoch

    def after_epoch(self, average, model, epoch, passes):
        ends.append({k: v.clone() for k, v in model.state_dict().items()})
        original(self, average, model, epoch, passes)

    monkeypatch.setattr(SWA, "after_epoch", after_epoch)
    train(run)
    saved = final_state(recipe)["average"]["module"]
    means = {name: sum(end[name] for end in ends[1:]) / 3 for name in ends[0]}
    names = dict(run.bare.named_parameters())
    assert all(torch.allclose(saved[name], means[name], atol=1e-6) for name in names)
    running = [name for name in means if name.endswith("running_mean")]
    assert all(not torch.allclose(saved[n], other[n]) for n in running for other in (*ends, means))
    exported = run.measured.state_dict()
    assert all(torch.equal(exported[n], saved[n]) for n in names)


def test_patience_stops_keeps_the_best_and_stays_stopped(tmp_path, capsys):
    """Early stopping selects by validation, says so, and a resume does not train on."""
    settings = ("early_stopping.patience=2", "optimizer.lr=1e-9")  # nothing improves
    whole = tiny(tmp_path, *settings, "train.epochs=3", name="whole")
    assert fit(whole)["stopped_early"] is None  # all its epochs were run
    recipe = tiny(tmp_path, *settings, "train.epochs=30")
    summary = fit(recipe)
    reason = "no better robust validation accuracy in 2 epochs (early_stopping.patience)"
    assert summary["stopped_early"] == reason
    assert (summary["last"]["epoch"], summary["best"]["epoch"]) == (3, 1)
    assert "stopped after epoch 3" in capsys.readouterr().out
    assert fit(recipe, resume=True)["last"]["epoch"] == 3
    assert len(metrics(recipe)) == 3


def test_patience_and_guard_wait_for_the_attack(tmp_path, monkeypatch):
    """Robust accuracy does not rise before it is trained for, and its fall there is no overfitting."""
    looks = spied(monkeypatch, CatastrophicOverfittingGuard, "check")
    settings = ("optimizer.lr=1e-9", "early_stopping.patience=1", "objective.name=fgsm_rs")
    recipe = tiny(
        tmp_path, *settings, "train.eps_zero_epochs=2", "train.eps_warmup_epochs=1", "train.epochs=9"
    )
    assert fit(recipe)["last"]["epoch"] == 4
    assert ["train/guard_robust_accuracy" in epoch for epoch in metrics(recipe)] == [False, False, True, True]
    assert len(looks) == 2


@pytest.mark.parametrize(("action", "epochs"), [("warn", 4), ("stop", 3), ("ignore", 4)])
def test_catastrophic_overfitting_is_said_and_may_stop_the_run(action, epochs, tmp_path, monkeypatch, capsys):
    """Single-step training that collapses looks perfect by its own attack; the log must say what happened."""
    accuracies = iter([0.4, 0.5, 0.1, 0.1])

    def check(self, model, x, y, threat, generator=None):
        assert threat.eps == 0.1
        return self.update(next(accuracies))

    monkeypatch.setattr(CatastrophicOverfittingGuard, "check", check)
    recipe = tiny(tmp_path, "objective.name=fgsm_rs", f"train.overfitting_guard={action}", "train.epochs=4")
    summary = fit(recipe)
    assert summary["last"]["epoch"] == epochs
    where = "on 100 training images under PGD-5"
    said = f"catastrophic overfitting: robust accuracy {where} fell from 50 % to 10 %"
    assert (said in capsys.readouterr().out) == (action != "ignore")
    assert ("catastrophic_overfitting" in metrics(recipe)[2]) == (action != "ignore")
    reason = f"epoch 3: {said} (train.overfitting_guard)" if action == "stop" else None
    assert json.loads((run_folder(recipe) / "summary.json").read_text())["stopped_early"] == reason


def test_the_guard_measures_the_trained_model_against_the_full_radius(tmp_path, monkeypatch):
    """The same images, attack and model at every look, or a fall may be the sample's or the warm-up's."""
    seen = spied(monkeypatch, CatastrophicOverfittingGuard, "check")
    settings = ("objective.name=fgsm_rs", "train.eps_warmup_epochs=2", "train.epochs=2")
    recipe = tiny(tmp_path, *settings, "averaging={name: ema, decay: 0.9}")
    run = open_run(recipe)
    train(run)
    (_, model, x, _, threat, generator, _), (_, later_model, later_x, _, later_threat, later, _) = seen
    assert model is later_model is run.bare
    assert torch.equal(x, later_x)
    assert (threat.eps, later_threat.eps) == (0.1, 0.1)
    assert generator.initial_seed() == later.initial_seed()
    assert metrics(recipe)[1]["train/guard_robust_accuracy"] == run.guard.last
