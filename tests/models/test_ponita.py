"""What PONITA promises beyond the contract of all models: its groups, its degrees, its grids."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule

from mlip.calculators import EqCalculator
from mlip.config import ConfigError
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.models.ponita import Density, Ponita, SpaceConvolution
from mlip.nn.rotations import Rotations, random_rotations, rotations
from mlip.potential import Potential
from mlip.rotation_orbit import RotationOrbit, rotation_orbit
from tests.conftest import rattled, without_zeros

SMALL: dict[str, Any] = dict(
    cutoff=4.0, channels=8, message_channels=4, hidden=8, num_basis=5, avg_num_neighbors=10.0
)


def make(seed: int = 0, **hyperparameters: Any) -> Potential:
    torch.manual_seed(seed)
    model = build("ponita", **{**SMALL, **hyperparameters})
    without_zeros(model, 0.1)
    return Potential(model, torch.zeros(119), scale=2.0).double().eval()


def graph(*structures: Atoms) -> AtomicGraph:
    return AtomicGraph.collate([AtomicGraph.from_atoms(a, 4.0) for a in structures])


ETHANOL, SALT = rattled(molecule("CH3CH2OH")), rattled(bulk("NaCl", "rocksalt", a=5.5))
BOTH = graph(ETHANOL, SALT)


def orbit_errors(potential: Potential, rule: Rotations) -> tuple[float, float, float]:
    """Largest deviations of energy, forces and stress on the orbit."""
    orbit: RotationOrbit = rotation_orbit(potential, BOTH, rule, stress=True)
    assert orbit.stress is not None
    stress = orbit.stress[:, 1]
    return tuple(  # type: ignore[return-value]
        float((x - x[0]).abs().max()) for x in (orbit.energy, orbit.forces, stress)
    )


RANDOM = random_rotations(6, torch.Generator().manual_seed(1), mirrors=True)


@pytest.mark.parametrize("pointwise", ["product", "gelu"])
@pytest.mark.parametrize("orientations", [6, 12, 20, 32])
def test_exact_under_the_group_with_its_reflections(orientations: int, pointwise: str) -> None:
    potential = make(orientations=orientations, pointwise=pointwise, lmax=4)
    assert not potential.model.exact_symmetry
    group = rotations(potential.model.exact_groups[-1], mirrors=True)
    some = slice(0, None, len(group) // 8)
    weights = torch.full_like(group.weights[some], 1 / len(group.weights[some]))
    assert max(orbit_errors(potential, Rotations("", group.matrices[some], weights, 0))) < 1e-10
    assert orbit_errors(potential, RANDOM)[1] > 1e-5  # and it is not trivial


@pytest.mark.parametrize(
    ("option", "exact"),
    [
        (dict(orientations=0), True),
        (dict(orientations=32, lmax=3), True),  # 3 + 3 x 2 = 9
        (dict(orientations=32, lmax=3, num_layers=3), True),
        (dict(orientations=32, lmax=4), False),
        (dict(orientations=32, lmax=6, fiber_lmax=1), True),
        (dict(orientations=32, lmax=3, pointwise="gelu"), False),
        (dict(orientations=20, lmax=2, fiber_lmax=1), True),
        (dict(orientations=12, lmax=2, fiber_lmax=1), True),
        (dict(orientations=20, lmax=3, fiber_lmax=1), False),
        (dict(orientations=12, lmax=3, num_layers=1), True),
        (dict(orientations=6, lmax=3, fiber_lmax=0), True),
    ],
)
def test_exact_under_all_rotations_where_degrees_allow_it(
    option: dict[str, Any], exact: bool
) -> None:
    """The promise is kept, and no more than necessary is left unpromised."""
    potential = make(**option)
    assert potential.model.exact_symmetry == exact
    errors = orbit_errors(potential, RANDOM)
    assert (max(errors) < 1e-12) == exact, errors


def test_finer_grids_have_smaller_rotation_errors() -> None:
    errors = []
    for orientations in (6, 12, 20, 32):
        total = 0.0
        for seed in range(3):
            potential = make(seed, orientations=orientations, pointwise="gelu", fiber_lmax=1)
            total += float(rotation_orbit(potential, BOTH, RANDOM).forces.var(dim=0).mean())
        errors.append(total)
    assert errors == sorted(errors, reverse=True), errors
    assert errors[-1] < 1e-2 * errors[0], errors


def test_features_are_permuted_by_the_group() -> None:
    """Rotated structure, features at permuted orientations: what group equivariance means."""
    model: Ponita = make(orientations=12, pointwise="gelu").model
    seen: list[torch.Tensor] = []
    model.layers[0].register_forward_hook(lambda _, __, out: seen.append(out[0]))
    R = rotations("icosahedral").matrices[17]
    for g in (BOTH, BOTH.rotated(R)):
        model(g.replace(vectors=g.edge_vectors()))
    p = model.grid.permutation(R)
    assert (seen[0] - seen[0][p]).abs().max() > 1e-3
    torch.testing.assert_close(seen[1][p], seen[0], rtol=0, atol=1e-12)


def test_the_first_layer_is_the_convolution_in_closed_form() -> None:
    """The density is what the convolution over all orientations makes of constant features."""
    torch.manual_seed(0)
    model = make(orientations=32, fiber_lmax=2, lmax=2, message_channels=8).model
    c, grid = model.config, model.grid
    density, space = Density(c).double(), SpaceConvolution(c, grid).double()
    # The same channels sent, and of the weights those of kernels P_l for degree l.
    B, S = c.num_basis, c.channels
    with torch.no_grad():
        space.send.weight.copy_(density.send.weight)
        space.send_species.weight.zero_()
        space.fiber.weight.zero_()
        for l in range(3):
            scale = (2 * l + 1) ** 0.5  # sum over o of w Y_lm(o) P_l(o.r) = Y_lm(r) / (2l + 1)
            rows = slice(l * B * S, (l + 1) * B * S)
            space.fiber.weight[l, rows] = density.fiber.weight[l] * scale
    seen: list[Any] = []
    model.layers[0].convolution.register_forward_hook(lambda _, args, __: seen.append(args))
    model.layers[1].convolution.register_forward_hook(lambda _, args, __: seen.append(args))
    model(BOTH.replace(vectors=BOTH.edge_vectors()))
    (_, species, edges, neighbors), (_, _, kernels, _) = seen
    expected = density(None, species, edges, neighbors)
    x = species.expand(32, -1, -1)
    torch.testing.assert_close(space(x, species, kernels, neighbors), expected, rtol=0, atol=1e-12)


def test_kernels_are_legendre_polynomials() -> None:
    model = make(orientations=20, lmax=4).model
    seen: list[Any] = []
    model.kernels.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    v = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    g = graph(Atoms("CO", positions=[[0, 0, 0], v]))
    model(g.replace(vectors=g.edge_vectors()))
    _, out = seen[0]
    out = out.view(10, 2, 5, model.config.num_basis, -1)  # (O / 2, N, l, n, J)
    cosine = model.grid.points()[:10] @ (v / v.norm())
    for l in range(5):
        P = torch.special.legendre_polynomial_p(cosine, l) * (2 * l + 1) ** 0.5
        ratio = out[:, 0, l, :, 0] / out[:, 0, 0, :, 0]
        torch.testing.assert_close(ratio, P[:, None].expand_as(ratio), rtol=1e-9, atol=1e-12)


def test_a_vector_parallel_to_an_orientation_is_no_special_place() -> None:
    """Forces are smooth through it, where the published kernels have a kink."""
    for name, options, smooth in (
        ("ponita", dict(SMALL, pointwise="gelu", orientations=12), True),
        ("ponita_published", dict(cutoff=4.0, channels=6, num_layers=1, basis_hidden=8), False),
    ):
        torch.manual_seed(0)
        model = build(name, **options)
        without_zeros(model, 0.3)
        o = model.grid.points()[0] if smooth else model.points[0]
        across = torch.linalg.cross(o, torch.tensor([0.3, -0.2, 0.9])).numpy()
        potential = Potential(model, torch.zeros(119)).double().eval()
        forces = []
        for t in np.arange(-8, 9) * 1e-4:
            third = [1.1, -0.9, 0.8]
            atoms = Atoms("OCH", positions=[[0, 0, 0], 2.0 * o.numpy() + t * across, third])
            forces.append(potential(graph(atoms))["forces"])
        f = torch.stack(forces)
        fine = f.diff(n=2, dim=0).abs().max()
        coarse = f[::2].diff(n=2, dim=0).abs().max()
        # With half the step: a quarter where it is smooth, one half at a kink of the force, all at
        # a jump.
        assert (fine < 0.3 * coarse) == smooth, (name, fine, coarse)


def test_a_grid_turned_at_random_in_training_only() -> None:
    potential = make(orientations=12, pointwise="gelu", random_grid=True)
    fixed = make(orientations=12, pointwise="gelu")
    assert torch.equal(potential(BOTH)["energy"], fixed(BOTH)["energy"])
    torch.manual_seed(5)
    a = potential.train()(BOTH)
    b = potential(BOTH)
    torch.manual_seed(5)
    again = potential(BOTH)
    # Each structure has its own.  The grid's error for the crystal is 6e-10, its rounding 1e-15.
    assert (a["energy"] - b["energy"]).abs().min() > 1e-12
    assert torch.equal(a["energy"], again["energy"]) and torch.equal(a["forces"], again["forces"])
    # Forces are still those of the energy, stress is symmetric, and the turn is that of the grid:
    # an exactly symmetric model does not notice it.
    exact, still = make(random_grid=True).train(), make()
    for key in ("energy", "forces", "stress"):
        torch.testing.assert_close(
            exact(BOTH, stress=True)[key].detach(), still(BOTH, stress=True)[key],
            rtol=0, atol=1e-12, equal_nan=True,
        )  # fmt: skip


def test_a_grid_that_does_not_resolve_the_kernels_is_refused() -> None:
    with pytest.raises(ConfigError, match="12 orientations resolve 2; give"):
        build("ponita", orientations=12, fiber_lmax=3)
    with pytest.raises(ConfigError, match="orientations"):
        build("ponita", orientations=13)


def test_without_orientations_only_distances_matter() -> None:
    """PNITA: angles beyond the cutoff's reach are not seen, with orientations they are."""
    energies: dict[int, list[float]] = {0: [], 12: []}
    for orientations, found in energies.items():
        for angle in (1.8, 2.4):
            ends = [[2.6, 0, 0], [2.6 * np.cos(angle), 2.6 * np.sin(angle), 0]]
            trimer = Atoms("OHH", positions=[[0, 0, 0], *ends])
            assert trimer.get_distance(1, 2) > 4.0
            found.append(make(orientations=orientations)(graph(trimer))["energy"].item())
    assert abs(energies[0][0] - energies[0][1]) < 1e-12
    assert abs(energies[12][0] - energies[12][1]) > 1e-6


def test_crystals_along_the_axes_keep_the_operations_of_the_group() -> None:
    """Cubic axes of a crystal: all 24 rotations with 6 orientations, 12 of them with the others."""
    g = graph(rattled(bulk("Si", cubic=True)))
    for orientations, group in ((6, "octahedral"), (12, "tetrahedral"), (20, "tetrahedral")):
        potential = make(orientations=orientations, pointwise="gelu")
        energy = rotation_orbit(potential, g, rotations(group, mirrors=True)).energy
        assert (energy - energy[0]).abs().max() < 1e-10


def test_published_recipe_without_a_window_is_fully_connected() -> None:
    torch.manual_seed(0)
    options = dict(cutoff=12.0, channels=4, num_layers=1, orientations=6, basis_hidden=4)
    model = build("ponita_published", envelope=False, **options)
    torch.nn.init.normal_(model.layers[0].readout.weight)
    potential = Potential(model, torch.zeros(119)).double().eval()
    pair = [Atoms("CO", positions=[[0, 0, 0], [0.3, 0.1, r]]) for r in (4.0, 8.0, 11.99, 12.1)]
    energies = [potential(AtomicGraph.from_atoms(a, 12.0))["energy"].item() for a in pair]
    assert abs(energies[3]) < 1e-12 and abs(energies[2]) > abs(energies[0]) > 1e-6  # grows with r


def test_symmetrising_over_the_group_of_the_grid_is_pointless_and_said_so() -> None:
    potential = make(orientations=12, pointwise="gelu")
    with pytest.warns(UserWarning, match="copies give what one gives"):
        pointless = EqCalculator(potential, symmetrize="icosahedral")
    plain = EqCalculator(potential)
    useful = EqCalculator(potential, symmetrize="octahedral")  # no warning: 2 cosets of 12
    forces = plain.get_forces(ETHANOL)
    np.testing.assert_allclose(pointless.get_forces(ETHANOL), forces, rtol=0, atol=1e-10)
    assert pointless.get_property("energy_spread", ETHANOL) < 1e-10
    assert np.abs(useful.get_forces(ETHANOL) - forces).max() > 1e-5
