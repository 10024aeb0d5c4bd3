#!/usr/bin/env bash
# Measure on one NVIDIA GPU, in at most eight minutes: speed of training, cost of monitors and snapshots, determinism and
# recovery; print a page of figures and write it to a file, whose path is the last line.
#
#   ./benchmarks/gpu.sh [--device DEVICE] [--quick] [--output FILE] [--only WORD]
#
#   --device   auto, which is the GPU; cuda:N; cpu tries this script out with tiny models (default auto)
#   --quick    compile nothing
#   --output   the page, in Markdown (default result/gpu_<time>.md)
#   --only     the sections whose titles contain this word; may be given several times
#
# Exits with 1 if a section has failed; the other sections are measured all the same. Setting up .venv, which happens
# first where it is needed, takes its time beside the eight minutes.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/../run/lib.sh" || exit

if among --help "$@" || among -h "$@"; then
  usage
  exit
fi
setup
exec "${VENV}/bin/python" "${ROOT}/benchmarks/gpu.py" "$@"
