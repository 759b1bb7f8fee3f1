"""What a run writes down: metrics.jsonl always; W&B and TensorBoard, through Accelerate, for watching."""

import json
import netrc
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available

from wcitrain import files


def append(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write a line of JSON and wait until it is on the disk; ``"step"`` counts the optimizer steps taken.

    NaN and infinity become null. TypeError for what is not JSON, such as a tensor: nothing is written.
    """
    line = json.dumps(files.without_nan(metrics))
    with path.open("a", encoding="utf-8") as file:
        file.write(line + "\n")
        file.flush()
        os.fsync(file.fileno())


def truncate(path: Path, step: int) -> None:
    """Drop, atomically, what was logged after ``step``, and a last line that a crash left unfinished.

    Raises:
        ValueError: A line other than the last is damaged.
    """
    if not path.exists():
        return
    lines, kept = path.read_bytes().splitlines(), []
    for number, line in enumerate(lines, start=1):
        try:
            kept += [line + b"\n"] if json.loads(line)["step"] <= step else []
        except (ValueError, TypeError, KeyError):
            if number < len(lines):
                text = f"got {line[:40]!r}; expected a JSON object with a step. Repair it, then resume."
                raise ValueError(f"{path}, line {number}: {text}") from None
    files.replace(path, b"".join(kept))


def choose_trackers(wandb: str, tensorboard: bool) -> tuple[list[str], str]:
    """Return trackers for ``Accelerator(log_with=...)``, which drops a missing one silently, and W&B's mode.

    ``"auto"`` is what WANDB_MODE says; without it online when there is a key (WANDB_API_KEY, or an entry for
    api.wandb.ai in the netrc file), else offline. Without W&B it warns and becomes ``"disabled"``.

    Raises:
        ValueError: WANDB_MODE is followed and is no mode.
        ModuleNotFoundError: A tracker is asked for and not installed.
    """
    mode = wandb
    if wandb == "auto":
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline")
        if mode not in ("online", "offline", "disabled"):
            raise ValueError(f"WANDB_MODE: got {mode!r}; expected online, offline or disabled. Correct it.")
        if mode != "disabled" and not is_wandb_available():
            text = "got auto without wandb installed: metrics go to metrics.jsonl only. Install it,"
            warnings.warn(f"tracking.wandb: {text} or set tracking.wandb=disabled.", stacklevel=2)
            mode = "disabled"
    is_there = {"wandb": is_wandb_available, "tensorboard": is_tensorboard_available}
    names = ["wandb"] * (mode != "disabled") + ["tensorboard"] * tensorboard
    for name in names:
        if not is_there[name]():
            text = f"expected the package to be installed. Run `pip install {name}`, or switch it off."
            raise ModuleNotFoundError(f"tracking.{name}: got it switched on; {text}")
    return names, mode


def _has_wandb_key() -> bool:
    """Say whether W&B would find a key without asking; looks at names only, never at the key."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return "api.wandb.ai" in netrc.netrc(os.environ.get("NETRC") or Path.home() / ".netrc").hosts
    except (OSError, netrc.NetrcParseError):
        return False


def start_trackers(
    accelerator: Accelerator, project: str, folder: Path, config: dict[str, Any], wandb_mode: str
) -> None:
    """Start the trackers that the accelerator was made with (on the main process; elsewhere nothing happens).

    The W&B id of a run is drawn once, apart from all seeds, and kept in ``folder/wandb/id.txt``: a resumed
    run continues its page, and a new folder is a new page.
    """
    if not accelerator.is_main_process:
        return
    wandb: dict[str, Any] = {}
    if "wandb" in map(str, accelerator.log_with):
        path = folder / "wandb" / "id.txt"
        if not path.exists():
            files.replace(path, f"{secrets.token_hex(4)}\n".encode())
        wandb = {"id": path.read_text().strip(), "name": folder.name, "dir": str(folder), "mode": wandb_mode}
        wandb["settings"] = {"silent": True}
        if wandb_mode == "online":  # offline, `wandb sync` joins the parts by their id
            wandb["resume"] = "allow"
    try:
        accelerator.init_trackers(project, config=config, init_kwargs={"wandb": wandb})
    except Exception as error:
        if not type(error).__module__.startswith("wandb"):
            raise
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        rule = "a key (`wandb login`), or tracking.wandb=offline or disabled. Choose one."
        raise ValueError(f"tracking.wandb: got {wandb_mode} ({reason}); expected {rule}") from error


def end_trackers(accelerator: Accelerator) -> None:
    """Finish the trackers: what they hold back is written out. A second call does nothing.

    Unlike ``accelerator.end_training`` it leaves the process group alone.
    """
    while accelerator.trackers:
        accelerator.trackers.pop().finish()
