"""What a run writes down: metrics.jsonl and summary.json always; W&B and TensorBoard through Accelerate.

The two files are the record that reports are made from; trackers are for watching. W&B and TensorBoard are
imported only when a run uses them.
"""

import json
import netrc
import os
import secrets
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available

from wcitrain import files


class RunLog:
    """``metrics.jsonl`` in a run folder: a JSON object a line, written as it happens by one process."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = folder / "metrics.jsonl"

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line and wait until it is on the disk; ``"step"`` counts the optimizer steps taken.

        Raises:
            ValueError: There is no integer step; such a line could not be dropped on resume.
            TypeError: A value is not JSON, e.g. a tensor. Nothing has been written.
        """
        if type(step := metrics.get("step")) is not int:
            rule = "an int. Log the optimizer steps taken."
            raise ValueError(f'metrics["step"]: got {step!r}; expected {rule}')
        line = json.dumps(files.without_nan(metrics))
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, step: int) -> None:
        """Drop, atomically, what was logged after ``step``, and a last line that a crash left unfinished.

        Raises:
        ValueError: A line other than the last is not a JSON object with a step.
        """
        if not self.metrics_path.exists():
            return
        lines, kept = self.metrics_path.read_bytes().splitlines(), []
        for number, line in enumerate(lines, start=1):
            try:
                is_kept = json.loads(line)["step"] <= step
            except (ValueError, TypeError, KeyError):
                if number == len(lines):
                    break
                text = f"got {line[:40]!r}; expected a JSON object with a step."
                advice = "Repair the line or delete it, then resume."
                raise ValueError(f"{self.metrics_path}, line {number}: {text} {advice}") from None
            if is_kept:
                kept.append(line + b"\n")
        files.replace(self.metrics_path, b"".join(kept))


def choose_trackers(wandb: str, tensorboard: bool) -> tuple[list[str], str]:
    """Return trackers for ``Accelerator(log_with=...)``, which drops a missing one silently, and W&B's mode.

    ``"auto"`` is what WANDB_MODE says; without it online when there is a key (WANDB_API_KEY, or an entry for
    api.wandb.ai in the netrc file), else offline: nothing is sent before the user asked for it. Where W&B is
    not installed, it warns and becomes ``"disabled"``.

    Raises:
        ValueError: WANDB_MODE is followed and is no mode.
        ModuleNotFoundError: A tracker is asked for and not installed.
    """
    mode, names = wandb, []
    if wandb == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        if mode not in ("online", "offline", "disabled"):
            rule = "online, offline or disabled. Choose one of these."
            raise ValueError(f"WANDB_MODE: got {mode!r}; expected {rule}")
        if mode != "disabled" and not is_wandb_available():
            text = "got auto, but wandb is not installed; metrics go to metrics.jsonl only."
            advice = "Run `pip install wandb`, or set tracking.wandb=disabled to silence this."
            warnings.warn(f"tracking.wandb: {text} {advice}", stacklevel=2)
            mode = "disabled"
    trackers = [
        ("wandb", mode, mode != "disabled", is_wandb_available, "wandb"),
        ("tensorboard", True, tensorboard, is_tensorboard_available, "wcitrain[tensorboard]"),
    ]
    for name, got, is_on, is_available, package in trackers:
        if is_on and not is_available():
            rule = f"the package to be installed. Run `pip install '{package}'`, or switch it off."
            raise ModuleNotFoundError(f"tracking.{name}: got {got!r}; expected {rule}")
        names += [name] if is_on else []
    return names, mode


def start_trackers(
    accelerator: Accelerator, project: str, folder: Path, config: Mapping[str, Any], wandb_mode: str
) -> None:
    """Start the trackers that the accelerator was made with (on the main process; elsewhere nothing happens).

    The W&B id of a run is drawn once and kept in ``folder/wandb/id.txt``: a resumed run continues its page,
    and a new folder is a new page. ``config``, nested, is shown flat, under dotted keys.
    """
    if not accelerator.is_main_process:
        return
    wandb: dict[str, Any] = {}
    if "wandb" in map(str, accelerator.log_with):
        wandb = {"id": _run_id(folder), "name": folder.name, "dir": str(folder), "mode": wandb_mode}
        wandb["settings"] = {"silent": True}
        if wandb_mode == "online":  # offline, `wandb sync` joins the parts by their id
            wandb["resume"] = "allow"
    accelerator.init_trackers(project, config=dict(_flat(config)), init_kwargs={"wandb": wandb})


def log_epoch(accelerator: Accelerator, metrics: Mapping[str, Any], step: int) -> None:
    """Send the numbers among ``metrics`` to all trackers, and to W&B a table of the layers as well.

    The table ``layers`` has a row for every ``"wci/<layer>"``, with ``"curvature/trace/<layer>"`` and
    ``"frobenius/<layer>"`` beside it (empty when absent). W&B ignores steps before the last one it has seen.
    """
    numbers = {name: value for name, value in metrics.items() if isinstance(value, (int, float))}
    accelerator.log(numbers, step=step)
    columns = {"wci": "wci", "trace": "curvature/trace", "frobenius": "frobenius"}
    layers = [name.removeprefix("wci/") for name in metrics if name.startswith("wci/")]
    layers = [layer for layer in layers if layer not in ("total", "total_stderr")]
    rows = [[layer, *(metrics.get(f"{one}/{layer}") for one in columns.values())] for layer in layers]
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and rows:
            tracker.log_table("layers", columns=["layer", *columns], data=rows, step=step)


def end_trackers(accelerator: Accelerator) -> None:
    """Finish the trackers: what they hold back is written out. A second call does nothing.

    Unlike ``accelerator.end_training`` it leaves the process group alone.
    """
    while accelerator.trackers:
        accelerator.trackers.pop().finish()


def _has_wandb_key() -> bool:
    """Say whether W&B would find a key without asking; looks at names only, never at the key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, netrc.NetrcParseError):
        return False


def _run_id(folder: Path) -> str:
    """Return the W&B id of the run in ``folder``, recorded there; drawn apart from all seeded generators."""
    path = folder / "wandb" / "id.txt"
    if not path.exists():
        files.replace(path, f"{secrets.token_hex(4)}\n".encode())
    return path.read_text().strip()


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, bool | int | float | str]]:
    """Yield ``("a.b", 1)`` for ``{"a": {"b": 1}}``; lists and None as text: TensorBoard takes scalars."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value if isinstance(value, (bool, int, float, str)) else str(value)
