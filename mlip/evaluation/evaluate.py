"""Evaluate a potential on a data set: errors, predictions as extended XYZ."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from mlip.data.dataset import HDF5Dataset
from mlip.data.graph import AtomicGraph
from mlip.data.loader import GraphLoader
from mlip.evaluation.metrics import QUANTITIES, Errors, ErrorSums, grouped_table
from mlip.evaluation.symmetry import SymmetryReport, sampled_symmetry_errors
from mlip.potential import Potential

MAX_POINTS = 200_000  # of a parity plot, per quantity

OnBatch = Callable[[AtomicGraph, Mapping[str, Tensor]], None]


class LabelNumbers:
    """Number of each structure's label, such as its ``config_type``, by its frame in the file."""

    def __init__(self, dataset: HDF5Dataset, labels: np.ndarray) -> None:
        names, codes = np.unique(labels, return_inverse=True)
        self.names = [str(name) for name in names]
        self._codes = torch.zeros(len(dataset.file), dtype=torch.int64)
        self._codes[torch.from_numpy(dataset.indices)] = torch.from_numpy(codes.reshape(-1))

    def __call__(self, graph: AtomicGraph) -> Tensor:
        """(G,) numbers of labels."""
        return self._codes[graph.frame.cpu()].to(graph.frame.device)


class Breakdown(ErrorSums):
    """Errors by ``config_type``, and beside them by ``group`` and by element (forces).

    Parameters
    ----------
    dataset : of which all structures that are added are
    """

    def __init__(self, dataset: HDF5Dataset, device: torch.device | str = "cpu") -> None:
        self._types = LabelNumbers(dataset, dataset.config_types)
        self._groups = LabelNumbers(dataset, dataset.groups)
        super().__init__(self._types.names, device)
        self.groups = ErrorSums(self._groups.names, device)
        self.elements = ErrorSums(chemical_symbols, device)

    def add(
        self,
        graph: AtomicGraph,
        out: Mapping[str, Tensor],
        types: Tensor | None = None,
        *,
        of_atoms: bool = False,
    ) -> None:
        """Add the errors of a batch; which structure is of which group is known here."""
        super().add(graph, out, self._types(graph))
        self.groups.add(graph, out, self._groups(graph))
        self.elements.add(graph, out, graph.atomic_numbers, of_atoms=True)

    def kinds(self) -> dict[str, dict[str, Errors]]:
        """Kind of group -> name -> errors; elements with forces only."""
        return {
            "config_type": self.by_type(),
            "group": self.groups.by_type(),
            "element": {name: e for name, e in self.elements.by_type().items() if e},
        }


def evaluate(
    potential: Potential,
    dataset: HDF5Dataset,
    *,
    batch_size: int = 16,
    max_atoms: int | None = None,
    num_workers: int = 0,
    stress: bool | None = None,
    on_batch: OnBatch | None = None,
    stop: Callable[[], bool] = lambda: False,
    sums: Breakdown | None = None,
) -> Breakdown:
    """Errors on all structures of a data set, by config type, group and element.

    Parameters
    ----------
    potential : evaluated where it is, in evaluation mode; its mode is restored
    batch_size, max_atoms, num_workers : of the loader; the result does not depend on them
    stress : whether to predict stress; by default if there are periodic structures
    on_batch : called with each batch and what the potential made of it
    stop : asked after each batch; True ends the evaluation early
    sums : what the errors are added to, for example of a larger data set of which this is a part
    """
    device = potential.e0.device
    if stress is None:
        pbc = dataset.file.column("pbc")
        stress = pbc is not None and bool(pbc[dataset.indices].astype(bool).all(axis=1).any())
    sums = Breakdown(dataset, device) if sums is None else sums
    if len(dataset) == 0:
        return sums
    loader = GraphLoader(
        dataset, batch_size=batch_size, max_atoms=max_atoms, num_workers=num_workers
    )
    training = potential.training
    potential.eval()
    try:
        for graph in loader:
            graph = graph.to(device)
            out = potential(graph, stress=stress)
            sums.add(graph, out)
            if on_batch is not None:
                on_batch(graph, out)
            if stop():
                break
    finally:
        potential.train(training)
    return sums


@dataclass
class Pairs:
    """Labels and predictions for parity plots: energy per atom, force and stress components."""

    label: dict[str, list[np.ndarray]] = field(default_factory=lambda: {q: [] for q in QUANTITIES})
    prediction: dict[str, list[np.ndarray]] = field(
        default_factory=lambda: {q: [] for q in QUANTITIES}
    )

    def add(self, graph: AtomicGraph, out: Mapping[str, Tensor]) -> None:
        """Collect a batch, up to ``MAX_POINTS`` values of each quantity."""
        for q in QUANTITIES:
            if q not in out or sum(map(len, self.label[q])) >= MAX_POINTS:
                continue
            label, value = graph[q].cpu().double(), out[q].detach().cpu().double()
            if q == "energy":
                sizes = graph.ptr.diff().cpu()
                label, value = label / sizes, value / sizes
            mask = ~(label.isnan() | value.isnan())
            self.label[q].append(label[mask].numpy())
            self.prediction[q].append(value[mask].numpy())

    def arrays(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Quantity -> (labels, predictions), of the quantities that have any."""
        return {
            q: (np.concatenate(self.label[q]), np.concatenate(self.prediction[q]))
            for q in QUANTITIES
            if sum(map(len, self.label[q]))
        }


def predictions(
    potential: Potential, dataset: HDF5Dataset, graph: AtomicGraph, out: Mapping[str, Tensor]
) -> Iterator[str]:
    """Frames of a batch as extended XYZ: labels ``REF_energy``, predictions ``MLIP_energy``, ..."""
    ptr = graph.ptr.tolist()
    types = dict(zip(dataset.indices.tolist(), dataset.config_types, strict=True))
    for g, frame in enumerate(graph.frame.tolist()):
        a, b = ptr[g], ptr[g + 1]
        columns = [graph.positions[a:b]]
        properties = "species:S:1:pos:R:3"
        info = {}
        for prefix, values in (("REF", graph), ("MLIP", out)):
            if "forces" in values and not values["forces"][a:b].isnan().any():
                columns.append(values["forces"][a:b])
                properties += f":{prefix}_forces:R:3"
            if "energy" in values and not values["energy"][g].isnan():
                info[f"{prefix}_energy"] = repr(float(values["energy"][g]))
            if "stress" in values and not values["stress"][g].isnan().any():
                info[f"{prefix}_stress"] = _nine(values["stress"][g])
        head = [f"Properties={properties}", *(f"{key}={value}" for key, value in info.items())]
        pbc = " ".join("T" if p else "F" for p in graph.pbc[g].tolist())
        if bool(graph.cell[g].any()):
            # Row after row: extended XYZ lists the lattice vectors one after the other.
            head.insert(0, "Lattice=" + _nine(graph.cell[g]))
        head.append(f'pbc="{pbc}"')
        head.append(f"frame={frame}")
        if types.get(frame):
            head.append(f'config_type="{str(types[frame]).replace(chr(34), "")}"')
        rows = torch.cat([c.detach().cpu().double() for c in columns], dim=1).tolist()
        yield f"{b - a}\n{' '.join(head)}\n" + "".join(
            f"{chemical_symbols[z]:<2} {' '.join(f'{x:.10f}' for x in row)}\n"
            for z, row in zip(graph.atomic_numbers[a:b].tolist(), rows, strict=True)
        )


def _nine(matrix: Tensor) -> str:
    return '"' + " ".join(repr(x) for x in matrix.detach().cpu().double().flatten().tolist()) + '"'


@dataclass(frozen=True)
class Report:
    """Errors of one data set."""

    path: Path
    num_structures: int
    total: Errors
    kinds: dict[str, dict[str, Errors]]  # by config_type, group and element
    symmetry: SymmetryReport

    def text(self) -> str:
        """Table by config type, group and element, the worst of each, and the symmetry error."""
        text = grouped_table(self.total, self.kinds, title=self.path.name)
        return f"{text}\n{self.symmetry.text()}"


def evaluate_file(
    potential: Potential,
    path: str | Path,
    out: str | Path | None = None,
    *,
    batch_size: int = 16,
    plots: bool = True,
) -> Report:
    """What ``mlip eval`` does: errors of a data file, its symmetry error beside them, and in the
    folder ``out`` predictions, plots and a table.

    Isolated-atom frames are left out: their energy is right by construction.

    Raises
    ------
    ValueError
        If the file has an element that the potential does not know, or nothing to compare with.
    """
    dataset = HDF5Dataset(path, potential.cutoff)
    dataset = dataset.subset(~dataset.isolated) if not dataset.isolated.all() else dataset
    check_elements(potential, dataset)
    pairs = Pairs()
    folder = None if out is None else Path(out)
    if folder is None:
        sums = evaluate(potential, dataset, batch_size=batch_size)
        return _report(potential, dataset, sums)
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "predictions.extxyz"
    temporary = target.with_name(f".{target.name}.tmp")
    try:
        with open(temporary, "w", encoding="utf-8") as file:

            def on_batch(graph: AtomicGraph, result: Mapping[str, Tensor]) -> None:
                pairs.add(graph, result)
                file.writelines(predictions(potential, dataset, graph, result))

            sums = evaluate(potential, dataset, batch_size=batch_size, on_batch=on_batch)
        os.replace(temporary, target)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    report = _report(potential, dataset, sums)
    (folder / "errors.txt").write_text(report.text() + "\n", encoding="utf-8")
    if plots and pairs.arrays():
        from mlip.evaluation.plots import parity_plot

        parity_plot({Path(path).stem: pairs.arrays()}, folder / "parity.png")
    return report


def _report(potential: Potential, dataset: HDF5Dataset, sums: Breakdown) -> Report:
    total = sums.total()
    symmetry = sampled_symmetry_errors(potential, dataset, stress="stress" in total)
    return Report(Path(dataset.path), len(dataset), total, sums.kinds(), symmetry)


def evaluate_files(
    model: str | Path,
    data: Sequence[str | Path],
    out: str | Path | None = None,
    *,
    batch_size: int = 16,
    device: str = "auto",
    dtype: str = "",
    wrap: Callable[[Potential], Potential] | None = None,
) -> list[Report]:
    """``evaluate_file`` for several files, with a model given by its file or name.

    With several files each has its subfolder of ``out``; ``wrap`` changes the model before.
    """
    from mlip.checkpoint import load
    from mlip.pretrained import find

    if dtype not in ("", "float32", "float64"):
        raise ValueError(f"dtype must be float32 or float64, got '{dtype}'")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    potential = load(
        find(model), device=_device(device), dtype=getattr(torch, dtype) if dtype else None
    )
    if potential.reservation is not None:
        warnings.warn(f"{model} was {potential.reservation}", stacklevel=2)
    potential = potential if wrap is None else wrap(potential)
    folders = [None if out is None else Path(out) for _ in data]
    if len(data) > 1:
        stems = [Path(path).stem for path in data]
        if len(set(stems)) < len(stems):
            raise ValueError(f"two of the files have the same name: {', '.join(stems)}")
        folders = [folder and folder / stem for folder, stem in zip(folders, stems, strict=True)]
    return [
        evaluate_file(potential, path, folder, batch_size=batch_size)
        for path, folder in zip(data, folders, strict=True)
    ]


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device '{name}': give auto, cpu, cuda or cuda:1") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device '{name}': torch sees no GPU here; give cpu or auto")
    return device


def check_elements(potential: Potential, dataset: HDF5Dataset) -> None:
    """Raise ValueError naming an element of the data set that the potential was not trained on."""
    known = set(potential.elements)
    numbers = dataset.file.column("atomic_numbers")
    if numbers is None or set(np.unique(numbers).tolist()) <= known:
        return
    for k in range(len(dataset)):
        found = set(np.unique(dataset.structure(k).atomic_numbers).tolist())
        if missing := sorted(found - known):
            names = ", ".join(chemical_symbols[z] for z in missing)
            knows = ", ".join(chemical_symbols[z] for z in sorted(known))
            raise ValueError(
                f"{dataset.path}: frame {dataset.indices[k]} contains {names}; "
                f"the potential knows {knows}"
            )
