"""The curves of a run, drawn from metrics.jsonl with matplotlib: over tokens, dark on light, no network, no
display."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure  # used without pyplot: no display is looked for, no global state
from matplotlib.ticker import EngFormatter

from trainer.observe.metrics import AXIS, PARTS, find

MAX_POINTS = 1200  # of a curve: more than the screen has pixels only makes the file heavy
COLOURS = ("#1f5fa8", "#d1602b", "#3a8f5c", "#8a4fa3", "#b08900", "#666666")
PART_COLOURS = dict(
    zip(
        PARTS,
        ("#b08900", "#1f5fa8", "#5b9bd5", "#3a8f5c", "#8a4fa3", "#c99bd8", "#d1602b", "#666666", "#cccccc"),
    )
)
STYLE: Any = {
    "font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": "#999999",
    "axes.grid": True, "grid.color": "#e6e6e6", "grid.linewidth": 0.8, "axes.axisbelow": True,
    "axes.titlesize": 10, "axes.titleweight": "bold", "axes.titlelocation": "left", "text.color": "#222222",
    "axes.labelcolor": "#444444", "xtick.color": "#444444", "ytick.color": "#444444", "legend.frameon": False,
    "svg.fonttype": "none", "figure.facecolor": "white",
}  # fmt: skip


@dataclass(frozen=True)
class Plot:
    """One picture: the metrics in it (those that the run has), and how."""

    title: str
    names: tuple[str, ...]
    log: bool = False
    smooth: bool = False  # the raw curve pale, its running mean on top
    points: bool = False  # few values: mark each


PLOTS = (
    Plot("loss", ("train/loss", "val/loss"), smooth=True),
    Plot("bits per byte of held-out text", ("val/bpb",), points=True),
    Plot("accuracy", ("train/accuracy", "val/accuracy"), smooth=True),
    Plot("reward", ("rl/reward", "rl/pass@1"), smooth=True),
    Plot("length of completions", ("rl/length",), smooth=True),
    Plot("entropy", ("rl/entropy",), smooth=True),
    Plot("KL from the reference", ("rl/kl",), smooth=True),
    Plot("sampler against trainer", ("rl/logprob_mismatch",), log=True),
    Plot("gradient norm before clipping", ("train/grad_norm",), log=True, smooth=True),
    Plot("learning rate", ("train/lr",)),
    Plot("tokens per second", ("speed/tokens_per_s",), smooth=True),
    Plot("model FLOPs utilisation", ("speed/mfu",), smooth=True),
)


def series(records: Sequence[dict[str, Any]], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, values), each float64 [n], of the records that have the metric; not-finite values are NaN."""
    pairs = [(record[AXIS], record[name]) for record in records if name in record]
    if not pairs:
        return np.empty(0), np.empty(0)
    tokens, values = np.array(pairs, dtype=np.float64).T
    return tokens, np.where(np.isfinite(values), values, np.nan)


def thin(tokens: np.ndarray, values: np.ndarray, points: int = MAX_POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `points` points: the means of equal stretches (a stretch that is all NaN stays NaN)."""
    if len(tokens) <= points:
        return tokens, values
    edges = np.linspace(0, len(tokens), points + 1).astype(int)[:-1]
    counts = np.add.reduceat(np.isfinite(values).astype(float), edges)
    sums = np.add.reduceat(np.nan_to_num(values), edges)
    with np.errstate(invalid="ignore"):
        return np.maximum.reduceat(tokens, edges), sums / np.where(counts == 0, np.nan, counts)


def running_mean(values: np.ndarray) -> np.ndarray:
    """Mean of each value and its neighbours on both sides (no lag), a thirtieth of the curve in all; NaNs
    left out."""
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    here, reach = np.arange(len(values)), max(1, len(values) // 60)
    begin, end = np.maximum(here - reach, 0), np.minimum(here + reach + 1, len(values))
    inside = counts[end] - counts[begin]
    return (sums[end] - sums[begin]) / np.where(inside == 0, np.nan, inside)


def draw(axes: Axes, plot: Plot, records: Sequence[dict[str, Any]], resumed_at: Sequence[float] = ()) -> bool:
    """Draws `plot` from the records of metrics.jsonl; False if the run has none of its metrics.
    `resumed_at`: tokens at which an attempt went on, marked by dotted lines."""
    drawn = 0
    for colour, name in zip(COLOURS, plot.names):
        tokens, values = series(records, name)
        if not np.isfinite(values).any():
            continue
        few = plot.points or len(values) <= 40
        label = name if len(plot.names) > 1 else None
        if plot.smooth and not few:
            axes.plot(*thin(tokens, values), color=colour, alpha=0.3, linewidth=0.8)
            axes.plot(*thin(tokens, running_mean(values)), color=colour, linewidth=1.6, label=label)
        else:
            axes.plot(
                *thin(tokens, values), color=colour, linewidth=1.6, label=label, marker="." if few else None
            )
        drawn += 1
    if not drawn:
        return False
    for tokens_then in resumed_at:
        axes.axvline(tokens_then, color="#999999", linestyle=":", linewidth=1)
    if plot.log:
        axes.set_yscale("log")
    else:
        axes.ticklabel_format(axis="y", style="sci", scilimits=(-3, 5), useMathText=True)
    if drawn > 1:
        axes.legend()
    unit = find(plot.names[0]).unit
    axes.set_title(plot.title + (f"  ({unit})" if unit else ""))
    _token_axis(axes)
    return True


def draw_time(axes: Axes, records: Sequence[dict[str, Any]]) -> bool:
    """Seconds of a step by part, stacked; False if the run has no such metrics."""
    shown = [part for part in PARTS if np.nansum(series(records, f"speed/{part}_s")[1]) > 0]
    if not shown:
        return False
    curves = [thin(*series(records, f"speed/{part}_s"), 150) for part in shown]
    if len({len(tokens) for tokens, _ in curves}) != 1:  # a part that only some steps have cannot be stacked
        return False
    axes.stackplot(
        curves[0][0], [np.nan_to_num(values) for _, values in curves], labels=shown,
        colors=[PART_COLOURS[part] for part in shown],
    )  # fmt: skip
    axes.set_title("where the time of a step goes  (s)")
    axes.set_ylim(0, axes.get_ylim()[1] * 1.35)  # room for the legend
    axes.legend(ncols=4, fontsize=8, loc="upper right")
    _token_axis(axes)
    return True


def _token_axis(axes: Axes) -> None:
    axes.set_xlabel("tokens")
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(EngFormatter(sep=""))


def svgs(records: Sequence[dict[str, Any]], resumed_at: Sequence[float] = ()) -> list[str]:
    """All pictures that the run has data for, each as an <svg> element to be put into a page."""
    pictures = []
    with matplotlib.rc_context(STYLE):
        for plot in (*PLOTS, None):
            figure = Figure(figsize=(5.4, 2.9), layout="constrained")
            axes = figure.subplots()
            there = draw(axes, plot, records, resumed_at) if plot else draw_time(axes, records)
            if there:
                pictures.append(_as_svg(figure))
    return pictures


def _as_svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return out.getvalue()[out.getvalue().index("<svg") :]


def save_png(records: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """The loss and bits-per-byte curves side by side (or whichever there are) as one PNG."""
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(10, 3.6), layout="constrained")
        for axes, plot in zip(figure.subplots(1, 2), PLOTS):
            if not draw(axes, plot, records):
                axes.remove()
        figure.suptitle(title, fontweight="bold")
        figure.savefig(path, dpi=130)
