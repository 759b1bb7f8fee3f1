"""Two processes equal one process on the union of their data, for every rule and for a whole run."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cases import RULES, assert_same

HERE = Path(__file__).parent


def launch(kind: str, out: Path) -> list:
    """Run worker.py in two gloo processes and return what each wrote; the exit status is gloo's own affair."""
    environment = os.environ | {
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE.parents[1])]),
        "GLOO_SOCKET_IFNAME": "lo",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_addr=127.0.0.1"]
    command += [f"--master_port={20000 + os.getpid() % 20000}", str(HERE / "worker.py"), str(out), kind]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=240)
    files = [out / f"{rank}.pt" for rank in range(2)]
    assert all(f.exists() for f in files), result.stderr[-3000:]
    return [torch.load(f, weights_only=True) for f in files]


def test_every_rule_in_two_processes_equals_one_that_accumulates(tmp_path):
    """Directions are keyed by the global micro-batch, gradients are reduced once, traces before they are averaged."""
    sys.path.insert(0, str(HERE))
    from worker import train

    first, second = launch("wrapper", tmp_path)
    for rule in RULES:
        assert_same(first[rule], second[rule])  # processes stay in step,
        assert_same(first[f"{rule}, BatchNorm"], second[f"{rule}, BatchNorm"])  # running statistics included
        alone, _ = train(rule, rank=0, world=1)
        assert alone.keys() == first[rule].keys()
        for key, value in alone.items():
            # float64 sums in another order; differences at radius 0.05 multiply rounding by up to 1e4.
            assert torch.allclose(value, first[rule][key], rtol=1e-9, atol=1e-11), (rule, key)


@pytest.mark.slow
def test_a_run_in_two_processes_equals_one_that_accumulates(tmp_path):
    """Same batches, attacks, evaluation and log; BatchNorm-free, since each process normalises its own part."""
    from wcitrain.recipe import load_recipe, recipe_from_dict
    from wcitrain.train import fit

    recipe = recipe_from_dict(
        {
            "name": "one",
            "output": str(tmp_path),
            "data": {"source": "digits", "val_size": 100, "max_train": 200, "max_test": 100, "crop_padding": 1,
                     "image_size": 32},
            "model": {
                "name": "convnext_atto", "kwargs": {"depths": [1, 1, 1, 1], "dims": [4, 4, 8, 8], "patch_size": 2},
            },
            "threat": {"eps": 0.1},
            "objective": {"num_steps": 2, "step_size": 0.06},
            "perturbation": {"name": "wci", "relative_size": 0.3},
            "train": {"epochs": 2, "batch_size": 50, "accumulate": 2, "device": "cpu"},
            "evaluation": {"train_size": 100, "num_steps": 2, "step_size": 0.06, "batch_size": 30},
            "tracking": {"wandb": "disabled"},
        }
    )  # fmt: skip
    fit(recipe)
    (tmp_path / "recipe.yaml").write_text(recipe.to_yaml())
    launch("run", tmp_path)
    logs = [(tmp_path / f"{n}-s0" / "metrics.jsonl").read_text().splitlines() for n in ("one", "two")]
    assert len(logs[0]) == len(logs[1]) == 2
    for one, two in zip(*(map(json.loads, log) for log in logs), strict=True):
        for key in one:
            if key not in ("seconds", "train_seconds", "images_per_second"):
                assert one[key] == pytest.approx(two[key], rel=1e-3, abs=1e-5), key
    assert load_recipe(tmp_path / "two-s0" / "recipe.yaml").train.accumulate == 1
