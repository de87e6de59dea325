#!/usr/bin/env bash
# Makes what saves scripts/gpu_check.sh its first minutes on a machine with a GPU, on one without: the native module and
# a filled Triton cache, in build/gpu, for an H100 or H200, Python 3.12 and torch 2.11.
#
#     scripts/gpu_prepare.sh        PYTHON chooses an environment that has torch; else one is made in build/gpu-venv.
#                                   TORCH_CUDA_ARCH_LIST is the module's (default 9.0).
set -euo pipefail
cd "$(dirname "$0")/.."
if [ -z "${PYTHON:-}" ]; then
    PYTHON=build/gpu-venv/bin/python
    if [ ! -x "$PYTHON" ]; then
        base=$(ls -d "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.12*/bin/python 2>/dev/null | tail -n 1)
        "${base:-python3.12}" -m venv build/gpu-venv
        "$PYTHON" -m pip install --quiet torch==2.11.0 torchvision==0.26.0 numpy==2.5.2 setuptools cmake ninja \
            pytest pytest-benchmark pytest-timeout pytest-xdist scikit-learn matplotlib tabulate tqdm
    fi
fi
# Where gpu_check.sh has it.
export TRITON_CACHE_DIR=/tmp/bioplaus_kernels-triton
export TORCH_CUDA_ARCH_LIST="${TORCH_CUDA_ARCH_LIST:-9.0}"

rm -rf build/gpu "$TRITON_CACHE_DIR"
mkdir -p build/gpu
PATH="$(dirname "$PYTHON"):$PATH" "$PYTHON" setup.py build_ext --inplace
cp bioplaus_kernels/_C.*so build/gpu
"$PYTHON" -c 'from bench.gpu_check import fingerprint; print(fingerprint(), end="")' > build/gpu/sources
git describe --always --dirty --abbrev=12 > build/gpu/commit 2>/dev/null || rm -f build/gpu/commit

# What Triton's launchers are linked against, where there is no driver.
stub=build/gpu-stub
mkdir -p "$stub"
printf 'void %s(void) {}\n' cuCtxGetCurrent cuCtxSetCurrent cuDeviceGet cuDevicePrimaryCtxRetain \
    cuFuncSetAttribute cuGetErrorString cuPointerGetAttribute \
    | cc -shared -x c -Wl,-soname,libcuda.so.1 -o "$stub/libcuda.so.1" -
ln -sf libcuda.so.1 "$stub/libcuda.so"
export TRITON_LIBCUDA_PATH="$PWD/$stub" LD_LIBRARY_PATH="$PWD/$stub${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"

"$PYTHON" -m bench.gpu_prepare
# The tests' own launches; what they compare is no result, and they fail.
OMP_NUM_THREADS=1 "$PYTHON" -m pytest -q -p bench.gpu_pretend -p no:cacheprovider -n "$(nproc)" -m gpu --tb=no \
    python_tests/test_triton*.py | tail -n 1 || true
# A launch reads no more of it.
find "$TRITON_CACHE_DIR" -type f ! -name '*.json' ! -name '*.cubin' ! -name '*.so' -delete
tar -C "$TRITON_CACHE_DIR" -czf build/gpu/triton.tar.gz .
du -sm --apparent-size build/gpu
