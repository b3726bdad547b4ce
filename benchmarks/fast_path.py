"""JEEP by the fast path against the library's own plain path, and what an edit costs as their number grows.

    python -m benchmarks.fast_path --model demo:gptj demo:llama --n 100
    python -m benchmarks.fast_path --model PATH --data FILE --corpus text.txt --n 100
    python -m benchmarks.fast_path --model demo:gptj --grow 1 10 100 1000

Plain is honest: an edit's rows in one batch, weights frozen, the vocabulary projected only where the loss looks; keys
by full passes. Both paths run the same settings in the same process, in turns, and the shortest of `--repeats` runs
counts. FLOPs are torch's own count of both paths; the floor of the search is one forward pass for every token and then,
per step, forward and backward through the layers above the value for the tokens from the edited one on.
"""

import statistics
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from unittest.mock import patch

import torch
from torch.utils.flop_counter import FlopCounterMode

import retcon
from benchmarks.common import cases_of, command_line, flops_per_token, jeep_of, machine, moments_of, timed
from retcon.delta import Delta
from retcon.edits import Edit
from retcon.errors import LargeChange
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.lm.peak import Peak
from retcon.lm.prompts import Where
from retcon.memory.contexts import Contexts, sample_contexts
from retcon.memory.keys import KeyAverage, KeyReader, mean_keys
from retcon.memory.moments import Moments
from retcon.memory.values.reference import search_values_reference
from retcon.memory.values.rows import EditRows
from retcon.methods.jeep import Jeep


class PlainReader(KeyReader):
    """Reads keys by full passes."""

    def __init__(self, lm: LM, edits: Sequence[Edit], contexts: Contexts, *, average: KeyAverage, last: Where) -> None:
        self.given, self.average = (lm, edits, contexts), average

    def read(self, point: Point, where: Where, value: Point) -> tuple[torch.Tensor, torch.Tensor]:
        """Read as `KeyReader.read` does."""
        keys, now = mean_keys(*self.given, point, where, value=value, average=self.average)
        assert now is not None
        return keys, now


@contextmanager
def plain_path() -> Iterator[None]:
    """Let methods search and read plainly while the scope lasts."""
    with (
        patch("retcon.methods.common.proposal.search_values", search_values_reference),
        patch("retcon.methods.common.proposal.KeyReader", PlainReader),
    ):
        yield


def floor(lm: LM, method: Jeep, edits: Sequence[Edit], contexts: Contexts, steps: Sequence[int]) -> float:
    """Return FLOPs that the value search needs at least (docs/design.md), with the steps that each edit took."""
    per_token = flops_per_token(lm.block(0))
    groups = [g for g in method.groups() if g]
    sites = [method.value_site(group) for group in groups]
    reading = 2 * sum(lm.site(0, kind).weight.numel() for kind in ("q_proj", "k_proj", "v_proj"))
    head = 2 * lm.head.get_parameter("weight").numel()
    live = lm.n_layers - 2 - min(s.point.layer for s in sites)  # the last block reads all tokens, and answers at labels
    total = 0.0
    for edit, taken in zip(edits, steps, strict=True):
        rows = EditRows.of(lm, edit, sites, contexts, method.value_search())
        kl = len(rows.kl.ids) if rows.kl else 0
        total += per_token * lm.n_layers * (sum(len(r.ids) - 1 for r in rows.rewriting) + kl)
        tokens = sum(len(r.ids) - 1 - s for r, s in zip(rows.rewriting, rows.starts, strict=True)) + (kl > 0)
        labels = sum(len(r.target_ids) for r in rows.rewriting) + (kl > 0)
        step = (per_token * live + reading) * tokens + (per_token - reading + head) * labels
        total += (2 * taken + 1) * step
    return total


def compare(lm: LM, edits: Sequence[Edit], moments: Moments, repeats: int) -> str:
    """Return a row of the first table."""
    method = jeep_of(lm)
    contexts = sample_contexts(lm)

    def run() -> Delta:
        return method.propose(lm, edits, contexts=contexts, moments=moments)

    flops, steps = {}, {}
    for name, scope in (("fast", nullcontext), ("plain", plain_path)):
        with scope(), FlopCounterMode(display=False) as counter:
            delta = run()
        flops[name], steps[name] = counter.get_total_flops(), [r.steps for r in delta.report]
    least = floor(lm, method, edits, contexts, [r.steps for r in delta.report])
    same = sum(a == b for a, b in zip(steps["fast"], steps["plain"], strict=True))
    took: dict[str, list[float]] = {"fast": [], "plain": []}
    for _ in range(repeats):
        for name, scope in (("plain", plain_path), ("fast", nullcontext)):
            with scope():
                took[name].append(timed(run)[1])
    n, plain, fast = len(edits), min(took["plain"]), min(took["fast"])
    counted, gained = flops["plain"] / flops["fast"], plain / fast
    return " | ".join(
        [
            lm.name.rsplit("/", 1)[-1],
            f"{n}",
            f"{statistics.mean(steps['fast']):.1f} ({same} of {n} as plain)",
            f"{1000 * plain / n:.0f}",
            f"{1000 * fast / n:.0f}",
            f"**{gained:.1f}**",
            f"{flops['plain'] / n / 1e9:.2f}",
            f"{flops['fast'] / n / 1e9:.2f}",
            f"{least / n / 1e9:.2f}",
            f"{counted:.1f}",
            f"{gained / counted:.0%}",
        ]
    )


def grow(lm: LM, edits: Sequence[Edit], moments: Moments) -> str:
    """Return a row of the second table."""
    method, contexts = jeep_of(lm), sample_contexts(lm)
    with Peak(lm.device) as peak:
        _, took = timed(lambda: method.propose(lm, edits, contexts=contexts, moments=moments))
    n = len(edits)
    memory = f"{peak.nbytes / 2**20:,.0f}" if peak.nbytes else "unknown"
    return f"{n:,} | {1000 * took / n:.0f} | {took:.1f} | {memory}"


def main() -> None:
    """Print the tables."""
    parser = command_line(__doc__)
    parser.add_argument("--model", nargs="+", default=["demo:gptj"], help="model ids or paths")
    parser.add_argument("--data", help="CounterFact file; the embedded world's cases by default")
    parser.add_argument("--corpus", help="text file for the second moments; the model's default if left out")
    parser.add_argument("--n", type=int, default=100, help="edits of the comparison")
    parser.add_argument("--grow", type=int, nargs="+", help="the second table, for these numbers of edits")
    parser.add_argument("--start", type=int, default=1000, help="first case")
    parser.add_argument("--repeats", type=int, default=3)
    args = parser.parse_args()
    warnings.simplefilter("ignore", LargeChange)
    if args.grow:
        print("edits | ms per edit | seconds | peak memory of the process, MiB")
        print("--- | --- | --- | ---")
    else:
        print(
            "model | edits | steps | plain, ms an edit | fast, ms an edit | gain | plain, GFLOP an edit | fast | "
            "floor of the search | counted gain | gain / counted"
        )
        print(" | ".join(["---"] * 11))
    for name in args.model:
        lm = retcon.load(name)
        moments = moments_of(lm, args.corpus)
        edits = [c.edits[0] for c in cases_of(args.data, args.start, max(args.grow or [args.n]), 0)]
        jeep_of(lm).propose(lm, edits[:2], moments=moments)  # warms up
        if args.grow:
            for n in args.grow:
                print(grow(lm, edits[:n], moments), flush=True)
        else:
            print(compare(lm, edits, moments, args.repeats), flush=True)
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
