"""The results of a study in two plots: perplexity against sparsity, and against the bytes that a client uploads.

Colours are those of Okabe and Ito ("Color Universal Design", 2008), which colour-blind people can tell apart;
two of Paul Tol's follow, and markers repeat the information.
"""

import importlib.util
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedspallm_appfl.errors import ConfigError, extra
from fedspallm_appfl.reports.parts import bytes_text
from fedspallm_appfl.study.report import Study, spread
from fedspallm_appfl.tensors.target import parse_target

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SPARSITY, BYTES = "perplexity_sparsity", "perplexity_bytes"
KINDS = ("png", "svg")
FILES = tuple(f"{name}.{kind}" for name in (SPARSITY, BYTES) for kind in KINDS)
COLOURS = ("#D55E00", "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#882255", "#999933")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">", "p", "h")
GREY = "#555555"  # what is no federation
ALONE, POOLED = (0, (1, 1.5)), (0, (5, 2))  # dashes
COLUMNS = 3
STYLE: Any = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#E4E4E4",
    "axes.axisbelow": True,
    "legend.frameon": False,
    "svg.hashsalt": "fedspallm",
}


def require() -> None:
    """Check early that plots can be made.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError(f"a study draws plots with matplotlib, which is not installed; {extra('study')}")


def write(study: Study, folder: Path) -> None:
    """Write both plots as PNG and SVG."""
    import matplotlib

    matplotlib.use("Agg")
    with matplotlib.rc_context(STYLE):
        for name, draw in ((SPARSITY, _against_sparsity), (BYTES, _against_bytes)):
            _save(draw(study), folder / name)


def _save(figure: "Figure", stem: Path) -> None:
    from matplotlib import pyplot

    for kind in KINDS:
        figure.savefig(f"{stem}.{kind}", dpi=200, metadata={"Date": None} if kind == "svg" else None)
    pyplot.close(figure)


def _look(study: Study, method: str) -> dict[str, Any]:
    """Colour, marker and line of a method, the same in both plots; what is no federation is grey."""
    algorithm = study.algorithms[method]
    if not algorithm.federates:
        dashes = ALONE if algorithm.apart else POOLED
        marker = MARKERS[study.methods.index(method) % len(MARKERS)]
        return {"color": GREY, "linestyle": dashes, "linewidth": 1.6, "marker": marker, "markersize": 5}
    number = [one for one in study.methods if study.sends(one)].index(method)
    colour, marker = COLOURS[number % len(COLOURS)], MARKERS[number % len(MARKERS)]
    return {"color": colour, "linestyle": "-", "linewidth": 1.6, "marker": marker, "markersize": 7}


def _dense(axes: "Axes", study: Study) -> None:
    axes.axhline(study.dense.mean, color="black", linewidth=1.2, label="dense")


def _against_sparsity(study: Study) -> "Figure":
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    places = {target: _place(target) for target in study.targets}
    ratios = sorted((target for target in study.targets if ":" not in target), key=places.__getitem__)
    patterns = [target for target in study.targets if ":" in target]
    for method in study.methods:
        look = _look(study, method)
        _points(axes, study, method, ratios, look | {"label": method})
        name = {} if ratios else {"label": method}
        _points(axes, study, method, patterns, look | {"linestyle": "none", "markerfacecolor": "white"} | name)
    _dense(axes, study)
    _scale(axes)
    axes.set(xlabel="sparsity", ylabel="perplexity (geometric mean over texts)")
    axes.xaxis.set_major_formatter(lambda share, _: f"{100 * share:.0f} %")
    axes.set_xticks(sorted(set(places.values())))
    axes.margins(x=0.08)
    _legend_from_worst_to_best(figure, axes, study)
    return figure


def _place(target: str) -> float:
    """Where a target stands on the axis: its share of zeros."""
    return float(parse_target(target).share)


def _points(axes: "Axes", study: Study, method: str, targets: list[str], look: dict[str, Any]) -> None:
    if targets:
        places = [_place(target) for target in targets]
        means = [spread([cell.mean for cell in study.of(method, target)]) for target in targets]
        heights = [mean.mean if math.isfinite(mean.mean) else math.nan for mean in means]
        axes.errorbar(places, heights, [mean.deviation or 0 for mean in means], capsize=3, elinewidth=1, **look)


def _scale(axes: "Axes") -> None:
    """Logarithmic, with plain numbers: equal steps are equal ratios of perplexity."""
    from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter

    low, high = axes.get_ylim()
    axes.set_yscale("log")
    wide = high > 6 * max(low, 1)
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)) if wide else MaxNLocator(6, steps=[1, 2, 2.5, 5, 10]))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))


def _legend_from_worst_to_best(figure: "Figure", axes: "Axes", study: Study) -> None:
    """Names in the order in which their lines end on the right."""
    handles, labels = _handles(axes)
    last = max(study.targets, key=_place)
    height = {m: spread([cell.mean for cell in study.of(m, last)]).mean for m in study.methods} | {"dense": 0}
    order = sorted(range(len(labels)), key=lambda i: -height[labels[i]])
    figure.legend([handles[i] for i in order], [labels[i] for i in order], loc="outside right center")


def _handles(axes: "Axes") -> tuple[list[Any], list[str]]:
    """Entries of a legend: lines and markers without error bars."""
    handles, labels = axes.get_legend_handles_labels()
    return [handle[0] if isinstance(handle, tuple) else handle for handle in handles], labels


def _against_bytes(study: Study) -> "Figure":
    from matplotlib import pyplot

    columns = min(COLUMNS, len(study.targets))
    rows = math.ceil(len(study.targets) / columns)
    size = (max(6.0, 3.4 * columns), 3.6 * rows + 1)
    figure, panels = pyplot.subplots(rows, columns, figsize=size, layout="constrained", squeeze=False, sharex=True)
    for axes, target in zip(panels.flat, study.targets, strict=False):
        _panel(axes, study, target)
    for axes in panels.flat[len(study.targets) :]:
        axes.remove()
    named = {label: handle for axes in figure.axes for handle, label in zip(*_handles(axes), strict=True)}
    figure.legend(named.values(), named, loc="outside lower center", ncols=4 if columns > 1 else 2)
    figure.supylabel("perplexity (geometric mean over texts)", fontsize=12)
    return figure


def _panel(axes: "Axes", study: Study, target: str) -> None:
    """One target."""
    from matplotlib.ticker import LogLocator, NullLocator

    for method in study.methods:
        cells, look = study.of(method, target), _look(study, method)
        mean = spread([cell.mean for cell in cells])
        if not math.isfinite(mean.mean):
            continue
        if study.sends(method):
            sent = spread([cell.up_a_client for cell in cells]).mean
            hollow = {
                "linestyle": "none",
                "markerfacecolor": "none",
                "markersize": 8,
                "markeredgewidth": 1.8,
            }  # others show through
            axes.errorbar(sent, mean.mean, mean.deviation or 0, elinewidth=1, label=method, **look | hollow)
        else:
            axes.axhline(mean.mean, label=method, **look | {"marker": None})
    _dense(axes, study)
    _scale(axes)
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(lambda count, _: bytes_text(count).replace(".0", ""))
    axes.tick_params(axis="x", labelbottom=True)
    axes.margins(x=0.15)
    axes.set_title(f"sparsity {target}", fontsize=12)
    axes.set_xlabel("bytes uploaded per client")
