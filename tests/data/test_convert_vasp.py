"""vasprun.xml, of the content that ASE's reader needs."""

from __future__ import annotations

import numpy as np
import pytest
from ase import units

from mlip.data.convert import convert
from mlip.data.dataset import HDF5Dataset

VASPRUN = """<?xml version="1.0" encoding="ISO-8859-1"?>
<modeling>
 <generator><i name="program" type="string">vasp</i></generator>
 <incar></incar>
 <kpoints>
  <generation param="Gamma"><v type="int" name="divisions"> 1 1 1 </v></generation>
  <varray name="kpointlist"><v> 0.0 0.0 0.0 </v></varray>
  <varray name="weights"><v> 1.0 </v></varray>
 </kpoints>
 <parameters></parameters>
 <atominfo>
  <atoms> 2 </atoms><types> 1 </types>
  <array name="atoms"><set>
   <rc><c>Cu</c><c> 1</c></rc><rc><c>Cu</c><c> 1</c></rc>
  </set></array>
 </atominfo>
 <structure name="initialpos">{structure}</structure>
 <calculation>
  <scstep><energy>
   <i name="alphaZ"> 0.0 </i>
   <i name="e_fr_energy"> {free} </i><i name="e_wo_entrp"> 0.0 </i><i name="e_0_energy"> {zero} </i>
  </energy></scstep>
  <structure>{structure}</structure>
  <varray name="forces"><v> 0.1 0.2 0.3 </v><v> -0.1 -0.2 -0.3 </v></varray>
  <varray name="stress"><v> 10 1 2 </v><v> 1 20 3 </v><v> 2 3 30 </v></varray>
  <energy>
   <i name="e_fr_energy"> {free} </i><i name="e_wo_entrp"> 0.0 </i><i name="e_0_energy"> {zero} </i>
  </energy>
 </calculation>
</modeling>
"""
VASP_STRUCTURE = """
 <crystal><varray name="basis"><v> 4 0 0 </v><v> 0 4 0 </v><v> 0 0 4 </v></varray></crystal>
 <varray name="positions"><v> 0.0 0.0 0.0 </v><v> 0.5 0.5 0.5 </v></varray>
"""


def test_vasprun_gives_the_energy_that_belongs_to_the_forces(tmp_path):
    text = VASPRUN.format(structure=VASP_STRUCTURE, free=-7.5, zero=-7.25)
    (tmp_path / "vasprun.xml").write_text(text)
    report = convert(tmp_path / "vasprun.xml", tmp_path / "a.h5")
    assert report.sources["energy", "free_energy", "calculator"] == 1
    frame = HDF5Dataset(tmp_path / "a.h5", cutoff=3.0)[0]
    assert float(frame.energy) == -7.5  # not the one extrapolated to electrons without smearing
    np.testing.assert_allclose(frame.forces[0], [0.1, 0.2, 0.3])
    kbar = -0.1 * units.GPa  # VASP's sign is that of a pressure
    expected = np.array([[10, 1, 2], [1, 20, 3], [2, 3, 30]]) * kbar
    np.testing.assert_allclose(frame.stress[0], expected, rtol=1e-6)
    convert(tmp_path / "vasprun.xml", tmp_path / "b.h5", energy_key="energy")
    assert float(HDF5Dataset(tmp_path / "b.h5", cutoff=3.0)[0].energy) == -7.25
    (tmp_path / "vasprun.xml").write_text(text[: text.index("</calculation>")])
    with pytest.raises(ValueError, match=r"vasprun\.xml.*did not finish"):
        convert(tmp_path / "vasprun.xml", tmp_path / "c.h5")
