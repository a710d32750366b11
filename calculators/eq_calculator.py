"""EqCalculator: a potential, or a committee of potentials, as an ASE calculator.

    >>> from mlip.calculators import EqCalculator
    >>> atoms.calc = EqCalculator("silicon")
    >>> atoms.get_potential_energy(), atoms.get_forces(), atoms.get_stress()

Energy, forces and stress come from one call of the model and are kept until the structure changes.
Units are ASE's: eV, eV/angstrom, eV/angstrom^3; stress in the order xx yy zz yz xz xy with the sign
of (1/V) dE/d eps.

Of a model whose symmetry is learned, ``symmetrize`` gives the mean over rotated copies of the
structure, exactly invariant under the group it names, with forces that are exactly the gradient of
the mean energy; and the spread over the copies as an uncertainty: energy_spread (eV) and
forces_spread (N,) (eV/angstrom).

A committee gives means under the usual names, and for X in energy, forces, stress the population
variance X_var and the members' values X_comm.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.outputs import Properties, all_outputs

from mlip.backends import is_auto
from mlip.calculators.batching import as_frames, batches
from mlip.calculators.chunks import BoundedPotential, without_program
from mlip.calculators.foreign_options import MODEL_ALIASES, refuse_unknown, take_alias
from mlip.calculators.hessian import copies_at_once, hessian
from mlip.calculators.info_inputs import InfoInputs
from mlip.calculators.memory import parse_memory
from mlip.calculators.model_sources import (
    ModelSource,
    own_potentials,
    parse_device,
    parse_dtype,
    quickened,
)
from mlip.calculators.neighbor_cache import NeighborCache
from mlip.calculators.rotation_spread import averaged, has_spread, with_spread, without_mean
from mlip.calculators.shield import shielded
from mlip.calculators.structure_checks import check_distances, check_finite, check_structure
from mlip.data.graph import AtomicGraph
from mlip.wrappers.rotation_averaging import RotationAveragingConfig

SINGLE = ("energy", "free_energy", "energies", "node_energy", "forces", "stress")
SPREAD = tuple(
    f"{name}_{kind}" for name in ("energy", "forces", "stress") for kind in ("var", "comm")
)
ORBIT_SPREAD = ("energy_spread", "forces_spread")
VOIGT = [0, 4, 8, 5, 2, 1]  # xx yy zz yz xz xy of a symmetric matrix
DISPLACED = 0.1  # angstrom; skin of lists of neighbours that displaced copies of a structure share


class EqCalculator(Calculator):
    """ASE calculator of a ``Potential``.

    Parameters
    ----------
    model : str, path, Potential, or list of these
        A model file, a pattern (``"run-*/model.safetensors"``), the name of a shipped model, or an
        object, of which a copy is kept.  Several models make a committee.  ``model_paths``,
        ``model_path``, ``models`` and ``checkpoint`` are other names for this argument.
    device : str
        ``"auto"``: the GPU if there is one.  Also called ``use_device``.
    dtype : "float32", "float64" or None
        Dtype of the model; None: the one it was saved in.  Also called ``default_dtype``.
    skin : float, angstrom
        The neighbour list is reused until an atom could have come this much closer.  Results do not
        depend on it.
    symmetrize : str or RotationAveragingConfig, optional
        Average over rotated copies: ``"octahedral"`` (24), ``"icosahedral"`` (60),
        ``"lebedev-11"`` (600), or another rule of ``mlip.nn.rotations``; with ``"+mirrors"`` at the
        end over reflections, too, which doubles the copies.  Costs as many times the model.
    accelerate : str or sequence of str, optional
        ``"analytic"``: Facet's gradient written out, what None stands for; ``"compile"``: one
        compiled program, about a minute the first time, not for all models; ``"cudagraph"``: one
        recorded for a GPU; ``"splines"``: tables in place of MACE's radial networks;
        ``"cuequivariance"``: NVIDIA's; ``"auto"``: what is known to pay (others than Facet
        compiled after 5000 steps); ``"plain"``: nothing.  Each is checked against the plain model
        in float64 first.
    program : str or path, optional
        The same as ``"compile"``, compiled before by ``mlip compile`` and checked alike.  Such a
        file is code that runs when it is loaded: give only one that you made or trust.
    max_memory : str or float, optional
        As ``"8GB"``, or bytes; None: what is free.  Structures that need more, as predicted, are
        evaluated in pieces, with the same results and a warning.
    energy_units_to_eV, length_units_to_A : float
        Units of a model that was trained in others.
    info_keys : dict
        Where ``atoms.info`` holds charge (e), spin (multiplicity) and field (V/angstrom) for models
        that read them, such as ``{"charge": "q"}``; by default ``charge`` or ``total_charge``,
        ``spin`` or ``total_spin``, ``field`` or ``electric_field``.
    field : 3 floats, optional
        External vector for models that read one, where ``atoms.info`` has none; in the unit of the
        training data, V/angstrom for an electric field.
    atoms, directory, label
        As in every ASE calculator.

    Raises
    ------
    FileNotFoundError, CheckpointError, ValueError, TypeError
        For models that are not there or cannot be used, and for unknown options.  Evaluating a
        structure with an unknown element, overlapping atoms, a singular cell or numbers that are
        not finite raises ValueError.
    """

    ignored_changes: set[str] = {"initial_charges", "initial_magmoms"}  # noqa: RUF012 (ASE's declaration)

    def __init__(
        self,
        model: ModelSource | None = None,
        device: str | torch.device | None = "auto",
        dtype: str | torch.dtype | None = None,
        *,
        skin: float = 0.5,
        symmetrize: str | RotationAveragingConfig | None = None,
        accelerate: str | Sequence[str] | None = None,
        program: str | os.PathLike[str] | None = None,
        max_memory: str | float | None = None,
        energy_units_to_eV: float = 1.0,
        length_units_to_A: float = 1.0,
        info_keys: Mapping[str, str] | None = None,
        field: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        model = take_alias(options, MODEL_ALIASES, "model", model)
        dtype = take_alias(options, ("default_dtype",), "dtype", dtype)
        device = take_alias(
            options, ("use_device",), "device", None if device == "auto" else device
        )
        of_ase = {
            key: options.pop(key) for key in ("atoms", "directory", "label") if key in options
        }
        refuse_unknown(options)
        if model is None:
            raise TypeError(
                "EqCalculator needs a model: a file, the name of a shipped model, or a Potential"
            )
        self.device = parse_device(device)
        with torch.inference_mode(False):  # weights made in it cannot be differentiated through
            self.potentials = own_potentials(model, self.device, parse_dtype(dtype))
            self.device = self.potentials[0].e0.device
            self.potentials = quickened(self.potentials, accelerate, program)
            self.potentials = averaged(self.potentials, symmetrize)
            single = [without_mean(p) for p in self.potentials]
        memory = None if max_memory is None else parse_memory(max_memory)
        wait = is_auto(accelerate)
        self._bounded = [BoundedPotential(p, memory, wait) for p in single]
        self.skin = skin
        self._energy_unit, self._length_unit = float(energy_units_to_eV), float(length_units_to_A)
        self.hessian_unit = self._energy_unit / self._length_unit**2
        self._inputs = InfoInputs(self.potentials, info_keys, field)
        cutoffs = {p.cutoff for p in self.potentials}
        self._caches = {c: NeighborCache(c, skin, self.device) for c in cutoffs}
        self._constants: tuple[tuple[bytes, bytes], dict[str, Any]] | None = None
        self._e0 = [p.e0.cpu().numpy() for p in self.potentials]  # (119,) each
        self._known = np.logical_and.reduce(~np.isnan(self._e0))  # (119,)
        self._lock = threading.RLock()
        self._has_spread = all(has_spread(p) for p in self.potentials)
        self.implemented_properties = [*SINGLE, *(SPREAD if len(self.potentials) > 1 else ())]
        if self._has_spread:
            self.implemented_properties += ORBIT_SPREAD
        Calculator.__init__(self, **of_ase)
        name = model if isinstance(model, str) else type(model).__name__
        self.parameters.update(model=name, device=str(self.device), dtype=str(self.dtype)[6:])

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in which the model computes."""
        return self.potentials[0].dtype

    @property
    def cutoff(self) -> float:
        """Angstrom; the largest of a committee."""
        return max(self._caches) * self._length_unit

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """Everything that the potential knows of ``atoms``, into ``results``."""
        atoms = self._given(atoms)
        with self._lock:
            self.reset()
            results = self._evaluate(atoms)
            self.atoms = atoms.copy()
            self.results = results

    def evaluate(
        self, structures: Iterable[Atoms], *, max_atoms: int = 256
    ) -> list[dict[str, Any]]:
        """Results of many structures, several at a time: for each what ``calculate`` leaves in
        ``results``.

        Parameters
        ----------
        structures : of any sizes and elements, periodic or not
        max_atoms : int
            In a batch at most, if it is not a single structure.

        Raises
        ------
        ValueError
            With the number of a structure that cannot be evaluated.
        """
        frames = as_frames(structures)
        results: list[dict[str, Any]] = []
        twin = self.twin(skin=DISPLACED)
        for batch in batches([len(atoms) for atoms in frames], max_atoms):
            answers = self._evaluate_together([frames[k] for k in batch], [twin] * len(batch))
            for k, answer in zip(batch, answers, strict=True):
                if isinstance(answer, ValueError):
                    raise ValueError(f"structure {k}: {answer}") from answer
                results.append(answer)
        return results

    def twin(self, skin: float | None = None) -> EqCalculator:
        """A calculator with the same weights, and neighbour lists and results of its own."""
        other = copy.copy(self)
        other.skin = self.skin if skin is None else skin
        other._caches = {c: cache.anew(skin) for c, cache in self._caches.items()}
        other._lock = threading.RLock()
        other.parameters = copy.copy(self.parameters)
        other.atoms, other.results = None, {}
        return other

    @staticmethod
    def calculate_together(
        calculators: Sequence[EqCalculator], structures: Sequence[Atoms]
    ) -> list[ValueError | None]:
        """``calculate`` for several structures in one batch, each with its own of some twins.

        Returns
        -------
        list
            What is wrong with each structure, None where it has results.
        """
        first = calculators[0]
        answers = first._evaluate_together(structures, calculators)
        problems: list[ValueError | None] = []
        for calculator, atoms, answer in zip(calculators, structures, answers, strict=True):
            with calculator._lock:
                calculator.reset()
                if isinstance(answer, ValueError):
                    problems.append(answer)
                    continue
                calculator.atoms, calculator.results = atoms.copy(), answer
                problems.append(None)
        return problems

    @property
    def length_unit(self) -> float:
        """Angstrom; the unit of the graphs."""
        return self._length_unit

    def checked_inputs(self, atoms: Atoms) -> dict[str, torch.Tensor]:
        """What the model reads of a structure beside its geometry; ValueError if it is none."""
        check_structure(atoms, self._known)
        return self._inputs.tensors(atoms)

    def evaluate_graphs(
        self, graphs: Mapping[float, AtomicGraph], stress: bool
    ) -> tuple[np.ndarray, ...]:
        """Of a batch energies (G,), forces (N, 3) and, if asked for, stresses (G, 3, 3) in eV and
        angstrom, means over the members, from its graphs within each cutoff in the model's unit of
        length."""
        e, r = self._energy_unit, self._length_unit
        units = {"energy": e, "forces": e / r} | ({"stress": e / r**3} if stress else {})
        with shielded(self.device):
            outputs = list(self._call({c: [graph] for c, graph in graphs.items()}, stress))
            means = [torch.stack([out[key] for out in outputs]).mean(dim=0) for key in units]
        return tuple(x.cpu().numpy() * unit for x, unit in zip(means, units.values(), strict=True))

    def get_property(
        self, name: str, atoms: Atoms | None = None, allow_calculation: bool = True
    ) -> Any:
        """One property, a copy; computed only if the structure has changed."""
        if name not in self.implemented_properties:
            have = ", ".join(self.implemented_properties)
            raise PropertyNotImplementedError(
                f"'{name}' is not a property of this calculator; it has {have}"
            )
        with self._lock:  # results of this structure, whatever other threads ask for
            if allow_calculation and name.startswith("stress"):
                pbc = self._given(atoms).pbc
                if not pbc.all():
                    raise PropertyNotImplementedError(
                        f"'{name}' is not defined for pbc = {pbc.tolist()}: there is no volume; "
                        f"use a structure that is periodic in three directions"
                    )
            return super().get_property(name, atoms, allow_calculation)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """Changes since the last calculation, of charge, spin and field if the model reads
        them."""
        old = self.atoms
        if old is None or tol != 1e-15:
            changes = list(super().check_state(atoms, tol=tol))
        else:  # bits are compared faster than tolerances, and no change is too small
            same = {
                "positions": np.array_equal(old.positions, atoms.positions),
                "numbers": np.array_equal(old.numbers, atoms.numbers),
                "cell": old.cell.array.tobytes() == atoms.cell.array.tobytes(),
                "pbc": old.pbc.tobytes() == atoms.pbc.tobytes(),
            }
            changes = [name for name, unchanged in same.items() if not unchanged]
        if not changes and self._inputs.read(atoms) != self._inputs.read(self._given(None)):
            changes.append("info")
        return changes

    def export_properties(self) -> Properties:
        """The results that ASE has a definition of."""
        return Properties({key: value for key, value in self.results.items() if key in all_outputs})

    def get_descriptors(
        self, atoms: Atoms | None = None, invariants_only: bool = True, num_layers: int = -1
    ) -> Any:
        """Invariant features of the atoms (N, C) of the last layer; a list for a committee.

        Of features that are vectors and tensors (``latent_irreps`` of a model) the squared lengths.
        """
        if not invariants_only or num_layers != -1:
            raise ValueError(
                "descriptors are the invariant features of the last layer; leave the options out"
            )
        atoms = self._given(atoms)
        with self._lock:
            with shielded(self.device):
                graphs = {c: [graph] for c, graph in self.checked_graphs(atoms).items()}
                outputs = list(self._call(graphs, stress=False))
        if any("features" not in output for output in outputs):
            raise PropertyNotImplementedError("this model has no descriptors")
        features = [
            potential.invariants(output["features"]).cpu().numpy()
            for potential, output in zip(self.potentials, outputs, strict=True)
        ]
        return features[0] if len(features) == 1 else features

    def get_hessian(
        self, atoms: Atoms | None = None, *, method: str = "auto", displacement: float = 1e-3
    ) -> np.ndarray:
        """Second derivatives of the energy, (3N, N, 3), eV/angstrom^2, symmetric.

        Parameters
        ----------
        atoms : structure; the last one if None
        method : "autograd", "finite" (central differences of the forces) or "auto"
            "auto" takes the first where it is possible.
        displacement : float, angstrom, of the finite differences
        """
        atoms = self._given(atoms)
        with self._lock:
            return hessian(self, atoms, method, displacement)

    def differentiable_forces(self, atoms: Atoms) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Of each member the forces and the positions that they can be differentiated by, (K N, 3)
        of K copies of the structure, in the model's units."""
        graphs = self.checked_graphs(atoms)
        for potential, bounded in zip(self.potentials, self._bounded, strict=True):
            # In training mode a potential keeps the graph of its forces; its parts stay in
            # evaluation mode.
            twin = copy.copy(without_program(potential))
            twin.training = True
            graph = graphs[potential.cutoff].to(self.device)
            batch = self._joined([graph] * copies_at_once(potential, bounded, graph))
            positions = batch.positions.clone().requires_grad_()
            forces = twin(batch.replace(positions=positions))["forces"]
            if not forces.requires_grad and graph.edge_index.shape[1]:
                raise RuntimeError(
                    "the forces of this model have no derivative; take method='finite'"
                )
            yield forces, positions

    def _given(self, atoms: Atoms | None) -> Atoms:
        atoms = self.atoms if atoms is None else atoms
        if atoms is None:
            raise ValueError("no structure: pass atoms, nothing has been calculated yet")
        return atoms

    def _graph(self, atoms: Atoms, cutoff: float) -> AtomicGraph:
        positions = np.asarray(atoms.positions, dtype=np.float64) / self._length_unit
        cell = atoms.cell.array / self._length_unit
        edges = self._caches[cutoff].edges(positions, cell, atoms.pbc)
        check_distances(atoms, edges.edge_index, edges.lengths * self._length_unit)
        graph = AtomicGraph(
            **self._constant_fields(atoms),
            positions=torch.from_numpy(positions),
            cell=torch.from_numpy(cell)[None],
            edge_index=edges.edge_index,
            cell_shifts=edges.shifts,
            **self._inputs.tensors(atoms),
        )
        on_gpu = edges.edge_index.device.type != "cpu"  # where lists of large systems are made
        return graph.to(self.device) if on_gpu else graph

    def _constant_fields(self, atoms: Atoms) -> dict[str, Any]:
        """Of a graph what stays the same while atoms move: the same tensors from step to step."""
        kind = (atoms.numbers.tobytes(), atoms.pbc.tobytes())
        last = self._constants
        if last is None or last[0] != kind:
            n = len(atoms)
            fields = {
                "atomic_numbers": torch.tensor(atoms.numbers, dtype=torch.int64),
                "pbc": torch.tensor(atoms.pbc)[None],
                "batch": torch.zeros(n, dtype=torch.int64),
                "ptr": torch.tensor([0, n]),
                "num_nodes": n,
            }
            last = self._constants = (kind, fields)
        return last[1]

    def _call(
        self, graphs: Mapping[float, Sequence[AtomicGraph]], stress: bool
    ) -> Iterator[dict[str, torch.Tensor]]:
        """Outputs of all members for a batch of structures."""
        batches = {cutoff: self._joined(parts) for cutoff, parts in graphs.items()}
        for potential, bounded in zip(self.potentials, self._bounded, strict=True):
            yield with_spread(potential, bounded, batches[potential.cutoff], stress)

    def _joined(self, graphs: Sequence[AtomicGraph]) -> AtomicGraph:
        """One batch on the device: a GPU gets it at once, not structure by structure."""
        if len({graph.edge_index.device for graph in graphs}) > 1:
            graphs = [graph.to(self.device) for graph in graphs]
        batch = graphs[0] if len(graphs) == 1 else AtomicGraph.collate(graphs)
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def checked_graphs(self, atoms: Atoms) -> dict[float, AtomicGraph]:
        """The structure within each cutoff; ValueError if it is none.

        Of tensors that the calculator keeps for the next step: not to be written to.
        """
        check_structure(atoms, self._known)
        with shielded(self.device):
            return {cutoff: self._graph(atoms, cutoff) for cutoff in self._caches}

    def _evaluate(self, atoms: Atoms) -> dict[str, Any]:
        (answer,) = self._evaluate_together([atoms], [self])
        if isinstance(answer, ValueError):
            raise answer
        return answer

    def _evaluate_together(
        self, frames: Sequence[Atoms], calculators: Sequence[EqCalculator]
    ) -> list[dict[str, Any] | ValueError]:
        """Results of each structure, or what is wrong with it; neighbours are found by the twin of
        this calculator that goes with it."""
        answers: dict[int, dict[str, Any] | ValueError] = {}
        graphs: dict[float, list[AtomicGraph]] = {cutoff: [] for cutoff in self._caches}
        sound = []
        with shielded(self.device):
            for k, (atoms, calculator) in enumerate(zip(frames, calculators, strict=True)):
                try:
                    of_frame = calculator.checked_graphs(atoms)
                except ValueError as problem:
                    answers[k] = problem
                    continue
                sound.append(k)
                for cutoff, graph in of_frame.items():
                    graphs[cutoff].append(graph)
            if sound:
                stress = any(frames[k].pbc.all() for k in sound)
                outputs = [
                    {key: value.cpu() for key, value in output.items() if key != "features"}
                    for output in self._call(graphs, stress)
                ]
                ends = list(accumulate(len(frames[k]) for k in sound))
                for place, k in enumerate(sound):
                    rows = slice(ends[place] - len(frames[k]), ends[place])
                    try:
                        answers[k] = self._results(frames[k], place, rows, outputs)
                    except ValueError as problem:
                        answers[k] = problem
        return [answers[k] for k in range(len(frames))]

    def _results(
        self,
        atoms: Atoms,
        place: int,
        rows: slice,
        outputs: Sequence[dict[str, torch.Tensor]],
    ) -> dict[str, Any]:
        """Results of structure ``place`` of a batch, whose atoms are ``rows``, from outputs on the
        processor."""
        periodic = bool(atoms.pbc.all())
        members = []
        for output, e0 in zip(outputs, self._e0, strict=True):
            e, f = self._energy_unit, self._energy_unit / self._length_unit
            energies = output["node_energy"][rows].numpy() * e
            member = {
                "energy": np.float64(output["energy"][place].item() * e),
                "energies": energies,
                "node_energy": energies - e0[atoms.numbers] * e,
                "forces": output["forces"][rows].numpy() * f,
            }
            if self._has_spread:
                member["energy_spread"] = np.float64(output["energy_spread"][place].item() * e)
                member["forces_spread"] = output["forces_spread"][rows].numpy() * f
            if periodic:
                stress = output["stress"][place].numpy() * (f / self._length_unit**2)
                member["stress"] = stress.ravel()[VOIGT]
            names = ("energy", "forces", *(("stress",) if periodic else ()))
            check_finite(atoms, {name: member[name] for name in names})  # the others are of these
            members.append(member)
        results: dict[str, Any] = {}
        for key in members[0]:
            if len(members) == 1:
                results[key] = members[0][key]
                continue
            stack = np.array([member[key] for member in members])
            results[key] = stack.mean(axis=0)
            if f"{key}_var" in SPREAD:
                results[f"{key}_var"] = stack.var(axis=0)
                results[f"{key}_comm"] = stack
        results["energy"] = results["free_energy"] = float(results["energy"])
        for key in ("energy_var", "energy_spread"):
            if key in results:
                results[key] = float(results[key])
        return results

    def __getstate__(self) -> dict[str, Any]:
        # A lock belongs to one process; lists of neighbours are made again.
        state = self.__dict__ | {"_caches": {c: cache.anew() for c, cache in self._caches.items()}}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()
