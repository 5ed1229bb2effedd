"""The network's blocks against plain torch operations, and in the other ways they can be run."""

import math

import pytest
import torch
import torch.nn.functional as F

from improved_diffusion.config import ModelConfig
from improved_diffusion.nn import compile_network, doubled_conv3x3
from improved_diffusion.rpe import distance_features
from improved_diffusion.unet import (
    Downsample,
    FactorizedAttentionBlock,
    FrameContext,
    ResBlock,
    Stage,
    UNetVideoModel,
)

B, T, SIZE, IN, OUT, EMBED, HEADS = 2, 3, 4, 32, 64, 16, 4


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def make_stage(dtype=torch.float64, **options):
    torch.manual_seed(0)
    config = ModelConfig(image_size=32, num_channels=32, **options)
    stage = Stage(ResBlock(IN, OUT, EMBED, config), FactorizedAttentionBlock(OUT, HEADS, EMBED))
    with torch.no_grad():
        for parameter in stage.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return stage.to(dtype)


def make_inputs(dtype=torch.float64, rows=B):
    """Activations, and a context in which the second video's last frame is padding."""
    torch.manual_seed(1)
    x = torch.randn(B * T, IN, SIZE, SIZE, dtype=dtype).contiguous(
        memory_format=torch.channels_last
    )
    frames = torch.tensor([[0, 1, 7], [2, 9, 4]])[:rows]
    real = torch.tensor([[True, True, True], [True, True, False]])
    return x, FrameContext(
        num_frames=T,
        time_embedding=torch.randn(rows, EMBED, dtype=dtype),
        distances=distance_features(frames).to(dtype),
        attention_mask=real[:, :, None] == real[:, None, :],
    )


# ---------------------------------------------------------------- the reference, frame by frame


def plain_res_block(block, x, time_embedding):
    norm, conv = block.in_layers[0], block.in_layers[2]
    hidden = F.group_norm(x, 32, norm.weight, norm.bias)
    hidden = F.conv2d(hidden * hidden.sigmoid(), conv.weight, conv.bias, padding=1)
    linear, norm, conv = block.emb_layers[1], block.out_layers[0], block.out_layers[3]
    emb = F.linear(time_embedding * time_embedding.sigmoid(), linear.weight, linear.bias)
    emb = emb[:, None].expand(-1, T, -1).reshape(len(x), -1, 1, 1)
    if block.use_scale_shift_norm:
        scale, shift = emb[:, :OUT], emb[:, OUT:]
        hidden = F.group_norm(hidden, 32, norm.weight, norm.bias) * (1 + scale) + shift
    else:
        hidden = F.group_norm(hidden + emb, 32, norm.weight, norm.bias)
    hidden = F.conv2d(hidden * hidden.sigmoid(), conv.weight, conv.bias, padding=1)
    return F.conv2d(x, block.skip_connection.weight, block.skip_connection.bias) + hidden


def plain_rpe(rpe, context, b, i, j):
    """R(f_i - f_j, t) of video b: [heads, F]."""
    net = rpe.rpe_net
    hidden = F.linear(context.distances[b, i, j], net.embed_distances.weight)
    hidden = hidden + net.embed_distances.bias + net.embed_diffusion_time(context.time_embedding[b])
    return net.out(hidden * hidden.sigmoid()).view(HEADS, -1)


def plain_attention(layer, tokens, context=None, b=0):
    """One sequence [L, C]; with a context its tokens are the frames of video b."""
    normed = F.group_norm(tokens.T[None], 32, layer.norm.weight, layer.norm.bias)[0].T
    q, k, v = layer.qkv(normed).view(len(tokens), 3, HEADS, -1).unbind(1)  # each [L, heads, F]
    scale = 1 / math.sqrt(q.shape[-1])
    rows = []
    for i in range(len(tokens)):
        logits, values = [], []
        for j in range(len(tokens)):
            logit, value = (q[i] * k[j]).sum(-1), v[j]
            if context is not None:
                logit = logit + (q[i] * plain_rpe(layer.rpe_k, context, b, i, j)).sum(-1)
                logit = logit + (k[j] * plain_rpe(layer.rpe_q, context, b, j, i)).sum(-1)
                value = value + plain_rpe(layer.rpe_v, context, b, i, j)
                if not context.attention_mask[b, i, j]:
                    logit = logit - math.inf
            logits.append(logit * scale)
            values.append(value)
        weights = torch.stack(logits).softmax(0)[..., None]  # [L, heads, 1]
        rows.append((weights * torch.stack(values)).sum(0).flatten())
    return normed + layer.proj_out(torch.stack(rows))


def plain_stage(stage, x, context):
    res_block, attention = stage
    x = plain_res_block(res_block, x, context.time_embedding)
    pixels = x.view(B, T, OUT, SIZE * SIZE)
    after = torch.empty_like(pixels)
    for b in range(B):
        for d in range(SIZE * SIZE):
            tokens = pixels[b, :, :, d]
            after[b, :, :, d] = plain_attention(attention.temporal_attention, tokens, context, b)
    frames = after.flatten(0, 1)  # [B*T, C, D]
    out = [plain_attention(attention.spatial_attention, frame.T).T for frame in frames]
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize("use_scale_shift_norm", [True, False])
def test_blocks_equal_plain_operations_in_outputs_and_gradients(use_scale_shift_norm):
    stage = make_stage(use_scale_shift_norm=use_scale_shift_norm)
    x, context = make_inputs()
    out, expected = stage(x, context), plain_stage(stage, x.contiguous(), context)
    torch.testing.assert_close(out, expected, rtol=1e-9, atol=1e-11)
    weights = torch.randn_like(out)
    parameters = tuple(stage.parameters())
    mine = torch.autograd.grad((out * weights).sum(), parameters)
    theirs = torch.autograd.grad((expected * weights).sum(), parameters)
    largest = max(grad.abs().max() for grad in theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() < 1e-10 * largest


def test_one_row_of_timesteps_and_frames_stands_for_all_videos():
    torch.manual_seed(0)
    config = ModelConfig(image_size=32, num_channels=32, num_res_blocks=1)
    model = UNetVideoModel(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    obs = torch.zeros(B, T, 1, 1, 1)
    obs[:, 0] = 1
    x, x0 = torch.randn(2, B, T, 3, 32, 32)
    options = {"x0": x0, "obs_mask": obs, "latent_mask": 1 - obs}
    frames, timesteps = torch.tensor([[0, 4, 5]]), torch.tensor([30.0])
    with torch.no_grad():
        shared = model(x, timesteps, frame_indices=frames, **options)
        repeated = model(x, timesteps.expand(B), frame_indices=frames.expand(B, -1), **options)
    assert (shared - repeated).abs().max() < 1e-5 * repeated.abs().max()


def test_frames_of_16_pixels_have_three_levels():
    model = UNetVideoModel(ModelConfig(image_size=16, num_channels=32, num_res_blocks=1))
    x = torch.zeros(1, T, 3, 16, 16)
    mask, frames = torch.ones(1, T, 1, 1, 1), torch.arange(T)[None]
    assert sum(isinstance(stage[0], Downsample) for stage in model.input_blocks) == 2
    options = {"x0": x, "obs_mask": 0 * mask, "latent_mask": mask, "frame_indices": frames}
    assert model(x, torch.tensor([30.0]), **options).shape == x.shape


def test_a_convolution_of_doubled_images_never_makes_them():
    torch.manual_seed(0)
    x, bias = torch.randn(2, 5, 4, 3, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    weight = torch.randn(7, 5, 3, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    expected = F.conv2d(F.interpolate(x, scale_factor=2, mode="nearest"), weight, bias, padding=1)
    out = doubled_conv3x3(x, weight, bias)
    torch.testing.assert_close(out, expected)
    mine = torch.autograd.grad(out.cos().sum(), inputs)
    theirs = torch.autograd.grad(expected.cos().sum(), inputs)
    torch.testing.assert_close(mine, theirs)


def test_bfloat16_stays_within_four_percent_of_float32():
    """The stated error of --precision bf16: 8 bits of mantissa through a stage of blocks."""
    stage = make_stage(torch.float32)
    x, context = make_inputs(torch.float32)
    with torch.no_grad():
        exact = stage(x, context)
        with torch.autocast("cpu", torch.bfloat16):
            rounded = stage(x, context)
    error = (rounded - exact).abs().max() / exact.abs().max()
    assert 0 < error < 4e-2


@pytest.mark.slow
def test_the_compiled_network_equals_the_eager_one():
    block = make_stage(torch.float32)[0]
    x, context = make_inputs(torch.float32)
    expected = block(x, context)
    out = compile_network(block)(x, context)
    assert (out - expected).abs().max() < 1e-5 * expected.abs().max()
    parameters = tuple(block.parameters())
    mine = torch.autograd.grad(out.square().sum(), parameters)
    theirs = torch.autograd.grad(expected.square().sum(), parameters)
    largest = max(grad.abs().max() for grad in theirs)
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() < 1e-5 * largest


def test_compiling_without_a_compiler_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(ValueError, match=r"no C\+\+ compiler .*: install it") as error:
        compile_network(torch.nn.Linear(1, 1))
    assert "\n" not in str(error.value)
