"""What every program of Stoker does around its work: it shares the CPU, and its mistakes end in one line each."""

import errno
import os
import sys
from collections.abc import Callable, Sequence

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


def _drop_output() -> None:
    """What is still buffered would fail once more when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
