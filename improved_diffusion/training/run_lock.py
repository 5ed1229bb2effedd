"""One process at a time writes a run's folder: a lock file that its holder keeps fresh.

`run.lock` names the holder: host, process, SLURM job, time. It is made by linking a finished file
(by exclusive creation where there are no links), which is atomic on NFS too, and its time is set
anew every BEAT_S by a thread. It counts for nothing once its holder is gone: a process of this very
machine that no longer exists, the same SLURM job started again, or, from elsewhere, a time that is
EXPIRY_S old by the file system's clock. In a blob store, which knows no exclusive creation, the last
writer wins and looks again after SETTLE_S.
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import secrets
import signal
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from improved_diffusion.data import paths

logger = logging.getLogger(__name__)

LOCK_NAME = "run.lock"
BEAT_S = 20.0
EXPIRY_S = 180.0
SETTLE_S = 2.0
LAST_BEAT_S = 10.0
TAKING_S = 20.0  # replacing a lock takes no longer, unless its process was killed meanwhile

NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.ENOSYS}


@dataclass(frozen=True)
class Holder:
    """Who holds a run."""

    token: str  # of this one lock
    host: str
    machine: str  # which kernel and which process numbers: containers can share a host's name
    pid: int
    started: str  # when, by the kernel: process numbers are used again
    job: str  # SLURM's number of the job, or nothing
    time: str

    def __str__(self) -> str:
        job = f", SLURM job {self.job}" if self.job else ""
        return f"process {self.pid} on {self.host}{job}, since {self.time}"


def _myself() -> Holder:
    return Holder(
        token=secrets.token_hex(8),
        host=socket.gethostname(),
        machine=_machine(),
        pid=os.getpid(),
        started=paths.process_start(os.getpid()) or "",
        job=os.environ.get("SLURM_JOB_ID", ""),
        time=time.strftime("%Y-%m-%d %H:%M:%S"),
    )


def _machine() -> str:
    """This kernel's start and process numbers; empty where the system does not say."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    return ""


_held: dict[str, RunLock] = {}  # by the lock's path; this process's


def hold(folder: str) -> RunLock:
    """Take the lock of a run's folder, or return it where this process has it already.

    Raises BlockingIOError naming the holder where another process has it, OSError where it cannot
    be written.
    """
    lock = RunLock(folder)
    if lock.path not in _held:
        lock.acquire()
    return _held[lock.path]


def release_all() -> None:
    """Give back every lock of this process."""
    for lock in list(_held.values()):
        lock.release()


class RunLock:
    """The lock of a run's folder, held from `acquire` until `release`."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        path = f"{folder}/{LOCK_NAME}"
        self.path = path if paths.is_remote(path) else os.path.abspath(path)
        self._me = _myself()
        self._file: _LocalFile | _Blob
        self._file = (_Blob if paths.is_remote(folder) else _LocalFile)(self.path, self._me)
        self._over = threading.Event()
        self._beating = threading.Lock()
        self._lost = False

    def acquire(self) -> None:
        """Take the lock. Raises BlockingIOError naming the holder where another process has it."""
        self._file.take(self._refuse_unless_gone)
        _held[self.path] = self
        threading.Thread(target=self._keep_fresh, name="run lock", daemon=True).start()

    def _refuse_unless_gone(self, holder: Holder, age_s: float) -> None:
        """Raise BlockingIOError where `holder`, heard of `age_s` ago, is still there."""
        here = (holder.host, holder.machine) == (self._me.host, self._me.machine)
        if here:
            gone = paths.is_gone(holder.host, holder.pid, holder.started)
        elif holder.job and holder.job == self._me.job:
            gone = True  # SLURM starts a job again when its processes are gone
        else:
            gone = age_s > EXPIRY_S
        if gone:
            logger.info("taking over from %s, which is gone", holder)
            return
        wait = "" if here else f": if it is gone, start again in {EXPIRY_S - age_s:.0f} s"
        heard = f"heard of {age_s:.0f} s ago"
        raise BlockingIOError(f"{self.folder} is held by {holder}, {heard}{wait}")

    def _keep_fresh(self) -> None:
        while not self._over.wait(BEAT_S):
            with self._beating:
                if self._over.is_set():
                    return
                try:
                    self.check()
                    self._file.refresh()
                except BlockingIOError:
                    self._lost = True
                    os.kill(os.getpid(), signal.SIGTERM)  # the loop ends, and `check` says why
                    return
                except Exception as error:  # the file system is away; the next beat may find it
                    logger.debug("%s: %s", self.path, error)

    def check(self) -> None:
        """Raise BlockingIOError if another process has taken the run, as after a long standstill."""
        holder = self._file.read()
        if self._lost or (holder is not None and holder.token != self._me.token):
            raise BlockingIOError(
                f"{self.folder} was taken over by {holder}: nothing more is written"
            )

    def release(self) -> None:
        """Give the lock back; the file goes."""
        _held.pop(self.path, None)
        self._over.set()
        # A beat under way could make the file again; where it hangs, the lock expires by itself.
        if self._beating.acquire(timeout=LAST_BEAT_S):
            with contextlib.suppress(OSError):
                holder = self._file.read()
                if holder is not None and holder.token == self._me.token:
                    self._file.remove()
            self._beating.release()


# ---------------------------------------------------------------- the file


def _text(holder: Holder) -> bytes:
    return (json.dumps(asdict(holder)) + "\n").encode()


def _parse(text: bytes) -> Holder:
    """The holder that a lock names; one that no process here can be where it is not legible."""
    try:
        values = json.loads(text)
        return Holder(**{item.name: values[item.name] for item in fields(Holder)})
    except (ValueError, KeyError, TypeError):
        return Holder("", "an unknown host", "?", 0, "?", "", "an unknown time")


Judge = Callable[[Holder, float], None]


class _LocalFile:
    """The lock in a folder of this machine or of a network's file system."""

    def __init__(self, path: str, me: Holder) -> None:
        self.path, self.me = path, me
        self.mine = f"{path}.{me.token}.tmp"
        self.claim = f"{path}.claim.tmp"  # held by the one process that replaces a lock

    def take(self, judge: Judge) -> None:
        """Make the lock, or replace one that `judge` lets pass."""
        try:
            self._write_mine()
            while not (self._appear() or self._take_over(judge)):
                time.sleep(0.1)
            self._remove_leftovers()
        except BlockingIOError:
            raise
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None
        finally:
            with contextlib.suppress(OSError):
                os.unlink(self.mine)

    def _write_mine(self) -> None:
        with open(self.mine, "wb") as file:
            file.write(_text(self.me))
            file.flush()
            os.fsync(file.fileno())

    def _appear(self) -> bool:
        """Make the lock if there is none; whether that was done."""
        try:
            os.link(self.mine, self.path)
        except FileExistsError:
            return os.stat(self.mine).st_nlink == 2  # made, but NFS lost the answer and asked again
        except OSError as error:
            if error.errno not in NO_LINKS:
                raise
            try:
                with open(self.path, "xb") as file:
                    file.write(_text(self.me))
            except FileExistsError:
                return False
        return True

    def _take_over(self, judge: Judge) -> bool:
        """Replace the lock of one who is gone; whether that was done."""
        self._judge(judge)
        try:
            os.close(os.open(self.claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:  # another does the same, or was killed while it did
            self._remove_if_old(self.claim)
            return False
        try:
            there = self._judge(judge)  # it may be another's by now
            if there:
                os.replace(self.mine, self.path)
            return there
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.claim)

    def _judge(self, judge: Judge) -> bool:
        """Let `judge` raise for the lock that is there; False where there is none."""
        try:
            with open(self.path, "rb") as file:
                holder, changed = _parse(file.read()), os.fstat(file.fileno()).st_mtime
        except FileNotFoundError:
            return False
        judge(holder, self._now() - changed)
        return True

    def _now(self) -> float:
        """The file system's clock, which need not agree with this machine's."""
        probe = self.mine if os.path.exists(self.mine) else self.path  # the lock, once it is mine
        os.utime(probe)
        return os.stat(probe).st_mtime

    def _remove_if_old(self, path: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            if self._now() - os.stat(path).st_mtime > TAKING_S:
                os.unlink(path)

    def _remove_leftovers(self) -> None:
        """What processes left that were killed while they took the lock."""
        folder, name = os.path.split(self.path)
        for file in os.listdir(folder):
            if file.startswith(f"{name}.") and file.endswith(".tmp"):
                self._remove_if_old(f"{folder}/{file}")

    def read(self) -> Holder | None:
        """Who holds the lock; None where there is none."""
        try:
            with open(self.path, "rb") as file:
                return _parse(file.read())
        except FileNotFoundError:
            return None

    def refresh(self) -> None:
        """Say that the holder is alive; make the lock again where someone removed it."""
        try:
            os.utime(self.path)
        except FileNotFoundError:
            self._write_mine()
            self._appear()
            os.unlink(self.mine)

    def remove(self) -> None:
        os.unlink(self.path)


class _Blob:
    """The lock in a blob store."""

    def __init__(self, path: str, me: Holder) -> None:
        self.path, self.me = path, me

    def take(self, judge: Judge) -> None:
        """Write the lock where there is none or `judge` lets it pass, and see that it stays."""
        import blobfile

        holder = self.read()
        if holder is not None:
            changed = blobfile.stat(self.path).mtime
            judge(holder, self._now() - changed)
        self.refresh()
        time.sleep(SETTLE_S)
        holder = self.read()
        if holder is not None and holder.token != self.me.token:
            judge(holder, 0.0)

    def _now(self) -> float:
        """The store's clock."""
        import blobfile

        probe = f"{self.path}.{self.me.token}.tmp"
        with paths.atomic_write(probe) as file:
            file.write(b"-")
        try:
            return blobfile.stat(probe).mtime
        finally:
            blobfile.remove(probe)

    def read(self) -> Holder | None:
        """Who holds the lock; None where there is none."""
        import blobfile

        try:
            with blobfile.BlobFile(self.path, "rb") as file:
                return _parse(file.read())
        except FileNotFoundError:
            return None

    def refresh(self) -> None:
        """Say that the holder is alive."""
        with paths.atomic_write(self.path) as file:
            file.write(_text(self.me))

    def remove(self) -> None:
        import blobfile

        blobfile.remove(self.path)
