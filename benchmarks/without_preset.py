"""All methods on a model that no preset knows, by the rule for such models: in one batch, or one at a time.

    python -m benchmarks.without_preset --model .cache/smollm2-135m --data FILE --corpus text.txt --n 100
    python -m benchmarks.without_preset --model .cache/smollm2-135m --data FILE --corpus text.txt --n 50 --alone
    python -m benchmarks.without_preset --model demo:gptj --start 1000 --n 30 --any --put-presets-aside --methods memit
    python -m benchmarks.without_preset --model .cache/smollm2-135m --data FILE --n 100 --write-cases facts.jsonl

Cases are those whose true answer the unedited model finds more probable than the new one, in file order from the
`--start`-th of them on. Methods that take one fact write them one on top of the other. One line of JSON each, with
what was chosen and why, Score, ES, GS, LS (`cf.prob_mean`) with 95 % intervals, how many edits the edited model says
first, outcomes, seconds (moments left out), and the model's own text before and after some edits. With `--write-cases`
nothing is edited: the cases become a file, for `retcon tune` or, with `--said`, for the probes.
"""

import json
from collections import Counter
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import retcon
from benchmarks.common import cases_of, command_line, edited_and_measured, machine, moments_of, percents, preferred
from retcon.attachment import Attachment
from retcon.edits import Edit, write_cases
from retcon.lm.model import LM
from retcon.memory.values import ValueCache
from retcon.methods.common.choosing import choose
from retcon.methods.common.registry import NO_PRESET
from retcon.methods.common.sequence import in_steps
from retcon.workflow.settings import read_settings

METHODS = ("rome", "r_rome", "memit", "pmet", "jeep", "emmet", "alphaedit", "rect", "prune", "kne", "ctp")
TEXT_TOKENS = 10
"""Length of the texts that are printed."""


def written(lm: LM, edits: Sequence[Edit]) -> list[str]:
    """Return what the model writes after each edit's prompt."""
    return [lm.complete(edit.text, max_new_tokens=TEXT_TOKENS) for edit in edits]


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, quiet=True)
    parser.add_argument("--n", type=int, default=100, help="cases")
    parser.add_argument("--alone", action="store_true", help="edit every case by itself")
    parser.add_argument("--any", action="store_true", help="cases as they come, preferred or not")
    parser.add_argument("--said", action="store_true", help="only cases whose true answer the model says first")
    parser.add_argument("--put-presets-aside", action="store_true", help="as if no preset knew the model")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    parser.add_argument("--set", dest="assignments", action="append", default=[], help="FIELD=VALUE")
    parser.add_argument("--values", type=Path, help="folder that keeps searched values")
    parser.add_argument("--write-cases", type=Path, metavar="FILE", help="write the cases there and stop")
    parser.add_argument("--texts", type=int, default=3, help="edits whose texts are printed")
    asked = parser.parse_args()
    print(f"# {machine()}", flush=True)
    lm = retcon.load(asked.model)
    pick = cases_of if asked.any else partial(preferred, lm, said=asked.said)
    cases = pick(asked.data, asked.start, asked.n, asked.seed)
    if asked.write_cases:
        write_cases(asked.write_cases, cases)
        return
    moments = moments_of(lm, asked.corpus)
    shown = [edit for case in cases for edit in case.edits][: asked.texts]
    texts_before = written(lm, shown)
    preset = NO_PRESET if asked.put_presets_aside else None
    for name in asked.methods:
        given = read_settings(name, dataset=None, preset=None, assignments=asked.assignments)
        how: dict[str, Any] = dict(preset=preset, cases=cases, at_once=1 if asked.alone else None)
        chosen = choose(name, for_model=lm, **how, **given)
        if chosen.method.uses_moments and not asked.alone:
            in_steps(chosen.method, lm, cases[0].edits, moments=moments)  # moments and contexts are made, untimed
        values = ValueCache(asked.values) if asked.values and not asked.alone else None
        texts: list[str] = []

        def write(edits: Sequence[Edit], delta: Attachment, texts: list[str] = texts) -> None:
            with lm.edited(delta):
                texts += written(lm, edits[: len(shown) - len(texts)])

        found = edited_and_measured(
            lm, chosen.method, cases, alone=asked.alone, each=write, moments=moments, values=values, seed=asked.seed
        )
        summary, report = found.evaluation.summary(), found.report
        line = {
            "method": name,
            "n": len(cases),
            "alone": asked.alone,
            "set": asked.assignments,
            **percents(summary),
            "before": percents(summary, "pre"),
            "first": found.first,
            "searched": round(sum(r.search_probability for r in report) / len(report), 3),
            "final": round(sum(r.final_probability or 0.0 for r in report) / len(report), 3),
            "outcomes": Counter(r.outcome for r in report),
            "seconds": round(found.seconds, 1),
            "notes": chosen.notes,
            "texts": [
                {"prompt": edit.text, "asked": edit.target_new, "before": before, "after": after}
                for edit, before, after in zip(shown, texts_before, texts, strict=True)
            ],
        }
        print(json.dumps(line, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
