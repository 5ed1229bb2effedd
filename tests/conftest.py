"""Every test runs offline, on one thread, with nothing read from the user's folders."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SLURM_ARRAY_TASK_ID", "DIFFUSION_BLOB_LOGDIR", "DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("METRIC_CACHE_DIR", str(tmp_path / "truth-features"))


@pytest.fixture(autouse=True)
def no_run_stays_locked() -> Iterator[None]:
    """A loop that a test makes but does not run to its end holds its run; let go of it."""
    yield
    from improved_diffusion.training import run_lock

    run_lock.release_all()
