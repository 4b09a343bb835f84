#!/usr/bin/env bash
# Name what a build of .venv would miss, before anything starts. Usage: tools/check_system.sh PYTHON
set -u
python=${1:-python3}
missing=()
command -v "$python" >/dev/null || { echo "error: $python not found; install the Debian package python3" >&2; exit 2; }
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "error: $("$python" --version) is too old; Python 3.10 or newer is needed (make PYTHON=python3.11 ...)" >&2
    exit 2
}
"$python" -c 'import ensurepip, venv' 2>/dev/null || missing+=(python3-venv)
"$python" -c 'import os, sys, sysconfig; sys.exit(not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")))' \
    || missing+=(python3-dev)
command -v cc >/dev/null || missing+=(gcc)
if [ ${#missing[@]} -gt 0 ]; then
    echo "error: missing Debian packages: ${missing[*]}; install them with: apt-get install ${missing[*]}" >&2
    exit 2
fi
