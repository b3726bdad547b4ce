"""Steps captured once and launched as one: the same values, in memory that stays where it is, or the ordinary way."""

import gc
import warnings
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from benchmarks.counting import Counts
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from retcon.edits import Edit
from retcon.errors import RetconWarning
from retcon.lm.forward import Point, logits_at, unplanned_attention
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.lm.replay import capture_states, replaying
from retcon.lm.replay.fused import fused
from retcon.memory.values.captured import Capture
from retcon.memory.values.objective import ValueOf, ValueSearch
from retcon.memory.values.rows import EditRows
from retcon.memory.values.schedule import Chunk, Pace
from tests.conftest import everyday
from tests.memory.test_value_pace import CONTEXTS, FACTS, SITES

SEARCH = ValueSearch(steps=9, learning_rate=0.2, threshold=0.00201)


class Outside(TorchDispatchMode):
    """Notes the memory that operators read and have not made themselves while the mode lasts."""

    def __init__(self) -> None:
        super().__init__()
        self.read: set[int] = set()
        self._made: dict[int, Tensor] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for x in torch.utils._pytree.tree_leaves((args, kwargs)):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self._made:
                self.read.add(x.untyped_storage().data_ptr())
        found = func(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(found):
            if isinstance(x, Tensor) and x.untyped_storage().data_ptr() not in self.read:
                self._made[x.untyped_storage().data_ptr()] = x
        return found


class OnPaper:
    """Stands in for a device's graphs: does the same again, and notes which memory that read."""

    def __init__(self) -> None:
        self.read: list[list[set[int]]] = []
        """Per captured step and launch."""

    def __call__(self) -> Capture:
        def capture(work: Callable[[], None]) -> Callable[[], None]:
            runs: list[set[int]] = []
            self.read.append(runs)

            def replay() -> None:
                with Outside() as outside:
                    work()
                runs.append(outside.read)

            return replay

        return capture


def searched(lm: LM, pace: Pace, n: int = 3, *, facts: Any = FACTS) -> dict[int, ValueOf]:
    with lm.frozen_eval():
        rows = [
            EditRows.of(lm, Edit(prompt, subject, target, id=subject), SITES, CONTEXTS, SEARCH)
            for prompt, subject, target in facts
        ]
        chunk = Chunk(lm, rows, SITES, SEARCH)
        for _ in chunk.run(n, pace=pace):
            pass
    return chunk.found


@pytest.mark.parametrize("family", everyday("llama", "gemma2", of=["gptj", "llama", "gemma2"]))
def test_captured_steps_find_the_same_in_memory_that_stays(family: str, tiny: Callable[..., LM]) -> None:
    lm, paper = tiny(family), OnPaper()
    wanted = searched(lm, Pace(2, 4))
    found = searched(lm, Pace(2, 4, paper))
    assert len({f.report.steps for f in found.values()}) > 1
    for one, other in zip(found.values(), wanted.values(), strict=True):
        assert one.report == other.report
        for a, b in zip((*one.offset, *one.init, *one.activation), (*other.offset, *other.init, *other.activation)):  # noqa: B905
            assert torch.equal(a, b)
    assert sum(map(len, paper.read)) > 6
    assert max(map(len, paper.read)) > 3  # batches of other edits among them
    for runs in paper.read:
        assert all(read == runs[0] for read in runs)


def test_a_step_that_cannot_be_captured_is_made_in_the_ordinary_way(tiny: Callable[..., LM]) -> None:
    lm, tried = tiny("llama"), []

    def capture(work: Callable[[], None]) -> Callable[[], None]:
        work()  # what a capture has begun is not to be seen afterwards
        tried.append(weakref.ref(work.__self__))  # type: ignore[attr-defined]
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    wanted = searched(lm, Pace(8, 4))
    with pytest.warns(
        RetconWarning, match=r"could not be captured \(operation not permitted .* capturing\); steps are"
    ):
        gc.collect()
        gc.disable()  # the step is gone by itself, and its copies of the batch with it
        try:
            found = searched(lm, Pace(8, 4, lambda: capture))
            assert [step() for step in tried] == [None]
        finally:
            gc.enable()
    assert [f.report for f in found.values()] == [f.report for f in wanted.values()]


def test_a_search_of_few_steps_captures_nothing_it_does_not_repeat(tiny: Callable[..., LM]) -> None:
    paper = OnPaper()
    searched(tiny("gptj"), Pace(1, None, paper), facts=FACTS[:1])
    assert len(paper.read) <= 1


def test_a_cpu_captures_nothing_and_a_card_does() -> None:
    assert Pace.on("cpu").capture is None
    assert Pace.on("cuda").capture is not None
    assert Pace.on("mps").capture is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_fused_attention_gives_what_the_blocks_own_code_gives(dtype: torch.dtype, tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj", dtype)
    rows = [Row(tuple(range(5, 5 + n)), n) for n in (9, 12, 7)]
    states, _ = capture_states(lm, rows, [3, 5, 0], 1, {})
    places = (torch.tensor([0, 1, 2]), torch.tensor([5, 6, 6]))
    own = lm.block(2).attn._attn
    with lm.frozen_eval(), torch.no_grad():
        with replaying(lm, states) as inputs:
            wanted = logits_at(lm, inputs, places)
        with replaying(lm, states) as inputs, fused(lm, 1):
            assert lm.block(0).attn._attn != lm.block(1).attn._attn
            found = logits_at(lm, inputs, places)
    assert lm.block(2).attn._attn == own
    assert "_attn" not in vars(lm.block(2).attn)
    assert not torch.equal(found, wanted)  # it is another computation
    assert_close(found, wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["gptj", "gpt2", "llama", "gemma2"])
def test_activation_and_normalisation_are_one_operation_each(family: str, tiny: Callable[..., LM]) -> None:
    lm = tiny(family, torch.float32)
    rows = [Row(tuple(range(5, 5 + n)), n) for n in (9, 12, 7)]
    states, _ = capture_states(lm, rows, [3, 5, 0], 1, {})
    places = (torch.tensor([0, 1, 2]), torch.tensor([5, 6, 6]))
    found = []
    for scope in (nullcontext, partial(fused, lm, 1)):
        x = states.states.clone().requires_grad_()
        with lm.frozen_eval(), replaying(lm, replace(states, states=x)) as inputs, scope(), Counts() as counts:
            logits = logits_at(lm, inputs, places)
            (gradient,) = torch.autograd.grad(logits.square().sum(), [x])
        found.append((logits.detach(), gradient, counts.mark()))
    (wanted, wanted_gradient, before), (logits, gradient, after) = found
    assert_close(logits, wanted, rtol=1e-5, atol=1e-6)
    assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-5)
    if family in ("gptj", "gpt2"):
        assert before["tanh"] > 0 == after["tanh"]
    kinds = {"llama": "LlamaRMSNorm", "gemma2": "Gemma2RMSNorm"}
    norms = [m for m in lm.block(1).modules() if type(m).__name__ == kinds.get(family)]
    with fused(lm, 1):  # Gemma's is another formula
        assert ["forward" in vars(m) for m in norms] == [family == "llama"] * len(norms)
        if family == "llama":
            half = torch.ones(1, len(norms[0].weight), dtype=torch.bfloat16)
            assert norms[0](half).dtype == torch.float32  # as the model's own code has it


def test_other_families_are_left_alone(tiny: Callable[..., LM]) -> None:
    lm = tiny("gpt_neox")
    before = [dict(vars(m)) for m in lm.model.modules()]
    with fused(lm, 0):
        assert [dict(vars(m)) for m in lm.model.modules()] == before


def test_attention_makes_plans_only_for_shapes_that_come_again(tiny: Callable[..., LM]) -> None:
    lm = tiny("llama")
    rows = [Row(tuple(range(5, 15)), 10)]
    seen: list[bool] = []

    def note(value: Tensor) -> None:
        seen.append(torch.backends.cuda.cudnn_sdp_enabled())

    places = torch.tensor([0]), torch.tensor([0])
    states, _ = capture_states(lm, rows, [0], 1, {})
    before = torch.backends.cuda.cudnn_sdp_enabled()
    with lm.frozen_eval(), warnings.catch_warnings(), torch.no_grad():
        logits_at(lm, pad(rows), places, {Point(1, "block"): note})
        for planned in (False, True):
            with replaying(lm, states, planned=planned) as inputs:
                logits_at(lm, inputs, places, {Point(1, "block"): note})
    assert seen == [False, False, True]
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
    with pytest.raises(KeyError), unplanned_attention():
        raise KeyError
    assert torch.backends.cuda.cudnn_sdp_enabled() == before
