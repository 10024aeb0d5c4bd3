"""The table of runs that `ps.sh` prints."""

import math
import time
from typing import Any

from stoker.config import printable
from stoker.daemon import deaths
from stoker.daemon.rundir import ACTIVE, RESTARTING, RunDir, name_problem

RATES = ("wer", "cer", "acc", "_share", "recall_1", "recall_5", "recall_10")  # shown in percent
COLUMNS = ("RUN", "STATE", "PID", "STEP", "LOSS", "BEST", "SPEED", "ETA", "HEARTBEAT", "NOTE")


def row(run: RunDir) -> dict[str, Any]:
    """One run, as `ps.sh --json` gives it: seconds, not words."""
    status, state, holder, watching = run.status(), run.state(), run.holder(), run.supervisor()
    death = deaths.last(run) if state in (*ACTIVE, RESTARTING, "stalled", "paused") else None
    pid = holder.pid if holder else status.pid if state == "died" else None
    return {
        "run": run.name, "state": state, "pid": pid, "step": status.step, "of": status.of,
        "loss": status.loss, "best": status.best, "best_metric": status.best_metric, "best_mode": status.best_mode,
        "speed": status.speed if holder else "",
        "eta_seconds": status.eta_seconds if holder else None,
        "busy_seconds": round(status.busy_seconds, 1), "expected_seconds": status.expected_seconds,
        "heartbeat_seconds": round(max(0.0, time.time() - status.heartbeat), 1), "reason": status.reason,
        "phase": status.phase if holder else "", "budget_seconds": status.budget,
        "stalled_seconds": round(run.silent_seconds(status), 1) if state == "stalled" else None,
        "supervisor": watching.pid if watching else None,
        "unwatched": bool(holder and status.supervisor and not watching),
        "last_death": f"at step {death.step}: {death.cause}" if death else "",
        "switched_off": status.switched_off, "folder": str(run.path),
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [COLUMNS, *(tuple(map(printable, _words(row))) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines)


def _words(run: dict[str, Any]) -> tuple[str, ...]:
    name = run["folder"] if name_problem(run["run"]) else run["run"]  # as the commands find it
    return (
        name, run["state"], str(run["pid"] or "-"), f"{run['step']}/{run['of'] or '?'}", figure("loss", run["loss"]),
        _best(run), run["speed"] or "-", duration(run["eta_seconds"]),
        f"{duration(run['heartbeat_seconds'])} ago", _note(run),
    )


def _best(run: dict[str, Any]) -> str:
    """`wer 34.1%`, `ppl 73.1`, `loss 4.234`."""
    best = figure(run["best_metric"], run["best"])
    return best if run["best"] is None else f"{run['best_metric']} {best}".strip()


def _note(run: dict[str, Any]) -> str:
    parts = [run["reason"] + (f" (switched off: {', '.join(run['switched_off'])})" if run["switched_off"] else "")]
    if run["state"] == "finished" and run["expected_seconds"] is not None:
        parts.append(f"took {duration(run['busy_seconds'])}, estimated {duration(run['expected_seconds'])}")
    if run["stalled_seconds"] is not None:
        parts.append(f"no progress for {duration(run['stalled_seconds'])} in phase {run['phase']!r}, "
                     f"at most {duration(run['budget_seconds'])} are usual")
    if run["last_death"] and run["state"] != RESTARTING:  # else the reason says so
        parts.append(f"died {run['last_death']}")
    if run["unwatched"]:
        parts.append("its supervisor is gone")
    return "; ".join(part.strip() for part in parts if part)


def figure(name: str, value: float | None) -> str:
    """A metric as it is shown everywhere: `34.1%`, a perplexity `73.1`, others `4.234`; `-` for None."""
    if value is None:
        return "-"
    if name.endswith(RATES):
        return f"{number(100 * value, 1)}%"
    return number(value, 1 if name.endswith("ppl") else 3)


def number(value: float, places: int) -> str:
    """A number with so many decimal places, such as `4.234`. If they show less than two digits of it, with two digits:
    `0.0042`, `4.2e-05`; from a million on, with four: `1.235e+07`."""
    magnitude = abs(value)
    if magnitude >= 1e6:
        return f"{value:.4g}"
    return f"{value:.2g}" if 0 < magnitude < 10 ** (1 - places) else f"{value:.{places}f}"


def size(count: float) -> str:
    """Bytes as a person reads them: `12 MB`, `5.6 GB`."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def duration(seconds: float | None) -> str:
    """`45s`, `12m05s`, `1h02m`, `3d04h`; `-` for None and what is not finite."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    whole = round(seconds)
    if whole < 60:
        return f"{whole}s"
    if whole < 3600:
        return f"{whole // 60}m{whole % 60:02d}s"
    if whole < 86400:
        return f"{whole // 3600}h{whole % 3600 // 60:02d}m"
    return f"{whole // 86400}d{whole % 86400 // 3600:02d}h"
