#!/usr/bin/env bash
# Makes .venv: torch first, then what constraints.txt pins, then this project (editable, with the native extension).
# Instant when nothing changed.
#
#   PYTHON=python3.12          the interpreter to build on (default: python3, or the newest python3.N >= 3.11)
#   TORCH_SPEC=torch==2.14.0   another torch (default: the pinned one)
#   GENIE_SYSTEM=0             no system-wide changes
#   GENIE_REQUIRE_NATIVE=1     an error where the native extension cannot be built
set -euo pipefail
cd "$(dirname "$0")/.."

DEFAULT_TORCH_SPEC=$(grep -m1 '^torch==' constraints.txt)
TORCH_SPEC=${TORCH_SPEC:-$DEFAULT_TORCH_SPEC}
VENV=.venv
STAMP=$VENV/.setup-stamp
# What the native lanes and their tests are built with, and the browser that tests open pages in, as Debian and Ubuntu
# name it; each is optional.
SYSTEM_PACKAGES=(g++ pkg-config doctest-dev libdpdk-dev clang chromium)

say() { printf 'setup: %s\n' "$*"; }
fail() { printf 'setup: error: %s\n' "$*" >&2; exit 1; }

python_is_new_enough() {
    command -v "$1" >/dev/null 2>&1 && "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.14}; do
        if python_is_new_enough "$candidate"; then echo "$candidate"; return; fi
    done
    fail "no Python >= 3.11 found (tried: ${PYTHON:-python3, python3.11 to python3.14}); install one (Debian, Ubuntu:" \
         "apt-get install python3 python3-venv python3-dev pkg-config) or name it: make setup PYTHON=/path/to/python"
}

# What the environment is made from: when this is what the stamp holds, there is nothing to do. The place counts,
# because neither scripts nor the editable install of a virtual environment can be moved.
fingerprint() {
    { cat constraints.txt pyproject.toml tools/setup.sh; echo "$TORCH_SPEC" "${PYTHON:-}" "$PWD"
      if [ -d native ]; then find native -type f -not -path 'native/tests/*' -not -name '*.pyc' -print0 | sort -z \
          | xargs -0 cat; fi; } | cksum
}

make_venv() {
    local python=$1 log
    if [ -x $VENV/bin/python ] && python_is_new_enough $VENV/bin/python && [ -z "${PYTHON:-}" ] \
        && [ "$($VENV/bin/python -c 'import sys; print(sys.prefix)')" = "$PWD/$VENV" ]; then
        return
    fi
    say "making $VENV with $("$python" --version)"
    log=$(mktemp)
    if ! "$python" -m venv --clear $VENV >"$log" 2>&1; then
        cat "$log" >&2; rm -f "$log"
        fail "$python cannot make a virtual environment. Debian and Ubuntu keep what it needs in packages of its own:" \
             "apt-get install python3-venv python3-dev pkg-config"
    fi
    rm -f "$log"
}

pip_install() {
    "$VENV/bin/python" -m pip install --disable-pip-version-check --no-input --progress-bar off --quiet "$@"
}

missing_packages() {
    local name
    for name in "${SYSTEM_PACKAGES[@]}"; do
        dpkg-query -W -f='${Status}' "$name" 2>/dev/null | grep -q "install ok installed" || echo "$name"
    done
}

# Compilers and libraries: said before anything is changed, and never a reason to stop.
install_system_packages() {
    local missing
    if ! command -v dpkg-query >/dev/null; then
        say "no dpkg here: the native lanes are built with what there is (wanted: ${SYSTEM_PACKAGES[*]})"
        return
    fi
    missing=$(missing_packages | tr '\n' ' ')
    if [ -z "$missing" ]; then
        say "no system-wide changes are needed: everything goes to $VENV"
    elif [ "${GENIE_SYSTEM:-1}" = 0 ]; then
        say "GENIE_SYSTEM=0: no system-wide changes; what needs these is left out: $missing"
    elif [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
        say "not installed, and this user cannot: $missing(apt-get install them for native lanes, dpdk, C++ tests)"
    else
        say "system-wide change: apt-get install $missing(GENIE_SYSTEM=0 leaves the system alone)"
        # The lists may be old or missing: one refresh, and only then.
        # shellcheck disable=SC2086
        DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1 \
            || { apt-get update -qq >/dev/null 2>&1
                 DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null 2>&1; } \
            || say "apt-get failed; what needs these is left out: $missing"
    fi
}

install_everything() {
    local constraints=$VENV/constraints.txt   # what is in force: constraints.txt, with the torch that was asked for
    grep -v '^torch==' constraints.txt >"$constraints"
    say "installing $TORCH_SPEC (the largest download)"
    pip_install -c "$constraints" "$TORCH_SPEC"
    echo "torch==$("$VENV/bin/python" -c 'from importlib.metadata import version; print(version("torch"))')" \
        >>"$constraints"
    say "installing what pyproject.toml names, as constraints.txt pins it, and genie-dynamo itself (editable)"
    pip_install -c "$constraints" "$(grep -m1 '^scikit_build_core==' constraints.txt)" pybind11 cmake ninja
    pip_install -c "$constraints" --no-build-isolation -e '.[solver,demo,test,dev]'
}

main() {
    local wanted python
    wanted=$(fingerprint)
    if [ -x $VENV/bin/genie ] && [ "$(cat $STAMP 2>/dev/null)" = "$wanted" ]; then exit 0; fi
    python=$(find_python)
    make_venv "$python"
    install_system_packages
    install_everything
    $VENV/bin/python -c 'import genie_dynamo' || fail "installed, but genie_dynamo cannot be imported (see above)"
    echo "$wanted" >$STAMP
    say "done: $($VENV/bin/genie --version), torch $($VENV/bin/python -c 'import torch; print(torch.__version__)')"
    $VENV/bin/python -c 'import genie_dynamo._native' 2>/dev/null \
        || say "the native extension is not built: payload takes the lanes of the standard library" \
               "(GENIE_REQUIRE_NATIVE=1 make setup shows why)"
    command -v g++ >/dev/null || say "no g++ found: worker_compiler=\"inductor\" is off (install g++ and python3-dev)"
}

main
