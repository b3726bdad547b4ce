"""Editing a mixture of experts: through its routed experts, or through the shared expert alone.

    python -m benchmarks.mixture --model .cache/worlds/dots1        # make worlds
    python -m benchmarks.mixture --model demo:llama --mlp dense --known .cache/worlds/dots1   # dense, same facts

`--n` facts of the embedded world in one batch, settings by the rule for models without a preset. Of a world that some
facts were left out of, those are neither edited nor measured; `--known` takes the facts of another world. One line of
JSON per method and choice of MLP, with Score, ES, GS, LS (`cf.prob_mean`), how many edits the edited model says first,
seconds (moments left out), and how many of a token's experts are the same as before: on the prompts of the edits, of
their neighbours, on plain text (mean over the layers above the first edited one, and the lowest layer).
"""

import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import retcon
from benchmarks.common import cases_of, command_line, edited_and_measured, machine, moments_of, percents
from retcon import world
from retcon.attachment import Attachment
from retcon.edits import Case
from retcon.evaluation.drift import routing_overlap
from retcon.lm.model import LM
from retcon.methods.common.choosing import choose
from retcon.methods.common.registry import NO_PRESET

METHODS = ("memit", "jeep")
N_TEXTS = 100
N_WORLD = 1500
"""Cases that are drawn, for `--n` of them to be among what the model knows."""


def overlaps(lm: LM, cases: list[Case], delta: Attachment, first: int) -> dict[str, list[float]]:
    """Return the mean and lowest routing overlap of the layers above `first`, per kind of prompt."""
    prompts = {
        "edits": [case.edits[0].text for case in cases],
        "neighbours": [q.prompt for case in cases for q in case.queries if q.axis == "neighborhood"],
        "text": world.text(N_TEXTS, seed=7),
    }
    found = {}
    for kind, texts in prompts.items():
        shares = routing_overlap(lm, texts, nullcontext, lambda: lm.edited(delta))
        above = [share for layer, share in shares.items() if layer > first]
        found[kind] = [round(sum(above) / len(above), 3), round(min(above), 3)]
    return found


def known(cases: list[Case], model: str) -> list[Case]:
    """Leave out what a world's `left_out.json` says it never read: cases, and queries of others."""
    file = Path(model) / "left_out.json"
    if not file.is_file():
        return cases
    gone = {subject for subject, *_ in json.loads(file.read_text())}
    return [
        replace(case, queries=tuple(q for q in case.queries if not any(subject in q.prompt for subject in gone)))
        for case in cases
        if case.edits[0].subject not in gone
    ]


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, quiet=True)
    parser.add_argument("--n", type=int, default=100, help="cases")
    parser.add_argument("--mlp", nargs="+", default=["experts", "dense"], help="dense is the shared expert")
    parser.add_argument("--known", metavar="WORLD", help="edit what this world has read; default: the model itself")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    asked = parser.parse_args()
    print(f"# {machine()}", flush=True)
    lm = retcon.load(asked.model)
    moments = moments_of(lm, asked.corpus)
    cases = known(cases_of(asked.data, asked.start, N_WORLD, asked.seed), asked.known or asked.model)[: asked.n]
    for name in asked.methods:
        for mlp in asked.mlp:
            chosen = choose(
                name, for_model=lm, preset=NO_PRESET, cases=cases, mlp=mlp
            )  # a dense world too: one rule for all
            chosen.method.propose(lm, cases[0].edits, moments=moments, seed=asked.seed)  # moments are made, untimed
            found = edited_and_measured(lm, chosen.method, cases, moments=moments, seed=asked.seed)
            settings = {f: getattr(chosen.method, f) for f in ("layers", "low", "high") if hasattr(chosen.method, f)}
            first = min(layer for layers in settings.values() for layer in layers)
            routed = any(kind.experts for kind in lm.kinds)
            line = {
                "model": lm.label,
                "method": name,
                "mlp": mlp,
                "n": len(cases),
                **percents(found.evaluation.summary()),
                "first": found.first,
                "routing": overlaps(lm, cases, found.delta, first) if routed else {},
                "seconds": round(found.seconds, 1),
                "settings": settings,
                "notes": chosen.notes,
            }
            print(json.dumps(line, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
