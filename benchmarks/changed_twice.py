"""One fact changed twice: from its true answer A to B, then on to C, or back to A; beside C written directly.

    python -m benchmarks.changed_twice --model demo:gptj --n 30

All facts are written in one call each time, on the weights that the call before left. ES and GS compare the answer
asked for with the one before it (B with A, C with B, A with B; C directly with A), LS asks neighbours for A against the
answer written, agreement is the share of their answer tokens on which the edited model's choice is the unedited one's.
The facts are the embedded world's.
"""

import random
from dataclasses import replace

import retcon
from benchmarks.common import cases_of, command_line, machine, moments_of, percents, print_row
from retcon import world
from retcon.edits import Case
from retcon.evaluation import evaluate

METRICS = ("Score", "ES", "GS", "LS", ("LS", "ee.loc.argmax"))


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True)
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=["memit", "alphaedit", "jeep", "kne", "ctp"])
    args = parser.parse_args()
    lm = retcon.load(args.model)
    to_b = cases_of(None, args.start, args.n, args.seed)
    b_to_c, a_to_c, b_to_a = [], [], []
    for case in to_b:
        a, b, c = case.edits[0].target_true or "", case.edits[0].target_new, third(case, args.seed)
        b_to_c.append(asking(case, c, b))
        a_to_c.append(asking(case, c, a))
        b_to_a.append(asking(case, a, b))
    moments = moments_of(lm, args.corpus)
    print(f"{args.model}, {args.n} facts from {args.start}, seed {args.seed}; {machine()}\n")
    print("| method | change | Score | ES | GS | LS | agreement |\n|" + "---|" * 7)
    for name in args.methods:
        method = retcon.method(name, for_model=lm)
        contexts = retcon.sample_contexts(lm, seed=args.seed) if method.uses_moments else None
        for change, calls in {
            "A to B": [to_b],
            "A to C": [a_to_c],
            "A to B to C": [to_b, b_to_c],
            "A to B to A": [to_b, b_to_a],
        }.items():
            before = evaluate(lm, calls[-1], generate=False)
            for cases in calls:
                edits = [case.edits[0] for case in cases]
                lm.apply(method.propose(lm, edits, contexts=contexts, moments=moments, seed=args.seed))
            summary = evaluate(lm, calls[-1], pre=before, generate=False).summary()
            print_row(name, change, *percents(summary, keys=METRICS).values())
            lm.revert_all()


def third(case: Case, seed: int) -> str:
    """Draw C, an answer of the relation that is neither A nor B."""
    edit = case.edits[0]
    others = world.load_world().objects(edit.relation_id or "")
    rng = random.Random(f"third/{seed}/{case.id}")
    return rng.choice([answer for answer in others if answer not in (edit.target_new, edit.target_true)])


def asking(case: Case, answer: str, rival: str) -> Case:
    """Return the case with another answer to write and to compare."""
    edit = replace(case.edits[0], target_new=answer, target_true=rival)
    queries = []
    for query in case.queries:
        if query.axis in ("rewrite", "paraphrase"):
            queries.append(replace(query, target=answer, contrast=rival, answers=((answer,),)))
        elif query.axis == "neighborhood":
            queries.append(replace(query, contrast=rival if answer == query.target else answer))
    return replace(case, edits=(edit,), queries=tuple(queries))


if __name__ == "__main__":
    main()
