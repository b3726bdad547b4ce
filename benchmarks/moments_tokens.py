"""How many tokens a second moment needs: JEEP's scores with moments from 2 to 50 tokens per key dimension.

    python -m benchmarks.moments_tokens --model demo:gptj --n 100
    python -m benchmarks.moments_tokens --model PATH --data FILE --corpus text.txt --n 100

Settings are the model's preset, edits, prefixes and optimised values the same in every row; all edits are made in one
batch. ES is on the edited prompt, GS on paraphrases (held-out phrasings in the embedded world), LS on neighbours:
CounterFact's comparison of probabilities with 95 % intervals over cases. `halves` is the relative difference of the
moments of the two halves of the text, `to the last` that between a row's moment and the last row's (Frobenius norms,
mean over layers). Where the corpus is too small for a row, the row says how many tokens it had.
"""

import math
from dataclasses import replace
from statistics import mean

import retcon
from benchmarks.common import METRICS, cases_of, command_line, jeep_of, machine, moments_of, percents, print_row
from benchmarks.jeep_quality import measure
from retcon.evaluation import evaluate
from retcon.memory.moments import document_rows


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, dataset=True, quiet=True)
    parser.add_argument("--n", type=int, default=100)
    parser.add_argument("--per-dimension", type=int, nargs="+", default=[2, 5, 10, 20, 50], metavar="TOKENS")
    args = parser.parse_args()
    lm = retcon.load(args.model)
    jeep = jeep_of(lm, args.dataset)
    sites = [lm.site(layer, "down_proj") for layer in (*jeep.low, *jeep.high)]
    contexts = retcon.sample_contexts(lm, seed=args.seed)
    cases = cases_of(args.data, args.start, args.n, args.seed)
    pre = evaluate(lm, cases, stops=("\n", "."))
    base = replace(moments_of(lm, args.corpus), shipped=None)  # whose record has no halves
    sources = [replace(base, tokens_per_dimension=n) for n in args.per_dimension]
    for source in sources:
        source.prepare(lm, sites)

    print(f"{args.model}, {args.n} edits, seed {args.seed}; {machine()}\n")
    print("| tokens per dimension | tokens | halves | to the last | Score | ES | GS | LS |")
    print("|" + "---|" * 8)
    print_row("unedited", "", "", "", *percents(pre.summary(), "pre").values())
    for source in sources:
        asked = source.key(lm, sites[0]).n_tokens
        read = sum(len(r.ids) for r in document_rows(lm, source.corpus.documents, asked, source.max_length))
        halves = mean(source.convergence(lm, site) or math.nan for site in sites)
        apart = []
        for site in sites:
            last = sources[-1].second_moment(lm, site)
            apart.append(float((source.second_moment(lm, site) - last).norm() / last.norm()))
        row, _, _ = measure(lm, cases, pre, contexts, source, jeep)
        tokens = f"{read:,}" + (f" of {asked:,}" if read < asked else "")
        per = source.tokens_per_dimension
        print_row(per, tokens, f"{100 * halves:.1f} %", f"{100 * mean(apart):.1f} %", *row[: len(METRICS)])


if __name__ == "__main__":
    main()
