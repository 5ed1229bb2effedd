"""The network of FDM: a U-Net over frames with attention across frames (arXiv 2205.11495, section 3).

Parameter names and shapes are those of the published checkpoints. Inside, frames are folded into
the batch and activations are channels-last images [B*T, C, H, W].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from improved_diffusion.config import ModelConfig
from improved_diffusion.nn import (
    GroupNorm32,
    conv3x3,
    doubled_conv3x3,
    in_autocast_dtype,
    timestep_embedding,
    zero_module,
)
from improved_diffusion.rpe import RPEAttention, distance_features

# Channels of each level in units of num_channels, outermost first.
CHANNEL_MULTIPLIERS = {
    16: (1, 2, 2),
    32: (1, 2, 2, 2),
    64: (1, 2, 3, 4),
    128: (1, 1, 2, 3, 4),
    256: (1, 1, 2, 2, 4, 4),
}


@dataclass(frozen=True)
class FrameContext:
    """What every block needs to know beside its activations."""

    num_frames: int
    time_embedding: Tensor  # [B or 1, E]
    distances: Tensor  # [B or 1, T, T, 3], see rpe.distance_features
    attention_mask: Tensor | None  # bool [B, T, T]; None: every frame sees every frame


class ResBlock(nn.Module):
    """Two convolutions with norms, told the diffusion timestep, added to the (projected) input."""

    def __init__(
        self, in_channels: int, out_channels: int, time_embed_dim: int, config: ModelConfig
    ):
        super().__init__()
        self.use_scale_shift_norm = config.use_scale_shift_norm
        self.use_checkpoint = config.use_checkpoint
        emb_channels = out_channels * (2 if config.use_scale_shift_norm else 1)
        self.in_layers = nn.Sequential(
            GroupNorm32(in_channels, silu=True),
            nn.Identity(),  # the norm applies SiLU itself; the published names count the layer
            conv3x3(in_channels, out_channels),
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(time_embed_dim, emb_channels))
        self.out_layers = nn.Sequential(
            GroupNorm32(out_channels, silu=True),
            nn.Identity(),
            nn.Dropout(config.dropout),
            zero_module(conv3x3(out_channels, out_channels)),
        )
        self.skip_connection = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, context: FrameContext) -> Tensor:
        hidden = self._norm_then(self.in_layers, x)
        # The timestep is one per video: its terms are made once and stand for all frames.
        emb = self.emb_layers(context.time_embedding).to(hidden.dtype)
        if self.use_scale_shift_norm:
            hidden = self._norm_then(self.out_layers, hidden, *emb.chunk(2, dim=1))
        else:
            if len(emb) > 1:
                emb = emb.repeat_interleave(context.num_frames, dim=0)
            hidden = self._norm_then(self.out_layers, hidden + emb[:, :, None, None])
        return self.skip_connection(x) + hidden

    def _norm_then(self, layers: nn.Sequential, x: Tensor, *scale_and_shift: Tensor) -> Tensor:
        norm, rest = layers[0], layers[1:]
        assert isinstance(norm, GroupNorm32)
        if self.use_checkpoint:  # computes the whole block again, so nothing in it need be kept
            return rest(norm(x, *scale_and_shift))
        return norm.before(rest, x, *scale_and_shift)


class FactorizedAttentionBlock(nn.Module):
    """Attention of each pixel position over the frames, then of each frame over its pixels."""

    def __init__(self, channels: int, num_heads: int, time_embed_dim: int):
        super().__init__()
        self.spatial_attention = RPEAttention(channels, num_heads)
        self.temporal_attention = RPEAttention(channels, num_heads, time_embed_dim)

    def forward(self, x: Tensor, context: FrameContext) -> Tensor:
        x = self.temporal_attention.temporal(
            x, context.num_frames, context.distances, context.time_embedding, context.attention_mask
        )
        return self.spatial_attention.spatial(x)


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int):
        super().__init__()
        self.op = conv3x3(channels, channels, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    """Double height and width, then convolve."""

    def __init__(self, channels: int):
        super().__init__()
        self.conv = conv3x3(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        return doubled_conv3x3(x, self.conv.weight, self.conv.bias)


class Stage(nn.Sequential):
    """Blocks in a row; those that need the context get it."""

    def forward(self, x: Tensor, context: FrameContext) -> Tensor:  # type: ignore[override]
        for block in self:
            takes_context = isinstance(block, ResBlock | FactorizedAttentionBlock)
            x = block(x, context) if takes_context else block(x)
        return x


class UNetVideoModel(nn.Module):
    """Predicts the noise (or the clean frames) of a set of frames, given observed ones.

    Raises ValueError for an image size that is not among `image_sizes`.
    """

    image_sizes = tuple(CHANNEL_MULTIPLIERS)  # heights and widths of frames

    def __init__(self, config: ModelConfig):
        super().__init__()
        if config.image_size not in self.image_sizes:
            known = ", ".join(map(str, self.image_sizes))
            raise ValueError(f"--image_size {config.image_size}: must be one of {known}")
        self.config = config
        channels = config.num_channels
        embed_dim = 4 * channels
        self.time_embed = nn.Sequential(
            nn.Linear(channels, embed_dim), nn.SiLU(), nn.Linear(embed_dim, embed_dim)
        )
        multipliers = CHANNEL_MULTIPLIERS[config.image_size]
        widths = [channels * m for m in multipliers]
        has_attention = self._levels_with_attention(config, len(widths))
        self.input_blocks, skip_widths = self._encoder(widths, has_attention, embed_dim)
        width = widths[-1]
        self.middle_block = Stage(
            ResBlock(width, width, embed_dim, config),
            FactorizedAttentionBlock(width, config.num_heads, embed_dim),
            ResBlock(width, width, embed_dim, config),
        )
        self.output_blocks = self._decoder(widths, skip_widths, has_attention, embed_dim)
        out_channels = 6 if config.learn_sigma else 3
        self.out = nn.Sequential(
            GroupNorm32(widths[0], silu=True),
            nn.Identity(),
            zero_module(conv3x3(widths[0], out_channels)),
        )
        self.to(memory_format=torch.channels_last)

    @property
    def blocks(self) -> list[nn.Module]:
        """The parts that `nn.compile_network` compiles, one by one."""
        return [m for m in self.modules() if isinstance(m, ResBlock | FactorizedAttentionBlock)]

    @staticmethod
    def _levels_with_attention(config: ModelConfig, num_levels: int) -> list[bool]:
        assert config.image_size is not None
        try:
            sizes = {int(size) for size in config.attention_resolutions.split(",") if size}
        except ValueError:
            raise ValueError(
                f"--attention_resolutions {config.attention_resolutions!r}: must be image sizes like 16,8"
            ) from None
        return [config.image_size // 2**level in sizes for level in range(num_levels)]

    def _encoder(
        self, widths: list[int], has_attention: list[bool], embed_dim: int
    ) -> tuple[nn.ModuleList, list[int]]:
        """The stages down, and the width of what each hands to the decoder."""
        config = self.config
        width = widths[0]
        stages, skips = [Stage(conv3x3(4, width))], [width]
        for level, out_width in enumerate(widths):
            for _ in range(config.num_res_blocks):
                stage = Stage(ResBlock(width, out_width, embed_dim, config))
                if has_attention[level]:
                    stage.append(FactorizedAttentionBlock(out_width, config.num_heads, embed_dim))
                width = out_width
                stages.append(stage)
                skips.append(width)
            if level < len(widths) - 1:
                stages.append(Stage(Downsample(width)))
                skips.append(width)
        return nn.ModuleList(stages), skips

    def _decoder(
        self, widths: list[int], skips: list[int], has_attention: list[bool], embed_dim: int
    ) -> nn.ModuleList:
        """The stages up; each takes the previous one's output beside one skip."""
        config = self.config
        num_heads = (
            config.num_heads if config.num_heads_upsample == -1 else config.num_heads_upsample
        )
        skips = list(skips)
        width = widths[-1]
        stages = []
        for level in reversed(range(len(widths))):
            for block in range(config.num_res_blocks + 1):
                stage = Stage(ResBlock(width + skips.pop(), widths[level], embed_dim, config))
                width = widths[level]
                if has_attention[level]:
                    stage.append(FactorizedAttentionBlock(width, num_heads, embed_dim))
                if level and block == config.num_res_blocks:
                    stage.append(Upsample(width))
                stages.append(stage)
        return nn.ModuleList(stages)

    def forward(
        self,
        x: Tensor,
        timesteps: Tensor,
        *,
        x0: Tensor,
        obs_mask: Tensor,
        latent_mask: Tensor,
        frame_indices: Tensor,
    ) -> Tensor:
        """Predict [B, T, 3 or 6, H, W] for T frames of each of B videos.

        x, x0: noisy and clean frames [B, T, 3, H, W], pixels in [-1, 1]; x0 is read where observed.
        timesteps: [B], scaled to 0..1000. obs_mask, latent_mask: float [B, T, 1, 1, 1]; a frame in
        neither is padding. frame_indices: int [B, T], positions in the whole video. timesteps and
        frame_indices may have one row where all videos share it, whose terms are then made once.
        """
        batch_size, num_frames = x.shape[:2]
        indicator = obs_mask.expand(-1, -1, -1, *x.shape[3:])
        frames = torch.cat([torch.where(obs_mask > 0, x0, x), indicator], dim=2).flatten(0, 1)
        real = (obs_mask + latent_mask).reshape(batch_size, num_frames) > 0
        emb = self.time_embed(timestep_embedding(timesteps, self.config.num_channels))
        context = FrameContext(
            num_frames=num_frames,
            time_embedding=emb,
            distances=in_autocast_dtype(distance_features(frame_indices)),
            attention_mask=real[:, :, None] == real[:, None, :],
        )
        hidden = frames.contiguous(memory_format=torch.channels_last)
        skips = []
        for stage in self.input_blocks:
            hidden = self._run(stage, hidden, context)
            skips.append(hidden)
        hidden = self._run(self.middle_block, hidden, context)
        for stage in self.output_blocks:
            hidden = self._run(stage, torch.cat([hidden, skips.pop()], dim=1), context)
        return self.out(hidden).float().unflatten(0, (batch_size, num_frames)).contiguous()

    def _run(self, stage: nn.Module, hidden: Tensor, context: FrameContext) -> Tensor:
        if self.config.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(stage, hidden, context, use_reentrant=False)
        return stage(hidden, context)
