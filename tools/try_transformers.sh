#!/usr/bin/env bash
# The tests of what is leaned on inside transformers, on releases installed for it beside the environment's own.
# usage: tools/try_transformers.sh [RELEASE ...]   (default: the oldest and newest of each series that is served)
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || set -- '4.48.*' '4.57.*' '5.17.*' '5.*'
beside="$(mktemp -d)"
trap 'rm -rf "$beside"' EXIT
for release in "$@"; do
  pip install --quiet --no-warn-conflicts --target "$beside/$release" "transformers==$release"
  beside_python=(env PYTHONPATH="$beside/$release" OMP_NUM_THREADS=1 python)
  "${beside_python[@]}" -c 'import transformers; print("transformers", transformers.__version__)'
  "${beside_python[@]}" -m pytest -q --noconftest tests/test_transformers_internals.py
done
