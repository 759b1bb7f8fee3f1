"""How far an attack is, kept in a file after every batch: a killed evaluation goes on where it was."""

import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from wcitrain.digest import digest


class AttackState:
    """What is known of one attack on N examples.

    Attributes:
        is_robust: Truth values [N]: right at the start and after all that was tried.
        todo: Truth values [N]: what the stage under way attacks.
        losses: Cross-entropies [N] after the first restart; NaN where none is known.
        after: Robust accuracy after each finished stage; their number is the stage under way.
        batch: Finished batches of the stage under way.
        furthest: Longest perturbation that fooled the model, in the threat's norm.

    Args:
        is_clean: Truth values [N]: right without an attack.
        path: File to keep it in and to go on from; None keeps nothing.
    """

    def __init__(self, is_clean: Tensor, path: Path | None) -> None:
        self.path = path
        self.is_robust = is_clean.clone()
        self.todo = is_clean.clone()
        self.losses = torch.full(is_clean.shape, torch.nan)
        self.after: list[float] = []
        self.batch = 0
        self.furthest = 0.0
        if path is not None and path.is_file():
            with np.load(path, allow_pickle=False) as saved:
                self.is_robust, self.todo = (torch.from_numpy(saved[key]) for key in ("is_robust", "todo"))
                self.losses = torch.from_numpy(saved["losses"])
                self.after = saved["after"].tolist()
                self.batch, self.furthest = int(saved["batch"]), float(saved["furthest"])

    def save(self) -> None:
        """Write the file; a kill at any moment leaves the former one or this one."""
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = self.path.with_suffix(".unfinished")
        with unfinished.open("wb") as file:
            np.savez(
                file,
                is_robust=self.is_robust.numpy(),
                todo=self.todo.numpy(),
                losses=self.losses.numpy(),
                after=np.array(self.after, dtype=np.float64),
                batch=self.batch,
                furthest=self.furthest,
            )
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)


def model_digest(model: nn.Module) -> str:
    """Return the digest of a model's weights, of its buffers, and of the names of its modules' classes."""
    parts: list[object] = [type(module).__qualname__ for module in model.modules()]
    for name, value in model.state_dict().items():
        parts += [name, value]
    return digest(parts)
