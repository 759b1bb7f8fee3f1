"""What ends a run before its last epoch: no better validation accuracy, Ctrl-C or SIGTERM."""

import signal
import sys
import threading
from typing import Any, ClassVar

from pydantic import Field

from wcitrain.method import Method, PositiveCount, method


@method
class EarlyStopping(Method):
    """Stop once the best epoch by robust validation accuracy lies too far back."""

    patience: PositiveCount | None = Field(
        default=None,
        description="Epochs without a better robust validation accuracy before training stops; null: never.",
    )
    label: ClassVar[str] = "early stopping"
    source: ClassVar[str] = "Rice, Wong, Kolter, arXiv 2002.11569: robust validation accuracy"

    def reason(self, epoch: int, best_epoch: int) -> str | None:
        """Return why training stops after ``epoch`` epochs, None where it goes on."""
        if self.patience is None or epoch - best_epoch < self.patience:
            return None
        return f"no better robust validation accuracy in {self.patience} epochs (early_stopping.patience)"


class StopRequest:
    """``with StopRequest() as stop``: ``stop.is_set`` turns true on the first signal.

    The second signal stops at once. Handlers are put back on exit. Outside the main thread, where Python does
    not deliver signals, it is never set by itself.
    """

    def __init__(self) -> None:
        self.is_set = False
        self._former: dict[int, Any] = {}

    def _handle(self, number: int, frame: Any) -> None:
        if self.is_set:
            raise KeyboardInterrupt
        self.is_set = True
        print("stopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
