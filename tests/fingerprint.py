"""Print a hash of everything that a fixed chain of commands computes, one line each.

    python tests/fingerprint.py --checkout <folder> --out <file>

Run it with the checkout of each of two commits on one machine and compare the files: a change that
is to leave behaviour alone must leave every line alone.
"""

import argparse
import csv
import hashlib
import os
import pickle
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch

TRAIN = (
    "--dataset bouncy_balls --num_channels 32 --num_res_blocks 1 --max_frames 8 --T 30 --batch_size 2 "
    "--num_workers 0 --max_steps 20 --log_interval 1 --save_interval 10 --sample_interval 0 "
    "--ema_rate 0.9,0.999 --resume_id fingerprint"
)
TRAIN_VARIANTS = {
    "eps": "",
    "xstart": "--predict_xstart True --noise_schedule cosine --grad_clip 1",
    "sigma": "--learn_sigma True --microbatch 1 --schedule_sampler loss-second-moment",
}
SAMPLERS = {"ddpm": 10, "ddim": 10, "dpmpp2m": 10, "heun": 6}
STRATEGIES = (
    "hierarchy-2",
    "adaptive-autoreg --distance l2",
    "gibbs",
    "goal-directed-autoreg --max_frames 12",
)
SAMPLE = "--T 20 --obs_length 5 --step_size 3 --subset_size 2 --device cpu"


def digest(array: np.ndarray) -> str:
    """A short hash of type, shape and values."""
    value = hashlib.sha256(f"{array.dtype} {array.shape}".encode())
    value.update(np.ascontiguousarray(array).tobytes())
    return value.hexdigest()[:16]


class Chain:
    """Runs the scripts of one checkout in an empty folder."""

    def __init__(self, checkout: Path, folder: Path):
        self.checkout, self.folder = checkout, folder
        self.environment = os.environ | {
            "PYTHONPATH": str(checkout),
            "WANDB_MODE": "disabled",
            "OMP_NUM_THREADS": "1",
            "METRIC_CACHE_DIR": str(
                folder / "truth-features"
            ),  # not what another checkout computed
        }

    def run(self, script: str, options: str) -> str:
        """What the script prints; CalledProcessError with its messages where it fails."""
        command = [sys.executable, str(self.checkout / "scripts" / script), *options.split()]
        done = subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True
        )
        if done.returncode:
            sys.exit(f"{script} {options}\n{done.stderr}")
        return done.stdout

    def train(self, options: str) -> None:
        shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        self.run("video_train.py", f"{TRAIN} {options}")


def training_lines(chain: Chain):
    """Losses of twenty updates, and the final weights, averages and optimiser."""
    for name, options in TRAIN_VARIANTS.items():
        chain.train(options)
        run = chain.folder / "checkpoints" / "fingerprint"
        rows = list(csv.DictReader((run / "progress.csv").open()))
        for column in ("loss", "mse", "eval-mse", "vb", "grad_norm"):
            values = [row.get(column, "") for row in rows]
            yield (
                f"train {name} {column}",
                hashlib.sha256(" ".join(values).encode()).hexdigest()[:16],
            )
        for kind in ("model", "ema_0.9", "ema_0.999"):
            state = torch.load(run / f"{kind}_000020.pt", weights_only=True)["state_dict"]
            flat = torch.cat([value.flatten().float() for value in state.values()]).numpy()
            yield f"train {name} {kind}", digest(flat)


def sampling_lines(chain: Chain, network: str):
    """Samples of every sampler and some strategies, and tables of their scores."""
    runs = [(f"autoreg --sampler {sampler}", steps) for sampler, steps in SAMPLERS.items()]
    runs += [(f"{strategy} --sampler dpmpp2m", 3) for strategy in STRATEGIES]
    for number, (strategy, steps) in enumerate(runs):
        base = f"out/{number}"
        options = f"{network} --inference_mode {strategy} --timestep_respacing {steps} {SAMPLE} --eval_dir {base}"
        chain.run("video_sample.py", options)
        (folder,) = (chain.folder / base).iterdir()
        for path in sorted((folder / "samples").glob("*.npy")):
            yield f"sample {strategy} {folder.name} {path.name}", digest(np.load(path))
        modes = (
            "psnr ssim lpips fvd kvd"
            if os.environ.get("METRIC_WEIGHTS_DIR") and number == 0
            else "psnr ssim"
        )
        chain.run("video_eval.py", f"--eval_dir {folder} --modes {modes}")
        (table,) = folder.glob("metrics_*.pkl")
        for name, values in pickle.loads(table.read_bytes()).items():
            yield f"table {strategy} {name}", digest(values)
        text = table.with_suffix(".json").read_text().replace(str(chain.folder), "")
        yield f"table {strategy} json", hashlib.sha256(text.encode()).hexdigest()[:16]


def bound_lines(chain: Chain, network: str):
    """A bound, and one step of the search for an optimal schedule."""
    options = "--inference_mode autoreg --T 12 --obs_length 5 --step_size 4 --device cpu"
    chain.run(
        "video_nll.py",
        f"{network} {options} --subset_size 1 --timestep_respacing 5 --eval_dir out/elbo",
    )
    for path in sorted((chain.folder / "out" / "elbo").rglob("elbo_*.npy")):
        yield f"bound {path.name}", digest(np.load(path))
    search = "--num_videos 2 --num_timesteps 2 --eval_dir out/optimal"
    chain.environment["SLURM_ARRAY_TASK_ID"] = "1"
    chain.run("video_optimal_schedule.py", f"{network} {options} {search}")
    del chain.environment["SLURM_ARRAY_TASK_ID"]
    for path in sorted((chain.folder / "out" / "optimal").rglob("step_*.json")):
        yield f"schedule {path.name}", hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkout", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    checkout = args.checkout.resolve()
    with tempfile.TemporaryDirectory() as folder, args.out.open("w") as out:
        chain = Chain(checkout, Path(folder))
        shutil.copytree(checkout / "checkpoints" / "pretrained", Path(folder) / "pretrained")
        network = "pretrained/bouncy_balls/ema_0.99_latest.pt"
        for lines in (
            sampling_lines(chain, network),
            bound_lines(chain, network),
            training_lines(chain),
        ):
            for name, value in lines:
                print(f"{name}: {value}", file=out, flush=True)


if __name__ == "__main__":
    main()
