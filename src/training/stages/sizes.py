"""Options for the sizes of a transformer, declared once for all stages that have one or several.

    @dataclass
    class Architecture(Transformer, d_model=192, num_heads=3, num_layers=4, d_ff=768, dropout=0.1):
        \"\"\"What model\"\"\"                                                   # --d_model, --num_heads, ...

    @dataclass
    class Decoder(Transformer, prefix="decoder_", num_layers=2):
        \"\"\"What writes the text\"\"\"                                         # --decoder_layers

    model = Encoder(**sizes_of(cfg)), Decoder(**sizes_of(cfg, "decoder_"))
"""

import inspect
from typing import Any

from stoker.config import opt

DIVIDED = {1: ": take a divisor", 2: " into even parts: take another", 4: " into parts that 4 divides: take another"}


class Transformer:
    """Base of a group of options. Each class keyword declares the option of that name, with this default.

    Each head has a multiple of `head_multiple` channels: 2 for rotary positions in one dimension, 4 in two. There are
    at least `fewest_layers`.
    """

    def __init_subclass__(cls, *, prefix: str = "", head_multiple: int = 2, fewest_layers: int = 1, **defaults: Any):
        super().__init_subclass__()
        if not defaults:  # a Config that inherits from several groups
            return
        declared = _declared(prefix, head_multiple, fewest_layers, defaults)
        own = inspect.get_annotations(cls)
        cls.__annotations__ = {name: type(option.default) for name, option in declared.items()} | own
        for name, option in declared.items():
            setattr(cls, name, option)
        width, heads, others = f"{prefix}d_model", f"{prefix}num_heads", vars(cls).get("problems")

        def problems(self: Any) -> list[str]:
            found = others(self) if others else []
            if {width, heads} <= declared.keys() and getattr(self, width) % (head_multiple * getattr(self, heads)):
                return [f"--{heads} {getattr(self, heads)} does not divide --{width} {getattr(self, width)}"
                        f"{DIVIDED[head_multiple]}", *found]
            return found

        setattr(cls, "problems", problems)


def _declared(prefix: str, head_multiple: int, fewest_layers: int, defaults: dict[str, Any]) -> dict[str, Any]:
    """The declarations of options, by name. Options with a prefix have no aliases."""
    quotient = {1: "a whole number", 2: "an even number", 4: "a multiple of 4"}[head_multiple]
    known: dict[str, tuple[str, str, dict[str, Any]]] = {
        "d_model": ("d_model", "hidden size", dict(ge=head_multiple, usual=(64, 2048), aliases=("n_embd",))),
        "num_heads": ("num_heads", f"attention heads; hidden size / heads must be {quotient}",
                      dict(ge=1, le=32, aliases=("n_head", "n_heads"))),
        "num_layers": ("layers" if prefix else "num_layers", "layers",
                       dict(ge=fewest_layers, le=48, aliases=("n_layer", "n_layers"))),
        "d_ff": ("d_ff", "feed-forward size of a layer", dict(ge=1, follows=(f"{prefix}d_model", 4))),
        "dropout": ("dropout", "share of activations dropped in training", dict(ge=0, le=0.9)),
    }
    found = {}
    for size, default in defaults.items():
        name, help, spec = known[size]
        if prefix:
            spec = {key: value for key, value in spec.items() if key not in ("usual", "aliases")}
        found[prefix + name] = opt(default, help, **spec)
    return found


def sizes_of(cfg: Any, prefix: str = "") -> dict[str, Any]:
    """The sizes of a transformer as keyword arguments of its class; a size that is no option is left out."""
    names = {"num_layers": f"{prefix}layers"} if prefix else {}
    found = {size: names.get(size, prefix + size) for size in ("d_model", "num_heads", "num_layers", "d_ff", "dropout")}
    return {size: getattr(cfg, name) for size, name in found.items() if hasattr(cfg, name)}


def preset(d_model: int, num_heads: int, num_layers: int, **more: Any) -> dict[str, Any]:
    """The options of a preset; the feed-forward size is four times the hidden size."""
    return {"d_model": d_model, "num_heads": num_heads, "num_layers": num_layers, "d_ff": 4 * d_model, **more}
