#!/usr/bin/env bash
# Let a trained language model continue a text.
#
#   ./run/generate.sh RUN ["PROMPT"] [OPTIONS]
#
#   RUN                  a run: its name, the beginning of it, its PID or its folder, also while it trains;
#                        a snapshot; or a model folder (RUN/models/best, or any GPT-2 or Qwen3 of Hugging Face)
#   PROMPT               the text to continue; - or none: standard input; "": a text without a prompt
#
#   --max_new_tokens N   tokens to generate, at most; the text may end before (default 200)
#   --temperature X      below 1 likely tokens become likelier, above 1 less likely (default 0.8)
#   --top_k N            sample from the N likeliest tokens, 0: from all (default 50)
#   --top_p X            sample from the likeliest tokens that together have this probability (default 1)
#   --greedy             always choose the likeliest token
#   --num_samples N      texts to generate, with a line <|endoftext|> between them (default 1)
#   --seed N             the same seed gives the same text
#   --no_echo            do not print the prompt before its continuation
#   --device NAME        auto, cpu, cuda, cuda:N or mps (default auto)
#   --precision NAME     fp16: hold the weights of linear layers in fp16, on x86 CPUs only; generates text two to three
#                        times as fast; fp32: all weights in fp32; auto: fp16 on x86 CPUs, else fp32 (default auto)
#
# Of a run, models/best is used, else models/final, else the newest complete snapshot. Which weights, which seed, and
# whether weights are in fp16 is printed on standard error. Standard output carries the text and nothing else.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground inference.generate "$@"
