"""What evaluation costs: scoring against one prompt at a time, 1,000 cases from end to end, and record files.

    python -m benchmarks.evaluation --model demo:gptj
    python -m benchmarks.evaluation --model PATH --data counterfact-edit.json --n 1000

The plain way of scoring is one forward pass per prompt and answer with the head at every position, as released
evaluation code does it. FLOPs are counted from the tokens that each way puts through the network: 2 per weight and
token in the blocks, 2 per weight of the head and position that the head is applied to; attention products are left
out (short prompts). The ratio asked for is the plain way's time over ours, against the same ratio of FLOPs.
"""

import resource
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch

import retcon
from benchmarks.common import cases_of, command_line, machine, timed
from retcon.edits import Case
from retcon.evaluation import Measures, evaluate
from retcon.evaluation.plan import plan_queries
from retcon.evaluation.records import Record, read_records, write_records
from retcon.evaluation.score import TokenScore, score_rows
from retcon.lm.forward import Places, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row

N_RECORDS = 780_000


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

    with mock.patch.object(sys.modules[score_rows.__module__], "logits_at", count):
        score_rows(lm, rows)
    return counter.flops()


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
    print(f"  {ratio:.1f} times faster; {flops:.1f} times fewer FLOPs; {100 * ratio / flops:.0f} % of that ratio")
    print(f"  log-probabilities at most {apart:.1e} apart, choices the same in {100 * same:.2f} %")


def end_to_end(lm: LM, cases: list[Case]) -> None:
    """Time `evaluate` of the unedited model, without and with the model's own answers."""
    for generate in (False, True):
        started, processor = time.perf_counter(), time.process_time()
        found = evaluate(lm, cases, generate=generate, stops=("\n", "."))
        took, processor = time.perf_counter() - started, time.process_time() - processor
        how = "with written answers" if generate else "teacher forcing only"
        print(
            f"evaluating {len(cases):,} cases, {how}: {took:.1f} s, {processor:.1f} s of the processor "
            f"({len(found.records):,} records)"
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
    args = parser.parse_args()
    lm = retcon.load(args.model)
    cases = cases_of(args.data, args.start, args.n, args.seed)
    print(f"{args.model}; {machine()}\n")
    scoring(lm, cases)
    end_to_end(lm, cases)
    record_files()
    print(f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3:,.0f} MB")


if __name__ == "__main__":
    main()
