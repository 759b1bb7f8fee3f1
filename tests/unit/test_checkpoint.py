"""Checkpoints: what comes back, what is refused, and what a crash, a full disk or a damaged file can cost."""

import errno
import json
import math
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors
import torch

from wcitrain import checkpoint, files
from wcitrain.checkpoint import CheckpointError, load_checkpoint, save_checkpoint, save_exported_model


def spelt(value) -> str:
    """Return a text that tells apart all types, orders, dtypes, shapes and bits."""
    if isinstance(value, torch.Tensor):
        bits = value.detach().contiguous().reshape(-1).view(torch.uint8)
        return f"{value.dtype} {tuple(value.shape)} {bytes(bits.tolist()).hex()}"
    if isinstance(value, dict):
        return repr({key: spelt(one) for key, one in value.items()})
    return f"{type(value)} {[*map(spelt, value)]}" if isinstance(value, list | tuple) else repr(value)


def assert_same(actual, expected) -> None:
    assert spelt(actual) == spelt(expected)


def save_epochs(folder: Path, *epochs: int) -> None:
    for epoch in epochs:
        save_checkpoint(folder, {"epoch": epoch, "weights": torch.arange(100) + epoch})


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def test_plain_values_come_back_with_their_types(tmp_path):
    """A tuple read as a list, a number as text: load_state_dict fails, or silently does nothing."""
    state = {
        "nothing": None,
        "yes": True,
        "one": 1,
        "large": 2**200,
        "floats": [0.1, -0.0, 1e-320, 1.7976931348623157e308, math.inf, -math.inf, math.nan],
        "text": "ß\n\ud800",
        "tuple": (1, (), [(2.0,)]),
        "int keys": {0: "a", -1: {"0": "b", 0: "c"}},
        "empty": {"": {}, "list": []},
        "tags": [{"$tuple": [1]}, {"$x": 1}, {"$float": "nan"}, {"$tensor": "a", "b": 1}, {"$dict": {}}],
    }
    save_checkpoint(tmp_path, state)
    loaded, path = load_checkpoint(tmp_path)
    assert_same(loaded, state)
    assert path == tmp_path / "last"


FLOATS = ("float64", "float32", "float16", "bfloat16", "float8_e4m3fn", "float8_e5m2")
DTYPES = [getattr(torch, name) for name in (*FLOATS, "int64", "uint8", "bool")]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back_bit_for_bit(dtype, tmp_path):
    """bfloat16 through numpy, or NaN payloads through a conversion, would change the resumed run."""
    width = torch.empty(0, dtype=dtype).element_size()
    patterns = torch.arange(256, dtype=torch.uint8).repeat_interleave(width)
    every = (patterns % 2).view(torch.bool) if dtype is torch.bool else patterns.view(dtype)
    state = {"every": every, "scalar": every[3].clone(), "empty": torch.empty(3, 0, 2, dtype=dtype)}
    save_checkpoint(tmp_path, state)
    assert_same(load_checkpoint(tmp_path)[0], state)


def test_views_and_shared_tensors_come_back_as_independent_copies(tmp_path):
    """safetensors refuses shared memory and would write a transposed tensor in the wrong order."""
    base = torch.arange(12.0).reshape(3, 4)
    state = {"base": base, "t": base.t(), "row": base[1], "expanded": torch.ones(1).expand(4)}
    save_checkpoint(tmp_path, state | {"parameter": torch.nn.Parameter(base.clone())})
    loaded, _ = load_checkpoint(tmp_path)
    assert_same(loaded, state | {"parameter": base})
    loaded["base"].zero_()
    loaded["expanded"][0] = 5
    assert torch.equal(loaded["row"], base[1])
    assert loaded["expanded"].tolist() == [5, 1, 1, 1]


def test_places_with_the_same_letters_do_not_collide(tmp_path):
    """Two tensors under one name in the file: one of them would be lost."""
    a, b, c, d, e, f, g, h, i, j, k = torch.arange(11)
    state = {"a": {"b": a, "[0]": b}, "a.b": c, "a[0]": d, "__metadata__": e, "": f, "c": [g]}
    state |= {"d": {0: h, "0": i}, "['a']": j, "e": {"__metadata__": k}}
    save_checkpoint(tmp_path, state)
    assert_same(load_checkpoint(tmp_path)[0], state)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (
            {"optimizer": {"groups": [{"foo": {1, 2}}]}},
            r"^optimizer\.groups\[0\]\.foo: got <class 'set'>; exp",
        ),
        ({"lr": np.float64(0.1)}, r"^lr: got <class 'numpy\.float64'>; expected .* Convert it"),
        ({"a": ({1.5: 0},)}, r"^a\[0\]: got the key 1\.5; expected"),
        ({"a": {True: 0}}, r"^a: got the key True"),
        ({"size": torch.Size([2])}, r"^size: got <class 'torch\.Size'>"),
        ({"w": torch.zeros(2, dtype=torch.complex128)}, r"^w: got a torch\.complex128 tensor"),
        ({"w": torch.zeros(2, device="meta")}, r"^w: got a torch\.float32 tensor .* on meta"),
        ({"w": torch.eye(2).to_sparse()}, r"^w: got a torch\.float32 tensor \(torch\.sparse_coo"),
    ],
)
def test_what_cannot_come_back_is_refused_before_a_byte_is_written(state, message, tmp_path):
    """A value turned into text or a list would be found only at resume, when the run is gone."""
    folder = tmp_path / "checkpoints"
    with pytest.raises(TypeError, match=message):
        save_checkpoint(folder, {"epoch": 1, **state})
    assert not folder.exists()


def test_the_last_two_checkpoints_are_kept_and_best_stands_apart(tmp_path):
    """One copy only would be no copy on the day it is damaged; more would fill the disk."""
    save_checkpoint(tmp_path, {"epoch": 1}, name="best")
    save_epochs(tmp_path, 1, 2, 3)
    save_checkpoint(tmp_path, {"epoch": 3}, name="best")
    assert names(tmp_path) == {"last", "previous", "best"}
    assert load_checkpoint(tmp_path)[0]["epoch"] == 3
    assert load_checkpoint(tmp_path, name="best") == ({"epoch": 3}, tmp_path / "best")
    shutil.rmtree(tmp_path / "last")
    with pytest.warns(UserWarning, match="got last: .*No such file"):
        assert load_checkpoint(tmp_path)[0]["epoch"] == 2


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) * 3 // 4] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("filename", ["state.json", "tensors.safetensors"])
@pytest.mark.parametrize("damage", [truncate, flip_a_byte, Path.unlink])
def test_a_damaged_checkpoint_falls_back_to_the_previous_with_a_warning(filename, damage, tmp_path):
    """Damaged weights would be trained on, or a run of days lost to one bad block."""
    save_epochs(tmp_path, 1, 2)
    damage(tmp_path / "last" / filename)
    reason = "last: .*No such file" if damage is Path.unlink else f"last/{filename}: damaged"
    with pytest.warns(UserWarning, match=rf"got {reason}.*previous \(epoch 1\)"):
        state, path = load_checkpoint(tmp_path)
    assert_same(state, {"epoch": 1, "weights": torch.arange(100) + 1})
    assert path == tmp_path / "previous"


def test_no_flipped_byte_of_the_state_changes_what_is_loaded(tmp_path):
    """A digest that leaves out a part of the file would let damage through there."""
    save_epochs(tmp_path, 1)
    path = tmp_path / "last" / "state.json"
    content = path.read_bytes()
    for index in range(len(content)):
        path.write_bytes(content[:index] + bytes([content[index] ^ 1]) + content[index + 1 :])
        with pytest.raises(CheckpointError, match=r"last/state.json: damaged"):
            load_checkpoint(tmp_path)
    for content in (b'{"x": 9.7e+308}', b"3"):  # an infinity, which has no digest; no object
        path.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"last/state.json: damaged"):
            load_checkpoint(tmp_path)


def test_when_none_is_intact_the_error_gives_both_reasons(tmp_path):
    """Starting from scratch silently would overwrite what could still be repaired."""
    with pytest.raises(CheckpointError, match=r"got last: .*, and previous: .*; expected one intact"):
        load_checkpoint(tmp_path)
    save_epochs(tmp_path, 1, 2)
    truncate(tmp_path / "last" / "state.json")
    flip_a_byte(tmp_path / "previous" / "tensors.safetensors")
    previous = "previous/tensors.safetensors: damaged: digest differs"
    with pytest.raises(CheckpointError, match=f"last/state.json: damaged: .*, and {previous}"):
        load_checkpoint(tmp_path)


def test_a_later_format_is_named(tmp_path, monkeypatch):
    """An old program would misread a new file without noticing."""
    monkeypatch.setattr(checkpoint, "FORMAT", 2)
    save_epochs(tmp_path, 1)
    monkeypatch.setattr(checkpoint, "FORMAT", 1)
    with pytest.raises(CheckpointError, match="written in format 2, this version reads 1"):
        load_checkpoint(tmp_path)


def test_a_damaged_last_never_replaces_an_intact_previous(tmp_path):
    """After a fallback the next save would push the damaged one over the only intact one."""
    save_epochs(tmp_path, 1, 2)
    truncate(tmp_path / "last" / "tensors.safetensors")
    save_epochs(tmp_path, 3)
    shutil.rmtree(tmp_path / "last")
    with pytest.warns(UserWarning, match="epoch 1"):
        assert load_checkpoint(tmp_path)[0]["epoch"] == 1


def test_a_full_disk_leaves_the_earlier_checkpoints_and_no_rubbish(tmp_path, monkeypatch):
    """A full disk would otherwise end the run with half a checkpoint and the last good one gone."""
    save_epochs(tmp_path, 1, 2)
    write = files.write

    def write_until_full(path, content):
        write(path, content[: len(content) // 2] if path.name == "state.json" else content)
        if path.name == "state.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write", write_until_full)
    with pytest.raises(CheckpointError, match=r"last: got .*No space left.*Free some space"):
        save_epochs(tmp_path, 3)
    assert names(tmp_path) == {"last", "previous"}
    assert load_checkpoint(tmp_path)[0]["epoch"] == 2


KILLED = """
import os, shutil, sys
from pathlib import Path
import torch
from wcitrain import checkpoint, files
root, saves = Path(sys.argv[1]), {"epoch": 3, "weights": torch.zeros(100)}
def dies_at(count):
    # Die just before the count-th change to the disk; rmtree and mkdir are changes too.
    left = [count]
    def wrap(function):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                os._exit(0)
            return function(*args, **kwargs)
        return wrapped
    files.write, os.rename, os.fsync, shutil.rmtree = map(
        wrap, (files.write, os.rename, os.fsync, shutil.rmtree))
for count in range(1, 100):
    for name in ("last", "best"):
        folder = root / f"{name}{count}"
        shutil.copytree(root / "start", folder)
        if os.fork() == 0:
            dies_at(count)
            checkpoint.save_checkpoint(folder, saves, name)
            (folder / "survived").touch()
            os._exit(0)
        os.wait()
    if all((root / f"{name}{count}" / "survived").exists() for name in ("last", "best")):
        break
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:load_checkpoint")
def test_a_process_killed_at_any_step_leaves_a_checkpoint_and_the_next_save_cleans_up(tmp_path):
    """Clusters kill jobs at any instant; the one between two steps of a save must not be the fatal one."""
    save_epochs(tmp_path / "start", 1, 2)
    save_checkpoint(tmp_path / "start", {"epoch": 2}, name="best")
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True)
    epochs = {"last": [], "best": []}
    for name, seen in epochs.items():
        for count in range(1, len(list(tmp_path.glob(f"{name}*"))) + 1):
            folder = tmp_path / f"{name}{count}"
            seen.append(load_checkpoint(folder, name)[0]["epoch"])
            save_checkpoint(folder, {"epoch": 4}, name)
            assert load_checkpoint(folder, name)[0]["epoch"] == 4
            assert names(folder) - {"survived"} == {"last", "previous", "best"}
        assert seen == sorted(seen)  # from some step on it is the new one
        assert set(seen) == {2, 3}
        assert len(seen) > 8  # two writes with a sync each, three folder syncs, two renames and a removal


def test_nothing_is_pickled():
    """Loading a pickle runs whatever code is in it; a checkpoint is a file people pass on."""
    source = Path(checkpoint.__file__).read_text().replace("nothing pickled", "")
    assert re.findall(r"pickle|(?<!safetensors\.)\btorch\.(?:load|save)\b|\beval\(|\bexec\(", source) == []


def test_an_exported_model_says_what_it_is_and_a_failed_export_leaves_it(tmp_path, monkeypatch):
    """The export is what others use; one more onto a full disk would destroy the one there."""
    path = save_exported_model(tmp_path / "model", {"w": torch.zeros(2)}, {"note": "first"})
    assert path == tmp_path / "model" / "model.safetensors"
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "first"}
    assert json.loads((tmp_path / "model" / "metadata.json").read_text()) == {"note": "first"}
    before = path.read_bytes()

    def full(path, content):
        path.write_bytes(content[:3])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "write", full)
    with pytest.raises(CheckpointError, match=r"model.safetensors: got .*No space left"):
        save_exported_model(tmp_path / "model", {"w": torch.ones(2)}, {"note": "second"})
    assert path.read_bytes() == before
    assert names(tmp_path / "model") == {"model.safetensors", "metadata.json"}
