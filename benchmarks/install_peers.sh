#!/usr/bin/env bash
# Virtual environments of the packages that we compare with, one for each, versions pinned.
#   benchmarks/install_peers.sh FOLDER        then: export PEERS=FOLDER
set -euo pipefail
folder=${1:?name the folder}
mkdir -p "$folder"
for pin in mace-torch==0.3.16 nequip==0.19.0 sevenn==0.13.0 matgl==4.1.0 chgnet==0.4.2; do
  name=${pin%%[-=]*}
  [ -d "$folder/$name" ] || python3 -m venv "$folder/$name"
  "$folder/$name/bin/pip" install torch==2.13.0 "$pin"
done
