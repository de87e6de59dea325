#!/bin/sh
# Installs what the set-up needs from Debian or Ubuntu and this machine lacks: Python's venv module and headers and a
# C++ compiler. Says what it installs; says nothing where nothing is missing. Further packages are named as arguments.
#
#     scripts/install_debian_packages.sh [PACKAGE...]        PYTHON=python3.12 chooses another Python
set -eu
python=${PYTHON:-python3}

missing() {
    "$python" -c 'import ensurepip, venv' 2>/dev/null || echo python3-venv
    "$python" -c 'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")' 2>/dev/null || echo python3-dev
    command -v "${CXX:-c++}" >/dev/null || echo g++
    for package in "$@"; do
        dpkg-query --show --showformat='${db:Status-Status}' "$package" 2>/dev/null | grep -qx installed || echo "$package"
    done
}

fail() {
    echo "install_debian_packages.sh: $1" >&2
    exit 1
}

command -v "$python" >/dev/null || fail "there is no $python; install Python 3.11 or newer, or set PYTHON to one"
packages=$(missing "$@" | tr '\n' ' ')
packages=${packages% }
[ -n "$packages" ] || exit 0

command="apt-get install --yes --no-install-recommends $packages"
if ! command -v apt-get >/dev/null; then
    fail "missing on this machine, by Debian's names: $packages; install them with its package manager"
elif [ "$(id -u)" = 0 ]; then
    sudo=
elif sudo -n true 2>/dev/null; then
    sudo=sudo
else
    fail "missing: $packages; run: sudo $command"
fi

echo "Installing Debian packages: $packages"
# A new machine has no package lists, an old one stale ones.
$sudo apt-get update --quiet
$sudo env DEBIAN_FRONTEND=noninteractive $command --quiet
packages=$(missing "$@" | tr '\n' ' ')
[ -z "$packages" ] || fail "still missing for $("$python" -V) after installing: $packages; try PYTHON=/usr/bin/python3"
