#!/usr/bin/env bash
# mlearn Si, Cu, Li, Mo with one configuration and the published split: errors on the test set, then
# the relaxed crystal and its equation of state.
#   MLIP_DATASETS=/path/to/datasets benchmarks/mlearn.sh [minutes per element at most] [elements...]
# Training takes one thread, so that two elements may run side by side on two cores.  The model judged is
# the last one, at the end of the schedule: `best` is chosen by about ten structures of validation, in
# which the forces of one surface or melt outweigh all else.
set -euo pipefail
cd "$(dirname "$0")/.."
data=${MLIP_DATASETS:?set MLIP_DATASETS to the folder that holds mlearn/}
minutes=${1:-45}; shift || true
out=${MLIP_RUNS:-runs}/mlearn; mkdir -p "$out" benchmarks/results
for element in ${@:-Si Cu Li Mo}; do
  for part in train test; do
    [ -f "$out/${element}_$part.h5" ] || mlip convert "$data/mlearn/${element}_$part.xyz.gz" "$out/${element}_$part.h5"
  done
  mlip train benchmarks/mlearn.yaml "data.train=$out/${element}_train.h5" "data.test=$out/${element}_test.h5" \
    "run_dir=$out/$element" "schedule.max_time=${minutes}m" resume=auto \
    "runtime.num_threads=1" "logging.progress=false" > "benchmarks/results/mlearn_$element.log" 2>&1
  mlip eval "$out/$element/last.safetensors" "$out/${element}_test.h5" --out "$out/${element}_last" \
    > "benchmarks/results/mlearn_${element}_test.txt"
  python benchmarks/equilibrium.py "$out/$element/last.safetensors" "$element" \
    --out "benchmarks/results/equilibrium_$element.json"
done
