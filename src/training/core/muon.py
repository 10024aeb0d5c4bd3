"""Muon, which orthogonalizes the momentum of matrices (Jordan 2024, kellerjordan.github.io/posts/muon); else AdamW.

The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), so that its size is that of AdamW's and one learning
rate serves both (Liu et al. 2025, arXiv:2502.16982, section 2.2).
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of a quintic iteration that lifts small singular values fast
ITERATIONS, EPSILON = 5, 1e-7
RMS = 0.2  # of an update of AdamW, usually


class Muon(torch.optim.Optimizer):
    """Groups with `matrix` hold matrices, or weights of convolutions, whose rows are their first dimension; the others
    are updated by fused AdamW.

    `found_inf`, a float scalar on the device, is 1 where the next update is to change nothing (`optim.update`).
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "matrix": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["matrix"]:
                for parameter in parameters:
                    self._matrix(parameter, group)
            elif parameters:
                self._others(parameters, group)

    def _matrix(self, parameter: Tensor, group: dict[str, Any]) -> None:
        state, grad = self.state[parameter], parameter.grad
        assert grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        momentum = state["momentum"].lerp(grad, 1 - MOMENTUM)
        direction = orthogonal(grad.lerp(momentum, MOMENTUM).flatten(1)).view_as(parameter)
        size = RMS * math.sqrt(max(len(parameter), parameter[0].numel())) * group["lr"]
        changed = parameter * (1 - group["lr"] * group["weight_decay"]) - size * direction
        if self.found_inf is not None:
            momentum = torch.where(self.found_inf > 0, state["momentum"], momentum)
            changed = torch.where(self.found_inf > 0, parameter, changed)
        state["momentum"] = momentum
        parameter.copy_(changed)

    def _others(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"exp_avg": torch.zeros_like(parameter),
                                         "exp_avg_sq": torch.zeros_like(parameter),
                                         "step": torch.zeros((), device=parameter.device)}
        states = [self.state[parameter] for parameter in parameters]
        adamw(parameters, [p.grad for p in parameters if p.grad is not None], [s["exp_avg"] for s in states],
              [s["exp_avg_sq"] for s in states], [], [s["step"] for s in states], fused=True, found_inf=self.found_inf,
              amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
              weight_decay=group["weight_decay"], eps=group["eps"], maximize=False)


def orthogonal(matrix: Tensor) -> Tensor:
    """(M, N) -> (M, N), nearly U V^T of its singular value decomposition: singular values between about 0.7 and 1.2.

    In bf16 on a GPU, in fp32 on a CPU, where many have no fast bf16.
    """
    x = matrix.bfloat16() if matrix.is_cuda else matrix.float()
    a, b, c = NEWTON_SCHULZ
    tall = len(x) > x.shape[1]
    x = x.T if tall else x
    x = x / (x.norm() + EPSILON)
    for _ in range(ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    result: Tensor = (x.T if tall else x).to(matrix.dtype)
    return result
