"""What every program of Stoker does around its work: it shares the CPU, and its mistakes end in one line each."""

import errno
import gc
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from stoker import sharing
from stoker.config import UserError, complain

DONE, FAILED, REFUSED, INTERRUPTED = 0, 1, 2, 130  # exit codes
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO)


def answered(work: Callable[[Sequence[str]], int], interrupted: str = "") -> int:
    """The exit code of a program that does `work`, called with the words it was given. Mistakes are printed, with 2;
    output that cannot be written too, with 1; Ctrl-C ends it with 130 and the text `interrupted`."""
    sharing.start()
    try:
        code = work(sys.argv[1:])
        sys.stdout.flush()
        return code
    except UserError as error:
        complain(error.problems)
        return REFUSED
    except BrokenPipeError:  # whoever was reading has read enough
        _drop_output()
        return DONE
    except OSError as error:
        if error.errno not in FULL:
            raise
        _drop_output()
        complain([f"stopped, since nothing more can be written: {error.strerror}"
                  + (f": {error.filename}" if error.filename else "")])
        return FAILED
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
    finally:
        gc.freeze()  # Python's own end looks for garbage once more: among all of torch, for most of a second


@contextmanager
def importing() -> Iterator[None]:
    """Around imports of many objects, such as torch's. The garbage collector looks at them neither now, which takes
    a fifth of the time, nor later."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def _drop_output() -> None:
    """What is still buffered would fail once more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
