"""Training the pose network on true videos, and how well it does on videos that it has not seen."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from improved_diffusion.data.dataset_files import VideoFiles, dataset_spec, prepare_dataset
from improved_diffusion.data.machine import default_device
from improved_diffusion.data.walks import (
    GAP_FRAMES,
    far_apart,
    load_poses,
    near_poses,
    relative_poses,
    within,
)
from improved_diffusion.evaluation.options import PoseConfig
from improved_diffusion.evaluation.places import best_matches
from improved_diffusion.evaluation.pose_network import (
    OVERLAP_CELLS,
    OVERLAP_RADIANS,
    PoseJudge,
    PoseNetwork,
    Walks,
    as_input,
    load_pose_network,
    save_pose_network,
)

logger = logging.getLogger(__name__)

ANCHORS = 4  # of each video in a batch; each with three frames chosen for it
NEARBY_FRAMES = 12  # one of them is at most so much later
WEIGHT_OF_RELATIVE = 4.0  # of the relative pose's error in the loss, where the views overlap
CALIBRATION_VIDEOS = 40  # training videos of each data set that the threshold is set on


def train_and_test(config: PoseConfig) -> None:
    """Train a pose network, write it to `config.out`, and print its accuracy on test videos.

    With `config.updates` 0 the network in that file is tested. Raises ValueError or
    FileNotFoundError for a user's mistake.
    """
    device = default_device(config.device)
    if config.updates:
        judge = train(config, device)
        save_pose_network(config.out, judge.network, judge.walks)
        logger.info("wrote %s", config.out)
    judge = load_pose_network(config.out, device)
    print(format_accuracy({name: accuracy(judge, files) for name, files in _files(config, "test")}))


def _files(config: PoseConfig, partition: str) -> list[tuple[str, VideoFiles]]:
    """(name, videos) of each data set."""
    found = []
    for name in config.dataset:
        spec = dataset_spec(name)
        prepare_dataset(spec)
        found.append((name, VideoFiles(spec, partition)))
    return found


# ---------------------------------------------------------------- training


def train(config: PoseConfig, device: str) -> PoseJudge:
    """A network trained on the training videos, its threshold set."""
    from tqdm import trange

    sets = _files(config, "train")
    poses = [[load_poses(path) for path in files.paths] for _, files in sets]
    walks = _known_walks(config.dataset, [walk for each in poses for walk in each])
    rng = np.random.default_rng(config.seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        network = PoseNetwork().to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=config.lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, config.lr, total_steps=config.updates + 1, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(config.seed)
    bar = trange(config.updates, desc="training", unit="update")
    for _ in bar:
        frames, relative = _batch(sets, poses, config.batch_size, rng)
        told = _all_pairs(network, degrade(as_input(frames), generator).to(device))
        loss = pose_loss(told, relative.to(device))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    judge = PoseJudge(network, walks, device)
    calibrate(judge, sets)
    return judge


def _known_walks(names: Sequence[str], poses: Sequence[np.ndarray]) -> Walks:
    """The data sets and their longest step and largest turn."""
    steps = [np.diff(walk[:, :2], axis=0) for walk in poses]
    turns = [(np.diff(walk[:, 2]) + np.pi) % (2 * np.pi) - np.pi for walk in poses]
    return Walks(
        tuple(names),
        float(max(np.hypot(*step.T).max() for step in steps)),
        float(max(np.abs(turn).max() for turn in turns)),
    )


def _batch(
    sets: list[tuple[str, VideoFiles]],
    poses: list[list[np.ndarray]],
    batch_size: int,
    rng: np.random.Generator,
) -> tuple[Tensor, Tensor]:
    """uint8 [B F, 3, H, W], F frames of each of B videos, and float32 [B, F, F, 3], `relative_poses`."""
    frames, relative = [], []
    for _ in range(batch_size):
        which = rng.integers(len(sets))
        files, index = sets[which][1], int(rng.integers(len(poses[which])))
        walk = poses[which][index]
        chosen = choose_frames(walk, rng)
        frames.append(files.read(files.open(index), chosen))
        relative.append(relative_poses(walk[chosen]))
    stacked = torch.from_numpy(np.concatenate(frames))
    return stacked, torch.from_numpy(np.stack(relative)).float()


def choose_frames(walk: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """int64 [4 ANCHORS]: random frames of a walk [T, 3], each with the next one, one soon after, and
    one that returns to its place much earlier or later (a random one where none does)."""
    last = len(walk) - 1
    anchors = rng.integers(last, size=ANCHORS)
    soon = np.minimum(anchors + rng.integers(2, NEARBY_FRAMES + 1, size=ANCHORS), last)
    others = []
    for anchor in anchors:
        relative = relative_poses(walk[[anchor]], walk)[0]
        far = np.abs(np.arange(len(walk)) - anchor) > GAP_FRAMES
        returns = np.flatnonzero(within(relative) & far)
        others.append(rng.choice(returns) if len(returns) else rng.integers(last + 1))
    return np.concatenate([anchors, anchors + 1, soon, others])


def degrade(frames: Tensor, generator: torch.Generator) -> Tensor:
    """Blur, dim and add noise to float frames [n, 3, H, W], each to another degree.

    Generated frames are not as crisp as those it is trained on.
    """

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(len(frames), 1, 1, 1, generator=generator)

    blurred = F.avg_pool2d(frames, 3, stride=1, padding=1, count_include_pad=False)
    frames = frames.lerp(blurred, uniform(-0.5, 1).clamp(min=0))
    noise = torch.randn(frames.shape, generator=generator)
    frames = frames + uniform(-0.1, 0.15).clamp(min=0) * noise
    return frames * uniform(0.9, 1.1) + uniform(-0.05, 0.05)


def _all_pairs(network: PoseNetwork, frames: Tensor) -> Tensor:
    """[B, F, F, 5]: every frame of a video with every other one; frames [B F, 3, 32, 32]."""
    per_video = 4 * ANCHORS
    first, second = (half.unflatten(0, (-1, per_video)) for half in network(frames))
    return network.compare(first[:, :, None], second[:, None])


def pose_loss(told: Tensor, relative: Tensor) -> Tensor:
    """The error of what the network told [..., 5], given relative poses [..., 3]."""
    truth = relative.cpu().numpy()
    same = torch.from_numpy(within(truth)).to(told)
    overlap = torch.from_numpy(within(truth, OVERLAP_CELLS, OVERLAP_RADIANS)).to(told)
    error = F.smooth_l1_loss(told[..., 2:], relative, reduction="none", beta=0.1).sum(dim=-1)
    return (
        F.binary_cross_entropy_with_logits(told[..., 0], same)
        + F.binary_cross_entropy_with_logits(told[..., 1], overlap)
        + WEIGHT_OF_RELATIVE * (error * overlap).sum() / overlap.sum().clamp(min=1)
    )


def calibrate(judge: PoseJudge, sets: Sequence[tuple[str, VideoFiles]]) -> None:
    """Move the threshold of `same`, so that as many frames return to a place as do in truth.

    A frame returns if any of many earlier ones shows its place: rare mistakes about pairs add up.
    Raises ValueError where all videos are too short to return in.
    """
    said, true = [], []
    for _, files in sets:
        for frames, poses in _videos(files, CALIBRATION_VIDEOS):
            said.append(best_matches(judge, frames, np.arange(len(frames)))[0])
            true.append((near_poses(poses) & far_apart(len(poses))).any(axis=1))
    if all(len(scores) <= GAP_FRAMES + 1 for scores in said):
        raise ValueError(
            f"--dataset: its videos are too short: more than {GAP_FRAMES + 1} frames are needed"
        )
    known = np.isfinite(np.concatenate(said))  # the first frames can return to none
    scores, share = np.sort(np.concatenate(said)[known]), np.concatenate(true)[known].mean()
    threshold = float(scores[min(int((1 - share) * len(scores)), len(scores) - 1)])
    with torch.no_grad():
        judge.network.get_parameter("pair.3.bias")[0] -= threshold


def _videos(files: VideoFiles, number: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """The first videos, each as `_video`."""
    return (_video(files, index) for index in range(min(len(files), number)))


def _video(files: VideoFiles, index: int) -> tuple[np.ndarray, np.ndarray]:
    """(frames uint8 [T, 3, H, W], poses [T, 3])."""
    video = files.open(index)
    return files.read(video, range(video.shape[0])), load_poses(files.paths[index])


# ---------------------------------------------------------------- accuracy


def accuracy(judge: PoseJudge, files: VideoFiles) -> dict[str, float]:
    """How well a network does on true videos, all of `files`.

    See `return_accuracy` and `step_accuracy`.
    """
    from tqdm import trange

    rng = np.random.default_rng(0)
    found, errors, steps, cuts = [], [], [], []
    for index in trange(len(files), desc=f"testing on {files.spec.name}", unit="video"):
        frames, poses = _video(files, index)
        score, earlier = best_matches(judge, frames, np.arange(len(frames)))
        true = near_poses(poses) & far_apart(len(poses))
        found.append(np.stack([score > 0, true[np.arange(len(true)), earlier], true.any(axis=1)]))
        relative, first = relative_poses(poses), np.arange(len(poses) - 1)
        step = judge.compare(frames, first, first + 1)
        errors.append(step.relative - relative[first, first + 1])
        steps.append(judge.is_jump(step))
        elsewhere = np.argwhere(~within(relative, OVERLAP_CELLS, OVERLAP_RADIANS))
        cut = rng.choice(elsewhere, size=min(len(first), len(elsewhere)))
        cuts.append(judge.is_jump(judge.compare(frames, *cut.T)))
    counts = {"videos": len(files)}
    jumps = np.concatenate(steps), np.concatenate(cuts)
    return counts | return_accuracy(*np.concatenate(found, axis=1)) | step_accuracy(errors, *jumps)


def return_accuracy(said: np.ndarray, right: np.ndarray, true: np.ndarray) -> dict[str, float]:
    """In percent of frames [n], as `place_returns` counts them.

    Args:
        said, true: bool [n]: which return to the place and heading of more than GAP_FRAMES before, as the
            network says, and in truth (`near_poses`).
        right: bool [n]: where the earlier frame that the network points to is one of those.
    """
    return {
        "return, true %": 100 * true.mean(),
        "return, said %": 100 * said.mean(),
        "said, right %": 100 * right[said].mean(),
        "true, found %": 100 * said[true].mean(),
    }


def step_accuracy(
    errors: Sequence[np.ndarray], jumps: np.ndarray, cuts: np.ndarray
) -> dict[str, float]:
    """Of neighbouring frames: median and 95 % quantile of the error of place, in cells, and of heading.

    Degrees. With the percentage that is said to be an impossible jump, and that of cuts, from a frame
    to a random one whose view does not overlap.
    """
    error = np.concatenate(errors)  # [n, 3], of relative poses
    place = np.quantile(np.hypot(error[:, 0], error[:, 1]), [0.5, 0.95])
    turn = np.degrees(np.quantile(np.abs(error[:, 2]), [0.5, 0.95]))
    return {
        "place, median": place[0],
        "place, 95 %": place[1],
        "heading, median": turn[0],
        "heading, 95 %": turn[1],
        "jumps, steps %": 100 * jumps.mean(),
        "jumps, cuts %": 100 * cuts.mean(),
    }


def format_accuracy(rows: dict[str, dict[str, float]]) -> str:
    """A line per measure of `accuracy`, a column per data set."""
    measures = next(iter(rows.values()))
    lines = [f"{'':20}" + "".join(f"{name:>14}" for name in rows)]
    lines += [
        f"{measure:20}" + "".join(f"{row[measure]:14.4g}" for row in rows.values())
        for measure in measures
    ]
    return "\n".join(lines)
