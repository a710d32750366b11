"""Symmetric contraction: all equivariant polynomials of one atom's density up to order nu.

    m[L w, c] = sum_nu sum_k W[z, nu, k, c] sum_(a b ..) U[nu, k; w, a b ..] A[a, c] A[b, c] ..

a, b are components lm of the density, U couples nu of them to total degree L by Clebsch-Gordan
coefficients, W are weights of the element z.  Batatia et al. 2022, "MACE" (arXiv:2206.07697),
eqs. 10-11.

Products commute, so only the symmetric part of U counts.  Before any atom is looked at, weights and
U are joined to the coefficients of one form per element and channel.  With a constant component
A[0'] = 1 the orders 1 ... nu are one homogeneous form of degree nu, and by Euler's theorem

    Y[w, d] = sum_ab T[w; a b d] A[a] A[b],
    m[w] = sum_d Y[w, d] A[d],      dm[w]/dA[d] = nu Y[w, d]

so forces need nothing that the energy did not compute.  T is sparse: components, pairs and outputs
fall into classes by their mirror symmetry, found here as the connected parts of its pattern, and Y
is one small matrix product for each class, element and channel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from itertools import permutations
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from mlip.nn.constant import Constant
from mlip.nn.spherical import clebsch_gordan

TINY = 1e-10  # coefficients below are rounding errors of zeros


@cache
def signed_clebsch_gordan(l1: int, l2: int, l3: int) -> Tensor:
    """``clebsch_gordan`` with a sign of its own where l1 + l2 + l3 is odd.

    There the sign differs between versions of e3nn, and a model's weights must not: for l1 <= l2 <=
    l3 the first coefficient that is not zero is positive, as in e3nn 0.4.
    """
    C = clebsch_gordan(l1, l2, l3)
    if (l1 + l2 + l3) % 2 == 0:
        return C
    ascending = clebsch_gordan(*sorted((l1, l2, l3))).flatten()
    return C * ascending[ascending.abs() > TINY][0].sign()


@cache
def coupled_products(lmax: int, order: int) -> list[tuple[int, int, Tensor]]:
    """All couplings of ``order`` copies of Y_0 ... Y_lmax, one after the other.

    Returns
    -------
    list of (L, parity, U)
        U (2 L + 1, LM, ..., LM), float64, normalised as e3nn does: sqrt(2 L + 1) times the
        3j-symbol at each step.  Sorted by L and parity as e3nn sorts irreps, otherwise in the order
        of the steps.
    """
    LM = (lmax + 1) ** 2
    if order == 1:
        eye = torch.eye(LM, dtype=torch.float64)
        return [(l, (-1) ** l, eye[l * l : (l + 1) ** 2]) for l in range(lmax + 1)]
    found = []
    for left, parity, U in coupled_products(lmax, order - 1):
        for l in range(lmax + 1):
            for L in range(abs(left - l), left + l + 1):
                C = signed_clebsch_gordan(L, left, l) * math.sqrt(2 * L + 1)
                product = U.new_zeros(2 * L + 1, *[LM] * order)
                product[..., l * l : (l + 1) ** 2] = torch.tensordot(U, C, ([0], [1])).movedim(
                    -2, 0
                )
                found.append((L, parity * (-1) ** l, product))
    return sorted(found, key=lambda item: item[:2])


@cache
def symmetric_couplings(lmax: int, L: int, order: int, *, reduced: bool) -> Tensor:
    """(K, 2 L + 1, LM, ..., LM) couplings to degree L of natural parity, symmetrised.

    K paths are all ways of coupling, of which some are linearly dependent or vanish; ``reduced``
    leaves an orthonormal basis.
    """
    paths = [U for l, parity, U in coupled_products(lmax, order) if (l, parity) == (L, (-1) ** L)]
    every = list(permutations(range(order)))
    U = torch.stack([sum_over_permutations(U, every) for U in paths])
    if not reduced:
        return U
    _, size, basis = torch.linalg.svd(U.flatten(1), full_matrices=False)
    rank = int((size > 1e-8 * size[0]).sum())
    basis = basis[:rank] * math.sqrt(2 * L + 1)
    return basis.view(rank, *U.shape[1:])


def sum_over_permutations(U: Tensor, every: Sequence[tuple[int, ...]]) -> Tensor:
    """Mean of (2 L + 1, LM, ..., LM) over the permutations of its last dimensions."""
    total = torch.zeros_like(U)
    for order in every:
        total += U.permute(0, *(1 + k for k in order))
    return total / len(every)


def homogeneous(T: Tensor, order: int, degree: int) -> Tensor:
    """(K, W, LM, ...) symmetric of an order as the form of a higher degree with a constant first
    component; symmetric again: (K, W, LM + 1, ...)."""
    T = nn.functional.pad(T, (1, 0) * order)
    while order < degree:
        # x_0 T(x ...), spread evenly over the places where the constant can stand.
        order += 1
        grown = T.new_zeros(*T.shape, T.shape[-1])
        for place in range(order):
            grown.select(2 + place, 0).add_(T / order)
        T = grown
    return T


class Part(NamedTuple):
    """One connected part of the pattern of T: a dense matrix (outputs, pairs)."""

    first_output: int
    last_output: int
    first_pair: int
    last_pair: int
    first_entry: int
    last_entry: int


def connected_parts(pattern: Tensor) -> list[tuple[list[int], list[int]]]:
    """Rows and columns of the connected parts of a bipartite graph given as a boolean matrix."""
    left, parts = pattern.any(dim=1), []
    while left.any():
        rows = torch.zeros_like(left)
        rows[left.nonzero()[0]] = True
        while True:
            columns = pattern[rows].any(dim=0)
            grown = pattern[:, columns].any(dim=1)
            if torch.equal(grown, rows):
                break
            rows = grown
        parts.append((rows.nonzero().flatten().tolist(), columns.nonzero().flatten().tolist()))
        left = left & ~rows
    return parts


class SymmetricContraction(nn.Module):
    """Densities (LM, N, C) -> equivariant polynomials (LM', N, C), weights by element.

    Atoms are sorted by element; ``elements`` (M,) are those present, ``sizes`` their numbers of
    atoms.  Without ``sizes`` they are in any order, and ``elements`` (N,) those of the atoms: each
    row of Y is a sum over pairs, which a compiler makes without a table of the products.
    """

    pairs: Tensor  # (2, Q) factors of each product of two components; (1, Q) in degree 2
    places: Tensor  # (D,) where the rows of the parts' outputs stand in (W, LM + 1)
    entries: Tensor  # coefficient of each entry of the parts' matrices
    row_entries: Tensor  # (W (LM + 1), Q') entry of each product in a row of Y; one more if none
    row_pairs: Tensor  # (1 or 2, W (LM + 1), Q') its factors

    def __init__(
        self,
        lmax: int,
        lmax_out: int,
        correlation: int,
        channels: int,
        num_elements: int,
        *,
        reduced: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= correlation <= 3:
            raise ValueError(f"correlation must be 1, 2 or 3, got {correlation}")
        self.lmax, self.lmax_out, self.correlation = lmax, lmax_out, correlation
        self.reduced = reduced
        degree = self.degree = max(correlation, 2)
        self.num_outputs = (lmax_out + 1) ** 2
        self.weights = nn.ParameterList()
        self.bases = nn.ModuleList()
        forms = []
        for L in range(lmax_out + 1):
            T, weights = [], []
            for order in range(1, correlation + 1):
                U = symmetric_couplings(lmax, L, order, reduced=reduced)
                T.append(homogeneous(U, order, degree))
                weights.append(torch.randn(num_elements, len(U), channels) / len(U))
            self.weights.append(nn.Parameter(torch.cat(weights, dim=1)))  # (Z, K, C)
            forms.append(torch.cat(T))  # (K, 2 L + 1, LM + 1, ...)
        self._plan(forms)

    def _plan(self, forms: list[Tensor]) -> None:
        """Where coefficients are, which are equal, and into which parts they fall."""
        n = self.num_components = forms[0].shape[-1]
        upper = torch.combinations(torch.arange(n), self.degree - 1, with_replacement=True).T
        # Rows (w d), columns ordered products of the other components.
        pattern = torch.cat(
            [form.abs().amax(dim=0)[(slice(None), slice(None), *upper)] for form in forms]
        ).flatten(0, 1)
        parts: list[Part] = []
        places: list[int] = []
        columns: list[int] = []
        where: list[Tensor] = []
        for rows, cols in connected_parts(pattern > TINY):
            q, entry = len(columns), sum(len(w) for w in where)
            size = len(rows) * len(cols)
            parts.append(
                Part(len(places), len(places) + len(rows), q, q + len(cols), entry, entry + size)
            )
            places += rows
            columns += cols
            where.append(torch.cartesian_prod(torch.tensor(rows), torch.tensor(cols)))
        self.parts = parts
        pairs = upper[:, columns]
        row, column = torch.cat(where).T  # (entries,): (w d), pair
        w, d = row // n, row % n
        index = torch.cat([upper[:, column], d[None]]).sort(dim=0).values  # (degree, entries)
        # A product of two different components stands for both orders.
        times = torch.ones(len(w), dtype=torch.float64)
        if self.degree == 3:
            times += (upper[0] != upper[1])[column]
        entries, offset, first = torch.zeros_like(w), 0, 0
        for form in forms:
            own = (w >= first) & (w < first + form.shape[1])
            key = torch.stack([w - first, *index])[:, own]  # (1 + degree, entries of this L)
            unique, inverse = torch.unique(key, dim=1, return_inverse=True)
            entries[own] = inverse + offset
            self.bases.append(Constant(form[(slice(None), *unique)].T.contiguous()))  # (t, K)
            offset += unique.shape[1]
            first += form.shape[1]
        self.times = Constant(times)
        self.register_buffer("pairs", pairs, persistent=False)
        self.register_buffer("places", torch.tensor(places), persistent=False)
        self.register_buffer("entries", entries, persistent=False)
        longest = max(part.last_pair - part.first_pair for part in parts)
        row_entries = torch.full((self.num_outputs * n, longest), len(entries))
        row_pairs = torch.zeros(self.degree - 1, *row_entries.shape, dtype=torch.int64)
        for part in parts:
            mine = self.places[part.first_output : part.last_output]
            width = part.last_pair - part.first_pair
            row_entries[mine, :width] = torch.arange(part.first_entry, part.last_entry).view(
                -1, width
            )
            row_pairs[:, mine, :width] = pairs[:, None, part.first_pair : part.last_pair]
        self.register_buffer("row_entries", row_entries, persistent=False)
        self.register_buffer("row_pairs", row_pairs, persistent=False)

    def coefficients(self, elements: Tensor | None = None) -> Tensor:
        """(M, C, entries) the matrices of all parts for the given elements, or for all."""
        rows = []
        for basis, weight in zip(self.bases, self.weights, strict=True):
            W = weight if elements is None else weight.index_select(0, elements)  # (M, K, C)
            rows.append(basis() @ W.transpose(0, 1).flatten(1))  # (t, M C)
        table = torch.cat(rows).index_select(0, self.entries) * self.times()[:, None]
        return table.T.contiguous().view(len(W), -1, len(self.entries))

    def forward(self, A: Tensor, elements: Tensor, sizes: Sequence[int] | None) -> Tensor:
        if sizes is None:
            return self.of_each(A, elements)
        x = A.permute(2, 0, 1)  # (C, LM, N)
        x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)  # (C, LM + 1, N)
        P = self.coefficients(elements)
        out = Form.apply(x, P, self, tuple(sizes))  # (C, W, N)
        if P.requires_grad:
            out = out + Weights.apply(P, [x], self, tuple(sizes))
        return cast(Tensor, out).permute(1, 2, 0)

    def of_each(self, A: Tensor, elements: Tensor) -> Tensor:
        """The same for atoms in any order."""
        P = nn.functional.pad(self.coefficients().transpose(1, 2), (0, 0, 0, 1))
        rows = P.index_select(1, self.row_entries.flatten())
        rows = rows.unflatten(1, self.row_entries.shape)  # (Z, W (LM + 1), Q', C)
        x = A.transpose(0, 1)  # (N, LM, C)
        x = torch.cat([torch.ones_like(x[:, :1]), x], dim=1)
        out: Tensor = FormOfEach.apply(x, elements, self, rows)  # (N, W, C)
        return out.transpose(0, 1)

    def slopes_of_each(self, x: Tensor, elements: Tensor, rows: Tensor) -> Tensor:
        """Y (N, W, LM + 1, C)."""
        q = rows.index_select(0, elements)
        for factor in self.row_pairs:
            q = q * x.index_select(1, factor.flatten()).unflatten(1, factor.shape)
        return q.sum(dim=2).unflatten(1, (self.num_outputs, self.num_components))

    def products(self, x: Tensor, part: Part) -> Tensor:
        """(C, LM + 1, N) -> (C, pairs, N) of one part."""
        pairs = self.pairs[:, part.first_pair : part.last_pair]
        q = x.index_select(1, pairs[0])
        return q if self.degree == 2 else q * x.index_select(1, pairs[1])

    def slopes(self, x: Tensor, P: Tensor, sizes: Sequence[int]) -> Tensor:
        """Y (C, W, LM + 1, N)."""
        C, n, N = x.shape
        Y = x.new_zeros(C, self.num_outputs * n, N)
        for part in self.parts:
            blocks = [
                torch.bmm(matrix, q)
                for matrix, q in zip(
                    self.matrices(P, part),
                    self.products(x, part).split(list(sizes), 2),
                    strict=True,
                )
            ]
            places = self.places[part.first_output : part.last_output]
            Y[:, places] = blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)
        return Y.view(C, self.num_outputs, n, N)

    @staticmethod
    def matrices(P: Tensor, part: Part) -> Tensor:
        """(M, C, outputs, pairs) of one part."""
        shape = (part.last_output - part.first_output, part.last_pair - part.first_pair)
        return P[:, :, part.first_entry : part.last_entry].unflatten(2, shape)

    def back_to_products(self, h: Tensor, P: Tensor, sizes: Sequence[int]) -> Tensor:
        """sum_wd h[w, d] T[w; a b d] for each pair: (C, W, LM + 1, N) -> (C, Q, N)."""
        rows = h.flatten(1, 2).index_select(1, self.places)  # (C, D, N)
        columns = []
        for part in self.parts:
            atoms = rows[:, part.first_output : part.last_output].split(list(sizes), dim=2)
            columns.append(
                torch.cat(
                    [
                        torch.bmm(matrix.mT, block)
                        for matrix, block in zip(self.matrices(P, part), atoms, strict=True)
                    ],
                    dim=2,
                )
            )
        return torch.cat(columns, dim=1)

    def back_to_coefficients(self, h: Tensor, x: Tensor, sizes: Sequence[int]) -> Tensor:
        """sum_n h[w, d] A[a] A[b] for each entry and element: -> (M, C, entries)."""
        columns = []
        for part in self.parts:
            places = self.places[part.first_output : part.last_output]
            rows = h.flatten(1, 2).index_select(1, places).split(list(sizes), dim=2)
            q = self.products(x, part).split(list(sizes), dim=2)
            blocks = [torch.bmm(a, b.mT).flatten(1) for a, b in zip(rows, q, strict=True)]
            columns.append(torch.stack(blocks))
        return torch.cat(columns, dim=2)

    def back_to_components(self, R: Tensor, x: Tensor) -> Tensor:
        """Derivative of ``products``: sum over the pairs in which a component stands."""
        zero = torch.zeros_like(x)
        if self.degree == 2:
            return zero.index_add(1, self.pairs[0], R)
        a, b = self.pairs
        zero = zero.index_add(1, a, R * x.index_select(1, b))
        return zero.index_add(1, b, R * x.index_select(1, a))


class Form(torch.autograd.Function):
    """m[w] = sum_d Y[w, d] A[d]; its derivative is degree Y, which is kept.

    The derivative with respect to the coefficients is that of ``Weights``, so that forces, which do
    not need it, do not compute it.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, P: Tensor, plan: SymmetricContraction, sizes: tuple[int, ...]
    ) -> Tensor:
        Y = plan.slopes(x, P, sizes)
        ctx.save_for_backward(x, P, Y)
        ctx.plan, ctx.sizes = plan, sizes
        return (Y * x[:, None]).sum(dim=2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, None, None, None]:
        if not ctx.needs_input_grad[0]:
            return None, None, None, None
        x, P, Y = ctx.saved_tensors
        Y = Slopes.apply(x, P, Y, ctx.plan, ctx.sizes)
        return ctx.plan.degree * (g[:, :, None] * Y).sum(dim=1), None, None, None


class FormOfEach(torch.autograd.Function):
    """``Form`` for atoms in any order, in a trace: what is asked for further derivatives are the
    operations that were traced, coefficients among them."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, elements: Tensor, plan: SymmetricContraction, rows: Tensor
    ) -> Tensor:
        Y = plan.slopes_of_each(x, elements, rows)
        ctx.save_for_backward(Y)
        ctx.degree = plan.degree
        return (Y * x[:, None]).sum(dim=2)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (Y,) = ctx.saved_tensors
        return ctx.degree * (g[:, :, None] * Y).sum(dim=1), None, None, None


class Weights(torch.autograd.Function):
    """Zero, with the derivative of ``Form`` with respect to the coefficients."""

    @staticmethod
    def forward(
        ctx: Any, P: Tensor, x: list[Tensor], plan: SymmetricContraction, sizes: tuple[int, ...]
    ) -> Tensor:
        # In a list, x is no input: this node is not on the way from energy to positions, and is
        # not visited when forces are computed.  Its derivative still knows where x comes from.
        ctx.x, ctx.plan, ctx.sizes = x[0], plan, sizes
        C, _, N = x[0].shape
        return x[0].new_zeros(C, plan.num_outputs, N)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        h = g[:, :, None] * ctx.x[:, None]
        return ctx.plan.back_to_coefficients(h, ctx.x, ctx.sizes), None, None, None


class Slopes(torch.autograd.Function):
    """Y of given components and coefficients, computed before; only its derivative is new."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        P: Tensor,
        Y: Tensor,
        plan: SymmetricContraction,
        sizes: tuple[int, ...],
    ) -> Tensor:
        ctx.save_for_backward(x, P)
        ctx.plan, ctx.sizes = plan, sizes
        return Y.view_as(Y)

    @staticmethod
    def backward(ctx: Any, h: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        x, P = ctx.saved_tensors
        gx = gP = None
        if ctx.needs_input_grad[0]:
            R = ctx.plan.back_to_products(h, P, ctx.sizes)
            gx = ctx.plan.back_to_components(R, x)
        if ctx.needs_input_grad[1]:
            gP = ctx.plan.back_to_coefficients(h, x, ctx.sizes)
        return gx, gP, None, None, None
