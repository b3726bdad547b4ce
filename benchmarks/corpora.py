"""What the text behind the second moments does to edits: the text that ships with the package against others.

    python -m benchmarks.corpora .cache/smollm2-135m --data counterfact-edit.json shipped docs/*.md

Facts are the file's first ones whose true answer the model finds likelier than the new one. Each text gives its own
moments, of as many tokens for each key dimension; method, settings and facts are the same. Perplexity is that of
`--held-out`, a text that is none of them.
"""

import json
from pathlib import Path

import retcon
from benchmarks.common import command_line, edited_and_measured, machine, preferred
from retcon.evaluation import evaluate
from retcon.evaluation.drift import perplexity
from retcon.memory.defaults import shipped_text
from retcon.memory.moments import Corpus, CorpusMoments
from retcon.methods.common.choosing import method

TOKENS_PER_DIMENSION = 20


def main() -> None:
    parser = command_line(__doc__)
    parser.add_argument("model")
    parser.add_argument("texts", nargs="+", help="files, or 'shipped'")
    parser.add_argument("--data", required=True, help="facts, as `retcon edit` reads them")
    parser.add_argument("--method", default="jeep")
    parser.add_argument("--n", type=int, default=20)
    parser.add_argument("--held-out", type=Path, help="text for perplexity; none if left out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    lm = retcon.load(args.model)
    cases = preferred(lm, args.data, 0, args.n, args.seed)
    held_out = args.held_out.read_text("utf-8") if args.held_out else None
    before = perplexity(lm, held_out).ppl if held_out else float("nan")
    print(json.dumps({"machine": machine(), "model": str(lm), "facts": len(cases), "perplexity": round(before, 2)}))
    pre = evaluate(lm, cases, generate=False)
    for name in args.texts:
        corpus = shipped_text() if name == "shipped" else Corpus.from_file(name)
        moments = CorpusMoments(corpus, tokens_per_dimension=TOKENS_PER_DIMENSION)
        chosen = method(args.method, for_model=lm)
        found = edited_and_measured(lm, chosen, cases, pre=pre, moments=moments, seed=args.seed)
        with lm.edited(found.delta):
            after = perplexity(lm, held_out).ppl if held_out else float("nan")
        summary = found.evaluation.summary()
        row: dict[str, object] = {"text": name, "characters": sum(map(len, corpus.documents)), "method": args.method}
        for metric in ("ES", "GS", "LS", "Score"):
            post = summary[metric].post
            row[metric] = None if post is None or post.value is None else round(100 * post.value, 1)
        print(json.dumps(row | {"perplexity": round(after, 2), "seconds": round(found.seconds)}), flush=True)


if __name__ == "__main__":
    main()
