"""All that is measured on a card, with checks that results are right, in one table and in a given time.

    python -m benchmarks.gpu --minutes 8                       # a card of 80 GB
    python -m benchmarks.gpu --released PATH                   # and JEEP's released code, of which PATH is a checkout
    python -m benchmarks.gpu --tiny --device cpu --minutes 5   # small shapes, to see that it runs

Models have random weights in bfloat16; edits are the embedded world's, and every one takes all its steps. Parts are run
in the order of their worth; one for which there is no time left is named. Where a check fails, or a part ends in an
error, the others are measured all the same and the exit code is 1.
"""

import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

import retcon
from benchmarks import released_jeep
from benchmarks.common import command_line, dtype_on, jeep_of, machine, print_row, timed
from benchmarks.compiled_steps import CompiledSteps
from benchmarks.evaluation import NATIVE, floor_of, native_cases, noting_texts
from benchmarks.fast_path import floor
from benchmarks.large_models import count, identity, prepared, settings
from benchmarks.moments import SHAPES, product_rates, random_lm, random_rows, seconds_of
from retcon import world
from retcon.edits import Edit
from retcon.errors import LargeChange
from retcon.evaluation import Measures
from retcon.lm.batches import release_memory
from retcon.lm.fingerprint import fingerprint
from retcon.lm.model import LM
from retcon.lm.peak import Peak
from retcon.memory.collect import collect
from retcon.memory.contexts import Contexts, sample_contexts
from retcon.memory.moments import MomentKey, load_moment, save_moments
from retcon.memory.solve import cholesky
from retcon.memory.values import Values, schedule, search_values
from retcon.memory.values.reference import search_values_reference

TOLERANCE = 1e-4
"""Largest difference of a delta in float32, this device's and the CPU's, over the CPU's norm."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    shapes: tuple[str, ...]
    n: tuple[int, ...]
    """Edits of a search."""
    steps: int
    tokens: int
    """Of the second moments."""
    n_cases: int
    """Of an evaluation."""


FULL = Size(("llama-3-8b", "gpt-j-6b"), (1, 512), 20, 1_000_000, 64)
TINY = Size(("llama-256", "gptj-128"), (1, 4), 4, 2_048, 4)

RELEASED_FOR = "gpt-j-6b"
"""The shape for which the released code has settings."""

Row = tuple[str, str, str, str]
"""What, model, measured, wanted."""


class Failed(Exception):
    """A result that is wrong."""


def apart(found: Values, wanted: Values, dtype: torch.dtype) -> tuple[float, float]:
    """Return the largest difference of offsets, over the wanted one's norm, and what it may be."""
    pairs = zip(found.offset, wanted.offset, strict=True)
    off = max(float((a - b).norm() / b.norm().clamp_min(1e-12)) for a, b in pairs)
    return off, 0.2 if dtype.itemsize < 4 else 1e-4


class Card:
    """One device and the models that are measured on it, one at a time."""

    def __init__(self, size: Size, device: str, dtype: torch.dtype) -> None:
        self.size, self.device, self.dtype = size, torch.device(device), dtype
        self.name = ""
        self.lm: LM | None = None
        self.released: Path | None = None
        """A checkout of JEEP's released code."""
        self.an_edit: dict[str, float] = {}
        """Milliseconds of the search of one of most edits, by model."""

    def model(self, name: str) -> LM:
        """Return the model of a shape; the one before it is gone."""
        if self.lm is None or self.name != name:
            self.lm = None
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            self.lm, self.name = random_lm(name, str(self.device), self.dtype), name
        return self.lm

    def seconds(self, call: Callable[[], object]) -> float:
        """Return the seconds of a call, the device's work included."""
        return timed(call, device=self.device)[1]

    # --- parts -------------------------------------------------------------------------------------------------------

    def same_as_the_cpu(self) -> Iterator[Row]:
        """Compare JEEP on the embedded models in float32: this device's delta and the CPU's."""
        edits = [case.edits[0] for case in world.cases(4)]
        for name in ("demo:gptj", "demo:llama"):
            changes: list[list[torch.Tensor]] = []
            for device in ("cpu", str(self.device)):
                lm = retcon.load(name, device=device, dtype="float32")
                delta = jeep_of(lm, steps=5).propose(lm, edits)
                changes.append([delta.dense(p, lm.parameter(p).shape) for p in sorted(delta.changes)])
            off = max(float((a - b).norm() / a.norm()) for a, b in zip(*changes, strict=True) if a.norm() > 0)
            if off > TOLERANCE:
                raise Failed(f"{name}: the delta on {self.device} parts from the CPU's by {off:.1e}")
            yield "delta in float32, to the CPU's", name, f"{off:.1e}", f"at most {TOLERANCE:.0e}"

    def search(self, name: str) -> Iterator[Row]:
        """Time the value search alone and the whole of JEEP."""
        lm, size = self.model(name), self.size
        method = settings(SHAPES[name][1], size.steps)
        moments, contexts, places, search = prepared(lm, method)
        edits = [case.edits[0] for case in world.cases(max(size.n))]
        rate = max(product_rates(lm).values())
        yield from self._as_plain(name, contexts)

        def search_all(few: Sequence[Edit]) -> Values:
            return search_values(lm, few, places, contexts, search)

        for n in size.n:
            few = edits[:n]
            search_values(lm, few[: min(n, 8)], places, contexts, search)  # the second call in the process counts
            with Peak(lm.device) as peak:
                took = self.seconds(partial(search_all, few))
            memory = f"{peak.nbytes / 2**30:.1f} GiB" if peak.nbytes else "memory unknown"
            what = f"search, {n} edits, {size.steps} steps"
            m = min(n, 64)
            yield (
                f"search, {m} edits, steps launched piece by piece",
                name,
                self._in_pieces(edits[:m], search_all),
                "",
            )
            if n == 1:
                yield what, name, f"{took:.2f} s", "0.4 s"
                continue
            self.an_edit[name] = 1000 * took / n
            delta = method.propose(lm, few, contexts=contexts, moments=moments)
            least = floor(lm, method, few, contexts, [r.steps for r in delta.report])
            share = f"{100 * least / took / rate:.0f} % of {rate / 1e12:.3g} TFLOP/s"
            yield what, name, f"{1000 * took / n:.1f} ms an edit, {share}, {memory}", "45 %"
            launches, waits, uploads, shapes = count(lm, few, places, contexts, search)
            yield (
                "launches / waits / uploads a step; shapes",
                name,
                f"{launches} / {waits} / {uploads}; {shapes}",
                "0 waits; 4",
            )
        few = edits[:2]
        took = self.seconds(lambda: search_values_reference(lm, few, places, contexts, search)) / len(few)
        gain = f"{1000 * took:.0f} ms, {1000 * took / self.an_edit[name]:.1f} times ours"
        yield f"plain path, one edit, {size.steps} steps", name, gain, ""

    def _in_pieces(self, edits: Sequence[Edit], search: Callable[[Sequence[Edit]], Values]) -> str:
        """Say what a search takes without captured steps and with them, and that both find the same."""
        with patch.dict(schedule.CAPTURED, clear=True):
            search(edits)
            pieces, took = timed(partial(search, edits), device=self.device)
        search(edits)
        captured, less = timed(partial(search, edits), device=self.device)
        off = self._same(captured, pieces, "captured")
        return f"{took:.2f} s; captured {less:.2f} s; values {off:.0e} apart"

    def compiled(self, name: str) -> Iterator[Row]:
        """Time a search whose steps are compiled, beside the way that the device has now."""
        lm = self.model(name)
        method = settings(SHAPES[name][1], self.size.steps)
        _, contexts, places, search = prepared(lm, method)
        edits = [case.edits[0] for case in world.cases(min(64, max(self.size.n)))]
        search_all = partial(search_values, lm, edits, places, contexts, search)
        search_all()
        now, took = timed(search_all, device=self.device)
        steps = CompiledSteps(self.device.type)
        with patch.dict(schedule.CAPTURED, {self.device.type: steps}):
            found, all_of_it = timed(search_all, device=self.device)
        if not steps.seconds:
            raise Failed(f"{name}: no step was compiled")
        off, compiling = self._same(found, now, "compiled"), sum(steps.seconds)
        shown = f"compiled {all_of_it - compiling:.2f} s, after {compiling:.0f} s of compiling; values {off:.0e} apart"
        yield f"search, {len(edits)} edits, steps as now", name, f"{took:.2f} s; {shown}", ""

    def _same(self, found: Values, wanted: Values, kind: str) -> float:
        """Return how far apart the values of two ways are.

        Raises:
            Failed: too far.
        """
        off, most = apart(found, wanted, self.dtype)
        if not off <= most:
            steps = max(r.steps for r in wanted.report)
            raise Failed(f"{kind} steps and others part by {off:.1e} after {steps} steps")
        return off

    def by_released_code(self, name: str) -> Iterator[Row]:
        """Time the released search, one edit after the other."""
        assert self.released is not None
        lm, method = self.model(name), settings(SHAPES[name][1], self.size.steps)
        edits = [case.edits[0] for case in world.cases(4)]
        layers = method.low[-1], method.high[-1]
        try:
            took = released_jeep.seconds_an_edit(self.released, lm, edits, sample_contexts(lm), layers, self.size.steps)
        except (RuntimeError, TypeError, AttributeError, ImportError, IndexError) as error:
            yield "released code, one edit", name, f"did not run: {type(error).__name__}: {error}", ""
            return
        gain = "" if name not in self.an_edit else f", {1000 * took / self.an_edit[name]:.0f} times ours"
        yield "released code, one edit", name, f"{1000 * took:.0f} ms{gain}", "60 times"

    def _as_plain(self, name: str, contexts: Contexts) -> Iterator[Row]:
        lm = self.model(name)
        method = settings(SHAPES[name][1], 2)
        places = [method.value_site(g) for g in method.groups() if g]
        edits = [case.edits[0] for case in world.cases(2)]
        fast = search_values(lm, edits, places, contexts, method.value_search())
        plain = search_values_reference(lm, edits, places, contexts, method.value_search())
        off, wanted = apart(fast, plain, lm.dtype)
        if not off <= wanted:
            raise Failed(f"{name}: fast and plain values part by {off:.1e} after two steps")
        yield "values after 2 steps, fast to plain", name, f"{off:.1e}", f"at most {wanted:g}"

    def moments(self, name: str) -> Iterator[Row]:
        """Time second moments of all edited layers in one pass, and a factor."""
        lm = self.model(name)
        sites = [lm.site(layer, "down_proj") for layer in SHAPES[name][1][:7]]
        rows = random_rows(self.size.tokens, lm.model.config.vocab_size, 0)
        found: list[torch.Tensor] = []

        def one_pass() -> None:
            for _, one in collect(lm, sites, rows):
                found[:] = [one.moment]

        took = self.seconds(one_pass)
        width = sites[0].weight.shape[1]
        what = f"moments of {len(sites)} layers, {width:,} wide, {self.size.tokens:,} tokens"
        yield what, name, f"{took:.1f} s", "90 s"
        with TemporaryDirectory() as folder:
            path, key = Path(folder) / "moment", MomentKey("", "", "", 0, 0, "", "")
            save_moments(path, {key: found[0]}, device=self.device)
            yield (
                f"moment, {width:,} wide, from disk",
                name,
                f"{self.seconds(lambda: load_moment(path, key)):.2f} s",
                "",
            )
        c = found[0].double() + torch.eye(width, dtype=torch.float64)
        factor: list[torch.Tensor] = []
        took = self.seconds(lambda: factor.append(cholesky(c, self.device)[0]))
        probe = torch.randn(width, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        off = float((factor[0] @ (factor[0].T @ probe) - c @ probe).norm() / (c @ probe).norm())
        if not off < 1e-10:
            raise Failed(f"{name}: the Cholesky factor misses its matrix by {off:.1e}")
        yield f"Cholesky factor, {width:,} wide, to and from the card", name, f"{took:.2f} s", ""

    def start(self, name: str) -> Iterator[Row]:
        """Time what precedes a first edit, and a MEMIT edit with it and after it."""
        known = self.model(name)
        known.release()
        lm = self.lm = LM(known.model, known.tokenizer, name=name)  # nothing is known of it yet
        took = self.seconds(lambda: fingerprint(lm.model))
        gib = sum(p.nbytes for p in lm.model.parameters()) / 2**30
        yield f"fingerprint of {gib:.2g} GiB, from the card", name, f"{took:.1f} s", "4 s"
        layers = SHAPES[name][1][:5]
        moments = identity(lm.site(layer, "down_proj") for layer in layers)
        memit = retcon.method("memit", layers=layers, steps=self.size.steps, stop="loss", threshold=0.0)
        edit = [case.edits[0] for case in world.cases(1)]
        for how, wanted in (("cold", "10 s"), ("warm", "3 s")):
            took = self.seconds(lambda: memit.propose(lm, edit, moments=moments))
            yield f"MEMIT, one edit, {how}", name, f"{took:.1f} s", wanted

    def evaluation(self, name: str) -> Iterator[Row]:
        """Time cases of the embedded world and those of CounterFact's shape, text included, and count their floors."""
        lm, n = self.model(name), self.size.n_cases
        rate = max(product_rates(lm).values())
        weights_read = sum(p.nbytes for p in lm.model.parameters()) / self.bandwidth()
        for kind, cases, measures, wanted in (
            ("of the world", world.cases(n), Measures(), "25 ms"),
            ("as native CounterFact has", native_cases(n), NATIVE, ""),
        ):
            ask = partial(retcon.evaluate, lm, cases, measures=measures)
            retcon.evaluate(lm, cases[:2], measures=measures)
            with noting_texts() as written:
                took = self.seconds(ask)
            least = floor_of(lm, cases, measures, written).seconds(rate, weights_read)
            shown = f"{1000 * took / n:.0f} ms a case; floor {1000 * least / n:.1f} ms"
            yield f"evaluate, {n} cases {kind}, {sum(written):,} tokens written", name, shown, wanted

    def bandwidth(self) -> float:
        """Return bytes a second at which the device's memory is read and written in one copy."""
        x = torch.empty(2**30 if self.device.type == "cuda" else 2**26, dtype=torch.uint8, device=self.device)
        return 2 * x.nbytes / seconds_of(x.clone, self.device, 3)


def parts(card: Card) -> list[tuple[str, float, Callable[[], Iterator[Row]]]]:
    """Return name, seconds on one H100 by estimate, and work of every part; a model's parts follow each other."""
    first, *others = card.size.shapes
    found: list[tuple[str, float, Callable[[], Iterator[Row]]]] = [
        ("delta as on the CPU", 30, card.same_as_the_cpu),
        (f"search, {first}", 130, lambda: card.search(first)),
        (f"start, {first}", 40, lambda: card.start(first)),
        (f"evaluation, {first}", 30, lambda: card.evaluation(first)),
        (f"moments, {first}", 100, lambda: card.moments(first)),
    ]
    for name in others:
        found.append((f"search, {name}", 120, partial(card.search, name)))
        if card.released is not None and name == RELEASED_FOR:
            found.append(("released code", 30, partial(card.by_released_code, name)))
    last = card.size.shapes[-1]
    found.append((f"compiled steps, {last}", 150, partial(card.compiled, last)))
    return found


def measure(card: Card, minutes: float) -> bool:
    """Print the table; returns whether every check held."""
    print("| what | model | measured | wanted |\n|---|---|---|---|", flush=True)
    until, held = time.monotonic() + 60 * minutes, True
    for name, seconds, part in parts(card):
        left = until - time.monotonic()
        if left < seconds and card.size is not TINY:
            print(f"| {name} | | left out: {left:.0f} s are left, it takes {seconds:.0f} | |", flush=True)
            continue
        try:
            for row in part():
                print_row(*row)
            continue
        except Exception as error:  # whatever it is, the other parts are measured
            held = False
            said = str(error).partition("\n")[0]
            kind = "" if isinstance(error, Failed) else f"{name}: {type(error).__name__}: "
            print(f"| **wrong** | | {kind}{said} | |", flush=True)
        release_memory()  # the error is gone, and what its frames held
    return held


def main(argv: Sequence[str] | None = None) -> None:
    """Print the table; exit code 1 where a result is wrong."""
    parser = command_line(__doc__)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small shapes, in float32 on a CPU")
    parser.add_argument("--released", type=Path, metavar="PATH", help="a checkout of JEEP's released code, timed too")
    args = parser.parse_args(argv)
    if args.released is not None:
        released_jeep.check(args.released)
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("no card is here; --tiny --device cpu tries the command")
    warnings.simplefilter("ignore", LargeChange)
    warnings.filterwarnings("ignore", ".*tokens per dimension")
    torch.manual_seed(0)
    where = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    dtype = dtype_on(args.device)
    print(f"{machine()}; {where}, {dtype}, seed 0\n")
    card = Card(TINY if args.tiny else FULL, args.device, getattr(torch, dtype))
    card.released = None if args.released is None else args.released.resolve()
    if not measure(card, args.minutes):
        sys.exit(1)


if __name__ == "__main__":
    main()
