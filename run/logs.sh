#!/usr/bin/env bash
# Print a run's log.
#
#   ./run/logs.sh RUN [-f]
#
#   RUN   its name, the beginning of it, its PID or its folder
#   -f    the last lines, then what comes, until the run ends

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

run="" follow=no
for option in "$@"; do
  case "${option}" in
    -h | --help) usage && exit ;;
    -f | --follow) follow=yes ;;
    -*) die "there is no option ${option}; see --help" ;;
    *) run="${option}" ;;
  esac
done
[[ -n "${run}" ]] || die "which run? ./run/ps.sh lists them"

log="$(daemon tell "${run}" log)"
[[ -e "${log}" ]] || die "${run} has no log yet"
if [[ "${follow}" == no ]]; then
  exec cat "${log}"
fi
pid="$(daemon tell "${run}" pid)"
exec tail -n 20 ${pid:+--pid="${pid}" -f} "${log}"
