"""The ledger's promise: weight = cast(base + sum of the live deltas in order), and the base's own bytes at the end."""

import dis
import random
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from itertools import pairwise
from types import CodeType, FrameType
from typing import Any

import pytest
import torch
from torch import Tensor

from retcon.delta import Columns, Delta, Dense, Entries, LowRank, Region, Rows
from retcon.errors import DeltaMismatch, DeltaNotApplied, NonFinite, WeightsChanged
from retcon.lm import ledger as ledger_module
from retcon.lm.ledger import Entry, Ledger
from tests.lm.deltas import KINDS, by_hand, random_change, random_delta, same_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = {"tall": (24, 9), "wide": (7, 30), "square": (12, 12), "bias": (11,)}


class Scope:
    """What the ledger asks of a scope: a serial number, and to be alive."""

    entry: Entry

    def __init__(self, serial: int = 0) -> None:
        self.serial = serial


class Bench:
    """A ledger over a few parameters, with copies of their base beside it."""

    def __init__(self, dtype: torch.dtype = torch.float32, shapes: dict[str, tuple[int, ...]] = SHAPES) -> None:
        generator = torch.Generator().manual_seed(5)
        self.weights = {
            name: torch.nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
            for name, shape in shapes.items()
        }
        for weight in self.weights.values():
            weight.data.reshape(-1)[::3] = -0.0
        self.base = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.ledger = Ledger(self.weights)
        self.n_scopes = 0

    def enter(self, delta: Delta) -> "Scope":
        """A scope with a delta."""
        self.n_scopes += 1
        scope = Scope(self.n_scopes)
        scope.entry = self.ledger.push(delta, weakref.ref(scope))
        return scope

    @contextmanager
    def without_deltas(self) -> Iterator[None]:
        self.n_scopes += 1
        scope = Scope(self.n_scopes)
        self.ledger.hide(weakref.ref(scope))
        try:
            yield
        finally:
            self.ledger.leave(scope.serial)

    def leave(self, scope: "Scope") -> None:
        self.ledger.leave(scope.serial)

    def holds(self, deltas: list[Delta]) -> bool:
        return all(torch.equal(w, by_hand(self.base[n], n, deltas)) for n, w in self.weights.items())

    def is_base(self) -> bool:
        return all(same_bytes(w, self.base[n]) for n, w in self.weights.items())


def one(name: str, *changes: object, **record: object) -> Delta:
    return Delta({name: changes}, base="base", **record)  # type: ignore[arg-type,dict-item]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("region", [None, Region(0, 2, 6), Region(1, 3, 9)], ids=["whole", "rows", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_apply_gives_base_plus_change_and_revert_the_bytes(
    kind: str, region: Region | None, dtype: torch.dtype
) -> None:
    bench = Bench(dtype)
    precision = torch.float64 if dtype == torch.float64 else torch.float32
    delta = one("square", random_change(kind, (12, 12), region=region, dtype=precision))
    bench.ledger.push(delta)
    assert bench.holds([delta])
    assert not torch.equal(bench.weights["square"], bench.base["square"])
    exact = bench.base["square"].double() + delta.dense("square", (12, 12))
    torch.testing.assert_close(
        bench.weights["square"].detach().double(), exact, rtol=4 * torch.finfo(dtype).eps, atol=1e-6
    )
    bench.ledger.remove(delta)
    assert bench.is_base()
    assert bench.ledger.nbytes() == 0


@pytest.mark.parametrize("kind", ["entries", "dense"])
def test_biases_and_their_regions(kind: str) -> None:
    bench = Bench()
    deltas = [
        one("bias", random_change(kind, (11,), 1)),
        one("bias", random_change(kind, (11,), 2, region=Region(0, 4, 9))),
    ]
    for delta in deltas:
        bench.ledger.push(delta)
    assert bench.holds(deltas)
    bench.ledger.remove(deltas[0])
    assert bench.holds(deltas[1:])
    bench.ledger.clear()
    assert bench.is_base()


def test_a_single_number_can_be_changed() -> None:
    bench = Bench(shapes={"scale": ()})
    delta = one("scale", Dense(full=torch.tensor(0.5)))
    bench.ledger.push(delta)
    assert bench.holds([delta])
    bench.ledger.clear()
    assert bench.is_base()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_any_order_of_applying_and_removing(seed: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """A random walk over push, remove anywhere, scopes inside scopes and `off`; held to the plain sum at each step."""
    if seed % 2:
        monkeypatch.setattr(ledger_module, "_BLOCK", 40)  # written in several blocks, as large matrices are
    bench, rng = Bench(dtype), random.Random(seed)
    deltas = [random_delta(100 * seed + i, SHAPES) for i in range(14)]
    live: list[Delta] = []
    scopes: list[tuple[Delta, Scope]] = []
    for _ in range(60):
        spare = [d for d in deltas if d not in live]
        move = rng.random()
        if spare and move < 0.4:
            delta = rng.choice(spare)
            bench.ledger.push(delta)
            live.append(delta)
        elif spare and move < 0.6:
            delta = rng.choice(spare)
            scopes.append((delta, bench.enter(delta)))
            live.append(delta)
        elif scopes and move < 0.75:
            delta, scope = scopes.pop()
            if scope.entry in bench.ledger.entries:  # else it was removed meanwhile, and perhaps applied anew
                live.remove(delta)
            bench.leave(scope)
        elif live and move < 0.95:
            delta = rng.choice(live)
            bench.ledger.remove(delta)
            live.remove(delta)
        else:
            with bench.without_deltas():
                assert bench.is_base()
        assert bench.ledger.applied == tuple(live)
        assert bench.holds(live)
        assert all(torch.equal(bench.ledger.base_values(n), b) for n, b in bench.base.items())
    bench.ledger.clear()
    assert bench.is_base()
    for _, scope in reversed(scopes):
        bench.leave(scope)  # gone already: nothing left to do
    assert bench.is_base()


def test_leaving_a_scope_after_an_older_delta_was_removed_inside_it() -> None:
    bench = Bench()
    older, inner = one("tall", random_change("dense", (24, 9), 1)), one("tall", random_change("dense", (24, 9), 2))
    bench.ledger.push(older)
    scope = bench.enter(inner)
    bench.ledger.remove(older)
    bench.leave(scope)
    assert bench.ledger.applied == ()
    assert bench.is_base()


def test_superseding_takes_off_and_puts_back() -> None:
    bench = Bench()
    a, b = one("tall", random_change("rows", (24, 9), 1)), one("wide", random_change("low_rank", (7, 30), 2))
    instead = one("tall", random_change("dense", (24, 9), 3), supersedes=(a.id, b.id))
    again = one("square", random_change("entries", (12, 12), 4), supersedes=(instead.id,))
    for delta in (a, b, instead):
        bench.ledger.push(delta)
    assert bench.ledger.applied == (instead,)
    assert bench.holds([instead])
    bench.ledger.push(again)
    assert bench.ledger.applied == (again,)
    assert bench.holds([again])
    with pytest.raises(DeltaNotApplied, match=f"{instead.id} is superseded by {again.id}; revert that one first"):
        bench.ledger.remove(instead)
    assert bench.holds([again])
    bench.ledger.remove(again)
    assert bench.holds([instead])
    bench.ledger.remove(instead)
    assert bench.ledger.applied == (a, b)
    assert bench.holds([a, b])
    bench.ledger.clear()
    assert bench.is_base()


def test_superseding_in_a_scope() -> None:
    bench = Bench()
    a, b = one("tall", random_change("rows", (24, 9), 1)), one("tall", random_change("columns", (24, 9), 2))
    instead = one("tall", random_change("dense", (24, 9), 3), supersedes=(a.id,))
    bench.ledger.push(a)
    bench.ledger.push(b)
    scope = bench.enter(instead)
    assert bench.holds([b, instead])
    bench.leave(scope)
    assert bench.ledger.applied == (a, b)
    assert bench.holds([a, b])


def test_superseding_what_is_not_live_is_refused() -> None:
    bench = Bench()
    with pytest.raises(DeltaNotApplied, match="supersedes feedbeef, which is not applied"):
        bench.ledger.push(one("tall", random_change("rows", (24, 9)), supersedes=("feedbeef",)))
    assert bench.is_base()


def test_twice_or_never_is_refused() -> None:
    bench = Bench()
    a, b = one("tall", random_change("rows", (24, 9), 1)), one("tall", random_change("rows", (24, 9), 2))
    bench.ledger.push(a)
    with pytest.raises(DeltaNotApplied, match=f"delta {a.id} is applied already; revert it first"):
        bench.ledger.push(a)
    with pytest.raises(DeltaNotApplied, match=f"delta {b.id} is not applied; applied: {a.id}"):
        bench.ledger.remove(b)
    assert bench.holds([a])


def test_a_failure_in_the_middle_leaves_the_weights_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = Bench()
    first = random_delta(1, SHAPES)
    bench.ledger.push(first)
    held = bench.ledger.nbytes()
    bad = Delta(
        {
            "tall": (random_change("rows", (24, 9), 1), random_change("dense", (24, 9), 2)),
            "wide": (random_change("dense", (7, 30), 2), Dense(full=torch.ones(3, 3))),
        },
        base="base",
    )
    with pytest.raises(RuntimeError):
        bench.ledger.push(bad)
    assert bench.holds([first])
    assert bench.ledger.nbytes() == held

    good = Delta({n: (random_change("dense", s, 7),) for n, s in SHAPES.items()}, base="base")
    put, calls = Ledger._write, []

    def failing(self: Ledger, name: str, touched: object) -> None:
        calls.append(name)
        if len(calls) == 3:
            raise MemoryError("no room")
        put(self, name, touched)  # type: ignore[arg-type]

    monkeypatch.setattr(Ledger, "_write", failing)
    for supersedes in ((), (first.id,)):
        calls.clear()
        with pytest.raises(MemoryError):
            bench.ledger.push(Delta(good.changes, base="base", supersedes=supersedes))
        assert bench.ledger.applied == (first,)
        assert bench.holds([first])
    monkeypatch.undo()
    bench.ledger.clear()
    assert bench.is_base()


# --- what is kept for undoing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "places"),
    [
        (Rows(index=torch.tensor([3, 90]), rows=torch.ones(2, 50)), 2 * 50),
        (Columns(index=torch.tensor([7]), columns=torch.ones(100, 1)), 100),
        (Entries(index=torch.tensor([0, 77, 4999]), entries=torch.ones(3)), 3),
        (LowRank(left=torch.ones(100, 1), right=torch.ones(1, 50)), 5000),
        (Rows(index=torch.arange(26), rows=torch.ones(26, 50)), 5000),  # a quarter and more: the whole costs less
        (Rows(index=torch.tensor([1]), rows=torch.ones(1, 50), region=Region(0, 10, 20)), 5000),
    ],
    ids=["rows", "columns", "entries", "low_rank", "many rows", "region"],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_only_touched_places_are_kept(change: object, places: int, dtype: torch.dtype) -> None:
    bench = Bench(dtype, {"w": (100, 50)})
    bench.ledger.push(one("w", change))
    assert bench.ledger.nbytes() == places * (dtype.itemsize + 4)  # base in the stored dtype, the sum in float32


def test_what_is_kept_grows_to_the_union_and_shrinks_again() -> None:
    bench = Bench(shapes={"w": (100, 50)})
    row, both = (one("w", Rows(index=torch.tensor(i), rows=torch.ones(len(i), 50))) for i in ([4, 9], [60, 9, 2]))
    column = one("w", Columns(index=torch.tensor([7]), columns=torch.ones(100, 1)))
    sizes = []
    for delta in (row, both, column):
        bench.ledger.push(delta)
        sizes.append(bench.ledger.nbytes() // 8)
    assert sizes == [2 * 50, 4 * 50, 5000]
    assert bench.holds([row, both, column])
    bench.ledger.remove(column)
    assert bench.ledger.nbytes() // 8 == 4 * 50
    assert bench.holds([row, both])
    bench.ledger.remove(row)
    assert bench.ledger.nbytes() // 8 == 3 * 50
    assert bench.holds([both])


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[int, int]]:
    """counted() -> (changes added, parameters written) since it was last asked."""
    counts = [0, 0]
    accumulate, write = ledger_module._accumulate, Ledger._write

    def counting(*args: object) -> None:
        counts[0] += 1
        accumulate(*args)  # type: ignore[arg-type]

    def writing(*args: object) -> None:
        counts[1] += 1
        write(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(ledger_module, "_accumulate", counting)
    monkeypatch.setattr(Ledger, "_write", writing)

    def look() -> tuple[int, int]:
        found = (counts[0], counts[1])
        counts[:] = [0, 0]
        return found

    return look


def test_the_work_is_linear_in_the_number_of_deltas(counted: Callable[[], tuple[int, int]]) -> None:
    bench, n = Bench(shapes={"w": (4096, 4), "v": (12, 12)}), 400
    deltas = [one("w", Rows(index=torch.tensor([i]), rows=torch.full((1, 4), float(i)))) for i in range(n - 1)]
    deltas.append(one("v", random_change("low_rank", (12, 12))))
    for delta in deltas:
        bench.ledger.push(delta)
    assert counted() == (n, n)
    inner = one("w", Rows(index=torch.tensor([5]), rows=torch.ones(1, 4)))
    scope = bench.enter(inner)
    bench.leave(scope)
    assert counted() == (1, 2)  # a scope on top of hundreds costs one delta, there and back
    bench.ledger.remove(deltas[-1])
    assert counted() == (0, 0)  # the other parameter is not replayed
    bench.ledger.remove(deltas[n // 2])
    assert counted() == (n - 2, 1)
    bench.ledger.clear()
    assert counted() == (0, 0)
    assert bench.is_base()


def test_casting_once_keeps_what_casting_every_step_loses() -> None:
    """200 small deltas in bfloat16."""
    generator = torch.Generator().manual_seed(3)
    base = torch.randn(32, 48, generator=generator).bfloat16()
    bench = Bench(torch.bfloat16, {"w": (32, 48)})
    bench.weights["w"].data.copy_(base)
    stepwise, exact = base.clone(), torch.zeros(32, 48, dtype=torch.float64)
    for _ in range(200):
        left, right = torch.randn(32, 1, generator=generator), torch.randn(1, 48, generator=generator) * 0.004
        bench.ledger.push(one("w", LowRank(left=left, right=right)))
        stepwise += (left @ right).bfloat16()
        exact += left.double() @ right.double()

    def error(weight: Tensor) -> float:
        return float((weight.detach().double() - base.double() - exact).norm() / exact.norm())

    assert error(bench.weights["w"]) < 0.05
    assert error(stepwise) > 4 * error(bench.weights["w"])


# --- off -----------------------------------------------------------------------------------------------------------


def test_off_shows_the_base_and_comes_back_even_on_failure() -> None:
    bench = Bench(torch.bfloat16)
    deltas = [random_delta(i, SHAPES) for i in range(4)]
    for delta in deltas:
        bench.ledger.push(delta)
    with pytest.raises(ValueError, match="inside"), bench.without_deltas():
        assert bench.is_base()
        with bench.without_deltas():
            assert bench.is_base()
        assert bench.is_base()
        raise ValueError("inside")
    assert bench.holds(deltas)


@pytest.mark.parametrize("what", ["push", "remove"])
def test_nothing_is_applied_or_removed_while_off(what: str) -> None:
    bench = Bench()
    a, b = random_delta(1, SHAPES), random_delta(2, SHAPES)
    bench.ledger.push(a)
    act = {"push": lambda: bench.ledger.push(b), "remove": lambda: bench.ledger.remove(a)}[what]
    with bench.without_deltas():
        with pytest.raises(DeltaNotApplied, match="off for the moment"):
            act()
        assert bench.is_base()
    assert bench.holds([a])


def test_base_values_stay_whatever_is_pushed_later() -> None:
    bench = Bench()
    bench.ledger.push(one("tall", random_change("columns", (24, 9))))
    found = {name: bench.ledger.base_values(name) for name in ("tall", "wide")}
    bench.ledger.push(random_delta(1, SHAPES))
    assert all(same_bytes(values, bench.base[name]) for name, values in found.items())
    assert not any(values.requires_grad for values in found.values())


def test_a_region_outside_the_parameter_is_refused_and_leaves_no_trace() -> None:
    bench = Bench()
    with pytest.raises(DeltaMismatch, match=r"lies outside a parameter of shape \(24, 9\)"):
        bench.ledger.push(one("tall", Dense(full=torch.ones(24, 4), region=Region(1, 6, 10))))
    assert bench.is_base()
    assert bench.ledger.nbytes() == 0


# --- modes of torch ------------------------------------------------------------------------------------------------


def test_any_autograd_mode_will_do_at_any_time() -> None:
    """A scope inside inference mode, then one outside: what is kept is updated in place by both."""
    bench = Bench()
    deltas = [one("tall", random_change("rows", (24, 9), i)) for i in range(4)]
    with torch.inference_mode():
        made_inside = one("tall", Dense(full=torch.full((24, 9), 0.25)))
        bench.ledger.push(deltas[0])
        scope = bench.enter(deltas[1])
    bench.ledger.push(deltas[2])
    bench.ledger.remove(deltas[2])
    bench.leave(scope)
    bench.ledger.push(made_inside)
    with torch.inference_mode():
        bench.ledger.push(deltas[3])
        with bench.without_deltas():
            assert bench.is_base()
    assert bench.holds([deltas[0], made_inside, deltas[3]])
    bench.ledger.clear()
    assert bench.is_base()
    (bench.weights["tall"] * 2).sum().backward()  # the weight is still one that training can use
    assert bench.weights["tall"].grad is not None


def test_changes_that_ask_for_gradients_leave_no_graph_behind() -> None:
    bench = Bench()
    left = torch.ones(24, 1, requires_grad=True)
    delta = one("tall", LowRank(left=left * 2, right=torch.ones(1, 9)))
    bench.ledger.push(delta)
    assert not bench.ledger._records["tall"].total.requires_grad
    assert bench.weights["tall"].is_leaf
    assert bench.weights["tall"].requires_grad


def test_a_scope_that_widens_what_is_kept_costs_one_delta_too(counted: Callable[[], tuple[int, int]]) -> None:
    bench = Bench(shapes={"w": (100, 50)})
    below = [one("w", Rows(index=torch.tensor([i]), rows=torch.ones(1, 50))) for i in range(10)]
    for delta in below:
        bench.ledger.push(delta)
    held = bench.ledger.nbytes()
    counted()
    inner = one("w", random_change("low_rank", (100, 50)))
    scope = bench.enter(inner)
    assert bench.holds([*below, inner])
    bench.leave(scope)
    assert counted() == (1, 2)
    assert bench.holds(below)
    assert bench.ledger.nbytes() == held
    bench.ledger.clear()
    assert bench.is_base()


# --- cut anywhere --------------------------------------------------------------------------------------------------


def test_a_scope_that_is_gone_without_having_been_left_is_taken_off_by_the_next_call() -> None:
    bench = Bench()
    older, inner, newer = (random_delta(i, SHAPES) for i in range(3))
    bench.ledger.push(older)
    scope = bench.enter(inner)
    bench.ledger.push(newer)
    del scope  # as after an interrupt that kept __exit__ from running
    assert not bench.ledger.settled
    assert bench.ledger.applied == (older, newer)
    bench.ledger.settle()
    assert bench.ledger.settled
    assert bench.holds([older, newer])


def test_a_scope_that_ends_takes_those_with_it_that_began_inside() -> None:
    bench = Bench()
    older, outer, inner, plain = (random_delta(i, SHAPES) for i in range(4))
    bench.ledger.push(older)
    scopes = [Scope(1), Scope(2), Scope(3)]
    for delta, scope in zip((outer, inner), scopes, strict=False):
        bench.ledger.push(delta, weakref.ref(scope))
    bench.ledger.push(plain)
    bench.ledger.hide(weakref.ref(scopes[2]))
    bench.ledger.leave(1)
    assert bench.ledger.applied == (older, plain)
    assert bench.holds([older, plain])


def test_a_base_shown_by_a_scope_that_is_gone_is_hidden_again_by_the_next_call() -> None:
    bench = Bench()
    deltas = [random_delta(i, SHAPES) for i in range(2)]
    bench.ledger.push(deltas[0])
    scope = Scope()
    bench.ledger.hide(weakref.ref(scope))
    assert bench.is_base()
    del scope
    assert not bench.ledger.settled
    bench.ledger.push(deltas[1])
    assert bench.holds(deltas)


def test_clear_works_in_every_state_and_ends_scopes() -> None:
    bench = Bench()
    a, b = (random_delta(i, SHAPES) for i in range(2))
    bench.ledger.push(a)
    scope, hiding = bench.enter(b), Scope()
    bench.ledger.hide(weakref.ref(hiding))
    bench.ledger.clear()
    assert bench.is_base()
    assert (bench.ledger.applied, bench.ledger.hidden, bench.ledger.nbytes()) == ((), False, 0)
    bench.leave(scope)
    bench.ledger.leave(hiding.serial)
    bench.ledger.push(a)
    assert bench.holds([a])


# --- changes from outside ------------------------------------------------------------------------------------------


def _halve(weight: torch.nn.Parameter) -> None:
    weight.data = weight.data.half()


OUTSIDE = {
    "data += 1": lambda w: w.data.add_(1),
    "in place": lambda w: w.detach().view(-1)[1:2].add_(1),
    "another tensor": lambda w: setattr(w, "data", w.data + 1),
    "half": _halve,
}


@pytest.mark.parametrize("what", OUTSIDE)
@pytest.mark.parametrize("call", ["push", "remove", "clear", "hide"])
def test_what_something_else_has_changed_is_noticed_before_it_is_overwritten(what: str, call: str) -> None:
    bench = Bench()
    a, b = one("tall", random_change("dense", (24, 9), 1)), one("tall", random_change("dense", (24, 9), 2))
    bench.ledger.push(a)
    with torch.no_grad():
        OUTSIDE[what](bench.weights["tall"])
    changed = bench.weights["tall"].detach().clone()
    scope = Scope()
    act = {
        "push": lambda: bench.ledger.push(b),
        "remove": lambda: bench.ledger.remove(a),
        "clear": bench.ledger.clear,
        "hide": lambda: bench.ledger.hide(weakref.ref(scope)),
    }[call]
    with pytest.raises(
        WeightsChanged, match=r"tall: its weights were changed by something else .*revert_all\(force=True"
    ):
        act()
    assert same_bytes(bench.weights["tall"], changed)
    bench.ledger.clear(force=True)
    assert torch.equal(bench.weights["tall"].float(), bench.base["tall"].to(changed.dtype).float())
    assert bench.ledger.applied == ()


def test_what_leaves_the_values_as_they_are_is_no_change() -> None:
    bench = Bench()
    a, b = (random_delta(i, SHAPES) for i in range(2))
    bench.ledger.push(a)
    for weight in bench.weights.values():
        with torch.no_grad():
            weight.mul_(1)  # the version counter goes up
        weight.data = weight.data.clone()  # another place in memory
    bench.ledger.push(b)
    assert bench.holds([a, b])
    bench.ledger.clear()
    assert bench.is_base()


@pytest.mark.parametrize(
    ("dtype", "change"),
    [
        (torch.float16, Dense(full=torch.full((24, 9), 7e4))),
        (torch.float32, LowRank(left=torch.full((24, 1), 1e25), right=torch.full((1, 9), 1e25))),
        (torch.bfloat16, Dense(full=torch.full((24, 9), 1e300, dtype=torch.float64))),
    ],
    ids=["beyond float16", "a product of finite factors", "float64"],
)
def test_a_change_that_does_not_fit_the_dtype_is_refused(dtype: torch.dtype, change: object) -> None:
    bench = Bench(dtype)
    kept = one("wide", random_change("rows", (7, 30)))
    bench.ledger.push(kept)
    with pytest.raises(NonFinite, match=r"tall: with this change the weights would be NaN or infinite"):
        bench.ledger.push(one("tall", change))
    assert bench.holds([kept])
    assert bench.ledger.applied == (kept,)


def test_a_base_that_holds_nan_is_refused_by_name() -> None:
    bench = Bench()
    bench.weights["tall"].data[3, 3] = torch.nan
    with pytest.raises(NonFinite, match=r"tall: the model's own weights hold NaN"):
        bench.ledger.push(one("tall", random_change("dense", (24, 9))))
    assert bench.ledger.nbytes() == 0


CHANGES_STATE = {"_drop", "_exchange", "settle", "_bring", "_summed", "_cover", "_show_base"}


class CutAt:
    """Raises KeyboardInterrupt after the n-th call or store in the ledger's functions that change its state.

    The other bytecodes leave everything that others can see as it is.
    """

    def __init__(self, n: int) -> None:
        self.left = n

    def __enter__(self) -> "CutAt":
        sys.settrace(self.call)
        return self

    def __exit__(self, *_: object) -> None:
        sys.settrace(None)

    def call(self, frame: FrameType, event: str, arg: object) -> Any:
        if frame.f_code.co_filename != ledger_module.__file__ or frame.f_code.co_name not in CHANGES_STATE:
            return None
        frame.f_trace_opcodes = True
        return self.step

    def step(self, frame: FrameType, event: str, arg: object) -> Any:
        if event == "opcode" and frame.f_lasti in _after_effects(frame.f_code):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
        return self.step


@cache
def _after_effects(code: CodeType) -> frozenset[int]:
    """Offsets of the instructions that follow a call or a store outside the frame."""
    kinds = ("CALL", "STORE_ATTR", "STORE_SUBSCR", "DELETE_SUBSCR")
    return frozenset(b.offset for a, b in pairwise(dis.get_instructions(code)) if a.opname.startswith(kinds))


def _scope_on_the_same_places(bench: Bench) -> None:
    bench.leave(bench.enter(one("tall", random_change("rows", (24, 9), 3))))


def _scope_that_widens(bench: Bench) -> None:
    bench.leave(bench.enter(one("tall", random_change("columns", (24, 9), 4))))


def _hide(bench: Bench) -> None:
    with bench.without_deltas():
        pass


def _remove(bench: Bench) -> None:
    bench.ledger.remove(bench.ledger.applied[0])


@pytest.mark.parametrize("call", [_scope_on_the_same_places, _scope_that_widens, _hide, _remove])
def test_a_cut_anywhere_is_finished_by_the_next_call(call: Callable[[Bench], None]) -> None:
    deltas = [one("tall", random_change("rows", (24, 9), seed)) for seed in (1, 2)]
    for n in range(1, 10_000):
        bench = Bench(shapes={"tall": (24, 9)})
        for delta in deltas:
            bench.ledger.push(delta)
        tracer = CutAt(n)
        with suppress(KeyboardInterrupt), tracer:
            call(bench)
        bench.ledger.settle()
        assert bench.holds(list(bench.ledger.applied)), n
        assert set(bench.ledger.applied) <= set(deltas)
        bench.ledger.clear()
        assert bench.is_base(), n
        if tracer.left > 0:
            return
    raise AssertionError("the call never ran to its end")
