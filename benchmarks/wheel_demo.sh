#!/usr/bin/env bash
# Claim: the built wheel, installed elsewhere and alone, runs the demo.
#   benchmarks/wheel_demo.sh [FOLDER]      FOLDER (default: a temporary one) keeps the environment and the demo's files
# Builds the wheel, installs it with its dependencies into an environment of its own, and runs the demo from an empty
# folder; prints the seconds of each. Installing needs the network, the demo does not.
set -eu
project=$(cd "$(dirname "$0")/.." && pwd)
folder=${1:-$(mktemp -d)}
mkdir -p "$folder/elsewhere"
folder=$(cd "$folder" && pwd)

timed() { local what=$1 start=$SECONDS; shift; "$@"; echo "$what: $((SECONDS - start)) s"; }

make -s -C "$project" venv
cd "$project"
timed "wheel" "$project/.venv/bin/python" -m hatchling build -t wheel -d "$folder/wheel"
python3 -m venv "$folder/venv"
timed "installation" "$folder/venv/bin/python" -m pip install --quiet --disable-pip-version-check \
  -c "$project/constraints.txt" "$(ls "$folder"/wheel/*.whl)[fast]"
cd "$folder/elsewhere"
timed "demo" "$folder/venv/bin/sparse-interp" demo --out demo
ls -l demo
