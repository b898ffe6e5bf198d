"""Density per layer: uniform, ER, ERK."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from growth import InputError

# A layer's weight shape: (out, in) or (out, in, kh, kw).
Shape = tuple[int, ...]


def uniform(
    sparse: Mapping[str, Shape], dense: Mapping[str, Shape], density: float
) -> dict[str, float]:
    """Every sparse layer at ``density``, whatever is kept dense besides."""
    return dict.fromkeys(sparse, density)


def erdos_renyi(
    sparse: Mapping[str, Shape], dense: Mapping[str, Shape], density: float
) -> dict[str, float]:
    """ER (Mocanu et al. 2018): density in proportion to (n_in + n_out) / (n_in n_out)."""
    raw = {name: (shape[0] + shape[1]) / (shape[0] * shape[1]) for name, shape in sparse.items()}
    return _solve(raw, sparse, dense, density)


def erdos_renyi_kernel(
    sparse: Mapping[str, Shape], dense: Mapping[str, Shape], density: float
) -> dict[str, float]:
    """ERK (Evci et al. 2020): density in proportion to the sum of the weight's dimensions over
    their product, kernel sizes included."""
    raw = {name: sum(shape) / _size(shape) for name, shape in sparse.items()}
    return _solve(raw, sparse, dense, density)


def _size(shape: Shape) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _solve(
    raw: Mapping[str, float],
    sparse: Mapping[str, Shape],
    dense: Mapping[str, Shape],
    density: float,
) -> dict[str, float]:
    """raw times the epsilon for which all layers together reach ``density``.

    A layer that would exceed 1 becomes dense and epsilon is solved again, one layer at a time, as
    in the authors' code. Raises InputError when the layers kept dense alone exceed the density.
    """
    full = dict(dense)
    left = dict(sparse)
    while left:
        budget = density * sum(_size(shape) for shape in left.values())
        budget -= (1 - density) * sum(_size(shape) for shape in full.values())
        if budget <= 0:
            raise InputError(
                f"density {density} cannot be reached: the layers kept dense already hold more "
                f"({', '.join(full)}); raise the density or keep fewer layers dense"
            )
        epsilon = budget / sum(raw[name] * _size(shape) for name, shape in left.items())
        densest = max(left, key=lambda name: raw[name])
        if raw[densest] * epsilon <= 1:
            break
        full[densest] = left.pop(densest)
    return {name: raw[name] * epsilon if name in left else 1.0 for name in sparse}


Distribution = Callable[[Mapping[str, Shape], Mapping[str, Shape], float], dict[str, float]]

DISTRIBUTIONS: dict[str, Distribution] = {
    "uniform": uniform,
    "er": erdos_renyi,
    "erk": erdos_renyi_kernel,
}
