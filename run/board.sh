#!/usr/bin/env bash
# Show the curves of a run, or of all, with TensorBoard on 127.0.0.1, until Ctrl-C.
#
#   ./run/board.sh [RUN] [--port N] [--png]
#
#   RUN      its name, the beginning of it, its PID or its folder
#   --port   first port to try (default 6006)
#   --png    draw the curves on a page instead, plots.png in the run's folder, and print its path; without RUN a page
#            for each run that has logged a step

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

run="" port=6006 png=no
while (($#)); do
  case "$1" in
    -h | --help) usage && exit ;;
    --port) port="${2:?--port needs a number}" && shift ;;
    --png) png=yes ;;
    -*) die "there is no option $1; see --help" ;;
    *) run="$1" ;;
  esac
  shift
done

source="$(daemon board ${run:+"${run}"})"
if [[ ! "${port}" =~ ^[0-9]{1,5}$ ]] || ((port < 1 || port > 65535)); then die "--port ${port}: must be 1 to 65535"; fi
setup
if [[ "${png}" == yes ]]; then exec "${VENV}/bin/python" -P -m stoker.monitors.plots ${run:+"${run}"}; fi
while (exec 3<>"/dev/tcp/127.0.0.1/${port}") 2>/dev/null; do port=$((port + 1)); done
printf 'http://127.0.0.1:%d/\n' "${port}"
exec "${VENV}/bin/python" -P -m tensorboard.main --logdir "${source}" --host 127.0.0.1 --port "${port}"
