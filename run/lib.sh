# Shared by the scripts of run/; sourced, never executed.
#
# The shell owns processes: it sets up .venv, starts, follows and stops. What a run's files are called and
# whether a run lives is asked of `python -m daemon`, which needs nothing installed.
# shellcheck shell=bash

set -euo pipefail

ROOT="$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)"
VENV="${ROOT}/.venv"
export PYTHONPATH="${ROOT}/src"
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

# The Python that answers before anything is set up: that of .venv, or the system's.
any_python() {
  local python
  for python in "${VENV}/bin/python" python3; do
    if "${python}" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
      printf '%s\n' "${python}"
      return
    fi
  done
  die "needs Python 3.11 or newer as python3; found: $(python3 --version 2>&1 || true)"
}

# Make .venv hold what setup.cfg asks for.  Argument: an extra, or nothing.
# Two at the same time: the second waits for the first and finds the work done.
setup() {
  local extra="${1:-}" digest stamp
  digest="$(sha256sum <"${ROOT}/setup.cfg" | cut -c1-16)"
  stamp="${VENV}/.ready${extra:+-${extra}}-${digest}"
  [[ -e "${stamp}" ]] && return
  (
    flock 9
    [[ -e "${stamp}" ]] && exit
    printf 'Setting up %s (once; a minute or a few)\n' "${VENV}" >&2
    if ! "${VENV}/bin/python" -m pip --version >/dev/null 2>&1; then
      rm -rf "${VENV}" # half made, or its Python is gone
      python="$(any_python)"
      "${python}" -m venv "${VENV}" >&2 || die "python3 cannot make a virtual environment; on Debian: apt install python3-venv"
    fi
    "${VENV}/bin/python" -m pip install --disable-pip-version-check --editable "${ROOT}${extra:+[${extra}]}" >&2 ||
      die "set-up failed, see above; the same command tries again"
    rm -f "${VENV}"/.ready-* # of older versions of setup.cfg
    touch "${stamp}" "${VENV}/.ready-${digest}" # an extra brings all the rest with it
  ) 9<"${ROOT}/setup.cfg"
}

# Start a stage's script, in the background unless --foreground is given.  Arguments: SCRIPT, then its options.
# Returns when training has begun, or has failed with the reason.
train() {
  local script="${ROOT}/src/training/$1" python
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
    exec "${python}" -P "${script}" "${options[@]}"
  fi
  "${python}" -P "${script}" --check "${options[@]}" # mistakes and questions belong to this terminal
  setup
  python="${VENV}/bin/python"
  if [[ "${foreground}" == yes ]] || among --eval_only "${options[@]}"; then
    exec "${python}" -P "${script}" "${options[@]}" --yes
  fi
  start_in_background "${python}" "${script}" "${options[@]}"
}

# Arguments: PYTHON, SCRIPT, OPTIONS...
start_in_background() {
  local python="$1" output pid code=0
  shift
  output="$(mktemp "${TMPDIR:-/tmp}/stoker.XXXXXX" 2>/dev/null || mktemp "${ROOT}/result/.start.XXXXXX")"
  # setsid: a session of its own, so that no terminal's end reaches it; nohup alone is undone by any SIGHUP handler.
  STOKER_BACKGROUND=1 nohup setsid "${python}" -P "$@" --yes </dev/null >"${output}" 2>&1 &
  pid=$!
  if ! "${python}" -P -m daemon wait "${pid}"; then # it has ended already
    wait "${pid}" || code=$?
    cat "${output}" >&2
    ((code == 0 || code == 2)) || printf '%s: the run ended with exit code %d\n' "${0##*/}" "${code}" >&2
  fi
  rm -f "${output}"
  return "${code}"
}

# Run a module of src/ in this terminal; mistakes are told before anything is set up.  Arguments: MODULE, then its own.
in_foreground() {
  local module="$1"
  shift
  if (($# == 0)) || among --help "$@" || among -h "$@"; then
    usage
  else
    "$(any_python)" -P -m "${module}" --check "$@"
    setup
    exec "${VENV}/bin/python" -P -m "${module}" "$@"
  fi
}

# Ask about runs.  Arguments: those of `python -m daemon`.
daemon() {
  "$(any_python)" -P -m daemon "$@"
}
