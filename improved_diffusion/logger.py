"""Where a training run's numbers go: the terminal, `progress.csv` in the run's folder, and wandb.

Every rank makes a RunLogger and calls `dump` together with the others; rank 0 alone writes.
"""

from __future__ import annotations

import contextlib
import csv
import importlib
import io
import logging
import os
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from improved_diffusion import dist_util
from improved_diffusion.data import paths

logger = logging.getLogger(__name__)

WANDB_ANSWER_LIMIT_S = 10
WANDB_START_LIMIT_S = 60
WANDB_FINISH_LIMIT_S = 60.0  # SLURM's usual notice is two minutes, and the save comes first

UPLOAD_INTERVAL_S = 120.0  # between two versions of a remote progress.csv

Row = Mapping[str, float]


class RunLogger:
    """Collects means between two calls of `dump`, which writes them as one row.

    Args:
        folder: the run's folder, which must exist.
        run_id: its last part is the id at wandb, too.
        config: the flat training options, shown at wandb.
        start_step: rows after this step are a lost past and are dropped from progress.csv.
    """

    def __init__(
        self, folder: str, run_id: str, config: Mapping[str, Any], start_step: int
    ) -> None:
        self._sums: dict[str, float] = {}
        self._counts: dict[str, float] = {}
        self._progress: ProgressFile | None = None
        self._wandb: WandbRun | None = None
        if dist_util.is_main():
            self._progress = ProgressFile(f"{folder}/progress.csv", start_step)
            self._wandb = WandbRun(run_id, config)

    def add(self, key: str, value: float, count: float = 1) -> None:
        """Let `value`, itself a mean of `count` values, enter the next row's mean of `key`."""
        self._sums[key] = self._sums.get(key, 0.0) + value * count
        self._counts[key] = self._counts.get(key, 0.0) + count

    def dump(self, step: int) -> dict[str, float]:
        """Write the means over ranks since the last call; returns them. All ranks must call."""
        means = {key: total / self._counts[key] for key, total in self._sums.items()}
        row = mean_over_ranks(means, self._counts)
        self._sums, self._counts = {}, {}
        if self._progress is not None and self._wandb is not None:
            numbers = ", ".join(
                f"{key} {value:.4g}" for key, value in row.items() if "_q" not in key
            )
            logger.info("step %d: %s", step, numbers)
            self._progress.append({"step": step, **row})
            self._wandb.log(row, step)
        return row

    def videos(self, files: Sequence[str], step: int) -> None:
        """Show local gif files at wandb."""
        if self._wandb is not None:
            self._wandb.log_videos(files, step)

    def flush(self) -> None:
        """Let progress.csv have every row so far; before a checkpoint is written."""
        if self._progress is not None:
            self._progress.flush()

    def close(self) -> None:
        """Write and hand over what is left; takes WANDB_FINISH_LIMIT_S at most for wandb."""
        self.flush()
        if self._wandb is not None:
            self._wandb.finish()


def mean_over_ranks(
    values: Mapping[str, float], counts: Mapping[str, float] | None = None
) -> dict[str, float]:
    """Means over the ranks that have a key, weighted by `counts` (1 each by default).

    All ranks must call; their keys may differ.
    """
    weights = dict.fromkeys(values, 1.0) if counts is None else counts
    own = {key: (value * weights[key], weights[key]) for key, value in values.items()}
    gathered = dist_util.gather_objects(own, what="the means to log")
    keys = dict.fromkeys(key for part in gathered for key in part)
    sums = {key: [part[key] for part in gathered if key in part] for key in keys}
    return {key: sum(v for v, _ in pairs) / sum(n for _, n in pairs) for key, pairs in sums.items()}


class ProgressFile:
    """A table of numbers that grows by whole rows and, where a key is new, by columns.

    Rows after `start_step`, and a last row that a killed run left incomplete, are dropped. A file
    with other broken lines is kept as `<path>.damaged`, with a warning; the whole rows go on. A
    remote table is written at most every UPLOAD_INTERVAL_S, and by `flush`.
    """

    def __init__(self, path: str, start_step: int) -> None:
        self.path = path
        self.columns, rows, text = _read_table(path)
        if text is not None:
            logger.warning("%s has damaged lines: kept as it is in %s.damaged", path, path)
            with self._errors_named(), paths.atomic_write(f"{path}.damaged") as file:
                file.write(text)
        self._remote_rows: list[Mapping[str, Any]] = []  # blobs cannot grow
        self._unwritten = False
        self._write_all([row for row in rows if int(row["step"]) <= start_step])

    def append(self, row: Row) -> None:
        """Add one row; keys that it lacks stay empty. Raises OSError naming the file."""
        new = [key for key in row if key not in self.columns]
        self.columns += new
        if paths.is_remote(self.path):
            self._remote_rows.append(row)
            self._unwritten = True
            if time.monotonic() - self._written_at >= UPLOAD_INTERVAL_S:
                self.flush()
        elif new:
            self._write_all([*_read_table(self.path)[1], row])
        else:
            with self._errors_named(), open(self.path, "a", newline="") as file:
                file.write(self._text([row], header=False))

    def flush(self) -> None:
        """Upload the rows that a remote table does not have yet."""
        if self._unwritten:
            self._write_all(self._remote_rows)

    def _write_all(self, rows: list[Mapping[str, Any]]) -> None:
        with self._errors_named(), paths.atomic_write(self.path) as file:
            file.write(self._text(rows, header=True).encode())
        if paths.is_remote(self.path):
            self._remote_rows = rows
        self._unwritten, self._written_at = False, time.monotonic()

    @contextlib.contextmanager
    def _errors_named(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None

    def _text(self, rows: Sequence[Mapping[str, Any]], *, header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if header and self.columns:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _read_table(path: str) -> tuple[list[str], list[dict[str, str]], bytes | None]:
    """(columns, whole rows, the bytes if more than the last line is damaged); empty if missing."""
    try:
        with paths.open_binary(path) as file:
            content = file.read()
    except FileNotFoundError:
        return [], [], None
    lines = content[: content.rfind(b"\n") + 1].decode(errors="replace").splitlines()
    if not lines:
        return [], [], None
    columns, *rows = csv.reader(line.replace("\0", "\ufffd") for line in lines)
    if columns[:1] != ["step"]:
        return [], [], content
    whole = [
        dict(zip(columns, row, strict=True))
        for row in rows
        if len(row) == len(columns) and row[0].isdecimal() and all(map(_is_number, row))
    ]
    return columns, whole, None if len(whole) == len(rows) else content


def _is_number(text: str) -> bool:
    try:
        return text == "" or float(text) is not None
    except ValueError:
        return False


class WandbRun:
    """The run at wandb, so far as wandb works: no failure of it stops training or keeps it.

    WANDB_ENTITY, WANDB_PROJECT, WANDB_MODE and the rest are wandb's own to read. Without a login
    and a mode it works offline; with WANDB_MODE=disabled it is not even imported. A thread of its
    own does all this in order, so that training never waits for it; `finish` does, for a while.
    """

    def __init__(self, run_id: str, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        self._works = os.environ.get("WANDB_MODE") != "disabled"
        self._actions: queue.SimpleQueue[tuple[str, Callable[[], Any]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        if self._works:
            # Not in the thread: data workers that fork meanwhile would wait for its imports.
            self._try("be imported", lambda: importlib.import_module("wandb"))
        self._do("start", lambda: self._start(run_id.rsplit("/", 1)[-1], dict(config)))

    def _work(self) -> None:
        while (action := self._actions.get()) is not None:
            self._try(*action)

    def _start(self, wandb_id: str, config: dict[str, Any]) -> None:
        import wandb

        mode = os.environ.get("WANDB_MODE")
        if not mode and not wandb.api.api_key:
            logger.info("wandb: no login (`wandb login`) and no WANDB_MODE: logging offline")
            mode = "offline"
        if mode not in ("offline", "dryrun"):
            try:
                _require_answer(wandb.setup().settings.base_url)
                limit = wandb.Settings(init_timeout=WANDB_START_LIMIT_S)
                self._run = wandb.init(id=wandb_id, config=config, resume="allow", settings=limit)
                return
            except Exception as error:
                logger.warning("wandb: cannot start (%s): logging offline", _first_line(error))
        self._run = wandb.init(id=wandb_id, config=config, mode="offline")

    def _do(self, what: str, action: Callable[[], Any]) -> None:
        if self._works:
            self._actions.put((what, action))
            if self._thread.ident is None:
                self._thread.start()

    def _try(self, what: str, action: Callable[[], Any]) -> None:
        """Do it, or say what failed and stay silent from then on."""
        try:
            if self._works:
                action()
        except Exception as error:  # whatever goes wrong in wandb or on its way
            logger.warning("wandb: cannot %s (%s): going on without it", what, _first_line(error))
            self._works = False

    def log(self, row: Row, step: int | None) -> None:
        """Send one row of numbers; step None: after all that is there."""
        self._do("log", lambda: self._run.log(dict(row), step=step))

    def log_videos(self, files: Sequence[str], step: int | None, name: str = "samples") -> None:
        """Send gif files, which must stay until `finish` returns."""
        self._do("log videos", lambda: self._log_videos(files, step, name))

    def _log_videos(self, files: Sequence[str], step: int | None, name: str) -> None:
        import wandb

        self._run.log({name: [wandb.Video(file, format="gif") for file in files]}, step=step)

    def log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        """Send a table."""
        self._do("log a table", lambda: self._log_table(name, columns, rows))

    def _log_table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
        import wandb

        data = [list(row) for row in rows]
        self._run.log({name: wandb.Table(columns=list(columns), data=data)})

    def finish(self) -> None:
        """Send what is left, and wait until that is done or WANDB_FINISH_LIMIT_S are over."""
        self._do("finish", lambda: self._run.finish())
        self._actions.put(None)
        if self._thread.ident is not None:
            self._thread.join(WANDB_FINISH_LIMIT_S)
        if self._thread.is_alive():
            self._works = False
            logger.warning(
                "wandb: not finished after %.0f s: leaving without it; `wandb sync` sends the rest",
                WANDB_FINISH_LIMIT_S,
            )


def _require_answer(url: str) -> None:
    """Raise OSError where no web server answers: without a network wandb.init waits for minutes."""
    import urllib.error
    import urllib.request

    with contextlib.suppress(urllib.error.HTTPError):  # any answer will do
        urllib.request.urlopen(url, timeout=WANDB_ANSWER_LIMIT_S).close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
