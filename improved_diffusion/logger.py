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
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from improved_diffusion import dist_util
from improved_diffusion.data import paths

logger = logging.getLogger(__name__)

WANDB_ANSWER_LIMIT_S = 10
WANDB_START_LIMIT_S = 60

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
        row = dist_util.mean_over_ranks(means, self._counts)
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

    def close(self) -> None:
        """Hand what is left over to wandb."""
        if self._wandb is not None:
            self._wandb.finish()


class ProgressFile:
    """A table of numbers that grows by whole rows and, where a key is new, by columns.

    Rows after `start_step`, and a last row that a killed run left incomplete, are dropped.
    """

    def __init__(self, path: str, start_step: int) -> None:
        self.path = path
        self.columns, rows = _read_rows(path)
        self._rewrite([row for row in rows if int(row["step"]) <= start_step])

    def append(self, row: Row) -> None:
        """Add one row; keys that it lacks stay empty. Raises OSError naming the file."""
        try:
            self._append(row)
        except OSError as error:
            raise OSError(f"cannot write {self.path}: {error.strerror or error}") from None

    def _append(self, row: Row) -> None:
        new = [key for key in row if key not in self.columns]
        if new or paths.is_remote(self.path):  # blobs cannot grow
            self.columns += new
            _, rows = _read_rows(self.path)
            self._rewrite([*rows, row])
        else:
            with open(self.path, "a", newline="") as file:
                file.write(self._text([row], header=False))

    def _rewrite(self, rows: Sequence[Mapping[str, Any]]) -> None:
        with paths.atomic_write(self.path) as file:
            file.write(self._text(rows, header=True).encode())

    def _text(self, rows: Sequence[Mapping[str, Any]], *, header: bool) -> str:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.columns, lineterminator="\n")
        if header and self.columns:
            writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()


def _read_rows(path: str) -> tuple[list[str], list[dict[str, str]]]:
    """(columns, rows) of a csv file, without a last line that has no end; empty where missing."""
    try:
        text = _read_text(path)
    except FileNotFoundError:
        return [], []
    lines = text[: text.rfind("\n") + 1].splitlines()
    reader = csv.DictReader(lines)
    return list(reader.fieldnames or []), list(reader)


def _read_text(path: str) -> str:
    if not paths.is_remote(path):
        with open(path, newline="") as file:
            return file.read()
    import blobfile

    with blobfile.BlobFile(path, "r") as blob:
        return blob.read()


class WandbRun:
    """The run at wandb, so far as wandb works: no failure of it stops training.

    WANDB_ENTITY, WANDB_PROJECT, WANDB_MODE and the rest are wandb's own to read. Without a login
    and a mode it works offline; with WANDB_MODE=disabled it is not even imported. A thread of its
    own does all this in order, so that training never waits for it; `finish` does.
    """

    def __init__(self, run_id: str, config: Mapping[str, Any]) -> None:
        self._run: Any = None
        self._works = os.environ.get("WANDB_MODE") != "disabled"
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="wandb")
        if self._works:
            # Not in the thread: data workers that fork meanwhile would wait for its imports.
            self._try("be imported", lambda: importlib.import_module("wandb"))
        self._do("start", lambda: self._start(run_id.rsplit("/", 1)[-1], dict(config)))

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
            self._thread.submit(self._try, what, action)

    def _try(self, what: str, action: Callable[[], Any]) -> None:
        """Do it, or say what failed and stay silent from then on."""
        try:
            if self._works:
                action()
        except Exception as error:  # whatever goes wrong in wandb or on its way
            logger.warning("wandb: cannot %s (%s): going on without it", what, _first_line(error))
            self._works = False

    def log(self, row: Row, step: int) -> None:
        """Send one row of numbers."""
        self._do("log", lambda: self._run.log(dict(row), step=step))

    def log_videos(self, files: Sequence[str], step: int) -> None:
        """Send gif files."""
        self._do("log videos", lambda: self._log_videos(files, step))

    def _log_videos(self, files: Sequence[str], step: int) -> None:
        import wandb

        self._run.log({"samples": [wandb.Video(file, format="gif") for file in files]}, step=step)

    def finish(self) -> None:
        """Send what is left, and wait until that is done."""
        self._do("finish", lambda: self._run.finish())
        self._thread.shutdown()


def _require_answer(url: str) -> None:
    """Raise OSError where no web server answers: without a network wandb.init waits for minutes."""
    import urllib.error
    import urllib.request

    with contextlib.suppress(urllib.error.HTTPError):  # any answer will do
        urllib.request.urlopen(url, timeout=WANDB_ANSWER_LIMIT_S).close()


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).partition("\n")[0]
