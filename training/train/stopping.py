"""Stopping on SIGTERM, as a scheduler sends it before it takes a machine away: save, then leave."""

import signal
import threading
from types import FrameType, TracebackType


class StoppedError(RuntimeError):
    """A run was asked to stop and has saved what there is to save; the same command resumes it."""

    exit_status = 128 + signal.SIGTERM


class StopSignal:
    """While entered, SIGTERM sets `asked` instead of ending the process.

    Outside the main thread, where Python delivers no signals, it does nothing.

    >>> with StopSignal() as stop:
    ...     before = stop.asked
    ...     signal.raise_signal(signal.SIGTERM)
    ...     (before, stop.asked)
    (False, True)
    """

    def __init__(self) -> None:
        self.asked = False
        self._before: object = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._ask)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)  # type: ignore[arg-type]


def stop_at_once(number: int, frame: FrameType | None) -> None:
    """Answer SIGTERM where there is nothing to save: between stages, while reading text, in the final evaluation."""
    raise StoppedError("stopped by SIGTERM; what was finished is kept, and rerun the same command to resume")
