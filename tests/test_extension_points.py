"""The examples of CONTRIBUTING.md, one of each kind, run through the real commands as they stand there."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import ROOT, call_main, make_checkpoint, make_folder_dataset
from improved_diffusion import registry
from improved_diffusion.config import DiffusionConfig
from improved_diffusion.respace import SpacedDiffusion
from improved_diffusion.sampling.results import EvalDir

BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.S)
# By the registry that the last line adds to.
EXAMPLES = {code.splitlines()[-1].partition("[")[0]: code for code in BLOCKS}
KINDS = (
    "NETWORKS PREDICTIONS LOSS_WEIGHTINGS TIMESTEP_DISTRIBUTIONS OPTIMIZERS MASK_DISTRIBUTIONS "
    "SAMPLERS SPACINGS GUIDANCE_REFERENCES inference_strategies DATASETS FRAME_METRICS SAMPLE_METRICS "
    "FEATURES VIDEO_METRICS"
).split()
TRAIN = (
    "--max_frames 4 --batch_size 2 --num_workers 0 --max_steps 2 --sample_interval 0 --resume_id toy "
    "--num_channels 32 --num_res_blocks 1 --diffusion_steps 3 --noise_schedule cosine "
    "--attention_resolutions 4 --log_interval 1"
).split()
SAMPLE = "--step_size 1 --obs_length 4 --T 6 --device cpu --eval_dir out".split()


@pytest.fixture(autouse=True)
def fresh(tmp_path, monkeypatch):
    """An empty folder, and registries that forget what a test adds."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "disabled")
    for thing in vars(registry).values():
        if isinstance(thing, registry.Registry):
            monkeypatch.setattr(thing, "_entries", dict(thing._entries))


def add(kind: str) -> None:
    """Run the example of this kind: at most ten lines beside its imports."""
    code = EXAMPLES[kind]
    lines = [line for line in code.splitlines() if line.strip() and " import " not in line]
    lines = [line for line in lines if not line.startswith("import ")]
    assert len(lines) <= 10, f"{kind}: {len(lines)} lines"
    exec(compile(code, f"CONTRIBUTING.md, {kind}", "exec"), {"__name__": "example"})


def offered(script: str, name: str, words: str, capsys) -> bool:
    """Whether --help shows the name, its line of help beside it."""
    with pytest.raises(SystemExit):
        call_main(script, "--help")
    return f"{name}: {words}" in " ".join(capsys.readouterr().out.split())


def train(*words: str) -> dict:
    """Train a tiny network for two updates; the options that its config.json holds."""
    data = make_folder_dataset(Path("data"))
    call_main("video_train.py", "--dataset", str(data), *TRAIN, *words)
    return json.loads(Path("checkpoints/toy/config.json").read_text())["options"]


def losses(run: str) -> list[float]:
    """The logged loss of each update."""
    header, *rows = Path(f"checkpoints/{run}/progress.csv").read_text().splitlines()
    return [float(row.split(",")[header.split(",").index("loss")]) for row in rows]


def sampled(*words: str) -> tuple[EvalDir, dict]:
    """Sample the first test video with a tiny checkpoint; the folder, and its stored options."""
    data = make_folder_dataset(Path("data"))
    path = make_checkpoint(Path("checkpoints/run/ema_0.9999_latest.pt"), data)
    call_main("video_sample.py", str(path), *SAMPLE, "--indices", "0", *words)
    (folder,) = Path("out").iterdir()
    return EvalDir(folder), EvalDir(folder).sample_config()


@pytest.fixture
def scored() -> EvalDir:
    """Three sampled videos: truth but for the last frame, which is black."""
    data = make_folder_dataset(Path("data"), num_test=3, T=6)
    directory = EvalDir("results")
    stored = {"T": 6, "obs_length": 2, "observed_frames": [0, 1]}
    dataset = {"dataset": str(data), "dataset_partition": "test"}
    directory.write_configs({"image_size": 32, "dataset": str(data)}, stored | dataset)
    for video in range(3):
        frames = np.load(data / f"test/{video}.npy").transpose(0, 3, 1, 2).copy()
        frames[-1] = 0
        directory.save_sample(video, 0, frames)
    return directory


def scores(directory: EvalDir) -> tuple[dict, dict]:
    """The table of an evaluation directory, and the rows of the .json beside it."""
    (path,) = directory.path.glob("metrics_*.pkl")
    rows = json.loads(path.with_suffix(".json").read_text())["metrics"]
    return np.load(path, allow_pickle=True), rows


def true_frames() -> np.ndarray:
    return np.stack([np.load(f"data/test/{video}.npy") for video in range(3)]).astype(float)


def test_every_kind_has_an_example():
    assert list(EXAMPLES) == KINDS


def test_a_network(capsys):
    add("NETWORKS")
    assert offered("video_train.py", "framewise", "one convolution over each frame.", capsys)
    assert train("--network", "framewise")["network"] == "framewise"
    from improved_diffusion.script_util import load_model

    assert type(load_model("checkpoints/toy/model_latest.pt").network).__name__ == "Framewise"


def test_a_prediction_type(capsys):
    """Turning the sign of what is predicted turns that of the last layer, and changes no loss."""
    add("PREDICTIONS")
    assert offered("video_train.py", "minus-eps", "the noise with its sign turned.", capsys)
    assert train("--prediction", "minus-eps")["prediction"] == "minus-eps"
    call_main("video_train.py", "--dataset", "data", *TRAIN, "--resume_id", "plain")
    assert losses("toy") == pytest.approx(losses("plain"))
    turned, plain = (
        torch.load(f"checkpoints/{run}/model_latest.pt")["state_dict"]["out.2.weight"]
        for run in ("toy", "plain")
    )
    torch.testing.assert_close(turned, -plain)
    assert plain.abs().max() > 0


def test_a_loss_weighting(capsys):
    add("LOSS_WEIGHTINGS")
    words = "errors of the clean frames count alike."
    assert offered("video_train.py", "clean-frames", words, capsys)
    assert train("--loss_weighting", "clean-frames")["loss_weighting"] == "clean-frames"
    header, row, *_ = Path("checkpoints/toy/progress.csv").read_text().splitlines()
    values = dict(zip(header.split(","), row.split(","), strict=True))
    assert float(values["loss"]) != pytest.approx(float(values["mse"]), rel=1e-2)


def test_a_distribution_of_timesteps(capsys):
    add("TIMESTEP_DISTRIBUTIONS")
    assert offered("video_train.py", "late", "noisy timesteps more often.", capsys)
    assert train("--schedule_sampler", "late")["schedule_sampler"] == "late"
    late = registry.TIMESTEP_DISTRIBUTIONS["late"](3)
    assert late.probabilities().tolist() == pytest.approx([1 / 6, 2 / 6, 3 / 6])


def test_an_optimiser(capsys):
    add("OPTIMIZERS")
    assert offered("video_train.py", "sgd", "plain gradient descent.", capsys)
    assert train("--optimizer", "sgd", "--lr", "0.5")["optimizer"] == "sgd"
    (group,) = torch.load("checkpoints/toy/opt_latest.pt")["optimizer"]["param_groups"]
    assert group["lr"] == 0.5 and "betas" not in group


def test_a_distribution_of_masks(capsys, monkeypatch):
    add("MASK_DISTRIBUTIONS")
    words = "neighbours, the first half of them observed."
    assert offered("video_train.py", "halves", words, capsys)
    drawn, real = [], registry.MASK_DISTRIBUTIONS["halves"]

    def noted(*args):
        drawn.append(real(*args))
        return drawn[-1]

    monkeypatch.setitem(registry.MASK_DISTRIBUTIONS._entries, "halves", (noted, ""))
    assert train("--mask_distribution", "halves")["mask_distribution"] == "halves"
    assert len(drawn) == 4 and all(len(o) == len(la) == 2 for o, la in drawn)


def test_a_sampler(capsys):
    add("SAMPLERS")
    words = "the frames guessed from noise alone."
    assert offered("video_sample.py", "first-guess", words, capsys)
    directory, stored = sampled("--inference_mode", "autoreg", "--sampler", "first-guess")
    assert stored["sampler"] == "first-guess" and directory.has_sample(0, 0)


def test_a_spacing(capsys):
    add("SPACINGS")
    assert offered("video_sample.py", "noisy-half", "only from the noisier half.", capsys)
    words = "--inference_mode autoreg --timestep_respacing 2 --spacing noisy-half".split()
    directory, stored = sampled(*words)
    assert stored["spacing"] == "noisy-half" and directory.has_sample(0, 0)
    config = DiffusionConfig(diffusion_steps=100, timestep_respacing="2")
    assert SpacedDiffusion(config, "noisy-half").timestep_map.tolist() == [50, 99]


def test_a_reference_of_guidance(capsys):
    add("GUIDANCE_REFERENCES")
    assert offered("video_sample.py", "first", "the earliest frame.", capsys)
    words = "--inference_mode autoreg --guidance 2 --guidance_against first".split()
    directory, stored = sampled(*words)
    assert stored["guidance_against"] == "first" and directory.has_sample(0, 0)


def test_a_strategy(capsys):
    add("inference_strategies")
    words = "observe the last frame and the one so many before it."
    assert offered("video_sample.py", "sparse", words, capsys)
    directory, stored = sampled("--inference_mode", "sparse", "--gap", "3")
    assert directory.path.name == "sparse_gap3_4_1_6_4" and stored["gap"] == 3


def test_a_data_set(capsys):
    add("DATASETS")
    assert offered("video_train.py", "grey", "grey.", capsys)
    call_main("video_train.py", "--dataset", "grey", *TRAIN)
    options = json.loads(Path("checkpoints/toy/config.json").read_text())["options"]
    assert (options["dataset"], options["T"], options["image_size"]) == ("grey", 8, 32)


def test_a_metric_of_frames(scored, capsys):
    add("FRAME_METRICS")
    assert offered("video_eval.py", "worst-pixel", "largest error of a pixel.", capsys)
    call_main("video_eval.py", "--eval_dir", str(scored.path), "--modes", "worst-pixel")
    table, rows = scores(scored)
    assert table["worst-pixel"][:, 0, -1].tolist() == true_frames()[:, -1].max((1, 2, 3)).tolist()
    assert (table["worst-pixel"][..., :-1] == 0).all() and rows["worst-pixel"]["n"] == 3


def test_a_metric_of_samples(scored, capsys):
    add("SAMPLE_METRICS")
    assert offered("video_eval.py", "brightness", "mean level of the sampled frames.", capsys)
    call_main("video_eval.py", "--eval_dir", str(scored.path), "--modes", "brightness")
    table, rows = scores(scored)
    predicted = true_frames()[:, 2:].mean(axis=(2, 3, 4))  # one of four is black in the samples
    expected = np.stack([predicted[:, :-1].sum(axis=1) / 4, predicted.mean(axis=1)], axis=1)
    assert table["brightness"] == pytest.approx(expected[:, None])
    samples, truth = rows["brightness"]["columns"]
    assert samples["name"] == "samples" and truth["mean"] == pytest.approx(expected[:, 1].mean())


def test_an_extractor_of_features(scored, capsys):
    add("FEATURES")
    assert offered("video_eval.py", "colour", "mean of each colour.", capsys)
    words = "--modes fvd --features colour".split()
    call_main("video_eval.py", "--eval_dir", str(scored.path), *words)
    table, rows = scores(scored)
    assert rows["fvd"]["settings"]["features"] == "colour" and table["fvd"][0] > 1


def test_a_metric_of_whole_videos(scored, capsys):
    add("FEATURES")
    add("VIDEO_METRICS")
    words = "distance between the means of the features."
    assert offered("video_eval_fvd.py", "centre", words, capsys)
    words = "--modes centre --features colour".split()
    call_main("video_eval_fvd.py", "--eval_dir", str(scored.path), *words)
    table, rows = scores(scored)
    black = true_frames()[:, -1].mean(axis=(1, 2)).mean(axis=0).sum() / 6
    assert table["centre"] == pytest.approx([black]) and rows["centre"]["n"] == 3
