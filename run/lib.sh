# Shared by the scripts of run/; sourced, never executed.
#
# The shell owns processes: it starts, follows and stops. `python -m stoker.daemon` answers what a run's files are called
# and whether it lives; `python -m stoker.environment` sets up .venv. Neither needs anything installed.
# shellcheck shell=bash

set -euo pipefail

# Without this, the next file that is opened would take the place of a closed standard stream and receive its output.
[[ -e /proc/$$/fd/0 ]] || exec </dev/null
[[ -e /proc/$$/fd/1 ]] || exec >/dev/null
[[ -e /proc/$$/fd/2 ]] || exec 2>/dev/null

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${STOKER_VENV:-${ROOT}/.venv}"
USERS_PYTHONPATH="${PYTHONPATH:-}"
export PYTHONPATH="${ROOT}/run/python" # where the package `stoker` is, which is src/
export STOKER_SCRIPT="${0##*/}"

die() {
  printf '%s: %s\n' "${0##*/}" "$*" >&2
  exit 2
}

[[ "$(uname -s)" == Linux ]] || die "runs on Linux only (on Windows: inside WSL2), this is $(uname -s)"

# Print the comment at the head of the script that was called.
usage() {
  sed -n '2,/^$/s/^# \{0,1\}//p' "$0"
}

# Whether one of the words after the first is the first.  Arguments: WORD, WORDS...
among() {
  local wanted="$1" word
  shift
  for word in "$@"; do [[ "${word}" == "${wanted}" ]] && return 0; done
  return 1
}

# The Python that answers before anything is set up: that of .venv, or the system's. The bounds are those of setup.cfg.
any_python() {
  local python found=none
  for python in "${VENV}/bin/python" python3 python3.1{4,3,2,1}; do
    if "${python}" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
      printf '%s\n' "${python}"
      return
    fi
  done
  ! command -v python3 >/dev/null || found="$(python3 --version 2>&1 | head -n 1)"
  die "needs Python 3.11 to 3.14, as python3 or python3.14 and so on; found: ${found}"
}

# Make .venv hold the packages of run/lock/, or the newest that setup.cfg admits (STOKER_VERSIONS=newest).
# Argument: an extra, or nothing.
setup() {
  local extra="${1:-}" versions="${STOKER_VERSIONS:-locked}" digest stamp python
  among "${versions}" locked newest || die "STOKER_VERSIONS must be locked or newest, is ${versions}"
  digest="$(cat "${ROOT}/setup.cfg" "${ROOT}"/run/lock/*.txt | sha256sum | cut -c1-16)"
  stamp="${VENV}/.ready-${versions}-${digest}${extra:+-${extra}}"
  [[ -e "${stamp}" && -x "${VENV}/bin/python" ]] && return
  python="$(any_python)"
  "${python}" -P -m stoker.environment "${stamp}" ${extra:+"${extra}"}
}

# Set `flags`, those of Python for a stage's script: ours imports nothing that lies around, one from elsewhere what its
# author expects, which lies beside it or in the caller's PYTHONPATH.  Argument: SCRIPT
prepare_python() {
  flags=(-P)
  if [[ "$1" != "${ROOT}/src/training/"* ]]; then
    flags=()
    PYTHONPATH="${PYTHONPATH}${USERS_PYTHONPATH:+:${USERS_PYTHONPATH}}"
  fi
}

# Start a stage's script, in the background unless --foreground is given.  Arguments: SCRIPT, by its name in src/training
# or its absolute path, then its options.  Returns when training has begun, or has failed with the reason.
train() {
  local script="$1" python flags
  [[ "${script}" == /* ]] || script="${ROOT}/src/training/${script}"
  prepare_python "${script}"
  shift
  local options=() foreground=no option
  for option in "$@"; do
    case "${option}" in
      --foreground) foreground=yes ;;
      --no_yes | --no-yes) ;; # the default; --yes is added once the question was asked
      --) ;;
      *) options+=("${option}") ;;
    esac
  done
  if among --help "${options[@]}" || among -h "${options[@]}"; then
    usage
    return
  fi
  python="$(any_python)"
  if among --print_config "${options[@]}" || among --info "${options[@]}" || among --explain "${options[@]}"; then
    exec "${python}" "${flags[@]}" "${script}" "${options[@]}"
  fi
  "${python}" "${flags[@]}" "${script}" --check "${options[@]}" # mistakes and questions belong to this terminal
  setup
  python="${VENV}/bin/python"
  if [[ "${foreground}" == yes ]] || among --eval_only "${options[@]}"; then
    exec "${python}" "${flags[@]}" "${script}" "${options[@]}" --yes
  fi
  start_in_background "${python}" "${flags[@]}" "${script}" "${options[@]}"
}

# Arguments: PYTHON, its flags, SCRIPT, OPTIONS...
start_in_background() {
  local python="$1" output pid code=0
  shift
  output="$(mktemp "${TMPDIR:-/tmp}/stoker.XXXXXX" 2>/dev/null || mktemp "${ROOT}/result/.start.XXXXXX" 2>/dev/null)" ||
    die "no file can be written in ${TMPDIR:-/tmp} nor in ${ROOT}/result; name a folder in TMPDIR"
  # setsid: a session of its own, so that no terminal's end reaches it; nohup alone is undone by any SIGHUP handler.
  STOKER_BACKGROUND=1 nohup setsid "${python}" "$@" --yes </dev/null >"${output}" 2>&1 &
  pid=$!
  if ! "${python}" -P -m stoker.daemon wait "${pid}"; then # it has ended already
    wait "${pid}" || code=$?
    cat "${output}" >&2
    ((code == 0 || code == 2)) || printf '%s: the run ended with exit code %d\n' "${0##*/}" "${code}" >&2
  fi
  rm -f "${output}"
  return "${code}"
}

# Run a module of ours in this terminal; mistakes are reported before anything is set up.  Arguments: MODULE, then its own.
in_foreground() {
  local module="$1" python
  shift
  if among --help "$@" || among -h "$@"; then
    usage
  else
    python="$(any_python)"
    "${python}" -P -m "stoker.${module}" --check "$@"
    setup
    exec "${VENV}/bin/python" -P -m "stoker.${module}" "$@"
  fi
}

# Ask about runs.  Arguments: those of `python -m stoker.daemon`.
daemon() {
  local python
  python="$(any_python)"
  "${python}" -P -m stoker.daemon "$@"
}
