"""Multistep solvers against integrals and flows in closed form, in float64."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from improved_diffusion.data.frame_batch import FrameBatch
from improved_diffusion.registry import SAMPLERS
from improved_diffusion.sampling.multistep import adams_weights, decaying_weights

NODES = np.array([0.0, -0.4, -1.0, -1.3])
STEP = 0.7
CUBIC = np.array([0.3, -1.0, 0.5, 2.0])  # np.polyval's order


def test_equal_steps_have_the_weights_of_adams_and_bashforth():
    for order, weights in {
        1: [1],
        2: [3 / 2, -1 / 2],
        4: [55 / 24, -59 / 24, 37 / 24, -9 / 24],
    }.items():
        nodes = 5 - 0.1 * np.arange(order)
        np.testing.assert_allclose(
            adams_weights(nodes, 5, 5.1), 0.1 * np.array(weights), rtol=1e-12
        )


def test_weights_of_unequal_steps_integrate_polynomials_exactly():
    exact = np.diff(np.polyval(np.polyint(CUBIC), [0, STEP]))[0]
    assert adams_weights(NODES, 0, STEP) @ np.polyval(CUBIC, NODES) == pytest.approx(
        exact, rel=1e-12
    )


def decaying_integral(polynomial, step) -> float:
    """Of exp(u - step) p(u) from 0 to step, by parts: [p - p' + p'' - ...] exp(u - step)."""
    total, sign = 0.0, 1.0
    while len(polynomial):
        total += sign * (np.polyval(polynomial, step) - np.polyval(polynomial, 0) * np.exp(-step))
        polynomial, sign = np.polyder(polynomial) if len(polynomial) > 1 else [], -sign
    return total


@pytest.mark.parametrize("nodes", [NODES, np.array([STEP, *NODES[:3]])], ids=["predict", "correct"])
def test_decaying_weights_integrate_polynomials_exactly(nodes):
    exact = decaying_integral(CUBIC, STEP)
    assert decaying_weights(nodes, STEP) @ np.polyval(CUBIC, nodes) == pytest.approx(
        exact, rel=1e-12
    )


def test_beyond_its_reach_a_polynomial_stays_as_it_is_there():
    near, reach = 0.25, 0.25
    exact = decaying_integral(CUBIC, near) * np.exp(near - STEP)
    exact += np.polyval(CUBIC, reach) * -np.expm1(near - STEP)
    found = decaying_weights(NODES, STEP, reach=reach) @ np.polyval(CUBIC, NODES)
    assert found == pytest.approx(exact, rel=1e-12)


class KnownDenoiser:
    """Clean frames by a formula of x (in x / sqrt(alpha_bar)) and sigma; keeps the x it is asked about."""

    def __init__(self, sigma: np.ndarray, formula):
        self.sigma, self.formula, self.asked = sigma, formula, []
        self.diffusion = SimpleNamespace(alphas_cumprod=1 / (1 + sigma**2))

    def denoise(self, x_t, t, batch):
        sigma = self.sigma[int(t)]
        x = x_t * np.sqrt(1 + sigma**2)
        self.asked.append(float(x.flatten()[0]))
        return self.formula(x, sigma)


def solve(sampler: str, denoiser: KnownDenoiser, noise: torch.Tensor) -> torch.Tensor:
    ones = torch.ones(1, len(noise), 1, 1, 1, dtype=torch.float64)
    frames = noise.view(1, -1, 1, 1, 1)
    batch = FrameBatch(torch.zeros_like(frames), 1 - ones, ones, torch.zeros(1, len(noise)).long())
    return SAMPLERS[sampler](denoiser, batch, noise=frames).flatten()


def edm_levels(n: int) -> np.ndarray:
    return np.linspace(0.02 ** (1 / 7), 80 ** (1 / 7), n) ** 7


def test_ipndm4_is_exact_where_the_slope_is_a_cubic_in_sigma():
    sigma = np.array([0.1, 0.4, 0.9, 1.1, 2.0, 2.2, 3.0, 4.0])
    denoiser = KnownDenoiser(sigma, lambda x, s: x - s * np.polyval(CUBIC, s))
    solve("ipndm4", denoiser, torch.ones(1, dtype=torch.float64))
    x = np.array(denoiser.asked[::-1])  # at sigma
    exact = np.diff(np.polyval(np.polyint(CUBIC), sigma))
    np.testing.assert_allclose(np.diff(x)[:4], exact[:4], rtol=1e-9)
    assert abs(np.diff(x)[-1] / exact[-1] - 1) > 0.1, "the first step is of order 1"


@pytest.mark.parametrize("sampler", ["dpmpp3m", "unipc"])
def test_it_is_exact_where_clean_frames_are_a_parabola_in_log_sigma(sampler):
    """Where no step is longer than the one before."""
    u = np.array([0.0, 1.0, 1.9, 2.7, 3.4, 3.9, 4.3])  # -log(sigma), rising
    denoiser = KnownDenoiser(
        np.exp(-u[::-1]), lambda x, s: 0 * x + np.polyval(CUBIC[1:], -np.log(s))
    )
    solve(sampler, denoiser, torch.ones(1, dtype=torch.float64))
    x = np.array(denoiser.asked)
    for i in range(3, len(u) - 1):
        h = u[i + 1] - u[i]
        shifted = np.poly1d(CUBIC[1:])(np.poly1d([1, u[i]])).coeffs
        assert x[i + 1] == pytest.approx(
            np.exp(-h) * x[i] + decaying_integral(shifted, h), rel=1e-9
        )


def test_a_long_step_after_a_short_one_does_not_overshoot():
    """As at the end of evenly spaced timesteps: clean frames stay between those seen and the limit."""
    sigma = np.array([0.01, 0.5, 0.52, 0.54])
    denoiser = KnownDenoiser(sigma, lambda x, s: 0 * x + s)
    for sampler in ("dpmpp3m", "unipc"):
        denoiser.asked.clear()
        solve(sampler, denoiser, torch.zeros(1, dtype=torch.float64))
        assert 0.45 < denoiser.asked[-1] < 0.5


ORDERS = {"dpmpp2m": 2, "heun": 2, "dpmpp3m": 3, "unipc": 4, "ipndm4": 4}


@pytest.mark.parametrize("sampler", ORDERS)
def test_solvers_converge_with_their_order(sampler):
    """Gaussian frames N(m, s^2): the flow keeps (x - m) / sqrt(s^2 + sigma^2)."""
    mean, variance, noise = 0.3, 0.25, torch.linspace(-2, 2, 5, dtype=torch.float64)
    errors = []
    for n in (150, 300):
        sigma = edm_levels(n)
        denoiser = KnownDenoiser(
            sigma, lambda x, s: mean + variance / (variance + s * s) * (x - mean)
        )
        first, last = sigma[-1] ** 2, sigma[0] ** 2
        start = noise * np.sqrt(1 + first)
        end = mean + (start - mean) * np.sqrt((variance + last) / (variance + first))
        exact = mean + variance / (variance + last) * (end - mean)
        errors.append(float((solve(sampler, denoiser, noise) - exact).abs().max()))
    order = np.log2(errors[0] / errors[1])
    assert ORDERS[sampler] - 0.15 < order < ORDERS[sampler] + 0.4, (errors, order)
