#!/usr/bin/env bash
# Delete a run that is not running: its folder, with snapshots and models, and every link to it.
#
#   ./run/delete.sh RUN [--yes]
#
#   RUN    its name, the beginning of it, its PID or its folder
#   --yes  do not ask

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

if among --help "$@" || among -h "$@"; then
  usage
else
  [[ -n "${1:-}" ]] || die "which run? ./run/ps.sh lists them"
  daemon delete "$@"
fi
