#!/bin/sh
# Makes .venv from requirements.txt; does nothing when .venv was made from these very pins, here.
# Whatever is missing on this machine is said in one sentence.
set -eu
cd "$(dirname "$0")/.."

fail() {
    echo "obclip: $*" >&2
    exit 1
}

pins() { # what .venv depends on; pwd because a virtual environment cannot be moved
    pwd
    cat requirements.txt
}

if .venv/bin/python -c '' 2>/dev/null && pins | cmp -s - .venv/pins; then
    exit 0
fi

python=""
seen=""
for candidate in ${PYTHON:-python3.11 python3 python}; do
    version=$("$candidate" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || continue
    seen="$seen, $candidate is $version"
    if [ "$version" = 3.11 ]; then
        python=$candidate
        break
    fi
done
[ -n "$python" ] || fail "Python 3.11 is needed and was not found${seen:+ (${seen#, })}; install it, or name it: make env PYTHON=/path/to/python3.11"
"$python" -c 'import ensurepip, venv' 2>/dev/null ||
    fail "$python cannot make virtual environments; install its venv module (Debian and Ubuntu: apt install python3.11-venv)"

need=4 # GB
free=$(df -Pk . | awk 'NR == 2 { printf "%d", $4 / 1048576 }')
[ "$free" -ge "$need" ] || fail "$need GB of free disk are needed for the environment and $free GB are free in $(pwd); make room or move the project"

echo "Installing the pinned environment into .venv: some minutes, once. Log: .venv/install.log"
rm -rf .venv
"$python" -m venv .venv || fail "$python could not make .venv in $(pwd); is the folder writable?"
log=.venv/install.log
if ! {
    .venv/bin/python -m pip install --disable-pip-version-check -r requirements.txt &&
        .venv/bin/python -m pip install --disable-pip-version-check --no-deps --no-build-isolation -e .
} >"$log" 2>&1; then
    if grep -qi 'no space left' "$log"; then
        fail "the disk is full; $need GB are needed for the environment"
    elif grep -qiE 'connection|name resolution|timed out|timeout|proxy|unreachable' "$log"; then
        fail "the package index cannot be reached; check the network (or pip's index and proxy settings) and run make again"
    fi
    tail -n 15 "$log" >&2
    fail "the installation failed; the lines above are the end of $log"
fi
pins >.venv/pins
