#!/usr/bin/env bash
# Repeat the step of an incident, and print what in it is not finite first.
#
#   ./run/replay.sh INCIDENT [DEVICE]
#
#   INCIDENT   its folder (result/RUN/incidents/step_00000500), or a run: its newest
#   DEVICE     auto, cpu, cuda, cuda:N or mps (default auto)
#
# Ends with 0 where it fails in the same place, with 1 where it does not. The weights, the batch and the random state
# are those kept with the incident; nothing of the run is touched.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground inference.replay "$@"
