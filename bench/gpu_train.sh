#!/bin/sh
# Trains the 6 x 256 student on this machine's GPU for as long as a call may last.
#
#   bench/gpu_train.sh OUT --teacher FOLDER --text FILE... [--heldout FILE] [--start OUT_OF_ANOTHER_CALL]
#                      [--stage1 PIECES] [--stage2 PIECES] [--minutes M] [--dry-run]
#
# Nothing is downloaded; what Python needs is what bench/gpu_check.sh needs. The job is one of
# `mvbert distill`: it times its first steps and trains the share of the pieces that M minutes (default 9)
# have room for. OUT gets at most eight files below 16 MiB: the student as student.tar.00, .01, ...,
# their SHA-256, both logs, the report and the output. A later call continues them with --start.
# --dry-run trains a toy, on a CPU too.
set -u
root=$(cd "$(dirname "$0")/.." && pwd)
exec "${PYTHON:-python3}" -u "$root/bench/gpu_train.py" "$@"
