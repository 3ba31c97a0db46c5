#!/bin/sh
# Reports how mvbert does on this machine's GPU: builds, tests, checks memory, benches, trains.
#
#   bench/gpu_check.sh [OUT] [--dry-run] [--text FILE] [--vocab FILE] [--minutes M] [--only PART...]
#
# Nothing is downloaded. Whatever Python is `python3` (or $PYTHON) must have torch, triton, numpy,
# safetensors, tyro, rich, pybind11, cmake, ninja and pytest; transformers, liger-kernel and
# cut-cross-entropy are used if installed. --text is the text to train on (default:
# documentation strings of installed packages), --vocab the teacher's vocab.txt (default: learned).
# MVBERT_COMMIT names the commit in the results where the tree came without .git.
# At most nine minutes: every part has a time limit, a part that fails or is late is reported and
# the others still run; skipped parts are listed, and --only runs them later. OUT (default:
# bench/results/scratch/gpu) gets at most eight files; the table printed last is at the end of
# log.txt, and in summary.json. --dry-run runs every part at toy size, on a
# CPU too, and has five times the limits.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
exec "${PYTHON:-python3}" -u "$root/bench/gpu_check.py" "$@"
