"""The whole chain on one machine: data, training, sampling, scores and videos, by the documented commands."""

from __future__ import annotations

import csv
import logging
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.evaluation.evaluate import format_table
from improved_diffusion.evaluation.metric_tables import read_table
from improved_diffusion.evaluation.metrics import psnr
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.study.options import DemoConfig

logger = logging.getLogger(__name__)

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
RUN_ID = "demo"
STRATEGIES = ("autoreg", "hierarchy-2")
T, OBS_LENGTH, MAX_FRAMES, STEP_SIZE = 20, 8, 16, 6
WARM_UP_STEPS = 20  # steps that measure the speed of this machine

# A network small enough for a CPU. Predicting clean frames under a cosine schedule gives the
# frames' overall colour from the first steps on, which predicting the noise learns last.
TRAINING = (
    "--dataset=bouncy_balls --num_channels 32 --num_res_blocks 1 --batch_size 4 "
    f"--max_frames {MAX_FRAMES} --T {T} --predict_xstart True --noise_schedule cosine "
    "--diffusion_steps 250 --lr 1e-3 --ema_rate 0.995 --ema_warmup True --num_workers 0 "
    "--sample_interval 0 --save_latest_only True"
)
SAMPLING = (
    f"--T {T} --obs_length {OBS_LENGTH} --step_size {STEP_SIZE} --max_frames {MAX_FRAMES} "
    "--sampler dpmpp2m --timestep_respacing 20"
)


def run_script(name: str, options: str) -> None:
    """Run one of the project's scripts as a user would; raise ValueError where it fails."""
    command = ["python", f"scripts/{name}", *shlex.split(options)]
    logger.info("\n$ %s", shlex.join(command))
    done = subprocess.run([sys.executable, str(SCRIPTS / name), *shlex.split(options)])
    if done.returncode:
        raise ValueError(
            f"scripts/{name} ended with exit code {done.returncode}: see its message above"
        )


def run_demo(config: DemoConfig) -> None:
    """Train for `config.minutes`, sample with two strategies, score them, write gifs, say where all is."""
    began = time.perf_counter()
    checkpoint = train(config)
    eval_dirs = []
    for strategy in STRATEGIES:
        run_script(
            "video_sample.py",
            f"{shlex.quote(checkpoint)} --inference_mode {strategy} {SAMPLING} --seed {config.seed} "
            f"--subset_size {config.num_videos} --batch_size {config.num_videos} --device '{config.device}'",
        )
        base = paths.results_dir(checkpoint, trained_steps(), "_dpmpp2m_respace20")
        eval_dirs.append(
            base / paths.inference_mode_str(strategy, MAX_FRAMES, STEP_SIZE, T, OBS_LENGTH)
        )
        quoted = shlex.quote(str(eval_dirs[-1]))
        run_script("video_eval.py", f"--eval_dir {quoted} --modes psnr ssim")
        run_script("video_make_gif.py", f"--eval_dir {quoted} --add_gt --grid")
    report(eval_dirs, time.perf_counter() - began)


def train(config: DemoConfig) -> str:
    """Train the demo's network for about `config.minutes`; returns the EMA checkpoint's path.

    A few steps measure the speed; the rest anneals the learning rate over what the time allows.
    """
    common = f"{TRAINING} --seed {config.seed} --resume_id {RUN_ID}"
    if trained_steps() < WARM_UP_STEPS:
        run_script("video_train.py", f"{common} --max_steps {WARM_UP_STEPS}")
    speed = float(progress()[-1]["steps_per_second"])
    steps = WARM_UP_STEPS + max(1, int(60 * config.minutes * speed))
    logger.info("this machine makes %.2f steps/s: training %d steps", speed, steps)
    run_script("video_train.py", f"{common} --lr_anneal_steps {steps}")
    return paths.checkpoint_path(paths.run_dir(RUN_ID), paths.ema_kind("0.995"), None)


def progress() -> list[dict[str, str]]:
    """The rows of the run's progress.csv; none where it has not been started."""
    path = Path(paths.run_dir(RUN_ID)) / "progress.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def trained_steps() -> int:
    """Steps that the run has made."""
    rows = progress()
    return int(rows[-1]["step"]) if rows else 0


def report(eval_dirs: list[Path], seconds: float) -> None:
    """Print losses, scores beside those of a standing picture, and where everything is."""
    losses = [float(row["mse"]) for row in progress()]
    print(
        f"\ntraining: {trained_steps()} steps, denoising loss {losses[0]:.4f} at first, {losses[-1]:.4f} at last"
    )
    for eval_dir in eval_dirs:
        print(f"\n{eval_dir.name}\n{format_table(table_path(eval_dir))}")
        print(f"videos: {eval_dir / 'videos'}  samples: {eval_dir / 'samples'}")
    print("\nPSNR by predicted frame, mean over videos (dB)")
    curves = {d.name.split("_")[0]: frame_psnr(d) for d in eval_dirs}
    curves["last observed frame repeated"] = repeated_frame_psnr(eval_dirs[0])
    for name, values in curves.items():
        shown = " ".join(f"{values[i]:5.1f}" for i in (0, 1, 3, 7, len(values) - 1))
        print(f"{name:30} frames 1, 2, 4, 8, {len(values)}: {shown}   all: {values.mean():5.2f}")
    print(f"\ncheckpoints: {paths.run_dir(RUN_ID)}\ntotal time: {seconds / 60:.1f} minutes")


def table_path(eval_dir: Path) -> Path:
    """The table of all videos there; others may be left of runs with fewer videos."""
    return paths.metrics_path(eval_dir, len(EvalDir(eval_dir).samples()), 1, T)


def frame_psnr(eval_dir: Path) -> np.ndarray:
    """Mean PSNR over videos [predicted frames], from the table."""
    return read_table(table_path(eval_dir))["psnr"].mean(axis=(0, 1))


def repeated_frame_psnr(eval_dir: Path) -> np.ndarray:
    """The same for predictions that repeat the last observed frame."""
    test_set = get_test_dataset("bouncy_balls", T=T)
    rows = []
    for video in EvalDir(eval_dir).samples():
        truth = test_set.read(video)
        last = np.broadcast_to(truth[OBS_LENGTH - 1], truth[OBS_LENGTH:].shape)
        rows.append(psnr(np.ascontiguousarray(last), truth[OBS_LENGTH:]))
    return np.mean(rows, axis=0)
