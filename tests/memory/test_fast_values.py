"""The fast value search against the plain one: same vectors, same steps, on every architecture."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

import retcon
from retcon.attachment import Beside, Hook
from retcon.edits import Edit
from retcon.errors import NonFinite, OutOfMemory, RetconWarning
from retcon.lm import capacity, offload
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.memory import collect
from retcon.memory.contexts import Contexts
from retcon.memory.values import schedule
from retcon.memory.values import search as searching
from retcon.memory.values import step as step_module
from retcon.memory.values.objective import Values, ValueSearch, ValueSite
from retcon.memory.values.plan import ChunkPlan, SearchPlan, plan_search
from retcon.memory.values.reference import search_values_reference
from retcon.memory.values.rows import EditRows
from retcon.memory.values.schedule import Chunk, Pace
from retcon.memory.values.search import REPLAYS, search_values
from tests.conftest import CORE, FAMILIES, FLOAT32_INSIDE, everyday, random_moments

CONTEXTS = Contexts(("The train stood still. ", "I read. "))
LOW = ValueSite(Point(1, "mlp"), "subject_last", clamp=1.5, weight_decay=0.02)
HIGH = ValueSite(Point(2, "mlp"), "prediction", clamp=0.7, weight_decay=0.02)
ATTN = replace(LOW, point=Point(1, "attn"))
SITES: dict[str, tuple[ValueSite, ...]] = {
    "low and high": (LOW, HIGH),
    "block": (replace(LOW, point=Point(2, "block")),),
    "last block": (replace(HIGH, point=Point(3, "block")),),
    "attention and MLP": (ATTN, LOW),
    "prediction only": (HIGH,),
    "first layer": (replace(LOW, point=Point(0, "attn")),),
}
AGREE = [
    pytest.param(sites, family, marks=[] if sites == "low and high" or family == "llama" else [pytest.mark.long])
    for sites in SITES
    for family in FAMILIES
    if sites == "low and high" or family in CORE
]
"""Every kind of site on the families that differ in structure, both values of JEEP on all."""


@pytest.fixture
def mixed(edits: list[Edit]) -> list[Edit]:
    """Subjects at the start, in the middle and at the end, of one and of many tokens; short and long answers."""
    return [
        *edits,
        Edit("{}", "Zürich", "a town", id="whole"),
        Edit("Therefore it was late, and the mother tongue of {} is", "Ελλάδα", "French", id="long"),
    ]


def both(
    lm: LM, edits: Sequence[Edit], sites: Sequence[ValueSite], contexts: Contexts = CONTEXTS, *, width: int = 3,
    chunk: int = 4, **settings: Any,
) -> tuple[Values, Values]:  # fmt: skip
    search = ValueSearch(**{"steps": 6, "learning_rate": 0.2, **settings})
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no falling back
        order = [*range(1, len(edits), 2), *range(0, len(edits), 2)]
        chunks = [ChunkPlan(tuple(order[i : i + chunk]), width) for i in range(0, len(order), chunk)]
        fast = search_values(lm, edits, sites, contexts, search, plan=SearchPlan(tuple(chunks)))
    return fast, search_values_reference(lm, edits, sites, contexts, search)


def agree(fast: Values, plain: Values, tolerance: float) -> None:
    for name in ("init", "offset", "activation"):
        for a, b in zip(getattr(fast, name), getattr(plain, name), strict=True):
            assert float((a - b).norm(dim=1).max()) <= tolerance * float(b.norm(dim=1).max()), name
    for a, b in zip(fast.report, plain.report, strict=True):
        assert (a.id, a.steps, a.stopped) == (b.id, b.steps, b.stopped)
        assert a.search_probability == pytest.approx(b.search_probability, rel=100 * tolerance)
        assert a.detail == pytest.approx(b.detail, rel=100 * tolerance, abs=100 * tolerance)


def exactness(family: str) -> float:
    """Attention of GPT-J and gemma 2 computes in float32 whatever the weights are."""
    return 1e-5 if family in FLOAT32_INSIDE else 1e-10


@pytest.mark.parametrize(("sites", "family"), AGREE)
def test_fast_and_plain_agree(family: str, sites: str, tiny: Callable[..., LM], mixed: list[Edit]) -> None:
    fast, plain = both(tiny(family), mixed, SITES[sites])
    agree(fast, plain, exactness(family))


class Doubling(Beside):
    """Doubles what an MLP puts out."""

    kind = "doubling"

    def hooks(self) -> list[Hook]:
        return [Hook("model.layers.1.mlp", lambda _, out: 2 * out)]


def test_fast_and_plain_agree_where_an_attachment_acts_on_the_mlp(tiny: Callable[..., LM], mixed: list[Edit]) -> None:
    lm = tiny("llama")
    with lm.edited(Doubling(base=lm.fingerprint())):
        fast, plain = both(lm, mixed, (LOW,))
    agree(fast, plain, exactness("llama"))


@pytest.mark.parametrize("family", everyday("llama", of=[family for family in FAMILIES if family in CORE]))
def test_the_pace_of_a_card_agrees_with_plain(
    family: str, tiny: Callable[..., LM], mixed: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few shapes, places that repeat edits that have ended, and a look every eight steps."""
    monkeypatch.setattr(schedule, "LOOK_EVERY", {})
    monkeypatch.setattr(schedule, "MAX_SHAPES", {})
    assert Pace.on("cpu") == Pace(8, 4)
    fast, plain = both(tiny(family), mixed, (LOW, HIGH), width=4, chunk=6, steps=11, threshold=0.00201)
    agree(fast, plain, exactness(family))


@pytest.mark.parametrize("family", everyday("llama", of=[family for family in FAMILIES if family in CORE]))
def test_fast_and_plain_agree_in_float32(family: str, tiny: Callable[..., LM], mixed: list[Edit]) -> None:
    fast, plain = both(tiny(family, torch.float32), mixed, (LOW, HIGH))
    agree(fast, plain, 1e-5)


@pytest.mark.parametrize("cut", everyday((4, 5), of=[(1, 1), (2, 6), (6, 6), (4, 5)]), ids=str)
def test_the_way_a_batch_is_cut_up_changes_nothing(
    cut: tuple[int, int], tiny: Callable[..., LM], mixed: list[Edit]
) -> None:
    """Some edits end early, so that others take their places at different steps."""
    width, chunk = cut
    fast, plain = both(tiny("llama"), mixed, (LOW, HIGH), width=width, chunk=chunk, steps=9, threshold=0.00201)
    assert len({r.steps for r in plain.report}) > 2
    agree(fast, plain, 1e-10)


@pytest.mark.parametrize("sites", everyday("low and high", of=["low and high", "block", "attention and MLP"]))
@pytest.mark.parametrize(("padding", "passes"), [(-1, 2), (1000, 1)])
def test_kl_rows_join_the_others_or_run_apart(
    padding: int,
    passes: int,
    sites: str,
    tiny: Callable[..., LM],
    mixed: list[Edit],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lm, seen = tiny("llama"), set()
    monkeypatch.setattr(step_module, "MAX_KL_PADDING_TOKENS", {"cpu": padding})
    logits = Chunk.logits

    def counting(self: Chunk, now: Any, vectors: Any) -> Any:
        seen.add(len(now.passes))
        return logits(self, now, vectors)

    monkeypatch.setattr(Chunk, "logits", counting)
    fast, plain = both(lm, mixed, SITES[sites], threshold=0.00201)
    agree(fast, plain, 1e-10)
    assert seen == {passes}


@pytest.mark.parametrize(
    "settings",
    [
        dict(stop="loss", threshold=6.0),
        dict(kl_factor=0.0),
        dict(stop="loss", threshold=0.05, settled_factor=0.1, kl_factor=1.0, steps=12, learning_rate=0.5),
        dict(steps=1),
    ],
    ids=lambda s: " ".join(s),
)
def test_every_setting_of_the_search_means_the_same(
    settings: dict[str, Any], tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    free = tuple(replace(s, clamp=50.0, weight_decay=0.0) for s in (ATTN, LOW))
    fast, plain = both(tiny("gpt2"), edits, free, **settings)
    agree(fast, plain, 1e-9)


TOKENIZERS = [("bos", "right"), ("eos", "left"), ("piece", "left")]


@pytest.mark.parametrize(("tok", "side"), everyday(("eos", "left"), of=TOKENIZERS, rows=True))
def test_tokenizers_of_every_kind(tok: str, side: str, tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("llama", tok=tok)
    kept, lm.tokenizer.padding_side = lm.tokenizer.padding_side, side
    try:
        fast, plain = both(lm, edits, (LOW, HIGH))
    finally:
        lm.tokenizer.padding_side = kept
    agree(fast, plain, 1e-10)


def test_no_contexts_and_one_edit(tiny: Callable[..., LM], edit: Edit) -> None:
    agree(*both(tiny("opt"), [edit], (LOW, HIGH), Contexts()), 1e-10)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_get_float32_values(
    dtype: torch.dtype, tiny: Callable[..., LM], mixed: list[Edit]
) -> None:
    fast, plain = both(tiny("llama", dtype), mixed, (LOW, HIGH), steps=2)
    for a, b in zip(fast.offset, plain.offset, strict=True):
        assert a.dtype == b.dtype == torch.float32
        assert float((a - b).norm()) < 0.5 * float(b.norm())  # one step of Adam: signs of small gradients may differ
    assert [r.steps for r in fast.report] == [1] * len(mixed)


def test_no_gradient_reaches_a_weight_and_nothing_is_borrowed_for_good(
    tiny: Callable[..., LM], mixed: list[Edit], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny("gptj")
    lm.model.train()
    before = untouched(lm)
    with torch.no_grad():  # a caller's mode must not reach the search either
        search_values(lm, mixed, (LOW, HIGH), CONTEXTS, ValueSearch(steps=3))
    assert untouched(lm) == before


def test_what_cannot_be_replayed_goes_the_plain_way_with_a_warning(
    tiny: Callable[..., LM], mixed: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that looks at absolute columns instead of positions, as one with a mask of its own might."""
    lm = tiny("llama")
    forward = lm.block(3).forward

    def odd(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        scale = 1 + 0.1 * torch.arange(hidden.shape[1], dtype=hidden.dtype)
        return forward(hidden * scale[:, None], *args, **kwargs)

    monkeypatch.setattr(lm.block(3), "forward", odd)
    search = ValueSearch(steps=3)
    with pytest.warns(RetconWarning, match=r"cannot be replayed from .* differ from those of a plain forward pass by"):
        found = search_values(lm, mixed, (LOW, HIGH), CONTEXTS, search)
    agree(found, search_values_reference(lm, mixed, (LOW, HIGH), CONTEXTS, search), 1e-12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        search_values(lm, mixed[:1], (LOW, HIGH), CONTEXTS, search)  # said once
    with torch.no_grad():
        lm.block(3).mlp.down_proj.weight.mul_(1.1)
    with pytest.warns(RetconWarning, match="cannot be replayed"):
        search_values(lm, mixed[:1], (LOW, HIGH), CONTEXTS, search)  # tried again on other weights


def test_the_edit_whose_loss_is_nan_is_named(tiny: Callable[..., LM], mixed: list[Edit]) -> None:
    lm = tiny("llama")
    row = lm.encode("zz", None).ids[-1]
    with torch.no_grad():
        lm.model.model.embed_tokens.weight[row] = float("nan")
    bad = Edit("The capital of {} is", "zz", "Rome", id="bad")
    with pytest.raises(NonFinite, match=r"edit 'bad' \('zz'\)"):
        search_values(lm, [*mixed, bad], (LOW, HIGH), CONTEXTS, ValueSearch(steps=3))


def test_plans_hold_every_edit_once_whatever_the_memory(tiny: Callable[..., LM], mixed: list[Edit]) -> None:
    lm = tiny("llama")
    rows = [EditRows.of(lm, e, (LOW, HIGH), CONTEXTS, ValueSearch()) for e in mixed]
    plans = {memory: plan_search(lm, rows, (LOW, HIGH), memory=memory) for memory in (0, 100_000, 10**10)}
    for plan in plans.values():
        assert sorted(i for c in plan.chunks for i in c.edits) == list(range(len(mixed)))
        columns = [rows[i].columns for c in plan.chunks for i in c.edits]
        assert columns == sorted(columns)
        assert SearchPlan.from_json(plan.as_json()) == plan
    assert all(c.max_active == len(c.edits) == 1 for c in plans[0].chunks)
    assert len(plans[10**10].chunks) == 1 < len(plans[100_000].chunks)


def test_the_free_memory_changes_nothing(
    tiny: Callable[..., LM], mixed: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for free in (10**9, 3 * 10**8, 10**8):
        for module in (capacity, collect):
            monkeypatch.setattr(module, "free_bytes", lambda device, free=free: free)
        lm = tiny("llama", torch.float32)
        moments = random_moments(lm)
        method = retcon.method("memit", layers=(0, 1), moment_weight=1.0, steps=3)
        found.append(method.propose(lm, mixed, contexts=CONTEXTS, moments=moments).id)
    assert len(set(found)) == 1


@pytest.mark.parametrize("family", everyday("llama", of=["gptj", "llama", "gpt2"]))
@pytest.mark.parametrize("short", ["found out", "foreseen"])
def test_where_memory_is_short_the_work_takes_longer_and_no_bit_changes(
    family: str, short: str, tiny: Callable[..., LM], mixed: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = SearchPlan((ChunkPlan(tuple(range(6)), 3),))
    search = ValueSearch(steps=4)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    whole = search_values(tiny(family, torch.float32), mixed, (LOW, HIGH), CONTEXTS, search, plan=plan)
    lm, step, steps = tiny(family, torch.float32), Chunk.step, []

    def limited(self: Chunk, now: Any, *, only_measure: bool) -> None:
        steps.append(self.offload)
        if not self.offload and len(steps) == 6:
            raise torch.OutOfMemoryError("no room")
        step(self, now, only_measure=only_measure)

    monkeypatch.setattr(Chunk, "step", limited)
    if short == "foreseen":
        monkeypatch.setattr(searching, "free_bytes", lambda device: 1000)
    with pytest.warns(RetconWarning, match="memory is short for 3 edits at a time"):
        found = search_values(lm, mixed, (LOW, HIGH), CONTEXTS, search, plan=plan)
    assert steps.count(False) == (6 if short == "found out" else 0)
    assert found.plan == whole.plan
    assert found.report == whole.report
    for one, other in zip((*whole.offset, *whole.activation), (*found.offset, *found.activation), strict=True):
        assert torch.equal(one, other)


def test_running_out_of_memory_takes_less_and_says_so(
    tiny: Callable[..., LM], edits: list[Edit], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, search = tiny("llama"), ValueSearch(steps=2, shrink=True)
    wanted = search_values_reference(lm, edits, (LOW, HIGH), CONTEXTS, search)
    step = Chunk.logits

    def limited(self: Chunk, now: Any, vectors: Any) -> Any:
        if len(now.edits) > 1:
            raise torch.OutOfMemoryError("no room")
        return step(self, now, vectors)

    monkeypatch.setattr(Chunk, "logits", limited)
    with pytest.warns(RetconWarning, match="memory (is short for|ran out with) [42] edits"):
        found = search_values(
            lm, edits, (LOW, HIGH), CONTEXTS, search, plan=SearchPlan((ChunkPlan(tuple(range(4)), 4),))
        )
    agree(found, wanted, 1e-10)
    assert found.plan == {"chunks": [[4, 1]], "oom_retries": 2}

    with (
        pytest.warns(RetconWarning, match=r"memory is short for 4 edits .* changes no bit"),
        pytest.raises(OutOfMemory, match=r"4 edits active .* shrink=True \(--shrink\)"),
    ):
        search_values(
            lm, edits, (LOW, HIGH), CONTEXTS, ValueSearch(steps=2), plan=SearchPlan((ChunkPlan(tuple(range(4)), 4),))
        )

    def never(self: Chunk, now: Any, vectors: Any) -> Any:
        raise torch.OutOfMemoryError("no room")

    REPLAYS[lm] = {(lm.fingerprint(), lm.dtype, LOW.point, HIGH.point): True}
    monkeypatch.setattr(Chunk, "logits", never)
    with pytest.warns(RetconWarning), pytest.raises(OutOfMemory, match="does not fit into memory even alone"):
        search_values(lm, edits, (LOW, HIGH), CONTEXTS, search)
