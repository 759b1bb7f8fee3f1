"""``wcitrain evaluate`` on what training leaves behind: tables, files, curves, kills and comparisons."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
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
QUICK = ["--attacks", "pgd-2", "--examples", "20"]

pytestmark = pytest.mark.filterwarnings("ignore::wcitrain.evaluation.PreflightWarning")


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.is_file())


def test_a_run_is_evaluated_with_table_files_and_curve(run, capsys):
    """The one command before a number is published; it must be that of the library on the images it names."""
    options = "--attacks pgd-2 margin-2 --eps 1/255 0.1 --examples 30"
    assert main(f"evaluate {run} {options}".split()) == 0
    printed = capsys.readouterr().out
    stem = "last-test-pgd-2+margin-2-linf-1_255-linf-0.1-n30"
    assert files(run / "evaluations") == [f"{stem}.json", f"{stem}.npz", f"{stem}.png"]
    assert (run / "evaluations" / f"{stem}.png").stat().st_size > 10_000
    assert "linf 1/255   margin-2" in printed
    assert printed.startswith("tiny-s0 (last, epoch 1), 30 images of test, in random order\n")
    read = Evaluation.load(run / "evaluations" / f"{stem}.npz")
    document = json.loads((run / "evaluations" / f"{stem}.json").read_text())
    assert document["worst_case_of_all"]["accuracy"] == read.robust_accuracy()
    assert (document["at"], document["split"], document["num_examples"]) == ("last", "test", 30)
    assert (document["recipe"], document["overrides"]) == (None, [])
    assert (document["data"]["source"], document["threat"]["eps"]) == ("digits", 0.1)

    recipe = recipe_from_dict(TINY)
    splits = load_splits(recipe.data)
    again = evaluate(
        load_exported(run / "model" / "last"),
        splits.test.take(read.index).batches(7),
        [ThreatModel("linf", 1 / 255), ThreatModel("linf", 0.1)],
        attacks=["pgd-2", "margin-2"],
    )
    assert all(
        torch.equal(a.is_robust, b.is_robust) for a, b in zip(read.attacks, again.attacks, strict=True)
    )
    assert torch.equal(read.is_clean, again.is_clean)
    assert torch.equal(read.labels, again.labels)


def test_released_corruptions_are_read_at_the_places_of_the_chosen_images(run, tmp_path):
    """The images of ``--examples`` are chosen at random: the files' first ones would be others."""
    test = load_splits(recipe_from_dict(TINY).data).test
    num = len(test.decoder.source.labels)  # of which the run has fewer
    levels = np.stack([test.decoder[k][0] for k in range(num)]).astype(np.uint8)
    np.save(tmp_path / "fog.npy", np.tile((levels * 255.0 / 16).round().astype(np.uint8), (5, 1, 1)))
    np.save(tmp_path / "labels.npy", test.decoder.source.labels.repeat(5).numpy())
    options = f"--corruptions fog --corruptions-root {tmp_path} --attacks fgsm --examples 20"
    assert main(f"evaluate {run} {options}".split()) == 0
    read = Evaluation.load(run / "evaluations" / "last-test-fgsm-n20-fog.npz")
    assert read.corrupted["fog", 3].float().mean() > 0.9 * read.clean_accuracy


def test_fewer_images_are_a_fixed_random_choice(run):
    """The first images of a sorted split are of one class; other images for each seed are no comparison."""
    splits = load_splits(recipe_from_dict(TINY).data)
    images = splits.train.take(splits.train.y.argsort())
    few, places = chosen(images, 60)
    assert torch.equal(few.y, images.y[places])
    assert set(few.y.tolist()) == set(range(10))
    assert len(set(places.tolist())) == 60
    assert torch.equal(chosen(images, 20)[1], places[:20])
    for num in (None, len(images), 100_000):
        assert chosen(images, num) == (images, None)
    stream = StreamSet(lambda **_: None, 100, 8)
    assert chosen(stream, 10) == (stream, None)
    for seed in ("0", "3"):
        assert main(["evaluate", str(run), *QUICK, "--seed", seed]) == 0
    indices = [Evaluation.load(path).index for path in (run / "evaluations").glob("*.npz")]
    assert len(indices) == 2
    assert torch.equal(indices[0], indices[1])


def test_the_whole_split_is_the_whole_split_whatever_number_was_asked_for(run, capsys):
    """A name with 100000 in it says that so many images were looked at, and keeps the same result twice."""
    for options in ([], ["--examples", "100000"], ["--examples", "50"]):
        assert main(["evaluate", str(run), "--attacks", "fgsm", *options]) == 0
        assert capsys.readouterr().out.startswith("tiny-s0 (last, epoch 1), 50 images of test\n")
    assert files(run / "evaluations") == ["last-test-fgsm.json", "last-test-fgsm.npz"]


def test_overrides_do_not_replace_the_results_of_the_recipe(run):
    """Fewer classes, another test set or radius would stand under the name of the run's own evaluation."""
    own = ["--recipe", str(run / "recipe.yaml")]
    overrides = (["--recipe", f"threat.eps={eps}"] for eps in (0.05, 0.08))
    for recipe in ([], *overrides, [*own, "threat.eps=0.08"], own):
        assert main(["evaluate", str(run), *QUICK, *recipe]) == 0
    found = [json.loads(path.read_text()) for path in (run / "evaluations").glob("*.json")]
    radii = sorted((d["threat"]["eps"], d["attacks"][0]["threat"]["eps"]) for d in found)
    assert radii == [(0.05, 0.05), (0.08, 0.08), (0.1, 0.1), (0.1, 0.1)]
    assert {tuple(d["overrides"]) for d in found} == {(), ("threat.eps=0.05",), ("threat.eps=0.08",)}


def test_a_union_of_norms_can_be_asked_for(run):
    """Robust to one norm is not robust to another; the worst of both is a number of its own."""
    options = "--attacks fgsm --examples 20 --norm l2 --eps linf:8/255 linf:4/255 0.5"
    assert main(f"evaluate {run} {options}".split()) == 0
    stem = "last-test-fgsm-linf-8_255-linf-4_255-l2-0.5-n20"
    assert files(run / "evaluations") == [f"{stem}-linf.png", f"{stem}.json", f"{stem}.npz"]
    threats = Evaluation.load(run / "evaluations" / f"{stem}.npz").threats
    assert threats == (ThreatModel("linf", 8 / 255), ThreatModel("linf", 4 / 255), ThreatModel("l2", 0.5))


def test_long_names_are_shortened_and_stay_different(run):
    """A name of more than 255 bytes fails when everything is done."""
    radii = [f"{k}/2550" for k in range(1, 25)]
    for more in ("0.1", "0.2"):
        options = ["--attacks", "fgsm", "--examples", "5", "--preflight", "off", "--eps", *radii, more]
        assert main(["evaluate", str(run), *options]) == 0
    names = [path.stem for path in (run / "evaluations").glob("*.npz")]
    assert [len(name) for name in names] == [120, 120]


def test_a_folder_that_cannot_be_written_fails_before_the_attacks_and_a_full_disk_after_the_table(
    run, tmp_path, capsys, monkeypatch
):
    """Hours of attacks must not end in a message about a file."""
    (tmp_path / "file").write_text("")
    with monkeypatch.context() as patch:
        patch.setattr("wcitrain.commands.evaluate.evaluate", lambda *_, **__: pytest.fail("attacked"))
        assert main(["evaluate", str(run), *QUICK, "--out", str(tmp_path / "file")]) == 2

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Evaluation, "save", full)
    capsys.readouterr()
    assert main(["evaluate", str(run), *QUICK]) == 2
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "linf 0.1  pgd-2" in message


def test_a_killed_command_goes_on_when_it_is_given_again(run, monkeypatch):
    """Attacks of hours are killed by time limits; the second run must not begin again, nor end elsewhere."""
    options = "--attacks autoattack:apgd-ce --eps 1/255 --batch-size 2 --preflight off"
    arguments = f"evaluate {run} {options}".split()
    forward, calls, limit = Classifier.forward, 0, None

    def counted(self, images):
        nonlocal calls
        calls += 1
        if limit is not None and calls > limit:
            raise KeyboardInterrupt
        return forward(self, images)

    monkeypatch.setattr(Classifier, "forward", counted)
    assert main([*arguments, "--out", str(run / "whole")]) == 0
    total, calls, limit = calls, 0, 3 * calls // 4
    assert main([*arguments, "--out", str(run / "killed")]) == 130
    assert files(run / "killed" / "state")
    assert not list((run / "killed").glob("*.npz"))
    calls, limit = 0, None
    assert main([*arguments, "--out", str(run / "killed")]) == 0
    assert calls < 0.8 * total
    (whole,), (resumed,) = ((run / name).glob("*.npz") for name in ("whole", "killed"))
    assert torch.equal(Evaluation.load(whole).worst(), Evaluation.load(resumed).worst())


def test_two_models_are_compared_and_other_images_are_refused(run, tmp_path, capsys):
    """Which of two runs is better is asked on the same images, by a test."""
    state = load_checkpoint(run / "checkpoints")[0]["model"]
    state = {k: v + 0.5 if k.endswith("fc.bias") and v.ndim else v for k, v in state.items()}
    state = {f"module.{k}": v for k, v in state.items()}
    torch.save({"epoch": 1, "state_dict": state}, tmp_path / "other.pt")
    recipe = ["--recipe", str(run / "recipe.yaml")]
    other = tmp_path / "other.pt"
    for target, out, options in ((run, "a", []), (other, "b", recipe), (run, "c", ["--split", "val"])):
        assert main(["evaluate", str(target), *QUICK, "--out", str(tmp_path / out), *options]) == 0
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
    assert main([*f"evaluate {run} {options}".split(), *QUICK]) == 0
    (file,) = (run / "evaluations").glob("*.npz")
    assert file.stem == "best-train-pgd-2-l2-0.5-n20-b9-s3"
    read = Evaluation.load(file)
    assert read.threats == (ThreatModel("l2", 0.5),)
    assert (read.settings["seed"], read.settings["batch_size"], read.num_examples) == (3, 9, 20)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{run}", "--attacks", "pgd"], "attacks: got 'pgd'; expected fgsm; pgd-STEPS"),
        (["{run}", "--eps", "eight"], "--eps: got 'eight'; expected a radius"),
        (["{run}", "--eps", "8"], "Did you mean 8/255?"),
        (["{run}", "--eps", "l3:0.5"], "ThreatModel.norm: got 'l3'"),
        (["{run}", "--corruptions", "fog"], "--corruptions: got fog with --corruptions-root None"),
        (["--attacks", "pgd-2", "{run}"], "Give a model as the first word"),
        (["{run}", "--norm", "l2"], "--norm: got l2 without --eps"),
        (["{run}", "--corruptions", "rain", "--corruptions-root", "."], "corruptions: got rain; expected"),
        (["{run}", "--examples", "0"], "num_examples=0"),
        (["{run}", "--compare", "a.npz", "b.npz"], "got both of TARGET and --compare"),
        (["--compare", "{run}/recipe.yaml", "{run}/recipe.yaml"], "got another file"),
    ],
)
def test_wrong_input_is_explained(arguments, message, trained, capsys, monkeypatch):
    """A traceback does not say what to do, and nothing may be loaded or written."""
    monkeypatch.setattr("wcitrain.targets.load_splits", lambda _: pytest.fail("loaded"))
    assert main(["evaluate", *(text.format(run=trained) for text in arguments)]) == 2
    assert message in capsys.readouterr().err
    assert not (trained / "evaluations").exists()


def test_findings_are_printed_and_errors_stop(run, capsys, monkeypatch):
    """A model with a softmax inside would get a robust accuracy that is too high."""
    forward = Classifier.forward
    monkeypatch.setattr(Classifier, "forward", lambda self, x: forward(self, x).softmax(1))
    assert main(["evaluate", str(run), *QUICK]) == 2
    assert "preflight: probabilities" in capsys.readouterr().err
    assert main(["evaluate", str(run), *QUICK, "--preflight", "warn"]) == 0
    assert "error: probabilities" in capsys.readouterr().out
    (file,) = (run / "evaluations").glob("*.json")
    assert json.loads(file.read_text())["findings"][0]["name"] == "probabilities"
