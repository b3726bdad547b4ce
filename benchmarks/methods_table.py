"""All methods at several numbers of edits, as a Markdown table.

    python -m benchmarks.methods_table --model demo:gptj --n 1 100 1000
    python -m benchmarks.methods_table --model PATH --data FILE --corpus text.txt --start 1000 --n 1 100 1000
    python -m benchmarks.methods_table --methods MEND MALMEN --editor MEND=mend.safetensors MALMEN=malmen.safetensors
    python -m benchmarks.methods_table --n 1 --methods FT --preset FT=ft/demo-gptj/world-single

Settings are the model's presets, or the one that is named. At n = 1 each of `--alone` cases is edited and measured by
itself. At larger n, batch methods write all edits at once, and methods for one fact write them one on top of the other,
all kept. ES, GS, LS compare probabilities (`cf.prob_mean`), with 95 % intervals over cases; Score is their harmonic
mean, its interval a bootstrap by subject. "said" is the share of edits whose new answer the edited model gives first on
the edit's prompt. Seconds per edit are the processor's, so that other processes matter little; they leave moments out.
Methods that search the same values share them, and only the first is timed.
"""

import time
from pathlib import Path
from tempfile import TemporaryDirectory

import retcon
from benchmarks.common import (
    add_editors,
    cases_of,
    command_line,
    edited_and_measured,
    machine,
    moments_of,
    named,
    percents,
    print_row,
)
from retcon.evaluation import evaluate
from retcon.memory.values import ValueCache

NAMES = {"alphaedit": "AlphaEdit", "full_c": "Full-C", "lora": "LoRA", "adalora": "AdaLoRA"}
ROWS = {NAMES.get(name, name.upper().replace("_", "-")): name for name in retcon.list_methods()}
FAMILY = ["ROME", "R-ROME", "MEMIT", "RECT", "PRUNE", "AlphaEdit", "EMMET", "PMET", "JEEP"]
"""The locate-then-edit methods, which are run where none are named."""


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, quiet=True)
    parser.add_argument("--n", type=int, nargs="+", default=[1, 100, 1000])
    parser.add_argument("--alone", type=int, default=100, help="cases edited one at a time for n = 1")
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=FAMILY)
    add_editors(parser)
    parser.add_argument("--preset", nargs="*", default=[], metavar="METHOD=NAME", help="in place of the model's own")
    args = parser.parse_args()

    lm = retcon.load(args.model)
    contexts, moments = retcon.sample_contexts(lm, seed=args.seed), moments_of(lm, args.corpus)
    print(f"{args.model}, seed {args.seed}; {machine()}\n")
    print("| n | method | Score | ES | GS | LS | said | s/edit |\n|---|---|---|---|---|---|---|---|")
    with TemporaryDirectory() as folder:
        for n in args.n:
            cases = cases_of(args.data, args.start, args.alone if n == 1 else n, args.seed)
            pre = evaluate(lm, cases, generate=False)
            print_row(n, "unedited", *percents(pre.summary(), "pre").values(), "", "")
            for label in args.methods:
                own = named(args.preset, label, "preset") | named(args.editor, label, "editor")
                method = retcon.method(ROWS[label], for_model=lm, **own)
                method.propose(
                    lm, cases[0].edits, contexts=contexts, moments=moments
                )  # moments and what is made of them
                kept = ValueCache(Path(folder)) if n > 1 and method.supports_batches else None
                found = edited_and_measured(
                    lm,
                    method,
                    cases,
                    alone=n == 1,
                    pre=pre,
                    clock=time.process_time,
                    contexts=contexts,
                    moments=moments,
                    values=kept,
                )
                said = f"{100 * found.first / len(found.report):.0f} %" if n > 1 else ""
                shown = "" if kept and kept.resumed else f"{found.seconds / len(found.report):.2f}"
                print_row(n, label, *percents(found.evaluation.summary()).values(), said, shown)


if __name__ == "__main__":
    main()
