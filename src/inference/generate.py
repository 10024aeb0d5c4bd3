"""Lets a trained language model continue a text. Standard output carries the text and nothing else."""

import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from stoker import command, config
from stoker.config import UserError, opt
from stoker.files import hint
from stoker.inference import trained
from stoker.training.core import pretrained
from stoker.training.core.options import device_problems
from stoker.training.core.pretrained import Pretrained
from stoker.training.core.stage import Stage, discover, reader

USAGE = """usage: generate.sh RUN ["PROMPT"] [OPTIONS]

Lets the model of a run (also one that is still training), a snapshot or a model folder continue a text. Without
PROMPT, or with -, the text comes from standard input; "" generates a text without a prompt."""


@dataclass
class Config:
    """Generation"""

    max_new_tokens: int = opt(200, "tokens to generate, at most; the text may end before", ge=1)
    temperature: float = opt(0.8, "below 1 likely tokens become likelier, above 1 less likely; 0: always the likeliest",
                             ge=0)
    top_k: int = opt(50, "sample from the K likeliest tokens (0: from all)", ge=0)
    top_p: float = opt(1.0, "sample from the likeliest tokens that together have this probability", gt=0, le=1)
    greedy: bool = opt(False, "always choose the likeliest token, as with --temperature 0")
    num_samples: int = opt(1, "texts to generate, with a line <|endoftext|> between them", ge=1)
    seed: int | None = opt(None, "seed of sampling: the same seed gives the same text (default: another one each time)",
                           ge=0, le=2**63 - 1)
    echo: bool = opt(True, "print the prompt before its continuation")
    device: str = opt("auto", "auto, cpu, cuda, cuda:N or mps")
    precision: str = opt("auto", "fp16: hold the weights of linear layers in fp16, on x86 CPUs only; generates text "
                         "two to three times as fast; fp32: all weights in fp32; auto: fp16 on x86 CPUs, else fp32",
                         choices=("auto", "fp32", "fp16"))

    def problems(self) -> list[str]:
        return device_problems(self.device)


def _main(argv: Sequence[str]) -> int:
    return trained.command(Config, USAGE, argv, _work)


def _work(cfg: Config, words: list[str], only_check: bool) -> int:
    run, prompt = _words(words)
    if only_check:
        source = pretrained.find(run)
        pretrained.config_for(source, _kind(source))
    else:
        _generate(cfg, run, _read(prompt))
    return 0


def _words(words: Sequence[str]) -> tuple[str, str]:
    """RUN and PROMPT; "-" stands for standard input."""
    if not words:
        raise UserError("which run? give its name, its folder or a model folder; "
                        f"{hint('ps')} lists the runs")
    if len(words) > 2:
        raise UserError(f"{len(words) - 1} words after {words[0]}: put the prompt into quotes")
    if len(words) == 1 and sys.stdin.isatty():
        raise UserError(f'no prompt: {hint("generate RUN")} "Once upon a time"; "" makes a text from nothing, - '
                        "reads what you type up to Ctrl-D")
    return words[0], words[1] if len(words) == 2 else "-"


def _read(prompt: str) -> str:
    """The prompt itself or, for "-", standard input without a line end at its end, as a shell does it."""
    try:
        if prompt == "-":
            return sys.stdin.buffer.read().decode().removesuffix("\n")
        return os.fsencode(prompt).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"the prompt is not UTF-8 text ({error.reason} at byte {error.start:,})") from error


# -- the model ------------------------------------------------------------------------------------------------------


def _kind(source: Pretrained) -> type[Stage]:
    """The stage that loads the weights; "lm" for folders of other programs whose kind of model no stage knows."""
    known = discover()
    if source.stage and source.stage not in known:
        raise UserError(f"{source} is of stage {source.stage}, which is not one of ours ({', '.join(known)}): generate "
                        "is for language models")
    return reader(source, ("lm", *known))


def _generate(cfg: Config, run: str, prompt: str) -> None:
    trained.require_torch("generate")
    import torch

    from stoker.model import half_weights
    from stoker.model.decoding import Decoder, Sampling, generate
    from stoker.training.core import device as devices

    device = devices.choose(cfg.device)
    source = pretrained.held(lambda: pretrained.find(run))
    stage, model = pretrained.opened(source, _kind(source), device)
    if not isinstance(model, Decoder):
        raise UserError(f"{source} is of stage {stage.name}: it makes no text")
    seed = random.SystemRandom().randrange(2**32) if cfg.seed is None else cfg.seed
    why_not = half_weights.problem(model, device) if cfg.precision != "fp32" else "it was not asked for"
    if cfg.precision == "fp16" and why_not:
        raise UserError(f"--precision fp16: {why_not}; leave it out")
    if not why_not:
        half_weights.hold_in_half(model)
    trained.note(f"{source}; seed {seed}" + (not why_not) * "; weights in fp16")

    ids = stage.tokenizer.encode_batch([prompt])[0].tolist() or [stage.tokenizer.end_of_text]
    sampling = Sampling(0 if cfg.greedy else cfg.temperature, cfg.top_k, cfg.top_p)
    generator = torch.Generator().manual_seed(seed)
    for number in range(cfg.num_samples):
        made = generate(model, torch.tensor([ids], device=device), sampling, max_new_tokens=cfg.max_new_tokens,
                        stop=stage.tokenizer.end_of_text, generator=generator)
        tokens = (token for each in made if (token := int(each)) != stage.tokenizer.end_of_text)
        _print("<|endoftext|>\n" * (number > 0) + prompt * cfg.echo)
        for piece in pieces(tokens, stage.tokenizer.decode, ids if prompt else []):
            _print(piece)
        _print("\n")


def _print(text: str) -> None:
    if sys.stdout.isatty():
        text = "\n".join(map(config.printable, text.split("\n")))
    sys.stdout.buffer.write(text.encode())
    sys.stdout.buffer.flush()


def pieces(tokens: Iterable[int], decode: Callable[[list[int]], str], before: list[int]) -> Iterator[str]:
    """The text of tokens that follow the tokens `before`, in pieces that never end within a character."""
    shown, held = before, list[int]()
    for token in tokens:
        held.append(token)
        text = decode(shown + held)[len(decode(shown)):]
        if not text.endswith("\ufffd"):  # the replacement character: the last character is not complete yet
            yield text
            shown, held = held, []
    if held:
        yield text.rstrip("\ufffd")


if __name__ == "__main__":
    sys.exit(command.answered(_main))
