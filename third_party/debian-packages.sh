#!/usr/bin/env bash
# Makes sure that the Debian packages for one purpose are there, and installs those that are not:
#   third_party/debian-packages.sh setup|cpp [PYTHON]
# setup: what the Python environment and the extension need. cpp: what the CMake build needs.
set -euo pipefail

purpose=${1:?"usage: debian-packages.sh setup|cpp [PYTHON]"}
python=${2:-python3}
missing=()

need() {  # PACKAGE COMMAND...: the package is missing when the command fails
  local package=$1
  shift
  "$@" >/dev/null 2>&1 || missing+=("$package")
}
has_header() { g++ -x c++ -fsyntax-only -include "$1" /dev/null; }

need g++ g++ --version
case $purpose in
  setup)
    need python3 "$python" --version
    need python3-venv "$python" -c 'import ensurepip, venv'
    need python3-dev "$python" -c \
      'import os, sysconfig; os.stat(sysconfig.get_path("include") + "/Python.h")'
    ;;
  cpp)
    need cmake cmake --version
    need make make --version
    need libgtest-dev has_header gtest/gtest.h
    need libgmock-dev has_header gmock/gmock.h
    need libbenchmark-dev has_header benchmark/benchmark.h
    ;;
  *)
    echo "debian-packages.sh: unknown purpose '$purpose', expected setup or cpp." >&2
    exit 2
    ;;
esac

if ((${#missing[@]} == 0)); then exit 0; fi
if ! command -v apt-get >/dev/null || (($(id -u) != 0)); then
  echo "Packages are missing: ${missing[*]}. On Debian and Ubuntu install them with" >&2
  echo "    sudo apt-get install ${missing[*]}" >&2
  exit 1
fi
echo "Installing the Debian packages ${missing[*]}"
apt-get update -qq || echo "apt-get update failed; trying with the package lists at hand." >&2
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}" >/dev/null
