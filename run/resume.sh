#!/usr/bin/env bash
# Go on with a stopped, failed or died run, in the background, from its newest whole snapshot.
#
#   ./run/resume.sh RUN [--yes] [--foreground] [-- OPTIONS]
#
#   RUN    its name, the beginning of it, its PID or its folder
#   --yes  do not ask

# shellcheck source=run/lib.sh
. "$(dirname "${BASH_SOURCE[0]}")/lib.sh"

if (($# == 0)) || among --help "$@" || among -h "$@"; then
  usage
else
  name="$(daemon tell "$1" folder)"
  script="$(daemon tell "$1" script)"
  train "${script}" --resume "${name}" "${@:2}"
fi
