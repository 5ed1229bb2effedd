"""Sampling: what is made, named, skipped and reproduced."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import make_checkpoint, make_folder_dataset, run_script
from improved_diffusion.data import paths
from improved_diffusion.inference_utils import create_strategy
from improved_diffusion.sampling import trained_model
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.sampling.results import EvalDir, load_video
from improved_diffusion.sampling.schedule_picture import schedule_title
from improved_diffusion.sampling.video_sampling import sample_dataset

T = 8


@pytest.fixture
def checkpoint(tmp_path, monkeypatch) -> Path:
    """A published-format checkpoint; the current directory is a fresh one."""
    monkeypatch.chdir(tmp_path)
    dataset = make_folder_dataset(tmp_path / "data", T=T)
    return make_checkpoint(tmp_path / "checkpoints/group/abc/ema_0.9999_latest.pt", dataset)


def sample(checkpoint: Path, **options) -> EvalDir:
    defaults = {"inference_mode": "autoreg", "step_size": 2, "obs_length": 4, "indices": (0, 2)}
    return sample_dataset(SampleConfig(checkpoint_path=str(checkpoint), **(defaults | options)))


def load(eval_dir: EvalDir, video: int, index: int = 0) -> np.ndarray:
    return np.array(load_video(paths.sample_path(eval_dir.path, video, index)))


def assert_same_video(a: np.ndarray, b: np.ndarray) -> None:
    """At most one grey level off in at most 0.1 % of the values."""
    difference = np.abs(a.astype(int) - b.astype(int))
    assert difference.max() <= 1 and (difference > 0).mean() <= 1e-3


def test_a_published_checkpoint_samples_into_the_documented_tree(checkpoint, tmp_path):
    eval_dir = sample(checkpoint)
    assert eval_dir.path == Path("results/group/abc/ema_0.9999_latest_1234/autoreg_4_2_8_4")
    assert sorted(p.name for p in (eval_dir.path / "samples").iterdir()) == [
        "sample_0000-0.npy",
        "sample_0002-0.npy",
    ]
    video = load(eval_dir, 2)
    truth = np.load(tmp_path / "data/test/2.npy").transpose(0, 3, 1, 2)
    assert video.shape == (T, 3, 32, 32) and video.dtype == np.uint8
    np.testing.assert_array_equal(video[:4], truth[:4])
    assert (video[4:] != truth[4:]).mean() > 0.1
    assert json.loads((eval_dir.path / "model_config.json").read_text())["use_rpe_net"] is True
    assert json.loads((eval_dir.path / "sample_config.json").read_text())["checkpoint_step"] == 1234


def test_a_checkpoint_without_an_image_size_has_that_of_its_data_set(checkpoint):
    import torch

    content = torch.load(checkpoint, weights_only=True)
    del content["config"]["image_size"]
    torch.save(content, checkpoint)
    assert load(sample(checkpoint, indices=(0,)), 0).shape == (T, 3, 32, 32)


def test_a_video_does_not_depend_on_its_batch(checkpoint):
    together = sample(checkpoint, indices=(0, 1, 2), batch_size=3, num_samples=2, eval_dir="a")
    alone = sample(checkpoint, indices=(2,), batch_size=1, sample_idx=1, eval_dir="b")
    assert_same_video(load(together, 2, 1), load(alone, 2, 1))
    assert (load(together, 2, 0) != load(together, 2, 1)).mean() > 0.1
    assert (load(together, 0, 0) != load(together, 1, 0)).mean() > 0.1


def test_the_seed_changes_the_samples_and_a_folder_keeps_to_one(checkpoint):
    first = sample(checkpoint, eval_dir="a")
    with pytest.raises(ValueError, match="seed 0, not 1.*--eval_dir"):
        sample(checkpoint, eval_dir="a", seed=1)
    other = sample(checkpoint, eval_dir="b", seed=1)
    assert (load(first, 0) != load(other, 0)).mean() > 0.1


def test_array_tasks_make_one_batch_each_and_end_quietly_past_the_last(
    checkpoint, monkeypatch, caplog
):
    caplog.set_level("INFO")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "1")
    eval_dir = sample(checkpoint, indices=None, batch_size=3)
    assert eval_dir.samples() == {3: [0]}
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    assert sample(checkpoint, indices=None, batch_size=3).samples() == {3: [0]}
    assert "past the last batch" in caplog.text


@pytest.mark.slow
def test_a_subset_is_the_same_for_every_seed_and_sample(checkpoint):
    a = sample(checkpoint, indices=None, subset_size=2, eval_dir="a").samples()
    b = sample(
        checkpoint, indices=None, subset_size=2, seed=3, sample_idx=1, eval_dir="b"
    ).samples()
    c = sample(checkpoint, indices=None, subset_size=3, eval_dir="c").samples()
    assert set(a) == set(b) < set(c) and len(a) == 2


def test_finished_samples_are_skipped_and_broken_ones_made_again(checkpoint):
    eval_dir = sample(checkpoint)
    before = load(eval_dir, 2)
    kept, broken = (paths.sample_path(eval_dir.path, video, 0) for video in (0, 2))
    stamp = kept.stat().st_mtime_ns
    broken.write_bytes(broken.read_bytes()[:1000])
    sample(checkpoint)
    assert kept.stat().st_mtime_ns == stamp
    assert_same_video(load(eval_dir, 2), before)


@pytest.mark.parametrize(
    "options, suffix",
    [
        ({"use_ddim": True}, "_ddim"),
        ({"use_ddim": True, "eta": 0.5}, "_ddim_eta0.5"),
        ({"sampler": "dpmpp2m", "timestep_respacing": "2"}, "_dpmpp2m_respace2"),
        ({"sampler": "heun"}, "_heun"),
    ],
)
@pytest.mark.slow
def test_samplers_differ_in_folder_and_frames(checkpoint, options, suffix):
    ddpm = sample(checkpoint, indices=(0,))
    other = sample(checkpoint, indices=(0,), **options)
    assert other.path.parent.name == f"ema_0.9999_latest_1234{suffix}"
    np.testing.assert_array_equal(load(other, 0)[:4], load(ddpm, 0)[:4])
    assert (load(other, 0)[4:] != load(ddpm, 0)[4:]).mean() > 0.1


def test_ddim_is_deterministic_given_its_first_noise(checkpoint):
    """With eta 0 only the start is random: the noise of the later steps must not matter."""
    import torch

    from improved_diffusion.config import DiffusionConfig
    from improved_diffusion.data.rng_util import make_generator
    from improved_diffusion.sampling.trained_model import create_diffusion
    from improved_diffusion.script_util import load_model

    model, config, _ = load_model(str(checkpoint))
    diffusion = create_diffusion(DiffusionConfig(diffusion_steps=3, noise_schedule="cosine"))
    x0 = torch.zeros(1, 3, 3, 32, 32)
    obs = torch.tensor([1.0, 0, 0]).reshape(1, 3, 1, 1, 1)
    kwargs = {
        "x0": x0,
        "obs_mask": obs,
        "latent_mask": 1 - obs,
        "frame_indices": torch.arange(3)[None],
    }
    noise = torch.randn(x0.shape, generator=make_generator(5))

    def run(loop, key, **options):
        return loop(
            model,
            x0.shape,
            model_kwargs=kwargs,
            noise=noise,
            generator=make_generator(key),
            **options,
        )

    assert torch.equal(run(diffusion.ddim_sample_loop, 1), run(diffusion.ddim_sample_loop, 2))
    assert not torch.equal(run(diffusion.p_sample_loop, 1), run(diffusion.p_sample_loop, 2))
    assert torch.equal(run(diffusion.p_sample_loop, 1)[:, :1], x0[:, :1])


def test_videos_may_be_longer_than_the_data(checkpoint, caplog):
    caplog.set_level("INFO")
    eval_dir = sample(checkpoint, T=12, indices=(0,))
    assert load(eval_dir, 0).shape[0] == 12
    assert "videos of 12 frames continue data of 8 frames" in caplog.text
    with pytest.raises(ValueError, match="goal frames"):
        sample(
            checkpoint,
            T=12,
            indices=(0,),
            max_frames=8,
            step_size=2,
            obs_length=3,
            inference_mode="goal-directed-autoreg",
        )


@pytest.mark.slow
def test_clipping_and_precision_change_what_is_computed(checkpoint):
    plain = load(sample(checkpoint, indices=(0,), eval_dir="a"), 0)
    unclipped = load(sample(checkpoint, indices=(0,), eval_dir="b", clip_denoised=False), 0)
    bf16 = load(sample(checkpoint, indices=(0,), eval_dir="c", precision="bf16"), 0)
    assert (plain != unclipped).any() and (plain != bf16).any()


def test_the_schedule_is_drawn_without_sampling(checkpoint):
    from PIL import Image

    eval_dir = sample(checkpoint, just_visualise=True)
    picture = Image.open(eval_dir.path / "schedule.png")
    assert picture.size[0] > 500
    strategy = create_strategy(
        "gibbs", video_length=9, num_obs=2, max_frames=4, step_size=2, options={"gibbs_sweeps": 3}
    )
    title = "gibbs --gibbs_sweeps 3: 16 inference steps\n--T 9 --obs_length 2 --max_frames 4 --step_size 2"
    assert schedule_title(strategy, 16) == title
    assert not (eval_dir.path / "samples").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"inference_mode": "autoregg"}, "autoregg.*autoreg, long-range"),
        ({"obs_length": 8}, "--obs_length 8"),
        ({"step_size": 4}, "--step_size 4.*--max_frames 4"),
        ({"indices": (4,)}, "--indices 4.*0 to 3"),
        ({"indices": None, "subset_size": 9}, "--subset_size 9.*4 videos"),
        ({"override_dataset": "nowhere"}, "nowhere.*bouncy_balls"),
        ({"timestep_respacing": "9"}, "9 timesteps"),
    ],
)
def test_mistakes_are_named_and_nothing_is_written(checkpoint, options, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        sample(checkpoint, **options)
    assert not Path("results").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        ({"subset_size": 1, "indices": (1,)}, "--subset_size and --indices"),
        ({"use_ddim": True, "sampler": "heun"}, "--use_ddim True and --sampler heun"),
        ({"eta": 0.5}, "--eta 0.5"),
        ({"step_size": 0}, "--step_size 0"),
    ],
)
def test_contradicting_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        SampleConfig(checkpoint_path="x", inference_mode="autoreg", **options)


def test_the_script_turns_a_mistake_into_one_line(tmp_path):
    done = run_script("video_sample.py", "missing.pt", "--inference_mode", "autoreg", cwd=tmp_path)
    assert done.returncode == 1
    assert (
        done.stderr.count("\n") == 1
        and "missing.pt" in done.stderr
        and "Traceback" not in done.stderr
    )


def test_a_truncated_or_foreign_checkpoint_is_named(checkpoint, tmp_path):
    whole = checkpoint.read_bytes()
    for content in (whole[: len(whole) // 2], b"no checkpoint"):
        checkpoint.write_bytes(content)
        with pytest.raises(ValueError, match="ema_0.9999_latest.pt"):
            sample(checkpoint)


@pytest.mark.slow
def test_the_documented_array_job_command_works(checkpoint, tmp_path):
    """The user's command for several machines, two sample indices, one array task."""
    for index in ("0", "1"):
        done = run_script(
            "video_sample.py",
            checkpoint,
            "--batch_size",
            "2",
            "--inference_mode",
            "autoreg",
            "--step_size",
            "2",
            "--T",
            "6",
            "--obs_length",
            "4",
            "--sample_idx",
            index,
            cwd=tmp_path,
            env={"SLURM_ARRAY_TASK_ID": "1"},
        )
        assert done.returncode == 0, done.stderr
    names = sorted(p.name for p in tmp_path.glob("results/**/samples/*.npy"))
    assert names == [f"sample_000{video}-{s}.npy" for video in (2, 3) for s in (0, 1)]


def test_compile_samples_with_the_compiled_network(checkpoint, monkeypatch):
    calls = []

    class Compiled(torch.nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, *args, **kwargs):
            calls.append(self)
            return self.network(*args, **kwargs)

    monkeypatch.setattr(trained_model, "compile_network", Compiled)
    sample(checkpoint, sampler="dpmpp2m", timestep_respacing="2")
    assert not calls
    sample(checkpoint, sampler="heun", timestep_respacing="2", compile=True)
    assert calls
