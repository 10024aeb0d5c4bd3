"""The section of gpu.py on determinism: of operators, one by one, and of whole steps of the stages."""

from collections.abc import Callable, Iterator
from typing import Any

import kill_matrix
import rig
import torch
from gpu_page import Asked, Failed
from torch import Tensor

from stoker.training.core import device as devices
from stoker.training.trainer import Trainer

Operator = Callable[[torch.device], tuple[Tensor, ...]]  # computes with new random numbers, the same each time


def _draw(device: torch.device, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, requires_grad=True)


def _index(device: torch.device, high: int, *shape: int) -> Tensor:
    return torch.randint(high, shape, device=device)


def _backward(output: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return output, *torch.autograd.grad(output.float().square().sum(), inputs)


def _attention(device: torch.device) -> tuple[Tensor, ...]:
    kind = torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    q, k, v = (_draw(device, 2, heads, 128, 32) for heads in (8, 2, 2))
    y = torch.nn.functional.scaled_dot_product_attention(q.to(kind), k.to(kind), v.to(kind), is_causal=True,
                                                         enable_gqa=True)
    return _backward(y, q, k, v)


def _embedding(device: torch.device) -> tuple[Tensor, ...]:
    table = _draw(device, 50, 32)
    return _backward(torch.nn.functional.embedding(_index(device, 50, 4096), table), table)


def _convolution(device: torch.device) -> tuple[Tensor, ...]:
    x, weight = _draw(device, 8, 16, 32, 32), _draw(device, 32, 16, 3, 3)
    return _backward(torch.nn.functional.conv2d(x, weight, stride=2, padding=1), x, weight)


def _norm(device: torch.device) -> tuple[Tensor, ...]:
    x, weight, bias = _draw(device, 4096, 64), _draw(device, 64), _draw(device, 64)
    return _backward(torch.nn.functional.layer_norm(x, (64,), weight, bias), x, weight, bias)


def _index_select(device: torch.device) -> tuple[Tensor, ...]:
    x = _draw(device, 100, 32)
    return _backward(x.index_select(0, _index(device, 100, 4096)), x)


def _gather(device: torch.device) -> tuple[Tensor, ...]:
    x = _draw(device, 64, 100)
    return _backward(x.gather(1, _index(device, 100, 64, 1000)), x)


def _scatter_add(device: torch.device) -> tuple[Tensor, ...]:
    sums, index = torch.zeros(10, device=device), _index(device, 10, 10_000)
    return (sums.scatter_add_(0, index, torch.randn(10_000, device=device)),)


def _index_add(device: torch.device) -> tuple[Tensor, ...]:
    sums, index = torch.zeros(10, device=device), _index(device, 10, 10_000)
    return (sums.index_add_(0, index, torch.randn(10_000, device=device)),)


def _cumsum(device: torch.device) -> tuple[Tensor, ...]:
    x = _draw(device, 4, 10_000)
    return _backward(x.cumsum(1), x)


def _interpolate(device: torch.device) -> tuple[Tensor, ...]:
    x = _draw(device, 2, 3, 32, 32)
    return _backward(torch.nn.functional.interpolate(x, scale_factor=1.7, mode="bilinear"), x)


def _grid_sample(device: torch.device) -> tuple[Tensor, ...]:
    x, grid = _draw(device, 2, 3, 32, 32), torch.rand(2, 48, 48, 2, device=device) * 2 - 1
    return _backward(torch.nn.functional.grid_sample(x, grid, align_corners=False), x)


def _ctc(device: torch.device) -> tuple[Tensor, ...]:
    x, lengths = _draw(device, 50, 4, 20), torch.full((4,), 50)
    loss = torch.nn.functional.ctc_loss(x.log_softmax(2), _index(device, 19, 4, 10) + 1, lengths, torch.full((4,), 10))
    return _backward(loss, x)


def _max_unpool(device: torch.device) -> tuple[Tensor, ...]:
    values, places = torch.nn.functional.max_pool1d(torch.randn(1, 8, 100, device=device), 2, return_indices=True)
    return (torch.nn.functional.max_unpool1d(values, places, [2]),)


OPERATORS: dict[str, Operator] = {
    "attention (grouped heads)": _attention, "embedding": _embedding, "conv2d": _convolution, "layer_norm": _norm,
    "index_select": _index_select, "gather": _gather, "scatter_add_": _scatter_add, "index_add_": _index_add,
    "cumsum": _cumsum, "interpolate (bilinear)": _interpolate, "grid_sample": _grid_sample, "ctc_loss": _ctc,
    "max_unpool1d": _max_unpool}
TRIES, SAME = 5, "the same bits"
REFUSED = "does not have a deterministic implementation"


def operators(asked: Asked) -> Iterator[str]:
    """Which operators have a deterministic form, and whether each gives the same bits every time; then the same for
    whole steps of the stages, which must not use an operator without such a form."""
    devices.configure(0)
    found: dict[str, list[str]] = {}
    for name, operator in OPERATORS.items():
        found.setdefault(_tried(operator, asked.device), []).append(name)
    yield from (f"{what}: {', '.join(names)}" for what, names in found.items())
    wrong = [what for what in found if what.startswith("DIFFERENT BITS with")]
    for name, (kind, options) in _stages(asked).items():
        verdict = _twice(asked, kind, options)
        yield f"{name}: three steps twice with deterministic algorithms only: {verdict}"
        wrong += [] if verdict == SAME else [name]
    if wrong:
        raise Failed("; ".join(wrong))


def _twice(asked: Asked, kind: type[Any], options: dict[str, Any]) -> str:
    """Whether the steps end in the same bits, or which operator has no deterministic form."""
    try:
        once, again = (_bits_of_steps(asked, kind, options) for _ in range(2))
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
        return f"REFUSED: {str(error).split(REFUSED)[0].strip()} has no deterministic form"
    return "DIFFERENT bits" if list(kill_matrix.differences(once, again, "")) else SAME


def _tried(operator: Operator, device: torch.device) -> str:
    strict = torch.are_deterministic_algorithms_enabled()
    try:
        return _repeated(operator, device, "deterministic form")
    except RuntimeError as error:
        if REFUSED not in str(error):
            raise
    torch.use_deterministic_algorithms(False)
    try:
        return f"no deterministic form, so torch refuses; {_repeated(operator, device, 'usual one')}"
    finally:
        torch.use_deterministic_algorithms(strict)


def _repeated(operator: Operator, device: torch.device, form: str) -> str:
    results = []
    for _ in range(TRIES):
        torch.manual_seed(0)
        results.append([tensor.detach().cpu() for tensor in operator(device)])
    same = all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    return f"{'the same bits' if same else 'DIFFERENT BITS'} with the {form} in {TRIES} tries"


def _stages(asked: Asked) -> dict[str, tuple[type[Any], dict[str, Any]]]:
    """The stages, with the options that give them data; with --quick, those that need none."""
    sizes = asked.options()
    text = {"lm": (asked.kind(rig.Random), sizes), "text": (asked.kind(rig.RandomThinker), sizes),
            "text with experts": (asked.kind(rig.RandomThinker), {**sizes, "use_moe": True})}
    if asked.quick:
        return text
    from stoker.data.pictures import scenes
    from stoker.data.speech import spoken
    from stoker.training.train_audio_enc import AudioEncoder
    from stoker.training.train_vision import Vision

    few = {"train": 64, "validation": 16, "test": 16}
    sound, pictures = spoken.build("spoken-digits", sizes=few), scenes.build(sizes=few)
    return text | {"audio_enc": (AudioEncoder, {"dataset": str(sound)}), "vision": (Vision, {"dataset": str(pictures)})}


def _bits_of_steps(asked: Asked, kind: type[Any], options: dict[str, Any]) -> dict[str, Any]:
    shared = {"device": str(asked.device), "batch_size": 8, "num_workers": 0, "dropout": 0.1}
    with rig.trainer("nano", kind, **options | shared) as trainer:
        rig.open_up(trainer, monitors=False)
        for _ in range(3):
            trainer._train_step()
        return _bits(trainer)


def _bits(trainer: Trainer) -> dict[str, Any]:
    """Weights and optimizer, on the host."""
    states = [state for optimizer in trainer.optimizers.values() for state in optimizer.state.values()]
    return {"weights": {name: tensor.detach().cpu().clone() for name, tensor in trainer.model.state_dict().items()},
            "optimizers": [{key: value.cpu() for key, value in state.items()} for state in states]}
