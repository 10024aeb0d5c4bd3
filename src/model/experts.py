"""A mixture of experts: a router chooses for each token the few feed-forward networks that compute it.

As in Qwen3 (arXiv:2505.09388): SwiGLU experts, and probabilities of the chosen ones that add up to 1.

Axes: B batch, T time, N = B x T tokens, E experts, k experts for each token, A = N x k pairs of a token and an expert
that it was given to, D hidden size.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from stoker.config import UserError
from stoker.model.dropout import Dropout


@dataclass(frozen=True)
class Experts:
    """Sizes of a mixture: how many experts there are, how many compute each token, and the feed-forward size of one."""

    count: int
    per_token: int
    d_ff: int


class MixtureOfExperts(nn.Module):
    """Router and experts, which compute only the tokens that they are given.

    It is `Summed` (training/core/sums.py): the step adds up how many tokens each expert was given in all micro-batches.

    load       (E,): the share of the tokens of the last step that each expert was given; they add up to `per_token`,
               and are equal before the first step
    balance    the load-balance loss of the last forward pass, a sum over its tokens (Fedus et al. 2021,
               arXiv:2101.03961, equations 4 to 6): E times the sum over the experts of load x probability, with the
               load of the step before, since that of a step is known only after all its micro-batches

    Raises UserError where the sizes do not fit together: torch's grouped product needs multiples of 16 bytes.
    """

    load: Tensor
    stacked = ("gate", "up", "down")  # of each expert a matrix, for Muon

    def __init__(self, d_model: int, experts: Experts, dropout: float = 0.0):
        super().__init__()
        E, inner = experts.count, experts.d_ff
        if d_model % 8 or inner % 8 or not 1 <= experts.per_token <= E:
            raise UserError(f"{experts.per_token} of {E} experts of size {inner}, hidden size {d_model}: both sizes "
                            "must be multiples of 8, and at least one expert be chosen and at most all")
        self.per_token = experts.per_token
        self.router = nn.Linear(d_model, E, bias=False)
        self.gate = nn.Parameter(torch.empty(E, inner, d_model))
        self.up = nn.Parameter(torch.empty(E, inner, d_model))
        self.down = nn.Parameter(torch.empty(E, d_model, inner))
        self.dropout = Dropout(dropout)
        self.register_buffer("load", torch.full((E,), experts.per_token / E))
        self.sums: dict[str, Tensor] = {}
        self.balance: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D)."""
        tokens = x.flatten(0, 1)  # (N, D)
        probabilities = self.router(tokens).float().softmax(-1)  # (N, E)
        weights, chosen = probabilities.topk(self.per_token)  # (N, k)
        weights = weights / weights.sum(-1, keepdim=True)
        ranked, order = chosen.flatten().sort(stable=True)  # (A,), by expert
        ends = torch.searchsorted(ranked, torch.arange(len(self.load), device=x.device), right=True)  # (E,)
        self._observe(probabilities, ends)
        given = tokens.index_select(0, order // self.per_token)  # (A, D)
        made = _swiglu(given, ends.to(torch.int32), self.gate, self.up, self.down)
        made = made.index_select(0, order.argsort()).view(*weights.shape, -1)  # (N, k, D)
        y = (made * weights[..., None].to(made.dtype)).sum(1)
        return self.dropout(y.view(x.shape))  # type: ignore[no-any-return]

    def _observe(self, probabilities: Tensor, ends: Tensor) -> None:
        self.balance = len(self.load) * (self.load * probabilities.sum(0)).sum()
        if self.training:
            given = ends.diff(prepend=ends.new_zeros(1)).float()
            self.sums["given"] = self.sums["given"] + given if "given" in self.sums else given

    def apply_sums(self, sums: dict[str, Tensor], dropped: Tensor) -> None:
        load = sums["given"] * (self.per_token / sums["given"].sum())
        self.load.copy_(torch.where(dropped > 0, self.load, load))


@torch.compiler.disable  # type: ignore[untyped-decorator]  # which knows the grouped product in bf16 only
def _swiglu(given: Tensor, ends: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Rows (A, D) in the order of their experts, whose rows end before `ends` (E,) -> (A, D)."""
    device = given.device.type
    kind = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else given.dtype
    given, gate, up, down = (x.to(kind) for x in (given, gate, up, down))
    inner = F.silu(F.grouped_mm(given, gate.mT, offs=ends)) * F.grouped_mm(given, up.mT, offs=ends)
    return F.grouped_mm(inner, down.mT, offs=ends)
