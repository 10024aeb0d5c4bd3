#!/usr/bin/env bash
# Let a trained language model continue a text.
#
#   ./run/generate.sh RUN ["PROMPT"] [OPTIONS]
#
#   RUN                  a run: its name, the beginning of it, its PID or its folder, also while it trains;
#                        a snapshot; or a model folder (RUN/models/best, or any GPT-2 of Hugging Face)
#   PROMPT               the text to continue; - or none: standard input; "": a text from nothing
#
#   --max_new_tokens N   tokens to make; fewer where the text comes to its end (default 200)
#   --temperature X      below 1 likely tokens become likelier, above 1 less so (default 0.8)
#   --top_k N            draw from so many of the likeliest tokens, 0: all (default 50)
#   --top_p X            draw from the likeliest tokens that together have this probability (default 1)
#   --greedy             always the likeliest token
#   --num_samples N      texts to make, a line <|endoftext|> between them (default 1)
#   --seed N             the same seed makes the same text
#   --no_echo            do not print the prompt before what follows it
#   --device NAME        auto, cpu, cuda, cuda:N or mps (default auto)
#   --precision NAME     fp16: a CPU holds the weights of linear layers in half precision, and makes text two to three
#                        times as fast; fp32: as they are; auto: fp16 where the CPU can, else fp32 (default auto)
#
# Of a run, models/best is used, else models/final, else the newest whole snapshot. Standard error says which, the seed,
# and whether weights are in fp16. Standard output carries the text and nothing else.

# shellcheck source=run/lib.sh
. "$(dirname -- "$(readlink -f -- "${BASH_SOURCE[0]}")")/lib.sh" || exit

in_foreground inference.generate "$@"
