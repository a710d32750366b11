"""What Gaunt promises beyond the contract of all models."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ase.build import molecule
from pydantic import ValidationError

from mlip.config import ConfigError
from mlip.data.graph import AtomicGraph
from mlip.models import build
from mlip.models.gaunt import GauntConfig, NodeProducts
from mlip.nn.gaunt_product import BracketProduct, GauntPolynomial
from mlip.nn.gaunt_reference import DenseProduct
from mlip.potential import Potential
from tests.conftest import without_zeros

SMALL: dict[str, Any] = dict(
    cutoff=4.0, channels=6, lmax=2, num_basis=5, hidden=8, message_channels=(5, 3)
)


def potential(**options: Any) -> Potential:
    """Random weights, also where training starts with zeros."""
    torch.manual_seed(0)
    model = build("gaunt", **{**SMALL, **options})
    without_zeros(model, 0.3)
    return Potential(model, torch.zeros(119)).double().eval()


def graph(seed: int = 0) -> AtomicGraph:
    atoms = molecule("CH3CH2OH")
    atoms.rattle(0.1, seed=seed)
    return AtomicGraph.from_atoms(atoms, 4.0)


def test_a_finer_grid_changes_nothing() -> None:
    """Grids are exact, so their size is no hyperparameter."""
    usual = potential(order=4, factors=2, antisymmetric=True)
    energy = usual(graph())["energy"]
    for layer in usual.model.layers:
        products = layer.products
        plan = [(int(size**0.5) - 1, list(terms)) for size, terms in products.powers.plan]
        products.powers = GauntPolynomial((2, 2), plan, degree=23).double()
        if products.brackets is not None:
            products.brackets[0] = BracketProduct((2, 2), 2, degree=19).double()
    torch.testing.assert_close(usual(graph())["energy"], energy, rtol=0, atol=1e-12)


def test_products_are_those_of_paths() -> None:
    """The square and the cube of the density through e3nn, the square kept to degree 2 L."""
    torch.set_default_dtype(torch.float64)
    try:
        torch.manual_seed(0)
        products = NodeProducts(GauntConfig(**SMALL), lmax_out=1).double()
        torch.nn.init.normal_(products.element.weight)
        A, species = torch.randn(9, 5, 6), torch.randn(5, 6)
        square = DenseProduct(2, 2, 4, 6)(A, A)
        cube = DenseProduct(4, 2, 1, 6)(square, A)
    finally:
        torch.set_default_dtype(torch.float32)
    w = 1 + products.element(species).view(5, 2, 2, 6)  # atom, degree, order, channel
    rows = []
    for k in range(4):
        l = int(k > 0)
        B = [P[k] * w[:, l, n] * products.scales()[l, n] for n, P in enumerate((square, cube))]
        rows.append(torch.cat([A[k], *B], dim=-1) @ products.mix[l])
    expected = torch.stack(rows)
    torch.testing.assert_close(products(A, species), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("factors", [1, 2, 3])
def test_products_have_the_scale_of_their_factors(factors: int) -> None:
    """Unit variance of each degree of each product, for the closed form is exact."""
    torch.manual_seed(0)
    products = NodeProducts(
        GauntConfig(lmax=3, order=4, factors=factors, antisymmetric=factors > 1), lmax_out=2
    ).double()
    functions = [torch.randn(16, 400, 100).double() for _ in range(factors)]
    for P, scale in zip(products.powers(*functions), products.scales().T, strict=False):
        for l in range(3):
            size = P[l * l : (l + 1) ** 2].square().mean() * scale[l] ** 2
            assert abs(size - 1) < 0.15, (l, size)
    if products.brackets is not None:
        first, second = products.brackets
        twice = second(first(functions[0], functions[1]), functions[-1])[1:]
        assert 0.2 < float(twice.var() * products.scales()[1, -1] ** 2) < 4  # about


def test_values_on_the_grid_are_not_kept() -> None:
    """What a training step stores grows with the components of features, not with points."""
    model = potential(channels=16, lmax=3, order=4).train()
    g, shapes = graph(), []

    def store(x: torch.Tensor) -> torch.Tensor:
        shapes.append(x.shape)
        return x

    with torch.autograd.graph.saved_tensors_hooks(store, lambda x: x):
        model(g)["forces"].square().sum().backward()
    points = {len(layer.products.powers.to_grid()) for layer in model.model.layers}
    assert min(points) > 60
    kept = [s for s in shapes if len(s) > 1 and s[0] in points and s[1:].numel() > 16]
    assert not kept


def test_the_bracket_adds_what_products_lack() -> None:
    """It is in every layer but the last, of which scalars alone are used, and there it is zero."""
    plain, more = potential(factors=3), potential(factors=3, antisymmetric=True)
    brackets = [layer.products.brackets for layer in more.model.layers]
    assert brackets[0] is not None and brackets[-1] is None
    assert all(layer.products.brackets is None for layer in plain.model.layers)
    assert more(graph())["energy"] != plain(graph())["energy"]
    A = torch.randn(
        9, 4, 3 * SMALL["channels"], generator=torch.Generator().manual_seed(0)
    ).double()
    first, second = brackets[0]
    u, v, w = A.chunk(3, dim=-1)
    twice = second(first(u, v), w)
    assert twice[1:].abs().max() > 0.1 and twice[0].abs().max() < 1e-12
    # Of one density with itself there is none: the bracket wants several.
    assert first(u, u).abs().max() < 1e-12


def test_elements_have_weights_of_their_own() -> None:
    """Two elements with the same embedding as senders differ by their products alone."""
    model = potential()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.gate.weight.zero_()
            for send in layer.send:
                send.weight.normal_()
    g = graph()
    energy = model(g)["node_energy"]
    with torch.no_grad():
        for layer in model.model.layers:
            layer.products.element.weight.zero_()
    assert (model(g)["node_energy"] - energy).abs().min() > 1e-6


def test_impossible_options_are_named() -> None:
    with pytest.raises((ConfigError, ValidationError), match="message_channels has 4 degrees"):
        build("gaunt", lmax=2, message_channels=(4, 4, 4, 4))
    with pytest.raises((ConfigError, ValidationError), match="antisymmetric"):
        build("gaunt", antisymmetric=True, factors=1)
