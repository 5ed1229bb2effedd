"""Every test runs offline, on one thread, with nothing read from the user's folders."""

import os
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

if not torch.cuda.is_available():  # kernels run in Python; read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("SLURM_ARRAY_TASK_ID", "DIFFUSION_BLOB_LOGDIR", "DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("METRIC_CACHE_DIR", str(tmp_path / "truth-features"))


@pytest.fixture
def videos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A data set to train on; checkpoints go below tmp_path, wandb is off."""
    from train_runs import make_videos

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    return make_videos(tmp_path / "videos")


@pytest.fixture
def random_alexnet(tmp_path: Path) -> Path:
    """The file of an AlexNet that knows nothing."""
    from helpers import write_random_alexnet

    return write_random_alexnet(tmp_path)


@pytest.fixture(autouse=True)
def no_run_stays_locked() -> Iterator[None]:
    """A loop that a test makes but does not run to its end holds its run; let go of it."""
    yield
    from improved_diffusion.training import run_lock

    run_lock.release_all()
