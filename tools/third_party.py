"""Robust accuracy of models that others trained: by us, by AutoAttack alone, by other attack libraries.

    python tools/third_party.py WEIGHTS DATA [--models fashion ...] [--attacks pgd-40 autoattack]

WEIGHTS is a folder with the files that MODELS names, of public repositories on GitHub. DATA has mnist/ and
fashion/ (t10k-images-idx3-ubyte.gz, t10k-labels-idx1-ubyte.gz) and cifar10/ (torchvision's, or train/ and
test/<class>/<image>). What is not there is said and left out; other models in --out are kept. Attackers are
those installed of pyautoattack (wcitrain[eval]), autoattack (its authors'), torchattacks and foolbox:

    pip install --target libraries --no-deps torchattacks foolbox eagerpy GitPython gitdb smmap
    PYTHONPATH=libraries python tools/third_party.py weights data

All get the same images, batches, radius, steps and length of a step, and are judged here: robust is what the
model is right on, clean and attacked. Counts are of images that both, neither, only ours or only theirs finds
robust; ``moved`` are differences on which our own attack, with four more seeds, decides both ways. Attacks:
those of ``wcitrain evaluate``, and "pgd-40 from x" without a random start: nothing is left to chance.
"""

import gzip
import hashlib
import json
import re
import warnings
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from functools import partial
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import nn

from wcitrain.attacks import Attack, ThreatModel
from wcitrain.data import Data, load_splits
from wcitrain.digest import digest
from wcitrain.evaluation import evaluate
from wcitrain.evaluation.plans import COMPONENTS
from wcitrain.models import Classifier

STANDARD, LIBRARIES = "apgd-ce+apgd-t+fab-t+square", ("torch", "pyautoattack", "torchattacks", "foolbox")
WONG = "locuslab/convex_adversarial models/fashion_mnist.pth", "b90cca41cc42b427"
CROWN = "Verified-Intelligence/alpha-beta-CROWN complete_verifier/models/sdp/"
CNN_A = f"{CROWN}cifar_cnn_a_adv.model", "e45d79e68342395f"
MNIST = "locuslab/fast_adversarial MNIST/models/fgsm.pth", "07536ed24c714dac"
WONG_L2 = "locuslab/convex_adversarial models_scaled_l2/cifar_small_36px.pth", "d99894f1fe2866dd"
NONE, CIFAR = ((0,), (255,)), ((125.3, 123.0, 113.9), (63.0, 62.1, 66.7))
IMAGENET = (123.675, 116.28, 103.53), (57.375,)
# Repository and path, SHA-256 (16 digits), data, threat and kind of training, and the means and deviations,
# in levels of 255, that images are normalised with. All have one network, of Wong & Kolter 2018.
MODELS = {
    "fashion": (*WONG, "fashion", ThreatModel("linf", 0.1), "provable", *NONE),
    "cnn_a_adv": (*CNN_A, "cifar10", ThreatModel("linf", 2 / 255), "PGD", *CIFAR),
    "mnist": (*MNIST, "mnist", ThreatModel("linf", 0.3), "FGSM", *NONE),
    "wong_l2": (*WONG_L2, "cifar10", ThreatModel("l2", 36 / 255), "provable", *IMAGENET),
}


def read_images(folder, num):
    """Return ``num`` test images in [0, 1] and labels, evenly spread (CIFAR-10: balanced over classes)."""
    if folder.name == "cifar10":
        source = "cifar10" if (folder / "cifar-10-batches-py").is_dir() else "folder"
        test = load_splits(Data(source, root=str(folder), max_train=40, val_size=20, max_test=num)).test
        return next(iter(test.batches(num)))[:2]
    files = [folder / f"t10k-{name}-ubyte.gz" for name in ("images-idx3", "labels-idx1")]
    pixels, labels = (np.frombuffer(gzip.decompress(file.read_bytes()), np.uint8) for file in files)
    places = np.linspace(0, 9_999, num).astype(int)
    x = torch.tensor(pixels[16:].reshape(-1, 1, 28, 28)[places]).float() / 255
    return x, torch.tensor(labels[8:][places]).long()


def load(path, sha256, channels, size, scale):
    """Return the model with its authors' weights and normalisation; ValueError for another file."""
    if not (found := hashlib.sha256(path.read_bytes()).hexdigest()).startswith(sha256):
        raise ValueError(f"{path}: got SHA-256 {found}; expected {sha256}... Take it from its repository.")
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = weights.get("state_dict", weights)
    convolutions = nn.Conv2d(channels, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 4, 2, 1), nn.ReLU()
    head = nn.Flatten(), nn.Linear(2 * size * size, 100), nn.ReLU(), nn.Linear(100, 10)
    backbone = nn.Sequential(*convolutions, *head)
    backbone.load_state_dict(weights[0] if isinstance(weights, list) else weights)  # a cascade, here of one
    mean, std = ([v / 255 for v in values] * (channels // len(values)) for values in scale)
    return Classifier(backbone, mean, std).eval()


def attackers(name, model, threat, size, seed):
    """Return what attacks under ``name``, ours first: (x, y) of all images -> x_adv; flags from ours."""

    def ours(x, y):
        settings = {"attacks": name, "seed": seed, "batch_size": size, "preflight": "off"}
        return evaluate(model, [(x, y)], threat, **settings).attacks[0].is_robust

    if found := re.fullmatch(r"pgd-(\d+)( from x)?", name):
        attack = Attack(threat, int(found[1]), start="none")
        mine = {"ours": partial(attack, model) if found[2] else ours}
        return mine | other_pgd(model, threat, attack.num_steps, attack.step_size, not found[2])
    made, own = {"ours": ours}, {"norm": threat.norm.capitalize(), "eps": threat.eps, "seed": seed}
    parts = name.removeprefix("autoattack:").replace("autoattack", STANDARD).split("+")
    for package in filter(find_spec, ("pyautoattack", "autoattack") if {*parts} <= {*COMPONENTS} else ()):
        quiet = {} if package == "pyautoattack" else {"verbose": False}
        adversary = import_module(package).AutoAttack(model, **own, device="cpu", **quiet)
        adversary.attacks_to_run = parts
        made[package] = partial(adversary.run_standard_evaluation, **{"bs" if quiet else "batch_size": size})
    if find_spec("torchattacks") and threat.norm != "l1":
        library = import_module("torchattacks")
        kinds = {"apgd-ce": library.APGD, "apgd-t": library.APGDT}
        chosen = [kinds[part](model, **own, steps=100) for part in parts if part in kinds]
        theirs = {"torchattacks": library.AutoAttack(model, **own)} if name == "autoattack" else {}
        if chosen:
            theirs["torchattacks' APGD, 100 steps"] = library.MultiAttack(chosen) if chosen[1:] else chosen[0]
        for who, attack in theirs.items():  # batch by batch, as the others cut the images
            made[who] = lambda x, y, attack=attack: torch.cat(list(map(attack, x.split(size), y.split(size))))
    return made


def other_pgd(model, threat, steps, length, starts):
    """Return PGD of the libraries that are installed."""
    made = {}
    if find_spec("torchattacks") and threat.norm != "l1":
        kind = getattr(import_module("torchattacks"), {"linf": "PGD", "l2": "PGDL2"}[threat.norm])
        made["torchattacks"] = kind(model, eps=threat.eps, alpha=length, steps=steps, random_start=starts)
    if find_spec("foolbox"):
        foolbox = import_module("foolbox")
        kind = getattr(foolbox.attacks, f"{threat.norm.capitalize()}PGD")
        attack = kind(abs_stepsize=length, steps=steps, random_start=starts)
        bounded = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
        made["foolbox"] = lambda x, y: attack(bounded, x, y, epsilons=threat.eps)[1]
    return made


def survivors(run, model, x, y, threat, seed):
    """Return who survives, truth values [N]; ValueError for images outside ball or box."""
    torch.manual_seed(seed)
    found = run(x, y)
    found = found[0] if isinstance(found, tuple) else found
    if found.dtype == torch.bool:
        return found
    length = float((found - x).double().flatten(1).norm(float(threat.norm[1:]), dim=1).max())
    if length > 1.0001 * threat.eps + 1e-6 or found.min() < 0 or found.max() > 1:
        got = f"images {length:.6g} away in [{found.min():.4g}, {found.max():.4g}]"
        raise ValueError(f"attack: got {got}; expected {threat} in [0, 1]. Report it to its authors.")
    return (model(x).argmax(1) == y) & (model(found).argmax(1) == y)


def compared(model, x, y, threat, options):
    """Return the flags of every attacker on one model as texts, and the counts of images by pairs."""
    robust, pairs = {"clean": {"ours": survivors(lambda x, y: x, model, x, y, threat, 0)}}, []
    for name in options.attacks:
        runs, seed = partial(attackers, name, model, threat, options.batch), options.seed
        by = {who: survivors(run, model, x, y, threat, seed) for who, run in runs(seed).items()}
        robust[name], ours, moved = by, by["ours"], torch.zeros_like(by["ours"])
        differ = torch.stack([theirs ^ ours for theirs in by.values()]).any(0)
        for other in range(seed + 1, seed + 5) if differ.any() else ():
            again = survivors(runs(other)["ours"], model, x[differ], y[differ], threat, other)
            moved[differ] |= again ^ ours[differ]
        for who, theirs in list(by.items())[1:]:
            counts = {"both": ours & theirs, "neither": ~(ours | theirs), "only_ours": ours & ~theirs}
            counts |= {"only_theirs": theirs & ~ours, "moved": (ours ^ theirs) & moved}
            pairs.append({"attack": name, "other": who} | {key: int(v.sum()) for key, v in counts.items()})
            print(f"  {pairs[-1]}", flush=True)
    for by in robust.values():
        by.update({who: "".join(str(int(flag)) for flag in flags) for who, flags in by.items()})
    return {"digest": digest([x, y]), "pairs": pairs, "robust": robust}


def main():
    """Attack the models that are there and write the result."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument("weights", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--attacks", nargs="+", default=["pgd-40", "pgd-40 from x", "autoattack"])
    for name, default in {"images": 300, "batch": 150, "seed": 0}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--out", type=Path, default=Path("recipes/results/third_party.json"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    settings = {key: getattr(options, key) for key in ("images", "batch", "seed", "attacks")}
    settings["versions"] = {name: version(name) for name in LIBRARIES if find_spec(name)}
    for name in options.models:
        place, sha256, data, threat, title, *scale = MODELS[name]
        path, folder = options.weights / Path(place).name, options.data / data
        print(f"{name}: {place}, {threat}", flush=True)
        if missing := [str(one) for one in (path, folder) if not one.exists()]:
            print(f"  left out: there is no {' or '.join(missing)}")
            continue
        x, y = read_images(folder, options.images)
        about = {"place": place, "title": title, "data": data, "threat": str(threat)}
        about |= compared(load(path, sha256, *x.shape[1:3], scale), x, y, threat, options)
        record = json.loads(options.out.read_text("utf-8")) if options.out.is_file() else {}
        record[name] = settings | about
        options.out.write_text(json.dumps(record, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
