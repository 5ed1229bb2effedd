"""A lock file that works where flock does not, for work of a second or two."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from improved_diffusion.data.paths import LOCK_OWNER, is_gone, temporary_file

logger = logging.getLogger(__name__)

LOCK_PATIENCE_S = 60.0  # a longer wait is said
LOCK_LIMIT_S = 120.0  # whoever holds the lock longer is gone


@contextlib.contextmanager
def file_lock(path: Path) -> Iterator[None]:
    """Hold a lock file beside `path`, `.<name>.lock`.

    A holder that is a process of this machine and has ended counts as gone, and any that is waited
    for longer than LOCK_LIMIT_S.
    """
    lock = path.parent / f".{path.name}.lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    while not _taken(lock):
        _wait_for(lock)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def _taken(lock: Path) -> bool:
    """Make the lock file, which names this process from its first moment; False if there is one."""
    said = f"process {os.getpid()} on {socket.gethostname()}"
    with temporary_file(lock) as (handle, temporary):
        with os.fdopen(handle, "w") as file:
            file.write(said)
        try:
            os.link(temporary, lock)
        except FileExistsError:
            return False
        except OSError:  # a file system without links
            return _made_exclusively(lock, said)
    return True


def _made_exclusively(lock: Path, said: str) -> bool:
    try:
        handle = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    except FileExistsError:
        return False
    with os.fdopen(handle, "w") as file:
        file.write(said)
    return True


def _wait_for(lock: Path) -> None:
    """Return when `lock` is free, or was taken away because its holder is gone."""
    began, said, holder = time.monotonic(), False, None
    while True:
        try:
            now = (lock.stat().st_mtime_ns, lock.read_text())
        except FileNotFoundError:
            return
        if now != holder:
            began, said, holder = time.monotonic(), False, now
        waited = time.monotonic() - began
        owner = re.fullmatch(LOCK_OWNER, now[1])
        if owner is not None and is_gone(owner[2], int(owner[1])):
            lock.unlink(missing_ok=True)
            return
        if waited > LOCK_LIMIT_S:
            logger.warning("%s: %s holds it too long: going on without", lock, now[1])
            lock.unlink(missing_ok=True)
            return
        if waited > LOCK_PATIENCE_S and not said:
            logger.info("%s: waiting for %s", lock, now[1])
            said = True
        time.sleep(0.1)
