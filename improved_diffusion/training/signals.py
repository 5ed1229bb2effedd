"""Stop signals of a training process, from its script's first line to its exit.

A script calls `watch` first. Until the loop runs a signal ends it at once with EXIT_INTERRUPTED,
since there is nothing to save; where it is one of several ranks, at the next point where all agree
(`leave_if_signalled`). While the loop runs (`deferred`) and after it a signal is only noted. At the
end the script calls `end`, so that none changes the exit code that it then gives.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: start again and it goes on

EXIT_LIMIT_S = 30.0

# A launcher forwards the Ctrl-C that the terminal sent to every process: two, but one was meant.
SAME_KEY_PRESS_S = 1.0


class Interrupted(SystemExit):
    """A signal came before there was anything to save; the exit code says: start again."""

    def __init__(self) -> None:
        super().__init__(EXIT_INTERRUPTED)


@dataclass
class _State:
    """What this process knows of its signals; `watcher` is its id, other than a forked child's."""

    watcher: int = 0
    received: int = 0
    received_at: float = 0.0
    at_once: bool = False
    in_loop: bool = False
    before_leaving: Callable[[], object] = lambda: None


_state = _State()


def watch() -> None:
    """Note stop signals from now on, for a script's first line; nothing else is imported before.

    Where this process is alone a signal ends it at once, until `deferred` is entered.
    """
    _install()
    from improved_diffusion import dist_util

    _state.at_once = dist_util.launcher() == ""
    if _state.received and _state.at_once:
        _leave()


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """While a loop runs that looks at `received` itself; without `watch` handlers are put back."""
    _state.at_once = False
    watched = _state.watcher == os.getpid()
    previous = {} if watched else _install()
    _state.in_loop = True
    try:
        yield
    finally:
        _state.in_loop = False
        if not watched:
            _state.watcher = _state.received = 0
        for number, handler in previous.items():
            signal.signal(number, handler)


def received() -> int:
    """The number of the last stop signal, 0 where none came."""
    return _state.received


def leave_if_signalled() -> None:
    """Raise Interrupted on every rank if any was signalled so far. All ranks must call."""
    from improved_diffusion import dist_util

    if any(dist_util.max_over_ranks(_state.received, what="asking for signals")):
        raise Interrupted


def before_leaving(action: Callable[[], object]) -> None:
    """Let `action` run before a signal ends this process at once; quick, and it must not raise."""
    _state.before_leaving = action


def end(code: int) -> None:
    """For the end of a script that called `watch` and now exits with `code`; elsewhere nothing.

    No signal changes the code from here on, and what libraries do at exit, such as a wandb that
    hangs, takes EXIT_LIMIT_S at most.
    """
    if _state.watcher != os.getpid():
        return
    _ignore()
    timer = threading.Timer(EXIT_LIMIT_S, os._exit, (code,))
    timer.daemon = True
    timer.start()


def ignore_in_worker(worker: int) -> None:
    """For a data worker: a signal to all processes must not take the data away before the save."""
    _ignore()


def _ignore() -> None:
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _install() -> dict[signal.Signals, Any]:
    """Start noting signals; returns the handlers that were there."""
    _state.watcher, _state.received = os.getpid(), 0
    return {number: signal.signal(number, _note) for number in STOP_SIGNALS}


def _note(number: int, frame: Any) -> None:
    if os.getpid() != _state.watcher:
        return  # a worker that has just been forked
    again = _state.received and time.monotonic() - _state.received_at > SAME_KEY_PRESS_S
    if number == signal.SIGINT and again:
        raise KeyboardInterrupt  # a second Ctrl-C: at once
    if not _state.received:
        what = "finishing this step, then saving" if _state.in_loop else "leaving"
        with contextlib.suppress(OSError):  # print could be in the middle of a line of its own
            os.write(2, f"{signal.Signals(number).name}: {what}\n".encode())
        _state.received_at = time.monotonic()
    _state.received = number
    if _state.at_once:
        _leave()


def _leave() -> NoReturn:
    """End the process from within the handler: an exception could be caught in a library's import."""
    _state.before_leaving()
    os._exit(EXIT_INTERRUPTED)
