"""Rules integrate the representations of the rotation group, and groups are groups."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from e3nn import o3

from mlip.nn.rotations import GROUPS, random_rotations, rotations, wigner_matrices

RULES = [*list(GROUPS)[1:], "lebedev-3", "lebedev-9", "lebedev-11", "gauss-1", "gauss-4", "gauss-5"]


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    """e3nn rounds its constants to the default dtype."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def integral(weights: torch.Tensor, R: torch.Tensor, l: int) -> torch.Tensor:
    """Of e3nn's D^l."""
    return torch.einsum("k,kab->ab", weights, o3.wigner_D(l, *o3.matrix_to_angles(R)))


@pytest.mark.parametrize("mirrors", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_rules_are_exact_to_their_degree_and_not_beyond(name: str, mirrors: bool) -> None:
    rule = rotations(name, mirrors)
    sign = torch.linalg.det(rule.matrices).sign()
    proper = rule.matrices * sign[:, None, None]
    assert float(rule.weights.sum()) == pytest.approx(1, abs=1e-14)
    assert (rule.weights > 0).all()
    assert len(rule) == len(rotations(name)) * (2 if mirrors else 1)
    for l in range(1, rule.degree + 1):
        assert integral(rule.weights, proper, l).abs().max() < 1e-12
    if rule.degree < 11:  # e3nn knows no more
        assert integral(rule.weights, proper, rule.degree + 1).abs().max() > 1e-3
    if mirrors:
        for l in range(min(rule.degree + 4, 12)):  # odd parity vanishes whatever the degree
            assert integral(rule.weights * sign, proper, l).abs().max() < 1e-12


@pytest.mark.parametrize("name", RULES)
def test_matrices_are_rotations(name: str) -> None:
    rule = rotations(name)
    eye = torch.eye(3, dtype=torch.float64).expand_as(rule.matrices)
    torch.testing.assert_close(rule.matrices @ rule.matrices.mT, eye, rtol=0, atol=1e-14)
    assert (torch.linalg.det(rule.matrices) - 1).abs().max() < 1e-14


def closed(name: str, mirrors: bool, under: str) -> bool:
    """Whether R_k h is again a matrix of the rule, with the same weight."""
    rule = rotations(name, mirrors)
    for h in rotations(under, mirrors).matrices:
        distance = ((rule.matrices @ h)[:, None] - rule.matrices).abs().amax(dim=(2, 3))
        smallest, which = distance.min(dim=1)
        same = (rule.weights[which] - rule.weights).abs().max() < 1e-14
        if smallest.max() > 1e-9 or not same or len(set(which.tolist())) < len(rule):
            return False
    return True


@pytest.mark.parametrize("mirrors", [False, True])
@pytest.mark.parametrize("name", GROUPS)
def test_groups_are_closed(name: str, mirrors: bool) -> None:
    assert rotations(name).is_group
    assert closed(name, mirrors, name)


def test_lebedev_11_is_invariant_under_the_octahedral_group() -> None:
    assert closed("lebedev-11", False, "octahedral")
    assert not closed("lebedev-9", False, "octahedral")
    assert not rotations("lebedev-11").is_group


def test_a_rule_after_a_rotation_has_the_same_degree() -> None:
    R = random_rotations(1, torch.Generator().manual_seed(0)).matrices[0]
    rule = rotations("icosahedral").after(R)
    for l in range(1, rule.degree + 1):
        assert integral(rule.weights, rule.matrices, l).abs().max() < 1e-12
    assert not rule.is_group


def test_wigner_matrices_are_those_of_e3nn_and_of_the_harmonics() -> None:
    generator = torch.Generator().manual_seed(1)
    rule = random_rotations(7, generator, mirrors=True)
    assert {float(x) for x in torch.linalg.det(rule.matrices).round()} == {1.0, -1.0}
    r = torch.randn(5, 3, generator=generator, dtype=torch.float64)
    for l, D in enumerate(wigner_matrices(rule.matrices, 5)):
        Y = o3.spherical_harmonics(l, r, normalize=True)
        turned = o3.spherical_harmonics(l, r @ rule.matrices.mT, normalize=True)
        torch.testing.assert_close(Y @ D.mT, turned, rtol=0, atol=1e-12)


def test_random_rotations_are_uniform() -> None:
    rule = random_rotations(40_000, torch.Generator().manual_seed(2))
    for D in wigner_matrices(rule.matrices, 3)[1:]:
        # Each element has variance 1 / (2 l + 1) <= 1/3: five standard deviations of the mean.
        assert D.mean(dim=0).abs().max() < 5 * (1 / 3 / 40_000) ** 0.5


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("cubic", "known are none, tetrahedral"),
        ("lebedev-", "unknown"),
        ("lebedev-4", "gauss-4"),
        ("lebedev-13", "negative weights"),
        ("gauss-0", "from 1 to"),
        ("gauss-999", "from 1 to"),
        ("gauss-99999", "unknown"),
    ],
)
def test_wrong_names_are_answered(name: str, answer: str) -> None:
    with pytest.raises(ValueError, match=answer):
        rotations(name)
