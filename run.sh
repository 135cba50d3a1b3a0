#!/usr/bin/env bash
# ./run.sh FILE.py ARGS...   or   ./run.sh -m MODULE ARGS...
# On first use makes .venv with the project in it; sets nnU-Net's variables where they are unset; then runs python.
#   NNSLIM_VENV    folder of the environment            (default: .venv beside this file)
#   PYTHON         interpreter for a new environment    (default: python3, else python3.12, 3.11, 3.13, 3.10)
#   NNSLIM_EXTRAS  extras to install                    (default: ts,example,test)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
venv=${NNSLIM_VENV:-$root/.venv}
extras=${NNSLIM_EXTRAS:-ts,example,test}

fits() { "$1" -c 'import sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null; }

find_python() {
    local candidate
    for candidate in ${PYTHON:-python3 python3.12 python3.11 python3.13 python3.10}; do
        if fits "$candidate"; then echo "$candidate"; return; fi
    done
    echo "run.sh: no Python 3.10 to 3.13 with the venv module found; install one or set PYTHON" >&2
    exit 2
}

install() {
    local python
    if [ ! -x "$venv/bin/python" ]; then
        python=$(find_python)
        echo "run.sh: making $venv with $("$python" --version)" >&2
        "$python" -m venv "$venv"
    fi
    echo "run.sh: installing nnslim[$extras] (minutes on a slow network: torch is large)" >&2
    # uv resolves and downloads many times faster than pip; pip does the same job where uv cannot be had. Bytecode, which
    # pip always makes: with PYTHONDONTWRITEBYTECODE set, each process would spend half a minute compiling its imports.
    if [ -x "$venv/bin/uv" ] || "$venv/bin/python" -m pip install --quiet --disable-pip-version-check uv 2>/dev/null; then
        "$venv/bin/uv" pip install --quiet --compile-bytecode --python "$venv/bin/python" -e "$root[$extras]" >&2
    else
        "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -e "$root[$extras]" >&2
    fi
}

# The stamp holds what the environment was made from, so that a changed requirement or kernel is installed at the next start.
wanted="$extras $(cat "$root"/{pyproject.toml,requirements.txt,hatch_build.py,nnslim/*/*.c} | cksum)"
if [ ! -x "$venv/bin/python" ] || [ "$(cat "$venv/.nnslim-installed" 2>/dev/null)" != "$wanted" ]; then
    install
    echo "$wanted" > "$venv/.nnslim-installed"
fi

export nnUNet_raw=${nnUNet_raw:-$root/.nnunet/raw}
export nnUNet_preprocessed=${nnUNet_preprocessed:-$root/.nnunet/preprocessed}
export nnUNet_results=${nnUNet_results:-$root/.nnunet/results}
mkdir -p "$nnUNet_raw" "$nnUNet_preprocessed" "$nnUNet_results" 2>/dev/null || true
export PATH="$venv/bin:$PATH"
exec "$venv/bin/python" "$@"
