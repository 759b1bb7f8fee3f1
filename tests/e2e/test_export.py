"""``wcitrain export``: what others load without us, what the card says, and what is refused."""

import json
import re
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import numpy as np
import pytest
import timm
import torch
import yaml
from huggingface_hub import constants
from PIL import Image
from tiny_run import TINY as BASE

from wcitrain import files
from wcitrain.__main__ import main
from wcitrain.data import load_splits
from wcitrain.data.pixels import to_levels
from wcitrain.export.folder import export_model, timm_config
from wcitrain.models import Classifier, create_model, load_exported
from wcitrain.monitoring import export as export_of_run
from wcitrain.recipe import recipe_from_dict

TINY = BASE | {"checkpoint": {"keep_every": 1}, "averaging": {"name": "ema"}}

pytestmark = [
    pytest.mark.filterwarnings("ignore::wcitrain.evaluation.PreflightWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def block_of(card: str) -> str:
    return re.search(r"```python\n(.*?)```", card, re.DOTALL)[1]


def outside(*pairs: tuple[Path, torch.Tensor]) -> list[torch.Tensor]:
    """Return logits of each card's own lines, run in its folder by a process that cannot import wcitrain."""
    place = pairs[0][0].parent
    torch.save([(str(folder), block_of((folder / "README.md").read_text()), x) for folder, x in pairs],
               place / "asked.pt")  # fmt: skip
    code = f"""
import os, sys, torch
sys.modules["wcitrain"] = None
found = []
for folder, block, x in torch.load({str(place / "asked.pt")!r}):
    os.chdir(folder)
    names = {{}}
    exec(block, names)
    found.append(names["logits"](x).detach())
torch.save(found, {str(place / "found.pt")!r})
"""
    subprocess.run([sys.executable, "-c", code], cwd=place, check=True, timeout=200)
    return torch.load(place / "found.pt")


NETWORKS = {
    "stem": ("resnet18", "cifar", {"layers": [1] * 4, "channels": [4, 4, 8, 8]}, 1),
    "preact": ("preact_resnet18", "default", {"width": 4}, 3),
    "timm's": ("resnet18", "default", {"layers": [1] * 4, "channels": [4, 4, 8, 8]}, 4),
    "enlarged": ("vit_tiny_patch16_224", "default", {"img_size": 48, "depth": 1, "resize_inside": 48}, 3),
    "fixed size": ("vit_tiny_patch16_224", "default", {"img_size": 32, "depth": 1}, 3),
    "any size": ("vit_tiny_patch16_384", "default", {"dynamic_img_size": True, "depth": 1}, 3),
}


def write_weights(folder: Path, name: str, *, size: int = 32) -> tuple[Classifier, Path]:
    """Export an untrained network with statistics that are not those of its first day, as a run does."""
    architecture, stem, kwargs, in_chans = NETWORKS[name]
    kwargs, side = {k: v for k, v in kwargs.items() if k != "resize_inside"}, kwargs.get("resize_inside")
    torch.manual_seed(0)
    own = {"mean": [0.3] * in_chans, "std": [0.7 + 0.1 * i for i in range(in_chans)]}
    model = create_model(
        architecture, num_classes=3, in_chans=in_chans, stem=stem, resize_inside=side, **own, **kwargs
    )
    model(torch.rand(8, in_chans, size, size))

    given = {"name": architecture, "stem": stem, "kwargs": kwargs, "resize_inside": side}

    class Run:
        measured, accelerator = model.eval(), type("One", (), {"is_main_process": True})
        recipe = recipe_from_dict(BASE | {"model": given})
        splits = type("Splits", (), {"num_classes": 3, "in_chans": in_chans, "class_names": ("a", "b", "c"),
                                     "shape": (in_chans, size, size)})  # fmt: skip

    Run.folder = folder
    export_of_run(Run, "last", {"epoch": 1})
    return model, folder / "model" / "last"


def test_timm_alone_loads_the_same_networks(tmp_path):
    """Others attack the model in timm: another normalisation, stem or size is another network."""
    asked, wanted = [], []
    for name in NETWORKS:
        model, weights = write_weights(tmp_path / "runs" / name, name)
        x, out = torch.rand(5, model.mean.numel(), 32, 32), tmp_path / name
        written = export_model(tmp_path, weights, recipe_from_dict(BASE), "last", tuple(x.shape[1:]), out)
        assert ("modeling.py" in {path.name for path in written}) == (name in ("stem", "preact"))
        asked.append((out, x))
        with torch.no_grad():
            wanted.append(model(x))
            assert torch.equal(load_exported(out)(x), wanted[-1])
        config = json.loads((out / "config.json").read_text())
        assert config["label_names"] == ["a", "b", "c"]
        assert config["pretrained_cfg"]["std"] == model.std.flatten().tolist()
    for logits, own in zip(outside(*asked), wanted, strict=True):
        torch.testing.assert_close(logits, own, atol=1e-6, rtol=1e-6)


def test_timms_transform_makes_the_pixels_that_the_model_was_trained_on(tmp_path):
    """Another crop or interpolation shifts every pixel, and clean accuracy falls by points."""
    model, weights = write_weights(tmp_path / "run", "preact")
    metadata = json.loads((weights / "metadata.json").read_text())
    cfg = timm_config(model, metadata, (3, 32, 32))[0]["pretrained_cfg"]
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    data = timm.data.resolve_data_config(pretrained_cfg=cfg)
    theirs = timm.data.create_transform(**data, is_training=False)(image)
    ours = (torch.from_numpy(to_levels(image, 32)) / 255 - model.mean[0]) / model.std[0]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=0)


def test_a_run_is_exported_with_all_that_was_measured_of_these_weights(run, tmp_path, capsys):
    """A card that leaves out masked gradients, or quotes another epoch, misleads who trusts it."""
    assert main(["evaluate", str(run), "--attacks", "pgd-3"]) == 0
    (evaluation,) = (run / "evaluations").glob("*.json")
    document = json.loads(evaluation.read_text())
    document["findings"] = [{"name": "huge_radius", "severity": "warning", "text": "masked."}]
    document["attacks"][0] |= {"attack": "autoattack", "accuracy": 0.07}
    files.write_json(evaluation, document)
    others = {"earlier": {"epoch": None}, "val": {"split": "val"}, "data": {"data": {"max_test": 7}}}
    for name, change in others.items():
        files.write_json(evaluation.with_stem(name), document | change | {"num_examples": 4321})
    assert main(["measure", str(run), "--at", "0", "--examples", "20"]) == 0
    out = tmp_path / "out"
    assert main(["export", str(run), str(out), "--license", "mit", "--torch-export"]) == 0
    card = (out / "README.md").read_text()
    front = yaml.safe_load(card.split("---\n")[1])
    assert (front["library_name"], front["license"], "base_model" in front) == ("timm", "mit", False)
    summary = json.loads((run / "summary.json").read_text())["last"]
    share = f"{100 * summary['test']['clean_accuracy']:.1f}"
    assert f"| – | clean | {share} |" in card
    assert "| linf 0.1 | autoattack | 7.0 |" in card
    assert "4321" not in card
    assert "- warning: huge_radius: masked." in card
    assert "averaged (" in card
    assert re.search(r"before training: \d", card)
    assert "The index before" not in card
    assert "Corrupted images: not measured." in card
    assert str(tmp_path) not in card
    recipe = recipe_from_dict(yaml.safe_load(re.search(r"```yaml\n(.*?)```", card, re.DOTALL)[1]))
    assert recipe.model == recipe_from_dict(TINY).model
    entry = json.loads((out / "robustbench.json").read_text())
    assert entry["autoattack_acc"] is None  # of 100 images: the data set has more
    x = load_splits(recipe.data).test.source.pixels[:7, None] / 16
    x = torch.from_numpy(x).float()
    program = torch.export.load(out / "model.pt2").module()
    with torch.no_grad():
        wanted = load_exported(run / "model" / "last")(x)
        torch.testing.assert_close(program(x), wanted, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(outside((out, x))[0], wanted, atol=1e-6, rtol=1e-6)
    capsys.readouterr()
    quick = ["--attacks", "--preflight", "off", "--data", "digits", "--recipe", "data.max_test=100"]
    sizes = ["data.val_size=100", "data.max_train=200"]
    for target in (out, f"local-dir:{out}"):
        assert main(["evaluate", str(target), *quick, *sizes, "--out", str(tmp_path / "evaluations")]) == 0
        assert re.search(rf"clean +{share} ", capsys.readouterr().out)
    assert main(["export", str(run), str(tmp_path / "first"), "--at", "0"]) == 0
    first = (tmp_path / "first" / "README.md").read_text()
    assert "Accuracies on test images: not measured at this epoch." in first
    assert "after epoch 0 (epoch-0)" in first


def test_the_entry_has_only_what_was_measured_on_all_test_images(run, tmp_path):
    """A leaderboard takes the number for that of the whole test set."""
    recipe = (run / "recipe.yaml").read_text().replace("max_test: 100", "max_test: null")
    (run / "recipe.yaml").write_text(recipe)
    assert main(["export", str(run), str(tmp_path / "a")]) == 0
    entry = json.loads((tmp_path / "a" / "robustbench.json").read_text())
    test = json.loads((run / "summary.json").read_text())["last"]["test"]
    assert entry["clean_acc"] == f"{100 * test['clean_accuracy']:.2f}"
    assert entry["reported"] == f"{100 * test['robust_accuracy']:.2f}"
    assert (entry["autoattack_acc"], entry["unreliable"], entry["eps"]) == (None, None, "0.1")


def test_seeds_stand_beside_one_another_only_where_nothing_else_differs(run, tmp_path):
    """A spread over other recipes is not one of seeds."""
    twin = Path(shutil.copytree(run, run.with_name("tiny-s1")))
    summary = json.loads((twin / "summary.json").read_text())
    files.write_json(twin / "summary.json", summary | {"seed": 1, "name": "tiny-s1"})
    assert main(["export", str(run), str(tmp_path / "a")]) == 0
    assert "over its seeds" in (tmp_path / "a" / "README.md").read_text()
    (twin / "recipe.yaml").write_text((twin / "recipe.yaml").read_text().replace("lr: 0.1", "lr: 0.2"))
    assert main(["export", str(run), str(tmp_path / "b")]) == 0
    assert "over its seeds" not in (tmp_path / "b" / "README.md").read_text()


def test_what_must_not_be_written_is_refused_and_leaves_nothing(run, tmp_path, capsys):
    """A run folder written over, or half an export that somebody loads."""

    def refused(message: str, *arguments: object) -> None:
        before = sorted(tmp_path.rglob("*"))
        assert main(["export", *map(str, arguments)]) == 2
        assert message in capsys.readouterr().err
        assert sorted(tmp_path.rglob("*")) == before

    refused("got another folder with files; expected a new or empty", run, run, "--force")
    refused("got a file; expected a new or empty folder", run, run / "recipe.yaml")
    refused("expected a run folder", run / "recipe.yaml", tmp_path / "out")
    refused("--at: got '7'; expected last, best, or an epoch", run, tmp_path / "out", "--at", "7")
    refused("--private: got it without --push", run, tmp_path / "out", "--private")
    assert main(["export", str(run), str(run / "inside")]) == 0
    refused("got an export; expected a new or empty folder. Give --force", run, run / "inside")
    (run / "inside" / "stale.txt").write_text("")
    assert main(["export", str(run), str(run / "inside"), "--force"]) == 0
    assert not (run / "inside" / "stale.txt").exists()
    refused("got a model without its run", run / "inside", tmp_path / "out")
    shutil.rmtree(run / "model" / "last")
    refused("got a run without a model (last); expected a finished one", run, tmp_path / "out")


def test_another_network_than_the_model_is_never_kept(run, tmp_path, capsys, monkeypatch):
    """What timm loads from the folder is compared first: a changed rule of timm's must not pass."""
    monkeypatch.setattr("wcitrain.export.folder.timm_config", lambda *a: _with_other_mean(*a))
    assert main(["export", str(run), str(tmp_path / "out")]) == 2
    assert "got logits from timm that differ by" in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def _with_other_mean(*arguments):
    config, origin = timm_config(*arguments)
    config["pretrained_cfg"]["mean"] = [0.9]
    return config, origin


def test_onnx_gives_the_same_logits_or_names_its_packages(run, tmp_path, capsys, monkeypatch):
    """A traceback of an import does not say what to install."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ModuleNotFoundError:
        assert main(["export", str(run), str(tmp_path / "out"), "--onnx"]) == 2
        assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        return
    assert main(["export", str(run), str(tmp_path / "out"), "--onnx"]) == 0
    x = torch.rand(3, 1, 8, 8)
    session = onnxruntime.InferenceSession(str(tmp_path / "out" / "model.onnx"))
    with torch.no_grad():
        wanted = load_exported(run / "model" / "last")(x)
    torch.testing.assert_close(torch.as_tensor(session.run(None, {"images": x.numpy()})[0]), wanted,
                               atol=1e-5, rtol=1e-5)  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """A hub of one user: what it has, and what it was asked."""

    names: set[str]
    asked: list[tuple[str, dict]]
    fails = False

    def log_message(self, *_):
        pass

    def answer(self, status: int, content: object) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        name = self.path.split("?")[0].removeprefix("/api/models/")
        name = "/".join(name.split("/")[:2])
        is_there = name in type(self).names
        self.answer(200 if is_there else 404, {"id": name, "sha": "0" * 40, "siblings": [], "tags": []})

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        lines = [json.loads(line) for line in body.splitlines() if line.strip().startswith(b"{")]
        type(self).asked.append((self.path, lines))
        if self.path == "/api/repos/create":
            content = json.loads(body)
            name = f"{content.get('organization') or 'me'}/{content['name']}"
            type(self).names.add(name)
            self.answer(200, {"url": f"https://huggingface.co/{name}", "id": name})
        elif "/preupload/" in self.path:
            sent = json.loads(body)["files"]
            self.answer(200, {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                                        for one in sent]})  # fmt: skip
        elif "/commit/" in self.path:
            url = "https://huggingface.co/me/net/commit/" + "1" * 40
            failed = type(self).fails
            self.answer(400 if failed else 200, {"error": "no"} if failed else
                        {"commitUrl": url, "commitOid": "1" * 40, "success": True})  # fmt: skip
        else:
            self.answer(200, {})


@pytest.fixture
def hub(monkeypatch):
    """A server in the hub's place, and its handler."""
    handler = type("Own", (Hub,), {"names": set(), "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_nobody")
    huggingface_hub.utils.close_session()
    yield handler
    huggingface_hub.utils.close_session()
    server.shutdown()
    server.server_close()


def test_a_model_goes_onto_the_hub_once_and_whole(run, tmp_path, hub, capsys):
    """One commit with all files; a name that is taken is not written over unasked."""
    command = ["export", str(run), str(tmp_path / "out"), "--push", "me/net", "--private"]
    assert main(command) == 0
    created = next(json.loads(json.dumps(lines[0])) for path, lines in hub.asked if path.endswith("create"))
    assert created.get("private", created.get("visibility")) in (True, "private")
    (commit,) = [lines for path, lines in hub.asked if "/commit/" in path]
    sent = {line["value"]["path"] for line in commit if line["key"] == "file"}
    assert sent == {path.name for path in (tmp_path / "out").iterdir()}
    assert "on the hub" in capsys.readouterr().out
    command[2] = str(tmp_path / "again")
    assert main(command) == 2
    assert "got me/net, which exists; expected a new repository" in capsys.readouterr().err
    assert not (tmp_path / "again").exists()
    hub.fails = True
    assert main([*command, "--force"]) == 2
    assert "is there, without this commit" in capsys.readouterr().err


def test_a_hub_without_token_name_or_answer_is_told_before_anything_is_written(
    run, tmp_path, hub, capsys, monkeypatch
):
    """After an hour of waiting, or with half a repository, nobody knows what is where."""

    def refused(message: str, name: str = "me/net") -> None:
        assert main(["export", str(run), str(tmp_path / "out"), "--push", name]) == 2
        assert message in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert hub.asked == []

    refused("--push: got 'net'; expected OWNER/NAME", "net")
    with socket.create_server(("127.0.0.1", 0)) as silent, monkeypatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{silent.getsockname()[1]}")
        patch.setattr("wcitrain.export.hub.TIMEOUT", 0.2)
        refused("expected an answer. Check the network and HF_ENDPOINT")
        patch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
        refused("expected an answer. Check the network and HF_ENDPOINT")
    monkeypatch.setattr("wcitrain.export.hub.get_token", lambda: None)
    refused("--push: got no token of the hub")


def test_fine_tuning_names_its_origin(tmp_path):
    """The licence of the weights before binds those after."""
    recipe = recipe_from_dict(BASE | {"model": {"name": "resnet18", "pretrained": True}})
    _, weights = write_weights(tmp_path / "run", "timm's")
    export_model(tmp_path, weights, recipe, "last", (4, 32, 32), tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "timm/resnet18.a1_in1k"
    assert "timm's resnet18.a1_in1k, licence apache-2.0" in card
