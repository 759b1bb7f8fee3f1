"""Weights in a file: read without executing anything, fitted to a model whatever was around it when saved.

Names in files carry what held the model: ``module.`` (data-parallel, averaged), ``_orig_mod.`` (compiled),
``model.`` (Lightning), ``1.`` (behind a normalisation layer), in any order and depth, below keys such as
``state_dict`` or ``ema``. None of them is listed here: the prefix is the one under which most of the model's
own names lie. What was taken off and left out is printed; what does not match is an error, by name.
"""

import argparse
import importlib.util
import pickle
import re
import socket
import threading
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

import safetensors.torch
import torch
from torch import Tensor, nn

from wcitrain.text import name_some

SUFFIXES = (".pt", ".pth", ".safetensors", ".ckpt", ".bin", ".tar")
INSIDE = {"module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # at any depth
PACKAGE, HUB = "package:", "hf-hub:"
HUB_SECONDS = 3  # for an answer
OF_TIMM = ("model.safetensors", "pytorch_model.bin")  # weights in a folder of timm's or of an export
LOCAL = "Without a hub, set model.checkpoint_path (--checkpoint FILE) to a file, a run or package:NAME/FILE "
LOCAL += "(an installed package that ships weights), or model.name to local-dir:FOLDER of timm's"
CONSTANTS = {"mean": "mean", "mu": "mean", "std": "std", "sigma": "std"}  # of a normalisation, by last part
ADVICE = "Correct the recipe's model section (name, stem, kwargs) or its data (number of classes), or "
ADVICE += "give the model's own code as module:function with --checkpoint"
MOST_CHANNELS = 4  # a longer mean is no normalisation of images
RULE = "a state dict, bare or below keys such as 'model', 'state_dict' or 'ema'"


def split_part(text: str | Path) -> tuple[Path, str]:
    """Return the file and the part in "FILE:PART"; no part for the path of a file that is there.

    ``"package:NAME/FILE"`` is a file inside an installed package; ValueError where it is not there.
    """
    if str(text).startswith(PACKAGE):
        return _in_package(str(text).removeprefix(PACKAGE)), ""
    head, _, part = str(text).rpartition(":")
    return (Path(head), part) if head and not Path(text).exists() else (Path(text), "")


def weights_of(text: str | Path) -> tuple[Path, str]:
    """Return the file and the part as `split_part`; of a folder the weights that it holds.

    That is an export of ours, a folder of timm's, or a run, whose last export counts: the best one is that of
    ``RUN/checkpoints/best`` or ``RUN/model/best``. ``"hf-hub:OWNER/NAME"`` is fetched, or is in the cache.
    """
    folder, part = (on_hub(str(text)), "") if str(text).startswith(HUB) else split_part(text)
    if not folder.is_dir():
        return folder, part
    export = folder / "model" / "last"
    if folder.parent.name == "checkpoints":
        export = folder.parent.parent / "model" / folder.name
    places = [place / name for place in (folder, export) for name in OF_TIMM]
    return next((path for path in places if path.is_file()), places[0]), part


def on_hub(name: str, files: Sequence[str] = OF_TIMM) -> Path:
    """Return the folder of ``"hf-hub:OWNER/NAME@REVISION"`` with its configuration and one of the files.

    ValueError where they are neither on the hub nor in its cache.
    """
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.removeprefix(HUB).partition("@")
    with hub_or_cache():
        for file in files:
            try:
                hf_hub_download(repository, file, revision=revision or None)
                return Path(hf_hub_download(repository, "config.json", revision=revision or None)).parent
            except (OSError, ValueError) as error:
                cause = str(error).strip().splitlines()[0].rstrip(". ")
    rule = f"{' or '.join(files)} and config.json there or in the cache. {LOCAL}."
    raise ValueError(f"{name}: got {cause}; expected {rule}")


@contextmanager
def hub_or_cache() -> Iterator[None]:
    """Leave only the cache where the hub, or the proxy before it, does not answer: retries take a minute."""
    from huggingface_hub import constants

    url, kept, answers = urlsplit(constants.ENDPOINT), constants.HF_HUB_OFFLINE, list[bool]()
    if (proxy := getproxies().get(url.scheme)) and not proxy_bypass(url.hostname or ""):
        url = urlsplit(proxy)
    place = (url.hostname or "", url.port or {"http": 80}.get(url.scheme, 443))

    def ask() -> None:
        with suppress(OSError):
            socket.create_connection(place, timeout=HUB_SECONDS).close()
            answers.append(True)

    asking = threading.Thread(target=ask, daemon=True)  # no timeout of a socket holds for its name's address
    asking.start()
    asking.join(HUB_SECONDS)
    try:
        constants.HF_HUB_OFFLINE = kept or not answers
        yield
    finally:
        constants.HF_HUB_OFFLINE = kept


def _in_package(place: str) -> Path:
    """Return the path of ``NAME/FILE``; ValueError for a package or a file that is not there."""
    name, _, file = place.partition("/")
    spec = importlib.util.find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        rule = f"one that is installed. Try `pip install {name.replace('_', '-')}`."
        raise ValueError(f"{PACKAGE}{place}: got no package {name!r}; expected {rule}")
    home = Path(next(iter(spec.submodule_search_locations)))
    if not file or not (home / file).is_file():
        found = sorted(path for path in home.rglob("*") if path.suffix in SUFFIXES)
        there = name_some([path.relative_to(home).as_posix() for path in found])
        rule = f"one of {there}. Correct it." if found else "weights there, and there are none."
        raise ValueError(f"{PACKAGE}{place}: got no file {file!r} in {name}; expected {rule}")
    return home / file


def is_weights(file: Path) -> bool:
    """Whether a file has a suffix of weights, or is a pickle, bare or in torch's archive, by another name."""
    if file.suffix in SUFFIXES:
        return True
    if not zipfile.is_zipfile(file):
        with file.open("rb") as stream:
            return stream.read(2) == b"\x80\x02"  # protocol 2, that of torch.save
    with zipfile.ZipFile(file) as archive:
        return any(name.endswith("/data.pkl") for name in archive.namelist())


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Return all tensors in a file by their place, ``"state_dict/model.conv1.weight"``; see `load_into`.

    ``"FILE:PART"`` means those below the key PART, such as ``ema``. Nothing in the file is executed
    (``weights_only=True``). ValueError for files of something else.
    """
    file, part = weights_of(path)
    try:
        if file.suffix == ".safetensors":
            content: Any = safetensors.torch.load_file(file)
        else:
            with torch.serialization.safe_globals([argparse.Namespace]):  # plain settings, as timm saves them
                content = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise ValueError(f"{file}: got no file; expected weights. Check the path.") from error
    except (pickle.UnpicklingError, safetensors.SafetensorError, RuntimeError, EOFError, ValueError) as error:
        classes = re.findall(r"GLOBAL ([\w.]+)", str(error))
        cause = f"it holds {classes[0]}" if classes else str(error).splitlines()[0]
        got = f"got weights that cannot be read as weights alone ({cause})"
        raise ValueError(f"{file}: {got}; expected {RULE}. Save model.state_dict().") from error
    weights = dict(_tensors(content)) if isinstance(content, Mapping | list | tuple) else {}
    if not weights:
        got = f"keys {[*content][:5]}" if isinstance(content, Mapping) else f"a {type(content).__name__}"
        raise ValueError(f"{file}: got {got}; expected {RULE}. Save one with torch.save(model.state_dict()).")
    chosen = {name: t for name, t in weights.items() if name.startswith((f"{part}/", f"{part}."))}
    if part and not chosen:
        there = name_some(dict.fromkeys(re.split("[./]", name)[0] for name in weights))
        raise ValueError(f"{file}: got no part {part!r}; expected one of {there}. Correct it.")
    return chosen if part else weights


def _tensors(content: Any, place: str = "") -> Iterator[tuple[str, Tensor]]:
    items = enumerate(content) if isinstance(content, list | tuple) else content.items()
    for key, value in items:
        if isinstance(value, Tensor):
            yield f"{place}{key}", value
        elif isinstance(value, Mapping | list | tuple):
            yield from _tensors(value, f"{place}{key}/")


def in_order(model: nn.Module, weights: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Return weights of the same network under other names, by the model's, in the order of the file.

    ValueError where the number of tensors differs, or the last part of a name (``weight``, ``running_var``),
    and for files of safetensors, which sort their tensors.
    """
    if weights_of(source)[0].suffix == ".safetensors":
        rule = "a file of torch.save: safetensors sorts. Leave out model.match"
        raise ValueError(f"model.match: got order with {source}; expected {rule}.")
    has_counts = any(name.endswith("num_batches_tracked") for name in weights)
    own = [name for name in model.state_dict() if has_counts or not name.endswith("num_batches_tracked")]
    pairs = list(zip(own, weights, strict=False))
    odd = next((pair for pair in pairs if len({name.rpartition(".")[2] for name in pair}) > 1), None)
    if len(own) != len(weights) or odd:
        got = f"{len(weights)} tensors, and a model of {len(own)}"
        got = f"{odd[1]} at the place of {odd[0]}" if odd else got
        rule = "the same in the same order. Correct model.name, or leave out model.match"
        raise ValueError(f"{source}: got {got}; expected {rule}.")
    return dict(zip(own, weights.values(), strict=True))


def load_into(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    constants: Mapping[str, Tensor],
    fit: Callable[[dict[str, Tensor]], tuple[dict[str, Tensor], list[str]]] | None = None,
) -> None:
    """Load weights into a model and print what was taken off their names and what was left out.

    ``constants`` are the ``mean`` and ``std`` that the model normalises images with, beside its weights:
    those in the file must be the same. What is in the file but not below the model's prefix (the model's
    holder, a loss, an optimizer) is left out. ``fit`` may change what is below the prefix before it is
    compared with the model, and says how.

    Raises:
        ValueError: Two sets of weights in one file; tensors that are missing, too many or of another shape,
            listed by name; another normalisation. The model is as it was.
    """
    own = model.state_dict()
    found = by_prefix(weights, own)
    if not found:
        got = f"got names such as {name_some(weights)}, and a model with {name_some(own)}"
        hint = "Where it is the same network, set model.match: order. " if len(weights) == len(own) else ""
        raise ValueError(f"{source}: {got}; expected the same. {hint}{ADVICE}.")
    most = max(map(len, found.values()))
    best, *others = (prefix for prefix, names in found.items() if len(names) == most)
    used = found[best]
    for other in others:
        same = found[other]
        is_same = used.keys() == same.keys()
        if not (is_same and all(torch.equal(weights[a], weights[same[k]]) for k, a in used.items())):
            which = " or ".join(f"{source}:{re.split('[./]', prefix)[0]}" for prefix in (best, other))
            rule = f"one. Name it: {which}" if best and other else "one. Save the one that is meant"
            raise ValueError(f"{source}: got two sets of weights, {best!r} and {other!r}; expected {rule}.")
    home, taken = best.rpartition("/")[0], set(used.values())
    beside = [name for name in weights if name.rpartition("/")[0] == home and name not in taken]
    notes = [f"without the prefix {best}"] if best not in ("", "backbone.") else []  # the latter is ours
    smaller = [prefix for prefix, names in found.items() if most > len(names) > most / 2]
    notes += [f"not {prefix}, which is there too" for prefix in smaller]
    unknown = []
    for name in beside:
        constant = CONSTANTS.get(re.split("[./]", name)[-1], "")
        value = constants.get(constant)
        if value is not None and weights[name].numel() <= MOST_CHANNELS:
            _refuse_other(constant, weights[name], value, source)
        elif name.startswith(best) and name != "n_averaged":
            unknown.append(name)
        else:
            notes.append(f"without {name}")
    given = {key: weights[name] for key, name in used.items()}
    if fit:
        given, said = fit(given | {name.removeprefix(best): weights[name] for name in unknown})
        unknown, notes = [name for name in given if name not in own], notes + said
    _refuse_unfit(own, {key: given[key] for key in given if key in own}, unknown, source)
    model.load_state_dict(given)
    if notes:
        print(f"{source}: read {name_some(notes, 6)}", flush=True)


def by_prefix(names: Iterable[str], own: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Return, by what stands before them, the model's names and theirs in the file."""
    found: dict[str, dict[str, str]] = {}
    wrappers = INSIDE - {part for name in own for part in name.split(".")}
    for name in names:
        for start in [0, *(match.end() for match in re.finditer("[./]", name))]:
            parts = name[start:].split(".")
            key = ".".join(part for part in parts if part not in wrappers)
            if key in own and parts[0] not in wrappers:
                found.setdefault(name[:start], {}).setdefault(key, name)
    return found


def _refuse_other(constant: str, value: Tensor, own: Tensor, source: str) -> None:
    """Weights behind another normalisation are another network."""
    own, value = own.flatten(), value.flatten().to(own)
    if len(value) not in (1, len(own)) or not torch.allclose(value, own, rtol=1e-4, atol=0):
        text = f"got weights for images normalised with {constant} {value.tolist()}"
        rule = f"{own.tolist()}, as the recipe's model has. Set model.{constant} in the recipe."
        raise ValueError(f"{source}: {text}; expected {rule}")


def _refuse_unfit(
    own: Mapping[str, Tensor], given: Mapping[str, Tensor], unknown: Sequence[str], source: str
) -> None:
    """List what is missing, too many, or of another shape."""
    lacking = [key for key in own if key not in given and not key.endswith("num_batches_tracked")]
    others = [(key, value.shape, own[key].shape) for key, value in given.items()]
    shapes = [f"{key} {list(theirs)} for {list(ours)}" for key, theirs, ours in others if theirs != ours]
    kinds = {"nothing for": lacking, "of no layer": unknown, "of another shape": shapes}
    if wrong := [f"{kind} {name_some(names, 4)}" for kind, names in kinds.items() if names]:
        got = f"got weights that do not fit the model: {'; '.join(wrong)}"
        convs = [(a, b) for _, a, b in others if len(a) == len(b) == 4 and a != b]
        channels = {a[1] for a, b in convs if (a[0], *a[2:]) == (b[0], *b[2:])}
        advice = f"Set data.channels={min(channels)}" if channels and channels <= {1, 3} else ADVICE
        raise ValueError(f"{source}: {got}; expected those of its {len(own)} tensors. {advice}.")
