#!/usr/bin/env bash
# Virtual environments of the packages that we compare with, one for each; the package, and what its
# speed depends on, in pinned versions.
#   benchmarks/install_peers.sh FOLDER        then: export PEERS=FOLDER
set -euo pipefail
folder=${1:?name the folder}
mkdir -p "$folder"
all=(torch==2.13.0 ase==3.29.0 numpy==2.4.6 scipy==1.17.1)

install() {
  local name=$1
  shift
  [ -d "$folder/$name" ] || python3 -m venv "$folder/$name"
  "$folder/$name/bin/pip" install "${all[@]}" "$@"
}

install mace mace-torch==0.3.16 e3nn==0.4.4 matscipy==1.3.1
install nequip nequip==0.19.0 e3nn==0.6.0 matscipy==1.3.1 lightning==2.6.6
install sevenn sevenn==0.13.0 e3nn==0.6.0 matscipy==1.3.1 torch-geometric==2.8.1
install matgl matgl==4.1.0 torch-geometric==2.8.1 lightning==2.6.6
install chgnet chgnet==0.4.2 pymatgen==2026.10.24
