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
import difflib
import os
import threading
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import Calculator, PropertyNotImplementedError, all_changes
from ase.outputs import Properties, all_outputs
from ase.stress import full_3x3_to_voigt_6_stress

from mlip.calculators.info_inputs import InfoInputs
from mlip.calculators.model_sources import (
    ModelSource,
    own_potentials,
    parse_device,
    parse_dtype,
)
from mlip.calculators.neighbor_cache import NeighborCache
from mlip.calculators.rotation_spread import averaged, has_spread, with_spread
from mlip.calculators.structure_checks import check_distances, check_structure
from mlip.data.graph import AtomicGraph
from mlip.potential import Potential
from mlip.wrappers.rotation_averaging import RotationAveragingConfig

SINGLE = ("energy", "free_energy", "energies", "node_energy", "forces", "stress")
SPREAD = tuple(
    f"{name}_{kind}" for name in ("energy", "forces", "stress") for kind in ("var", "comm")
)
ORBIT_SPREAD = ("energy_spread", "forces_spread")
MODEL_ALIASES = ("model_paths", "model_path", "models", "checkpoint")
# Options of other packages' calculators that have no meaning here; they change nothing.
FOREIGN = (
    "arrays_keys", "charges_key", "compile_mode", "enable_cueq", "enable_flash", "enable_oeq",
    "fullgraph", "head", "modal", "model_type", "task_name",
)  # fmt: skip
IMPORTED_BY = os.getpid()


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
        energy_units_to_eV: float = 1.0,
        length_units_to_A: float = 1.0,
        info_keys: Mapping[str, str] | None = None,
        field: Sequence[float] | None = None,
        **options: Any,
    ) -> None:
        model = _take_alias(options, MODEL_ALIASES, "model", model)
        dtype = _take_alias(options, ("default_dtype",), "dtype", dtype)
        device = _take_alias(
            options, ("use_device",), "device", None if device == "auto" else device
        )
        of_ase = {
            key: options.pop(key) for key in ("atoms", "directory", "label") if key in options
        }
        _refuse_unknown(options)
        if model is None:
            raise TypeError(
                "EqCalculator needs a model: a file, the name of a shipped model, or a Potential"
            )
        self.device = parse_device(device)
        with torch.inference_mode(
            False
        ):  # weights made in inference mode could not be differentiated through
            self.potentials = own_potentials(model, self.device, parse_dtype(dtype))
            self.potentials = averaged(self.potentials, symmetrize)
        self.skin = skin
        self._energy_unit, self._length_unit = float(energy_units_to_eV), float(length_units_to_A)
        self._inputs = InfoInputs(self.potentials, info_keys, field)
        self._caches = {p.cutoff: NeighborCache(p.cutoff, skin) for p in self.potentials}
        self._known = np.all(
            [~p.e0.isnan().cpu().numpy() for p in self.potentials], axis=0
        )  # (119,)
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
            changes = [
                name
                for name, before, now in (
                    ("positions", old.positions, atoms.positions),
                    ("numbers", old.numbers, atoms.numbers),
                    ("cell", old.cell.array, atoms.cell.array),
                    ("pbc", old.pbc, atoms.pbc),
                )
                if not np.array_equal(before, now)
            ]
        if not changes and self._inputs.read(atoms) != self._inputs.read(self._given(None)):
            changes.append("info")
        return changes

    def export_properties(self) -> Properties:
        """The results that ASE has a definition of."""
        return Properties({key: value for key, value in self.results.items() if key in all_outputs})

    def get_descriptors(
        self, atoms: Atoms | None = None, invariants_only: bool = True, num_layers: int = -1
    ) -> Any:
        """Invariant features of the atoms (N, C) of the last layer; a list for a committee."""
        if not invariants_only or num_layers != -1:
            raise ValueError(
                "descriptors are the invariant features of the last layer; leave the options out"
            )
        atoms = self._given(atoms)
        with self._lock:
            outputs = [output for output, _ in self._call(atoms, stress=False)]
        if any("features" not in output for output in outputs):
            raise PropertyNotImplementedError("this model has no descriptors")
        features = [output["features"].cpu().numpy() for output in outputs]
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
        if method not in ("auto", "autograd", "finite"):
            raise ValueError(f"method = '{method}'; give 'auto', 'autograd' or 'finite'")
        n = 3 * len(atoms)
        with self._lock:
            if method == "autograd" or (method == "auto" and self._twice_differentiable(atoms)):
                hessian = self._hessian_by_autograd(atoms)
            else:
                hessian = self._hessian_by_differences(atoms, displacement)
        return ((hessian + hessian.T) / 2).reshape(n, len(atoms), 3)

    def _given(self, atoms: Atoms | None) -> Atoms:
        atoms = self.atoms if atoms is None else atoms
        if atoms is None:
            raise ValueError("no structure: pass atoms, nothing has been calculated yet")
        return atoms

    def _graph(self, atoms: Atoms, cutoff: float) -> AtomicGraph:
        positions = np.asarray(atoms.positions, dtype=np.float64) / self._length_unit
        cell = np.array(atoms.cell) / self._length_unit
        edges = self._caches[cutoff].edges(positions, cell, atoms.pbc)
        check_distances(atoms, edges.edge_index, edges.lengths * self._length_unit)
        n = len(atoms)
        graph = AtomicGraph(
            atomic_numbers=torch.as_tensor(atoms.numbers, dtype=torch.int64),
            positions=torch.from_numpy(positions),
            cell=torch.from_numpy(cell)[None],
            pbc=torch.from_numpy(np.array(atoms.pbc))[None],
            edge_index=torch.from_numpy(edges.edge_index),
            cell_shifts=torch.from_numpy(edges.shifts),
            batch=torch.zeros(n, dtype=torch.int64),
            ptr=torch.tensor([0, n]),
            num_nodes=n,
            **self._inputs.tensors(atoms),
        )
        return graph if self.device.type == "cpu" else graph.to(self.device)

    def _call(
        self, atoms: Atoms, *, stress: bool
    ) -> list[tuple[dict[str, torch.Tensor], Potential]]:
        """Outputs of all members for a checked structure, with the members."""
        check_structure(atoms, self._known)
        with _shielded(self.device):
            graphs = {cutoff: self._graph(atoms, cutoff) for cutoff in self._caches}
            return [(with_spread(p, graphs[p.cutoff], stress), p) for p in self.potentials]

    def _evaluate(self, atoms: Atoms) -> dict[str, Any]:
        periodic = bool(atoms.pbc.all())
        members = []
        for output, potential in self._call(atoms, stress=periodic):
            e, f = self._energy_unit, self._energy_unit / self._length_unit
            energies = output["node_energy"].cpu().numpy() * e
            member = {
                "energy": np.float64(output["energy"].item() * e),
                "energies": energies,
                "node_energy": energies - potential.e0.cpu().numpy()[atoms.numbers] * e,
                "forces": output["forces"].cpu().numpy() * f,
            }
            if self._has_spread:
                member["energy_spread"] = np.float64(output["energy_spread"].item() * e)
                member["forces_spread"] = output["forces_spread"].cpu().numpy() * f
            if periodic:
                stress = output["stress"][0].cpu().numpy() * (f / self._length_unit**2)
                member["stress"] = full_3x3_to_voigt_6_stress(stress)
            _check_finite(atoms, member)
            members.append(member)
        results: dict[str, Any] = {}
        for key in members[0]:
            stack = np.array([member[key] for member in members])
            results[key] = stack[0] if len(members) == 1 else stack.mean(axis=0)
            if len(members) > 1 and f"{key}_var" in SPREAD:
                results[f"{key}_var"] = stack.var(axis=0)
                results[f"{key}_comm"] = stack
        results["energy"] = results["free_energy"] = float(results["energy"])
        for key in ("energy_var", "energy_spread"):
            if key in results:
                results[key] = float(results[key])
        return results

    def _twice_differentiable(self, atoms: Atoms) -> bool:
        """Whether forces are derivatives of the energy that can be differentiated again."""
        with _shielded(self.device), torch.enable_grad():
            for forces, positions in self._differentiable_forces(atoms):
                if not forces.requires_grad:
                    return False
                try:
                    torch.autograd.grad(forces[0, 0], positions, allow_unused=True)
                except RuntimeError:  # an operation of the model has no second derivative
                    return False
        return True

    def _differentiable_forces(self, atoms: Atoms) -> list[tuple[torch.Tensor, torch.Tensor]]:
        check_structure(atoms, self._known)
        pairs = []
        with _shielded(self.device):
            for potential in self.potentials:
                # In training mode a potential keeps the graph of its forces; its parts stay in
                # evaluation mode.
                twin = copy.copy(potential)
                twin.training = True
                graph = self._graph(atoms, potential.cutoff)
                positions = graph.positions.requires_grad_()
                pairs.append((twin(graph)["forces"], positions))
        return pairs

    def _hessian_by_autograd(self, atoms: Atoms) -> np.ndarray:
        n = 3 * len(atoms)
        hessians = []
        with _shielded(self.device), torch.enable_grad():
            for forces, positions in self._differentiable_forces(atoms):
                rows = positions.new_zeros(n, n)
                if forces.requires_grad:  # not so without any neighbours
                    for k, force in enumerate(forces.flatten()):
                        (row,) = torch.autograd.grad(
                            force,
                            positions,
                            retain_graph=True,
                            materialize_grads=True,
                            allow_unused=True,
                        )
                        rows[k] = -row.flatten()
                hessians.append(rows.detach().cpu().numpy())
        return np.mean(hessians, axis=0) * (self._energy_unit / self._length_unit**2)

    def _hessian_by_differences(self, atoms: Atoms, h: float) -> np.ndarray:
        moved = atoms.copy()
        rows = np.empty((3 * len(atoms), 3 * len(atoms)))
        for k in range(3 * len(atoms)):
            forces = []
            for sign in (1, -1):
                moved.positions = atoms.positions
                moved.positions[k // 3, k % 3] += sign * h
                forces.append(self._evaluate(moved)["forces"].ravel())
            rows[k] = -(forces[0] - forces[1]) / (2 * h)
        return rows

    def __getstate__(self) -> dict[str, Any]:
        # A lock belongs to one process; lists of neighbours are made again.
        state = self.__dict__ | {"_caches": {c: NeighborCache(c, self.skin) for c in self._caches}}
        del state["_lock"]
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.RLock()


@contextmanager
def _shielded(device: torch.device) -> Iterator[None]:
    """Evaluate as if the caller had set nothing: his modes would leave no gradients, or coarse
    ones."""
    threads = torch.get_num_threads()
    # The threads of OpenMP do not survive a fork: a child that waited for them would wait for ever.
    orphan = threads > 1 and os.getpid() != IMPORTED_BY
    if orphan:
        torch.set_num_threads(1)
    try:
        with torch.inference_mode(False), torch.autocast(device.type, enabled=False):
            yield
    finally:
        if orphan:
            torch.set_num_threads(threads)


def _take_alias(options: dict[str, Any], aliases: Sequence[str], name: str, value: Any) -> Any:
    for alias in aliases:
        if alias in options:
            other = options.pop(alias)
            if value is not None and other is not None:
                raise TypeError(f"'{alias}' is another name of '{name}'; give one of them")
            value = other if value is None else value
    return value


def _refuse_unknown(options: dict[str, Any]) -> None:
    names = (
        "model", "device", "dtype", "skin", "energy_units_to_eV", "length_units_to_A", "info_keys",
        "field", "symmetrize", "default_dtype", "use_device", "atoms", "directory", "label",
        *MODEL_ALIASES,
    )  # fmt: skip
    for key, value in options.items():
        if key not in FOREIGN:
            close = difflib.get_close_matches(key, names, n=1, cutoff=0.6)
            hint = f", did you mean '{close[0]}'?" if close else f"; there are {', '.join(names)}"
            raise TypeError(f"EqCalculator: unknown option '{key}'{hint}")
        if value:
            warnings.warn(
                f"EqCalculator: '{key}' has no meaning for these models, ignored", stacklevel=3
            )


def _check_finite(atoms: Atoms, results: Mapping[str, Any]) -> None:
    for name, value in results.items():
        if not np.isfinite(value).all():
            where = ""
            if name in ("forces", "energies", "node_energy"):
                bad = ~np.isfinite(value).reshape(len(atoms), -1).all(axis=1)
                where = f" of atom {int(np.argmax(bad))}"
            raise ValueError(
                f"the model gives no finite {name}{where} for {atoms.get_chemical_formula()}; "
                f"the structure is far from anything it has learnt, or its weights are broken"
            )
