"""What a run writes down: metrics.jsonl and summary.json always; W&B and TensorBoard through Accelerate.

The two files are the record that reports are made from; trackers are for watching. W&B and TensorBoard are
imported only when a run uses them.
"""

import json
import math
import netrc
import os
import secrets
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import is_tensorboard_available, is_wandb_available


class RunLog:
    """``metrics.jsonl``, a JSON object a line, written as it happens, and ``summary.json``, in a run folder.

    JSON has no NaN and no infinity: both become null. Other floats come back bit for bit. One process writes.
    """

    def __init__(self, folder: Path) -> None:
        """Log into ``folder``, which is made when missing; what is there already stays."""
        folder.mkdir(parents=True, exist_ok=True)
        self.metrics_path = folder / "metrics.jsonl"
        self.summary_path = folder / "summary.json"

    def append(self, metrics: Mapping[str, Any]) -> None:
        """Write one line and wait until it is on the disk.

        Args:
            metrics: JSON values by name. ``"step"``, the number of optimizer steps taken, must be among them.

        Raises:
            ValueError: There is no integer ``"step"``; such a line could not be dropped on resume.
            TypeError: A value is not JSON, e.g. a tensor; the message names it.
        """
        if type(metrics.get("step")) is not int:
            raise ValueError(
                f'metrics["step"]: got {metrics.get("step")!r}; expected an int. Log '
                "the optimizer steps taken."
            )
        line = json.dumps(_json_ready(metrics, "metrics"), allow_nan=False)
        with self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
            file.flush()
            os.fsync(file.fileno())

    def truncate(self, step: int) -> None:
        """Drop, atomically, what was logged after ``step``, and a last line that a crash left unfinished.

        Call it on resume, with the step of the checkpoint: the lines after it are about to be written again.

        Raises:
            ValueError: A line other than the last is not a JSON object with a step.
        """
        if not self.metrics_path.exists():
            return
        lines = self.metrics_path.read_bytes().splitlines()
        kept = []
        for number, line in enumerate(lines, start=1):
            try:
                logged_step = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):
                if number == len(lines):
                    break
                raise ValueError(
                    f"{self.metrics_path}, line {number}: got {line[:40]!r}; expected a JSON object with a "
                    "step. Repair the line or delete it, then resume."
                ) from None
            if logged_step <= step:
                kept.append(line + b"\n")
        _replace(self.metrics_path, b"".join(kept))

    def write_summary(self, summary: Mapping[str, Any]) -> None:
        """Write ``summary.json`` atomically; it holds the former summary or this one, never half of one.

        Raises:
            TypeError: A value is not JSON, e.g. a tensor; the message names it.
        """
        text = json.dumps(_json_ready(summary, "summary"), indent=2, allow_nan=False)
        _replace(self.summary_path, text.encode() + b"\n")


def wandb_mode(requested: str) -> str:
    """Return the W&B mode of a run: ``"online"``, ``"offline"`` or ``"disabled"``.

    ``"auto"`` follows the environment variable WANDB_MODE; without it, online when there is a key
    (WANDB_API_KEY, or an entry for api.wandb.ai in the netrc file) and offline otherwise. Nothing is sent
    before the user asked for it.

    Args:
        requested: ``"auto"``, or the mode itself.

    Warns:
        UserWarning: W&B is not installed, so that ``"auto"`` becomes ``"disabled"``.

    Raises:
        ValueError: ``requested``, or WANDB_MODE when it is followed, is no mode.
        ModuleNotFoundError: ``"online"`` or ``"offline"`` was requested and W&B is not installed.
    """
    where, mode = "tracking.wandb", requested
    if requested == "auto":
        where, mode = (
            "WANDB_MODE",
            os.environ.get("WANDB_MODE") or ("online" if _has_wandb_key() else "offline"),
        )
    if mode not in ("online", "offline", "disabled"):
        rule = 'expected "online", "offline" or "disabled"' + (
            ', or "auto"' if where == "tracking.wandb" else ""
        )
        raise ValueError(f"{where}: got {mode!r}; {rule}. Choose one of these.")
    if mode == "disabled" or is_wandb_available():
        return mode
    if requested != "auto":
        raise _not_installed("tracking.wandb", mode, "wandb", "pip install wandb")
    warnings.warn(
        'tracking.wandb: got "auto", but wandb is not installed; metrics go to metrics.jsonl only. '
        'Run `pip install wandb`, or set tracking.wandb="disabled" to silence this.',
        stacklevel=2,
    )
    return "disabled"


def tracker_names(wandb: str, tensorboard: bool) -> list[str]:
    """Return what to give ``Accelerator(log_with=...)``, checked: it drops a missing tracker silently.

    Args:
        wandb: What ``wandb_mode`` returned.
        tensorboard: Whether to write TensorBoard event files.

    Returns:
        Some of ``"wandb"`` and ``"tensorboard"``. Accelerate wants ``names or None``, not an empty list.

    Raises:
        ModuleNotFoundError: A tracker is wanted and not installed.
    """
    names = []
    if wandb != "disabled":
        if not is_wandb_available():
            raise _not_installed("tracking.wandb", wandb, "wandb", "pip install wandb")
        names.append("wandb")
    if tensorboard:
        if not is_tensorboard_available():
            raise _not_installed(
                "tracking.tensorboard", tensorboard, "tensorboard", "pip install 'wcitrain[tensorboard]'"
            )
        names.append("tensorboard")
    return names


def start_trackers(
    accelerator: Accelerator,
    *,
    project: str,
    run_name: str,
    folder: Path,
    config: Mapping[str, Any],
    wandb_mode: str,
    resume_id: str | None = None,
) -> None:
    """Start the trackers that the accelerator was made with (on the main process; elsewhere nothing happens).

    The W&B id of a run is drawn once and kept in ``folder/wandb/id.txt``, so a run resumed in its folder
    continues its W&B page, and a new folder is a new page even under the same name. TensorBoard writes below
    the accelerator's ``logging_dir``.

    Args:
        accelerator: Made with ``log_with=tracker_names(...) or None``.
        project: The W&B project.
        run_name: The name W&B shows.
        folder: The run folder.
        config: The resolved settings, nested; shown flat, under dotted keys.
        wandb_mode: What the function ``wandb_mode`` returned.
        resume_id: A W&B id to continue in place of the folder's own.
    """
    if not accelerator.is_main_process:
        return
    wandb_settings: dict[str, Any] = {}
    if "wandb" in map(str, accelerator.log_with):
        wandb_settings = {
            "id": _run_id(folder, resume_id),
            "name": run_name,
            "dir": str(folder),
            "mode": wandb_mode,
            "settings": {"silent": True},
        }
        if (
            wandb_mode == "online"
        ):  # offline there is nothing to look up; `wandb sync` joins the parts by their id
            wandb_settings["resume"] = "allow"
    accelerator.init_trackers(project, config=_flatten(config), init_kwargs={"wandb": wandb_settings})


def log_epoch(accelerator: Accelerator, metrics: Mapping[str, Any], step: int) -> None:
    """Send the numbers among ``metrics`` to all trackers, and to W&B a table of the layers as well.

    The table ``layers`` has a row for every ``"wci/<layer>"``, with ``"curvature/trace/<layer>"`` and
    ``"frobenius/<layer>"`` beside it (empty when absent).

    Args:
        accelerator: After ``start_trackers``; without trackers nothing happens.
        metrics: Values by name; what is not a bool, an int or a float (None, text, lists) is skipped.
        step: The number of optimizer steps taken. W&B ignores steps before the last one it has seen.
    """
    accelerator.log(
        {name: value for name, value in metrics.items() if isinstance(value, (int, float))}, step=step
    )
    names = [name.removeprefix("wci/") for name in metrics if name.startswith("wci/")]
    rows = [
        [
            layer,
            metrics[f"wci/{layer}"],
            metrics.get(f"curvature/trace/{layer}"),
            metrics.get(f"frobenius/{layer}"),
        ]
        for layer in names
        if layer not in ("total", "total_stderr")
    ]
    for tracker in accelerator.trackers:
        if tracker.name == "wandb" and rows:
            tracker.log_table("layers", columns=["layer", "wci", "trace", "frobenius"], data=rows, step=step)


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


def _not_installed(where: str, value: object, package: str, command: str) -> ModuleNotFoundError:
    """Return the error for a tracker that was asked for and is not there."""
    return ModuleNotFoundError(
        f"{where}: got {value!r}; expected {package} to be installed. Run `{command}`, or switch it off.",
        name=package,
    )


def _run_id(folder: Path, resume_id: str | None) -> str:
    """Return the W&B id of the run in ``folder``, recorded there; drawn apart from all seeded generators."""
    path = folder / "wandb" / "id.txt"
    recorded = path.read_text().strip() if path.exists() else None
    run_id = resume_id or recorded or secrets.token_hex(4)
    if run_id != recorded:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, run_id.encode() + b"\n")
    return run_id


def _flatten(config: Mapping[str, Any], prefix: str = "") -> dict[str, bool | int | float | str]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``; lists, None as text: TensorBoard takes scalars."""
    flat: dict[str, bool | int | float | str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, (bool, int, float, str)) else str(value)
    return flat


def _json_ready(value: Any, place: str) -> Any:
    """Return ``value`` with null for NaN and infinity; refuse what is not JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (bool, int, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): _json_ready(item, f"{place}[{key!r}]") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_json_ready(item, f"{place}[{index}]") for index, item in enumerate(value)]
    raise TypeError(
        f"{place}: got a {type(value).__name__}; expected a JSON value. Convert it, e.g. with .item()."
    )


def _replace(path: Path, content: bytes) -> None:
    """Replace the file at ``path`` in one instant, durably."""
    partial = path.with_name(f".{path.name}.partial")
    with partial.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
