#!/usr/bin/env bash
# Resume a stopped, failed or died run, in the background, from its newest whole snapshot.
#
#   ./run/resume.sh RUN [--yes] [--foreground] [-- OPTIONS]
#
#   RUN    its name, the beginning of it, its PID, its folder, or the folder of one of its snapshots
#   --yes  do not ask

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

if among --help "$@" || among -h "$@"; then
  usage
else
  [[ -n "${1:-}" ]] || die "which run? ./run/ps.sh lists them"
  run="" options=()
  for option in "$@"; do
    if [[ -z "${run}" && "${option}" != -* ]]; then run="${option}"; else options+=("${option}"); fi
  done
  place="$(daemon print "${run}" resume)"
  script="$(daemon print "${run}" script)"
  train "${script}" --resume "${place}" "${options[@]}"
fi
