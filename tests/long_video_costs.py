"""What long videos cost: the figures of docs/long_videos.md.

python tests/long_video_costs.py rounds 1000
python tests/long_video_costs.py curve autoreg 10000
mpiexec -n 2 python tests/long_video_costs.py timed parallel-hierarchy-2 1000 --each 0.01
mpiexec -n 2 python tests/long_video_costs.py network parallel-hierarchy-2 200 --checkpoint FILE
python tests/long_video_costs.py adaptive 32        (METRIC_WEIGHTS_DIR names the weights of LPIPS)
"""

import argparse
import logging
import tempfile
import time
from pathlib import Path

import numpy as np

import toy_runs
from helpers import make_folder_dataset
from improved_diffusion import dist_util
from improved_diffusion.data import machine
from improved_diffusion.data.frame_batch import SymmetricView
from improved_diffusion.data.step_order import ordered_steps, rounds_of
from improved_diffusion.inference_utils import create_strategy
from improved_diffusion.registry import STRATEGIES
from improved_diffusion.sampling import keeper, lpips_util
from improved_diffusion.sampling.denoiser import Denoiser
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.trained_model import TrainedModel
from improved_diffusion.sampling.video_sampling import sample_dataset

SIZES = {"max_frames": 20, "step_size": 10}
OBSERVED = 36


def rounds(T: int) -> None:
    """Inference steps and rounds of every strategy that has a schedule."""
    for mode, strategy in STRATEGIES.items():
        if not strategy.is_adaptive:
            steps = create_strategy(mode, video_length=T, num_obs=OBSERVED, **SIZES)
            found = rounds_of(ordered_steps(steps))
            print(f"{mode}: {sum(found)} steps, {len(found)} rounds, at most {max(found)} at once")


def toy_video(mode: str, T: int, **options) -> None:
    """Sample one video of T frames with the toy network, in an empty folder that all ranks share."""
    folder = Path(dist_util.broadcast_object(tempfile.mkdtemp()))
    if dist_util.is_main():
        make_folder_dataset(folder / "data", T=OBSERVED, size=32, num_train=1, num_test=1)
        toy_runs.make_toy(folder, max_frames=SIZES["max_frames"], diffusion_steps=10)
    dist_util.barrier()
    options |= {"inference_mode": mode, "T": T, "obs_length": OBSERVED, **SIZES}
    toy_runs.sample(folder / "checkpoints/toy/model_000001.pt", **options)


def curve(mode: str, T: int) -> None:
    """Memory beside the process's own, and frames per second of CPU time, a tenth after the other."""
    marks, peak = [], [0.0]

    def resident() -> float:
        return int(Path("/proc/self/status").read_text().partition("VmRSS:")[2].split()[0]) / 1e3

    original = keeper.Keeper.keep

    def measured(self, video, step):
        original(self, video, step)
        peak[0] = max(peak[0], resident())
        frames = int(video.made.sum())
        if not marks or frames - marks[-1][0] >= T / 10:
            marks.append((frames, time.process_time()))

    keeper.Keeper.keep = measured
    toy_video(mode, 60)
    before = resident()
    marks.clear()
    toy_video(mode, T)
    print(f"{mode}: {peak[0] - before:.0f} MB above {before:.0f} MB, video {T * 3072 / 1e6:.0f} MB")
    pairs = zip(marks, marks[1:], strict=False)
    print("frames per CPU second:", *(round((b[0] - a[0]) / (b[1] - a[1])) for a, b in pairs))


def timed(mode: str, T: int, base: float, each: float, batch_size: int) -> None:
    """Frames per second where a network call takes base + each * batch seconds, asleep."""
    original = toy_runs.Pixelwise.forward

    def forward(self, x, *args, **kwargs):
        began = time.monotonic()
        out = original(self, x, *args, **kwargs)
        time.sleep(max(0.0, base + each * len(x) - (time.monotonic() - began)))
        return out

    toy_runs.Pixelwise.forward = forward
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    dist_util.setup_dist()
    toy_video(mode, T, batch_size=batch_size)
    dist_util.barrier()
    dist_util.cleanup()


def network(mode: str, T: int, checkpoint: str, batch_size: int, videos: int) -> None:
    """Sample with a trained network: wall and CPU seconds of each rank, and those within its calls."""
    original, spent = Denoiser.output, [0.0]

    def output(self, *args):
        began = time.process_time()
        out = original(self, *args)
        spent[0] += time.process_time() - began
        return out

    Denoiser.output = output
    dist_util.setup_dist()
    folder = dist_util.broadcast_object(tempfile.mkdtemp())
    max_frames = TrainedModel.load(checkpoint, "cpu").max_frames
    wall, cpu = time.monotonic(), time.process_time()
    sample_dataset(
        SampleConfig(
            checkpoint_path=checkpoint,
            inference_mode=mode,
            T=T,
            obs_length=max_frames,
            step_size=max_frames // 2,
            eval_dir=folder,
            sampler="unipc",
            timestep_respacing="10",
            spacing="logsnr",
            indices=tuple(range(videos)),
            batch_size=batch_size,
            device="cpu",
        )
    )
    dist_util.barrier()
    wall, cpu = time.monotonic() - wall, time.process_time() - cpu
    for row in dist_util.gather_objects((dist_util.rank(), wall, cpu, spent[0])):
        if dist_util.is_main():
            print(f"{mode} rank %d: %.1f s, %.1f CPU s, of which %.1f in the network" % row)
    dist_util.cleanup()


def adaptive(size: int, T: int = 1000, batch: int = 8) -> None:
    """CPU time of choosing the observed frames of `batch` random walks of frames, by LPIPS."""
    rng, walk = np.random.default_rng(0), np.zeros((batch, 3, size, size), np.float32)
    videos = np.zeros((batch, T, 3, size, size), np.uint8)
    for frame in range(T):
        walk = np.clip(walk + rng.normal(size=walk.shape, scale=8), -127, 127)
        videos[:, frame] = walk + 128
    spent = {"embedding": 0.0, "all": 0.0}

    def embed(frames):
        began = time.process_time()
        vectors = lpips_util.EMBEDDINGS["lpips"](frames, device="cpu")
        spent["embedding"] += time.process_time() - began
        return vectors

    sizes = {"video_length": T, "num_obs": OBSERVED, "max_frames": 8, "step_size": 4}
    steps = 0
    embed(np.zeros((1, 3, size, size), np.float32))
    strategies = [create_strategy("adaptive-autoreg", **sizes, embed=embed) for _ in videos]
    began = time.process_time()
    for strategy, video in zip(strategies, videos, strict=True):
        strategy.set_videos(SymmetricView(video[None]))
        steps = sum(1 for _ in strategy)
    spent["all"] = time.process_time() - began
    print(
        f"{batch} videos, {steps} steps: {spent['all']:.1f} s, {spent['embedding']:.1f} s embedding"
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("what", choices=("rounds", "curve", "timed", "network", "adaptive"))
    parser.add_argument("words", nargs="+", help="[mode] and a number")
    parser.add_argument("--base", type=float, default=0.0, help="timed: seconds of any call")
    parser.add_argument("--each", type=float, default=0.0, help="timed: seconds of each trajectory")
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--checkpoint", help="network: a trained network")
    parser.add_argument("--videos", type=int, default=1, help="network: how many")
    args = parser.parse_args()
    machine.keep_freed_memory()
    *mode, number = args.words
    if args.what == "timed":
        timed(*mode, int(number), args.base, args.each, args.batch_size)
    elif args.what == "network":
        network(*mode, int(number), args.checkpoint, args.batch_size, args.videos)
    else:
        {"rounds": rounds, "curve": curve, "adaptive": adaptive}[args.what](*mode, int(number))


if __name__ == "__main__":
    main()
