"""Programs that compute on the same cores give way to each other; one that is alone loses nothing.

Between two operations of torch the threads of GNU's OpenMP library (libgomp) wait by spinning, for some milliseconds.
Alone that is fastest: nobody has to be woken. Beside another program it is the worst there is: a thread that spins has
a core on which a thread that computes could run, and two programs become three to twenty times slower instead of two. A
shorter spin for ever (GOMP_SPINCOUNT) costs a program that is alone up to a tenth of its speed.

So the spin follows the machine. libgomp itself spins only shortly while it manages more threads than there are cores.
A thread looks once a second how long this program's threads have waited for a core. Where that is much, it makes
libgomp manage more threads than there are cores, which sleep; where it is little again, they end. Results are the same
bits. (libgomp: config/linux/wait.h, do_spin; the kernel's Documentation/scheduler/sched-stats.rst)
"""

import ctypes
import os
import signal
import threading
import time
from pathlib import Path

SETTINGS = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")  # a user who has set one of them has decided
SECONDS = 1.0  # between two looks
CROWDED, CALM = 0.1, 0.03  # seconds of waiting in a second, above and below which the others count as there and gone
LOOKS = 3  # calm ones in a row, until the others are taken to be gone

_started = threading.Lock()


def start() -> None:
    """Begin to look, once in a process, unless the user has decided how threads wait."""
    if not any(name in os.environ for name in SETTINGS) and _started.acquire(blocking=False):
        unblocked = signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())  # they are for the main thread
        try:
            threading.Thread(target=_watch, name="sharing", daemon=True).start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _watch() -> None:
    watch, crowd, before, looked = Watch(), Crowd(), waited(), time.monotonic()
    while True:
        time.sleep(SECONDS)
        now, clock = waited(), time.monotonic()
        if watch.look((now - before) / (clock - looked)):
            crowd.gather()
        else:
            crowd.dissolve()
        before, looked = now, clock


class Watch:
    """Whether other programs want the cores that this one computes on."""

    def __init__(self) -> None:
        self.crowded, self._calm = False, 0

    def look(self, share: float) -> bool:
        """`share`: seconds that our threads waited for a core in each second since the last look."""
        self._calm = self._calm + 1 if share < CALM else 0
        if share > CROWDED:
            self.crowded = True
        elif self._calm >= LOOKS:
            self.crowded = False
        return self.crowded


def waited() -> float:
    """Seconds that the threads of this process, as many as live, have been ready and got no core."""
    total = 0
    for path in Path("/proc/self/task").iterdir():
        try:
            total += int((path / "schedstat").read_text().split()[1])
        except (OSError, IndexError, ValueError):  # it has ended meanwhile; or the kernel keeps no such count
            pass
    return total / 1e9


class Crowd:
    """Sleeping threads of libgomp, more than there are cores."""

    def __init__(self) -> None:
        self._end: threading.Event | None = None

    def gather(self) -> None:
        if self._end is None and (library := _libgomp()):
            self._end = threading.Event()
            threading.Thread(target=self._hold, args=(library, self._end), name="crowd", daemon=True).start()

    def dissolve(self) -> None:
        if self._end is not None:
            self._end.set()
            self._end = None

    @staticmethod
    def _hold(library: ctypes.CDLL, end: threading.Event) -> None:
        """libgomp keeps the threads of a parallel region for the next one, as long as the thread lives that began it.
        Each does nothing here but to ask for its number."""
        library.GOMP_parallel(library.omp_get_thread_num, None, len(os.sched_getaffinity(0)) + 1, 0)
        end.wait()


def _libgomp() -> ctypes.CDLL | None:
    """The one that torch has loaded; None where it has not, or computes with another library."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "libgomp" in line.rpartition("/")[2]:
            return ctypes.CDLL(line.split(maxsplit=5)[5])
    return None
