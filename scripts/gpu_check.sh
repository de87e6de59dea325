#!/usr/bin/env bash
# Proves and measures everything on a machine with an NVIDIA GPU, most worth first, and prints a verdict; needs no
# network. See bench/gpu_check.py for the stages and the environment: BUDGET, OUT, STATE.
#
#     scripts/gpu_check.sh [STAGE...]        PYTHON=python3.12 chooses another Python
set -euo pipefail
cd "$(dirname "$0")/.."
# Triton finds a cache that was filled elsewhere only under the path it had there.
export TRITON_CACHE_DIR="${TRITON_CACHE_DIR:-/tmp/bioplaus_kernels-triton}"
export OMP_WAIT_POLICY="${OMP_WAIT_POLICY:-PASSIVE}"
if [ -z "${BIOPLAUS_COMMIT:-}" ]; then
    BIOPLAUS_COMMIT=$(git describe --always --dirty --abbrev=12 2>/dev/null || cat build/gpu/commit 2>/dev/null || true)
fi
export BIOPLAUS_COMMIT
exec "${PYTHON:-python3}" -m bench.gpu_check "$@"
