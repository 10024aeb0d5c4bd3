"""Which rows a step has: each once an epoch, another order each epoch, the same for ever."""

import multiprocessing
import os
import random
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from stoker.data import workers
from stoker.data.loader import Order, evaluation_batches, training_batches
from stoker.data.workers import Abandoned, Awaited, OutOfSharedMemory, Shared, workers_that_fit


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


def test_workers_end_when_no_more_is_wanted() -> None:
    """Also before the first batch."""
    others = set(multiprocessing.active_children())
    for wanted in (0, 2):
        for read in (lambda: training_batches(Rows(), list, Order(22, 4, 2, 3), 0, 60, 2),
                     lambda: evaluation_batches(Rows(), list, 1, 2)):
            batches = read()
            assert len([next(batches) for _ in range(wanted)]) == wanted
            assert len(set(multiprocessing.active_children()) - others) == 2
            workers.close(batches)
            assert not set(multiprocessing.active_children()) - others


# -- workers that send nothing --------------------------------------------------------------------------------------


class Hangs(Rows):
    """From row 8 on nothing comes any more, as from a network drive that is gone."""

    def __getitem__(self, index: int) -> int:
        if index >= 8:
            time.sleep(600)
        return index


@pytest.fixture
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stoker.data.loader.LOOK", 0.05)
    monkeypatch.setattr(workers, "SILENCE", 0.1)


def test_a_stop_is_obeyed_while_a_worker_hangs(soon: None, monkeypatch: pytest.MonkeyPatch,
                                               caplog: pytest.LogCaptureFixture) -> None:
    stops = iter([False] * 10)
    batches = evaluation_batches(Hangs(), list, 4, 1, lambda: next(stops, True))
    assert [next(batches), next(batches)] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    with pytest.raises(Abandoned):
        next(batches)
    lines = [line for line in caplog.messages if line.startswith("no batch for")]
    assert 1 <= len(lines) <= 4 and " is sleeping; /dev/shm has" in lines[-1], "rarer and rarer"
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.1)  # seconds that it waits
    for left in workers._left:
        left._shutdown_workers()
    workers._left.clear()


def times_out() -> Iterator[Any]:
    class Batches:
        _pin_memory_thread: Any = SimpleNamespace(is_alive=lambda: True)
        errors: list[Exception] = [RuntimeError("DataLoader timed out after 1.0 seconds")]

        def __iter__(self) -> Any:
            return self

        def __next__(self) -> Any:
            raise self.errors[0]

    return Batches()


@pytest.mark.parametrize("error, message", [
    (EOFError(), "DataLoader worker has ended, and what it sent cannot be read"),
    (ConnectionResetError(), "DataLoader worker has ended, and what it sent cannot be read"),
    (RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), "killed by signal: Killed"),
    (RuntimeError("Caught RuntimeError in DataLoader worker process 0."), "Caught RuntimeError"),
    (OutOfSharedMemory("Caught OutOfSharedMemory in DataLoader worker process 0."),
     r"does not fit into shared memory, /dev/shm has [\d,]+ of [\d,]+ MB free: start with --num_workers 0")])
def test_the_end_of_a_worker_is_reported_with_its_cause(error: Exception, message: str) -> None:
    batches: Any = times_out()
    batches.errors = [error]
    with pytest.raises(RuntimeError, match=message):
        next(Awaited(batches, lambda: False))
    if "Caught RuntimeError" not in message:  # while a stop is asked for, a worker may end by the same signal
        with pytest.raises(Abandoned):
            next(Awaited(batches, lambda: True))
    workers._left.clear()


def test_the_thread_that_copies_batches_may_end(soon: None) -> None:
    batches: Any = times_out()
    batches._pin_memory_thread = SimpleNamespace(is_alive=lambda: False)
    with pytest.raises(RuntimeError, match="copies batches for the GPU has ended"):
        next(Awaited(batches, lambda: False))


class Mistaken(Rows):
    def __getitem__(self, index: int) -> int:
        raise EOFError("of the data set's own")


@pytest.mark.parametrize("count", [0, 1])
def test_an_error_of_the_data_set_stays_what_it_is(count: int) -> None:
    """Also where a stop is asked for."""
    with pytest.raises(EOFError, match="of the data set's own"):
        list(evaluation_batches(Mistaken(), list, 4, count, lambda: True))


class Pictures(torch.utils.data.Dataset[torch.Tensor]):
    """Rows of 1 MB."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((250_000,), float(index))


def stacked(rows: list[torch.Tensor]) -> dict[str, Any]:
    whole = torch.stack(rows)
    return {"x": whole[:, 1:], "y": whole[:, :-1], "rows": len(rows)}


@pytest.mark.parametrize("count, free, fit", [(2, 39e6, 0), (2, 41e6, 2), (1, 25e6, 1), (1, 23e6, 0), (0, 0, 0)])
def test_workers_whose_batches_do_not_fit_into_shared_memory_are_not_started(
        count: int, free: float, fit: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Two batches ahead of each, and the one in use: two tensors of one storage count once."""
    workers._warn_once.cache_clear()
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(total=64e6, free=free))
    for _ in range(2):
        assert workers_that_fit(count, Pictures(), stacked, range(8)) == fit
    assert len(caplog.messages) == (count != fit)
    assert all("/dev/shm, which has 64 MB in all" in line and "--num_workers 0" in line for line in caplog.messages)


def test_a_small_shared_memory_needs_no_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers.shutil, "disk_usage", lambda path: SimpleNamespace(total=10_000, free=10_000))
    batches = list(training_batches(Parents(), lambda rows: {"x": torch.tensor(rows).repeat(1000)},
                                    Order(22, 4, 2, seed=1), 0, 3, 2))
    assert {int(pid) for batch in batches for pid in batch["x"]} == {os.getpid()}


def test_a_batch_that_does_not_fit_is_reported_by_the_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread that sends it could only lose it."""
    def full(self: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")

    assert Shared(stacked)([torch.ones(4)])["x"].is_shared()
    monkeypatch.setattr(torch.Tensor, "share_memory_", full)
    with pytest.raises(RuntimeError, match="a batch does not fit into shared memory"):
        list(training_batches(Pictures(), stacked, Order(64, 8, 1, seed=1), 0, 3, 1))
