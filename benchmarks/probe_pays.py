"""Does the probes' advice pay? JEEP's low and high group swept over all positions, and how well probes foretell it.

    python -m benchmarks.probe_pays --model demo:gptj --out docs/probes/sweep-demo-gptj
    python -m benchmarks.probe_pays --model PATH --data counterfact-edit.json --corpus text.txt --start 1000 --out STEM
    python -m benchmarks.probe_pays --model .cache/worlds/gptj-16 --out STEM

For every position of a group as wide as the advice's, the same edits are written in one batch with the model's other
settings (its preset) and the other group where the preset has it (with `--alone` also without the other group). Beside
them stand the preset's own two groups, and the two that the probe advises. A model that no preset knows is edited by
the rule for such models, which fits the clamps to the edits anew at every position; a preset's clamps stay.
Evidence for a position is taken on other facts than those edited: the contrast-based probe's sum of Δ over the group,
and causal tracing's average indirect effect there (last subject token for the low group, last token for the high one),
summed over the group. Spearman's rank correlation of evidence and Score over positions, with the p of a permutation
test, exact up to eight positions.

Rows go to STEM.jsonl as they are done, and what is there is not done again; at the end the evidence goes to STEM.json,
and STEM.png and .svg are drawn.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import retcon
from benchmarks.common import (
    METRICS,
    cases_of,
    command_line,
    edited_and_measured,
    estimated,
    jeep_of,
    machine,
    moments_of,
    print_row,
    spearman,
)
from retcon.cli.probe.shared import rounded
from retcon.drawing import figure, save
from retcon.evaluation import evaluate
from retcon.lm.model import LM
from retcon.locate import Advice, Rule, Tracing, advise, causal_trace, contrast_probe, figures
from retcon.locate.tracing import default_window

SHUFFLES = 20_160
EVIDENCE = ("contrast", "contrast, no norm", "trace block", "trace mlp", "trace attn")


def windows(n_layers: int, width: int) -> list[tuple[int, ...]]:
    return [tuple(range(first, first + width)) for first in range(n_layers - width + 1)]


def sweep(lm: LM, args: argparse.Namespace, advice: Advice, rows: list[dict[str, Any]], out: Path) -> bool:
    """Append a row per position and setting of the other group to `rows` and the file; return whether all are done."""
    rule = Rule()
    cases = cases_of(args.data, args.start, args.edits, args.seed)
    edits = [case.edits[0] for case in cases]
    preset = jeep_of(lm, args.dataset, cases=edits)
    groups = {"low": preset.low, "high": preset.high}
    asked: list[tuple[str, tuple[int, ...], str, dict[str, tuple[int, ...]]]] = []
    for swept, share in (("low", rule.low_share), ("high", rule.high_share)):
        other = "high" if swept == "low" else "low"
        positions = windows(lm.n_layers, rule.width(share, lm.n_layers))
        for with_other, layers in itertools.product((True, False) if args.alone else (True,), positions):
            kept = groups[other] if with_other else ()
            asked.append((swept, layers, "preset" if with_other else "none", {swept: layers, other: kept}))
    for name, both in (("preset", groups), ("advice", {"low": advice.low.layers, "high": advice.high.layers})):
        asked.append((name, both["low"], str(list(both["high"])), both))
    done = {(r["swept"], tuple(r["layers"]), r["other"]) for r in rows}
    asked = [each for each in asked if each[:3] not in done]
    if not asked:
        return True
    contexts, moments = retcon.sample_contexts(lm, seed=args.seed), moments_of(lm, args.corpus)
    moments.prepare(lm, [lm.site(layer, "down_proj") for layer in range(lm.n_layers)])
    pre = evaluate(lm, cases, generate=False)
    for swept, layers, beside, settings in asked[: args.rows]:
        jeep = jeep_of(lm, args.dataset, cases=edits, low=settings["low"], high=settings["high"])
        found = edited_and_measured(lm, jeep, cases, pre=pre, contexts=contexts, moments=moments, seed=args.seed)
        summary = found.evaluation.summary()
        row: dict[str, Any] = {
            "swept": swept,
            "layers": layers,
            "other": beside,
            "seconds": round(found.seconds, 1),
            "reached": sum(r.stopped == "reached" for r in found.report) / len(found.report),
            "low_clamp": jeep.low_clamp,
            "high_clamp": jeep.high_clamp,
        }
        for name in METRICS:
            post = estimated(summary[name].post)
            row[name] = post.value
            if name == "Score":
                row["interval"] = [post.interval.low, post.interval.high] if post.interval else None
        rows.append(row)
        with out.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(json.dumps(row), flush=True)
    return args.rows is None or len(asked) <= args.rows


def evidence(
    lm: LM, args: argparse.Namespace, edits: list[retcon.Edit], advice: Advice, bare: Advice
) -> dict[str, dict[str, list[float]]]:
    """Return what each probe says of every layer, per group."""
    traces = causal_trace(lm, edits, Tracing(window=default_window(lm.n_layers), seed=args.seed))
    found: dict[str, dict[str, list[float]]] = {}
    for group, choice, token in (("low", advice.low, "last subject"), ("high", advice.high, "last")):
        found[group] = {
            "contrast": advice.contrast[choice.where].tolist(),
            "contrast, no norm": bare.contrast[choice.where].tolist(),
        }
        for kind in traces.settings.kinds:
            place = figures.GROUPS.index(token)
            found[group][f"trace {kind}"] = traces.average(kind).mean[place].tolist()
    total, half = traces.total()
    print(
        f"contrast-based probe: {advice.n_cases} facts; tracing: {len(traces)}, total effect {total:.3f} ± {half:.3f}"
    )
    for name, choice in (("low", advice.low), ("high", advice.high)):
        print(f"{name}: {list(choice.layers)}, score {choice.score:.2f}, stability {choice.stability:.0%}")
    print(f"weak: {'; '.join(advice.weak) or 'no'}")
    print(f"without the norm: low {list(bare.low.layers)}, high {list(bare.high.layers)}\n")
    return found


def draw(
    name: str, advice: Advice, seen: dict[str, dict[str, list[float]]], rows: list[dict[str, Any]], out: str
) -> None:
    """Score over position above, evidence over position below, advised positions hatched."""
    made, axes = figure(2, 2, 7.6, 5.2, sharex="col", height_ratios=[3, 2])
    styles = {"preset": dict(color="black", marker="o"), "none": dict(color="0.5", marker="s", linestyle="--")}
    for i, (group, choice) in enumerate((("low", advice.low), ("high", advice.high))):
        upper, lower = axes[:, i]
        other_group = "high" if group == "low" else "low"
        for other, style in styles.items():
            chosen = [r for r in rows if (r["swept"], r["other"]) == (group, other)]
            if not chosen:
                continue
            firsts = [r["layers"][0] for r in chosen]
            scores = [100 * r["Score"] for r in chosen]
            around = [
                [max(0, s - 100 * r["interval"][0]), max(0, 100 * r["interval"][1] - s)]
                for r, s in zip(chosen, scores, strict=True)
            ]
            label = f"{other_group} group as in the preset" if other == "preset" else f"no {other_group} group"
            upper.errorbar(
                firsts, scores, list(zip(*around, strict=True)), capsize=2, markersize=4, label=label, **style
            )
        width = len(choice.layers)
        marks = {
            "contrast": ("black", "-", "o"),
            "trace block": ("0.5", "--", "s"),
            "trace mlp": ("0.5", ":", "^"),
            "trace attn": ("0.5", "-.", "v"),
        }
        for what, (color, line, marker) in marks.items():
            values = over_windows(seen[group][what], width)
            highest = max(map(abs, values)) or 1.0
            lower.plot(
                [v / highest for v in values], color=color, linestyle=line, marker=marker, markersize=4, label=what
            )
        for axis in (upper, lower):
            axis.axvspan(
                choice.layers[0] - 0.35,
                choice.layers[0] + 0.35,
                facecolor="none",
                edgecolor="0.7",
                hatch="////",
                linewidth=0,
                zorder=0,
            )
        n = len(windows(len(seen[group]["contrast"]), width))
        labels = [f"{s}-{s + width - 1}" if width > 1 else str(s) for s in range(n)]
        shown = range(0, n, 1 + n // 10)  # more would run into each other
        lower.set_xticks(shown, [labels[s] for s in shown], fontsize=8)
        lower.set_xlabel(f"layers of the {group} group (hatched: advised)")
        upper.set_ylim(0, 100)
    axes[0, 0].set_ylabel("Score")
    axes[1, 0].set_ylabel("evidence / its largest")
    for upper in axes[0]:  # above the panel, where it hides no point
        upper.legend(fontsize=7, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=2, frameon=False)
    made.legend(*axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    for path in save(made, out, title=name):
        print(f"written {path}")


def over_windows(by_layer: Sequence[float], width: int) -> list[float]:
    """Sum over the layers of each position."""
    return [sum(by_layer[i] for i in layers) for layers in windows(len(by_layer), width)]


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, dataset=True, quiet=True)
    parser.add_argument("--name", help="the model's name in the figure, if not as --model says")
    parser.add_argument("--edits", type=int, default=100)
    parser.add_argument("--probed", type=int, default=500, help="facts after the edits, for the contrast-based probe")
    parser.add_argument("--traced", type=int, default=50, help="facts after those, for causal tracing")
    parser.add_argument("--alone", action="store_true", help="also sweep each group with the other one left out")
    parser.add_argument("--rows", type=int, help="stop after that many new rows; the next run goes on")
    parser.add_argument("--out", required=True, metavar="STEM")
    args = parser.parse_args()
    lm = retcon.load(args.model)
    print(f"{args.name or args.model}, seed {args.seed}; {machine()}")
    out = Path(f"{args.out}.jsonl")
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.is_file() else []
    others = cases_of(args.data, args.start + args.edits, args.probed + args.traced, args.seed)
    facts = [case.edits[0] for case in others]
    probe = contrast_probe(lm, facts[: args.probed])
    advice, bare = (advise(probe, Rule(final_norm=norm), seed=args.seed) for norm in (True, False))
    if not sweep(lm, args, advice, rows, out):
        print(f"{len(rows)} rows in {out}; the same command goes on from there")
        return
    seen = evidence(lm, args, facts[args.probed :], advice, bare)
    rows.sort(key=lambda r: r["layers"][0])

    print("\n| group swept | layers | other group | Score | ES | GS | LS | reached | advised |")
    print("|---|---|---|---|---|---|---|---|---|")
    advised = {"low": advice.low.layers, "high": advice.high.layers}
    for r in sorted(rows, key=lambda r: ("low", "high", "preset", "advice").index(r["swept"])):
        score, *rest = (100 * r[m] for m in METRICS)
        low, high = (100 * x for x in r["interval"] or (float("nan"),) * 2)
        cells = [f"{score:.1f} [{low:.1f}, {high:.1f}]", *(f"{x:.1f}" for x in rest), f"{100 * r['reached']:.0f} %"]
        mark = "yes" if advised.get(r["swept"]) == tuple(r["layers"]) else ""
        print_row(r["swept"], list(r["layers"]), r["other"], *cells, mark)
    print("\n| group | other group | " + " | ".join(EVIDENCE) + " |\n|---|---|" + "---|" * len(EVIDENCE))
    for group, width in (("low", len(advice.low.layers)), ("high", len(advice.high.layers))):
        for other in ("preset", "none"):
            scores = [r["Score"] for r in rows if (r["swept"], r["other"]) == (group, other)]
            if not scores:
                continue
            found = [spearman(over_windows(seen[group][what], width), scores, shuffles=SHUFFLES) for what in EVIDENCE]
            print_row(group, other, *(f"{rho:+.2f} (p {p:.4f})" for rho, p in found))
    record = {"advice": {group: list(layers) for group, layers in advised.items()}, "evidence by layer": rounded(seen)}
    Path(f"{args.out}.json").write_text(json.dumps(record) + "\n")
    draw(args.name or args.model, advice, seen, rows, args.out)


if __name__ == "__main__":
    main()
