#!/usr/bin/env bash
# Makes dist/: a source distribution, and from it wheels for every Python from 3.11 on and the torch of PYTHON: dist/cpu
# and, where nvcc of torch's CUDA version is, dist/cuNNN, for Linux with glibc 2.28 and newer. Then installs the one for
# CPUs into an empty environment of each Python of PYTHONS, without a compiler, and tests it there.
#
#     PYTHON=python scripts/wheels.sh      PYTHON has torch, requirements-wheels.txt and what builds
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=$(realpath -s "$(command -v "${PYTHON:-python}")")
export PATH="$(dirname "$PYTHON"):$PATH"
platform=manylinux_2_28_$(uname -m)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

rm -rf dist
"$PYTHON" -m build --sdist --no-isolation --outdir dist .
tar -xzf dist/*.tar.gz -C "$work"
cuda=$("$PYTHON" - <<'CODE'
import runpy, setuptools, torch
setuptools.setup = lambda **_: None
setup = runpy.run_path("setup.py")
print("cu" + torch.version.cuda.replace(".", "") if setup["decide_cuda"](torch)[0] else "")
CODE
)
for kind in cpu $cuda; do
    [ "$kind" = cpu ] && export BK_CUDA=0 || export BK_CUDA=1
    # The default architectures: the one of a developer's build is not for others.
    (cd "$work"/bioplaus_kernels-* && env -u TORCH_CUDA_ARCH_LIST "$PYTHON" -m build --wheel --no-isolation --outdir "$work/$kind" .)
    "$PYTHON" -m auditwheel repair --plat "$platform" --wheel-dir "dist/$kind" \
        --exclude 'libtorch*' --exclude 'libc10*' --exclude 'libcudart*' "$work/$kind"/*.whl
done
"$PYTHON" -m twine check --strict dist/*.tar.gz dist/*/*.whl

# A shell's tools and no compiler.
mkdir "$work/bin"
for tool in env uname readelf; do ln -s "$(command -v $tool)" "$work/bin"; done
for python in ${PYTHONS:-python3.11 python3.12 python3.13}; do
    if ! "$python" -c "" 2>/dev/null; then
        echo "wheels: $python does not run, not tested"
        continue
    fi
    empty="$work/$python"
    "$python" -m venv "$empty"
    PATH="$work/bin" "$empty/bin/python" -m pip install --quiet dist/cpu/*.whl pytest pytest-benchmark expecttest numpy
    # Of the sources' folder the tests, and not the package.
    (cd "$work"/bioplaus_kernels-* && export PATH="$work/bin" PYTHONSAFEPATH=1
        "$empty/bin/python" -c "
from bioplaus_kernels.backends import native
assert native.library is not None, native.reason"
        "$empty/bin/python" -m pytest -q -p no:cacheprovider -m "not slow and not exhaustive" \
            python_tests/test_{import,layers,feedback_mm,pack_signs}.py)
    echo "wheels: $python passed"
    rm -rf "$empty"
done
