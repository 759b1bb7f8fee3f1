"""``wcitrain evaluate`` on what training leaves behind: tables, files, curves, kills and comparisons."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tiny_run import TINY as BASE

from wcitrain.__main__ import main
from wcitrain.attacks import ThreatModel
from wcitrain.checkpoint import load_checkpoint
from wcitrain.commands.evaluate import chosen
from wcitrain.data import StreamSet, load_splits
from wcitrain.evaluation import Evaluation, evaluate
from wcitrain.models import Classifier, load_exported
from wcitrain.recipe import recipe_from_dict

TINY = BASE | {
    "data": {"source": "digits", "val_size": 100, "max_train": 300, "max_test": 50},
    "objective": {"num_steps": 1, "step_size": 0.1},
    "train": {"epochs": 1, "batch_size": 20, "device": "cpu"},
    "evaluation": {"train_size": 50, "num_steps": 1, "step_size": 0.1},
}
QUICK = "--attacks pgd-2 --examples 20"

pytestmark = pytest.mark.filterwarnings("ignore::wcitrain.evaluation.PreflightWarning")


def command(target: Path, options: str) -> int:
    return main(["evaluate", str(target), *options.split()])


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def splits():
    return load_splits(recipe_from_dict(TINY).data)


def test_a_run_is_evaluated_with_table_files_and_curve(run, capsys):
    """The one command before a number is published; it must be that of the library on the images it names."""
    assert command(run, "--attacks pgd-2 margin-2 --norm l2 --eps linf:1/255 linf:0.1 0.5 --examples 30") == 0
    printed = capsys.readouterr().out
    stem = "last-test-pgd-2+margin-2-linf-1_255-linf-0.1-l2-0.5-n30"
    assert files(run / "evaluations") == [f"{stem}-linf.png", f"{stem}.json", f"{stem}.npz"]
    assert (run / "evaluations" / f"{stem}-linf.png").stat().st_size > 10_000
    assert "linf 1/255   margin-2" in printed
    assert printed.startswith("tiny-s0 (last, epoch 1), 30 of 50 images of test\n")
    read = Evaluation.load(run / "evaluations" / f"{stem}.npz")
    document = json.loads((run / "evaluations" / f"{stem}.json").read_text())
    assert document["worst_case_of_all"]["accuracy"] == read.robust_accuracy()
    assert (document["at"], document["split"], document["num_examples"]) == ("last", "test", 30)
    threats = [ThreatModel("linf", 1 / 255), ThreatModel("linf", 0.1), ThreatModel("l2", 0.5)]
    model, batches = load_exported(run / "model" / "last"), splits().test.take(read.index).batches(7)
    again = evaluate(model, batches, threats, attacks=["pgd-2", "margin-2"])
    for a, b in zip(read.attacks, again.attacks, strict=True):
        assert torch.equal(a.is_robust, b.is_robust)
    assert torch.equal(read.is_clean, again.is_clean)


def test_released_corruptions_are_read_at_the_places_of_the_chosen_images(run, tmp_path):
    """The images of ``--examples`` are chosen at random: the files' first ones would be others."""
    test = splits().test
    levels = (test.source.pixels * 255.0 / 16).round().astype(np.uint8)  # of which the run has fewer
    np.save(tmp_path / "fog.npy", np.tile(levels, (5, 1, 1)))
    np.save(tmp_path / "labels.npy", test.source.labels.repeat(5).numpy())
    assert command(run, f"--corruptions fog --corruptions-root {tmp_path} --attacks fgsm --examples 20") == 0
    read = Evaluation.load(run / "evaluations" / "last-test-fgsm-n20-fog.npz")
    assert read.corrupted["fog", 3].float().mean() > 0.9 * read.clean_accuracy


def test_saved_images_are_those_of_the_accuracy_and_attack_another_model(run, tmp_path, capsys):
    """Somebody else must find the number in the file; other pixels, order or labels give another."""
    options = (
        "--save-images --attacks pgd-2 margin-2 --eps linf:0.02 l2:0.5 --minimal-eps 0.1 l2:1 --examples 12"
    )
    assert command(run, options) == 0
    printed = capsys.readouterr().out
    (path,) = (run / "evaluations").glob("*.json")
    document, model = json.loads(path.read_text()), load_exported(run / "model" / "last")
    index = Evaluation.load(path.with_suffix(".npz")).index
    for row in document["attacks"]:
        file = run / "evaluations" / row["images"]["file"]
        assert row["images"]["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
        saved = load_file(file)
        assert float((model(saved["images"]).argmax(1) == saved["labels"]).double().mean()) == row["accuracy"]
        assert torch.equal(saved["index"], index)
        clean = splits().test.take(index)
        assert torch.equal(saved["labels"], clean.y)
        x = torch.cat([batch for batch, *_ in clean.batches(5)])
        order = {"linf": torch.inf, "l2": 2}[row["threat"]["norm"]]
        length = float((saved["images"] - x).flatten(1).norm(order, dim=1).max())
        assert 0 < length <= row["threat"]["eps"] * (1 + 1e-5)
        assert str(file) in printed
    assert [one["largest"] for one in document["minimal_eps"]] == [
        {"norm": "linf", "eps": 0.1},
        {"norm": "l2", "eps": 1.0},
    ]
    assert "smallest radius" in printed
    assert "broken  first  alone" in printed
    assert (path.parent / f"{path.stem}-minimal.png").stat().st_size > 10_000
    state = load_checkpoint(run / "checkpoints")[0]["model"]
    torch.save({k: v + 0.3 if k.endswith("fc.bias") else v for k, v in state.items()}, tmp_path / "other.pt")
    saved = run / "evaluations" / document["attacks"][0]["images"]["file"]
    options = f"--attacks fgsm --eps 0.02 --transfer-images {saved} --recipe {run}/recipe.yaml"
    assert command(tmp_path / "other.pt", f"{options} --examples 12") == 0
    assert "transfer pgd-2 of tiny-s0" in capsys.readouterr().out
    assert command(tmp_path / "other.pt", options) == 2
    assert "transfer pgd-2 of tiny-s0 last: got 12 images made of other ones" in capsys.readouterr().err


def test_fewer_images_are_a_fixed_random_choice(run):
    """The first images of a sorted split are of one class; other images for each seed are no comparison."""
    train = splits().train
    images = train.take(train.y.argsort())
    few, places = chosen(images, 60)
    assert torch.equal(few.y, images.y[places])
    assert set(few.y.tolist()) == set(range(10))
    assert torch.equal(chosen(images, 20)[1], places[:20])
    for num in (None, len(images), 100_000):
        assert chosen(images, num) == (images, None)
    stream = StreamSet(lambda **_: None, 100, 8)
    few, places = chosen(stream, 10)
    assert (few.limit, places) == (10, None)
    fgsm = "--attacks fgsm"
    for options in (f"{QUICK} --seed 0", f"{QUICK} --seed 3", fgsm, f"{fgsm} --examples 100000"):
        assert command(run, options) == 0
    whole, first, second = sorted((run / "evaluations").glob("*.npz"))
    assert whole.stem == "last-test-fgsm"  # whatever number was asked for
    assert torch.equal(Evaluation.load(first).index, Evaluation.load(second).index)


def test_overrides_do_not_replace_the_results_of_the_recipe(run):
    """Fewer classes, another test set or radius would stand under the name of the run's own evaluation."""
    own = f"--recipe {run}/recipe.yaml"
    for recipe in ("", "--recipe threat.eps=0.05", "--recipe threat.eps=0.08", f"{own} threat.eps=0.08", own):
        assert command(run, f"{QUICK} {recipe}") == 0
    found = [json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")]
    radii = sorted((d["threat"]["eps"], d["attacks"][0]["threat"]["eps"]) for d in found)
    assert radii == [(0.05, 0.05), (0.08, 0.08), (0.1, 0.1), (0.1, 0.1)]
    assert {tuple(d["overrides"]) for d in found} == {(), ("threat.eps=0.05",), ("threat.eps=0.08",)}


def test_what_cannot_be_written_fails_before_the_attacks_or_after_the_table(
    run, tmp_path, capsys, monkeypatch
):
    """Hours of attacks must not end in a message about a file."""
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("wcitrain.commands.evaluate.evaluate", lambda *_, **__: pytest.fail("attacked"))
        assert command(run, f"{QUICK} --out {tmp_path}/file") == 2

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Evaluation, "save", full)
    capsys.readouterr()
    assert command(run, QUICK) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "linf 0.1  pgd-2" in message


def test_a_killed_command_goes_on_when_it_is_given_again(run, monkeypatch):
    """Attacks of hours are killed by time limits; the second run must not begin again, nor end elsewhere."""
    options = "--attacks autoattack:apgd-ce --eps 1/255 --batch-size 2 --preflight off --out"
    forward, calls, limit = Classifier.forward, 0, None

    def counted(self, images):
        nonlocal calls
        calls += 1
        if limit is not None and calls > limit:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", counted)
    assert command(run, f"{options} {run}/whole") == 0
    total, calls, limit = calls, 0, 3 * calls // 4
    assert command(run, f"{options} {run}/killed") == 130
    assert files(run / "killed" / "state")
    assert not list((run / "killed").glob("*.npz"))
    calls, limit = 0, None
    assert command(run, f"{options} {run}/killed") == 0
    assert calls < 0.8 * total
    (whole,), (resumed,) = ((run / name).glob("*.npz") for name in ("whole", "killed"))
    assert torch.equal(Evaluation.load(whole).worst(), Evaluation.load(resumed).worst())


def test_two_models_are_compared_and_other_images_are_refused(run, tmp_path, capsys):
    """Which of two runs is better is asked on the same images, by a test."""
    state = load_checkpoint(run / "checkpoints")[0]["model"]
    state = {f"module.{k}": v + 0.5 if k.endswith("fc.bias") and v.ndim else v for k, v in state.items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "other.pt")
    other = tmp_path / "other.pt", "b", f"--recipe {run}/recipe.yaml"
    for target, out, options in ((run, "a", ""), other, (run, "c", "--split val")):
        assert command(target, f"{QUICK} --out {tmp_path}/{out} {options}") == 0
    capsys.readouterr()
    a, b, c = (str(next((tmp_path / out).glob("*.npz"))) for out in "abc")
    assert main(["evaluate", "--compare", a, b]) == 0
    assert "linf 0.1  pgd-2" in capsys.readouterr().out
    assert main(["evaluate", "--compare", a, c]) == 2
    assert "not the same images" in capsys.readouterr().err
    assert Path(c).name == "last-val-pgd-2-n20.npz"
    assert re.fullmatch(r"other-test-pgd-2-n20-r[0-9a-f]{8}\.npz", Path(b).name)


def test_options_reach_the_evaluation_and_name_the_files(run):
    """An option that is parsed and dropped evaluates something else under the right name."""
    options = "--at best --split train --norm l2 --eps 1/2 --seed 3 --batch-size 9"
    assert command(run, f"{options} {QUICK}") == 0
    read = Evaluation.load(run / "evaluations" / "best-train-pgd-2-l2-0.5-n20-b9-s3.npz")
    assert read.threats == (ThreatModel("l2", 0.5),)
    assert (read.settings["seed"], read.settings["batch_size"], read.num_examples) == (3, 9, 20)


def test_eot_bpda_and_transfer_reach_the_attacks_and_the_files(run, tmp_path, capsys):
    """Settings of the attack that are parsed and dropped would stand in the name of other numbers."""
    other = shutil.copytree(run, tmp_path / "other")
    options = f"{QUICK} --eot 2 --bpda backbone.bn1 --transfer {other} --preflight warn"
    assert command(run, options) == 0
    printed = capsys.readouterr().out
    assert "linf 0.1  pgd-2 eot-2 bpda-backbone.bn1" in printed
    assert "linf 0.1  transfer pgd-2 " in printed
    assert "warning: eot_without_noise: four passes agree" in printed
    (file,) = (run / "evaluations").glob("*.npz")
    net = tmp_path / "net.py"
    net.write_text(
        "from torch import nn\ndef linear(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))"
    )
    assert (
        command(run, f"{QUICK} --transfer {net}:linear --preflight warn --out {tmp_path}") == 0
    )  # on its data
    name = r"last-test-pgd-2-n20-eot2-bpda-backbone\.bn1-transfer-[0-9a-f]{8}\.npz"
    assert re.fullmatch(name, file.name)
    document = json.loads(file.with_suffix(".json").read_text())
    assert document["transfer"] == str(other)
    assert (document["settings"]["eot"], document["settings"]["bpda"]) == (2, ["backbone.bn1"])
    assert "eot_without_noise" in {finding["name"] for finding in document["findings"]}
    read = Evaluation.load(file)
    assert main(["evaluate", "--compare", str(file), str(file)]) == 0
    printed = capsys.readouterr().out
    assert all(
        f"{one}: {finding.severity}: {finding}" in printed for one in "AB" for finding in read.findings
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("{run} --attacks pgd", "attacks: got 'pgd'; expected fgsm; pgd-STEPS"),
        ("{run} --eps eight", "eps: got 'eight'; expected a finite number"),
        ("{run} --eps l3:0.5", "ThreatModel.norm: got 'l3'"),
        ("{run} --eps 8/255 --attacks", "--attacks: got none, with --eps; expected an attack"),
        ("{run} --corruptions fog", "--corruptions: got fog with --corruptions-root None"),
        ("{run} --corruptions-root .", "--corruptions-root: got it with no --corruptions; expected some"),
        ("{run} --norm l2 --eps linf:1/255", "--norm: got it with radii with norms of their own"),
        ("{run} --save-images --attacks", "--save-images: got it with no attack; expected one"),
        ("{run} --minimal-eps 0.1 --attacks", "--attacks: got none, with --minimal-eps"),
        ("{run} --minimal-eps 0.1 linf:0.2", "--minimal-eps: got 0.1 linf:0.2; expected one radius"),
        ("{run} --minimal-eps 0", "--minimal-eps: got 0; expected one radius above 0"),
        ("{run} --transfer-images {run}/recipe.yaml", "expected adversarial images that --save-images wrote"),
        (
            "--compare a.npz b.npz --seed 3 --split val",
            "--compare: got --split, --seed as well; expected two",
        ),
        ("--attacks pgd-2 {run}", "Give a model as the first word"),
        ("{run} --norm l2", "--norm: got l2 without --eps"),
        ("{run} --corruptions rain --corruptions-root .", "corruptions: got rain; expected"),
        ("{run} --examples 0", "--examples 0, --eot 1 and"),
        ("{run} --eot 0", "--eot 0 and --batch-size 200; expected at least 1"),
        ("{run} --compare a.npz b.npz", "got both of TARGET and --compare"),
        ("--compare {run}/recipe.yaml {run}/recipe.yaml", "got another file"),
    ],
)
def test_wrong_input_is_explained(arguments, message, trained, capsys, monkeypatch):
    """A traceback does not say what to do, and nothing may be loaded or written."""
    monkeypatch.setattr("wcitrain.targets.load_splits", lambda _: pytest.fail("loaded"))
    assert main(["evaluate", *arguments.format(run=trained).split()]) == 2
    assert message in capsys.readouterr().err
    assert not (trained / "evaluations").exists()


def test_findings_are_printed_and_errors_stop(run, capsys, monkeypatch):
    """A model with a softmax inside would get a robust accuracy that is too high."""
    forward = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda self, x: forward(self, x).softmax(1))
    assert command(run, QUICK) == 2
    assert "preflight: probabilities" in capsys.readouterr().err
    assert command(run, f"{QUICK} --preflight warn") == 0
    assert "error: probabilities" in capsys.readouterr().out
    (file,) = (run / "evaluations").glob("*.json")
    assert json.loads(file.read_text())["findings"][0]["name"] == "probabilities"
