"""What matters on a machine with a GPU, in one command: `python -m pytest -m gpu -s tests/test_cuda.py`.

Prints the card, what was measured beside the estimate, and where the time goes. Without a GPU
tests/test_fake_cuda.py stands in for it.
"""

import pytest
import torch
import torch.nn.functional as F

from golden_fill import array
from improved_diffusion.config import DiffusionConfig, ModelConfig
from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.nn import norm_operators
from improved_diffusion.nn.group_norm import GroupNorm32
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.trained_model import create_diffusion, create_model
from improved_diffusion.study import benchmark, estimate, speed
from improved_diffusion.study.benchmark_table import format_report
from improved_diffusion.study.options import BenchmarkConfig
from test_golden_unet import CASES, VALUES, Setup
from train_runs import column, flags, make_videos, train

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
K, SIZE = 4, 32


@pytest.fixture
def tf32(request):
    """TF32 in products and convolutions, or not."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = request.param
    yield request.param
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


@pytest.mark.parametrize("name", list(CASES))
@pytest.mark.parametrize("tf32, error", [(False, 1e-4), (True, 1e-2)], indirect=["tf32"])
def test_golden(name, tf32, error):
    setup = Setup(name)
    setup.model.cuda()
    inputs = {key: value.cuda() for key, value in setup.kwargs.items()}
    with torch.no_grad():
        out = setup.model(setup.x.cuda(), setup.diffusion.scale_timesteps(setup.t).cuda(), **inputs)
    expected = torch.from_numpy(VALUES[f"{name}/forward"])
    assert (out.cpu() - expected).abs().max() < error * expected.abs().max()


@pytest.mark.parametrize("tf32", [False], indirect=True)
@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_sampler_gives_what_it_gives_on_a_cpu(sampler, tf32):
    network = create_model(ModelConfig(image_size=SIZE, num_channels=32, num_res_blocks=1)).eval()
    with torch.no_grad():
        for param in network.parameters():
            param.add_(0.02 * torch.randn_like(param))
    frames = torch.from_numpy(array("frames", (2, K, 3, SIZE, SIZE))).clamp(-1, 1)
    observed = (torch.arange(K) < 2).float().expand(2, K)[..., None, None, None]
    batch = FrameBatch(frames, observed, 1 - observed, torch.arange(K).expand(2, K))
    process = create_diffusion(DiffusionConfig(timestep_respacing="5", noise_schedule="cosine"))
    results = []
    for device in ("cpu", "cuda"):
        denoiser = Denoiser(network.to(device), process)
        generators = [torch.Generator().manual_seed(i) for i in range(2)]
        with torch.inference_mode():
            results.append(
                SAMPLERS[sampler](denoiser, batch.to(device), generator=generators).cpu()
            )
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


def test_200_updates_go_on_from_their_middle(tmp_path):
    videos, losses = make_videos(tmp_path / "videos"), []
    for folder, ends in (("whole", [200]), ("resumed", [100, 200])):
        cwd = tmp_path / folder
        cwd.mkdir()
        for end in ends:
            runs = [path.name for path in (cwd / "checkpoints").glob("*")]
            resume = {"resume_id": runs[0]} if runs else {}
            words = flags(videos, max_steps=end, save_interval=100, precision="bf16", **resume)
            done = train(cwd, *words)
            assert done.returncode == 0, done.stderr
        run = next((cwd / "checkpoints").glob("*"))
        losses.append(torch.tensor([float(value) for value in column(str(run), "loss")]))
    assert len(losses[0]) == len(losses[1]) == 200
    # Sums of a GPU differ in their order from run to run.
    torch.testing.assert_close(losses[1][:120], losses[0][:120], rtol=0.05, atol=0.01)


# Norms of the two networks: images or videos, length, columns, groups' columns.
SHAPES = [(160, 4096, 128, 4), (160, 4096, 256, 8), (160, 1024, 640, 20), (160, 256, 896, 28)]


@pytest.mark.parametrize("dtype", norm_operators.DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernels_against_the_plain_formula_and_their_time(shape, dtype):
    n, length, columns, _ = shape
    norm = GroupNorm32(columns, silu=True).cuda()
    side = int(length**0.5)
    x = torch.randn(n, columns, side, side, device="cuda", dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    plain = F.silu(F.group_norm(x.float(), 32, norm.weight, norm.bias, norm.eps))
    out = norm(x)
    error = {torch.float32: 1e-5, torch.bfloat16: 8e-3, torch.float16: 1e-3}[dtype]
    assert (out.float() - plain).abs().max() < error * plain.abs().max()
    grad = torch.randn_like(out)
    mine = torch.autograd.grad(out, (x, norm.weight, norm.bias), grad, retain_graph=True)
    theirs = torch.autograd.grad(plain, (x, norm.weight, norm.bias), grad.float())
    for one, other in zip(mine, theirs, strict=True):
        assert (one - other).abs().max() < 2 * error * other.abs().max()
    forward = min(speed.timed(lambda: norm(x.detach()), 20))
    backward = min(speed.timed(lambda: out.backward(grad, retain_graph=True), 20))
    moved = x.numel() * x.element_size() / 1e9
    print(
        f"\n{shape} {dtype}: forward {1e3 * forward:.3f} ms, {2 * moved / forward:.0f} GB/s of one read "
        f"and one write; backward {1e3 * backward:.3f} ms, {3 * moved / backward:.0f} GB/s"
    )


def test_the_benchmark_beside_the_estimate(tmp_path):
    for name, batch_size in (("mazes_cwvae", 8), ("carla_no_traffic", 2)):
        config = BenchmarkConfig(
            name,
            "forward,train",
            batch_size,
            precision="fp32,bf16",
            repeats=5,
            out=str(tmp_path / "benchmark.json"),
            profile=str(tmp_path / "profile.txt"),
        )
        report = benchmark.run_benchmark(config)
        print("\n" + format_report(report), benchmark.estimate_benchmark(config), sep="\n")
        print((tmp_path / "profile.txt").read_text())
        card = estimate.card_of(report["device"])
        for row in report["rows"]:
            assert row["gb"] > 0 and (card is None or 0 < row["mfu"] < 1)
