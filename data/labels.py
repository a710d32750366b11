"""Labels as users have them: which key, which unit, which convention -> eV, angstrom, ASE's stress.

Labels are looked for in ``atoms.info`` and ``atoms.arrays`` and in the results of an attached
calculator, where ASE moves the plain keys ``energy``, ``forces`` and ``stress`` of extended XYZ.
The internal stress is sigma = (1/V) dE/d eps as a symmetric (3, 3) matrix, tension positive; a
virial is -V sigma.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms, units

LABELS = ("energy", "forces", "stress")

# In order of preference; what an author marked as reference goes before what a program may have
# left there.
ENERGY_KEYS = (
    *("REF_energy", "ref_energy", "dft_energy", "DFT_energy", "QM_energy", "qm_energy"),
    *("energy", "Energy", "free_energy", "total_energy", "mace_energy", "MACE_energy"),
)
FORCES_KEYS = (
    *(
        "REF_forces",
        "ref_forces",
        "REF_force",
        "dft_forces",
        "DFT_forces",
        "dft_force",
        "DFT_force",
    ),
    *("QM_forces", "qm_forces", "forces", "Forces", "force", "mace_forces", "MACE_forces"),
)
STRESS_KEYS = (
    *("REF_stress", "ref_stress", "dft_stress", "DFT_stress", "QM_stress"),
    *("stress", "Stress", "mace_stress", "MACE_stress"),
)
VIRIAL_KEYS = (
    *("REF_virials", "REF_virial", "ref_virial", "dft_virials", "dft_virial", "DFT_virial"),
    *("QM_virial", "virials", "virial"),
)
CHARGE_KEYS = ("charge", "total_charge", "REF_charge")
SPIN_KEYS = ("spin", "total_spin", "multiplicity")
FIELD_KEYS = ("field", "electric_field", "REF_electric_field")  # V/angstrom
WEIGHT_KEYS = ("config_weight", "weight")
TYPE_KEYS = ("config_type",)

ENERGY_UNITS = {
    "eV": units.eV,
    "meV": 1e-3 * units.eV,
    "kcal/mol": units.kcal / units.mol,
    "kJ/mol": units.kJ / units.mol,
    "Hartree": units.Hartree,
    "Ry": units.Rydberg,
    "J": units.J,
}
LENGTH_UNITS = {"angstrom": 1.0, "bohr": units.Bohr, "nm": units.nm, "pm": 1e-2}
PRESSURE_UNITS = {
    "Pa": units.Pascal,
    "kPa": 1e3 * units.Pascal,
    "MPa": 1e6 * units.Pascal,
    "GPa": units.GPa,
    "bar": 1e-4 * units.GPa,
    "kbar": 1e-1 * units.GPa,
    "Mbar": 1e2 * units.GPa,
}
_ALIASES = {
    "electronvolt": "eV",
    "ha": "Hartree",
    "eh": "Hartree",
    "hartrees": "Hartree",
    "rydberg": "Ry",
    "kcalmol": "kcal/mol",
    "kjmol": "kJ/mol",
    "a": "angstrom",
    "ang": "angstrom",
    "å": "angstrom",
    "angstroms": "angstrom",
    "a0": "bohr",
    "nanometer": "nm",
}
# Places of the numbers in a 3 x 3 matrix.
STRESS_ORDERS = {
    "ase": ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)),  # xx yy zz yz xz xy
    "voigt": ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)),
    "vasp": ((0, 0), (1, 1), (2, 2), (0, 1), (1, 2), (0, 2)),  # xx yy zz xy yz zx
}
# Prefix under which the extended-XYZ reader leaves stress and virial as they stand in the file.
RAW = "_raw_"


def energy_unit(name: str) -> float:
    """Value of a unit of energy in eV."""
    return _unit(name, ENERGY_UNITS, "energy")


def length_unit(name: str) -> float:
    """Value of a unit of length in angstrom."""
    return _unit(name, LENGTH_UNITS, "length")


def forces_unit(name: str) -> float:
    """Value of a unit such as ``kcal/mol/angstrom`` or ``Hartree/bohr`` in eV/angstrom."""
    energy, _, length = name.strip().rpartition("/")
    if not energy:
        raise ValueError(f"unknown unit of forces {name!r}; write energy/length, e.g. eV/angstrom")
    return energy_unit(energy) / length_unit(length)


def stress_unit(name: str) -> float:
    """Value of a unit such as ``GPa``, ``kbar`` or ``eV/angstrom^3`` in eV/angstrom^3."""
    match = re.fullmatch(r"(.+)/([^/]+?)(\^3|\*\*3|3|³)", name.strip())
    if match:
        return energy_unit(match[1]) / length_unit(match[2]) ** 3
    return _unit(name, PRESSURE_UNITS, "stress", ("eV/angstrom^3",), exact=("Pa", "MPa", "Mbar"))


def _unit(
    name: str,
    table: Mapping[str, float],
    kind: str,
    also: Sequence[str] = (),
    exact: Sequence[str] = ("meV",),
) -> float:
    text = name.strip()
    if text in table:
        return table[text]
    # Without regard to case, except where case tells milli from mega.
    lower = {key.lower(): value for key, value in table.items() if key not in exact}
    key = _ALIASES.get(text.lower(), text).lower()
    if key in lower:
        return lower[key]
    names = [*table, *also]
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ValueError(f"unknown unit of {kind} {name!r}; {hint}known are {', '.join(names)}")


@dataclass(frozen=True)
class LabelOptions:
    """How labels are named and meant; None leaves a key to be found, and a unit to follow from the
    others."""

    energy_key: str | None = None
    forces_key: str | None = None
    stress_key: str | None = None
    virial_key: str | None = None
    config_type_key: str | None = None
    group_key: str | None = None
    energy_unit: str = "eV"
    length_unit: str = "angstrom"
    forces_unit: str | None = None
    stress_unit: str | None = None
    virial_unit: str | None = None
    stress_order: str | None = None
    flip_stress: bool = False  # for sources in which compression is positive, as VASP prints it


@dataclass
class Frame:
    """One structure with its labels in the units of the package, and where each label came from."""

    atoms: Atoms
    energy: float | None = None
    forces: np.ndarray | None = None
    stress: np.ndarray | None = None
    charge: float | None = None
    spin: float | None = None
    field: np.ndarray | None = None
    weight: float | None = None
    config_type: str = ""
    group: str = ""
    sources: dict[str, tuple[str, str]] = dataclasses.field(
        default_factory=dict
    )  # label -> (key, place)
    ignored: list[str] = dataclasses.field(default_factory=list)  # what was found and not used
    asymmetry: float = 0.0  # of the stress, relative


class LabelReader:
    """Reads the labels of ASE structures under given options."""

    def __init__(self, options: LabelOptions) -> None:
        if options.stress_order is not None and options.stress_order not in STRESS_ORDERS:
            raise ValueError(
                f"unknown order of stress {options.stress_order!r}; known are "
                "ase = voigt (xx yy zz yz xz xy) and vasp (xx yy zz xy yz zx)"
            )
        self.options = options
        self.energy = energy_unit(options.energy_unit)
        self.length = length_unit(options.length_unit)
        self.forces = self.energy / self.length
        if options.forces_unit is not None:
            self.forces = forces_unit(options.forces_unit)
        self.stress = self.energy / self.length**3
        if options.stress_unit is not None:
            self.stress = stress_unit(options.stress_unit)
        self.virial = (
            self.energy if options.virial_unit is None else energy_unit(options.virial_unit)
        )

    def read(self, atoms: Atoms) -> Frame:
        """Labels of one structure.

        Raises
        ------
        ValueError
            For a label that is not finite, of the wrong shape, or of unknown convention; the text
            names its key.
        """
        results = dict(atoms.calc.results) if atoms.calc is not None else {}
        info = {str(key).removeprefix(RAW): value for key, value in atoms.info.items()}
        geometry = Atoms(
            numbers=atoms.numbers,
            positions=atoms.positions * self.length,
            cell=np.asarray(atoms.cell) * self.length,
            pbc=atoms.pbc,
        )
        frame = Frame(geometry)
        options = self.options

        if found := _find(options.energy_key, ENERGY_KEYS, {"info": info, "calculator": results}):
            key, place, value = found
            if (key, place) == ("energy", "calculator") and options.energy_key is None:
                key, value = _force_consistent(results)
            frame.energy = float(_numbers(key, value, ((), (1,))).reshape(())) * self.energy
            frame.sources["energy"] = (key, place)
        if found := _find(
            options.forces_key, FORCES_KEYS, {"arrays": atoms.arrays, "calculator": results}
        ):
            key, place, value = found
            frame.forces = _numbers(key, value, ((len(atoms), 3),)) * self.forces
            frame.sources["forces"] = (key, place)
        self._read_stress(frame, info, results)

        frame.charge = _scalar(info, CHARGE_KEYS)
        frame.spin = _scalar(info, SPIN_KEYS)
        if found := _find(None, FIELD_KEYS, {"info": info}):
            frame.field = _numbers(found[0], found[2], ((3,),))
        frame.weight = _scalar(info, WEIGHT_KEYS)
        if frame.weight is not None and frame.weight < 0:
            raise ValueError(f"the weight {frame.weight} is negative")
        type_keys = TYPE_KEYS if options.config_type_key is None else (options.config_type_key,)
        frame.config_type = next((str(info[key]) for key in type_keys if key in info), "")
        if options.group_key is not None:
            frame.group = str(info.get(options.group_key, ""))
        used = {key for key, _ in frame.sources.values()}
        if results.get("free_energy") == results.get("energy"):
            used.add("free_energy")  # the same number under another name
        pattern = re.compile("energy|force|stress|virial", re.IGNORECASE)
        explained = [text.partition(":")[0] for text in frame.ignored]
        for place, names in (("info", info), ("arrays", atoms.arrays), ("calculator", results)):
            left = [f"{n} ({place})" for n in names if pattern.search(n) and n not in used]
            frame.ignored += [text for text in left if text not in explained]
        return frame

    def _read_stress(
        self, frame: Frame, info: Mapping[str, Any], results: Mapping[str, Any]
    ) -> None:
        options = self.options
        places: dict[str, Mapping[str, Any]] = {"info": info, "calculator": results}
        stress = virial = None
        if options.stress_key is not None or options.virial_key is None:
            stress = _find(options.stress_key, STRESS_KEYS, places)
        if stress is None and (options.virial_key is not None or options.stress_key is None):
            virial = _find(options.virial_key, VIRIAL_KEYS, places)
        if (found := stress or virial) is None:
            return
        key, place, value = found
        matrix = self._matrix(key, place, value)
        if not frame.atoms.pbc.all():
            frame.ignored.append(f"{key} ({place}): no stress without three periodic directions")
            return
        if stress is not None:
            sigma = matrix * self.stress * (-1 if options.flip_stress else 1)
        else:
            volume = abs(np.linalg.det(np.asarray(frame.atoms.cell)))
            if volume == 0:
                raise ValueError(f"{key} cannot be divided by the volume of a flat cell")
            sigma = -matrix * self.virial / volume
        frame.asymmetry = float(np.abs(sigma - sigma.T).max() / max(np.abs(sigma).max(), 1e-300))
        frame.stress = (sigma + sigma.T) / 2
        frame.sources["stress"] = (key, place)

    def _matrix(self, key: str, place: str, value: Any) -> np.ndarray:
        numbers = _numbers(key, value, ((3, 3), (9,), (6,), (1, 3, 3)))
        if numbers.size == 9:
            return numbers.reshape(3, 3)
        order = self.options.stress_order
        if place == "calculator":
            order = "ase"  # ASE's calculators define it
        if order is None:
            raise ValueError(
                f"{key} has 6 numbers whose order is not known; say stress_order (--stress-order) "
                "ase (xx yy zz yz xz xy) or vasp (xx yy zz xy yz zx)"
            )
        matrix = np.empty((3, 3))
        for (a, b), number in zip(STRESS_ORDERS[order], numbers, strict=True):
            matrix[a, b] = matrix[b, a] = number
        return matrix


def _find(
    given: str | None, known: Sequence[str], places: Mapping[str, Mapping[str, Any]]
) -> tuple[str, str, Any] | None:
    """(key, place, value) of the first key that is there."""
    for key in (given,) if given is not None else known:
        for place, values in places.items():
            if values.get(key) is not None:
                return str(key), place, values[key]
    return None


def _force_consistent(results: Mapping[str, Any]) -> tuple[str, Any]:
    """Energy of which the forces are derivatives: with smeared electrons codes also report the
    extrapolation to zero width, which ASE calls ``energy`` then."""
    energy, free = results["energy"], results.get("free_energy")
    return ("energy", energy) if free is None or free == energy else ("free_energy", free)


def _numbers(key: str, value: Any, shapes: Sequence[tuple[int, ...]]) -> np.ndarray:
    try:
        numbers = np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        raise ValueError(f"{key} is not a number: {str(value)[:60]!r}") from None
    if numbers.shape not in shapes:
        expected = " or ".join(map(str, shapes))
        raise ValueError(f"{key} has shape {numbers.shape}, expected {expected}")
    if not np.isfinite(numbers).all():
        where = "" if numbers.ndim < 2 else f" at {np.argwhere(~np.isfinite(numbers))[0].tolist()}"
        raise ValueError(f"{key} is not finite{where}; leave a missing label out instead")
    return numbers


def _scalar(info: Mapping[str, Any], keys: Sequence[str]) -> float | None:
    for key in keys:
        if key in info:
            return float(_numbers(key, info[key], ((), (1,))).reshape(()))
    return None
