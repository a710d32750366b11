#!/usr/bin/env bash
# From nothing to a trained potential at work: bash examples/quickstart.sh
#
# Makes the environment .venv, trains a small Facet on the silicon data of the repository, prints its errors, relaxes
# diamond silicon with its cell, runs a short MD; plots, logs and the model file go into runs/quickstart.
# Under 10 minutes on 2 cores.  Run again, it continues where it stopped.
#
# DATA (folder of silicon_train.h5 and silicon_test.h5), OUT and OVERRIDES (options for `mlip train`) may be set;
# with PYTHON_ENV set to an existing environment nothing is installed.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
data="${DATA:-examples/data}"
out="${OUT:-runs/quickstart}"
[ -n "${PYTHON_ENV:-}" ] || .ci/venv
python="${PYTHON_ENV:-.venv}/bin/python"
mlip=("$python" -m mlip)

for file in "$data/silicon_train.h5" "$data/silicon_test.h5"; do
    [ -f "$file" ] || { echo "$file is not there; is the checkout whole?" >&2; exit 1; }
done
mkdir -p "$out"

step() { printf '\n== %s\n' "$1"; }

step "train (under 5 minutes)"
# shellcheck disable=SC2086  (several overrides are several words)
"${mlip[@]}" train configs/silicon_quickstart.yaml --resume run_dir="$out" \
    data.train="$data/silicon_train.h5" data.test="$data/silicon_test.h5" ${OVERRIDES:-}
model="$out/best.safetensors"

step "what the model file says of itself"
"${mlip[@]}" info "$model"

step "errors on the test set"
"${mlip[@]}" eval "$model" "$data/silicon_test.h5" --out "$out/eval"

step "relax diamond silicon and its cell, from a lattice constant 2 % too large"
"$python" -c "import sys; from ase.build import bulk; bulk('Si', a=5.58, cubic=True).write(sys.argv[1])" "$out/start.xyz"
"${mlip[@]}" relax "$out/start.xyz" --model "$model" --cell --out "$out/relaxed.xyz"

step "molecular dynamics: 64 atoms, 300 K, 0.5 ps"
"${mlip[@]}" md "$out/relaxed.xyz" --model "$model" --repeat 2 2 2 --temperature 300 --steps 500 \
    --overwrite --trajectory "$out/md.xyz" --log "$out/md.csv"

step "summary"
"$python" examples/summarize_quickstart.py "$out"
