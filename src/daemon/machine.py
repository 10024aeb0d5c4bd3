"""What this machine is, and what it will do to a run behind its back: kill it at log-out or for want of memory, sleep
when the lid closes."""

import getpass
import os
import re
import subprocess
from pathlib import Path

# systemd-logind: logind.conf(5). Later files win, and within them the last line.
LOGIND = ("/usr/lib/systemd/logind.conf", "/etc/systemd/logind.conf", "/usr/lib/systemd/logind.conf.d/*.conf",
          "/etc/systemd/logind.conf.d/*.conf")


def warnings(root: Path = Path("/")) -> list[str]:
    """A line for each thing that would end or suspend a background run, with what to do about it."""
    if not (root / "run/systemd/system").exists():  # no systemd, no login manager of that kind
        return []
    settings, found = _logind(root), []
    user = getpass.getuser()
    lingers = (root / "var/lib/systemd/linger" / user).exists()
    if settings.get("KillUserProcesses", "no") in ("yes", "true", "1", "on") and not lingers:
        found.append(f"this machine ends your processes when you log out: loginctl enable-linger {user} prevents it")
    has_lid = any((root / "proc/acpi/button/lid").glob("*/state"))
    action = settings.get("HandleLidSwitch", "suspend")
    if has_lid and action != "ignore":
        found.append(f"closing the lid will {action} this machine; the run waits and goes on when it wakes "
                     "(HandleLidSwitch=ignore in /etc/systemd/logind.conf keeps it running)")
    return found


def memory_kills(root: Path = Path("/")) -> int | None:
    """How often the kernel has ended a process of our control group for want of memory; None where it does not
    count that.

    memory.events of version 2, memory.oom_control of version 1. Inside a container the group's own path may not be
    mounted: then what is mounted is the container's.
    """
    lines = [line.split(":", 2) for line in (root / "proc/self/cgroup").read_text().splitlines()]
    for _, controllers, group in lines:
        if controllers in ("", "memory"):
            base = root / "sys/fs/cgroup" / controllers
            name = "memory.oom_control" if controllers else "memory.events"
            for path in (base / group.lstrip("/") / name, base / name):
                if path.is_file() and (found := re.search(r"^oom_kill (\d+)$", path.read_text(), re.MULTILINE)):
                    return int(found[1])
    return None


def was_killed_for_memory(pid: int, since: float, log: Path = Path("/dev/kmsg")) -> bool:
    """Whether the kernel's log says so of a process started `since` seconds after boot. Often it cannot be read."""
    try:
        with open(os.open(log, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as records:
            while record := records.read(8192):  # None where there are no more
                stamp, _, text = record.partition(b";")
                if re.search(rb"Killed process %d\b" % pid, text) and int(stamp.split(b",")[2]) / 1e6 >= since:
                    return True
    except OSError:  # not allowed; or records went while they were read
        pass
    return False


def hardware(root: Path = Path("/")) -> str:
    """The recipe for this machine: `high` with a GPU of 10 GB or more, `mid` with a smaller one, `low` without."""
    megabytes = max(_nvidia() + _amd(root), default=0)
    return "high" if megabytes >= 10_000 else "mid" if megabytes else "low"


def has_nvidia_gpu() -> bool:
    """Whether the driver's own program lists a GPU."""
    return bool(_nvidia())


def processor(root: Path = Path("/")) -> str:
    """The CPU's model, as the kernel names it."""
    lines = (line.partition(":") for line in (root / "proc/cpuinfo").read_text().splitlines())
    return next((value.strip() for key, _, value in lines if key.strip() == "model name"), "unnamed")


def _nvidia() -> list[int]:
    """Memory of each GPU in MB, as the driver's own program prints it."""
    try:
        ran = subprocess.run(["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"],
                             capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [int(line) for line in ran.stdout.split() if line.isdecimal()]


def _amd(root: Path) -> list[int]:
    return [int(path.read_text()) // 2**20 for path in root.glob("sys/class/drm/card*/device/mem_info_vram_total")]


def _logind(root: Path) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pattern in LOGIND:
        for path in sorted(root.glob(pattern.lstrip("/"))):
            lines = [line.strip() for line in path.read_text().splitlines()]
            pairs = [line.partition("=") for line in lines if "=" in line and not line.startswith(("#", ";"))]
            settings |= {key.strip(): value.strip() for key, _, value in pairs}
    return settings
