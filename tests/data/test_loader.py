"""Which rows a step has: each once an epoch, another order each epoch, the same for ever."""

import os
import random
from typing import Any

import numpy as np
import pytest
import torch

from data.loader import Order, evaluation_batches, training_batches


@pytest.mark.parametrize("size, batch, accum", [(22, 4, 2), (24, 4, 2), (3, 4, 2), (1, 1, 1), (100, 7, 3)])
def test_each_row_once_an_epoch(size: int, batch: int, accum: int) -> None:
    order = Order(size, batch, accum, seed=1)
    for epoch in range(3):
        steps = range(epoch * order.steps_per_epoch, (epoch + 1) * order.steps_per_epoch)
        rows = [order.rows(step) for step in steps]
        assert sorted(row for step in rows for micro in step for row in micro) == list(range(size))
        assert all(len(step) <= accum and all(0 < len(micro) <= batch for micro in step) for step in rows)
        assert all(len(step) == accum for step in rows[:-1])


def test_another_order_each_epoch_and_seed_and_the_same_for_ever() -> None:
    def epoch(number: int, seed: int) -> list[int]:
        order = Order(50, 50, 1, seed)
        return order.rows(number)[0]

    assert len({tuple(epoch(number, seed)) for number in range(3) for seed in range(3)}) == 9
    assert epoch(0, 0) != sorted(epoch(0, 0))
    assert epoch(1, 42)[:6] == [33, 35, 26, 1, 14, 2]  # what older runs have trained on must not change


def test_the_stream_is_the_steps_one_after_the_other() -> None:
    order = Order(22, 4, 2, seed=1)
    assert list(order.micro_batches(2, 9)) == [micro for step in range(2, 9) for micro in order.rows(step)]


class Rows(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_come_in_order_and_leave_randomness_alone(workers: int) -> None:
    def state() -> tuple[Any, ...]:
        return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()

    order, before = Order(22, 4, 2, seed=1), state()
    batches = list(training_batches(Rows(), list, order, 2, 6, workers))
    assert batches == list(order.micro_batches(2, 6))
    assert [row for batch in evaluation_batches(Rows(), list, 4, workers) for row in batch] == list(range(22))
    assert state() == before


class Parents(Rows):
    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_workers_read_in_processes_of_their_own() -> None:
    batches = list(training_batches(Parents(), list, Order(22, 4, 2, seed=1), 0, 3, 2))
    assert len({pid for batch in batches for pid in batch} - {os.getpid()}) == 2
