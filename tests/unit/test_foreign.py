"""Other people's models: every way in is the same model, its normalisation is measured, all else refused."""

import json
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from wcitrain.__main__ import main
from wcitrain.commands.study import _digest_of
from wcitrain.data import Data, load_splits
from wcitrain.foreign import load_program
from wcitrain.models import Classifier, create_model
from wcitrain.targets import open_run

DIGITS = ["data.source=digits", "threat.eps=0.1"]
CODE = """
import torch
from torch import nn

def blank():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))

class Kept(nn.Sequential):
    def __init__(self):
        super().__init__(*blank())
        self.load_state_dict(torch.load("own.pt"))

class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Kept()
    def forward(self, x):
        return {"logits": self.net(x), "features": x}

def a_class(): return Named
def a_dict(): return {"model": blank()}
def of_something(path): return blank()
def broken(): raise KeyError("weights")
def of_seven(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))
def of_colours(): return nn.Sequential(nn.Conv2d(3, 10, 8), nn.Flatten())
def of_other_images(): return nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))
READY = blank()
"""


def nearest_mean(scale: float = 1.0, shift: float = 0.0) -> nn.Sequential:
    """A linear model that takes the class of the nearest mean, for images ``scale`` x + ``shift``."""
    images = load_splits(Data()).train
    x, y, _ = next(images.batches(len(images), device="cpu"))
    x = scale * x.flatten(1) + shift
    means = torch.stack([x[y == label].mean(0) for label in range(10)])
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    model[1].weight.data, model[1].bias.data = means, -means.square().sum(1) / 2
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """One model as state dict, TorchScript, export and code; and one for images in [-1, 1]."""
    folder, model = tmp_path_factory.mktemp("foreign"), nearest_mean()
    (folder / "own_nets.py").write_text(CODE)
    torch.save(model.state_dict(), folder / "own.pt")
    torch.save({"state_dict": {f"model.{k}": v for k, v in model.state_dict().items()}}, folder / "l.ckpt")
    example = torch.rand(2, 1, 8, 8)
    torch.jit.save(torch.jit.trace(model, example), folder / "traced.pt")
    torch.jit.save(torch.jit.trace(nearest_mean(2.0, -1.0), example), folder / "standardised.pt")
    torch.jit.save(torch.jit.trace(nearest_mean(255.0), example), folder / "levels.pt")
    batch = ({0: torch.export.Dim("batch", min=1, max=4096)},)
    for name, shapes in (("exported.pt2", batch), ("static.pt2", None)):
        torch.export.save(torch.export.export(model, (example,), dynamic_shapes=shapes), folder / name)
    return folder


WAYS = {
    "module": ("own_nets:Kept", None),
    "file": ("own_nets.py:Kept", None),
    "checkpoint": ("own_nets:blank", "l.ckpt"),
    "TorchScript": ("traced.pt", None),
    "torch.export": ("exported.pt2", None),
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("way", WAYS)
def test_every_way_in_is_the_same_model(way, folder, monkeypatch, capsys):
    """A way that loses weights, a mode or the normalisation gives plausible numbers of another model."""
    monkeypatch.chdir(folder)
    target, checkpoint = WAYS[way]
    found = open_run(target, settings=DIGITS, checkpoint=checkpoint)
    if way == "TorchScript":
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            load_program(Path(target))  # without warnings that are torch's own affair
    assert found.recipe.threat.eps == 0.1
    assert found.folder("evaluations").parent.resolve() == folder
    torch.manual_seed(5)
    model = found.load_model()
    state = torch.get_rng_state()
    torch.manual_seed(5)
    assert torch.equal(state, torch.get_rng_state())  # whatever the function drew
    x, y, _ = next(found.images("test").batches(50, device="cpu"))
    assert not model.training
    assert torch.equal(model(x), nearest_mean()(x))
    assert float((model(x).argmax(1) == y).float().mean()) > 0.8
    assert "normalisation: " in capsys.readouterr().out
    with pytest.raises(ValueError, match="weights before training are unknown"):
        found.initial_weights()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize(
    ("name", "mean", "std"), [("standardised.pt", [0.5], [0.5]), ("levels.pt", [0.0], [0.00392157])]
)
def test_a_normalisation_outside_is_measured_and_refused_with_the_fix(name, mean, std, folder, capsys):
    """Most published programs expect it outside: on bare images they are right half of the time, silently."""
    path, fix = folder / name, [f"model.mean={mean}", f"model.std={std}"]
    message = (
        rf"got \d\d\.\d % of 200 images right as it is, behind others \d\d\.\d % .*"
        rf"{'Chance does not tell these 6 apart: .*' * (name == 'standardised.pt')}"
        rf"--recipe '{fix[0]}' '{fix[1]}"
    )
    with pytest.raises(ValueError, match=message.replace("[", r"\[").replace("]", r"\]").replace("\\\\", "")):
        open_run(path, settings=DIGITS).load_model()
    target = open_run(path, settings=[*DIGITS, *fix])
    model, (x, _, _) = target.load_model(), next(target.images("test").batches(20, device="cpu"))
    inside = nearest_mean(2.0, -1.0)(2 * x - 1) if name == "standardised.pt" else nearest_mean(255.0)(255 * x)
    assert torch.allclose(model(x), inside, rtol=1e-4)  # float32, after (x - mean) / std
    kept = open_run(path, settings=[*DIGITS, "model.mean=[0.0]", "model.std=[1.0]"])  # the user insists
    capsys.readouterr()
    kept.load_model()
    assert "% of 200 images right as it is, behind others" in capsys.readouterr().out


REFUSED = {
    "own_nets:a_class": "got the class Named; expected an nn.Module. Return Named().",
    "own_nets:a_dict": "got a dict; expected an nn.Module. Return the model.",
    "own_nets:of_something": "missing 1 required positional argument: 'path'",
    "own_nets:broken": "KeyError: 'weights' (own_nets.py:",
    "own_nets:nothing": "got no 'nothing' in",
    "no_module:make": "No module named 'no_module'",
    "none.py:make": "got no file none.py; expected one",
    "own_nets:Named": "got a dict (logits, features) as outputs; expected logits, one tensor [B, C]",
    "own_nets:of_seven": "got outputs (200, 7) for 200 images of 10 classes",
    "own_nets:of_other_images": "the model fails on images (200, 1, 8, 8)",
    "own_nets:of_colours": "Set data.channels=3.",
    "static.pt2": "export programs with a dynamic batch size",
    "resnt18": "Did you mean resnet18?",
    "none.pt": "got nothing; expected a run folder",
    "own.pt": "name the model: NAME or module:function --checkpoint own.pt",
    "traced.pt --checkpoint own.pt": "--checkpoint: got own.pt with traced.pt",
    "own_nets:blank --checkpoint none.pt": "none.pt: got no file; expected weights",
    "resnet18 --checkpoint own.pt": "got names such as 1.weight, 1.bias, and a model with conv1.weight",
    "traced.pt --recipe model.name=x": "which says what its model is",
}


@pytest.mark.filterwarnings("ignore:.*torch.jit")
@pytest.mark.parametrize("typed", REFUSED)
def test_what_a_user_mistypes_is_one_sentence(typed, folder, monkeypatch, capsys):
    """A traceback from torch or importlib does not say which word of the command was wrong."""
    monkeypatch.chdir(folder)
    target, *options = typed.split()
    out = ["--out", "out", "--attacks", "--examples", "20"]
    assert main(["evaluate", target, "--data", "digits", *out, *options]) == 2
    assert REFUSED[typed] in capsys.readouterr().err
    assert not Path("out").exists()


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_the_command_evaluates_and_measures_code_and_programs(folder, monkeypatch, capsys):
    """The index of a program is that of its code; what its layers do not say is refused, not guessed."""
    monkeypatch.chdir(folder)
    index, small = [], ["--data", "digits", "--examples", "30", "--clean"]
    for target, *options in (["own_nets:blank", "--checkpoint", "own.pt"], ["traced.pt"], ["exported.pt2"]):
        out = Path(f"m-{len(index)}")
        both = ["--measures", "wci", "gradient_norm", "--out", str(out)]
        assert main(["measure", target, *options, *small, *both]) == 0
        (written,) = out.glob("*/*.json")
        index.append([one["value"] for one in json.loads(written.read_text())["measures"].values()])
    assert index[1:] == [pytest.approx(index[0], rel=1e-5)] * 2  # float32, sums in another order
    assert main(["measure", "traced.pt", *small, "--measures", "spectral_norms"]) == 2
    assert "spectral_norms: got a compiled program; expected Python code" in capsys.readouterr().err
    few = ["--data", "digits", "--examples", "20", "--attacks", "pgd-2", "--out", "e"]
    assert main(["evaluate", "own_nets:blank", "--checkpoint", "own.pt", *few]) == 0
    (written,) = Path("e").glob("own_nets-blank-own-test-pgd-2*.json")
    assert json.loads(written.read_text())["clean"]["accuracy"] > 0.7


def hub_folder(path: Path, num_classes: int = 10) -> Path:
    """A model as timm publishes it: config.json and weights."""
    torch.manual_seed(0)
    kwargs = {"layers": [1, 1, 1, 1], "channels": [4, 4, 4, 4]}
    model = create_model("resnet18", num_classes=num_classes, in_chans=1, **kwargs)
    path.mkdir()
    save_file(model.backbone.state_dict(), path / "model.safetensors")
    own = {"mean": [0.25], "std": [0.5], "num_classes": num_classes, "input_size": [1, 8, 8]}
    own |= {"first_conv": "conv1", "classifier": "fc"}
    text = {"architecture": "resnet18", "num_classes": num_classes, "model_args": kwargs | {"in_chans": 1}}
    (path / "config.json").write_text(json.dumps(text | {"pretrained_cfg": own}))
    return path


def test_hubs_and_folders_of_timm_are_targets(tmp_path, monkeypatch):
    """``hf-hub:`` and ``local-dir:`` bring weights, classes and normalisation; a random head is refused."""
    import timm.models._hub as hub

    path = hub_folder(tmp_path / "net")
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo_id, filename, **_: str(path / filename))
    models = [open_run(name, settings=DIGITS) for name in (f"local-dir:{path}", "hf-hub:somebody/net")]
    for target in models:
        monkeypatch.setattr("wcitrain.targets.check_scale", lambda *_, **__: "unmeasured")
        model: Classifier = target.load_model()
        saved = load_file(path / "model.safetensors")
        assert torch.equal(model.backbone.conv1.weight, saved["conv1.weight"])
        assert (model.mean.item(), model.std.item()) == (0.25, 0.5)
    other = open_run(f"local-dir:{hub_folder(tmp_path / 'other', 7)}", settings=DIGITS)
    with pytest.raises(ValueError, match="pretrained for 7 classes, and data of 10"):
        other.load_model()


def test_a_hub_that_does_not_answer_names_the_local_ways(monkeypatch):
    """On a cluster without network the hub's own text says to check the connection, three times over."""
    import timm.models._hub as hub

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(hub, "hf_hub_download", offline)
    for name in ("hf-hub:somebody/net", "resnet18"):
        with pytest.raises(ValueError, match=rf"'{name}'.*not known.*--checkpoint FILE.*local-dir:FOLDER"):
            open_run(name, settings=DIGITS).load_model()


def test_files_of_one_name_are_two_models_and_another_forward_is_measured_anew(tmp_path, capsys):
    """The second was the first, by Python's cache of modules; and its numbers those of an older file."""
    code = "import os, torch\nfrom torch import nn\nclass Net(nn.Sequential):\n    def forward(self, x):\n"
    code += "        return super().forward(x) * float(os.environ['SCALE'])\n"
    code += "def make():\n    torch.manual_seed({seed})\n    return Net(nn.Flatten(), nn.Linear(64, 10))\n"
    functions = []
    for seed in (0, 1):
        (tmp_path / str(seed)).mkdir()
        (tmp_path / str(seed) / "random.py").write_text(code.format(seed=seed))
        functions.append(f"{tmp_path / str(seed) / 'random.py'}:make")

    def losses(scale: str, *settings: str) -> list[float]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("SCALE", scale)
            asked = ["--measures", "clean_loss", "--examples", "40", "--out", str(tmp_path / "out")]
            more = ["--recipe", "data.source=digits", *settings]
            assert main(["measure", *functions, *asked, *more]) == 0
        capsys.readouterr()
        found = [json.loads(path.read_text()) for path in sorted((tmp_path / "out").rglob("measures-*.json"))]
        return [one["measures"]["clean_loss"]["value"] for one in found]

    first = losses("1")
    assert len(set(first)) == 2
    assert len(set(losses("3"))) == 4
    assert len(set(losses("3", "model.mean=[0.5]", "model.std=[0.5]"))) == 6


def test_another_precision_and_settings_in_place_of_data_are_named(tmp_path, capsys):
    """ "mat1 and mat2 must have the same dtype. Set data.image_size" sends its reader the wrong way."""
    code = "import torch\nfrom torch import nn\ndef low(): return nn.Sequential(nn.Flatten(), "
    (tmp_path / "net.py").write_text(code + "nn.Linear(64, 10)).bfloat16()\n")
    for data, expected in (
        (["digits"], "got parameters in torch.bfloat16; expected torch.float32, as images are"),
        (["digits", "data.max_train=300"], "--data: got data.max_train=300; expected the name of a data set"),
    ):
        assert main(["evaluate", f"{tmp_path}/net.py:low", "--data", *data, "--eps", "0.1"]) == 2
        assert expected in capsys.readouterr().err


def test_weights_behind_another_normalisation_are_another_model():
    """Means and deviations are in no state dict: a file of measures answered for both."""
    target = SimpleNamespace(kind="")
    one, other = (_digest_of(Classifier(nn.Flatten(), [mean], [1.0]), target) for mean in (0.0, 0.5))
    assert one != other
