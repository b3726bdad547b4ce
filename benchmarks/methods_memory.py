"""What each method holds at its fullest while it proposes one batch, counted in tensors, as a Markdown table.

    python -m benchmarks.methods_memory --model demo:gptj --n 20
    python -m benchmarks.methods_memory --n 20 --methods MALMEN --editor MALMEN=malmen.safetensors

Counted are the bytes of all tensors made inside `propose`, each storage once: what is trained or searched, its
gradient, Adam's moments, activations, solves, the delta. The model's own weights are not among them, nor are contexts
and second moments, which a call before has made. The count is the same on any machine. "Trained" is what a method of
the fine-tuning family says of itself before it starts: 20 bytes a value, or more by its settings.
"""

import retcon
from benchmarks.attribution import TensorPeak
from benchmarks.common import cases_of, command_line, machine, moments_of
from benchmarks.methods_table import ROWS
from retcon.methods.common.fine_tuning import FineTuning


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, quiet=True)
    parser.add_argument("--n", type=int, default=20, help="edits of the batch")
    parser.add_argument("--methods", nargs="+", choices=list(ROWS), default=[m for m in ROWS if m not in NEED_EDITORS])
    parser.add_argument("--editor", nargs="*", default=[], metavar="METHOD=FILE")
    args = parser.parse_args()
    editors = dict(pair.split("=", 1) for pair in args.editor)

    lm = retcon.load(args.model)
    contexts, moments = retcon.sample_contexts(lm, seed=args.seed), moments_of(lm, args.corpus)
    weights = sum(p.nbytes for p in lm.model.parameters())
    cases = cases_of(args.data, args.start, args.n, args.seed)
    print(f"{args.model} ({weights / 1e6:.1f} MB of weights), {args.n} edits, seed {args.seed}; {machine()}\n")
    print("| method | peak, MB | of the weights | trained, MB |\n|---|---|---|---|")
    for label in args.methods:
        own = {"editor": editors[label]} if label in editors else {}
        method = retcon.method(ROWS[label], for_model=lm, **own)
        edits = [case.edits[0] for case in (cases if method.supports_batches else cases[:1])]
        method.propose(lm, edits[:1], contexts=contexts, moments=moments)
        with TensorPeak() as peak:
            method.propose(lm, edits, contexts=contexts, moments=moments)
        trained = f"{method.bytes_per_value * method.n_trained(lm) / 1e6:.1f}" if isinstance(method, FineTuning) else ""
        shown = label if method.supports_batches else f"{label} (one edit)"
        print(f"| {shown} | {peak.peak / 1e6:.1f} | {peak.peak / weights:.2f} | {trained} |", flush=True)


NEED_EDITORS = ("MEND", "MALMEN")

if __name__ == "__main__":
    main()
