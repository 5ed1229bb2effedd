"""One update with each option: exact resume of all pairs, optimisers against their formulas, errors."""

import io

import pytest
import torch
from torch import nn

from improved_diffusion.config import DiffusionConfig, ModelConfig, from_options
from improved_diffusion.data.rng_util import make_generator
from improved_diffusion.sampling.trained_model import create_diffusion, create_model
from improved_diffusion.training.muon_float32 import Float32Muon
from improved_diffusion.training.optimizers import as_matrix, hidden_matrices
from improved_diffusion.training.options import TrainConfig
from improved_diffusion.training.train_step import TrainStep
from train_runs import equal, make_loop


class Tiny(nn.Module):
    """A network with one of each part that optimisers tell apart, and with dropout."""

    def __init__(self, learn_sigma: bool):
        super().__init__()
        self.time_embed = nn.Linear(1, 8)
        self.first = nn.Conv2d(4, 8, 3, padding=1)
        self.norm = nn.GroupNorm(2, 8)
        self.hidden = nn.Conv2d(8, 12, 3, padding=1)
        self.dropout = nn.Dropout(0.1)
        self.matrix = nn.Linear(12, 8)
        self.last = nn.Conv2d(8, 6 if learn_sigma else 3, 1)
        self.to(memory_format=torch.channels_last)

    def forward(self, x, timesteps, *, x0, obs_mask, latent_mask, frame_indices):
        shown = torch.cat([torch.where(obs_mask > 0, x0, x), obs_mask.expand_as(x[:, :, :1])], 2)
        hidden = self.norm(self.first(shown.flatten(0, 1)))
        times = self.time_embed(timesteps.float()[:, None] / 1000)
        hidden = hidden + times.repeat_interleave(x.shape[1], 0)[:, :, None, None]
        hidden = self.dropout(self.hidden(hidden).tanh()).permute(0, 2, 3, 1)
        hidden = self.matrix(hidden).tanh().permute(0, 3, 1, 2)
        return self.last(hidden).float().unflatten(0, x.shape[:2])


def make_step(**options) -> TrainStep:
    values = {"dataset": "x", "batch_size": 2, "lr": 0.001, "ema_rate": "0.9", **options}
    diffusion = create_diffusion(from_options(DiffusionConfig, {"diffusion_steps": 40, **values}))
    torch.manual_seed(0)
    network = Tiny(diffusion.config.learn_sigma)
    return TrainStep(network, diffusion, from_options(TrainConfig, values))


def items(seed: int, batch_size: int = 2, frames: int = 2) -> dict[str, torch.Tensor]:
    shape = (batch_size, frames, 3, 8, 8)
    observed = torch.zeros(batch_size, frames, 1, 1, 1)
    observed[:, 0] = 1
    return {
        "frames": torch.randint(256, shape, generator=make_generator(seed)).to(torch.uint8),
        "frame_indices": torch.arange(frames).expand(batch_size, -1),
        "obs_mask": observed,
        "latent_mask": 1 - observed,
    }


def stored(step: TrainStep) -> dict:
    """All that a checkpoint holds, through a file's bytes."""
    file = io.BytesIO()
    weights = step.network.state_dict()
    torch.save({"weights": weights, "emas": step.emas, "state": step.state_dict()}, file)
    file.seek(0)
    return torch.load(file)


def resumed(file: dict, step: int, **options) -> TrainStep:
    after = make_step(**options)
    after.network.load_state_dict(file["weights"])
    for rate, ema in after.emas.items():
        for name, value in ema.items():
            value.copy_(file["emas"][rate][name])
    after.load_state_dict(file["state"], step)
    return after


COLUMNS = (
    "prediction loss_weighting schedule_sampler stratified_timesteps optimizer microbatch precision"
)
PAIRS = """
eps     none     uniform             True   muon   -1  fp32
eps     min-snr  loss-second-moment  False  adamw   1  bf16
eps     sigmoid  lognormal           True   adamw   1  fp32
eps     none     logsnr-uniform      False  muon    1  bf16
xstart  none     loss-second-moment  True   muon    1  fp32
xstart  min-snr  lognormal           False  muon   -1  bf16
xstart  sigmoid  logsnr-uniform      True   adamw  -1  fp32
xstart  sigmoid  uniform             False  adamw   1  bf16
v       none     lognormal           False  adamw  -1  bf16
v       min-snr  uniform             True   muon    1  fp32
v       sigmoid  loss-second-moment  False  muon   -1  fp32
v       min-snr  logsnr-uniform      True   adamw  -1  fp32
xstart  min-snr  uniform             True   adamw  -1  bf16
"""
CASES = [dict(zip(COLUMNS.split(), row.split(), strict=True)) for row in PAIRS.split("\n") if row]


def test_the_cases_cover_all_pairs_of_values():
    names = COLUMNS.split()
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            seen = {(case[first], case[second]) for case in CASES}
            values = [{case[name] for case in CASES} for name in (first, second)]
            assert len(seen) == len(values[0]) * len(values[1]), (first, second)


@pytest.mark.parametrize("case", CASES, ids=lambda case: " ".join(case.values()))
def test_resume_is_exact_for_all_pairs_of_options(case):
    options = {
        **case,
        "stratified_timesteps": case["stratified_timesteps"] == "True",
        "microbatch": int(case["microbatch"]),
        "weight_decay": 0.01,
        "lr_anneal_steps": 5,
    }
    whole = make_step(**options)
    before = [param.clone() for param in whole.params.values()]
    assert whole(items(1)).done
    file = stored(whole)
    assert whole(items(2)).done
    parts = resumed(file, 1, **options)
    assert parts(items(2)).done
    assert equal(stored(whole), stored(parts))
    assert all((a != b).any() for a, b in zip(before, whole.params.values(), strict=True))


# ---------------------------------------------------------------- muon


def is_hidden(name: str, param: torch.Tensor) -> bool:
    """What Muon is to update of the UNet, by the published names of its parameters."""
    first_and_last = name.startswith(("input_blocks.0.0.", "out.2."))
    return param.ndim > 1 and not first_and_last and "rpe" not in name and "time_embed" not in name


def test_muon_has_the_matrices_of_hidden_layers_and_adamw_the_rest():
    config = ModelConfig(
        image_size=32, num_channels=32, num_res_blocks=1, attention_resolutions="4"
    )
    network = create_model(config)
    expected = {name for name, param in network.named_parameters() if is_hidden(name, param)}
    hidden = {id(param) for param in hidden_matrices(network)}
    assert {n for n, param in network.named_parameters() if id(param) in hidden} == expected
    for name in ("0.in_layers.2.weight", "1.spatial_attention.qkv.weight"):
        assert f"middle_block.{name}" in expected
    assert all(as_matrix(p).data_ptr() == p.data_ptr() for p in hidden_matrices(network))
    step = make_step(optimizer="muon")
    adamw, muon = (len(group["params"]) for group in step.optimizer.param_groups)
    assert (adamw, muon) == (len(step.params) - 2, 2)


def polar(x: torch.Tensor) -> torch.Tensor:
    """Five Newton-Schulz steps towards the nearest orthogonal matrix."""
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = len(x) > x.shape[1]
    y = x.T if tall else x
    y = y / y.norm()
    for _ in range(5):
        gram = y @ y.T
        y = a * y + (b * gram + c * gram @ gram) @ y
    return y.T if tall else y


def test_an_update_of_muon_is_the_published_formula_on_flattened_weights():
    """A convolution and a matrix, in torch's order of axes, whatever the memory's."""
    step = make_step(optimizer="muon", weight_decay=0.1, lr_warmup_steps=2)
    before = {name: step.params[name].detach().clone() for name in step.params}
    step(items(1))
    rate = 0.02 / 2  # the first of two updates of warm-up
    for name in ("hidden.weight", "matrix.weight"):
        param = step.params[name].detach()
        # From zero the momentum is 0.05 of the gradient, and Nesterov's look-ahead changes its size
        # alone, to which the polar factor is blind.
        gradient = step.params[name].grad.reshape(len(param), -1)
        ratio = max(1, len(param) / gradient.shape[1]) ** 0.5
        change = param - before[name] * (1 - rate * 0.1)
        expected = -rate * ratio * polar(gradient).view(param.shape)
        assert (change - expected).norm() < 1e-4 * expected.norm(), name
    bias = step.params["last.bias"]
    kept = before["last.bias"] * (1 - 0.0005 * 0.1)
    torch.testing.assert_close(
        bias.detach(), kept - 0.0005 * bias.grad.sign(), rtol=1e-4, atol=1e-7
    )


def test_muon_on_processors_is_that_of_torch_without_its_rounding():
    """Two updates, of two matrices of one shape and a tall one: the same to bfloat16's precision."""
    torch.manual_seed(0)
    shapes = [(6, 20), (6, 20), (24, 3)]
    starts, gradients = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    ends = []
    for make in (Float32Muon, torch.optim.Muon):
        params = [start.clone().requires_grad_() for start in starts]
        optimizer = make(params, lr=0.1, weight_decay=0.2)
        for _ in range(2):
            for param, gradient in zip(params, gradients, strict=True):
                param.grad = gradient.clone()
            optimizer.step()
        ends.append(params)
        assert list(optimizer.state[params[0]]) == ["momentum_buffer"]
    for start, mine, theirs in zip(starts, *ends, strict=True):
        assert (mine - theirs).norm() < 0.02 * (mine - start).norm()


def test_both_parts_follow_the_schedule_and_nothing_else_decays():
    step = make_step(optimizer="muon", lr_anneal_steps=4, muon_lr=0.1)
    rates = []
    for seed in range(2):
        step(items(seed))
        rates.append([group["lr"] for group in step.optimizer.param_groups])
    assert rates == [[0.001, 0.1], pytest.approx([0.00075, 0.075])]
    assert [group["weight_decay"] for group in step.optimizer.param_groups] == [0.0, 0.0]


def test_hyperparameters_are_those_of_the_command_that_resumes():
    for name in ("adamw", "muon"):
        step = make_step(optimizer=name)
        step(items(1))
        chosen = {"weight_decay": 0.5, "adam_betas": "0.5,0.75"}
        after = resumed(stored(step), 1, optimizer=name, **chosen)
        first, *others = after.optimizer.param_groups
        assert (first["betas"], first["weight_decay"]) == ((0.5, 0.75), 0.5)
        assert all(group["weight_decay"] == 0.5 for group in others)


def test_an_old_torch_refuses_muon_in_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")
    with pytest.raises(ValueError, match="--optimizer muon needs torch 2.9 .* --optimizer adamw"):
        make_step(optimizer="muon")


@pytest.mark.parametrize("options, words", [
    ({"optimizer": "sgd"}, "--optimizer 'sgd' is unknown: choose from adamw, muon"),
    ({"adam_betas": "0.9"}, "--adam_betas 0.9: must be two numbers in"),
    ({"optimizer": "muon", "adam_betas": "0.9,1"}, "--adam_betas 0.9,1: must be two numbers"),
    ({"optimizer": "muon", "muon_lr": -1.0}, "--muon_lr -1.0: must not be negative"),
])  # fmt: skip
def test_wrong_optimisers_are_refused_in_one_line(options, words):
    with pytest.raises(ValueError, match=words):
        from_options(TrainConfig, {"dataset": "x", **options})


# ---------------------------------------------------------------- the log, and what a run keeps


def test_the_error_of_clean_frames_is_logged_by_log_snr_without_weights():
    """Whatever the prediction type and the weighting: that of an xstart network, from its output."""
    for prediction in ("eps", "xstart", "v"):
        step = make_step(prediction=prediction, loss_weighting="min-snr", batch_size=6)
        update = step(items(3, batch_size=6))
        bars = step.diffusion.alphas_cumprod[update.timesteps]
        snr = bars / (1 - bars)
        scale = {"eps": snr, "xstart": 1 + 0 * snr, "v": 1 + snr}[prediction]
        errors = [e / float(s) for e, s in zip(update.losses["eval-mse"], scale, strict=True)]
        quarters = [sum(s > edge for edge in (0.018316, 1, 54.598)) for s in snr]
        logged = list(step.clean_errors(update))
        assert [quarter for quarter, _ in logged] == quarters and len(set(quarters)) > 1
        assert [error for _, error in logged] == pytest.approx(errors, rel=1e-5)


@pytest.mark.slow
def test_resuming_with_another_objective_or_optimiser_is_refused(videos):
    process = {"prediction": "v", "loss_weighting": "min-snr"}
    run = {
        "resume_id": "run",
        "max_steps": 1,
        "schedule_sampler": "lognormal",
        "timestep_options": {"log_sigma_mean": 0.0},
        "optimizer": "muon",
    }
    make_loop(videos, None, process, **run).run_loop()
    other_gamma = {"loss_weighting_options": {"min_snr_gamma": 4.0}}
    for changed_process, changed, words in (
        ({"prediction": "eps"}, {}, "--prediction eps differs .*: give --prediction v"),
        ({"loss_weighting": "none"}, {}, "--loss_weighting none differs .* --loss_weighting min"),
        (other_gamma, {}, "--min_snr_gamma 4.0 differs .* give --min_snr_gamma 5.0"),
        ({}, {"schedule_sampler": "uniform"}, "give --schedule_sampler lognormal"),
        ({}, {"timestep_options": {"log_sigma_mean": 0.5}}, "give --log_sigma_mean 0.0"),
        ({}, {"optimizer": "adamw"}, "--optimizer adamw differs .* give --optimizer muon"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            make_loop(videos, None, {**process, **changed_process}, **{**run, **changed})
        assert "\n" not in str(caught.value)


def test_resuming_with_what_leaves_the_objective_is_told(videos, caplog):
    run = {"resume_id": "run", "max_steps": 1, "schedule_sampler": "loss-second-moment"}
    make_loop(videos, **run).run_loop()
    caplog.set_level("INFO")
    changed = {"schedule_sampler": "uniform", "stratified_timesteps": True}
    # The default prediction type by its name is no change.
    make_loop(videos, None, {"prediction": "eps"}, **{**run, **changed})
    assert "--schedule_sampler was loss-second-moment before, is uniform now" in caplog.text
    assert "--stratified_timesteps was False before, is True now" in caplog.text
    assert "--prediction" not in caplog.text
    with pytest.raises(ValueError, match="--schedule_sampler lognormal differs"):
        make_loop(videos, **{**run, "schedule_sampler": "lognormal"})
