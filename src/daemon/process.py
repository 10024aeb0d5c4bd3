"""Which process is meant. A PID alone lies: it is used again, at the latest after a reboot."""

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Process:
    """A process for all time: its PID, its start (clock ticks after boot), and the boot it lived in."""

    pid: int
    started: int
    boot: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def find(pid: int) -> Process | None:
    """The process that has this PID now; None if there is none, or only what is left of one (a zombie)."""
    stat = _stat(pid)
    return None if stat is None or stat[0] in "ZX" else Process(pid, int(stat[19]), boot())


def me() -> Process:
    process = find(os.getpid())
    assert process is not None
    return process


def is_paused(pid: int) -> bool:
    """Whether a process was stopped by SIGSTOP or a debugger."""
    stat = _stat(pid)
    return stat is not None and stat[0] in "Tt"


def family(pid: int) -> list[int]:
    """A process and all its descendants, itself first."""
    parents = {int(path.name): int(stat[1]) for path in Path("/proc").glob("[0-9]*")
               if (stat := _stat(int(path.name))) is not None}
    found = [pid]
    for member in found:  # grows meanwhile
        found += [child for child, parent in parents.items() if parent == member]
    return found


def catches(pid: int, number: int) -> bool:
    """Whether a process has a handler for this signal, which by itself would end it."""
    caught = next((int(line.split()[1], 16) for line in _status(pid) if line.startswith("SigCgt:")), 0)
    return bool(caught >> (number - 1) & 1)


def owner(pid: int) -> int | None:
    """The user in whose name a process acts; None where there is none."""
    return next((int(line.split()[2]) for line in _status(pid) if line.startswith("Uid:")), None)


def writes(pid: int, path: Path) -> bool:
    """Whether a process has this very file open for writing. Raises PermissionError where we may not know that."""
    try:
        links = list(Path(f"/proc/{pid}/fd").iterdir())
    except (FileNotFoundError, ProcessLookupError):
        return False
    return any(_writes(link, path) for link in links)


def _writes(link: Path, path: Path) -> bool:
    try:
        if not link.samefile(path):
            return False
        lines = Path(f"/proc/{link.parts[2]}/fdinfo/{link.name}").read_text().splitlines()
    except (FileNotFoundError, ProcessLookupError):  # closed meanwhile
        return False
    flags = next(int(line.split()[1], 8) for line in lines if line.startswith("flags:"))
    return flags & os.O_ACCMODE != os.O_RDONLY


def _status(pid: int) -> list[str]:
    """The lines of /proc/PID/status; none where there is no such process."""
    try:
        return Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines()
    except (FileNotFoundError, ProcessLookupError):
        return []


def _stat(pid: int) -> list[str] | None:
    """The fields of /proc/PID/stat from the third (the state) on; the second, the name, may hold anything."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
