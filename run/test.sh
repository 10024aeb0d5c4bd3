#!/usr/bin/env bash
# Set up what is missing, then check everything: lint, types, shell, tests.
#
#   ./run/test.sh [--all] [--newest] [pytest arguments]
#
#   --all      the slow proofs too
#   --newest   with the newest packages that setup.cfg admits instead of those of run/lock/; they are installed in
#              .venv-newest
#
# The tests run side by side, three on two cores. With pytest arguments only tests run, one after the other, unless
# those say -n: ./run/test.sh tests/training -k resume

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

MOST_AT_ONCE=8 # each has a torch of its own in memory

arguments=() all=()
for option in "$@"; do
  case "${option}" in
    -h | --help) usage && exit ;;
    --newest)
      export STOKER_VERSIONS=newest STOKER_VENV="${ROOT}/.venv-newest" # for the scripts that the tests call, too
      VENV="${STOKER_VENV}"
      ;;
    --all) all=(-m "slow or not slow") ;;
    *) arguments+=("${option}") ;;
  esac
done

setup dev
cd "${ROOT}"
if ((${#arguments[@]} == 0)); then
  at_once="$(($(nproc) * 3 / 2))" # with one for each core, the cores wait for a third of the time
  arguments=(-n "$((at_once < MOST_AT_ONCE ? at_once : MOST_AT_ONCE))" --dist worksteal)
  "${VENV}/bin/ruff" check --quiet src tests benchmarks
  "${VENV}/bin/python" -m mypy -p stoker
  "${VENV}/bin/python" -m mypy benchmarks
  "${VENV}/bin/shellcheck" --external-sources run/*.sh benchmarks/*.sh .ci/run
  printf 'lint, types and shell are clean\n'
fi
exec "${VENV}/bin/python" -m pytest "${all[@]}" "${arguments[@]}"
