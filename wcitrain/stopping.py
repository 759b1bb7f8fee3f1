"""Ctrl-C and SIGTERM: the first asks for a saved stop after the step under way, the second stops at once."""

import signal
import sys
import threading
from typing import Any


class StopRequest:
    """``with StopRequest() as stop``: ``stop.is_set`` turns true on the first signal. Handlers are put back on exit.

    Outside the main thread, where Python does not deliver signals, it is never set by itself.
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
            self._former = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
