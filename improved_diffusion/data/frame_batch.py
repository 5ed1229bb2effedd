"""What the network is given, and the two directions between bytes and [-1, 1]."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar, overload

import numpy as np
import torch
from torch import Tensor

Frames = TypeVar("Frames", np.ndarray, Tensor)


@overload
def to_symmetric(frames: np.ndarray) -> np.ndarray: ...
@overload
def to_symmetric(frames: Tensor) -> Tensor: ...
def to_symmetric(frames: np.ndarray | Tensor) -> np.ndarray | Tensor:
    """uint8 in [0, 255], any shape, as float32 in [-1, 1]; arrays stay arrays, tensors tensors."""
    floats = frames.float() if isinstance(frames, Tensor) else frames.astype(np.float32)
    return floats / 127.5 - 1


def to_uint8(x: np.ndarray | Tensor) -> np.ndarray:
    """Round values in [-1, 1] (any shape; beyond is clipped) to uint8 in [0, 255].

    Raises ValueError for values that are not finite.
    """
    array = x if isinstance(x, np.ndarray) else x.detach().float().cpu().numpy()
    if not np.isfinite(array).all():
        raise ValueError("frames hold NaN or infinity: the weights or the sampler diverged")
    return np.clip(np.rint((array + 1) * 127.5), 0, 255).astype(np.uint8)


class SymmetricView:
    """uint8 videos seen as float32 in [-1, 1]; only the frames that are indexed are converted."""

    def __init__(self, videos: np.ndarray):
        self._videos, self.shape, self.ndim = videos, videos.shape, videos.ndim

    def __len__(self) -> int:
        return len(self._videos)

    def __getitem__(self, index: Any) -> np.ndarray:
        return to_symmetric(self._videos[index])


@dataclass(frozen=True)
class FrameBatch:
    """Some frames of each of B videos, and what the network knows of them.

    A frame in neither mask is padding: it is noised like the latent ones, and the network is told
    that it belongs to no video.

    Attributes:
        frames: clean frames, float32 [B, K, 3, H, W] in [-1, 1]. Those that are to be sampled may
            hold anything: nothing reads them but losses and bounds, and no network sees them.
        obs_mask, latent_mask: float32 [B, K, 1, 1, 1], 0 or 1.
        frame_indices: int64 [B, K], positions in the whole video; [1, K] where all videos share
            them, whose relative positions the network then embeds once.
    """

    frames: Tensor
    obs_mask: Tensor
    latent_mask: Tensor
    frame_indices: Tensor

    @classmethod
    def from_items(cls, items: Mapping[str, Tensor], device: torch.device | str) -> FrameBatch:
        """Training items as `TrainDataset` gives them, stacked: their bytes travel, not floats."""
        moved = {key: value.to(device, non_blocking=True) for key, value in items.items()}
        return cls(frames=to_symmetric(moved.pop("frames")), **moved)

    @classmethod
    def from_uint8(
        cls,
        frames: np.ndarray,
        frame_indices: np.ndarray,
        num_observed: int,
        device: torch.device | str = "cpu",
    ) -> FrameBatch:
        """Frames of which the first `num_observed` are observed and the others latent.

        frames: uint8 [B, K, 3, H, W]; frame_indices: int [B or 1, K].
        """
        clean = to_symmetric(torch.from_numpy(frames).to(device))
        obs_mask = torch.zeros(*clean.shape[:2], 1, 1, 1, device=device)
        obs_mask[:, :num_observed] = 1
        indices = torch.as_tensor(frame_indices, dtype=torch.int64, device=device)
        return cls(clean, obs_mask, 1 - obs_mask, indices)

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def device(self) -> torch.device:
        """Where the tensors are."""
        return self.frames.device

    @functools.cached_property
    def conditioning(self) -> dict[str, Tensor]:
        """The network's keyword arguments, by their published names; x0 holds observed frames only."""
        return {
            "x0": self.frames * self.obs_mask,
            "obs_mask": self.obs_mask,
            "latent_mask": self.latent_mask,
            "frame_indices": self.frame_indices,
        }

    def to(self, device: torch.device | str) -> FrameBatch:
        """The same on another device."""
        moved = {item.name: getattr(self, item.name).to(device) for item in fields(self)}
        return FrameBatch(**moved)

    def rows(self, rows: slice) -> FrameBatch:
        """The videos `rows` alone."""
        shared = len(self.frame_indices) < len(self)
        return FrameBatch(
            self.frames[rows],
            self.obs_mask[rows],
            self.latent_mask[rows],
            self.frame_indices if shared else self.frame_indices[rows],
        )

    def columns(self, order: Tensor) -> FrameBatch:
        """The frames `order` of every video (int or bool [k] or [1, k]), or of each its own (int [B, k])."""
        if order.ndim == 2 and len(order) > 1:
            index = order[:, :, None, None, None]
            return FrameBatch(
                torch.take_along_dim(self.frames, index, dim=1),
                torch.take_along_dim(self.obs_mask, index, dim=1),
                torch.take_along_dim(self.latent_mask, index, dim=1),
                torch.take_along_dim(self.frame_indices, order, dim=1),
            )
        order = order.flatten()
        return FrameBatch(*(getattr(self, item.name)[:, order] for item in fields(self)))

    def repeated(self, times: int) -> FrameBatch:
        """One video as a batch of `times`, without copying it. ValueError for several videos."""
        if len(self) != 1:
            raise ValueError(f"a batch of {len(self)} videos cannot be repeated, only one video")
        wide = {i.name: getattr(self, i.name) for i in fields(self)}
        return FrameBatch(**{n: v.expand(times, *v.shape[1:]) for n, v in wide.items()})

    def without_padding(self) -> FrameBatch:
        """One video's observed and latent frames, in the order of the video."""
        real = (self.obs_mask + self.latent_mask).flatten() > 0
        kept = self.columns(real)
        return kept.columns(kept.frame_indices[0].argsort())

    def with_padding_zeroed(self) -> FrameBatch:
        """The same with zeros in the frames that are in neither mask."""
        return replace(self, frames=self.frames * (self.obs_mask + self.latent_mask))
