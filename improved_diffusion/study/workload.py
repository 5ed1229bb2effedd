"""What the benchmark measures: networks and data of the sizes of the documented training commands."""

from __future__ import annotations

import contextlib
import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from improved_diffusion import fp16_util
from improved_diffusion.config import DiffusionConfig, ModelConfig
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.trained_model import create_diffusion, create_model
from improved_diffusion.study.options import BenchmarkConfig


@dataclass(frozen=True)
class Size:
    """The network and the data of one training command; batch_size is that of one measured call."""

    image_size: int
    T: int  # frames of a training video
    num_channels: int = 128
    num_res_blocks: int = 1
    max_frames: int = 20
    batch_size: int = 1
    suffix: str = ".npy"  # of the data set's files

    @property
    def network(self) -> Size:
        """The same without what the network does not see: equal where the calls are the same."""
        return dataclasses.replace(self, T=0, suffix="")


SIZES = {
    "mazes_cwvae": Size(64, T=300),
    "minerl": Size(64, T=500),
    "carla_no_traffic": Size(128, T=1000, suffix=".pt"),
    "small": Size(32, T=100, num_channels=32, max_frames=8, batch_size=8),
}


@dataclass(frozen=True)
class Workload:
    """One network in one arithmetic on one device."""

    name: str  # of the sizes that have this network
    size: Size
    precision: str
    device: torch.device
    config: BenchmarkConfig

    def build(self, timestep_respacing: str = "") -> tuple[nn.Module, SpacedDiffusion]:
        """A fresh network on the device, and the process."""
        model = ModelConfig(
            image_size=self.size.image_size,
            num_channels=self.size.num_channels,
            num_res_blocks=self.size.num_res_blocks,
            use_checkpoint=self.config.use_checkpoint,
        )
        process = DiffusionConfig(timestep_respacing=timestep_respacing)
        return create_model(model).to(self.device), create_diffusion(process)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context of the arithmetic."""
        return fp16_util.autocast(self.device, precision=self.precision, use_fp16=False)

    def items(self) -> dict[str, Tensor]:
        """A batch as TrainDataset gives it: half of the frames observed, the others latent."""
        size, shape = self.size, (self.size.batch_size, self.size.max_frames)
        frames = torch.randint(256, (*shape, 3, size.image_size, size.image_size))
        observed = torch.arange(size.max_frames) < size.max_frames // 2
        observed = observed.float().expand(shape)[..., None, None, None]
        return {
            "frames": frames.to(torch.uint8),
            "frame_indices": torch.arange(size.max_frames).expand(shape),
            "obs_mask": observed,
            "latent_mask": 1 - observed,
        }
