"""Deleting facts: what is left of the true answer, and of other facts with that answer.

    python -m benchmarks.deleting --model demo:gptj --n 30

KN erases (the value vectors of the units that carry the answer become zero, fact after fact); other methods write an
answer that says nothing (`--answer`) in place of the true one, all facts at once. Printed are shares of prompts on
which the model's own choice is the whole true answer: the facts' prompts, their paraphrases, and neighbours (other
subjects with that answer), whose own answers should stay; and the true answer's probability on the facts' prompts.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import retcon
from benchmarks.common import cases_of, command_line, machine, moments_of, print_row
from retcon.edits import Case, Edit
from retcon.lm.model import LM
from retcon.methods.common.proposal import answers
from retcon.methods.common.sequence import in_steps

WAYS: dict[str, dict[str, Any]] = {"kn": dict(erase=True), "memit": {}, "jeep": {}, "ft": {}}


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True)
    parser.add_argument("--n", type=int, default=30)
    parser.add_argument("--methods", nargs="+", default=list(WAYS))
    parser.add_argument("--answer", default="unknown", help="what other methods than KN write")
    asked = parser.parse_args()
    lm = retcon.load(asked.model)
    cases = cases_of(asked.data, asked.start, asked.n, asked.seed)
    known = [edit for case in cases for edit in case.edits if edit.target_true]
    nothing = [replace(edit, target_new=asked.answer) for edit in known]
    moments = moments_of(lm, asked.corpus)
    print(f"{asked.model}, {asked.n} facts from {asked.start}, seed {asked.seed}; {machine()}\n")
    print("| | p(true) | true on prompts, % | on paraphrases | neighbours |\n|---|---|---|---|---|")
    print_row("before", *left(lm, cases))
    for name in asked.methods:
        method = retcon.method(name, for_model=lm, cases=cases, **WAYS.get(name, {}))
        edits = known if name == "kn" else nothing
        delta = in_steps(method, lm, edits, moments=moments if method.uses_moments else None, seed=asked.seed)
        with lm.edited(delta):
            print_row(name, *left(lm, cases))


def left(lm: LM, cases: Sequence[Case]) -> list[str]:
    """Return the true answer's mean probability, and the shares of prompts where it is the model's own choice."""
    facts = [replace(e, target_new=e.target_true, target_true=None) for c in cases for e in c.edits if e.target_true]
    own = answers(lm, facts)
    found = [f"{sum(p for p, _ in own) / len(own):.3f}", share(own)]
    for axis in ("paraphrase", "neighborhood"):
        found.append(share(answers(lm, asked_as(cases, axis))))
    return found


def asked_as(cases: Sequence[Case], axis: str) -> list[Edit]:
    """Return the true answers as they are asked for on an axis."""
    return [
        Edit(query.prompt, None, str(query.contrast if axis == "paraphrase" else query.target))
        for case in cases
        for query in case.queries
        if query.axis == axis
    ]


def share(found: Sequence[tuple[float, bool]]) -> str:
    """Return how many of 100 are the model's own choice."""
    return f"{100 * sum(said for _, said in found) / len(found):.1f}"


if __name__ == "__main__":
    main()
