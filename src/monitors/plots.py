"""A page of plots of a run.

`python -m stoker.monitors.plots [RUN]` draws it, or that of every run, and prints its path.
"""

import math
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stoker import files
from stoker.config import UserError, complain
from stoker.daemon import registry
from stoker.daemon.journal import Journal
from stoker.daemon.rundir import ACTIVE, RunDir, Status
from stoker.training.core import evaluations

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMES = 12  # in a legend
FEW_POINTS = 40  # up to so many are marked one by one
HEALTHY_UPDATE = 1e-3  # of the weights' own size

Curves = dict[str, tuple[list[int], list[float]]]  # name -> steps, values


def draw(run: RunDir) -> Path:
    """Draw a run's page from its journals, whatever its state. Raises UserError if nothing was logged yet."""
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    curves, status = read(run), run.status()
    if not curves:
        raise UserError(f"{run.name} has not logged a step yet: there is nothing to draw")
    panels = [panel for panel in _panels(curves) if panel.curves]
    figure = Figure(figsize=(14, 3.2 * math.ceil(len(panels) / 2) + 0.6), layout="constrained")
    figure.suptitle(_title(run, status), fontsize=12)
    axes = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False, sharex=True).flatten()
    for panel, ax in zip(panels, axes):
        panel.draw(ax)
        _mark_best(ax, panel.curves, status.best)
    for ax in axes[len(panels) - 2:len(panels)]:
        ax.set_xlabel("step", fontsize=9)
        ax.tick_params(labelbottom=True)  # also where the page ends early
    for ax in axes[len(panels):]:
        ax.axis("off")
    files.write(run.plots, lambda file: figure.savefig(file, format="png", dpi=100), sync=False)
    return Path(run.plots)


def read(run: RunDir) -> Curves:
    """Every figure of the run's journals, each step once."""
    rows: dict[int, dict[str, Any]] = {}
    for path in (run.metrics, run.timings):
        for row in Journal(path).rows():
            rows.setdefault(row.pop("step"), {}).update(row)
    curves: Curves = {}
    for step, row in sorted(rows.items()):
        for name, value in row.items():
            steps, values = curves.setdefault(name, ([], []))
            steps.append(step)
            values.append(_number(value))
    return curves


def _number(value: Any) -> float:
    """JSON knows no NaN and no infinity: they are written as words. A damaged figure leaves a gap in its curve."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


@dataclass(frozen=True)
class Panel:
    title: str
    curves: Curves
    factor: float = 1.0
    from_zero: bool = False
    by_part: bool = False  # coloured in the order of the model's parts
    line: float | None = None  # what is healthy

    def draw(self, ax: "Axes") -> None:
        for i, (name, (steps, values)) in enumerate(self.curves.items()):
            shown = [self.factor * value if math.isfinite(value) else math.nan for value in values]
            ax.plot(steps, shown, color=self._color(i, name), linewidth=1.2, marker="." * (len(steps) <= FEW_POINTS),
                    label=name if i % math.ceil(len(self.curves) / MOST_NAMES) == 0 else None)
        if self.line is not None:
            ax.axhline(self.line, color="gray", linestyle=":", linewidth=1.5)
        self._scale(ax)
        ax.set_title(self.title, fontsize=10, loc="left")
        ax.tick_params(which="both", labelsize=8)
        ax.grid(alpha=0.3, which="both")
        ax.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)

    def _color(self, number: int, name: str) -> Any:
        from matplotlib import colormaps

        if not self.by_part:
            return f"C{number}"
        return "black" if name.endswith("grad_norm") else colormaps["viridis"](0.95 * number / len(self.curves))

    def _scale(self, ax: "Axes") -> None:
        """Logarithmic where the figures span more than a tenfold, with plain numbers all the same."""
        values = [value for _, values in self.curves.values() for value in values if math.isfinite(value)]
        if not self.from_zero and values and 0 < 10 * min(values) < max(values):
            ax.set_yscale("log")
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_formatter(lambda x, _: f"{x:g}" if f"{x:e}"[0] in "25" else "")
        elif self.from_zero:
            ax.set_ylim(0, 1.05 * max(ax.get_ylim()[1], 1e-9))


def _panels(curves: Curves) -> Iterable[Panel]:
    def chosen(fits: Callable[[str], bool], strip: str = "") -> Curves:
        return {name.removeprefix(strip): curve for name, curve in curves.items() if fits(name)}

    yield Panel("Loss", chosen(_is_score("loss")))
    for score in dict.fromkeys(name.rpartition("/")[2] for name in chosen(_is_any_score)):
        if score != "loss":
            yield Panel(score, chosen(_is_score(score)))
    yield Panel("Learning rate", chosen(lambda name: name == "lr"), from_zero=True)
    yield Panel("Norm of the gradients before clipping, all and by part",
                chosen(lambda name: name.endswith("grad_norm"))
                | chosen(lambda name: name.startswith("gradients/") and name != "gradients/zeros", "gradients/"),
                by_part=True)
    yield Panel("Size of an update against the weights, by part (dotted: healthy)",
                chosen(lambda name: name.startswith("updates/"), "updates/"), by_part=True, line=HEALTHY_UPDATE)
    drift = chosen(lambda name: name.endswith("/drift"), "weights/")
    yield Panel("Distance from the first weights, against the weights, by part",
                {name.removesuffix("/drift"): curve for name, curve in drift.items()}, by_part=True, from_zero=True)
    yield Panel("Speed", chosen(lambda name: name.endswith("_per_sec"), "speed/"))
    yield Panel("Shares of time and of the machine's peak (%)",
                chosen(lambda name: name in ("speed/data_share", "speed/peak_share", "speed/goodput"), "speed/"), 100,
                from_zero=True)
    yield Panel("GPU: use (%) and temperature (degrees)",
                chosen(lambda name: name in ("system/gpu_percent", "system/gpu_celsius"), "system/gpu_"),
                from_zero=True)
    memory = chosen(lambda name: name.startswith("system/") and name.endswith("_mb") and "disk" not in name, "system/")
    yield Panel("Memory (GB)", {name.removesuffix("_mb"): curve for name, curve in memory.items()}, 1 / 1024,
                from_zero=True)


def _is_any_score(name: str) -> bool:
    return name.startswith("train/") or evaluations.is_score(name)


def _is_score(score: str) -> Callable[[str], bool]:
    return lambda name: _is_any_score(name) and name.rpartition("/")[2] == score


def _mark_best(ax: "Axes", curves: Curves, best: float | None) -> None:
    """A star where the evaluation stands that is the best: the figure that has just this value."""
    for name, (steps, values) in curves.items():
        if evaluations.is_score(name) and best in values:
            step = steps[values.index(best)]
            ax.plot([step], [best], "*", color="black", markersize=12, zorder=3)
            ax.annotate(f"best: {best:.4g} at step {step:,}", (step, best), xytext=(0, 22), fontsize=9, ha="right",
                        textcoords="offset points")


def _title(run: RunDir, status: Status) -> str:
    reason, state = f" ({status.reason})" if status.reason else "", run.state()
    return f"{run.name}\nstep {status.step:,} of {status.of:,}" + (f", {state}{reason}" if state not in ACTIVE else "")


def main(argv: list[str]) -> int:
    """With a run: its page. Without: that of every run that has logged a step."""
    try:
        for run in [registry.find(argv[0])] if argv else [run for run in registry.runs() if read(run)]:
            print(draw(run))
        return 0
    except UserError as error:
        complain(error.problems)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
