"""A small network that tells from two frames of one video how their views differ.

It is trained on true videos with known poses (pose_training.py) and then judges generated ones, of which
no pose is known: whether neighbouring frames can follow each other, and which frames show the same place.
"""

from __future__ import annotations

import functools
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from improved_diffusion.data.paths import atomic_write

IMAGE_SIZE = 32  # larger frames are averaged down to it
# Pairs of poses beyond this have nothing in common that a relative pose could be told from.
OVERLAP_CELLS, OVERLAP_RADIANS = 1.5, np.pi / 4
# A step is impossible that is so many times as long, or turns so much more, than any true one.
JUMP_FACTOR = 2.0
DESCRIPTION, HIDDEN = 128, 256  # sizes of a frame's description and of what pairs are told from
PAIRS_CHUNK = 16384  # pairs that are compared at once: bounds memory, changes no value


@dataclass(frozen=True)
class Walks:
    """The true videos that a network knows."""

    datasets: tuple[str, ...]  # their data sets
    step: float  # the longest step from one frame to the next, in cells
    turn: float  # the largest turn, in radians


@dataclass(frozen=True)
class Comparison:
    """What the network says of n pairs of frames."""

    same: np.ndarray  # float32 [n]: above 0 where they show the same place and heading
    overlap: np.ndarray  # float32 [n]: above 0 where they show much the same
    relative: np.ndarray  # float32 [n, 3]: ahead, aside, turn (walks.relative_poses), if so


class PoseNetwork(nn.Module):
    """Describes each frame by a vector, and compares two vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.frame = nn.Sequential(
            nn.Conv2d(3, 32, 4, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            Residual(64),
            nn.Conv2d(64, 128, 3, stride=2, padding=1),
            Residual(128),
            nn.SiLU(),
            nn.Flatten(),
            nn.Linear(128 * (IMAGE_SIZE // 8) ** 2, DESCRIPTION),
        )
        # The first layer of a pair is linear in each frame: computed once a frame, not once a pair.
        self.first, self.second = (nn.Linear(DESCRIPTION, HIDDEN) for _ in range(2))
        self.pair = nn.Sequential(nn.SiLU(), nn.Linear(HIDDEN, 128), nn.SiLU(), nn.Linear(128, 5))

    def forward(self, frames: Tensor) -> tuple[Tensor, Tensor]:
        """[n, HIDDEN] twice, of frames [n, 3, 32, 32] in [-1, 1]: each as first, as second of a pair."""
        described = self.frame(frames)
        return self.first(described), self.second(described)

    def compare(self, first: Tensor, second: Tensor) -> Tensor:
        """[..., 5] of what `forward` gave: same, overlap, and the three of the relative pose."""
        return self.pair(first + second)


class Residual(nn.Module):
    """x plus what two convolutions add to it."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.SiLU(),
            nn.Conv2d(channels, channels, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


class PoseJudge:
    """A trained network with the walks that it knows."""

    def __init__(self, network: PoseNetwork, walks: Walks, device: str = "cpu") -> None:
        self.network, self.walks, self.device = network.to(device).eval(), walks, device

    def require_dataset(self, name: str) -> None:
        """Raise ValueError for a data set that the network was not trained on."""
        if name not in self.walks.datasets:
            raise ValueError(
                f"the pose network knows {', '.join(self.walks.datasets)}, not {name}: leave place "
                "metrics out, or train one: scripts/train_pose_network.py"
            )

    @torch.inference_mode()
    def compare(self, frames: np.ndarray, first: np.ndarray, second: np.ndarray) -> Comparison:
        """Compare frames[first[k]] with frames[second[k]], for each k.

        Args:
            frames: uint8 [T, 3, H, W], at least 32x32. Raises ValueError for smaller ones.
            first, second: int64 [n], indices of frames.
        """
        given = as_input(torch.from_numpy(np.ascontiguousarray(frames)).to(self.device))
        parts = [self.network(chunk) for chunk in given.split(64)]
        as_first, as_second = (torch.cat(halves) for halves in zip(*parts, strict=True))
        found = [
            self.network.compare(as_first[i], as_second[j])
            for i, j in zip(_chunks(first), _chunks(second), strict=True)
        ]
        told = torch.cat(found).cpu().numpy() if found else np.zeros((0, 5), np.float32)
        return Comparison(told[:, 0], told[:, 1], told[:, 2:])

    def is_jump(self, compared: Comparison) -> np.ndarray:
        """bool [n]: which pairs no walker could see one after the other."""
        ahead, aside, turn = compared.relative.T
        too_far = np.hypot(ahead, aside) > JUMP_FACTOR * self.walks.step
        return (compared.overlap <= 0) | too_far | (abs(turn) > JUMP_FACTOR * self.walks.turn)


def _chunks(indices: np.ndarray) -> list[Tensor]:
    return list(torch.from_numpy(indices).split(PAIRS_CHUNK)) if len(indices) else []


def as_input(frames: Tensor) -> Tensor:
    """float [n, 3, 32, 32] in [-1, 1] of uint8 [n, 3, H, W]; ValueError for smaller frames."""
    if min(frames.shape[-2:]) < IMAGE_SIZE:
        raise ValueError(
            f"the pose network needs frames of at least {IMAGE_SIZE}x{IMAGE_SIZE} pixels, not "
            f"{frames.shape[-2]}x{frames.shape[-1]}: leave place metrics out"
        )
    return F.adaptive_avg_pool2d(frames.float() / 127.5 - 1, IMAGE_SIZE)


# ---------------------------------------------------------------- files


def save_pose_network(path: str | os.PathLike[str], network: PoseNetwork, walks: Walks) -> None:
    """Write the weights, in half precision, and the walks they know."""
    state = {name: value.half().cpu() for name, value in network.state_dict().items()}
    with atomic_write(path) as file:
        torch.save({"state_dict": state, "walks": asdict(walks)}, file)


def load_pose_network(path: str | os.PathLike[str], device: str = "cpu") -> PoseJudge:
    """A trained network, loaded once per process, file and device.

    Raises FileNotFoundError for a missing file, ValueError for a foreign one.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path}: no such pose network: train one: scripts/train_pose_network.py"
        )
    return _load(path, device, path.stat().st_mtime_ns)


@functools.lru_cache(maxsize=1)
def _load(path: Path, device: str, _stamp: int) -> PoseJudge:
    """`_stamp` makes a file that was replaced load anew."""
    network = PoseNetwork()
    try:
        content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
        network.load_state_dict(content["state_dict"])
        walks = Walks(**content["walks"] | {"datasets": tuple(content["walks"]["datasets"])})
    except Exception as error:  # torch raises many types for bytes that are no such network
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"{path} is no pose network ({reason}): train one: scripts/train_pose_network.py"
        ) from None
    return PoseJudge(network, walks, device)
