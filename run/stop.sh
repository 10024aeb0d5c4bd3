#!/usr/bin/env bash
# Let a run save and stop, and wait until it has.  (kill PID does the same without waiting.)
#
#   ./run/stop.sh RUN [--seconds N]
#
#   RUN         its name, the beginning of it, its PID or its folder
#   --seconds   how long to wait for it (default 300)

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

if among --help "$@" || among -h "$@"; then
  usage
else
  [[ -n "${1:-}" ]] || die "which run? ./run/ps.sh lists them"
  daemon stop "$@"
fi
