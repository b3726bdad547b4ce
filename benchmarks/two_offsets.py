"""JEEP's two writes, edit by edit: what each does alone, what both do together, and whether it tells which edits fail.

    python -m benchmarks.two_offsets --model demo:gptj --n 100

A batch is written by JEEP with both values searched together, and with one searched after the other. Each delta is then
measured whole, with its low layers only and with its high ones only. A margin is the new answer's probability less the
old one's (geometric mean over tokens), on the edit's prompt and, averaged, on its paraphrases; means over edits.
Interaction: margin(both) - margin(low) - margin(high) + margin(none), above 0 where the writes need each other, below 0
where either would do. Last columns: Spearman's rank correlation of the interaction on the prompt with the margin on
paraphrases, and its p by permutation (`common.spearman`).
"""

import statistics
from collections.abc import Sequence
from dataclasses import replace

import retcon
from benchmarks.common import cases_of, command_line, jeep_of, machine, moments_of, print_row, spearman
from retcon.delta import Delta
from retcon.edits import Case
from retcon.evaluation import evaluate
from retcon.lm.model import LM

SHUFFLES = 2000


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, dataset=True)
    parser.add_argument("--n", type=int, default=100)
    args = parser.parse_args()
    lm = retcon.load(args.model)
    cases = cases_of(args.data, args.start, args.n, args.seed)
    edits = [case.edits[0] for case in cases]
    contexts, moments = retcon.sample_contexts(lm, seed=args.seed), moments_of(lm, args.corpus)
    print(f"{args.model}, {args.n} facts from {args.start}, seed {args.seed}; {machine()}\n")
    print("| searched | of | none | low | high | both | interaction | below 0 | correlation | p |\n|" + "---|" * 10)
    for searched, joint in (("together", True), ("separately", False)):
        method = jeep_of(lm, args.dataset, joint_optimisation=joint)
        delta = method.propose(lm, edits, contexts=contexts, moments=moments, seed=args.seed)
        low, high = (part_of(lm, delta, layers) for layers in (method.low, method.high))
        of = [margins(lm, cases, part) for part in (None, low, high, delta)]
        interactions = {}
        for asked in ("prompt", "paraphrases"):
            none, only_low, only_high, both = ([case[asked] for case in measured] for measured in of)
            found = [b - (x + y) + n for n, x, y, b in zip(none, only_low, only_high, both, strict=True)]
            interactions[asked] = found
            cells = [f"{statistics.mean(values):.2f}" for values in (none, only_low, only_high, both, found)]
            cells.append(f"{100 * sum(x < 0 for x in found) / len(found):.0f} %")
            if asked == "paraphrases":
                rho, p = spearman(interactions["prompt"], both, shuffles=SHUFFLES, seed=args.seed)
                cells += [f"{rho:+.2f}", f"{p:.4f}"]
            else:
                cells += ["", ""]
            print_row(searched, asked, *cells)


def part_of(lm: LM, delta: Delta, layers: Sequence[int]) -> Delta:
    """Return the changes of these layers only."""
    names = {lm.site(layer, module).name for layer in layers for module in ("down_proj", "o_proj")}
    return replace(delta, changes={name: found for name, found in delta.changes.items() if name in names})


def margins(lm: LM, cases: Sequence[Case], delta: Delta | None) -> list[dict[str, float]]:
    """Return per case the margin on its prompt and the mean on its paraphrases."""
    result = evaluate(lm, cases, delta=delta, generate=False)
    wanted = "pre" if delta is None else "final"
    found: dict[str, dict[str, list[float]]] = {case.id: {"prompt": [], "paraphrases": []} for case in cases}
    for record in result.records:
        asked = {"EM": "prompt", "PM": "paraphrases"}.get(record.metric)
        if record.when == wanted and record.variant == "cf.magnitude" and asked and record.value is not None:
            found[record.case_id or ""][asked].append(record.value)
    return [{asked: statistics.mean(values) for asked, values in found[case.id].items()} for case in cases]


if __name__ == "__main__":
    main()
