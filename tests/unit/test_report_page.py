"""The report page: one file that needs nothing else, whose every value comes from the run folders."""

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from wcitrain.report import load_run, svg
from wcitrain.report.found import accuracies, measures
from wcitrain.report.page import report_page
from wcitrain.report.runs import COLOURS, group_rows
from wcitrain.report.settings import compare_settings
from wcitrain.report.svg import NUM_MARKERS, marker, ticks

VOID = {"meta", "br", "img", "hr", "input", "link"}
LAYERS = ("backbone.conv1.weight", "backbone.fc.weight")
PIXEL = bytes.fromhex(  # a PNG of one pixel
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def write_run(
    folder, group="at", seed=0, *, method="AT", robust=0.5, epochs=3, finished=True, settings=None, **extra
):
    """Write a run folder: clean accuracy is robust + 0.3, train 0.1 higher, WCI 10 and 1 more an epoch."""
    folder.mkdir(parents=True)
    recipe = {
        "name": group,
        "seed": seed,
        "data": {"source": "digits"},
        "model": {"name": "resnet18", "kwargs": {}},
    }
    recipe |= {"optimizer": {"lr": 0.1}, "train": {"epochs": 3}} | (settings or {})
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    lines = []
    for epoch in range(1, epochs + 1):
        line = {"epoch": epoch, "robust_gap": 0.1, "train_seconds": 10.0 * epoch, "wci/total": 11.0 * epoch}
        for split, shift in (("train", 0.1), ("val", 0.0)):
            line |= {
                f"{split}/clean_accuracy": robust + shift + 0.3,
                f"{split}/robust_accuracy": robust + shift,
            }
            line |= {f"{split}/robust_loss": 2.0 - shift}
        line |= {f"wci/{layer}": 10.0 ** (1 - i) * epoch for i, layer in enumerate(LAYERS)}
        lines.append(line | extra.get("metrics", {}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    os.utime(folder / "metrics.jsonl", (1_700_000_000, 1_700_000_000))  # 2023-11-14 22:13 UTC
    if finished:
        test = {"clean_accuracy": robust + 0.3, "clean_accuracy_interval": [robust + 0.28, robust + 0.32]}
        test |= {"robust_accuracy": robust, "robust_accuracy_interval": [robust - 0.02, robust + 0.02]}
        last = {
            "epoch": epochs,
            "train": {"robust_accuracy": robust + 0.1},
            "test": test,
            "robust_gap": 0.1,
            "wci": 33.0,
        }
        summary = {"name": folder.name, "seed": seed, "group": group, "method": method, "status": "finished"}
        summary |= {"last": last, "best": last, "attack": "PGD-10 linf 8/255", "train_seconds": 10.0 * epochs}
        summary |= {
            "cost": {
                "forward_passes": 4.0,
                "backward_passes": 7.0,
                "relative": 1.25,
                "relative_to_pgd10_at": 0.5,
            }
        }
        summary |= {
            "peak_memory_mb": 1234.0,
            "num_parameters": 318186,
            "device": "cpu",
            "versions": {"torch": "2.6"},
        }
        (folder / "summary.json").write_text(json.dumps(summary | extra.get("summary", {})))
    return load_run(folder)


def add_json(run, path, document):
    target = run.folder / path
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(document))


class Page(HTMLParser):
    """What a reader of the page meets: elements, text, tables as rows of cells; refuses unbalanced tags."""

    def __init__(self, text):
        super().__init__()
        self.elements, self.open, self.text, self.tables, self.sections = [], [], [], [], {}
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
        if tag == "section":
            self.sections[attributes["id"]] = len(self.tables)
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data

    def line(self, section, name):
        """The first line called ``name`` in the first table of a section, by column."""
        table = self.tables[self.sections[section]]
        (line,) = [line for line in table if line[0] == name]
        return dict(zip(table[0], line, strict=True))

    def series(self):
        """Values by (chart, series name)."""
        charts, title = {}, None
        for tag, attributes in self.elements:
            if tag == "svg" and "aria-label" in attributes:
                title = re.split("[:,(]", attributes["aria-label"])[0].strip()
            if "data-y" in attributes:
                key = (title, attributes["data-name"])
                charts[key] = dict(
                    zip(attributes["data-x"].split("|"), attributes["data-y"].split("|"), strict=True)
                )
        return charts


def page_of(*runs, **options):
    text = report_page(group_rows(runs), **options)
    return Page(text), text


@pytest.fixture
def three(tmp_path):
    """Two seeds of AT and one run of WCI."""
    return [
        write_run(tmp_path / "at-s0", seed=0, robust=0.5),
        write_run(tmp_path / "at-s1", seed=1, robust=0.54),
        write_run(
            tmp_path / "wci-s0", "wci", method="WCI r=1", robust=0.6, settings={"penalty": {"name": "wci"}}
        ),
    ]


def test_the_page_needs_nothing_but_itself(three):
    """A style sheet or a script from elsewhere is missing on a train, and tells a stranger what is read."""
    page, text = page_of(*three)
    assert "http" not in text
    assert "url(" not in text
    assert "@import" not in text
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base")
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith("#")


def test_links_lead_to_sections_and_ids_are_unique(three):
    """A link into the void, or two elements of one id, breaks what keyboards and screen readers go by."""
    page, _ = page_of(*three)
    ids = [attributes["id"] for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {attributes["href"][1:] for tag, attributes in page.elements if tag == "a"} == set(page.sections)
    assert all(attributes["aria-labelledby"] in ids for tag, attributes in page.elements if tag == "section")


def test_everything_drawn_has_words(three):
    """A reader who does not see the page would meet nameless pictures and tables."""
    add_json(three[0], "landscapes/note.json", {})
    (three[0].folder / "landscapes" / "last.png").write_bytes(PIXEL)
    page, _ = page_of(*three)
    tags = [tag for tag, _ in page.elements]
    assert tags.count("table") == tags.count("caption") > 0
    assert all(attributes["scope"] in ("row", "col") for tag, attributes in page.elements if tag == "th")
    assert all(attributes["alt"] for tag, attributes in page.elements if tag == "img")
    for tag, attributes in page.elements:
        if tag == "svg":
            assert attributes.get("aria-label") or attributes.get("aria-hidden") == "true"


def test_every_run_and_method_appears_with_its_values(three):
    """A run that is silently missing, or a value from another run, makes the page worse than none."""
    page, _ = page_of(*three)
    at, wci = page.line("results", "AT"), page.line("results", "WCI r=1")
    assert at["robust test"] == "52.0 (50.0 to 54.0)"
    assert at["clean test"] == "82.0 (80.0 to 84.0)"
    assert wci["robust test"] == "60.0 [58.0, 62.0]"
    for run, robust in zip(three, ("50.0", "54.0", "60.0"), strict=True):
        line = page.line("runs", run.name)
        assert (line["robust test"], line["state"], line["epochs"]) == (robust, "finished", "3 of 3")
        assert (line["training"], line["written"]) == ("30 s", "2023-11-14 22:13")
    labels = [
        attributes["data-entry"]
        for tag, attributes in page.elements
        if tag == "button" and "data-entry" in attributes
    ]
    assert labels == ["0", "1"]
    cost = page.line("cost", "WCI r=1")
    assert (cost["forwards"], cost["backwards"], cost["× own objective"]) == ("4", "7", "1.25×")
    assert (cost["× PGD-10 AT"], cost["an epoch"], cost["peak memory"]) == ("0.50×", "10 s", "1.23 GB")


def test_curves_hold_the_metrics(three):
    """The value under the pointer must be the file's, in the unit the chart names."""
    series = page_of(*three)[0].series()
    assert series["Robust accuracy", "AT, validation"] == {
        "epoch 1": "52.0",
        "epoch 2": "52.0",
        "epoch 3": "52.0",
    }
    assert series["Robust accuracy", "WCI r=1, train"]["epoch 3"] == "70.0"
    assert series["Robust loss", "AT, train"]["epoch 1"] == "1.90"
    assert series["Robust generalisation gap", "AT"]["epoch 2"] == "10.0"
    assert series["Weight-Curvature Index", "AT"] == {"epoch 1": "11.0", "epoch 2": "22.0", "epoch 3": "33.0"}
    assert series["WCI of the layer", "AT, epoch 3"] == {"conv1": "30.0", "fc": "3.00"}
    assert series["Share of the network's WCI", "AT, epoch 3"] == {"conv1": "90.9", "fc": "9.09"}  # 10 : 1


def test_the_claim_in_words_follows_the_numbers(tmp_path, three):
    """A page that names a winner where ranges overlap, or rows do not compare, teaches something false."""
    text = "".join(page_of(*three)[0].text)
    highest = "WCI r=1 has the highest robust test accuracy, 60.0 %"
    assert f"{highest}; its 95 % interval is 58.0 to 62.0 %." in text
    assert "No other method's range or interval reaches its own" in text
    near = write_run(tmp_path / "near", "near", method="near", robust=0.57)
    text = "".join(page_of(*three, near)[0].text)  # 57 + 2 reaches 60 - 2
    assert "of near overlaps with its own: these runs do not tell them apart" in text
    easier = write_run(
        tmp_path / "easier", "easier", method="easier", robust=0.9, settings={"threat": {"eps": "2/255"}}
    )
    harder = write_run(tmp_path / "harder", "harder", method="harder", settings={"threat": {"eps": "8/255"}})
    text = "".join(page_of(easier, harder)[0].text)
    assert "threat.eps. Their accuracies do not compare directly" in text
    assert "highest" not in text.lower()


def test_the_diff_lists_exactly_the_settings_that_differ(tmp_path):
    """A difference that is not shown is taken for a difference between methods."""
    same = {"threat": {"norm": "linf", "eps": "8/255"}}
    runs = [
        write_run(tmp_path / "a", "a", settings=same | {"optimizer": {"lr": 0.1, "nesterov": True}}),
        write_run(tmp_path / "b", "b", settings=same | {"optimizer": {"lr": 0.2, "nesterov": True}}),
        write_run(
            tmp_path / "c",
            "c",
            seed=1,
            settings=same | {"optimizer": {"lr": 0.1, "nesterov": True}, "ema": 0.9},
        ),
    ]
    equal, differing = compare_settings(runs)
    assert differing == {"optimizer.lr": ["0.1", "0.2", "0.1"], "ema": [None, None, "0.9"]}
    assert set(equal) == {
        "data.source",
        "model.name",
        "model.kwargs",
        "optimizer.nesterov",
        "train.epochs",
        "threat.norm",
        "threat.eps",
    }
    page, _ = page_of(*runs)
    table = page.tables[page.sections["settings"]]
    assert [line[0] for line in table[1:]] == ["optimizer.lr", "ema"]
    assert [line[1:] for line in table[1:]] == [["0.1", "0.2", "0.1"], ["–", "–", "0.9"]]
    shared = page.tables[page.sections["settings"] + 1]
    assert {line[0]: line[1] for line in shared[1:]} == equal


def test_many_runs_are_lines_of_the_diff(tmp_path):
    """Twenty columns of run names cannot be read; twenty lines can."""
    runs = [
        write_run(tmp_path / f"m{i}", f"m{i}", method=f"m{i}", settings={"optimizer": {"lr": i}})
        for i in range(9)
    ]
    page, _ = page_of(*runs)
    table = page.tables[page.sections["settings"]]
    assert table[0] == ["run", "optimizer.lr"]
    assert [line[1] for line in table[1:]] == [str(i) for i in range(9)]
    looks = {(a["class"], d) for (tag, a), d in _swatches(page)}
    assert len(looks) == 9, "two methods of one colour and one marker"


def _swatches(page):
    elements = page.elements
    for i, (tag, attributes) in enumerate(elements):
        if attributes.get("class", "").startswith("swatch"):
            yield (tag, attributes), elements[i + 2][1]["d"]


def test_names_cannot_become_markup(tmp_path):
    """A recipe from a stranger would otherwise run its script in the reader's browser."""
    evil = '<script>alert("1")</script><img src=x onerror=y>&\'"'
    settings = {evil: evil, "model": {"name": evil}, "data": {"source": evil, "root": evil}}
    metrics = {f"wci/{evil}": 1.0, f"measures/{evil}": 2.0}
    summary = {"name": evil, "attack": evil, "device": evil, "stopped_early": evil, "versions": {evil: evil}}
    run = write_run(tmp_path / "a", evil, method=evil, settings=settings, metrics=metrics, summary=summary)
    add_json(
        run,
        "measures/m.json",
        {"at": evil, "measures": {evil: {"value": 1.0, "stderr": 0.1, "settings": evil}}},
    )
    threat = {"norm": evil, "eps": 0.1}
    checks = [{"name": evil, "severity": evil, "text": evil}]
    add_json(
        run,
        "evaluations/e.json",
        {"at": evil, "attacks": [{"threat": threat, "attack": evil, "accuracy": 0.5}], "findings": checks},
    )
    page, text = page_of(run, write_run(tmp_path / "b", "b"))
    assert "<img" not in text
    assert sum(tag == "script" for tag, _ in page.elements) == 1
    assert all("onerror" not in attributes for _, attributes in page.elements)
    assert "".join(page.text).count(evil) > 10


def test_unfinished_and_stopped_runs_are_marked(tmp_path):
    """Half a training taken for a whole one is the commonest way to misread a comparison."""
    runs = [
        write_run(tmp_path / "done", "done", method="done"),
        write_run(tmp_path / "half", "half", finished=False, epochs=2),
        write_run(tmp_path / "early", "early", method="early", summary={"stopped_early": "val robust fell"}),
    ]
    page, _ = page_of(*runs)
    half = page.line("runs", "half")
    assert (half["state"], half["epochs"], half["robust test"]) == ("unfinished", "2 of 3", "50.0 (val)")
    assert page.line("runs", "early")["state"] == "stopped early val robust fell"
    assert "Unfinished: half." in "".join(page.text)
    assert ("Robust test accuracy", "half (unfinished, epoch 2), last epoch") not in page.series()


def test_sections_without_data_are_absent(tmp_path):
    """An empty heading makes the reader look for what is missing."""
    run = write_run(tmp_path / "a", finished=False, epochs=1)
    (tmp_path / "a" / "metrics.jsonl").write_text(
        '{"epoch": 1, "val/robust_accuracy": null, "wci/total": NaN}\n'
    )
    page, text = page_of(load_run(run.folder))
    assert list(page.sections) == ["results", "settings", "runs"]
    assert page.line("runs", "a")["robust test"] == "–"
    assert "nan" not in re.sub(r"<(style|script).*?</\1>", "", text, flags=re.S).lower()


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1.0, 0.0])
def test_values_that_are_not_numbers_leave_gaps(tmp_path, value):
    """A diverged run is exactly the one whose page somebody wants to see."""
    keys = (
        "wci/total",
        "wci/total_stderr",
        f"wci/{LAYERS[0]}",
        "robust_gap",
        "val/robust_loss",
        "measures/x",
        "train_seconds",
    )
    run = write_run(
        tmp_path / "a", metrics=dict.fromkeys(keys, value), summary={"train_seconds": value, "cost": None}
    )
    page, _ = page_of(run, write_run(tmp_path / "b", "b", method="B"))
    drawn = [
        v
        for _, a in page.elements
        for k, v in a.items()
        if k in ("d", "points", "x", "y", "viewbox", "data-y")
    ]
    assert not [v for v in drawn if re.search("nan|inf", v)]
    assert page.line("runs", "a")["robust test"] == "50.0"


def test_measures_are_shown_with_their_errors(three):
    """A value without its error, or under another run's name, supports any claim."""
    wci = {"wci": 421.2019, "wci_stderr": 5.8212, "at": "last", "split": "train", "estimator": "hutchinson"}
    add_json(three[0], "measures/wci.json", wci)
    flat = {"value": 0.25, "stderr": None, "settings": "xi 0.5"}
    add_json(
        three[2],
        "measures/flat.json",
        {"at": "best", "split": "test", "measures": {"average_flatness": flat, "b": {}}},
    )
    (three[2].folder / "measures" / "broken.json").write_text("{")
    with pytest.warns(UserWarning, match=r"broken\.json: got no JSON"):
        page, _ = page_of(*three)
    table = page.tables[page.sections["measures"]]
    assert table[0] == ["measure", "at-s0", "wci-s0"]
    assert table[1:] == [
        ["average_flatnessbest test, xi 0.5", "–", "0.25"],
        ["bbest test", "–", "–"],
        ["wcilast train, hutchinson", "421.2 ± 5.8", "–"],
    ]
    (three[2].folder / "measures" / "broken.json").unlink()
    assert [m.name for m in measures(three[2])] == ["average_flatness", "b"]


def evaluation(clean, *robust):
    share = {"interval": [0.1, 0.9]}
    attacks = [
        {"threat": {"norm": "linf", "eps": (i + 1) / 255}, "attack": "pgd-20", "accuracy": value, **share}
        for i, value in enumerate(robust)
    ]
    document = {
        "at": "last",
        "split": "test",
        "num_examples": 100,
        "clean": {"accuracy": clean, **share},
        "attacks": attacks,
    }
    document["worst_case"] = [{"threat": entry["threat"], "accuracy": 0.0} for entry in attacks]
    return document | {"corruptions": {"fog": {"1": 0.5, "5": 0.1}}, "corrupted_accuracy": 0.3}


def test_evaluations_are_shown_per_threat_and_attack(three):
    """Robust accuracies under different attacks must not share a column; several radii are a curve."""
    add_json(three[0], "evaluations/last-test.json", evaluation(0.8, 0.5, 0.4))
    add_json(three[1], "evaluations/last-test.json", evaluation(0.9, 0.6, 0.5))
    add_json(
        three[2],
        "evaluations/last-test.json",
        evaluation(0.7, 0.3) | {"findings": [{"name": "masking", "text": "look"}]},
    )
    page, _ = page_of(*three)
    at, wci = (
        page.line("evaluations", "ATlast test, 100 examples"),
        page.line("evaluations", "WCI r=1last test, 100 examples"),
    )
    assert list(at)[2:] == [
        "clean",
        "linf 1/255, pgd-20",
        "linf 2/255, pgd-20",
        "corruption fog",
        "corruptions, mean",
    ]
    assert at["linf 2/255, pgd-20"] == "45.0 (40.0 to 50.0)"
    assert wci["linf 1/255, pgd-20"] == "30.0 [10.0, 90.0]"
    assert (wci["linf 2/255, pgd-20"], wci["corruption fog"]) == ("–", "30.0")
    assert page.series()["Accuracy under linf pgd-20", "AT"] == {"eps × 255 1": "55.0", "eps × 255 2": "45.0"}
    assert ("Accuracy under linf pgd-20", "WCI r=1") not in page.series()  # one radius is no curve
    assert "wci-s0: note, masking: look" in "".join(page.text)


def test_files_of_one_run_are_not_averaged_as_if_they_were_runs(tmp_path):
    """Two evaluations of one model are no two models: their range would pass for the spread over seeds."""
    runs = [write_run(tmp_path / f"at-s{seed}", seed=seed) for seed in range(2)]
    for run in runs:
        add_json(run, "evaluations/a.json", evaluation(0.8, 0.5))
        stronger = evaluation(0.8, 0.5)["attacks"] + [{**evaluation(0.8, 0.5)["attacks"][0], "attack": "aa"}]
        stronger[1]["accuracy"] = 0.4
        add_json(run, "evaluations/b.json", evaluation(0.8) | {"attacks": stronger[1:]})
        worst = [{"threat": stronger[0]["threat"], "accuracy": 0.3}]
        add_json(run, "evaluations/c.json", evaluation(0.8) | {"attacks": stronger, "worst_case": worst})
    add_json(runs[0], "evaluations/n50.json", evaluation(0.9, 0.7) | {"num_examples": 50})
    add_json(runs[0], "evaluations/s3.json", evaluation(0.9, 0.6, 0.1) | {"settings": {"seed": 3}})
    page, _ = page_of(*runs)
    both = page.line("evaluations", "ATlast test, 100 examples")
    assert (both["runs"], both["clean"], both["linf 1/255, pgd-20"]) == (
        "2",
        "80.0 (80.0 to 80.0)",
        "50.0 (50.0 to 50.0)",
    )
    assert (both["linf 1/255, aa"], both["linf 1/255, worst case"]) == (
        "40.0 (40.0 to 40.0)",
        "30.0 (30.0 to 30.0)",
    )
    fewer = page.line("evaluations", "ATlast test, 50 examples")
    assert (fewer["runs"], fewer["linf 1/255, pgd-20"]) == ("1", "70.0 [10.0, 90.0]")
    line = page.line("evaluations", "ATlast test, 100 examples, seed 3")
    assert line["linf 1/255, pgd-20"] == "60.0 [10.0, 90.0]"
    assert page.series()["Accuracy under linf pgd-20", "AT"] == {"eps × 255 1": "60.0", "eps × 255 2": "10.0"}


def test_a_run_without_an_attack_is_counted_and_the_least_accuracy_of_a_run_counts(tmp_path):
    """A mean over fewer runs than the row has passes for all; a weaker attack for a stronger one."""
    runs = [write_run(tmp_path / f"at-s{seed}", seed=seed) for seed in range(2)]
    add_json(runs[0], "evaluations/a.json", evaluation(0.8, 0.3))
    add_json(runs[0], "evaluations/b.json", evaluation(0.8, 0.5))
    add_json(runs[0], "evaluations/c.json", evaluation(0.8, None))
    add_json(runs[1], "evaluations/a.json", evaluation(0.6))
    line = page_of(*runs)[0].line("evaluations", "ATlast test, 100 examples")
    assert line["clean"] == "70.0 (60.0 to 80.0)"
    assert line["linf 1/255, pgd-20"] == "30.0, 1 of 2 runs [10.0, 90.0]"


def test_evaluations_of_other_images_stand_apart(tmp_path):
    """Accuracies on different images are no spread over seeds."""
    runs = [write_run(tmp_path / f"at-s{seed}", seed=seed) for seed in range(2)]
    for run, digest in zip(runs, ("aaaaaaaa", "bbbbbbbb"), strict=True):
        add_json(run, "evaluations/a.json", evaluation(0.8, 0.5) | {"digest": digest})
    page, _ = page_of(*runs)
    for name in ("aaaaaa", "bbbbbb"):
        assert page.line("evaluations", f"ATlast test, 100 examples, images {name}")["runs"] == "1"


def test_measures_taken_otherwise_stand_apart(tmp_path):
    """A measure of 100 images under the heading of one of 1000 is another number."""
    run = write_run(tmp_path / "a")
    entry = {"value": 1.0, "settings": "PGD-10 linf 8/255"}
    header = {"at": "last", "split": "train", "threat": "linf 8/255", "seed": 0, "num_examples": 500}
    for name, value, change in (
        ("a", 1.0, {}),
        ("b", 2.0, {"num_examples": 100}),
        ("c", 3.0, {"seed": 2}),
        ("d", 4.0, {"threat": "l2 0.5"}),
    ):
        document = (
            header
            | change
            | {"measures": {"m": entry | {"value": value}, "norm": {"value": 9, "num_examples": None}}}
        )
        add_json(run, f"measures/{name}.json", document)
    wci = {
        "wci": 5.0,
        "at": "last",
        "split": "train",
        "loss": "robust loss",
        "threat": {"norm": "linf", "eps": 0.5},
    }
    add_json(run, "measures/e.json", wci | {"num_examples": 40, "seed": 1})
    add_json(run, "measures/f.json", wci | {"num_examples": 77, "target_relative_error": 0.02, "wci": 6.0})
    page, _ = page_of(run)
    assert dict(page.tables[page.sections["measures"]][1:]) == {
        "mlast train, PGD-10 linf 8/255, 500 examples": "1",
        "mlast train, PGD-10 linf 8/255, 100 examples": "2",
        "mlast train, PGD-10 linf 8/255, 500 examples, seed 2": "3",
        "mlast train, PGD-10 linf 8/255, l2 0.5, 500 examples": "4",
        "normlast train": "9",
        "normlast train, seed 2": "9",
        "wcilast train, robust loss, linf 0.5, 40 examples, seed 1": "5",
        "wcilast train, robust loss, linf 0.5, to a relative error of 0.02": "6",
    }


@pytest.mark.parametrize(
    "document", [{}, {"clean": 3, "attacks": 4}, {"attacks": [5, {}]}, {"corruptions": {"fog": 1}}, []]
)
def test_evaluations_of_another_form_leave_gaps(three, document):
    """A file of a later version must not keep the rest of the page from being written."""
    add_json(three[0], "evaluations/e.json", document)
    assert all(a.attack for a in accuracies(three[0]))
    page_of(*three)


def test_measures_of_training_become_curves(tmp_path):
    """What was measured at every epoch would otherwise be seen by nobody."""
    run = write_run(tmp_path / "a", metrics={"measures/lambda_max": 4.0, "measures/lambda_max_stderr": 0.5})
    series = page_of(run)[0].series()
    assert series["lambda_max", "AT"] == {"epoch 1": "4.00", "epoch 2": "4.00", "epoch 3": "4.00"}
    assert not [key for key in series if "stderr" in key[0]]


def test_pictures_are_inside_up_to_a_size(tmp_path, monkeypatch):
    """A page of a hundred landscapes would not open; one that drops them in silence would mislead."""
    monkeypatch.setattr("wcitrain.report.sections.PICTURE_BYTES", len(PIXEL))
    run = write_run(tmp_path / "a")
    for name in ("landscapes/a.png", "landscapes/b.png", "figures/curves.png"):
        (run.folder / name).parent.mkdir(exist_ok=True)
        (run.folder / name).write_bytes(PIXEL)
    page, _ = page_of(run)
    assert [a["alt"] for tag, a in page.elements if tag == "img"] == ["Loss landscape a of run a"]
    text = "".join(page.text)
    assert "Left out to keep the page small: a: landscapes/b.png." in text
    assert "curves.png" not in text  # the report's own


def test_equal_folders_give_equal_bytes(three):
    """A page that changes by itself cannot be compared or kept under version control."""
    assert page_of(*three)[1] == page_of(*[load_run(run.folder) for run in three])[1]


def test_the_best_epoch_is_the_open_table_when_asked(tmp_path):
    """The command's choice must reach the page."""
    best = {"epoch": 2, "test": {"clean_accuracy": 0.7, "robust_accuracy": 0.65}}
    run = write_run(tmp_path / "a", summary={"best": best})
    assert page_of(run)[0].line("results", "AT")["robust test"].startswith("50.0")
    assert page_of(run, at="best")[0].line("results", "AT")["robust test"] == "65.0"


def test_thirty_runs_of_thirty_epochs_stay_small(tmp_path):
    """A report that takes a browser seconds to open is not opened twice."""
    layers = {f"wci/backbone.layer{i}.conv.weight": 1.0 + i for i in range(20)}
    runs = [
        write_run(tmp_path / f"m{i}", f"m{i}", method=f"m{i}", epochs=30, metrics=layers) for i in range(30)
    ]
    assert len(report_page(group_rows(runs)).encode()) < 5_000_000


def test_colours_can_be_read_in_both_themes():
    """Text needs a contrast of 4.5, lines and markers one of 3 (WCAG 2.2, 1.4.3 and 1.4.11)."""
    folder = Path(svg.__file__).parent
    light = dict(re.findall(r"--([\w-]+): (#\w{6})", (folder / "page.css").read_text()))
    dark = dict(re.findall(r"--([\w-]+): (#\w{6})", (folder / "dark.css").read_text()))
    assert set(light) == set(dark)
    for theme in (light, dark):
        for ground in ("paper", "raised"):
            for text in ("ink", "soft", "accent"):
                assert contrast(theme[text], theme[ground]) >= 4.5, (text, ground)
        assert contrast(theme["mark-ink"], theme["mark"]) >= 4.5
        assert contrast(theme["ink"], theme["paper"]) >= 4.5
        assert min(contrast(theme[f"c{i}"], theme["paper"]) for i in range(len(COLOURS))) >= 3


def contrast(first, second):
    def luminance(colour):
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(
    ("low", "high", "is_log", "expected"),
    [
        (0.0, 1.0, False, [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]),
        (-3.0, 3.0, False, [-3, -2, -1, 0, 1, 2, 3]),
        (0.9, 110.0, True, [1, 3, 10, 30, 100]),
    ],
)
def test_ticks_are_round_and_inside(low, high, is_log, expected):
    """A tick outside the axis is drawn over something else."""
    assert ticks(low, high, is_log) == pytest.approx(expected)


def test_markers_differ():
    """Methods are told apart without colour only if every marker has a shape of its own."""
    shapes = [marker(kind, 0, 0) for kind in range(NUM_MARKERS)]
    assert len(set(shapes)) == NUM_MARKERS == 6
