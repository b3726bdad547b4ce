"""Pictures of attribution over layers, of ensembles' overlap, and of the nodes on transmission paths."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from retcon.drawing import figure
from retcon.locate.paths import Transmission

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def attribution_figure(
    carried: Mapping[str, Float[Tensor, " layers"]],
    interval: Mapping[str, Float[Tensor, " layers"]],
    chosen: Mapping[str, Int[Tensor, " layers"]],
    unit: str,
) -> "Figure":
    """Return per matrix over layers: the probability it carries (all attributions summed) with half its 95 % interval
    over facts on either side, and its units in the ensemble."""
    made, axes = figure(2, len(carried), max(3.4, 2.4 * len(carried)), 4.4, sharex=True, sharey="row")
    for i, (kind, sums) in enumerate(carried.items()):
        layers = range(len(sums))
        axes[0, i].bar(layers, sums.tolist(), color="0.7", yerr=interval[kind].tolist(), capsize=2)
        axes[0, i].axhline(0, color="black", linewidth=0.6)
        axes[0, i].set_title(kind, fontsize=9)
        axes[1, i].bar(layers, chosen[kind].tolist(), color="0.75", edgecolor="black", linewidth=0.6)
        axes[1, i].set_xlabel("layer")
        axes[1, i].xaxis.get_major_locator().set_params(integer=True)
    axes[0, 0].set_ylabel("probability carried,\n95 % over facts")
    axes[1, 0].set_ylabel(f"{unit}s in the ensemble")
    return made


def overlap_figure(same: Sequence[float], different: Sequence[float], by_chance: float) -> "Figure":
    """Return how alike the ensembles of two facts are (intersection over union): facts of one relation, and of two."""
    made, axes = figure(1, 1, 4.6, 3.0)
    axis = axes[0, 0]
    for of, label, style in (
        (same, "one relation", dict(histtype="stepfilled", color="0.75")),
        (different, "two relations", dict(histtype="step", color="black", linewidth=1.2)),
    ):
        if of:
            legend = f"{label}: mean {sum(of) / len(of):.2f} over {len(of):,} pairs"
            axis.hist(of, bins=40, range=(0, 1), weights=[1 / len(of)] * len(of), label=legend, **style)
    axis.axvline(by_chance, color="black", linestyle=":", label=f"by chance: {by_chance:.2f}")
    axis.set_xlabel("overlap of two facts' ensembles")
    axis.set_ylabel("share of pairs")
    axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    return made


def paths_figure(found: Transmission, score: str) -> "Figure":
    """Draw the scores of T+'s nodes in each layer, key and value nodes, above the mean of all (CTP, figure 4)."""
    kinds = list(dict.fromkeys(slot.site.kind for slot in found.slots))
    made, axes = figure(len(kinds), 1, 6.0, 2.3 * len(kinds), sharex=True)
    for axis, kind in zip(axes[:, 0], kinds, strict=True):
        slots = [(t, slot.site.layer) for t, slot in enumerate(found.slots) if slot.site.kind == kind]
        nodes = [(layer, score) for t, layer in slots for score in found.scores[t][found.positive.in_slot(t)].tolist()]
        axis.plot(*zip(*nodes, strict=True), "o", color="black", markersize=3, label="nodes of T+")
        axis.plot(
            [layer for _, layer in slots],
            [float(found.scores[t].double().mean()) for t, _ in slots],
            "--",
            color="0.5",
            label="mean of all nodes",
        )
        axis.set_title(f"{'value' if kind == 'down_proj' else 'key'} nodes ({kind})", fontsize=9, loc="left")
        axis.set_ylabel(f"score ({score})")
    axes[0, 0].legend(fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axes[-1, 0].set_xlabel("layer")
    axes[-1, 0].xaxis.get_major_locator().set_params(integer=True)
    return made
