"""Options in, dataclasses and models out; what --help and imports cost; how scripts fail."""

import argparse
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import ROOT, make_checkpoint, run_script
from improved_diffusion import config, script_util
from improved_diffusion.config import DiffusionConfig, ModelConfig
from improved_diffusion.evaluation.options import EvalConfig
from improved_diffusion.sampling.options import SampleConfig
from improved_diffusion.study.options import BenchmarkConfig, StudyConfig
from improved_diffusion.training.options import TrainConfig

PUBLISHED_DEFAULTS = {
    "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "attention_resolutions": "16,8", "dropout": 0.0, "learn_sigma": False, "sigma_small": False,
    "diffusion_steps": 1000, "noise_schedule": "linear", "timestep_respacing": "", "use_kl": False,
    "predict_xstart": False, "rescale_timesteps": True, "rescale_learned_sigmas": True,
    "use_checkpoint": False, "use_scale_shift_norm": True,
}  # fmt: skip
TRAIN_DEFAULTS = {
    "T": -1, "batch_size": 1, "microbatch": -1, "max_frames": 20, "num_workers": -1, "lr": 1e-4,
    "weight_decay": 0.0, "lr_anneal_steps": 0, "max_steps": 0, "schedule_sampler": "uniform",
    "ema_rate": "0.9999", "ema_warmup": False, "log_interval": 10, "save_interval": 50000,
    "sample_interval": 50000, "save_latest_only": False, "keep_checkpoints": 0, "resume_id": "",
    "resume_checkpoint": "", "use_fp16": False, "fp16_scale_growth": 1e-3, "precision": "fp32",
    "pad_with_random_frames": True, "seed": 0,
}  # fmt: skip
SAMPLE_DEFAULTS = {
    "step_size": 1, "obs_length": 36, "max_frames": None, "num_samples": 1, "T": None,
    "subset_size": None, "batch_size": 8, "eval_dir": None, "use_ddim": False,
    "timestep_respacing": "", "indices": None, "sample_idx": None, "optimal": False, "device": "",
    "clip_denoised": True, "dataset_partition": "test", "override_dataset": "",
    "just_visualise": False, "seed": 0,
}  # fmt: skip


@pytest.mark.parametrize("groups, expected", [
    ((ModelConfig, DiffusionConfig), PUBLISHED_DEFAULTS),
    ((TrainConfig,), TRAIN_DEFAULTS),
    ((SampleConfig,), SAMPLE_DEFAULTS),
])  # fmt: skip
def test_documented_options_and_defaults_stay(groups, expected):
    assert expected.items() <= config.defaults(*groups).items()


def parse(group, *words):
    parser = argparse.ArgumentParser()
    script_util.add_arguments(parser, group)
    return script_util.config_from_args(group, parser.parse_args(list(words)))


def test_booleans_take_words_and_digits():
    for word, value in (
        ("True", True),
        ("no", False),
        ("1", True),
        ("False", False),
        ("yes", True),
    ):
        assert parse(TrainConfig, "--dataset", "x", "--ema_warmup", word).ema_warmup is value
    with pytest.raises(SystemExit):
        parse(TrainConfig, "--dataset", "x", "--ema_warmup", "maybe")


def test_every_option_has_help():
    for path in sorted((ROOT / "scripts").glob("*.py")):
        parser = runpy.run_path(str(path))["create_argparser"]()
        for action in parser._actions:
            named = action.option_strings or action.dest
            assert len((action.help or "").split()) > 1, f"{path.name}: {named} has no help"


def test_indices_and_flags_parse_as_documented():
    options = parse(
        SampleConfig, "c.pt", "--inference_mode", "autoreg", "--indices", "3", "5", "--optimal"
    )
    assert options.indices == (3, 5) and options.optimal is True
    assert parse(SampleConfig, "c.pt", "--inference_mode", "autoreg").optimal is False


@pytest.mark.parametrize("group, words, name, value", [
    (TrainConfig, "--dataset x --ema_rate 0.9,0.99", "ema_rate", "0.9,0.99"),
    (TrainConfig, "--dataset x --ema_rate 0.9 0.99", "ema_rate", "0.9,0.99"),
    (TrainConfig, "--dataset x", "ema_rate", "0.9999"),
    (ModelConfig, "--attention_resolutions 16 8, 4", "attention_resolutions", "16,8,4"),
    (SampleConfig, "c --inference_mode gibbs --indices 3,1 2", "indices", (3, 1, 2)),
    (EvalConfig, "--eval_dir a --modes psnr,ssim lpips", "modes", ("psnr", "ssim", "lpips")),
    (EvalConfig, "--eval_dir a,b c", "eval_dir", ("a,b", "c")),
    (StudyConfig, "x --strategies gibbs autoreg,exp-past", "strategies", ("gibbs", "autoreg", "exp-past")),
    (BenchmarkConfig, "--measure forward train", "measure", "forward,train"),
])  # fmt: skip
def test_items_of_a_list_are_apart_by_spaces_or_commas(group, words, name, value):
    assert getattr(parse(group, *words.split()), name) == value


def test_an_empty_list_and_a_wrong_item(capsys):
    assert parse(BenchmarkConfig, "--measure", "").measure == ""
    with pytest.raises(SystemExit):
        parse(SampleConfig, "c", "--inference_mode", "gibbs", "--indices", "1,x")
    assert "--indices: invalid int value: '1,x'" in capsys.readouterr().err


def test_the_choices_of_a_registry_are_lines_of_help_and_an_error_of_one_line(tmp_path):
    done = run_script("video_sample.py", "--help", cwd=tmp_path, env={"COLUMNS": "200"})
    lines = [line.strip() for line in done.stdout.splitlines()]
    assert "gibbs: autoreg, then sweeps over the video again" in lines
    done = run_script("video_sample.py", "c.pt", "--inference_mode", "gibs", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "--inference_mode 'gibs' is unknown: choose from autoreg, long-range" in done.stderr


def test_the_search_says_which_options_only_name_the_folder(tmp_path):
    done = run_script("video_optimal_schedule.py", "--help", cwd=tmp_path)
    assert " ".join(done.stdout.split()).count("the search only takes from it the name") == 8


def test_unknown_keys_are_ignored_and_missing_ones_get_defaults():
    loaded = script_util.config_from_args(ModelConfig, {"num_channels": 64, "class_cond": True})
    assert loaded == ModelConfig(num_channels=64)


@pytest.mark.parametrize("options, words", [
    ({"num_channels": 40}, "--num_channels 40"),
    ({"num_heads": 5}, "--num_heads 5"),
    ({"image_size": 48}, "--image_size 48.*16, 32, 64, 128, 256"),
    ({"diffusion_steps": 20}, "--diffusion_steps 20.*--noise_schedule cosine"),
    ({"noise_schedule": "square"}, "square.*linear, cosine"),
    ({"attention_resolutions": "a"}, "--attention_resolutions"),
    ({"timestep_respacing": "ddim999"}, "999"),
    ({"no_such_option": 1}, "no_such_option"),
])  # fmt: skip
def test_illegal_model_options_are_named(options, words):
    with pytest.raises(ValueError, match=words):
        script_util.create_model_and_diffusion(**({"image_size": 32, "num_channels": 32} | options))


@pytest.mark.parametrize("options, words", [
    ({"use_fp16": True, "precision": "bf16"}, "--use_fp16 True and --precision bf16"),
    ({"save_latest_only": True, "keep_checkpoints": 2}, "--keep_checkpoints and --save_latest_only"),
    ({"ema_rate": "0.99,x"}, "--ema_rate 0.99,x"),
    ({"batch_size": 0}, "--batch_size 0"),
])  # fmt: skip
def test_contradicting_training_options_are_refused(options, words):
    with pytest.raises(ValueError, match=words):
        TrainConfig(dataset="x", **options)


def test_a_half_precision_checkpoint_loads_as_float32(tmp_path):
    import torch

    path = make_checkpoint(tmp_path / "checkpoints/a/ema_0.99_000010.pt", "bouncy_balls")
    content = torch.load(path, weights_only=True)
    content["state_dict"] = {name: value.half() for name, value in content["state_dict"].items()}
    torch.save(content, path)
    model, loaded_config, step = script_util.load_model(str(path))
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert step == 1234 and loaded_config["dataset"] == "bouncy_balls" and not model.training


def modules_after(code: str) -> set[str]:
    code += "\nimport sys; print(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.split(".")[0] for name in done.stdout.splitlines()[-1].split()}


@pytest.mark.parametrize(
    "module",
    "inference_utils config registry script_util data.paths data.frame_masks data.frame_selection "
    "sampling.options evaluation.options study.options".split(),
)
def test_light_modules_load_nothing_heavy(module):
    loaded = modules_after(f"import improved_diffusion.{module}")
    assert not loaded & {"torch", "tensorflow", "lpips", "wandb", "skimage", "matplotlib", "mpi4py"}


@pytest.mark.slow
def test_help_of_every_script_loads_no_torch():
    for path in sorted((ROOT / "scripts").glob("*.py")):
        code = (
            f"import runpy, sys; sys.argv = [{path.name!r}, '--help']\n"
            f"try: runpy.run_path({str(path)!r}, run_name='__main__')\n"
            "except SystemExit as end: assert end.code == 0"
        )
        assert not modules_after(code) & {"torch", "tensorflow", "lpips", "wandb"}, path.name


def test_a_defect_shows_its_traceback_and_a_mistake_does_not(tmp_path):
    script = tmp_path / "script.py"
    for error, traceback in (("ValueError('bad\\nflag')", False), ("KeyError('defect')", True)):
        script.write_text(
            "from improved_diffusion.script_util import run_main\n"
            f"def main(): raise {error}\n"
            "run_main(main)\n"
        )
        done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
        assert done.returncode == 1
        assert ("Traceback" in done.stderr) is traceback
    assert "bad flag" not in done.stderr


def test_a_missing_data_set_says_how_to_make_it(tmp_path):
    done = run_script("video_train.py", "--dataset=mazes_cwvae", "--max_steps", "1", cwd=tmp_path)
    assert done.returncode == 1 and "datasets/mazes.py" in done.stderr
    assert done.stderr.count("\n") == 1 and not list(Path(tmp_path).glob("checkpoints/*"))


@pytest.mark.parametrize(
    ("group", "words", "told"),
    [
        (TrainConfig, "--dataset a --muon_lr 0.1", "--muon_lr does nothing with --optimizer adamw"),
        (SampleConfig, "a.pt --inference_mode autoreg --recall_gap 3", "--recall_gap does nothing"),
        (TrainConfig, "--dataset a --optimizer muon --muon_lr 0.1", ""),
    ],
)
def test_an_option_of_something_that_is_not_chosen_is_refused(group, words, told):
    parser = argparse.ArgumentParser()
    script_util.add_arguments(parser, group)
    args = parser.parse_args(words.split())
    if not told:
        assert script_util.config_from_args(group, args).optimizer_options.muon_lr == 0.1
        return
    with pytest.raises(ValueError, match=told):
        script_util.config_from_args(group, args)
