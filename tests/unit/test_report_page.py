"""The report page: one file that needs nothing else, whose every value comes from the run folders."""

import json
import re
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from test_report import write_run

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.measures.landscape import Landscape
from wcitrain.report import load_run, write_report
from wcitrain.report.charts import curves, layers, overview, training_measures
from wcitrain.report.drawing import DARK, LIGHT, look
from wcitrain.report.figures import strip
from wcitrain.report.runs import differing_settings, group_rows

LINF = ThreatModel("linf", 0.1)
HEADER = {"at": "last", "split": "train", "seed": 0, "threat": "linf 8/255"}
ENTRY = {"value": 3.0, "stderr": None, "num_examples": 500, "settings": "PGD-10 linf 8/255"}
AT = "AT: last test, 100 examples, images aaaaaa"


def add_json(run, path, document):
    target = run.folder / path
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document))


def evaluation(clean, *robust, **changes):
    share = {"interval": [0.1, 0.9]}
    attacks = [
        {"threat": {"norm": "linf", "eps": i / 255}, "attack": "pgd-20", "accuracy": value, **share}
        for i, value in enumerate(robust, 1)
    ]
    document = {"at": "last", "split": "test", "num_examples": 100, "attacks": attacks, "digest": "aaaaaaaa"}
    document |= {"settings": {"seed": 0}, "findings": [], "clean": {"accuracy": clean, **share}}
    document["worst_case"] = [{"threat": entry["threat"], "accuracy": 0.0} for entry in attacks]
    return document | {"corruptions": {"fog": {"1": 0.5, "5": 0.1}}, "corrupted_accuracy": 0.3} | changes


class Page:
    """What a reader of the page meets: elements, text, sections by heading; refuses unbalanced tags."""

    def __init__(self, text):
        root = ElementTree.fromstring(re.sub(r"<!doctype html>|<meta[^>]*>", "", text))
        self.elements = [(element.tag, element.attrib) for element in root.iter()]
        self.text = "".join(root.find("body").itertext())
        self.sections = {section.findtext("h2"): section for section in root.iter("section")}

    def table(self, section):
        return [["".join(cell.itertext()) for cell in row] for row in self.sections[section].iter("tr")]

    def line(self, section, name):
        """The one line called ``name`` in the table of a section, by column."""
        header, *lines = self.table(section)
        (line,) = [line for line in lines if line[0] == name]
        return dict(zip(header, line, strict=True))


@pytest.fixture
def page_of(tmp_path):
    """Write the report of runs and read its page."""

    def read(*runs, **options):
        text = write_report(runs, tmp_path / "out", **options)[1].read_text("utf-8")
        return Page(text), text

    return read


@pytest.fixture
def three(tmp_path):
    """Two seeds of AT and one run of WCI."""
    at = [write_run(tmp_path / f"at-s{i}", seed=i, robust=robust) for i, robust in enumerate((0.5, 0.54))]
    wci = {"method": "WCI r=1", "robust": 0.6, "settings": {"penalty": {"name": "wci"}}}
    return [*at, write_run(tmp_path / "wci-s0", "wci", **wci)]


def test_the_page_needs_nothing_but_itself_and_everything_drawn_has_a_text(three, page_of):
    """A style sheet from elsewhere is missing on a train; two elements of one id break figures and links.

    A reader who does not see the page meets nameless pictures; one at night black letters on black.
    """
    page, text = page_of(*three)
    assert not re.search(r"http|@import|url\((?!#)|<script", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "script")
        for reference in (attributes.get("href", ""), *re.findall(r"url\(([^)]*)\)", str(attributes))):
            assert not reference.startswith("#") or reference[1:] in ids
            assert not reference or reference.startswith(("#", "data:"))
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 0
    assert all(a["scope"] in ("row", "col") for tag, a in page.elements if tag == "th")
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert "Training curves. Clean accuracy. % against epoch (10 steps each). Robust accuracy" in labels[1]
    svgs = re.findall(r"<svg.*?</svg>", text, re.S)
    assert len(svgs) == len(labels) == 3
    assert all("<text" in one for one in svgs)
    colours = set(re.findall(r"(?:fill|stroke): (#\w+|black|white)", "".join(svgs)))
    assert not colours & {*LIGHT.values(), "#000000", "black", "white"}
    assert not re.findall(r"<(?:text|path)[^>]*fill=\"#", "".join(svgs))
    assert set(LIGHT) == set(DARK)
    assert len({tuple(look(i).values()) for i in range(56)}) == 56


def test_every_run_and_method_appears_with_its_values(three, page_of):
    """A run that is silently missing, or a value from another run, makes the page worse than none."""
    page, _ = page_of(*three)
    at, wci = page.line("Results", "AT"), page.line("Results", "WCI r=1")
    assert (at["clean test"], at["robust test"]) == ("82.0 (80.0 to 84.0)", "52.0 (50.0 to 54.0)")
    assert wci["robust test"] == "60.0 [58.0, 62.0]"
    rest = ["80.0", "50.0", "100 s", "1.25×", "0.50×", "1.23 GB"]
    assert page.table("Runs")[1] == ["at-s0", "AT", "finished", "3 of 3", *rest]
    assert [line[5] for line in page.table("Runs")[1:]] == ["50.0", "54.0", "60.0"]


def test_curves_hold_the_metrics(tmp_path, three):
    """A curve must be the file's, in the unit the axis names."""
    rows = group_rows(three)
    axes = curves(rows).axes
    lines = {(ax.get_title("left"), line.get_label()): line.get_ydata() for ax in axes for line in ax.lines}
    assert lines["Robust accuracy", "AT"] == pytest.approx([51.0, 52.0, 51.0])
    assert lines["Robust accuracy", "_WCI r=1"] == pytest.approx([69.0, 70.0, 69.0])  # on training images
    assert lines["Robust loss", "_AT"] == pytest.approx([1.9] * 3)
    assert lines["Robust generalisation gap", "AT"] == pytest.approx([10.0] * 3)
    assert lines["Weight-Curvature Index", "AT"] == pytest.approx([1.11, 2.22, 3.33])
    (ax,) = layers(rows).axes
    assert ax.lines[0].get_xdata() == pytest.approx([3.0, 0.3, 0.03])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["conv1", "layer1.0.conv1", "fc"]
    assert training_measures(rows) is None
    run = write_run(tmp_path / "a", metrics={"measures/lambda_max": 4.0, "measures/lambda_max_stderr": 0.5})
    (ax,) = training_measures(group_rows([run])).axes
    assert ax.lines[0].get_ydata().tolist() == [4.0] * 3
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (3.5, 4.5)


def test_seeds_that_agree_have_a_bar_of_length_zero(tmp_path):
    """The mean of three times 0.1 is above 0.1: a bar of negative length once ended the report."""
    runs = [write_run(tmp_path / f"a{seed}", seed=seed, robust=0.1) for seed in range(3)]
    rows = group_rows([*runs, write_run(tmp_path / "b", "b", method="B")])
    assert overview(rows) is not None
    assert curves(rows) is not None


def test_curves_are_drawn_by_step_too_where_an_epoch_is_not_the_same_training(tmp_path, page_of):
    """Twice the batch size halves the steps: at one epoch the two have not trained alike."""
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", "wci", method="WCI r=1")]
    assert "by step" not in page_of(*runs)[1]
    for entry in runs[1].metrics:
        entry["step"] *= 2
    (ax, *_) = curves(group_rows(runs), by="step").axes
    x = {line.get_label(): list(line.get_xdata()) for line in ax.lines}
    assert (x["AT"], x["WCI r=1"]) == ([10, 20, 30], [20, 40, 60])
    assert "Training curves by step" in page_of(*runs)[1]


def test_the_settings_list_exactly_those_that_differ(tmp_path, page_of):
    """A difference that is not shown is taken for a difference between methods."""
    settings = [{"optimizer": {"lr": lr}} for lr in (0.1, 0.2, 0.1)]
    settings[2] |= {"ema": 0.9}
    runs = [write_run(tmp_path / k, k, i, settings=settings[i]) for i, k in enumerate("abc")]
    differing = {"optimizer.lr": ["0.1", "0.2", "0.1"], "ema": [None, None, "0.9"]}
    assert differing_settings(runs) == differing
    page, _ = page_of(*runs)
    lines = [["run", *differing], ["a", "0.1", "–"], ["b", "0.2", "–"], ["c", "0.1", "0.9"]]
    assert page.table("Settings") == lines
    assert "do not compare" not in page.text
    data = {"source": "digits", "root": "/b/x", "flip": "0"}
    changes = {"other-folder": {"root": "/a/x"}, "flipped": {"flip": "1"}, "other-data": {"root": "/a/y"}}
    for name, change in changes.items():
        pair = [{"data": data}, {"data": data | change}]
        runs = [write_run(tmp_path / name / str(i), str(i), settings=one) for i, one in enumerate(pair)]
        assert ("do not compare" in page_of(*runs)[0].text) == (name == "other-data")


def test_names_cannot_become_markup_or_formulas(tmp_path, page_of):
    """A recipe from a stranger would run its script in the reader's browser; "$" would stop the report."""
    evil = '<script>alert("1")</script><img src=x onerror=y>&\'" $x_$'
    settings = {evil: evil, "model": {"name": evil}, "data": {"source": evil, "root": evil}}
    metrics = {f"wci/{evil}": 1.0, f"measures/{evil}": 2.0}
    summary = {"name": evil, "attack": evil, "stopped_early": evil}
    run = write_run(tmp_path / "a", evil, method=evil, settings=settings, metrics=metrics, summary=summary)
    header = {"at": evil, "split": evil, "seed": 0, "threat": evil}
    add_json(run, "measures/m.json", header | {"measures": {evil: ENTRY | {"settings": evil}}})
    document = evaluation(0.8, 0.5, findings=[{"name": evil, "severity": evil, "text": evil}])
    document["attacks"][0]["attack"] = evil
    add_json(run, "evaluations/e.json", document | header)
    page, text = page_of(run, write_run(tmp_path / "b", "b"))
    assert "<img" not in text
    assert "<script" not in text
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert page.text.count(evil) > 10


def test_unfinished_runs_are_marked_and_sections_without_data_are_absent(tmp_path, page_of):
    """Half a training taken for a whole one is the commonest way to misread a comparison."""
    runs = [write_run(tmp_path / "half", "half", finished=False, num_epochs=2)]
    runs.append(write_run(tmp_path / "early", "early", summary={"stopped_early": "val robust fell"}))
    page, _ = page_of(*runs)
    half = page.line("Runs", "half")
    assert (half["state"], half["epochs"], half["robust test"]) == ("unfinished", "2 of 3", "50.0 (val)")
    assert page.line("Runs", "early")["state"] == "stopped early: val robust fell"
    metrics = '{"epoch": 1, "val/robust_accuracy": null, "wci/total": NaN}\n'
    (runs[0].folder / "metrics.jsonl").write_text(metrics)
    page, text = page_of(load_run(runs[0].folder))
    assert list(page.sections) == ["Results", "Runs"]
    assert page.line("Runs", "half")["robust test"] == "–"
    assert "nan" not in re.sub(r"<style.*?</style>", "", text, flags=re.S).lower()


def test_measures_are_shown_with_their_errors_one_line_each(three, page_of):
    """A value without its error, or under another run's name, supports any claim."""
    index = ENTRY | {"value": 421.2019, "stderr": 5.8212, "settings": "clean loss, gauss_newton"}
    add_json(three[0], "measures/wci.json", HEADER | {"threat": None, "measures": {"wci": index}})
    aimed = index | {"settings": "clean loss, hutchinson, target_relative_error 0.02"}
    for i in (0, 1):  # as many examples as it takes, which says nothing of what was measured
        document = HEADER | {"threat": None, "measures": {"wci": aimed | {"num_examples": 70 + i}}}
        add_json(three[i], "measures/aimed.json", document)
    flat = ENTRY | {"value": 0.25, "settings": "xi 0.5", "num_examples": 0}
    several = {"average_flatness": flat, "b": flat | {"value": None}}
    add_json(three[2], "measures/flat.json", HEADER | {"at": "best", "measures": several})
    for run, residual in zip(three, ("1.2e-04", "3.4e-05", "0.0e+00"), strict=True):
        entry = ENTRY | {"settings": f"LA, layers all, residual {residual}, linf 8/255"}
        add_json(run, "measures/lambda.json", HEADER | {"measures": {"lambda_max": entry}})
    (three[2].folder / "measures" / "broken.json").write_text("{")
    with pytest.warns(UserWarning, match=r"broken\.json: got ValueError"):
        page, _ = page_of(*three)
    assert page.table("Measures") == [
        ["measure", "at-s0", "at-s1", "wci-s0"],
        ["average_flatness: best train, xi 0.5", "–", "–", "0.25"],
        ["b: best train, xi 0.5", "–", "–", "–"],
        ["lambda_max: last train, LA, layers all, linf 8/255, 500 examples", "3", "3", "3"],
        ["wci: last train, clean loss, gauss_newton, 500 examples", "421.2 ± 5.8", "–", "–"],
        [f"wci: last train, {aimed['settings']}", "421.2 ± 5.8", "421.2 ± 5.8", "–"],
    ]


def test_who_fell_to_which_attack_and_the_smallest_radii_are_shown(tmp_path, page_of):
    """A row that is not there, or a median of zero where it is beyond the largest radius, is misread."""
    run, other = write_run(tmp_path / "a"), write_run(tmp_path / "b", "b", method="B")
    document = evaluation(0.8, 0.5)
    counts = {"num_broken": 30, "num_broken_first": 30, "num_broken_alone": 4}
    fewer = {"num_broken": 28, "num_broken_first": 2, "num_broken_alone": 2}
    (one,) = document["attacks"]
    document["attacks"] = [one | counts, one | {"attack": "margin-20"} | fewer]
    curve = {
        "eps": [0.0, 0.05, 0.1],
        "accuracy": [0.8, 0.6, 0.3],
        "low": [0.7, 0.5, 0.2],
        "high": [0.9, 0.7, 0.4],
    }
    numbers = {"median": 0.0125, "median_interval": [0.01, None], "num_wrong_at_once": 20, "num_never": 30}
    entry = {"largest": {"norm": "linf", "eps": 0.1}, "attacks": "pgd-20", "curve": curve} | numbers
    add_json(run, "evaluations/e.json", document | {"minimal_eps": [entry]})
    add_json(run, "evaluations/f.json", document | {"minimal_eps": [entry]})  # once more, with other attacks
    add_json(other, "evaluations/e.json", evaluation(0.8, 0.5))  # of an earlier version
    page, text = page_of(run, other)
    where = "a: last test, 100 examples, images aaaaaa"
    assert page.table("Attacks in turn")[1:] == [
        [where, "linf 1/255", "pgd-20", "30", "30", "4"],
        [where, "linf 1/255", "margin-20", "28", "2", "2"],
    ]
    row = [where, "linf up to 0.1", "pgd-20", "0.0125", "0.01 to > 0.1", "20", "30"]
    assert page.table("Smallest radii")[1:] == [row]
    assert "linf radius (images in [0, 1])" in text
    assert "a: pgd-20" in text
    assert (tmp_path / "out" / "smallest_radii.png").is_file()
    assert "Smallest radii" not in page_of(other)[1]


def test_measures_taken_otherwise_stand_apart(tmp_path, page_of):
    """A measure of 100 images under the heading of one of 1000 is another number."""
    run, fewer = write_run(tmp_path / "a"), ENTRY | {"num_examples": 100}
    changes = [({}, ENTRY), ({}, fewer), ({"seed": 2}, ENTRY), ({"threat": "l2 0.5"}, ENTRY), ({}, ENTRY)]
    for i, (change, entry) in enumerate(changes):
        add_json(run, f"measures/{i}.json", HEADER | change | {"measures": {"m": entry}})
    prefix = "m: last train, PGD-10 linf 8/255, "
    names = [line[0].removeprefix(prefix) for line in page_of(run)[0].table("Measures")]
    own = ["100 examples", "500 examples", "500 examples (again, 1)"]  # that one of other data, say
    assert names[1:] == [*own, "500 examples, seed 2", "l2 0.5, 500 examples"]


def test_evaluations_are_shown_per_threat_and_attack(three, page_of):
    """Robust accuracies under different attacks share no column; a mean hides no missing run."""
    add_json(three[0], "evaluations/last-test.json", evaluation(0.8, 0.5, 0.4, 0.3))
    add_json(three[1], "evaluations/last-test.json", evaluation(0.9, 0.6, 0.5))
    findings = [{"severity": "note", "name": "masking", "text": "look"}]
    add_json(three[2], "evaluations/last-test.json", evaluation(0.7, 0.3, findings=findings))
    page, _ = page_of(*three)
    at, wci = page.line("Evaluations", AT), page.line("Evaluations", AT.replace("AT", "WCI r=1"))
    attacks = [f"linf {i}/255, pgd-20" for i in (1, 2, 3)]
    assert list(at)[2:] == ["clean", *attacks, "corruption fog", "corruptions, mean"]
    assert at["linf 2/255, pgd-20"] == "45.0 (40.0 to 50.0)"
    assert at["linf 3/255, pgd-20"] == "30.0 [10.0, 90.0], 1 of 2 runs"
    assert wci["linf 1/255, pgd-20"] == "30.0 [10.0, 90.0]"
    assert (wci["linf 2/255, pgd-20"], wci["corruption fog"]) == ("–", "30.0")
    assert "wci-s0: note, masking: look" in page.text


def test_files_of_one_run_are_not_averaged_as_if_they_were_runs(tmp_path, page_of):
    """Two evaluations of one model are no two models; of two attempts at one attack the least counts."""
    runs = [write_run(tmp_path / f"at-s{seed}", seed=seed) for seed in range(2)]
    for run in runs:
        both = evaluation(0.8, 0.5)
        both["attacks"].append(both["attacks"][0] | {"attack": "aa", "accuracy": 0.4})
        both["worst_case"][0]["accuracy"] = 0.3
        add_json(run, "evaluations/a.json", evaluation(0.8, 0.5))
        add_json(run, "evaluations/b.json", both)
    others = [evaluation(0.8, 0.45), evaluation(0.8, None), evaluation(0.9, 0.7, num_examples=50)]
    others += [evaluation(0.9, 0.6, settings={"seed": 3}), evaluation(0.9, 0.5, digest="bbbbbbbb")]
    for i, document in enumerate([*others, {"clean": 3}, [], evaluation(0.8, findings=[3])]):
        add_json(runs[0], f"evaluations/c{i}.json", document)
    with pytest.warns(UserWarning, match="It is left out of the report"):  # the damaged ones at the end
        page, _ = page_of(*runs)
    both = page.line("Evaluations", AT)
    assert (both["runs"], both["clean"]) == ("2", "80.0 (80.0 to 80.0)")
    assert both["linf 1/255, pgd-20"] == "47.5 (45.0 to 50.0)"
    assert both["linf 1/255, worst case"] == "30.0 (30.0 to 30.0)"
    alone = {"50 examples, images aaaaaa": "70.0", "100 examples, seed 3, images aaaaaa": "60.0"}
    for protocol, share in (alone | {"100 examples, images bbbbbb": "50.0"}).items():
        line = page.line("Evaluations", f"AT: last test, {protocol}")
        assert (line["runs"], line["linf 1/255, pgd-20"]) == ("1", f"{share} [10.0, 90.0]")


def test_landscapes_of_the_runs_are_drawn(tmp_path, page_of):
    """What a run's folder holds would otherwise be seen by nobody."""
    run = write_run(tmp_path / "a")
    (run.folder / "landscapes").mkdir()
    alphas, losses = np.linspace(-1, 1, 3), np.ones((2, 3))
    Landscape(alphas, losses, losses, False, "random", "clean", 4).save(run.folder / "landscapes" / "one.npz")
    (run.folder / "landscapes" / "two.npz").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"two\.npz: got .* left out of the report"):
        page, _ = page_of(run)
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert "a: one filter-normalised directions, clean, 4 examples" in labels[-1]


class Bright(torch.nn.Module):
    """Says 1 where an image is bright on average."""

    def forward(self, x):
        mean = x.flatten(1).mean(1)
        return torch.stack([0.5 - mean, mean - 0.5], 1)


def test_the_strip_shows_labels_predictions_and_the_difference():
    """A picture of the wrong image, or a prediction from before the attack, is worse than none."""
    model = Bright().train()
    x = torch.tensor([0.45, 0.9]).view(2, 1, 1, 1).expand(2, 1, 4, 4)
    figure = strip(model, x, torch.tensor([0, 1]), Attack(LINF, 20, 0.02), "run", seed=1)
    axes = np.reshape(figure.axes, (3, 2))
    titles = [[ax.get_title() for ax in line] for line in axes]
    assert titles == [["label 0\n→ 0", "label 1\n→ 1"], ["→ 1", "→ 1"], ["", ""]]
    clean, adversarial, difference = (line[0].images[0].get_array() for line in axes)
    np.testing.assert_allclose(clean, 0.45)
    np.testing.assert_allclose(adversarial, 0.55, atol=1e-6)  # the end of the ball
    np.testing.assert_allclose(difference, 1.0, atol=1e-6)  # 0.5 + 0.1 * 5
    assert model.training


def test_images_are_asked_for_once_a_method_and_failures_are_told(tmp_path, page_of):
    """A report must not fail because the data moved, nor load sixty models in silence."""
    runs = [write_run(tmp_path / f"r{i}", f"m{i // 2}", i, method=f"m{i // 2}") for i in range(4)]
    asked = []

    def images(run):
        asked.append(run.name)
        if run.name == "r2":
            raise ValueError("data.root: got nothing\nsecond line")
        return strip(Bright(), torch.rand(9, 3, 4, 4), torch.zeros(9).long(), Attack(LINF), run.name)

    _, text = page_of(*runs, images=images)
    assert asked == ["r0", "r2"]
    assert "r2: no images, data.root: got nothing<" in text
    assert text.count("<image") == 24  # eight images, thrice
    assert "Images under attack" not in page_of(*runs)[0].sections
