#!/usr/bin/env bash
# Prepares .venv for this checkout: `tools/setup.sh [extra ...]`, extras being those of pyproject.toml (dev, peers).
# Runs on a fresh Debian, Ubuntu or macOS (Apple silicon), asks nothing, and costs a fraction of a second when there is
# nothing to do. System packages are only installed on Debian and Ubuntu, as root or with passwordless sudo.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec </dev/null # nothing below may wait for an answer

venv=.venv
python=$venv/bin/python
system=$(uname -s)

say() { printf '==> %s\n' "$*"; }
fail() {
  printf 'setup: %s\n' "$*" >&2
  exit 1
}

as_root() {
  if [ "$(id -u)" = 0 ]; then
    "$@"
  else
    sudo -n "$@"
  fi
}

can_install_packages() {
  command -v apt-get >/dev/null && { [ "$(id -u)" = 0 ] || sudo -n true 2>/dev/null; }
}

# apt_install PACKAGE: installs it where that is allowed; false where it is not or where it fails.
apt_install() {
  can_install_packages || return 1
  say "Installing the system package $1"
  local install=(env DEBIAN_FRONTEND=noninteractive apt-get install -y -q --no-install-recommends
    -o DPkg::Lock::Timeout=60 "$1")
  # A fresh image has no package lists: fetch them when the first try fails.
  as_root "${install[@]}" || { as_root apt-get update -q && as_root "${install[@]}"; }
}

# The first Python that is new enough, and native (a Rosetta Python finds no mlx wheels).
find_python() {
  local candidate
  for candidate in python3 python3.14 python3.13 python3.12 python3.11; do
    if "$candidate" -c 'import platform, sys
ok = sys.version_info >= (3, 11) and (sys.platform != "darwin" or platform.machine() == "arm64")
sys.exit(not ok)' 2>/dev/null; then
      command -v "$candidate"
      return
    fi
  done
  if [ "$system" = Darwin ]; then
    fail "Python 3.11 or newer for Apple silicon is needed; 'brew install python' installs one."
  fi
  fail "Python 3.11 or newer is needed; on Debian 12, Ubuntu 24.04 or newer: apt-get install python3 python3-venv."
}

make_venv() {
  local base version
  base=$(find_python)
  version=$("$base" -c 'import sys; print("%d.%d" % sys.version_info[:2])')
  say "Creating $venv with Python $version ($base)"
  if ! "$base" -c 'import venv; from ensurepip import version' 2>/dev/null; then
    apt_install "python$version-venv" ||
      fail "Python $version cannot create virtual environments here; as root, type: apt-get install python$version-venv"
  fi
  "$base" -m venv --clear "$venv" || fail "$base could not create $venv; the lines above say why."
}

pip_install() {
  "$python" -m pip install --disable-pip-version-check --no-input "$@"
}

# MLX's Linux wheel brings a slow BLAS; mlx_mtp/backend/blas.py says whether there is a fast one to use instead.
find_blas() { "$python" -P mlx_mtp/backend/blas.py; }

prepare_linux() {
  if ! find_blas >/dev/null && ! { apt_install libopenblas0-pthread && find_blas >/dev/null; }; then
    if [ "$(uname -m)" = x86_64 ]; then
      say "No OpenBLAS here and no rights to install it: taking MKL from PyPI (1 GB on disk)"
      pip_install mkl || say "MKL could not be installed"
    fi
  fi
  say "BLAS: $(find_blas || true)"
  if ! command -v g++ >/dev/null && ! apt_install g++; then
    say "No g++ here: MLX runs compiled functions unfused on the CPU, which is slower and works"
  fi
}

"$python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || make_venv

# One stamp for each extra, with what it was made from. A moved checkout needs a new installation: paths are absolute.
made_from="$(cksum <pyproject.toml) $PWD"
missing=()
for extra in base "$@"; do
  [ "$(cat "$venv/installed-$extra" 2>/dev/null)" = "$made_from" ] || missing+=("$extra")
done
[ ${#missing[@]} -gt 0 ] || exit 0

extras=
[ "$system" != Linux ] || extras=cpu
for extra in "${missing[@]}"; do
  [ "$extra" = base ] || extras="${extras:+$extras,}$extra"
  if [ "$extra" = peers ]; then
    # First and by itself, so that the other peers settle for this version.
    say "Installing torch"
    pip_install torch==2.13.0 || fail "pip could not install torch; the lines above say why."
  fi
done
say "Installing mlx-mtp${extras:+ with the extras $extras} into $venv (a few minutes the first time)"
pip_install -e ".${extras:+[$extras]}" || fail "pip could not install mlx-mtp; the lines above say why."
if [ "$system" = Linux ] && [ "${missing[0]}" = base ]; then
  prepare_linux
fi

for extra in "${missing[@]}"; do
  printf '%s\n' "$made_from" >"$venv/installed-$extra"
done
say "Ready"
