"""Attention within and across frames, the latter with relative position networks.

Sources: FDM (arXiv 2205.11495), appendix on the architecture; iRPE (arXiv 2107.14222) for relative
positions on queries, keys and values. Letters: D pixels of a frame, F features of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from improved_diffusion.nn import GroupNorm32, at_least_float32, zero_module


def distance_features(frame_indices: Tensor) -> Tensor:
    """Features of the signed distances d = f_i - f_j between frames [B, T], float32 [B, T, T, 3].

    log(1 + max(d, 0)), log(1 + max(-d, 0)) and [d = 0].
    """
    distances = (frame_indices[:, :, None] - frame_indices[:, None, :]).float()
    forward, backward = distances.clamp(min=0).log1p(), (-distances).clamp(min=0).log1p()
    return torch.stack([forward, backward, (distances == 0).float()], dim=-1)


class RPENet(nn.Module):
    """R(d, t): a vector for each distance between frames and each diffusion timestep."""

    def __init__(self, channels: int, num_heads: int, time_embed_dim: int):
        super().__init__()
        self.num_heads = num_heads
        self.embed_distances = nn.Linear(3, channels)
        self.embed_diffusion_time = nn.Linear(time_embed_dim, channels)
        self.out = zero_module(nn.Linear(channels, channels))

    def forward(self, features: Tensor, time_embedding: Tensor) -> Tensor:
        """[B, T, T, heads, F] for distance features [B, T, T, 3] and time embedding [B, E].

        Either may have one row in place of B.
        """
        hidden = (
            self.embed_distances(features)
            + self.embed_diffusion_time(time_embedding)[:, None, None]
        )
        return self.out(F.silu(hidden)).unflatten(-1, (self.num_heads, -1))


class RPE(nn.Module):
    """One relative position term; the level exists for the parameters' published names."""

    def __init__(self, channels: int, num_heads: int, time_embed_dim: int):
        super().__init__()
        self.rpe_net = RPENet(channels, num_heads, time_embed_dim)

    def forward(self, features: Tensor, time_embedding: Tensor) -> Tensor:
        return self.rpe_net(features, time_embedding)


class RPEAttention(nn.Module):
    """Multi-head attention over tokens [N, L, C], with residual onto the NORMALISED input.

    With `time_embed_dim` it is the temporal kind: tokens are frames and logits and values get
    relative position terms. The published weights need the residual to leave from the norm.
    """

    def __init__(self, channels: int, num_heads: int, time_embed_dim: int | None = None):
        super().__init__()
        self.num_heads = num_heads
        self.norm = GroupNorm32(channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.proj_out = zero_module(nn.Linear(channels, channels))
        if time_embed_dim is not None:
            self.rpe_q = RPE(channels, num_heads, time_embed_dim)
            self.rpe_k = RPE(channels, num_heads, time_embed_dim)
            self.rpe_v = RPE(channels, num_heads, time_embed_dim)

    def spatial(self, x: Tensor) -> Tensor:
        """Each frame over its pixels: [B*T, C, H, W] -> the same, channels-last."""
        normed = self.norm(x).permute(0, 2, 3, 1).flatten(1, 2)  # [B*T, D, C]
        q, k, v = self._split_heads(self.qkv(normed)).unbind(-3)  # each [B*T, D, heads, F]
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        )
        result = normed + self.proj_out(out.transpose(1, 2).flatten(2))
        return result.unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def temporal(
        self,
        x: Tensor,
        num_frames: int,
        features: Tensor,
        time_embedding: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Each pixel over the T frames: [B*T, C, H, W] -> the same, channels-last.

        features: [B or 1, T, T, 3] from `distance_features`; time_embedding: [B or 1, E]; mask: bool
        [B, T, T], True where frame i may attend to frame j, or None for all.
        """
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2).unflatten(0, (-1, num_frames))  # [B, T, D, C]
        normed = self.norm.across_frames(tokens)
        # [B, heads, D, T, F]
        q, k, v = self._split_heads(self.qkv(normed)).permute(3, 0, 4, 2, 1, 5)
        out = self._attend_with_positions(q, k, v, features, time_embedding, mask)
        result = normed + self.proj_out(out.permute(0, 3, 2, 1, 4).flatten(3))
        return result.flatten(0, 1).unflatten(1, x.shape[2:]).permute(0, 3, 1, 2)

    def _split_heads(self, qkv: Tensor) -> Tensor:
        """[..., 3*C] -> [..., 3, heads, F]: q, k and v outermost, heads inside."""
        return qkv.unflatten(-1, (3, self.num_heads, -1))

    def _attend_with_positions(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        features: Tensor,
        time_embedding: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """Attention of q, k, v [B, heads, D, T, F] over T with relative position terms.

        logit_ij = s (q_i.k_j + q_i.Rk(f_i - f_j) + k_j.Rq(f_j - f_i));
        out_i = sum_j softmax_ij (v_j + Rv(f_i - f_j)).
        """
        # [B, T, T, heads, F] -> [B, heads, i, j, F]
        r_q, r_k, r_v = (
            rpe(features, time_embedding).permute(0, 3, 1, 2, 4)
            for rpe in (self.rpe_q, self.rpe_k, self.rpe_v)
        )
        scale = q.shape[-1] ** -0.5
        q, r_q = q * scale, r_q * scale
        # One product per frame, over all pixels at once: [.., i, D, F] x [.., i, F, j].
        logits = (
            q @ k.transpose(-1, -2)  # [B, heads, D, i, j]
            + (q.transpose(2, 3) @ r_k.transpose(-1, -2)).transpose(2, 3)
            + (k.transpose(2, 3) @ r_q.transpose(-1, -2)).permute(0, 1, 3, 4, 2)
        )
        if mask is not None:
            logits = logits.masked_fill(~mask[:, None, None], float("-inf"))
        weights = at_least_float32(logits).softmax(dim=-1).to(v.dtype)
        positional = (weights.transpose(2, 3) @ r_v).transpose(2, 3)
        return weights @ v + positional
