"""Gaunt products beside e3nn's tensor products, and convolutions along edges.

    python benchmarks/gaunt_product.py [--threads 2] [--rounds 7]

Products: 1000 rows x 32 channels, degrees up to L in and out, L = 1 ... 6, float32; e3nn's
channel-wise product has the paths that the Gaunt product has (l1 + l2 + l3 even), each with a
weight.  Forward; forward and backward to both inputs; and the gradient of a force-like loss, which
training needs.  Also the two transforms of a product on a Gauss grid that is split into a Legendre
and a Fourier stage, and the published form in a Fourier basis.

Edges: 1000 edges x 32 channels, weights for each edge, path and channel; e3nn's ``uvu`` with the
harmonics given, ours with frames given and with frames made from bonds.

Forms alternate within a process, after a first call that is not counted; one process has glibc's
allocator as it is, one as `mlip train` sets it.  On a busy machine the time on processors says
more than that on the wall, with one thread.  Each form has its own memory layout.  The exponent
is the slope of log(time) over log(L + 1).  Numbers of multiplications are for each row and channel
of a forward pass.  Writes results/gaunt_product.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from e3nn import o3
from speed import cpu_name
from torch import Tensor

from mlip.nn.aligned_convolution import AlignedConvolution, bond_frames
from mlip.nn.gaunt_product import GauntProduct
from mlip.nn.gaunt_reference import FourierProduct, product_paths, to_e3nn
from mlip.nn.sphere_grid import gauss_legendre_nodes
from mlip.nn.spherical import SphericalHarmonics

ROWS, CHANNELS = 1000, 32
WHICH = ("median_ms", "min_ms", "processor_ms")
HERE = Path(__file__).parent


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


def exponent(degrees: list[int], milliseconds: list[float]) -> float:
    slope = np.polyfit(np.log(np.array(degrees) + 1), np.log(milliseconds), 1)[0]
    return round(float(slope), 2)


def measure(
    allocator: str, threads: int, rounds: int, degrees: list[int], only: str
) -> dict[str, object]:
    """Everything, in this process."""
    if allocator == "tuned":
        from mlip.training.run import tune_allocator

        tune_allocator()
    torch.set_num_threads(threads)
    table = {}
    for L in degrees:
        forms, counts = product_forms(L)
        product = timed({name: form for name, form in forms.items() if only in name}, rounds)
        edges = {} if only else timed(edge_forms(L), rounds)
        times_faster = {
            kind: {
                which: round(product[f"e3nn {kind}"][which] / product[f"gaunt {kind}"][which], 2)
                for which in WHICH
            }
            for kind in ("forward", "forward + backward", "twice")
            if f"gaunt {kind}" in product
        }
        table[L] = {
            "product": product,
            "times_faster_than_e3nn": times_faster,
            "multiplications": counts,
            "edges_forward_and_backward": edges,
        }
        print(allocator, L, times_faster, file=sys.stderr, flush=True)
    names = ("gaunt forward + backward", "e3nn forward + backward", "gaunt forward")
    slopes = {
        f"{name} ({which})": exponent(degrees, [table[L]["product"][name][which] for L in degrees])
        for name in (*names, "split forward")
        if name in product
        for which in WHICH
    }
    return {"exponents": slopes, "degrees": table}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--degrees", type=int, nargs="+", default=[1, 2, 3, 4, 5, 6])
    parser.add_argument("--only", default="", help="products whose name has this in it, no edges")
    parser.add_argument("--allocator", choices=["tuned", "default"], help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "gaunt_product.json")
    a = parser.parse_args()
    if a.allocator:  # the process of one setting
        print(json.dumps(measure(a.allocator, a.threads, a.rounds, a.degrees, a.only)))
        return
    result = {"cpu": cpu_name(), "threads": a.threads, "rows": ROWS, "channels": CHANNELS}
    options = ["--threads", str(a.threads), "--rounds", str(a.rounds)]
    options += ["--only", a.only, "--degrees", *map(str, a.degrees)]
    for allocator in ("default", "tuned"):
        command = [sys.executable, "-W", "ignore", __file__, "--allocator", allocator, *options]
        answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        result[allocator] = json.loads(answer.stdout)
    a.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
