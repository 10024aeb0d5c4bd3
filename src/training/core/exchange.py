"""How the processes that train together reach one decision: each says what it wants, one decides, all obey."""

from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch.distributed as dist

Wish = TypeVar("Wish")
Result = TypeVar("Result")


class Exchange(Protocol):
    def gather_and_decide(self, wish: Wish, decide: Callable[[list[Wish]], Result]) -> Result:
        """Every process calls it at the same place of the loop. `decide` is called in one process, with the wishes of
        all of them in the order of their ranks; each process returns what it decided.

        Wishes and results are small and can be pickled.
        """
        ...


class Alone:
    """One process: its wish is all there is."""

    def gather_and_decide(self, wish: Wish, decide: Callable[[list[Wish]], Result]) -> Result:
        return decide([wish])


class Together:
    """The processes of a group of torch.distributed; the first of them decides.

    `group` exchanges tensors on the CPU (gloo), so that no process waits for its GPU. A process that is gone, or that
    does not come within the group's timeout, is a RuntimeError in all others: nobody waits for ever.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        self.group = group
        self.first = dist.get_global_rank(group, 0) if group else 0

    def gather_and_decide(self, wish: Wish, decide: Callable[[list[Wish]], Result]) -> Result:
        decides = dist.get_rank(self.group) == 0
        wishes: list[Any] | None = [None] * dist.get_world_size(self.group) if decides else None
        dist.gather_object(wish, wishes, self.first, self.group)
        result: list[Any] = [decide(wishes) if wishes else None]
        dist.broadcast_object_list(result, self.first, self.group)
        decided: Result = result[0]
        return decided
