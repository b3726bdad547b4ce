"""JEEP's quality at several batch sizes, or its ablations (the paper's Table 4), as Markdown tables.

    python -m benchmarks.jeep_quality --model demo:gptj --n 20 100 500
    python -m benchmarks.jeep_quality --model demo:gptj --n 100 --ablations
    python -m benchmarks.jeep_quality --model PATH --data FILE --corpus text.txt --start 1000 --n 50 1000

Settings are the model's preset; `--set field=value` overrides. All edits of a row are made in one batch; ES, GS, LS are
CounterFact's comparison of probabilities with 95 % intervals over cases, Score's interval is a bootstrap by subject.
"""

import tomllib
from collections import Counter
from typing import Any

import retcon
from benchmarks.common import METRICS, cases_of, command_line, jeep_of, machine, moments_of, percents, print_row, timed
from retcon.delta import Delta
from retcon.edits import Case
from retcon.evaluation import Evaluation, evaluate
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.methods.jeep import Jeep

ABLATIONS: dict[str, dict[str, Any]] = {
    "JEEP": {},
    "w/o δ′ and Step 2": {"low": ()},
    "w/o δ* and Step 3": {"high": ()},
    "w/o Step 2": {"write_low": False},
    "w/o Step 3": {"write_high": False},
    "searched separately": {"joint_optimisation": False},
    "even spread in Step 2": {"low_spread": "even"},
    "attention out-projection in Step 3": {"high_module": "attn"},
    '`high_target="joint"`': {"high_target": "joint"},
    '`sites="release"`': {"sites": "release"},
    '`sites="block"`': {"sites": "block"},
}
SHOWN = (*METRICS, ("GS", "gen.em"))


def measure(
    lm: LM, cases: list[Case], pre: Evaluation, contexts: Contexts, moments: Moments, method: Jeep
) -> tuple[list[str | None], Delta, Evaluation]:
    """Return one row's cells (Score, ES, GS, LS, generated on paraphrases, reached, seconds per edit), and more."""
    edits = [case.edits[0] for case in cases]
    for kind in ("down_proj", "o_proj") if method.high_module == "attn" else ("down_proj",):
        moments.prepare(lm, [lm.site(layer, kind) for layer in (*method.low, *method.high)])
    delta, seconds = timed(lambda: method.propose(lm, edits, contexts=contexts, moments=moments))
    evaluation = evaluate(lm, cases, delta=delta, pre=pre, stops=("\n", "."))
    cells = percents(evaluation.summary(), keys=SHOWN).values()
    reached = sum(r.stopped == "reached" for r in delta.report) / len(delta.report)
    return [*cells, f"{100 * reached:.0f} %", f"{seconds / len(edits):.2f}"], delta, evaluation


def misses(cases: list[Case], delta: Delta, evaluation: Evaluation) -> str:
    """Say where paraphrases fail: by how the edit's search ended, and by the subject's place in edit and paraphrase."""
    stopped = {report.id: report.stopped for report in delta.report}
    by_id = {case.id: case for case in cases}
    missed: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for record in evaluation.records:
        if (record.when, record.metric, record.variant) != ("final", "GS", "cf.prob_mean") or record.value is None:
            continue
        case = by_id[record.case_id or ""]
        edit = case.edits[0]
        subject = edit.subject or ""
        prompt = next(query.prompt for query in case.queries if query.id == record.query_id)
        same_place = prompt.startswith(subject) == edit.text.startswith(subject)
        for group in (f"search {stopped[edit.id]}", f"subject in {'the same' if same_place else 'another'} place"):
            asked[group] += 1
            missed[group] += record.value == 0
    return "; ".join(f"{group}: {missed[group]} of {n} missed" for group, n in sorted(asked.items()))


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, dataset=True)
    parser.add_argument("--n", type=int, nargs="+", default=[100])
    parser.add_argument("--ablations", action="store_true", help="the rows of the paper's Table 4")
    parser.add_argument("--only", nargs="+", help="some of the ablations, by the start of their names")
    parser.add_argument("--misses", action="store_true", help="also say where paraphrases fail")
    parser.add_argument("--set", action="append", default=[], metavar="FIELD=VALUE", help="a setting, as TOML")
    args = parser.parse_args()

    lm = retcon.load(args.model)
    overrides = tomllib.loads("\n".join(args.set))
    contexts = retcon.sample_contexts(lm, seed=args.seed)
    moments = moments_of(lm, args.corpus)
    print(f"{args.model}, seed {args.seed}; {machine()}\n")
    print(
        "| n | row | Score | ES | GS | LS | GS, generated | reached | s/edit |\n|---|---|---|---|---|---|---|---|---|"
    )
    for n in args.n:
        cases = cases_of(args.data, args.start, n, args.seed)
        pre = evaluate(lm, cases, stops=("\n", "."))
        print_row(n, "unedited", *percents(pre.summary(), "pre", SHOWN).values(), "", "")
        rows = ABLATIONS if args.ablations else {"JEEP": {}}
        for name, settings in rows.items():
            if args.only and not any(name.startswith(start) for start in args.only):
                continue
            method = jeep_of(lm, args.dataset, **{**overrides, **settings})
            row, delta, evaluation = measure(lm, cases, pre, contexts, moments, method)
            print_row(n, name, *row)
            if args.misses:
                print(f"paraphrases: {misses(cases, delta, evaluation)}", flush=True)


if __name__ == "__main__":
    main()
