#!/usr/bin/env bash
# Evaluate a run's model on the run's own data, or on others; nothing is written.
#
#   ./run/evaluate.sh RUN [--split test] [-- OPTIONS]
#   ./run/evaluate.sh RUN --dataset OTHER --split all --confusions
#   ./run/evaluate.sh RUN --lm LM_RUN [--split test]
#
#   RUN       its name, the beginning of it, its PID, its folder, or the folder of one of its snapshots
#   --split   validation (default); test, where the data have one; or all rows of the data set
#   --confusions
#             of speech and lines of text: also which words or characters were most often wrong, the ten worst rows, and
#             error rates by speaker or group and by length
#   --lm      of a run of run_train_audio_enc.sh: also search with a language model, which gives lm_wer and lm_cer;
#             --lm_weight and --lm_bonus are tuned on the run's validation set unless given
#   --json    everything as one JSON document
#   OPTIONS   those of the stage's script, such as --device cpu, or --dataset with another data set
#
# Of a run, models/best is used, else models/final, else the newest whole snapshot; standard error says which.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

if among --help "$@" || among -h "$@"; then
  usage
else
  run="${1:-}"
  [[ -n "${run}" && "${run}" != -* ]] || die "which run? it comes first; ./run/ps.sh lists them"
  place="$(daemon print "${run}" resume)"
  script="$(daemon print "${run}" script)"
  train "${script}" --eval_only --resume "${place}" "${@:2}"
fi
