#!/usr/bin/env bash
# Pass the tests, in an environment made on the first call: bash tests/run.sh [PYTEST ARGUMENTS]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
.ci/venv dev,tensorboard,symmetry

# One thread per process and one process per core: small tensors lose by threads.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1
workers="${TEST_WORKERS:-2}"
exec .venv/bin/python -m pytest -n "$workers" --dist loadfile -q "$@"
