"""Grids of orientations: groups, quadrature, convolutions over orientations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation

from mlip.models.ponita_published import repelled
from mlip.nn.orientations import DEGREE, GROUPS, Orientations, vertices
from mlip.nn.rotations import rotations
from mlip.nn.spherical import SphericalHarmonics

GRIDS = [number for number in DEGREE if number > 1]


@pytest.mark.parametrize("number", GRIDS)
def test_the_groups_permute_the_points(number: int) -> None:
    grid = Orientations(number, 1)
    for group in GROUPS[number]:
        for R in rotations(group, mirrors=True).matrices:
            p = grid.permutation(R)
            assert sorted(p.tolist()) == list(range(number))
            torch.testing.assert_close(
                grid.points.exact @ R.T, grid.points.exact[p], rtol=0, atol=1e-12
            )
            assert torch.equal(grid.weights.exact[p], grid.weights.exact)
    other = {"octahedral", "icosahedral"} - set(GROUPS[number])
    for group in other:
        with pytest.raises(ValueError, match="does not permute"):
            for R in rotations(group).matrices:
                grid.permutation(R)


@pytest.mark.parametrize("number", GRIDS)
def test_integrals_are_exact_up_to_the_degree_and_not_beyond(number: int) -> None:
    points, weights = vertices(number)
    means = weights @ SphericalHarmonics(11).double()(points)  # (LM,)
    size = [float(means[l * l : (l + 1) ** 2].norm()) for l in range(12)]
    assert abs(size[0] - 1) < 1e-14 and abs(float(weights.sum()) - 1) < 1e-14
    first = DEGREE[number] + 1
    assert max(size[1:first]) < 1e-13 and size[first] > 0.5
    absent = (1, 3, 5, 7, 9, 11) if number == 6 else (1, 2, 3, 4, 5, 7, 8, 9, 11)
    assert max(size[l] for l in absent) < 1e-13  # the group has no invariants of these degrees


@pytest.mark.parametrize("number", GRIDS)
def test_few_dot_products_and_their_eigenspaces(number: int) -> None:
    """Any kernel of o.o' acts on harmonics up to degree t / 2 as a number for each degree."""
    grid = Orientations(number, DEGREE[number] // 2)
    dots = (grid.points.exact @ grid.points.exact.T).flatten().numpy()
    few = {6: 3, 12: 4, 20: 6}
    if number in few:
        assert len(np.unique(dots.round(9))) == few[number]
    kernel = torch.from_numpy(np.exp(dots) if number < 32 else dots + dots**2)
    kernel = kernel.view(number, number) * grid.weights.exact
    Y = grid.to_grid.exact
    for l in range(DEGREE[number] // 2 + 1):
        block = Y[:, l * l : (l + 1) ** 2]
        image = kernel @ block
        eigenvalue = (image * block).sum() / block.square().sum()
        torch.testing.assert_close(image, eigenvalue * block, rtol=0, atol=1e-12)


@pytest.mark.parametrize("number", GRIDS)
def test_synthesis_analysis_mean(number: int) -> None:
    grid = Orientations(number, DEGREE[number] // 2).double()
    A = torch.randn(len(grid.from_grid.exact), 3, 2, generator=torch.manual_seed(0)).double()
    f = grid.synthesis(A)
    torch.testing.assert_close(grid.analysis(f), A, rtol=0, atol=1e-13)
    torch.testing.assert_close(grid.mean(f), A[0], rtol=0, atol=1e-13)


@pytest.mark.parametrize("number", GRIDS)
def test_the_second_half_is_opposite_to_the_first(number: int) -> None:
    grid = Orientations(number, 1)
    assert grid.half_size == number // 2
    assert torch.equal(grid.points.exact[grid.half_size :], -grid.points.exact[: grid.half_size])


def test_no_other_numbers_and_no_more_than_they_resolve() -> None:
    with pytest.raises(ValueError, match="no 13 orientations"):
        Orientations(13, 1)
    with pytest.raises(ValueError, match="resolve degree 2, not 3"):
        Orientations(20, 3)
    R = torch.from_numpy(Rotation.random(random_state=0).as_matrix())
    with pytest.raises(ValueError, match="does not permute"):
        Orientations(12, 1).permutation(R)


def test_repelled_points_reach_the_known_minimum() -> None:
    """Thomson's problem; D. J. Wales and S. Ulker, Phys. Rev. B 74, 212101 (2006)."""
    for number, known in ((8, 19.675287861), (20, 150.881568334)):
        o = repelled(number)
        energy = float((1 / torch.pdist(o)).sum())
        assert abs(energy / known - 1) < 1e-6
