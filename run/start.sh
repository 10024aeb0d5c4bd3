#!/usr/bin/env bash
# Start the script of any stage, such as one of your own, in the background; you may close the terminal.
#
#   ./run/start.sh SCRIPT [OPTIONS]
#
#   SCRIPT         a Python file that declares a stage, see docs/extend.md; wherever it lies
#   OPTIONS        those of the stage: ./run/start.sh SCRIPT --help
#   --foreground   train in this terminal
#
# A script from outside src/training may import what lies beside it, and what PYTHONPATH names.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

if (($# == 0)) || among "$1" --help -h; then
  usage
else
  [[ -f "$1" ]] || die "$1: there is no such script"
  script="$(readlink -f -- "$1")"
  if among --help "${@:2}" || among -h "${@:2}"; then
    prepare_python "${script}"
    exec "$(any_python)" "${flags[@]}" "${script}" --help
  fi
  train "${script}" "${@:2}"
fi
