#!/usr/bin/env bash
# Ask a running trainer for something; it answers in its log after the step in hand.
#
#   ./run/ask.sh RUN snapshot|trace
#
#   RUN        its name, the beginning of it, its PID or its folder
#   snapshot   take a snapshot now
#   trace      write a profiler's trace of the next three steps to the run's folder

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

if among --help "$@" || among -h "$@"; then
  usage
else
  [[ -n "${1:-}" ]] || die "which run? ./run/ps.sh lists them"
  [[ -n "${2:-}" ]] || die "what for? snapshot or trace"
  daemon ask "$@"
fi
