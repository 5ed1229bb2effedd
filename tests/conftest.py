"""Every test runs offline, on one thread, with nothing read from the user's folders."""

import os

os.environ.setdefault("WANDB_MODE", "disabled")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_ARRAY_TASK_ID", "DIFFUSION_BLOB_LOGDIR", "DATA_ROOT"):
        monkeypatch.delenv(name, raising=False)
