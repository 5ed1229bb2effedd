"""The point of the project on one machine, and then its whole chain.

First a pretrained network continues walks through mazes, with and without recalling what it has seen.
Then a small one is trained from nothing, samples, and is scored. Every stage calls the function that
its script calls, and prints the command that would do the same.
"""

from __future__ import annotations

import csv
import logging
import shlex
import time
from pathlib import Path

import numpy as np

from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig
from improved_diffusion.data import paths
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.evaluation import evaluate
from improved_diffusion.evaluation.gallery import make_gallery
from improved_diffusion.evaluation.laps import LAPS, PREDICTIONS
from improved_diffusion.evaluation.metric_tables import read_info, read_table
from improved_diffusion.evaluation.metrics import psnr
from improved_diffusion.evaluation.options import EvalConfig, GifConfig, ReportConfig
from improved_diffusion.evaluation.report.page import write_report
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.video_sampling import sample_dataset
from improved_diffusion.study.commands import in_place_of, parse
from improved_diffusion.study.options import DemoConfig
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.start import create_train_loop

logger = logging.getLogger(__name__)

LAST_FRAME = PREDICTIONS[-1]
# Equal numbers of frames per call; the second gives most of them to what followed a moment like this.
MAZE_STRATEGIES = (
    "--inference_mode autoreg",
    "--inference_mode recall-autoreg --distance l2 --recall_recent 1 --recall_window 6 "
    "--recall_from observed",
)
MAZE_SAMPLING = (
    "--T {maze_T} --obs_length 60 --step_size 3 --max_frames 7 --sampler {sampler} "
    "--spacing logsnr --timestep_respacing {maze_timesteps} --seed {seed} "
    "--subset_size {maze_videos} --batch_size {maze_videos} --device '{device}'"
)

RUN_ID = "demo"
DATASET = "bouncy_balls"
STRATEGIES = ("autoreg", "hierarchy-2")
SAMPLER, EMA_RATE = "dpmpp2m", "0.995"
SHOWN_FRAMES = (1, 2, 4, 8)  # predicted frames in the closing table, beside the last one

# A network small enough for a CPU. Predicting clean frames under a cosine schedule gives the
# frames' overall colour from the first updates on, which predicting the noise learns last.
TRAINING = (
    "--dataset={dataset} --num_channels 32 --num_res_blocks 1 --batch_size 4 "
    "--max_frames {max_frames} --T {T} --predict_xstart True --noise_schedule cosine "
    "--diffusion_steps 250 --lr 1e-3 --ema_rate {ema_rate} --ema_warmup True --num_workers 0 "
    "--sample_interval 0 --save_latest_only True --seed {seed} --resume_id {run_id}"
)
SAMPLING = (
    "--inference_mode {strategy} --T {T} --obs_length {obs_length} --step_size {step_size} "
    "--max_frames {max_frames} --sampler {sampler} --timestep_respacing {timesteps} --seed {seed} "
    "--subset_size {num_videos} --batch_size {num_videos} --device '{device}'"
)


def run_demo(config: DemoConfig) -> None:
    """Show what recalling brings; then train for `config.minutes`, if any, and show what comes of it.

    Works in the current directory and goes on from what an earlier call has left there. Raises
    ValueError or OSError for a user's mistake, and ValueError where training was interrupted.
    """
    show_memory(config)
    if config.minutes > 0:
        show_training(config)


# ---------------------------------------------------------------- memory


def show_memory(config: DemoConfig) -> None:
    """Continue observed laps by strategies that do and do not recall; print PSNR by lap, write pictures."""
    if not Path(config.maze_checkpoint).exists():
        raise FileNotFoundError(
            f"{config.maze_checkpoint} is not there: start in the repository's root, or give "
            "--maze_checkpoint"
        )
    began = time.perf_counter()
    sampling = MAZE_SAMPLING.format(**vars(config), sampler=SAMPLER)
    folders = [
        _sampled([config.maze_checkpoint, *shlex.split(f"{strategy} {sampling}")])
        for strategy in MAZE_STRATEGIES
    ]
    _scored(folders, "lap_psnr")
    names = list(map(str, folders))
    gif, page = folders[0].parent / "laps.gif", folders[0].parent / "report.html"
    _gallery(["--eval_dir", *names, "--add_gt", "--grid", "--out", str(gif)])
    words = ["--eval_dir", *names, "--out", str(page), "--title", "Laps of a maze"]
    with in_place_of("video_report.py", words):
        (options,) = parse("video_report.py", words, ReportConfig)
        write_report(options)
    print(f"\nPSNR by lap, mean over videos (dB); lap 1 was observed\n{lap_table(config, folders)}")
    seconds = time.perf_counter() - began
    print(f"\nreport: {page}\ngif: {gif} (truth, then each strategy)\ntime: {seconds:.0f} s")


def lap_table(config: DemoConfig, folders: list[Path]) -> str:
    """A line per strategy, and one for repeating the last observed frame."""
    lines = [f"{'':30}" + "".join(f"{f'lap {lap}':>8}" for lap in LAPS)]
    for folder in folders:
        table = table_path(folder, config.maze_T).with_suffix(".json")
        columns = read_info(table)["metrics"]["lap_psnr"]["columns"]
        means = {column["name"]: column["mean"] for column in columns}
        lines.append(_lap_line(folder.name.split("_")[0], means, "samples"))
    return "\n".join([*lines, _lap_line("last observed frame repeated", means, LAST_FRAME)])


def _lap_line(name: str, means: dict[str, float | None], predicted_by: str) -> str:
    values = [means[f"lap {lap}: {predicted_by}"] for lap in LAPS]  # None: the video ends before
    return f"{name:30}" + "".join(f"{'-' if v is None else format(v, '.1f'):>8}" for v in values)


# ---------------------------------------------------------------- training


def show_training(config: DemoConfig) -> None:
    """Train for `config.minutes`, sample with two strategies, score them, write gifs, say where all is."""
    began = time.perf_counter()
    checkpoint = train(config)
    eval_dirs = []
    for strategy in STRATEGIES:
        eval_dirs.append(sample(config, checkpoint, strategy))
        _scored(eval_dirs[-1:], "psnr", "ssim")
        _gallery(["--eval_dir", str(eval_dirs[-1]), "--add_gt", "--grid"])
    report(config, eval_dirs, time.perf_counter() - began)


def train(config: DemoConfig) -> str:
    """Train the demo's network for about `config.minutes`; returns the EMA checkpoint's path.

    A few updates measure the speed; the rest anneals the learning rate over what the time allows.
    """
    if updates_made() < config.warm_up_updates:
        _train_until(config, f"--max_steps {config.warm_up_updates}")
    speed = float(progress()[-1]["steps_per_second"])
    updates = config.warm_up_updates + max(1, int(60 * config.minutes * speed))
    logger.info("this machine makes %.2f steps/s: training %d steps", speed, updates)
    _train_until(config, f"--lr_anneal_steps {updates}")
    return paths.checkpoint_path(paths.run_dir(RUN_ID), paths.ema_kind(EMA_RATE), None)


def _train_until(config: DemoConfig, limit: str) -> None:
    fixed = {"dataset": DATASET, "ema_rate": EMA_RATE, "run_id": RUN_ID}
    words = shlex.split(f"{TRAINING.format(**vars(config), **fixed)} {limit}")
    groups = TrainConfig, DataConfig, ModelConfig, DiffusionConfig
    with in_place_of("video_train.py", words):
        options = parse("video_train.py", words, *groups)
        if create_train_loop(*options).run_loop():
            raise ValueError("training was interrupted: start again, and it goes on from there")


def sample(config: DemoConfig, checkpoint: str, strategy: str) -> Path:
    """Sample the test videos with one strategy; returns the evaluation directory."""
    fixed = {"strategy": strategy, "sampler": SAMPLER}
    return _sampled([checkpoint, *shlex.split(SAMPLING.format(**vars(config), **fixed))])


# ---------------------------------------------------------------- commands


def _sampled(words: list[str]) -> Path:
    """Do what video_sample.py does; returns the evaluation directory."""
    with in_place_of("video_sample.py", words):
        (options,) = parse("video_sample.py", words, SampleConfig)
        return sample_dataset(options).path


def _scored(eval_dirs: list[Path], *modes: str) -> None:
    """Print and store the scores of evaluation directories."""
    words = ["--eval_dir", *map(str, eval_dirs), "--modes", *modes]
    with in_place_of("video_eval.py", words):
        (options,) = parse("video_eval.py", words, EvalConfig)
        evaluate.run(options)


def _gallery(words: list[str]) -> None:
    """Write samples beside the truth as videos."""
    with in_place_of("video_make_gif.py", words):
        (options,) = parse("video_make_gif.py", words, GifConfig)
        make_gallery(options)


# ---------------------------------------------------------------- what came of it


def progress() -> list[dict[str, str]]:
    """The rows of the run's progress.csv; none where it has not been started."""
    path = Path(paths.run_dir(RUN_ID)) / "progress.csv"
    if not path.exists():
        return []
    with path.open() as file:
        return list(csv.DictReader(file))


def updates_made() -> int:
    """Updates that the run has made."""
    rows = progress()
    return int(rows[-1]["step"]) if rows else 0


def report(config: DemoConfig, eval_dirs: list[Path], seconds: float) -> None:
    """Print losses, scores beside those of a standing picture, and where everything is."""
    losses = [float(row["mse"]) for row in progress()]
    print(
        f"\ntraining: {updates_made()} steps, denoising loss {losses[0]:.4f} at first, "
        f"{losses[-1]:.4f} at last"
    )
    tables = {folder: table_path(folder, config.T) for folder in eval_dirs}
    for folder, table in tables.items():
        print(f"\n{folder.name}\n{evaluate.format_table(table)}")
        print(f"videos: {folder / 'videos'}  samples: {folder / 'samples'}")
    curves = {folder.name.split("_")[0]: frame_psnr(table) for folder, table in tables.items()}
    curves["last observed frame repeated"] = repeated_frame_psnr(config, eval_dirs[0])
    last = config.T - config.obs_length
    shown = [frame for frame in SHOWN_FRAMES if frame < last] + [last]
    print("\nPSNR by predicted frame, mean over videos (dB)")
    for name, values in curves.items():
        row = " ".join(f"{values[frame - 1]:5.1f}" for frame in shown)
        frames = ", ".join(map(str, shown))
        print(f"{name:30} frames {frames}: {row}   all: {values.mean():5.2f}")
    print(f"\ncheckpoints: {paths.run_dir(RUN_ID)}\ntotal time: {seconds / 60:.1f} minutes")


def table_path(eval_dir: Path, T: int) -> Path:
    """The table of all videos there; others may be left of runs with fewer videos."""
    return paths.metrics_path(eval_dir, len(EvalDir(eval_dir).samples()), 1, T)


def frame_psnr(table: Path) -> np.ndarray:
    """Mean PSNR over videos [predicted frames]."""
    return read_table(table)["psnr"].mean(axis=(0, 1))


def repeated_frame_psnr(config: DemoConfig, eval_dir: Path) -> np.ndarray:
    """The same for predictions that repeat the last observed frame."""
    test_set = get_test_dataset(DATASET, T=config.T)
    rows = []
    for video in EvalDir(eval_dir).samples():
        truth = test_set.read(video)
        last, predicted = truth[config.obs_length - 1], truth[config.obs_length :]
        repeated = np.ascontiguousarray(np.broadcast_to(last, predicted.shape))
        rows.append(psnr(repeated, predicted))
    return np.mean(rows, axis=0)
