#!/usr/bin/env bash
# 3BPA: Facet and mace-torch (64x0e+64x1o, batch 5) for the same time, one thread each, side by side, same allocator.
#   MLIP_DATASETS=/path/to/datasets MACE=/path/to/mace/venv benchmarks/threebpa.sh [minutes]
set -euo pipefail
cd "$(dirname "$0")/.."
data=${MLIP_DATASETS:?set MLIP_DATASETS to the folder that holds 3bpa/}
mace=${MACE:?set MACE to a virtual environment with mace-torch 0.3.16}
minutes=${1:-45}
out=${MLIP_RUNS:-runs}/3bpa; mkdir -p "$out" benchmarks/results
python benchmarks/threebpa_split.py "$data/3bpa" "$out"
mlip convert "$out/train.xyz" "$out/train.h5"
mlip convert "$out/valid.xyz" "$out/valid.h5"
# glibc's own names of the settings that the runner of mlip makes by itself
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=67108864
export OMP_NUM_THREADS=1 TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD=1
(cd "$out" && timeout "${minutes}m" "$mace/bin/mace_run_train" --name mace --train_file train.xyz --valid_file valid.xyz \
  --E0s IsolatedAtom --energy_key REF_energy --forces_key REF_forces --model MACE --hidden_irreps "64x0e + 64x1o" \
  --r_max 5.0 --batch_size 5 --valid_batch_size 10 --max_num_epochs 2000 --lr 0.01 --ema --ema_decay 0.99 --amsgrad \
  --energy_weight 1 --forces_weight 1000 --default_dtype float32 --device cpu --seed 1 --eval_interval 1 \
  --results_dir results --work_dir mace > mace.log 2>&1 || true) &
mlip train benchmarks/threebpa.yaml "data.train=$out/train.h5" "data.valid=$out/valid.h5" "run_dir=$out/facet" \
  "schedule.max_time=${minutes}m" "schedule.max_epochs=null" runtime.num_threads=1 "logging.progress=false" \
  > benchmarks/results/3bpa_facet.log 2>&1
wait
cp "$out/facet/log.csv" benchmarks/results/3bpa_facet.csv
grep -hE "Epoch|Initial" "$out"/mace.log > benchmarks/results/3bpa_mace.log || true
