"""The parts of a model that monitors speak of: `blocks.3`, `token_embedding`."""

from collections.abc import Iterable

from torch import Tensor, nn


def part_of(name: str) -> str:
    """The part a parameter belongs to: its name up to the first number in it, else the first word."""
    words = name.split(".")
    end = next((i + 1 for i, word in enumerate(words) if word.isdigit()), 1)
    return ".".join(words[:end])


def by_part(named: Iterable[tuple[str, Tensor]]) -> dict[str, list[Tensor]]:
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in named:
        parts.setdefault(part_of(name), []).append(tensor)
    return parts


def entries(tensor: Tensor, size: int) -> Tensor:
    """At most `size` evenly spaced entries, as float32 on the tensor's device; may share its memory."""
    return tensor.detach().flatten()[::max(1, tensor.numel() // size)][:size].float()


def first_non_finite(named: Iterable[tuple[str, Tensor | None]]) -> str:
    """Name of the first tensor with a NaN or infinity in it, or ''. Waits for the device."""
    return next((name for name, t in named if t is not None and t.is_floating_point() and not t.isfinite().all()), "")


def gradients(model: nn.Module, among: Iterable[nn.Parameter]) -> list[tuple[str, Tensor]]:
    """The gradients there are of these parameters, by the parameters' names.

    A phase's gradients are those of its optimizer's parameters: others may hold left-overs of another phase.
    """
    wanted = {id(p) for p in among}
    return [(name, p.grad) for name, p in model.named_parameters() if id(p) in wanted and p.grad is not None]
