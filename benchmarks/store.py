"""A store with many facts: how long `log`, `show` and `diff` take, and what writing a batch again costs.

    python -m benchmarks.store
    python -m benchmarks.store --again 400

The first prints seconds of whole commands, the start of Python included, on a store of 10,000 facts in 100 entries
(and no delta files, since these commands read none): of the clock, and of the processor, which other programs on the
machine touch less. The second edits N facts of the embedded world by JEEP and by
MEMIT, takes one fact out, and prints what that took of the processor beside the whole edit.
"""

import resource
import subprocess
import sys
import time
from argparse import ArgumentParser
from pathlib import Path
from tempfile import TemporaryDirectory

import retcon
from retcon import world
from retcon.edits import Case, Edit, Query
from retcon.files import write_atomically
from retcon.store import Entry
from retcon.store.index import fact_line


def many(store: retcon.Store, n_entries: int, n_facts: int) -> None:
    """Fill a store with entries of facts, deltas left out."""
    lines, after = [], None
    for i in range(n_entries):
        delta, when = f"{i:016x}", "2026-01-01T00:00:00+00:00"
        entry = Entry.make("edit", f"batch {i}", time=when, after=after, sets={delta: (None, delta)})
        cases = []
        for j in range(n_facts // n_entries):
            edit = Edit("The town that subject {} lies in is", f"number {i}-{j}", f"town {j}", id=f"f{i}-{j}")
            queries = [Query(f"paraphrase/{k}", "paraphrase", f"{edit.text} ({k})", edit.target_new) for k in range(10)]
            cases.append(fact_line(Case(edit.id, (edit,), tuple(queries)), delta))
        write_atomically(store.path / "facts" / f"{entry.id}.jsonl", ("\n".join(cases) + "\n").encode())
        lines.append(entry.line)
        after = entry.id
    write_atomically(store.path / "log.jsonl", ("\n".join(lines) + "\n").encode())


def commands(n_entries: int = 100, n_facts: int = 10_000) -> None:
    """Time the commands that read no delta."""
    lm = retcon.load("demo:gptj")
    with TemporaryDirectory() as folder:
        store = retcon.Store.init(Path(folder) / "edits", lm)
        many(store, n_entries, n_facts)
        place = ("--store", str(store.path))
        runs = {
            "the first command, which makes the index": ("log", "-n", "1", *place),
            "log": ("log", *place),
            "show an entry": ("show", "HEAD", *place),
            "show a fact": ("show", "f50-50", *place),
            "diff HEAD~10": ("diff", "HEAD~10", *place),
            "diff base": ("diff", "base", *place),
            "retcon --version (Python and imports)": ("--version",),
        }
        for name, arguments in runs.items():
            best = min(timed(arguments) for _ in range(1 if "first" in name else 3))
            print(f"{name:45} {best[0]:6.2f} s, processor {best[1]:.2f} s", flush=True)
        for name, call in {"log": retcon.Store.log, "facts": retcon.Store.facts}.items():
            started = time.perf_counter()
            call(retcon.Store(store.path))
            print(f"{name + ', in a process that runs':45} {time.perf_counter() - started:6.2f} s", flush=True)


def timed(arguments: tuple[str, ...]) -> tuple[float, float]:
    """Seconds of one whole command, by the clock and of the processor."""
    started, used = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "retcon", *arguments], check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    processor = after.ru_utime - used.ru_utime + after.ru_stime - used.ru_stime
    return time.perf_counter() - started, processor


def rewriting(n: int) -> None:
    """Time an edit of `n` facts, and the same batch written again without one."""
    lm = retcon.load("demo:gptj")
    cases = world.cases(n, seed=0)
    for name in ("jeep", "memit"):
        with TemporaryDirectory() as folder:
            store = retcon.Store.init(Path(folder) / "edits", lm)
            started = time.process_time()
            store.edit(lm, cases, retcon.method(name, for_model=lm))
            edited = time.process_time() - started
            started = time.process_time()
            entry = store.revert_fact(lm, cases[0].id)
            again = time.process_time() - started
            what = f"{again:.1f} s of it ({again / edited:.0%}), {entry.about['searched']} values searched"
            print(
                f"{name}: edit of {n} facts {edited:.1f} s of the processor; written again without one {what}",
                flush=True,
            )


if __name__ == "__main__":
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--again", type=int, metavar="N", help="facts edited, of which one is taken out")
    asked = parser.parse_args()
    if asked.again:
        rewriting(asked.again)
    else:
        commands()
