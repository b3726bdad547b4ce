"""Time of one optimisation step of each batch method, against MEMIT's.

    python -m benchmarks.methods_steps --model demo:gptj --edits 32

Searches are forced to take all their steps. The time of a proposal with one pass is taken off that of one with
`--steps` passes, so that contexts, keys, moments and solves drop out; what is left is divided by the steps between.
JEEP is shown with its low group alone and with both. Methods take turns; the least of `--rounds` times counts, in
seconds of the processor, so that other processes matter little.
"""

import time
from functools import partial
from typing import Any

import retcon
from benchmarks.common import cases_of, command_line, machine, moments_of, timed

NEVER: dict[str, Any] = {"stop": "loss", "threshold": 0.0}
ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "MEMIT": ("memit", NEVER),
    "EMMET": ("emmet", NEVER),
    "AlphaEdit": ("alphaedit", NEVER),
    "PMET": ("pmet", NEVER | {"settled_kl": 0.0}),
    "JEEP, low group alone": ("jeep", NEVER | {"high": ()}),
    "JEEP": ("jeep", NEVER),
}


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, quiet=True)
    parser.add_argument("--edits", type=int, default=32)
    parser.add_argument("--steps", type=int, default=11)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    lm = retcon.load(args.model)
    edits = [case.edits[0] for case in cases_of(args.data, args.start, args.edits, args.seed)]
    contexts, moments = retcon.sample_contexts(lm, seed=args.seed), moments_of(lm, args.corpus)
    last = retcon.method("memit", for_model=lm).settings["layers"]
    taken: dict[str, list[float]] = {label: [] for label in ROWS}
    for _ in range(args.rounds):
        for label, (name, settings) in ROWS.items():
            layers = {"low" if name == "jeep" else "layers": last}  # the same last layer for all
            seconds = []
            for steps in (1, 1, args.steps):  # the first call warms up
                method = retcon.method(name, for_model=lm, **layers, **settings, steps=steps)
                propose = partial(method.propose, lm, edits, contexts=contexts, moments=moments)
                seconds.append(timed(propose, clock=time.process_time)[1])
            taken[label].append((seconds[-1] - seconds[-2]) / (args.steps - 1) / args.edits)
    print(f"{args.model}, {args.edits} edits; {machine()}\n")
    print("| method | ms per edit and step | of MEMIT's |\n|---|---|---|")
    for label, seconds in taken.items():
        print(f"| {label} | {1000 * min(seconds):.2f} | {min(seconds) / min(taken['MEMIT']):.2f} |")


if __name__ == "__main__":
    main()
