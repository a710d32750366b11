"""Gaunt products beside e3nn's tensor products, and convolutions along edges.

    python benchmarks/gaunt_product.py [--threads 2] [--rounds 7]
    python benchmarks/gaunt_product.py --table

Products: 1000 rows x 32 channels, degrees up to L in and out, L = 1 ... 6, float32; e3nn's
channel-wise product has the paths that the Gaunt product has (l1 + l2 + l3 even), each with a
weight (of which no gradient is taken).  Forward; forward and backward to both inputs; and the
gradient of a force-like loss, which training needs.  Also the two transforms of a product on a
Gauss grid that is split into a Legendre and a Fourier stage, and the published form in a Fourier
basis.

Edges: 1000 edges x 32 channels, weights for each edge, path and channel; e3nn's ``uvu`` with the
harmonics given, ours with frames given and with frames made from bonds.

Made in pieces, each in a process of its own: an allocator (glibc's as it is, or as `mlip train`
sets it), a degree, products or edges.  Each is one row of results/gaunt_product.json, and a row
that is there is not made again.  Forms alternate within a process, after three calls that are not
counted.  On a busy machine the time on processors says more than that on the wall, with one thread.
Each form has its own memory layout.  Numbers of multiplications are for each row and channel of a
forward pass.  ``--table`` writes docs/models.md; the exponent is the slope of log(time) over
log(L + 1).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from e3nn import o3
from pieces import Pieces, Row, insert
from speed import cpu_name
from torch import Tensor

from mlip.allocator import tune_allocator
from mlip.nn.aligned_convolution import AlignedConvolution, bond_frames
from mlip.nn.gaunt_product import GauntProduct
from mlip.nn.gaunt_reference import FourierProduct, product_paths, to_e3nn
from mlip.nn.sphere_grid import gauss_legendre_nodes
from mlip.nn.spherical import SphericalHarmonics

ROWS, CHANNELS = 1000, 32
WHICH = ("median_ms", "min_ms", "processor_ms")
PARTS = ("product", "edges")
ALLOCATORS = ("default", "tuned")
HERE = Path(__file__).parent
RESULTS = Pieces(HERE / "results" / "gaunt_product.json")


class SeparableProduct:
    """The product on a Gauss grid, with split transforms: (LM, N) -> beta x m -> beta x alpha."""

    def __init__(self, L: int) -> None:
        degree = 3 * L
        self.L, self.betas, self.alphas = L, degree // 2 + 1, degree + 1
        points, weights = (torch.from_numpy(x) for x in gauss_legendre_nodes(degree))
        Y = SphericalHarmonics(L).double()(points).view(self.betas, self.alphas, -1)
        alpha = torch.atan2(*points.view(self.betas, self.alphas, 3)[0, :, ::2].unbind(-1))
        m = torch.arange(-L, L + 1)
        trig = torch.where(m < 0, torch.sin(-m * alpha[:, None]), torch.cos(m * alpha[:, None]))
        norm = trig.square().sum(0)
        # One row of zeros pads the degrees that some m lacks.
        self.place = torch.full((2 * L + 1, L + 1), len(Y[0, 0]))
        legendre = torch.zeros(2 * L + 1, self.betas, L + 1, dtype=torch.float64)
        for l in range(L + 1):
            for k in range(-l, l + 1):
                self.place[k + L, l] = l * l + l + k
                legendre[k + L, :, l] = Y[:, :, l * l + l + k] @ trig[:, k + L] / norm[k + L]
        weight = weights.view(self.betas, self.alphas)[:, 0]
        self.legendre, self.fourier = legendre.float(), trig.float()
        self.legendre_back = (legendre * weight[:, None]).mT.contiguous().float()
        self.fourier_back = trig.T.contiguous().float()
        self.back = torch.argsort(self.place.flatten())[: (L + 1) ** 2]
        stages = (2 * L + 1) * (L + 1) * self.betas, self.betas * self.alphas * (2 * L + 1)
        self.multiplications = 3 * sum(stages)

    def synthesis(self, x: Tensor) -> Tensor:
        x = torch.cat([x, x.new_zeros(1, x.shape[1])]).index_select(0, self.place.flatten())
        x = self.legendre @ x.view(2 * self.L + 1, self.L + 1, -1)
        return self.fourier @ x.view(2 * self.L + 1, -1)

    def __call__(self, U: Tensor, V: Tensor) -> Tensor:
        U, V = U.flatten(1), V.flatten(1)
        step = (1 << 18) // (4 * self.betas * self.alphas)
        out = torch.empty_like(U)
        for first in range(0, U.shape[1], step):
            chunk = slice(first, first + step)
            f = self.synthesis(U[:, chunk]) * self.synthesis(V[:, chunk])
            x = (self.fourier_back @ f).view(2 * self.L + 1, self.betas, -1)
            out[:, chunk] = (self.legendre_back @ x).flatten(0, 1).index_select(0, self.back)
        return out


def product_forms(L: int) -> tuple[dict[str, Callable[[], object]], dict[str, int]]:
    """What is timed for one L, and numbers of multiplications."""
    generator = torch.Generator().manual_seed(0)
    LM = (L + 1) ** 2
    U, V, G = (torch.randn(LM, ROWS, CHANNELS, generator=generator) for _ in range(3))
    gaunt, separable = GauntProduct((L, L), L), SeparableProduct(L)
    fourier = FourierProduct(L, L, L)
    paths = product_paths(L, L, L)
    irreps = o3.Irreps([(CHANNELS, (l, (-1) ** l)) for l in range(L + 1)])
    dense = o3.TensorProduct(irreps, irreps, irreps, [(*path, "uuu", True) for path in paths])
    x, y, g = (to_e3nn(f).contiguous() for f in (U, V, G))
    error = (separable(U, V) - gaunt(U, V).flatten(1)).abs().max()
    assert error < 1e-4 * gaunt(U, V).abs().max(), error

    def backward(form: Callable, a: Tensor, b: Tensor, cotangent: Tensor) -> object:
        a, b = a.requires_grad_(), b.requires_grad_()
        return torch.autograd.grad(form(a, b), (a, b), cotangent)

    def twice(form: Callable, a: Tensor, b: Tensor, cotangent: Tensor) -> object:
        a, b, cotangent = a.requires_grad_(), b.requires_grad_(), cotangent.requires_grad_()
        slopes = torch.autograd.grad(form(a, b), (a, b), cotangent, create_graph=True)
        return torch.autograd.grad(slopes, (a, b, cotangent), (cotangent.detach(),) * 2)

    def alone(form: Callable, a: Tensor, b: Tensor) -> object:
        with torch.no_grad():
            return form(a, b)

    P = len(gaunt.to_grid())
    n = sum((2 * l1 + 1) * (2 * l2 + 1) * (2 * l3 + 1) for l1, l2, l3 in paths)
    return {
        "gaunt forward": lambda: alone(gaunt, U, V),
        "e3nn forward": lambda: alone(dense, x, y),
        "split forward": lambda: alone(separable, U, V),
        "fourier forward": lambda: alone(fourier, U, V),
        "gaunt forward + backward": lambda: backward(gaunt, U, V, G),
        "e3nn forward + backward": lambda: backward(dense, x, y, g),
        "gaunt twice": lambda: twice(gaunt, U, V, G),
        "e3nn twice": lambda: twice(dense, x, y, g),
    }, {"points": P, "gaunt": 3 * P * LM, "split": separable.multiplications, "dense paths": n}


def edge_forms(L: int) -> dict[str, Callable[[], object]]:
    """Convolutions along edges, features and filter of degree L."""
    generator = torch.Generator().manual_seed(0)
    r = torch.nn.functional.normalize(torch.randn(ROWS, 3, generator=generator), dim=1)
    aligned, harmonics = AlignedConvolution(L, L, L), SphericalHarmonics(L)
    h = torch.randn(ROWS, (L + 1) ** 2, CHANNELS, generator=generator)
    w = torch.randn(ROWS, len(aligned.paths), CHANNELS, generator=generator)
    irreps = [
        o3.Irreps([(n, (l, (-1) ** l)) for l in range(L + 1)]) for n in (CHANNELS, 1, CHANNELS)
    ]
    dense = o3.TensorProduct(
        *irreps, [(*path, "uvu", True) for path in aligned.paths], shared_weights=False
    )
    x, flat, cotangent = to_e3nn(h.transpose(0, 1)).contiguous(), w.flatten(1), torch.randn(h.shape)
    frames = [D.detach() for D in bond_frames(r, L)]

    def backward(out: Tensor, *inputs: Tensor) -> object:
        return torch.autograd.grad(out, inputs, cotangent.view(out.shape))

    def e3nn() -> object:
        a, Y, b = x.requires_grad_(), harmonics(r).detach().requires_grad_(), flat.requires_grad_()
        return backward(dense(a, Y, b), a, Y, b)

    def ours(made: bool) -> object:
        a, b, bond = h.requires_grad_(), w.requires_grad_(), r.detach().requires_grad_()
        D = bond_frames(bond, L) if made else frames
        return backward(aligned(a, b, D), a, b, *([bond] if made else []))

    return {
        "e3nn": e3nn,
        "aligned": lambda: ours(False),
        "aligned with frames": lambda: ours(True),
    }


def timed(forms: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """Median and minimum of each form in ms, and its time on processors, forms alternating."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for form in forms.values():
        for _ in range(3):  # e3nn's forms are compiled in the second and third call
            form()
    for _ in range(rounds):
        for name, form in forms.items():
            begin = time.perf_counter(), time.process_time()
            form()
            end = time.perf_counter(), time.process_time()
            times[name].append((1e3 * (end[0] - begin[0]), 1e3 * (end[1] - begin[1])))
    return {
        name: {
            "median_ms": round(statistics.median(wall for wall, _ in t), 3),
            "min_ms": round(min(wall for wall, _ in t), 3),
            "processor_ms": round(statistics.median(cpu for _, cpu in t), 3),
        }
        for name, t in times.items()
    }


def measure(allocator: str, degree: int, part: str, threads: int, rounds: int) -> Row:
    """One piece, in this process."""
    if allocator == "tuned":
        tune_allocator()
    torch.set_num_threads(threads)
    if part == "edges":
        return {"times": timed(edge_forms(degree), rounds)}
    forms, counts = product_forms(degree)
    return {"times": timed(forms, rounds), "multiplications": counts}


def in_a_process(*arguments: object) -> Row:
    """``measure`` in a process whose allocator nobody has touched."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    command = [sys.executable, "-W", "ignore", __file__, "--piece", *map(str, arguments)]
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment
    ).stdout
    return json.loads(done.splitlines()[-1])


def exponent(degrees: list[int], milliseconds: list[float]) -> float:
    """Slope of log(time) over log(L + 1)."""
    return float(np.polyfit(np.log(np.array(degrees) + 1), np.log(milliseconds), 1)[0])


def table(rows: list[Row], which: str) -> str:
    """Milliseconds of forward and backward for each degree, the ratio, and exponents."""
    kinds = {
        "product": [
            ("forward", "forward"),
            ("forward + backward", "forward + backward"),
            ("of a loss of forces", "twice"),
        ],
        "edges": [("edges, forward + backward", "")],
    }
    lines = []
    threads = sorted({row["threads"] for row in rows})
    for n, allocator in itertools.product(threads, ("default", "tuned")):
        for part, labels in kinds.items():
            found = {
                row["degree"]: {form: t[which] for form, t in row["times"].items()}
                for row in rows
                if (row["threads"], row["allocator"], row["part"]) == (n, allocator, part)
            }
            for label, kind in labels if found else ():
                L = sorted(found)
                ours, theirs = (
                    [found[l][f"{form} {kind}" if kind else form] for l in L]
                    for form in ("gaunt" if kind else "aligned with frames", "e3nn")
                )
                if not lines:
                    lines = ["| | " + " | ".join(f"L = {l}" for l in L) + " | exponent |"]
                    lines.append("|---|" + "---:|" * (len(L) + 1))
                ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
                several = len(L) > 2
                for name, values in (("ours", ours), ("e3nn", theirs), ("ratio", ratios)):
                    power = f"{exponent(L, values):.1f}" if several and name != "ratio" else ""
                    cells = " | ".join(f"{x:.3g}" for x in values)
                    what = f"{label}, {allocator} allocator, {n} threads: {name}"
                    lines.append(f"| {what} | {cells} | {power} |")
    return "\n".join(lines).replace("1 threads", "1 thread")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--allocators", nargs="+", choices=ALLOCATORS, default=ALLOCATORS)
    parser.add_argument("--table", action="store_true", help="write the table into the docs")
    parser.add_argument("--by", choices=WHICH, default="median_ms", help="time in the table")
    parser.add_argument("--piece", nargs=5, help=argparse.SUPPRESS)
    a = parser.parse_args()
    if a.piece:  # the process of one piece
        allocator, degree, part, threads, rounds = a.piece
        print(json.dumps(measure(allocator, int(degree), part, int(threads), int(rounds))))
        return
    if a.table:
        text = table(RESULTS.rows(), a.by)
        insert(HERE.parent / "docs" / "models.md", "gaunt product", text)
        print(text)
        return
    for part, degree, allocator in itertools.product(a.parts, a.degrees, a.allocators):
        key: Row = {"allocator": allocator, "degree": degree, "part": part, "threads": a.threads}
        if not RESULTS.rows(**key):
            found = in_a_process(allocator, degree, part, a.threads, a.rounds)
            RESULTS.add({**key, "cpu": cpu_name(), **found})


if __name__ == "__main__":
    main()
