"""Weights of linear multistep solvers: integrals of the polynomial through what is known already.

numpy alone, in float64. Solvers: sampling/samplers.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

# Exact for the polynomials, and to rounding for them times exp(u) over steps of a few units.
_ABSCISSAE, _WEIGHTS = np.polynomial.legendre.leggauss(16)


def adams_weights(nodes: Sequence[float], start: float, end: float) -> np.ndarray:
    """Weights w of f(nodes) with sum(w f) = the integral of their polynomial from start to end.

    Exact where f is a polynomial of lower degree than there are nodes (Adams-Bashforth, Hairer,
    Norsett & Wanner, Solving Ordinary Differential Equations I, section III.5: variable steps).
    """
    return _integral(nodes, start, end, np.ones_like)


def decaying_weights(nodes: Sequence[float], step: float, *, reach: float = np.inf) -> np.ndarray:
    """The same for the integral of exp(u - step) P(u) from u = 0 to `step`, P the polynomial.

    They are the weights of UniPC (arXiv 2302.04867) Eq. 5 and 8 that solve its conditions of every
    order exactly, so that its function B(h) cancels out. reach: P is followed so far, and constant
    beyond.
    """
    reach = min(reach, step)
    weights = _integral(nodes, 0.0, reach, lambda u: np.exp(u - step))
    return weights - np.expm1(reach - step) * lagrange(nodes, np.array([reach]))[:, 0]


def _integral(
    nodes: Sequence[float], start: float, end: float, kernel: Callable[[np.ndarray], np.ndarray]
) -> np.ndarray:
    half = (end - start) / 2
    u = start + half * (1 + _ABSCISSAE)
    return lagrange(nodes, u) @ (half * _WEIGHTS * kernel(u))


def lagrange(nodes: Sequence[float], u: np.ndarray) -> np.ndarray:
    """The polynomials [nodes, points] that are 1 at one of the nodes and 0 at the others, at u."""
    rows = []
    for j, node in enumerate(nodes):
        others = np.delete(np.asarray(nodes, dtype=np.float64), j)
        rows.append(np.prod((u[:, None] - others) / (node - others), axis=1))
    return np.array(rows)
