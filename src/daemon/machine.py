"""What this machine will do to a run behind its back: kill it at log-out, sleep when the lid closes."""

import getpass
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


def _logind(root: Path) -> dict[str, str]:
    settings: dict[str, str] = {}
    for pattern in LOGIND:
        for path in sorted(root.glob(pattern.lstrip("/"))):
            lines = [line.strip() for line in path.read_text().splitlines()]
            pairs = [line.partition("=") for line in lines if "=" in line and not line.startswith(("#", ";"))]
            settings |= {key.strip(): value.strip() for key, _, value in pairs}
    return settings
