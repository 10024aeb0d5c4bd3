"""Muon, which orthogonalizes the momentum of matrices (Jordan 2024, kellerjordan.github.io/posts/muon). It updates all
other parameters by AdamW.

The update of a matrix is scaled by 0.2 sqrt(max(rows, columns)), so that its size is that of AdamW's and one learning
rate serves both (Liu et al. 2025, arXiv:2502.16982, section 2.2).
"""

import math
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # of a quintic iteration that lifts small singular values fast
ITERATIONS, EPSILON = 5, 1e-7
RMS = 0.2  # the usual root mean square of AdamW's updates, at a learning rate of 1


class Muon(torch.optim.Optimizer):
    """Parameter groups with `matrix` have matrices, stacks of them (E, M, N), or weights of convolutions (C', C, H, W),
    which are treated as matrices with C' rows; with `bf16` these are orthogonalized in bf16. The parameters of other
    groups are updated by fused AdamW.

    `found_inf`, a float scalar on the device: where it is 1, the next step changes nothing (`optim.update`).
    """

    _step_supports_amp_scaling = True
    found_inf: Tensor | None = None

    def __init__(self, groups: list[dict[str, Any]], lr: float, betas: tuple[float, float]):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": 1e-8, "weight_decay": 0.0, "matrix": False,
                                  "bf16": False})

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Also loads the state of snapshots from before groups had `bf16`."""
        super().__setstate__(state)
        for group in self.param_groups:
            group.setdefault("bf16", False)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                (self._matrices if group["matrix"] else self._others)(parameters, group)

    def _matrices(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        grads = [p.grad for p in parameters if p.grad is not None]
        before = [self.state[p]["momentum"] for p in parameters]
        momenta = torch._foreach_lerp(before, grads, 1 - MOMENTUM)
        # Nesterov's form: the gradient is mixed with the new momentum once more
        directions = orthogonal([_rows(each) for each in torch._foreach_lerp(grads, momenta, MOMENTUM)],
                                bf16=group["bf16"])
        for parameter, momentum, direction in zip(parameters, momenta, directions):
            size = RMS * math.sqrt(max(direction.shape[-2:])) * group["lr"]
            changed = parameter * (1 - group["lr"] * group["weight_decay"]) - size * direction.view_as(parameter)
            if self.found_inf is not None:
                momentum = torch.where(self.found_inf > 0, self.state[parameter]["momentum"], momentum)
                changed = torch.where(self.found_inf > 0, parameter, changed)
            self.state[parameter]["momentum"] = momentum
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


def orthogonal(matrices: Sequence[Tensor], *, bf16: bool = False) -> list[Tensor]:
    """For each matrix (..., M, N), approximately U V^T of its singular value decomposition U S V^T: all singular values
    become about 0.7 to 1.2.

    Matrices of one shape, or of its transpose, are computed in one batch: in bf16 on a GPU or with `bf16`, else in
    fp32, since many CPUs have no fast bf16.
    """
    alike = defaultdict[tuple[int, ...], list[int]](list)
    for number, matrix in enumerate(matrices):
        alike[tuple(sorted(matrix.shape[-2:]))].append(number)
    results = list(matrices)
    for shape, numbers in alike.items():
        stacks = [_wide(matrices[number]).reshape(-1, *shape) for number in numbers]
        whole = torch.cat(stacks)
        made = _iterated(whole.bfloat16() if bf16 or whole.is_cuda else whole.float())
        for number, part in zip(numbers, made.split([len(stack) for stack in stacks])):
            matrix = matrices[number]
            results[number] = (part.mT if _is_tall(matrix) else part).reshape(matrix.shape).to(matrix.dtype)
    return results


def _iterated(x: Tensor) -> Tensor:
    """Newton-Schulz iterations of matrices (B, M, N), M <= N. Each is first divided by its Frobenius norm, so that no
    singular value is above 1."""
    a, b, c = NEWTON_SCHULZ
    x = x / (torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True) + EPSILON)
    for _ in range(ITERATIONS):
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x


def _rows(weight: Tensor) -> Tensor:
    """The weight of a convolution (C', C, H, W) as a matrix (C', C H W); others unchanged."""
    return weight.flatten(1) if weight.dim() == 4 else weight


def _is_tall(matrix: Tensor) -> bool:
    return matrix.shape[-2] > matrix.shape[-1]


def _wide(matrix: Tensor) -> Tensor:
    return matrix.mT if _is_tall(matrix) else matrix
