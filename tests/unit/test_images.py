"""Adversarial images that are kept, who fell to what, and images of one model as an attack on another."""

import hashlib
import json
import warnings
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from wcitrain.attacks import ThreatModel
from wcitrain.evaluation import AttackResult, Evaluation, PreflightWarning, Transfer, evaluate, save_images
from wcitrain.evaluation.attacking import AttackState, Stage, Victim, run_stages
from wcitrain.report.figures import accuracy_curve

LINF = ThreatModel("linf", 0.05)
BALLS = [LINF, ThreatModel("l2", 0.4), ThreatModel("l1", 3.0)]


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * 64, 24), nn.Tanh(), nn.Linear(24, 4)).eval()


def examples(model: nn.Module, num: int = 40, num_wrong: int = 4):
    """Images with the labels the model gives to all but the first few."""
    x = torch.rand(num, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        y = model(x).argmax(1)
    y[:num_wrong] = (y[:num_wrong] + 1) % 4
    return x, y


def run(model, x, y, threats=LINF, **settings):
    settings = {"preflight": "off", "attacks": ["pgd-2x3", "margin-5"], "keep_images": True} | settings
    return evaluate(model, [(x, y)], threats, **settings)


@pytest.mark.filterwarnings("ignore::wcitrain.evaluation.PreflightWarning")
def test_kept_images_give_the_printed_accuracies_in_the_order_of_the_data(tmp_path):
    """Images of another batch, of the last restart or rounded to 8 bits would give another number."""
    model = small_model()
    x, y = examples(model)
    settings = {"batch_size": 17, "preflight": "warn"}
    made = run(model, x, y, BALLS, attacks=["pgd-2x3", "fgsm"], **settings)
    ensemble = run(model, x, y, attacks="autoattack:apgd-ce", **settings)
    made = replace(made, attacks=made.attacks + ensemble.attacks)
    made = replace(made, index=torch.randperm(40, generator=torch.Generator().manual_seed(0)))
    assert {finding.name for finding in made.findings} <= {
        "targeted_helps"
    }  # of two steps; not images_differ
    for k, result in enumerate(made.attacks):
        path = tmp_path / f"{k}.safetensors"
        assert save_images(path, made, result, "m") == hashlib.sha256(path.read_bytes()).hexdigest()
        read = load_file(path)
        assert torch.equal(model(read["images"]).argmax(1) == read["labels"], result.is_robust)
        assert 0 < result.is_robust.sum() < result.fell_in.ne(0).sum()  # some fell, and some did not
        assert torch.equal(read["is_robust"], result.is_robust)
        assert torch.equal(read["labels"], y)
        assert torch.equal(read["index"], made.index)
        delta = (read["images"] - x).flatten(1)
        order = {"linf": torch.inf, "l2": 2, "l1": 1}[result.threat.norm]
        lengths = delta.norm(order, dim=1)
        assert bool((lengths <= result.threat.eps * (1 + 1e-5)).all())
        assert bool((lengths > 0).any())
        with safe_open(path, "pt") as file:
            about = json.loads(file.metadata()["about"])
        assert (about["digest"], about["source"]) == (made.digest, "m")
    with pytest.raises(ValueError, match=r"pgd-2x3: got no images; .* keep_images=True"):
        save_images(path, made, run(model, x, y, keep_images=False).attacks[0], "m")


class Middle(nn.Module):
    """Class 1 where the mean of an image is in [0.4, 0.6], else class 0."""

    def forward(self, x):
        mean = x.mean((1, 2, 3))
        return torch.stack([(mean - 0.5).abs(), torch.full_like(mean, 0.1)], 1)


@pytest.mark.parametrize("has_file", [False, True])
def test_the_image_kept_is_the_first_that_fooled_the_model_or_the_last_tried(has_file, tmp_path):
    """Wrong at once and right under attack, broken by the first or second stage, never broken."""
    x, y = (
        torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5])[:, None, None, None].expand(5, 1, 2, 2).clone(),
        torch.ones(5),
    )
    first, second = torch.tensor([0.5, 0.8, 0.7, 0.5, 0.45]), torch.tensor([0.1, 0.1, 0.1, 0.1, 0.55])

    def stage(name, means, **settings):
        return Stage(name, lambda x, y, k: means[k][:, None, None, None].expand_as(x), **settings)

    victim = Victim(Middle(), x, y.long(), batch_size=2)
    state = AttackState(victim.clean.is_right, tmp_path / "s.npz" if has_file else None, x)
    stages = [stage("one", first, attacks_all=True), stage("two", second)]
    run_stages(stages, victim, ThreatModel("linf", 1.0), state, "")
    assert state.images[:, 0, 0, 0].tolist() == pytest.approx([0.9, 0.8, 0.7, 0.1, 0.55])
    assert state.fell_in.tolist() == [0, 0, 1, 2, -1]
    assert torch.equal(x[:, 0, 0, 0], torch.tensor([0.9, 0.9, 0.5, 0.5, 0.5]))  # the data is not written to


def test_a_killed_evaluation_goes_on_with_the_images_it_had(tmp_path):
    """Images of finished batches that were lost would be clean ones under the attack's name."""
    model = small_model()
    x, y = examples(model)
    whole = run(model, x, y, batch_size=9, folder=tmp_path / "whole")
    calls = 0

    def count(*_):
        nonlocal calls
        calls += 1
        if calls == 17:
            raise KeyboardInterrupt

    hook = model[3].register_forward_hook(count)
    with pytest.raises(KeyboardInterrupt):
        run(model, x, y, batch_size=9, folder=tmp_path / "killed")
    hook.remove()
    (state,) = (tmp_path / "killed").glob("*.npz")
    assert AttackState(torch.ones(40).bool(), state).batch > 0
    resumed = run(model, x, y, batch_size=9, folder=tmp_path / "killed")
    for _ in range(2):  # the second time nothing is attacked
        for a, b in zip(whole.attacks, resumed.attacks, strict=True):
            assert torch.equal(a.images, b.images)
            assert torch.equal(a.fell_in, b.fell_in)
        resumed = run(model, x, y, batch_size=9, folder=tmp_path / "killed")
    for file in (tmp_path / "killed").glob("*.npy"):
        file.unlink()
    again = run(model, x, y, batch_size=9, folder=tmp_path / "killed")
    assert torch.equal(again.attacks[0].images, whole.attacks[0].images)
    without = run(model, x, y, batch_size=9, folder=tmp_path / "killed", keep_images=False)
    assert without.attacks[0].images is None
    assert torch.equal(without.worst(), whole.worst())


def test_images_on_which_a_random_model_answers_otherwise_are_named():
    """The file would be taken for the proof of an accuracy that it does not give."""

    class Noisy(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def forward(self, x):
            return self.model(x + 0.2 * torch.randn_like(x))

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)
        made = run(Noisy(), *examples(small_model()), preflight="warn")
    assert "images_differ" in {finding.name for finding in made.findings}


def test_who_fell_to_which_attack_first_and_alone():
    """Two attacks that break the same images are one attack; one that breaks its own is needed."""
    clean = torch.tensor([False, True, True, True, True, True])
    flags = {"pgd-2": [0, 0, 1, 0, 1, 1], "margin-2": [0, 0, 0, 1, 1, 1], "dlr-2": [0, 0, 1, 1, 1, 1]}
    results = [
        AttackResult(LINF, name, torch.tensor(row).bool(), torch.zeros(6)) for name, row in flags.items()
    ]
    results.append(AttackResult(BALLS[1], "fgsm", clean.clone(), torch.zeros(6)))
    made = Evaluation(torch.zeros(6).long(), clean, torch.zeros(6), tuple(results))
    assert made.fell_to(LINF).tolist() == [0, 1, 2, 1, -1, -1]
    assert made.falls(LINF) == [(2, 2, 1), (2, 1, 1), (1, 0, 0)]
    lines = made.table().splitlines()
    assert [line.split()[-3:] for line in lines[3:5]] == [["2", "1", "1"], ["1", "0", "0"]]  # no loss behind
    rows = made.as_dict()["attacks"]
    assert [row["num_broken_first"] for row in rows] == [2, 1, 0, 0]
    mixed = replace(made, attacks=(made.attacks[0], made.attacks[3], *made.attacks[1:3]))
    assert [row["num_broken_first"] for row in mixed.as_dict()["attacks"]] == [2, 0, 1, 0]
    one = replace(made, attacks=(made.attacks[0],))
    assert "alone" not in one.table()


def test_the_stage_that_broke_each_example_is_in_the_file(tmp_path):
    """Which part of an ensemble was needed is asked when the model is gone."""
    model = small_model()
    x, y = examples(model)
    made = run(model, x, y, attacks="pgd-1x4", keep_images=False)
    (result,) = Evaluation.load(made.save(tmp_path / "x.npz")).attacks
    assert torch.equal(result.fell_in, made.attacks[0].fell_in)
    assert torch.equal(result.fell_in == -1, result.is_robust)
    assert torch.equal(result.fell_in == 0, ~made.is_clean)
    left = torch.stack([(result.fell_in == -1) | (result.fell_in > k) for k in range(1, 5)])
    assert left.double().mean(1).tolist() == pytest.approx(list(result.after.values()))


def test_the_hash_of_kept_images_is_theirs(tmp_path):
    """Twice the same numbers with another hash: nobody could check a file against its table."""
    model = small_model()
    made = run(model, *examples(model))
    hashes = {save_images(tmp_path / f"{k}.safetensors", made, made.attacks[0], "plain") for k in range(8)}
    assert len(hashes) == 1


def test_images_of_another_model_are_an_attack_without_a_pass_of_gradients(tmp_path):
    """Transfer finds what gradients hide; images made of others would be an attack on nothing."""
    model, other = small_model(), small_model(3)
    x, y = examples(model)
    source = run(other, x, y, [LINF, BALLS[1]], attacks="pgd-3")
    paths = [tmp_path / f"{k}.safetensors" for k in range(2)]
    for path, result in zip(paths, source.attacks, strict=True):
        save_images(path, source, result, "other")
    files = [Transfer.load(path) for path in paths]
    made = run(model, x, y, attacks="pgd-3", transfer_images=files, batch_size=7)
    names = [
        ("linf 0.05", "pgd-3"),
        ("linf 0.05", "transfer pgd-3 of other"),
        ("l2 0.4", "transfer pgd-3 of other"),
    ]
    assert [(str(r.threat), r.attack) for r in made.attacks] == names
    for result, origin in zip(made.attacks[1:], source.attacks, strict=True):
        right = (model(origin.images).argmax(1) == y) & made.is_clean
        assert torch.equal(result.is_robust, right)
    curves = run(model, x, y, [LINF, ThreatModel("linf", 0.02)], attacks="pgd-3", transfer_images=files)
    (ax,) = accuracy_curve(curves, "linf", "").axes  # the images have one radius, the attack two
    assert [len(container[0].get_xdata()) for container in ax.containers] == [3, 2, 3]
    backward = []
    model[1].register_full_backward_hook(lambda *_: backward.append(1))
    run(model, x, y, attacks=(), transfer_images=files)
    assert not backward
    for images, labels in ((x.flip(0), y.flip(0)), (x[:20], y[:20])):
        with pytest.raises(
            ValueError, match=r"transfer pgd-3 of other: got 40 images made of other ones; expected"
        ):
            run(model, images, labels, transfer_images=files)
    with pytest.raises(ValueError, match=r"transfer_images: got .* expected names that differ"):
        run(model, x, y, transfer_images=[files[0], files[0]])
    save_file({"images": x}, tmp_path / "x.safetensors")
    for path in (tmp_path / "x.safetensors", tmp_path / "none", __file__):
        with pytest.raises(ValueError, match=r"--transfer-images: got .*; expected adversarial images that"):
            Transfer.load(path)


def test_a_transfer_attack_that_breaks_more_than_gradients_is_noticed(tmp_path):
    """Athalye et al. 2018: where a black-box attack is the better one, gradients are masked."""

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = small_model()

        def forward(self, x):
            return self.model(x.detach() - 1e-3 * (x - x.detach()))

    model = small_model()
    x, y = examples(model)
    source = run(model, x, y, attacks="pgd-5")
    save_images(tmp_path / "x.safetensors", source, source.attacks[0], "plain")
    transfers = [Transfer.load(tmp_path / "x.safetensors")]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)
        made = run(Masked(), x, y, attacks="pgd-5", transfer_images=transfers, preflight="warn")
    (text,) = [finding.text for finding in made.findings if finding.name == "transfer_helps"]
    assert text.startswith("images made on another model break 6 of 36")


def test_images_of_a_stronger_attack_on_the_same_model_say_that_the_attack_is_weak(tmp_path):
    """They were called a sign of masked gradients, of a model that has none."""
    model, twin = small_model(), small_model()
    for one in (model, twin):
        one[1].weight.data *= 6  # a single step goes astray
    x, y = examples(model)
    source = run(model, x, y, attacks="pgd-20x3")
    save_images(tmp_path / "x.safetensors", source, source.attacks[0], "plain")
    settings = {"attacks": "fgsm", "transfer_images": [Transfer.load(tmp_path / "x.safetensors")]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", PreflightWarning)
        made = run(model, x, y, preflight="warn", transfer=twin, **settings)
        other = run(small_model(3), x, y, preflight="off", **settings)
    names = {finding.name: finding.text for finding in made.findings}
    assert "transfer_helps" not in names
    assert names["weak_attack"].startswith("images made on this model break ")
    assert [result.attack.endswith("(this model)") for result in made.attacks] == [False, True, True]
    assert not other.attacks[1].attack.endswith("(this model)")


def test_a_mended_model_or_other_stand_ins_are_attacked_anew(tmp_path):
    """The forward pass is the same: the kept state of the model that fooled the attack answered for it."""

    class Turned(nn.Module):
        def __init__(self, factor: float) -> None:
            super().__init__()
            self.model, self.factor = small_model(), factor

        def forward(self, x):
            return self.model(x.detach() + self.factor * (x - x.detach()))

    x, y = examples(small_model())
    by_factor = [run(Turned(k), x, y, attacks="pgd-5", folder=tmp_path).attacks[0] for k in (-1.0, 1.0)]
    assert int(by_factor[0].is_robust.sum()) > int(by_factor[1].is_robust.sum())
    stand_ins = {"2": lambda z: -z}, ["2"]
    twins = {"transfer": small_model(), "bpda": {"0": lambda z: 0 * z.flatten(1)}}
    none, other = run(small_model(), x, y, attacks="pgd-5", preflight="off", **twins).attacks
    assert torch.equal(none.is_robust, other.is_robust)  # both without a gradient
    turned, through = (run(small_model(), x, y, attacks="pgd-5", folder=tmp_path, bpda=b) for b in stand_ins)
    assert not torch.equal(turned.attacks[0].is_robust, through.attacks[0].is_robust)
