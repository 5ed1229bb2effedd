"""A checkpoint once it is loaded; networks and diffusion processes from options."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from improved_diffusion import fp16_util
from improved_diffusion.config import DataConfig, DiffusionConfig, ModelConfig, from_options
from improved_diffusion.data.checkpoints import WeightsFile, load_weights
from improved_diffusion.data.dataset_files import dataset_spec
from improved_diffusion.data.dataset_specs import DatasetSpec
from improved_diffusion.nn import compile_network
from improved_diffusion.nn.cuda_graphs import ReplayedNetwork
from improved_diffusion.registry import NETWORKS
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.denoiser import Denoiser


def create_model(config: ModelConfig) -> nn.Module:
    """The network of `config`, freshly initialised by torch's global generator."""
    return NETWORKS[config.network](config)


def create_diffusion(config: DiffusionConfig, spacing: str = "time") -> SpacedDiffusion:
    """The diffusion process of `config`, respaced as it says. spacing: a name in SPACINGS."""
    return SpacedDiffusion(config, spacing)


class TrainedModel:
    """A model or EMA checkpoint, loaded once: its network and all that its file says.

    Unpacks into (network, config, step).

    Attributes:
        path: the file.
        config: the flat training options that the file holds.
        step: updates done.
    """

    def __init__(
        self,
        weights: WeightsFile,
        path: str,
        device: str = "cpu",
        *,
        compile: bool = False,
        cuda_graphs: bool = False,
    ) -> None:
        self.path, self.config, self.step = path, weights.config, weights.step
        self._device = device
        self._weights, self._compile = weights.state_dict, compile
        self._cuda_graphs = cuda_graphs

    @classmethod
    def load(
        cls, path: str, device: str = "cpu", *, compile: bool = False, cuda_graphs: bool = False
    ) -> TrainedModel:
        """Read the file; half-precision weights are cast to float32.

        compile: compile the network with torch.compile. cuda_graphs: record its calls and replay them.
        Raises FileNotFoundError or ValueError for a missing, truncated or foreign file, and ValueError
        for cuda_graphs without a GPU.
        """
        if cuda_graphs and torch.device(device).type != "cuda":
            raise ValueError(f"--cuda_graphs True needs a CUDA GPU, not --device {device}")
        return cls(load_weights(path), path, device, compile=compile, cuda_graphs=cuda_graphs)

    def __iter__(self) -> Iterator[Any]:
        return iter((self.network, self.config, self.step))

    @functools.cached_property
    def network(self) -> nn.Module:
        """The network with its weights, in eval mode on the device; built when first asked for.

        Raises ValueError naming the file where the weights do not fit its config, and where
        `compile` asks for a C++ compiler that is missing.
        """
        config = self.config | {"image_size": self.image_size}
        network = create_model(from_options(ModelConfig, config))
        try:
            network.load_state_dict(self._weights)
        except RuntimeError as error:
            first = str(error).strip().splitlines()[1].strip()
            raise ValueError(
                f"{self.path}: the weights do not fit the network of its config: {first}"
            ) from None
        network = network.to(self._device).eval()
        self._weights = network.state_dict()  # the file's own copy is not needed any more
        network = compile_network(network) if self._compile else network
        return ReplayedNetwork(network) if self._cuda_graphs else network

    @property
    def device(self) -> str:
        """Where the network is, or will be."""
        if "network" in self.__dict__:
            return str(next(self.network.parameters()).device)
        return self._device

    @functools.cached_property
    def identity(self) -> str:
        """SHA-256 of the weights' names, shapes and float32 values: equal for equal networks."""
        digest = hashlib.sha256()
        for name in sorted(self._weights):
            value = self._weights[name].detach().cpu().contiguous()
            digest.update(f"{name} {value.dtype} {list(value.shape)}".encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()

    @property
    def dataset(self) -> str:
        """The data set that was trained on; empty where the file does not say."""
        return self.config.get("dataset", "")

    @property
    def image_size(self) -> int:
        """Height and width of the frames: the option, or else the data set's."""
        return self.config.get("image_size") or self.dataset_spec(self.dataset).image_size

    @property
    def max_frames(self) -> int | None:
        """Frames that the network was trained on at once; None where the file does not say."""
        return self.config.get("max_frames")

    def dataset_spec(self, name: str) -> DatasetSpec:
        """The data set `name` as this network reads it."""
        return stored_dataset(name, self.config)

    def process(self, respacing: str = "", spacing: str = "time") -> SpacedDiffusion:
        """The diffusion process.

        respacing: timesteps to keep (empty: those trained on); spacing: which, a name in SPACINGS.
        """
        config = from_options(DiffusionConfig, self.config)
        if respacing:
            config = dataclasses.replace(config, timestep_respacing=respacing)
        return create_diffusion(config, spacing)

    def denoiser(
        self,
        respacing: str = "",
        *,
        spacing: str = "time",
        clip_denoised: bool = True,
        precision: str = "fp32",
    ) -> Denoiser:
        """The network in its process. precision: fp32 or bf16, of the network's arithmetic."""
        autocast = functools.partial(
            fp16_util.autocast, torch.device(self.device), precision=precision, use_fp16=False
        )
        return Denoiser(
            self.network,
            self.process(respacing, spacing),
            clip_denoised=clip_denoised,
            autocast=autocast,
        )


def stored_dataset(name: str, config: dict[str, Any]) -> DatasetSpec:
    """The data set `name` as a network with the training options `config` reads it.

    The training options on how to read videos hold for the data set that was trained on.
    """
    reading = from_options(DataConfig, config if name == config.get("dataset") else {})
    size, sizes = config.get("image_size"), image_sizes(config.get("network", "unet"))
    return dataset_spec(name, image_size=size, image_sizes=sizes, **vars(reading))


def image_sizes(network: str) -> Collection[int] | None:
    """The frame sizes that a kind of network can have; None: any."""
    return getattr(NETWORKS[network], "image_sizes", None)
