"""The point of the project on one machine, and then its whole chain.

First a pretrained network continues walks through mazes, with and without recalling what it has seen.
Then a small one is trained from nothing, and its first frames stand beside those of a pretrained one. Every
stage calls the function that its script calls, and prints the command that would do the same.
"""

from __future__ import annotations

import csv
import logging
import shlex
import time
from pathlib import Path

import numpy as np
import torch

from improved_diffusion.data import paths
from improved_diffusion.data.machine import default_device
from improved_diffusion.data.video_datasets import get_test_dataset
from improved_diffusion.evaluation import evaluate
from improved_diffusion.evaluation.gallery import make_gallery
from improved_diffusion.evaluation.laps import LAPS, PREDICTIONS
from improved_diffusion.evaluation.metric_tables import mean_and_error, read_info, read_table
from improved_diffusion.evaluation.metrics import psnr
from improved_diffusion.evaluation.options import EvalConfig, GifConfig, ReportConfig
from improved_diffusion.evaluation.report.page import write_report
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import EvalDir
from improved_diffusion.sampling.trained_model import (
    TrainedModel,
    create_diffusion,
    create_model,
    stored_dataset,
)
from improved_diffusion.sampling.video_sampling import sample_dataset
from improved_diffusion.study.commands import in_place_of, parse
from improved_diffusion.study.held_out import BOUND, LEVELS, held_out_errors
from improved_diffusion.study.options import DemoConfig
from improved_diffusion.study.training_comparison import Recipe, parse_recipe
from improved_diffusion.training.start import train_run

logger = logging.getLogger(__name__)

LAST_FRAME = PREDICTIONS[-1]
# Equal numbers of frames per call; the second gives most of them to what followed a moment like this.
MAZE_STRATEGIES = (
    "--inference_mode autoreg",
    "--inference_mode recall-autoreg --distance l2 --recall_recent 1 --recall_window 6 "
    "--recall_from observed",
)
# Six calls of this solver are as good as ten of others in these videos (docs/sampling.md).
MAZE_SAMPLING = (
    "--T {maze_T} --obs_length 60 --step_size 3 --max_frames 7 --sampler ipndm4 "
    "--spacing logsnr --timestep_respacing {maze_timesteps} --seed {seed} "
    "--indices {indices} --device '{device}'"
)

RUN_ID = "demo"
DATASET = "bouncy_balls"
EMA_RATE = "0.9999"
SHOWN_FRAMES = (1, 2, 4, 8)  # predicted frames in the closing table, beside the last one
CHUNK_S = 100  # training looks at the clock about so often

# Frames of 16x16 and six of them in a call: a size at which minutes of a CPU teach something.
TRAINING = (
    "--config scripts/configs/fast.json --dataset=bouncy_balls --image_size 16 --num_channels 32 "
    "--num_res_blocks 1 --attention_resolutions 8 --batch_size 4 --max_frames 6 "
    "--log_sigma_mean 0.3 --num_workers 0 --sample_interval 0 --save_latest_only True "
    "--seed {seed} --resume_id {run_id}"
)
# A frame at a time after the last five: of six ways the one that came nearest to other videos' truth.
SAMPLING = (
    "--inference_mode autoreg --T {T} --obs_length {obs_length} --step_size 1 --max_frames 6 "
    "--sampler ipndm4 --timestep_respacing {timesteps} --spacing logsnr --seed {seed} "
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
    began = time.perf_counter()
    checkpoint = _pretrained(config.maze_checkpoint, "maze_laps", "maze_checkpoint")
    indices = " ".join(map(str, config.maze_indices))
    sampling = MAZE_SAMPLING.format(**vars(config), indices=indices)
    folders = [
        _sampled([checkpoint, *shlex.split(f"{strategy} {sampling}")])
        for strategy in MAZE_STRATEGIES
    ]
    _scored(folders, "lap_psnr")
    names = list(map(str, folders))
    gif, page = folders[0].parent / "laps.gif", folders[0].parent / "report.html"
    shown = ["--add_gt", "--grid", "--every", "2", "--fps", "8"]  # small enough for a README
    _gallery(["--eval_dir", *names, *shown, "--out", str(gif)])
    words = ["--eval_dir", *names, "--out", str(page), "--title", "Laps of a maze"]
    with in_place_of("video_report.py", words):
        (options,) = parse("video_report.py", words, ReportConfig)
        write_report(options)
    print(f"\nPSNR by lap, mean over videos (dB); lap 1 was observed\n{lap_table(config, folders)}")
    seconds = time.perf_counter() - began
    print(f"\nreport: {page}\ngif: {gif} (truth, then each strategy)\ntime: {seconds:.0f} s")


def _pretrained(given: str, dataset: str, flag: str) -> str:
    """A checkpoint that was given, or the one that comes with the repository, if it is there."""
    path = given or paths.pretrained_checkpoint(dataset, flag=flag)
    if not Path(path).exists():
        raise FileNotFoundError(f"--{flag} {path}: no such file")
    return path


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
    """Train, print held-out errors before and after, and first frames beside a pretrained network's."""
    began = time.perf_counter()
    balls = _pretrained(config.balls_checkpoint, DATASET, "balls_checkpoint")
    recipe = parse_recipe("video_train.py", _training_words(config))
    errors = {f"after {updates_made()} updates": measure(config, recipe)}
    train(config, recipe)
    errors[f"after {updates_made()} updates"] = measure(config, recipe)
    print(f"\n{error_table(errors)}")
    print("\nPSNR by predicted frame, mean over videos (dB)")
    words = shlex.split(SAMPLING.format(**vars(config)))
    for name, checkpoint in (("trained just now", trained_checkpoint()), ("pretrained", balls)):
        folder = _sampled([checkpoint, *words])
        _scored([folder], "psnr")
        _gallery(["--eval_dir", str(folder), "--add_gt", "--grid"])
        print(f"\n{first_frames(config, name, folder)}\nvideos: {folder / 'videos'}")
    seconds = time.perf_counter() - began
    print(f"\ncheckpoints: {paths.run_dir(RUN_ID)}\ntime: {seconds / 60:.1f} minutes")


def trained_checkpoint() -> str:
    """The average of the weights that the demonstration trains."""
    return paths.checkpoint_path(paths.run_dir(RUN_ID), paths.ema_kind(EMA_RATE), None)


def _training_words(config: DemoConfig) -> list[str]:
    return shlex.split(TRAINING.format(seed=config.seed, run_id=RUN_ID))


def train(config: DemoConfig, recipe: Recipe) -> None:
    """Train for about `config.minutes`, in chunks whose updates fit the time as the last one tells it."""
    began, chunk = time.perf_counter(), config.warm_up_updates
    while chunk:
        words = [*_training_words(config), "--max_steps", str(updates_made() + chunk)]
        chunk_began = time.perf_counter()
        with in_place_of("video_train.py", words):
            chosen = parse_recipe(recipe.name, words)
            if train_run(chosen.train, chosen.data, chosen.model, chosen.diffusion):
                raise ValueError("training was interrupted: start again, and it goes on from there")
        now = time.perf_counter()
        speed = chunk / (now - chunk_began)
        chunk = max(0, int(speed * min(CHUNK_S, 60 * config.minutes - (now - began))))
    logger.info("%.0f s of training, %.2f updates/s at last", now - began, speed)


def measure(config: DemoConfig, recipe: Recipe) -> dict[str, float]:
    """Errors on held-out inference steps, of the run's average or, before it has begun, of its start."""
    device = default_device(config.device)
    if updates_made():
        denoiser = TrainedModel.load(trained_checkpoint(), device).denoiser()
    else:
        torch.manual_seed(recipe.train.seed)
        network = create_model(recipe.model).eval().to(device)
        denoiser = Denoiser(network, create_diffusion(recipe.diffusion))
    return held_out_errors(denoiser, recipe, config.queries, seed=config.seed, device=device)


def error_table(errors: dict[str, dict[str, float]]) -> str:
    """A line per measurement: squared errors by log SNR, and the bound."""
    heads = "".join(f"{level:>8}" for level in LEVELS)
    lines = [
        "squared error of predicted clean frames on held-out inference steps, by log SNR\n"
        f"{'':20}{heads}{BOUND:>10}"
    ]
    for name, found in errors.items():
        numbers = "".join(f"{found[str(level)]:8.4f}" for level in LEVELS)
        lines.append(f"{name:20}{numbers}{found[BOUND]:10.2f}")
    return "\n".join(lines)


def updates_made() -> int:
    """Updates that the run has made."""
    path = Path(paths.run_dir(RUN_ID)) / "progress.csv"
    if not path.exists():
        return 0
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return int(rows[-1]["step"]) if rows else 0


# ---------------------------------------------------------------- first frames


def first_frames(config: DemoConfig, name: str, folder: Path) -> str:
    """PSNR of predicted frames beside that of the last observed one, repeated, and who is ahead."""
    ours = read_table(table_path(folder, config.T))["psnr"][:, 0]
    size = stored_dataset(DATASET, EvalDir(folder).model_config()).image_size
    repeated = repeated_frame_psnr(config, folder, size)
    last = ours.shape[1]
    shown = [frame for frame in SHOWN_FRAMES if frame < last] + [last]
    heads = f"{f'{size}x{size}, frame':30}" + "".join(f"{frame:>7}" for frame in shown)
    lines = [f"{heads}    mean"]
    for label, values in ((name, ours), ("last observed frame repeated", repeated)):
        numbers = "".join(f"{value:7.1f}" for value in values.mean(axis=0)[np.array(shown) - 1])
        lines.append(f"{label:30}{numbers}{values.mean():8.2f}")
    mean, error = mean_and_error((ours - repeated).mean(axis=1))
    off = "" if error is None else f" +- {error:.2f}"
    return "\n".join([*lines, f"difference, paired over videos: {mean:+.2f}{off} dB"])


def repeated_frame_psnr(config: DemoConfig, folder: Path, image_size: int) -> np.ndarray:
    """[videos, predicted frames], of the videos in `folder`."""
    test_set = get_test_dataset(DATASET, T=config.T, image_size=image_size)
    rows = []
    for video in EvalDir(folder).samples():
        truth = test_set.read(video)
        last, predicted = truth[config.obs_length - 1], truth[config.obs_length :]
        repeated = np.ascontiguousarray(np.broadcast_to(last, predicted.shape))
        rows.append(psnr(repeated, predicted))
    return np.array(rows)


def table_path(eval_dir: Path, T: int) -> Path:
    """The table of all videos there; others may be left of runs with fewer videos."""
    return paths.metrics_path(eval_dir, len(EvalDir(eval_dir).samples()), 1, T)


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
