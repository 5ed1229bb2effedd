"""Writing while training goes on."""

from __future__ import annotations

import threading
from collections.abc import Callable


class Saver:
    """Runs actions in a thread, one at a time; what one raises is raised by the next call here."""

    def __init__(self) -> None:
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def start(self, action: Callable[[], object]) -> None:
        """Let `action` run, once the one before has ended."""
        self.wait()
        # A daemon: a second Ctrl-C ends the process at once, as a kill would.
        self._thread = threading.Thread(
            target=self._run, args=(action,), name="checkpoint", daemon=True
        )
        self._thread.start()

    def _run(self, action: Callable[[], object]) -> None:
        try:
            action()
        except BaseException as error:
            self._error = error

    def check(self) -> None:
        """Raise what the action raised, if it has failed by now."""
        error, self._error = self._error, None
        if error is not None:
            raise error

    def wait(self) -> None:
        """Wait until the action has ended; raises as `check`."""
        if self._thread is not None:
            self._thread.join()
        self.check()
