"""Weight files: whatever was around the model when saved comes off, and what does not match is named."""

from collections import OrderedDict

import pytest
import torch
from torch import nn

from wcitrain.models import Classifier, load_weights
from wcitrain.weights import load_into, read_weights


def net(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Flatten(), nn.LazyLinear(3)).eval()


def made(seed: int) -> nn.Sequential:
    model = net(seed)
    model(torch.zeros(1, 1, 4, 4))
    return model


STATE = made(1).state_dict()


def below(prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in STATE.items()}


CONSTANTS = {"mean": torch.tensor([0.5]), "std": torch.tensor([0.25])}
FILES = {  # what is saved, and what is said of it
    "bare": (STATE, ""),
    "ordered": (OrderedDict(STATE), ""),
    "data_parallel": ({"state_dict": below("module.")}, "without the prefix state_dict/module."),
    "compiled_in_ddp": (below("module._orig_mod."), "without the prefix module._orig_mod."),
    "ddp_in_compiled": (below("_orig_mod.module."), "without the prefix _orig_mod.module."),
    "lightning": (
        {"epoch": 3, "state_dict": below("model.") | {"loss.weight": torch.ones(3)}, "callbacks": {}},
        "without the prefix state_dict/model., without state_dict/loss.weight",
    ),
    "lightning_of_compiled": ({"state_dict": below("model._orig_mod.net.")}, "model._orig_mod.net."),
    "normalisation_layer": (below("1.") | {"0.mean": CONSTANTS["mean"]}, "without the prefix 1."),
    "averaged": (
        {"n_averaged": torch.tensor(4)} | below("module."),
        "without the prefix module., without n_averaged",
    ),
    "optimizer_beside": (
        {"net": STATE, "acc": 93.1, "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}},
        "without the prefix net/",
    ),
    "deep": ({"ema": {"model": below("module.")}}, "without the prefix ema/model/module."),
    "wrapped_inside": (
        {("0._orig_mod" + name[1:] if name[0] == "0" else name): value for name, value in STATE.items()},
        "",
    ),
    "in_a_list": ({"state_dict": [OrderedDict(below("module."))], "lr": [0.1]}, "state_dict/0/module."),
    "same_twice": ({"state_dict": STATE, "ema": STATE}, "without the prefix state_dict/"),
    "robust_bench": (below("model.") | {"mu": CONSTANTS["mean"], "sigma": CONSTANTS["std"]}, "model."),
}


@pytest.mark.parametrize("name", FILES)
def test_every_wrapper_comes_off_and_is_said(name, tmp_path, capsys):
    """Each library saves its own prefixes; taken for other weights, users rename keys by hand."""
    content, told = FILES[name]
    torch.save(content, tmp_path / "w.pt")
    model = Classifier(made(0), [0.5], [0.25])
    load_weights(model, read_weights(tmp_path / "w.pt"), "w.pt")
    loaded = model.backbone.state_dict()
    assert all(torch.equal(loaded[key], value) for key, value in STATE.items())
    printed = capsys.readouterr().out
    assert told in printed if told else not printed


def without(*names: str) -> dict[str, torch.Tensor]:
    return {name: value for name, value in STATE.items() if name not in names}


WRONG = {
    "missing": (without("0.weight", "3.bias"), r"do not fit the model: nothing for 0\.weight, 3\.bias; exp"),
    "more": (STATE | {"4.weight": torch.ones(2)}, r"of no layer 4\.weight; expected"),
    "channels": (STATE | {"0.weight": torch.ones(2, 3, 3, 3)}, r"Set data\.channels=3\.$"),
    "shape": (STATE | {"3.weight": torch.ones(10, 8)}, r"of another shape 3\.weight \[10, 8\] for \[3, 8\]"),
    "other_model": ({"fc.w": torch.ones(2)}, r"got names such as fc\.w, and a model with 0\.weight, 0\.bias"),
    "two": (
        {"state_dict": STATE, "ema": {name: 2 * value for name, value in STATE.items()}},
        r"two sets of weights, 'state_dict/' and 'ema/'; expected one\. Name it: \S+:state_dict or \S+:ema",
    ),
    "other_normalisation": (below("1.") | {"0.std": torch.tensor([0.3])}, "images normalised with std"),
    "halves": (
        {"a.0.weight": torch.ones(2), "b.0.bias": torch.ones(2)},
        r"two sets of weights, 'a\.' and 'b\.'",
    ),
    "no_tensors": ({"state_dict": {}, "epoch": 3}, r"got keys \['state_dict', 'epoch'\]; expected a state"),
    "a_list": ([1, 2], "got a list; expected a state dict"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_match_is_listed_by_name(name, tmp_path):
    """'Correct the recipe' leaves the user with two lists of keys; a model half loaded is worse."""
    content, message = WRONG[name]
    torch.save(content, tmp_path / "w.pt")
    model = Classifier(made(0), [0.5], [0.25])
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        load_weights(model, read_weights(tmp_path / "w.pt"), str(tmp_path / "w.pt"))
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_one_of_two_sets_is_named_after_a_colon(tmp_path):
    """Averaged and last weights lie in one file, and differ by points of accuracy."""
    torch.save({"state_dict": made(2).state_dict(), "ema": STATE}, tmp_path / "w.pt")
    model = made(0)
    load_into(model, read_weights(f"{tmp_path}/w.pt:ema"), "w.pt", {})
    assert torch.equal(model[3].weight, STATE["3.weight"])
    with pytest.raises(ValueError, match=r"got no part 'emu'; expected one of state_dict, ema\."):
        read_weights(f"{tmp_path}/w.pt:emu")


def test_a_file_that_would_run_code_is_refused_and_says_what_it_holds(tmp_path):
    """A pickled model runs what its author likes; torch's message is ten lines about something else."""
    torch.save(made(0), tmp_path / "whole.pt")
    with pytest.raises(
        ValueError, match=r"it holds torch\.nn\.modules\.container\.Sequential.*Save model\.st"
    ):
        read_weights(tmp_path / "whole.pt")
    with pytest.raises(ValueError, match=r"got no file; expected weights"):
        read_weights(tmp_path / "none.pt")
