"""Random projections: the rows w of FAVOR+'s features, drawn as a pure function of (seed, layer, redraw index).

A projection holds `m` rows of width `d` for each of `heads` heads, every row marginally N(0, I) unless its norms are
regularized. Drawing happens on the CPU in float64 with a private generator and is rounded to float32, so the same
three numbers give the same rows on every device, rank and resume, and no global random state is touched.

Letters: `m` features (rows), `d` head width.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from performer_lm.ops.hashing import mix_seed


def default_num_features(dim: int) -> int:
    """Return d ln d, the number of features the FAVOR+ analysis asks for (2009.14794, theorem 4)."""
    return max(1, int(dim * math.log(dim)))


def _gaussian(*shape: int, generator: torch.Generator) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64, device="cpu")


def haar(count: int, dim: int, *, generator: torch.Generator) -> Tensor:
    """Draw `count` rotations `(count, d, d)` from the Haar measure.

    The Q of a QR decomposition alone is not Haar: LAPACK leaves the diagonal of R with signs that depend on Q, which
    biases every estimate built on it. Giving column i the sign of R_ii repairs that (Mezzadri, math-ph/0609050).
    """
    q, r = torch.linalg.qr(_gaussian(count, dim, dim, generator=generator))
    signs = torch.where(r.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    return q * signs[:, None, :]


def simplex(dim: int) -> Tensor:
    """Return the `d` unit vectors `(d, d)` of a regular simplex: every pair at cosine -1 / (d - 1) (2301.13856)."""
    centred = torch.eye(dim, dtype=torch.float64, device="cpu") - 1.0 / dim
    return centred / centred.norm(dim=-1, keepdim=True)


def _iid_directions(heads: int, num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    rows = _gaussian(heads, num_features, dim, generator=generator)
    return rows / rows.norm(dim=-1, keepdim=True)


def _orthogonal_directions(heads: int, num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    blocks = -(-num_features // dim)
    rotations = haar(heads * blocks, dim, generator=generator)
    return rotations.reshape(heads, blocks * dim, dim)[:, :num_features]


def _simplex_directions(heads: int, num_features: int, dim: int, generator: torch.Generator) -> Tensor:
    if dim < 2:
        raise ValueError(f"simplex projections need a head width of at least 2, got {dim}")
    blocks = -(-num_features // dim)
    rotations = haar(heads * blocks, dim, generator=generator)
    return (simplex(dim) @ rotations).reshape(heads, blocks * dim, dim)[:, :num_features]


COUPLINGS: dict[str, Callable[[int, int, int, torch.Generator], Tensor]] = {
    "iid": _iid_directions,
    "orthogonal": _orthogonal_directions,
    "simplex": _simplex_directions,
}


def draw_projection(
    heads: int,
    num_features: int,
    dim: int,
    *,
    seed: int,
    layer: int = 0,
    index: int = 0,
    coupling: str = "orthogonal",
    regularized: bool = False,
) -> Tensor:
    """Draw the projection of one layer: `(heads, m, d)` float32 on the CPU, the same for the same arguments.

    Args:
        heads: how many independent projections.
        num_features: rows `m` of each.
        dim: row width `d`.
        seed: the run's seed.
        layer: the layer's number, so that layers differ.
        index: the redraw index; 0 is the first draw.
        coupling: how the rows of one block of `d` hang together: `iid`, `orthogonal` (Haar blocks, 2009.14794) or
            `simplex` (a rotated regular simplex, 2301.13856). Blocks are independent.
        regularized: give every row the norm sqrt(d) instead of independent chi(d) norms. Chi norms make each row
            exactly N(0, I) and so the features unbiased; sqrt(d) estimates the regularized kernel SMREG, which
            compresses large scores.

    Raises:
        ValueError: for an unknown coupling.
    """
    if coupling not in COUPLINGS:
        raise ValueError(f"coupling must be one of {', '.join(COUPLINGS)}, got {coupling!r}")
    generator = torch.Generator(device="cpu").manual_seed(mix_seed(seed, layer, index))
    directions = COUPLINGS[coupling](heads, num_features, dim, generator)
    if regularized:
        return (directions * math.sqrt(dim)).float()
    norms = _gaussian(heads, num_features, dim, generator=generator).norm(dim=-1, keepdim=True)
    return (directions * norms).float()
