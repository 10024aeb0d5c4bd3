#!/usr/bin/env bash
# List the runs: state, PID, step, loss, best, speed, time left, age of the last sign of life.
#
#   ./run/ps.sh [RUN] [--watch] [--json]
#
#   --watch   again every two seconds
#   --json    one JSON object a line

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

if among --help "$@" || among -h "$@"; then
  usage
else
  daemon ps "$@"
fi
