"""The report page: one file that needs nothing else, whose every value comes from the run folders."""

import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from test_report import write_run

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.measures.landscape import Landscape
from wcitrain.report import load_run, write_report
from wcitrain.report.charts import curves, layers, training_measures
from wcitrain.report.drawing import DARK, LIGHT, SERIES, look
from wcitrain.report.runs import group_rows
from wcitrain.report.settings import compare_settings
from wcitrain.report.stored import evaluations, measures
from wcitrain.report.strip import strip

VOID = {"meta", "br", "img", "hr", "input", "link"}
LINF = ThreatModel("linf", 0.1)


def add_json(run, path, document):
    target = run.folder / path
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document))


class Page(HTMLParser):
    """What a reader of the page meets: elements, text, tables as rows of cells; refuses unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.tables, self.sections = [], [], [], [], {}
        self.heading = None
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.text.append(data)
        if self.open and self.open[-1] == "h2":
            self.sections[data] = len(self.tables)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def table(self, section):
        return self.tables[self.sections[section]]

    def line(self, section, name):
        """The first line called ``name`` in the first table of a section, by column."""
        (line,) = [line for line in self.table(section) if line[0] == name]
        return dict(zip(self.table(section)[0], line, strict=True))


@pytest.fixture
def page_of(tmp_path):
    """Write the report of runs and read its page."""

    def read(*runs, **options):
        paths = write_report(runs, tmp_path / "out", **options)
        text = paths[1].read_text("utf-8")
        return Page(text), text

    return read


@pytest.fixture
def three(tmp_path):
    """Two seeds of AT and one run of WCI."""
    wci = {"method": "WCI r=1", "robust": 0.6, "settings": {"penalty": {"name": "wci"}}}
    return [
        write_run(tmp_path / "at-s0", seed=0, robust=0.5),
        write_run(tmp_path / "at-s1", seed=1, robust=0.54),
        write_run(tmp_path / "wci-s0", "wci", **wci),
    ]


def lines_of(figure):
    """Values by (panel, label) of a figure's lines; an underscore marks those that are not in the legend."""
    return {(ax.get_title("left"), line.get_label()): line for ax in figure.axes for line in ax.lines}


def y_of(figure, *key):
    return pytest.approx(lines_of(figure)[key].get_ydata().tolist())


def test_the_page_needs_nothing_but_itself_and_its_ids_are_unique(three, page_of):
    """A style sheet from elsewhere is missing on a train; two elements of one id break figures and links."""
    page, text = page_of(*three)
    assert not re.search(r"http|@import|url\((?!#)|<script", text)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base", "script")
        for reference in (attributes.get("href", ""), *re.findall(r"url\(([^)]*)\)", str(attributes))):
            assert not reference.startswith("#") or reference[1:] in ids
            assert not reference or reference.startswith(("#", "data:"))
    links = {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"}
    assert links == {a["aria-labelledby"] for tag, a in page.elements if tag == "section"}


def test_everything_drawn_has_a_text_and_follows_the_theme(three, page_of):
    """A reader who does not see the page meets nameless pictures; one at night black letters on black."""
    page, text = page_of(*three)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 0
    assert all(a["scope"] in ("row", "col") for tag, a in page.elements if tag == "th")
    labels = [a["aria-label"] for tag, a in page.elements if tag == "svg"]
    assert len(labels) == 3
    assert "Robust accuracy: % against epoch: AT 51, WCI r=1 59" in labels[1]
    svgs = re.findall(r"<svg.*?</svg>", text, re.S)
    assert all("<text" in one for one in svgs)
    colours = set(re.findall(r"(?:fill|stroke): (#\w+|black|white)", "".join(svgs)))
    assert not colours & {*LIGHT.values(), "#000000", "black", "white"}
    assert not re.findall(r"<(?:text|path)[^>]*fill=\"#", "".join(svgs))


def test_colours_can_be_read_in_both_themes_and_looks_differ():
    """Text needs a contrast of 4.5, lines and markers one of 3 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    assert set(LIGHT) == set(DARK)
    for theme in (LIGHT, DARK):
        for ground in ("paper", "raised"):
            assert min(contrast(theme[text], theme[ground]) for text in ("ink", "soft", "accent")) >= 4.5
        assert contrast(theme["ink"], theme["mark"]) >= 4.5
        assert min(contrast(theme[f"c{i}"], theme["paper"]) for i in range(len(SERIES))) >= 3
    assert len({tuple(look(i).values()) for i in range(56)}) == 56


def contrast(first, second):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


def test_every_run_and_method_appears_with_its_values(three, page_of):
    """A run that is silently missing, or a value from another run, makes the page worse than none."""
    page, _ = page_of(*three)
    at, wci = page.line("Results", "AT"), page.line("Results", "WCI r=1")
    assert (at["clean test"], at["robust test"]) == ("82.0 (80.0 to 84.0)", "52.0 (50.0 to 54.0)")
    assert wci["robust test"] == "60.0 [58.0, 62.0]"
    for run, robust in zip(three, ("50.0", "54.0", "60.0"), strict=True):
        line = page.line("Runs", f"{run.name} {run.method}")
        assert (line["robust test"], line["state"], line["epochs"]) == (robust, "finished", "3 of 3")
        costs = (line["× own objective"], line["× PGD-10 AT"], line["peak memory"], line["training"])
        assert costs == ("1.25×", "0.50×", "1.23 GB", "1 min 40 s")


def test_curves_hold_the_metrics(tmp_path, three):
    """A curve must be the file's, in the unit the axis names."""
    rows = group_rows(three)
    figure = curves(rows)
    assert y_of(figure, "Robust accuracy", "AT") == [51.0, 52.0, 51.0]
    assert y_of(figure, "Robust accuracy", "_WCI r=1") == [69.0, 70.0, 69.0]
    assert y_of(figure, "Robust loss", "_AT") == [1.9] * 3
    assert y_of(figure, "Robust generalisation gap", "AT") == [10.0] * 3
    assert y_of(figure, "Weight-Curvature Index", "AT") == [1.11, 2.22, 3.33]
    (ax,) = layers(rows).axes
    assert ax.lines[0].get_xdata().tolist() == pytest.approx([3.0, 0.3, 0.03])
    assert [text.get_text() for text in ax.get_yticklabels()] == ["conv1", "layer1.0.conv1", "fc"]
    assert training_measures(rows) is None
    run = write_run(tmp_path / "a", metrics={"measures/lambda_max": 4.0, "measures/lambda_max_stderr": 0.5})
    (ax,) = training_measures(group_rows([run])).axes
    assert ax.lines[0].get_ydata().tolist() == [4.0] * 3
    band = ax.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == (3.5, 4.5)


def test_the_settings_list_exactly_those_that_differ(tmp_path, page_of):
    """A difference that is not shown is taken for a difference between methods."""
    settings = [
        {"optimizer": {"lr": 0.1}},
        {"optimizer": {"lr": 0.2}},
        {"optimizer": {"lr": 0.1}, "ema": 0.9},
    ]
    runs = [
        write_run(tmp_path / k, k, i, settings=s)
        for i, (k, s) in enumerate(zip("abc", settings, strict=True))
    ]
    equal, differing = compare_settings(runs)
    assert differing == {"optimizer.lr": ["0.1", "0.2", "0.1"], "ema": [None, None, "0.9"]}
    assert list(equal) == ["data.source", "model.name", "model.kwargs", "train.epochs"]
    page, _ = page_of(*runs)
    assert page.table("Settings")[1:] == [["optimizer.lr", "0.1", "0.2", "0.1"], ["ema", "–", "–", "0.9"]]
    shared = page.tables[page.sections["Settings"] + 1]
    assert dict(shared[1:]) == equal
    many = [write_run(tmp_path / f"m{i}", f"m{i}", method=f"m{i}", settings={"x": i}) for i in range(9)]
    table = page_of(*many)[0].table("Settings")  # twenty columns of run names cannot be read
    assert (table[0], table[9]) == (["setting", "x"], ["m8 m8", "8"])


def test_names_cannot_become_markup_or_formulas(tmp_path, page_of):
    """A recipe from a stranger would run its script in the reader's browser; "$" would stop the report."""
    evil = '<script>alert("1")</script><img src=x onerror=y>&\'" $x_$'
    settings = {evil: evil, "model": {"name": evil}, "data": {"source": evil, "root": evil}}
    metrics = {f"wci/{evil}": 1.0, f"measures/{evil}": 2.0}
    summary = {"name": evil, "attack": evil, "device": evil, "stopped_early": evil, "versions": {evil: evil}}
    run = write_run(tmp_path / "a", evil, method=evil, settings=settings, metrics=metrics, summary=summary)
    entry = {"value": 1.0, "stderr": 0.1, "settings": evil, "num_examples": 4}
    header = {"at": evil, "split": evil, "seed": 0, "threat": evil}
    add_json(run, "measures/m.json", header | {"measures": {evil: entry}})
    document = evaluation(0.8, 0.5) | {"at": evil, "split": evil}
    document["attacks"][0]["attack"] = evil
    checks = [{"name": evil, "severity": evil, "text": evil}]
    add_json(run, "evaluations/e.json", document | {"findings": checks})
    page, text = page_of(run, write_run(tmp_path / "b", "b"))
    assert "<img" not in text
    assert "<script" not in text
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert "".join(page.text).count(evil) > 10


def test_unfinished_and_stopped_runs_are_marked(tmp_path, page_of):
    """Half a training taken for a whole one is the commonest way to misread a comparison."""
    early = {"stopped_early": "val robust fell"}
    runs = [
        write_run(tmp_path / "half", "half", finished=False, num_epochs=2),
        write_run(tmp_path / "early", "early", method="early", summary=early),
    ]
    page, _ = page_of(*runs)
    half = page.line("Runs", "half half")
    assert (half["state"], half["epochs"], half["robust test"]) == ("unfinished", "2 of 3", "50.0 (val)")
    assert page.line("Runs", "early early")["state"] == "stopped early val robust fell"
    assert "Unfinished: half." in "".join(page.text)


def test_sections_without_data_are_absent(tmp_path, page_of):
    """An empty heading makes the reader look for what is missing."""
    run = write_run(tmp_path / "a", finished=False, num_epochs=1)
    metrics = '{"epoch": 1, "val/robust_accuracy": null, "wci/total": NaN}\n'
    (run.folder / "metrics.jsonl").write_text(metrics)
    page, text = page_of(load_run(run.folder))
    assert list(page.sections) == ["Results", "Settings", "Runs"]
    assert page.line("Runs", "a at")["robust test"] == "–"
    assert "nan" not in re.sub(r"<style.*?</style>", "", text, flags=re.S).lower()


HEADER = {"at": "last", "split": "train", "seed": 0, "threat": "linf 8/255"}
INDEX = HEADER | {"estimator": "hutchinson", "loss": "robust loss", "layers_counted": "weights"}
INDEX |= {"split_qkv": False, "wci_stderr": 5.8212, "threat": {"norm": "linf", "eps": 0.5}}
ENTRY = {"value": 3.0, "stderr": None, "num_examples": 500, "settings": "PGD-10 linf 8/255"}


def test_measures_are_shown_with_their_errors_one_line_each(three, page_of):
    """A value without its error, or under another run's name, supports any claim."""
    add_json(three[0], "measures/wci.json", INDEX | {"wci": 421.2019, "num_examples": 40})
    flat = ENTRY | {"value": 0.25, "settings": "xi 0.5", "num_examples": 0}
    several = {"average_flatness": flat, "b": flat | {"value": None}}
    add_json(three[2], "measures/flat.json", HEADER | {"at": "best", "measures": several})
    for run, residual in zip(three, ("1.2e-04", "3.4e-05", "0.0e+00"), strict=True):
        entry = ENTRY | {"settings": f"LA, layers all, residual {residual}, linf 8/255"}
        add_json(run, "measures/lambda.json", HEADER | {"measures": {"lambda_max": entry}})
    (three[2].folder / "measures" / "broken.json").write_text("{")
    with pytest.warns(UserWarning, match=r"broken\.json: got JSONDecodeError"):
        page, _ = page_of(*three)
    assert page.table("Measures") == [
        ["measure", "at-s0", "at-s1", "wci-s0"],
        ["average_flatness best train, xi 0.5", "–", "–", "0.25"],
        ["b best train, xi 0.5", "–", "–", "–"],
        ["lambda_max last train, LA, layers all, linf 8/255, 500 examples", "3", "3", "3"],
        ["wci last train, hutchinson, robust loss, linf 0.5, 40 examples", "421.2 ± 5.8", "–", "–"],
    ]


def test_measures_taken_otherwise_stand_apart(tmp_path):
    """A measure of 100 images under the heading of one of 1000 is another number."""
    run = write_run(tmp_path / "a")
    fewer = ENTRY | {"num_examples": 100}
    for i, (change, entry) in enumerate(
        (({}, ENTRY), ({}, fewer), ({"seed": 2}, ENTRY), ({"threat": "l2 0.5"}, ENTRY))
    ):
        add_json(run, f"measures/{i}.json", HEADER | change | {"measures": {"m": entry}})
    add_json(run, "measures/e.json", INDEX | {"wci": 5.0, "num_examples": 40, "seed": 1})
    wide = {"layers_counted": "all", "split_qkv": True, "target_relative_error": 0.02}
    add_json(run, "measures/f.json", INDEX | wide | {"wci": 5.0, "num_examples": 77})
    assert [protocol.removeprefix("last train, ") for _, protocol, *_ in measures(run)] == [
        "PGD-10 linf 8/255, 500 examples",
        "PGD-10 linf 8/255, 100 examples",
        "PGD-10 linf 8/255, 500 examples, seed 2",
        "PGD-10 linf 8/255, l2 0.5, 500 examples",
        "hutchinson, robust loss, linf 0.5, 40 examples, seed 1",
        "hutchinson, robust loss, layers all, split qkv, linf 0.5, to a relative error of 0.02",
    ]


def evaluation(clean, *robust):
    share = {"interval": [0.1, 0.9]}
    attacks = [
        {"threat": {"norm": "linf", "eps": (i + 1) / 255}, "attack": "pgd-20", "accuracy": value, **share}
        for i, value in enumerate(robust)
    ]
    document = {"at": "last", "split": "test", "num_examples": 100, "attacks": attacks, "digest": "aaaaaaaa"}
    document |= {"settings": {"seed": 0}, "findings": []}
    document["clean"] = {"accuracy": clean, **share}
    document["worst_case"] = [{"threat": entry["threat"], "accuracy": 0.0} for entry in attacks]
    return document | {"corruptions": {"fog": {"1": 0.5, "5": 0.1}}, "corrupted_accuracy": 0.3}


def test_evaluations_are_shown_per_threat_and_attack(three, page_of):
    """Robust accuracies under different attacks must not share a column."""
    add_json(three[0], "evaluations/last-test.json", evaluation(0.8, 0.5, 0.4))
    add_json(three[1], "evaluations/last-test.json", evaluation(0.9, 0.6, 0.5))
    checked = evaluation(0.7, 0.3) | {"findings": [{"severity": "note", "name": "masking", "text": "look"}]}
    add_json(three[2], "evaluations/last-test.json", checked)
    page, _ = page_of(*three)
    at = page.line("Evaluations", "AT last test, 100 examples")
    wci = page.line("Evaluations", "WCI r=1 last test, 100 examples")
    attacks = ["linf 1/255, pgd-20", "linf 2/255, pgd-20"]
    assert list(at)[2:] == ["clean", *attacks, "corruption fog", "corruptions, mean"]
    assert at["linf 2/255, pgd-20"] == "45.0 (40.0 to 50.0)"
    assert wci["linf 1/255, pgd-20"] == "30.0 [10.0, 90.0]"
    assert (wci["linf 2/255, pgd-20"], wci["corruption fog"]) == ("–", "30.0")
    assert "wci-s0: note, masking: look" in "".join(page.text)


def test_files_of_one_run_are_not_averaged_as_if_they_were_runs(tmp_path, page_of):
    """Two evaluations of one model are no two models; of two attempts at one attack the least counts."""
    runs = [write_run(tmp_path / f"at-s{seed}", seed=seed) for seed in range(2)]
    for run in runs:
        both = evaluation(0.8, 0.5)
        both["attacks"].append(both["attacks"][0] | {"attack": "aa", "accuracy": 0.4})
        both["worst_case"][0]["accuracy"] = 0.3
        add_json(run, "evaluations/a.json", evaluation(0.8, 0.5))
        add_json(run, "evaluations/b.json", both)
    add_json(runs[0], "evaluations/c.json", evaluation(0.8, 0.45))
    add_json(runs[0], "evaluations/d.json", evaluation(0.8, None))
    add_json(runs[0], "evaluations/n50.json", evaluation(0.9, 0.7) | {"num_examples": 50})
    add_json(runs[0], "evaluations/s3.json", evaluation(0.9, 0.6) | {"settings": {"seed": 3}})
    page, _ = page_of(*runs)
    both = page.line("Evaluations", "AT last test, 100 examples")
    assert (both["runs"], both["clean"]) == ("2", "80.0 (80.0 to 80.0)")
    assert both["linf 1/255, pgd-20"] == "47.5 (45.0 to 50.0)"
    assert both["linf 1/255, worst case"] == "30.0 (30.0 to 30.0)"
    fewer = page.line("Evaluations", "AT last test, 50 examples")
    assert (fewer["runs"], fewer["linf 1/255, pgd-20"]) == ("1", "70.0 [10.0, 90.0]")
    other = page.line("Evaluations", "AT last test, 100 examples, seed 3")
    assert other["linf 1/255, pgd-20"] == "60.0 [10.0, 90.0]"


def test_a_run_without_an_attack_is_counted_and_other_images_stand_apart(tmp_path, page_of):
    """A mean over fewer runs passes for all; accuracies on different images are no spread over seeds."""
    runs = [write_run(tmp_path / f"at-s{seed}", seed=seed) for seed in range(2)]
    add_json(runs[0], "evaluations/a.json", evaluation(0.8, 0.3))
    add_json(runs[1], "evaluations/a.json", evaluation(0.6))
    line = page_of(*runs)[0].line("Evaluations", "AT last test, 100 examples")
    assert line["clean"] == "70.0 (60.0 to 80.0)"
    assert line["linf 1/255, pgd-20"] == "30.0, 1 of 2 runs [10.0, 90.0]"
    add_json(runs[1], "evaluations/a.json", evaluation(0.6) | {"digest": "bbbbbbbb"})
    page, _ = page_of(*runs)
    for name in ("aaaaaa", "bbbbbb"):
        assert page.line("Evaluations", f"AT last test, 100 examples, images {name}")["runs"] == "1"


def test_a_damaged_evaluation_is_left_out_with_a_warning(tmp_path):
    """One file must not keep the rest of the page from being written."""
    run = write_run(tmp_path / "a")
    for i, document in enumerate(({"clean": 3}, [])):
        add_json(run, f"evaluations/{i}.json", document)
    add_json(run, "evaluations/whole.json", evaluation(0.8))
    with pytest.warns(UserWarning, match="It is left out of the report"):
        taken = evaluations(group_rows([run]))
    assert [[*one] for (one,) in taken.values()] == [["clean", "corruption fog", "corruptions, mean"]]


def test_landscapes_of_the_runs_are_drawn(tmp_path, page_of):
    """What a run's folder holds would otherwise be seen by nobody."""
    run = write_run(tmp_path / "a")
    (run.folder / "landscapes").mkdir()
    alphas, losses = np.linspace(-1, 1, 3), np.ones((2, 3))
    Landscape(alphas, losses, losses, False, "random", "clean", 4).save(run.folder / "landscapes" / "one.npz")
    (run.folder / "landscapes" / "two.npz").write_bytes(b"damaged")
    with pytest.warns(UserWarning, match=r"two\.npz: got .* left out of the report"):
        page, _ = page_of(run)
    assert "Landscapes" in page.sections
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


def test_images_are_asked_for_once_a_method_of_many_and_failures_are_told(tmp_path, page_of):
    """A report must not fail because the data moved, nor load sixty models in silence."""
    runs = [
        write_run(tmp_path / f"r{i}", f"m{i // 4}", i, method=f"m{i // 4}", num_epochs=1) for i in range(8)
    ]
    asked = []

    def images(run):
        asked.append(run.name)
        if run.name == "r4":
            raise ValueError("data.root: got nothing\nsecond line")
        return strip(
            Bright(), torch.rand(9, 3, 4, 4), torch.zeros(9, dtype=torch.long), Attack(LINF), run.name
        )

    _, text = page_of(*runs, images=images)
    assert asked == ["r0", "r4"]
    assert "r4: no images, data.root: got nothing<" in text
    assert text.count("<image") == 24  # eight images, thrice
    assert "Images under attack" not in page_of(*runs)[0].sections


def test_thirty_methods_of_thirty_epochs_stay_small(tmp_path, page_of):
    """A report that takes a browser seconds to open is not opened twice."""
    layers = {f"wci/backbone.layer{i}.conv.weight": 1.0 + i for i in range(20)}
    runs = [
        write_run(tmp_path / f"m{i}", f"m{i}", method=f"m{i}", num_epochs=30, metrics=layers)
        for i in range(30)
    ]
    assert len(page_of(*runs)[1].encode()) < 2_000_000
