"""What evaluation costs: scoring against one prompt at a time, 1,000 cases from end to end, and record files.

    python -m benchmarks.evaluation --model demo:gptj
    python -m benchmarks.evaluation --model PATH --data counterfact-edit.json --n 1000
    python -m benchmarks.evaluation --model demo:gptj --native --n 64      # in the shape of native CounterFact's cases

The plain way of scoring is one forward pass per prompt and answer with the head at every position, as released
evaluation code does it. FLOPs are counted from the tokens that each way puts through the network: 2 per weight and
token in the blocks, 2 per weight of the head and position that the head is applied to; attention products are left
out (short prompts). The ratio asked for is the plain way's time over ours, against the same ratio of FLOPs. The floor
of an evaluation is every distinct beginning of prompts and answers once, whatever batches they are in, and every token
that is written.
"""

import random
import resource
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import retcon
from benchmarks.common import cases_of, command_line, machine, timed
from benchmarks.moments import product_rates
from retcon import world
from retcon.edits import Case, Query
from retcon.evaluation import Measures, evaluate
from retcon.evaluation.plan import plan_queries
from retcon.evaluation.records import Record, read_records, write_records
from retcon.evaluation.score import TokenScore, score_rows
from retcon.lm.decoding import write_tokens
from retcon.lm.forward import Places, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row

N_RECORDS = 780_000
BEFORE_A_PARAPHRASE = ("The train was late again. ", "It had rained all day. ")
"""CounterFact's paraphrases follow a sentence about something else."""
NEIGHBOURS = 10


def native_cases(n: int) -> list[Case]:
    """Return n cases in the shape of native CounterFact's, of the embedded world's facts: the edit's own prompt, two
    paraphrases, ten neighbours, and a prompt after which the model writes freely (`NATIVE`)."""
    drawn = world.cases(n * (1 + NEIGHBOURS))
    return [_native(case, drawn[n + i * NEIGHBOURS :][:NEIGHBOURS]) for i, case in enumerate(drawn[:n])]


NATIVE = Measures(generate=False, fluency=("flu.new",))
"""What is measured of native CounterFact's cases: probabilities, and free text."""


def _native(case: Case, neighbours: Sequence[Case]) -> Case:
    (edit,) = case.edits
    scored = [("rewrite/0", edit.text)]
    scored += [(f"paraphrase/{i}", before + edit.text) for i, before in enumerate(BEFORE_A_PARAPHRASE)]
    queries = [Query(id_, id_.partition("/")[0], prompt, edit.target_new, edit.target_true) for id_, prompt in scored]
    queries += [
        Query(f"neighborhood/{i}", "neighborhood", other.edits[0].text, edit.target_true, edit.target_new)
        for i, other in enumerate(neighbours)
    ]
    return Case(case.id, case.edits, (*queries, Query("generation/0", "generation", edit.text)), "counterfact")


@dataclass(frozen=True)
class Floor:
    """What an evaluation cannot do without."""

    read: float
    """FLOPs of every distinct beginning of prompts and answers, once, and of the head where answers are predicted."""
    written: float
    """FLOPs of the tokens that the model writes."""
    passes: int
    """Forward passes that come one after the other, in which the longest text is written."""

    def seconds(self, rate: float, weights_read: float = 0.0) -> float:
        """Return the least time at `rate` FLOP/s, where reading the weights once takes `weights_read` seconds."""
        return self.read / rate + max(self.written / rate, self.passes * weights_read)


def floor_of(lm: LM, cases: Sequence[Case], measures: Measures, written: Sequence[int]) -> Floor:
    """Return the floor of an evaluation in which the model wrote texts of so many tokens."""
    counter, queries = Counter(lm), plan_queries(lm, list(cases), measures).queries
    rows = [row.ids for q in queries for row in q.rows]
    texts = [ids[:-1] for ids in rows] + [lm.encode(q.query.prompt).ids for q in queries]
    predicted = {row.ids[: t + 1] for q in queries for row in q.rows for t in range(row.prediction, len(row.ids) - 1)}
    read = counter.per_token * len({ids[: t + 1] for ids in texts for t in range(len(ids))})
    return Floor(
        read=read + counter.per_position * len(predicted),
        written=counter.per_token * sum(n - 1 for n in written) + counter.per_position * sum(written),
        passes=max(written, default=1) - 1,
    )


@contextmanager
def noting_texts() -> Iterator[list[int]]:
    """Give the lengths, in tokens, of the texts that are written while the scope lasts."""
    lengths: list[int] = []

    def noted(*args: Any) -> list[list[int]]:
        found = write_tokens(*args)
        lengths.extend(map(len, found))
        return found

    with mock.patch("retcon.lm.generate.write_tokens", noted):
        yield lengths


def plainly(lm: LM, rows: list[Row]) -> list[TokenScore]:
    """Score one prompt at a time, the head everywhere."""
    scores = []
    with lm.frozen_eval(), torch.inference_mode():
        for row in rows:
            logits = lm.model(torch.tensor([row.ids], device=lm.device), use_cache=False).logits[0]
            own = logits[row.prediction : len(row.ids) - 1].float().log_softmax(-1)
            gold = torch.tensor(row.target_ids, device=lm.device)
            logp = own.gather(1, gold[:, None])[:, 0]
            scores.append(TokenScore(tuple(logp.tolist()), tuple(own.argmax(-1).tolist()), row.target_ids))
    return scores


class Counter:
    """Counts tokens through the blocks and positions through the head."""

    def __init__(self, lm: LM) -> None:
        self.tokens = self.positions = 0
        blocks = lm.layout.block.split(".{}")[0]
        inside = [p.numel() for name, p in lm.model.named_parameters() if name.startswith(blocks) and p.dim() == 2]
        self.per_token = 2 * sum(inside)
        self.per_position = 2 * lm.head.get_parameter("weight").numel()

    def flops(self) -> float:
        return self.tokens * self.per_token + self.positions * self.per_position


def counted(lm: LM, rows: list[Row]) -> float:
    """Return FLOPs of `score_rows`, from the batches it runs."""
    counter = Counter(lm)

    def count(lm: LM, batch: Batch, places: Places) -> torch.Tensor:
        counter.tokens += batch.ids.numel()
        counter.positions += len(places[0])
        return logits_at(lm, batch, places)

    with mock.patch.object(sys.modules[score_rows.__module__], "logits_at", count), apart():
        score_rows(lm, rows)
    return counter.flops()


def apart() -> AbstractContextManager[object]:
    """Inside, prompts share no pass over what they begin with."""
    return mock.patch.object(sys.modules[score_rows.__module__], "WORTH", float("inf"))


def after_common_beginnings(lm: LM, cases: list[Case], lengths: Sequence[int]) -> None:
    """Time the scoring of prompts that begin with the same tokens, as with a chat's system prompt, run once and not."""
    bare = [row for q in plan_queries(lm, cases, Measures()).queries for row in q.rows]
    draw = random.Random(0)
    for n in lengths:
        system = tuple(draw.randrange(int(lm.config.vocab_size)) for _ in range(n))
        rows = [replace(row, ids=system + row.ids, n_prompt=n + row.n_prompt) for row in bare]
        times: dict[bool, float] = {}
        for once in (True, False):
            with nullcontext() if once else apart():
                score_rows(lm, rows[:100])
                started = time.process_time()
                score_rows(lm, rows)
                times[once] = time.process_time() - started
        print(
            f"scoring {len(rows):,} prompts after {n} common tokens: {times[True]:.2f} s of the processor, run apart "
            f"{times[False]:.2f} s: {times[False] / times[True]:.1f} times faster"
        )


def scoring(lm: LM, cases: list[Case]) -> None:
    """Time ours against the plain way, and say how far apart the numbers are."""
    rows = [row for q in plan_queries(lm, cases, Measures()).queries for row in q.rows]
    plain_flops = Counter(lm)
    plain_flops.tokens = plain_flops.positions = sum(len(row.ids) for row in rows)
    ours_flops = counted(lm, rows)
    ours, fast = timed(lambda: score_rows(lm, rows))
    plain, slow = timed(lambda: plainly(lm, rows))
    apart = max(abs(a - b) for x, y in zip(ours, plain, strict=True) for a, b in zip(x.logp, y.logp, strict=True))
    same = sum(x.pred == y.pred for x, y in zip(ours, plain, strict=True)) / len(ours)
    ratio, flops = slow / fast, plain_flops.flops() / ours_flops
    print(f"scoring {len(rows):,} prompts with answers: {fast:.2f} s, one at a time {slow:.2f} s")
    print(
        f"  {ratio:.1f} times faster; {ours_flops / 1e9:.0f} GFLOP, one at a time {plain_flops.flops() / 1e9:.0f}: "
        f"{flops:.1f} times fewer; {100 * ratio / flops:.0f} % of that ratio"
    )
    print(f"  log-probabilities at most {apart:.1e} apart, choices the same in {100 * same:.2f} %")


def end_to_end(lm: LM, cases: list[Case], ways: dict[str, Measures]) -> None:
    """Time `evaluate` of the unedited model, and set it against the floor."""
    rate = max(product_rates(lm).values())
    for how, measures in ways.items():
        started, processor = time.perf_counter(), time.process_time()
        with noting_texts() as written:
            found = evaluate(lm, cases, measures=measures)
        took, processor = time.perf_counter() - started, time.process_time() - processor
        least, n = floor_of(lm, cases, measures, written), sum(written)
        print(
            f"evaluating {len(cases):,} cases, {how}: {took:.1f} s, {processor:.1f} s of the processor "
            f"({len(found.records):,} records)\n"
            f"  floor: {least.read / 1e9:.1f} GFLOP to read, {least.written / 1e9:.1f} to write {n:,} tokens: "
            f"{least.seconds(rate):.2f} s at the {rate / 1e9:.0f} GFLOP/s of products"
        )


def record_files() -> None:
    """Time writing and reading a large file of records."""
    records = [
        Record(
            when="final", case_id=str(i // 13), subject=f"Subject {i // 13}", axis="rewrite",
            query_id=f"rewrite/{i % 13}", metric="ES", variant=f"cf.prob_mean{i % 13}", value=(i * 0.37) % 1, n=i % 5,
        )
        for i in range(N_RECORDS)
    ]  # fmt: skip
    context = {"model": "m@0123456789ab", "method": "jeep", "dataset": "cf", "protocol": "batch", "seed": 0}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "records.jsonl"
        _, wrote = timed(lambda: write_records(path, records, context))
        same, read = timed(lambda: read_records(path)[0] == records)
        size = path.stat().st_size / 1e6
    assert same
    print(f"{N_RECORDS:,} records ({size:.0f} MB): written in {wrote:.1f} s, read in {read:.1f} s")


def main() -> None:
    parser = command_line(__doc__, cases=True)
    parser.add_argument("--n", type=int, default=1000)
    parser.add_argument("--native", action="store_true", help="the world's facts in the shape of native CounterFact's")
    args = parser.parse_args()
    lm = retcon.load(args.model)
    cases = native_cases(args.n) if args.native else cases_of(args.data, args.start, args.n, args.seed)
    stops = ("\n", ".")
    ways = {
        "teacher forcing only": Measures(generate=False, stops=stops),
        "with written answers": Measures(stops=stops),
    }
    print(f"{args.model}; {machine()}\n")
    scoring(lm, cases)
    after_common_beginnings(lm, cases[:64], (10, 25, 60, 150))
    end_to_end(lm, cases, {"with free text": NATIVE} if args.native else ways)
    record_files()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


if __name__ == "__main__":
    main()
