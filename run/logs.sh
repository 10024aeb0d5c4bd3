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

log="$(daemon print "${run}" log)"
[[ -f "${log}" ]] || die "${run} has no log yet"

# Print without control characters: what a library wrote may hold commands to the terminal.
plainly() {
  LC_ALL=C sed -u -e 's/\r\(.\)/\n\1/g' -e 's/\xc2[\x80-\x9f]/?/g' -e 's/[\x00-\x08\x0b-\x1f\x7f]/?/g'
}

if [[ "${follow}" == no ]]; then
  plainly <"${log}"
  exit
fi
pid="$(daemon print "${run}" pid)"
tail -n 20 ${pid:+--pid="${pid}" -f} -- "${log}" | plainly
