"""Pictures of what the probes found, readable without colour; `retcon.drawing.save` writes them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from retcon.drawing import figure
from retcon.lm.prompts import Where
from retcon.locate.advice import Advice, Choice, span
from retcon.locate.contrast import Contrast, Quantity
from retcon.locate.tracing import GROUPS, RestoredKind, Trace, Traces

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STYLES: dict[str, dict[str, Any]] = {
    "original": dict(color="black", linestyle="-", marker="o", label="original answer"),
    "target": dict(color="0.45", linestyle="--", marker="s", label="target answer"),
    "factual": dict(color="0.45", linestyle="-", marker="^", label="factual words"),
    "non_factual": dict(color="0.45", linestyle=":", marker="v", label="non-factual words"),
    "stopword": dict(color="black", linestyle="-.", marker="x", label="stopwords"),
    "left": dict(color="0.65", linestyle="--", marker="", label="all other tokens"),
}
"""How a set's curve differs from the others, in black and white too."""
POSITIONS: dict[Where, str] = {"subject_last": "subject's last token", "prediction": "prediction position"}
READINGS = {False: "without final norm", True: "with final norm"}
_QUANTITIES: tuple[Quantity, Quantity] = ("mean_prob", "mean_rank")
KINDS: dict[RestoredKind, str] = {
    "block": "block output",
    "mlp": "MLP outputs, {window} layers",
    "attn": "attention outputs, {window} layers",
    "severed_mlp": "block output, MLPs severed",
    "severed_attn": "block output, attention severed",
}
LEAST_DRAWN = 1e-12
"""Least probability at which a logarithmic axis begins."""


# --- contrast ----------------------------------------------------------------------------------------------------


def contrast_figure(contrast: Contrast, advice: Advice | None = None) -> "Figure":
    """Draw probability and rank of both answers over layers (JEEP, figure 2), for every reading."""
    columns = [(final_norm, where) for final_norm in contrast.norms for where in contrast.positions]
    made, axes = figure(2, len(columns), 2.9 * len(columns), 4.4, sharex=True)
    for i, (final_norm, where) in enumerate(columns):
        for axis, quantity in zip(axes[:, i], _QUANTITIES, strict=True):
            for of in ("original", "target"):
                _curve(axis, contrast, quantity, of, where, final_norm)
            if advice is not None:
                _band(axis, advice.low if where == "subject_last" else advice.high)
        axes[0, i].set_title(f"{POSITIONS[where]},\n{READINGS[final_norm]}", fontsize=9)
        _rank_axis([axes[1, i]])
        _layer_axis(axes[1, i], contrast.n_layers, embedding=True)
    axes[0, 0].set_ylabel("probability")
    axes[1, 0].set_ylabel("rank (0 is the top)")
    axes[0, -1].legend(fontsize=8, loc="center left")
    return made


def sets_figure(contrast: Contrast) -> "Figure":
    """Draw probability per token, and rank, of word sets at the prediction position (JEEP, figure 5)."""
    where: Where = "prediction"
    shown = [of for of in STYLES if of in contrast.sets and of != "target"]
    made, axes = figure(2, len(contrast.norms), 3.8 * len(contrast.norms), 5.2, sharex=True, sharey="row")
    for i, final_norm in enumerate(contrast.norms):
        for of in shown:
            if int((contrast.size[:, contrast.sets.index(of)] > 0).sum()):
                for axis, quantity in zip(axes[:, i], _QUANTITIES, strict=True):
                    _curve(axis, contrast, quantity, of, where, final_norm)
        axes[0, i].set_title(f"{POSITIONS[where]},\n{READINGS[final_norm]}", fontsize=9)
        _layer_axis(axes[1, i], contrast.n_layers, embedding=True)
    axes[0, 0].set_yscale("log")
    lowest = min((y for y in _heights(axes[0]) if y > 0), default=1.0)
    axes[0, 0].set_ylim(bottom=max(0.3 * lowest, LEAST_DRAWN))  # an interval that reaches 0 has no end on this scale
    _rank_axis(axes[1])
    axes[0, 0].set_ylabel("probability per token")
    axes[1, 0].set_ylabel("mean rank (0 is the top)")
    made.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=3, fontsize=8)
    return made


def _curve(axis: "Axes", contrast: Contrast, quantity: Quantity, of: str, where: Where, final_norm: bool) -> None:
    curve = contrast.curve(quantity, of, where, final_norm=final_norm)
    style = {"markersize": 3.5, "linewidth": 1.3, **STYLES[of]}
    axis.plot(curve.layers, curve.mean.tolist(), **style)
    low, high = (curve.mean - curve.half_width).tolist(), (curve.mean + curve.half_width).tolist()
    axis.fill_between(curve.layers, low, high, color=STYLES[of]["color"], alpha=0.15, linewidth=0)


def _heights(axes: "Sequence[Axes]") -> list[float]:
    """Return where the curves of some axes run."""
    lines: Any = [line for axis in axes for line in axis.get_lines()]
    return [float(y) for line in lines for y in line.get_ydata()]


def _rank_axis(axes: "Sequence[Axes]") -> None:
    """Let ranks fall upwards, on a logarithmic scale where they span orders of magnitude; shared axes come together."""
    heights = _heights(axes)
    if max(heights) > 20 * min(heights):
        axes[0].set_yscale("symlog", linthresh=1)
        axes[0].set_ylim(1.5 * max(heights), 0)
    else:
        axes[0].invert_yaxis()


def _layer_axis(axis: "Axes", n_layers: int, *, embedding: bool = False) -> None:
    step = max(1, -(-n_layers // 8))
    ticks = list(range(step if embedding and step > 1 else 0, n_layers, step))  # E and 0 would touch
    axis.set_xticks([-1, *ticks] if embedding else ticks, [*(["E"] if embedding else []), *map(str, ticks)])
    axis.set_xlabel("layer (E: embedding)" if embedding else "layer")


def _band(axis: "Axes", choice: Choice, label: str | None = None) -> None:
    first, last = choice.layers[0] - 0.5, choice.layers[-1] + 0.5
    axis.axvspan(first, last, facecolor="none", edgecolor="0.6", hatch="////", linewidth=0, zorder=0, label=label)


# --- advice ------------------------------------------------------------------------------------------------------


def advice_figure(advice: Advice) -> "Figure":
    """Return the contrast Δ of every layer with the layers advised, and how resamples of the cases would choose."""
    made, axes = figure(2, 2, 7.6, 4.8, height_ratios=[3, 2])
    for i, (name, choice) in enumerate((("low", advice.low), ("high", advice.high))):
        delta, half = advice.contrast[choice.where].tolist(), advice.half_width[choice.where].tolist()
        upper, lower = axes[:, i]
        upper.axhline(0, color="0.6", linewidth=0.8)
        upper.errorbar(
            range(len(delta)), delta, half, color="black", marker="o", markersize=3.5, capsize=2, linewidth=1.2
        )
        _band(upper, choice, f"{name} group: {span(choice.layers)}")
        upper.set_title(POSITIONS[choice.where], fontsize=9)
        upper.legend(fontsize=8)
        lower.bar(range(len(choice.starts)), choice.shares.tolist(), color="0.75", edgecolor="black", width=0.6)
        width = len(choice.layers)
        lower.set_xticks(range(len(choice.starts)), [span(range(s, s + width)) for s in choice.starts], fontsize=8)
        lower.tick_params(axis="x", rotation=90 if len(choice.starts) > 8 else 0)
        lower.set_ylim(0, 1)
        lower.set_xlabel(f"{name} group")
        _layer_axis(upper, len(delta))
    axes[0, 0].set_ylabel("contrast Δ per layer")
    axes[1, 0].set_ylabel("share of resamples")
    return made


# --- tracing -----------------------------------------------------------------------------------------------------


def trace_figure(trace: Trace, window: int) -> "Figure":
    """Return one prompt's heat maps: the answer's probability with a state restored, darkest where highest."""
    labels = [repr(t)[1:-1] + ("*" if i in trace.subject else "") for i, t in enumerate(trace.tokens)]
    tables = {kind: scores.tolist() for kind, scores in trace.scores.items()}
    return _heat_maps(tables, labels, window, trace.low, trace.high, f"p({trace.answer.strip()})")


def effects_figure(traces: Traces) -> "Figure":
    """Draw average indirect effects by kind of token and layer."""
    averages = {kind: traces.average(kind) for kind in traces.settings.kinds}
    counts = next(iter(averages.values())).n
    labels = [f"{group} (n={n})" for group, n in zip(GROUPS, counts, strict=True)]
    highest = max(float(a.mean.nan_to_num(0.0).max()) for a in averages.values())
    tables = {kind: a.mean.tolist() for kind, a in averages.items()}
    return _heat_maps(tables, labels, traces.settings.window, 0.0, highest, "average indirect effect")


def _heat_maps(
    tables: dict[RestoredKind, list[list[float]]],
    labels: Sequence[str],
    window: int,
    low: float,
    high: float,
    what: str,
) -> "Figure":
    n_layers = len(next(iter(tables.values()))[0])
    per = max(2.2, 0.16 * n_layers + 1)
    made, axes = figure(1, len(tables), per * len(tables) + 1.6, 0.24 * len(labels) + 1.5, sharey=True)
    for axis, (kind, table) in zip(axes[0], tables.items(), strict=True):
        image = axis.imshow(table, cmap="Greys", vmin=low, vmax=max(high, low + 1e-6), aspect="auto")
        axis.set_title(KINDS[kind].format(window=window), fontsize=8)
        _layer_axis(axis, n_layers)
    axes[0, 0].set_yticks(range(len(labels)), labels, fontsize=8)
    made.colorbar(image, ax=list(axes[0]), label=what)
    return made
