"""Attachments that are not weights: attached, measured, saved, loaded, detached; mixed with deltas; cut anywhere."""

import pickle
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from retcon import attachment
from retcon.attachment import Attachment, Beside, Cost, Hook
from retcon.bench.protocol import run_protocol
from retcon.bench.spec import Protocol
from retcon.bench.units import Unit, Units
from retcon.delta import Delta, Dense
from retcon.edits import Case, Edit, Query
from retcon.errors import DeltaMismatch, InvalidSetting, MalformedFile, WrongBase
from retcon.evaluation import Evaluation, Measures, evaluate
from retcon.evaluation.score import score
from retcon.export import export
from retcon.lm.model import LM
from retcon.methods.common.sequence import in_steps
from tests.lookup import InContext, Lookup, LookupEditor

Make = Callable[..., LM]
WEIGHT = "transformer.h.0.mlp.fc_out.weight"
NAMES = ["France", "Italy", "Florence"]
EDITS = [Edit("The capital of {} is", name, "Rome", "Paris", id=name) for name in NAMES]
CASES = [
    Case(
        edit.id,
        (edit,),
        (
            Query("rewrite/0", "rewrite", edit.text, "Rome", "Paris"),
            Query("neighborhood/0", "neighborhood", f"He lived near {edit.subject} in", "Paris", "Rome"),
        ),
    )
    for edit in EDITS
]


def logits(lm: LM, text: str = EDITS[0].text) -> torch.Tensor:
    with lm.frozen_eval(), torch.no_grad():
        return lm.model(input_ids=torch.tensor([lm.encode(text).ids]), use_cache=False).logits[0]  # type: ignore[no-any-return]


def noise(lm: LM, seed: int) -> Delta:
    generator = torch.Generator().manual_seed(seed)
    return lm.delta({WEIGHT: [Dense(full=0.1 * torch.randn(lm.parameter(WEIGHT).shape, generator=generator).double())]})


def n_hooks(lm: LM) -> int:
    return sum(len(m._forward_hooks) for m in lm.model.modules())


@pytest.fixture
def lm(tiny: Make) -> LM:
    return tiny()


def test_it_says_the_new_answer_where_it_should_and_is_gone_without_a_trace(lm: LM, untouched: Any) -> None:
    look, before, elsewhere = untouched(lm), logits(lm), logits(lm, "He lived near Milan in")
    found = LookupEditor().propose(lm, EDITS[:1])
    assert isinstance(found, Attachment)
    assert untouched(lm) == look
    with lm.edited(found):
        row = lm.encode(EDITS[0].text, "Rome")
        assert int(logits(lm)[row.prediction].argmax()) == row.target_ids[0]
        assert torch.equal(logits(lm, "He lived near Milan in"), elsewhere)
        assert lm.applied == (found,)
        with lm.without_deltas():
            assert torch.equal(logits(lm), before)
        assert n_hooks(lm) == 1
    assert untouched(lm) == look
    assert torch.equal(logits(lm), before)


ON_ANOTHER_BASE = pytest.mark.filterwarnings("ignore:delta .* was proposed on top of:retcon.errors.RetconWarning")


@ON_ANOTHER_BASE
def test_it_mixes_with_deltas_and_everything_comes_off_in_any_order(lm: LM, untouched: Any) -> None:
    look = untouched(lm)
    parts: list[Attachment] = [noise(lm, 1), LookupEditor().propose(lm, EDITS[:1]), noise(lm, 2)]
    for order in permutations(range(3)):
        for part in parts:
            lm.apply(part)
        alone = {}
        for taken in order:
            lm.revert(parts[taken])
            left = [i for i in range(3) if parts[i] in lm.applied]
            alone[tuple(left)] = logits(lm)
        assert untouched(lm) == look
        for left, seen in alone.items():
            with lm.edited(*(parts[i] for i in left)):
                assert torch.equal(logits(lm), seen)
    assert untouched(lm) == look


@ON_ANOTHER_BASE
def test_two_lookups_on_one_module_act_in_order(lm: LM) -> None:
    first, second = (
        Lookup(base=lm.fingerprint(), settings={"module": "transformer.h.1.mlp"}, tensors={"keys": k, "values": v})
        for k, v in ((torch.zeros(1, 32), torch.zeros(1, 32)), (torch.ones(1, 32), torch.ones(1, 32)))
    )
    lm.apply(first)
    lm.apply(second)
    module = lm.model.get_submodule("transformer.h.1.mlp")
    marks = [hook.mark for hook in module._forward_hooks.values()]
    assert marks == [(first.id, 0), (second.id, 0)]
    lm.revert(first)
    assert [hook.mark for hook in module._forward_hooks.values()] == [(second.id, 0)]
    lm.revert_all()
    assert not module._forward_hooks


def test_a_file_gives_the_same_back_and_says_what_is_wrong_with_it(lm: LM, tmp_path: Path) -> None:
    found = LookupEditor().propose(lm, EDITS[:2])
    found.save(path := tmp_path / "lookup.safetensors")
    again = attachment.load(path)
    assert isinstance(again, Lookup)
    assert (again, again.report, again.edits, again.provenance) == (found, found.report, found.edits, found.provenance)
    with lm.edited(found):
        expected = logits(lm)
    with lm.edited(again):
        assert torch.equal(logits(lm), expected)
    with pytest.raises(MalformedFile, match=r"holds 'lookup', not a delta; retcon\.attachment\.load"):
        Delta.load(path)
    copied = pickle.loads(pickle.dumps(found))
    assert (copied, copied.report, copied.settings) == (found, found.report, found.settings)
    with pytest.raises(TypeError, match="an attachment stays as it is"):
        copied.settings["x"] = 1
    delta = noise(lm, 3)
    delta.save(other := tmp_path / "delta.safetensors")
    assert attachment.load(other) == delta

    damaged = bytearray(path.read_bytes())
    damaged[-3] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(MalformedFile, match="damaged"):
        attachment.load(path)
    with pytest.raises(MalformedFile, match="no such file"):
        attachment.load(tmp_path / "nothing.safetensors")
    save_file({"x": torch.ones(1)}, unknown := tmp_path / "unknown.safetensors", {"retcon": '{"kind": "wise"}'})
    with pytest.raises(MalformedFile, match=r"kind 'wise'.*known: delta, in-context, lookup.*install the package"):
        attachment.load(unknown)


def test_tensors_in_the_same_memory_are_saved_each_for_itself(lm: LM, tmp_path: Path) -> None:
    both = torch.arange(12.0).reshape(3, 4)
    tensors = {"all": both, "row": both[1], "column": both[:, 1], "again": both}
    found = Lookup(base="b", settings={"module": "m"}, tensors=tensors, state={"all": both})
    found.save(path := tmp_path / "shared.safetensors")
    again = Lookup.load(path)
    assert again == found
    assert all(torch.equal(again.tensors[name], tensor) for name, tensor in tensors.items())
    assert again.state is not None
    assert torch.equal(again.state["all"], both)


def test_it_is_measured_as_a_delta_is(lm: LM) -> None:
    found = LookupEditor().propose(lm, EDITS)
    summary = evaluate(lm, CASES, delta=found, generate=False).summary()
    assert summary["ES"].pre is not None
    assert summary["ES"].post is not None
    assert summary["ES"].post.value == 1.0 > summary["ES"].pre.value  # type: ignore[operator]
    assert summary["LS"].post.value == summary["LS"].pre.value  # type: ignore[union-attr]
    assert not lm.applied


def test_in_steps_makes_one_of_many(lm: LM) -> None:
    whole = in_steps(LookupEditor(), lm, EDITS, batch_size=1)
    assert isinstance(whole, Lookup)
    assert whole.tensors["keys"].shape[0] == 3
    assert [r.id for r in whole.report] == NAMES
    with lm.edited(whole):
        for edit in EDITS:
            row = lm.encode(edit.text, edit.target_new)
            assert int(logits(lm, edit.text)[row.prediction].argmax()) == row.target_ids[0]
    assert whole.parents == ()
    with pytest.raises(InvalidSetting, match="cannot be joined"):
        InContext(base="b", settings={"before": "x"}).joined(InContext(base="b", settings={"before": "y"}))


def test_a_benchmark_keeps_it_and_takes_it_up_again(lm: LM, tmp_path: Path) -> None:
    units = Units(tmp_path, "run")
    found = LookupEditor().propose(lm, EDITS[:1])
    units.save_delta("000000-a", found)
    assert units.load_delta(Unit("000000-a", (), {}, (), delta=found.id)) == found

    def propose(lm: LM, edits: Any, state: Any) -> Attachment:
        return LookupEditor().propose(lm, edits)

    told = run_protocol(lm, CASES, propose, Protocol(kind="sequential"), measures=Measures(generate=False))
    final = [r.value for r in told.records if r.when == "final" and r.axis == "rewrite" and r.variant == "cf.prob_mean"]
    assert final == [1.0] * 3
    assert not lm.applied


def test_an_editor_at_the_prompt_acts_before_tokens_are_made(lm: LM, tmp_path: Path) -> None:
    plain = lm.encode("The capital of Italy is")
    said = lm.complete("The capital of Italy is", max_new_tokens=4)
    told = InContext(base=lm.fingerprint(), settings={"before": "The capital of France is Rome."})
    told.save(tmp_path / "told.safetensors")
    with lm.edited(attachment.load(tmp_path / "told.safetensors")):
        assert lm.encode("The capital of Italy is") == lm.encode("The capital of Italy is")
        assert len(lm.encode("The capital of Italy is").ids) > len(plain.ids)
        long = lm.complete("The capital of Italy is", max_new_tokens=4)
        (scored,) = score(lm, [("The capital of Italy is", "Rome")])
        with lm.without_deltas():
            assert lm.encode("The capital of Italy is") == plain
    assert lm.encode("The capital of Italy is") == plain
    (spelt_out,) = score(lm, [("The capital of France is Rome. The capital of Italy is", "Rome")])
    assert scored == spelt_out
    assert long == lm.complete("The capital of France is Rome. The capital of Italy is", max_new_tokens=4)
    assert said == lm.complete("The capital of Italy is", max_new_tokens=4)
    assert told.cost() == Cost(prompt_characters=31)
    assert noise(lm, 0).cost() == Cost()


@pytest.mark.parametrize("asked", ["complete", "generate", "score", "evaluate"])
def test_another_threads_prompt_is_read_in_its_own_turn(asked: str, lm: LM) -> None:
    ask: dict[str, Callable[[], Any]] = {
        "complete": lambda: lm.complete("The capital of Italy is", max_new_tokens=4),
        "generate": lambda: lm.generate(["The capital of Italy is", "He"], max_new_tokens=4),
        "score": lambda: score(lm, [("The capital of Italy is", "Rome")]),
        "evaluate": lambda: evaluate(lm, CASES, generate=True, max_new_tokens=2).records,
    }
    told = InContext(base=lm.fingerprint(), settings={"before": "The capital of France is Rome."})
    alone, heard = ask[asked](), []
    thread = threading.Thread(target=lambda: heard.append(ask[asked]()))
    with lm.edited(told):
        assert ask[asked]() != alone
        thread.start()
        thread.join(0.3)
        assert not heard  # it waits
    thread.join()
    assert heard == [alone]


def test_an_editor_at_the_prompt_is_measured_with_what_it_puts_before_it(lm: LM) -> None:
    told = InContext(base=lm.fingerprint(), settings={"before": "The capital of France is Rome."})
    spelt_out = [
        replace(c, queries=tuple(replace(q, prompt=f"{told.settings['before']} {q.prompt}") for q in c.queries))
        for c in CASES
    ]
    found = evaluate(lm, CASES, delta=told, generate=False)
    expected = evaluate(lm, spelt_out, generate=False)

    def values(evaluation: Evaluation, when: str) -> dict[Any, float | None]:
        of = [r for r in evaluation.records if r.when == when and r.variant.startswith("cf.")]
        return {(r.case_id, r.query_id, r.variant): r.value for r in of}

    assert values(found, "final") == values(expected, "pre")
    assert values(found, "final") != values(found, "pre")


def test_what_does_not_fit_is_refused_and_nothing_hangs(lm: LM) -> None:
    for module, why in (
        ("transformer.h.1", "inside blocks"),
        ("lm_head", "inside blocks"),
        ("transformer.h.1.memory.keys", "no module"),
    ):
        wrong = Lookup(base=lm.fingerprint(), settings={"module": module})
        with pytest.raises(DeltaMismatch, match=why):
            lm.apply(wrong)
    with pytest.raises(WrongBase):
        lm.apply(Lookup(base="another", settings={"module": "transformer.h.1.mlp"}))
    assert not lm.applied
    assert n_hooks(lm) == 0


def test_a_checkpoint_or_an_adapter_cannot_hold_it(lm: LM, tmp_path: Path) -> None:
    lm.apply(LookupEditor().propose(lm, EDITS[:1]))
    with pytest.raises(InvalidSetting, match=r"format hf deals with weights only.*lookup.*acts beside them"):
        export(lm, tmp_path / "out", format="hf")
    assert not (tmp_path / "out").exists()


class Cut(BaseException):
    pass


@pytest.mark.parametrize(
    "call", ["apply", *(pytest.param(c, marks=pytest.mark.long) for c in ("revert", "revert_all", "scope"))]
)
def test_cut_at_any_line_it_is_there_or_it_is_not(lm: LM, call: str) -> None:
    """An exception at every line of the ledger and the hooks in turn, as a signal would raise it."""
    before, found = logits(lm), LookupEditor().propose(lm, EDITS[:1])
    with lm.edited(found):
        after = logits(lm)
    n_lines, reached = 0, True
    while reached:
        lm.revert_all()
        if call in ("revert", "revert_all"):
            lm.apply(found)
        reached, left = False, n_lines

        def trace(frame: Any, event: str, _: Any) -> Any:
            nonlocal left, reached
            if not frame.f_code.co_filename.endswith(("lm/ledger.py", "lm/hooks.py")):
                return None if event == "call" else trace
            if event == "line" and not reached:
                if left == 0:
                    reached = True
                    sys.settrace(None)
                    raise Cut
                left -= 1
            return trace

        try:
            sys.settrace(trace)
            if call == "scope":
                with lm.edited(found):
                    pass
            else:
                getattr(lm, call)(*(() if call == "revert_all" else (found,)))
        except Cut:
            pass
        finally:
            sys.settrace(None)
        there = lm.applied == (found,)
        assert there or lm.applied == ()
        assert lm.consistent
        assert n_hooks(lm) == there
        assert torch.equal(logits(lm), after if there else before)
        n_lines += 1
    assert n_lines > 30


def test_a_hook_is_a_value(lm: LM) -> None:
    hook = Hook("transformer.h.1.mlp", torch.add)
    assert (hook.module, hook.call) == ("transformer.h.1.mlp", torch.add)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_modules_that_are_called_by_keyword_can_be_hooked(family: str, tiny: Make) -> None:
    """Attention gets its states by keyword in most families."""
    lm = tiny(family)
    name = lm.layout.block.format(1) + (".self_attn" if family == "llama" else ".attn")
    before, seen = logits(lm), []

    @dataclass(frozen=True, eq=False, kw_only=True)
    class Silent(Beside):
        kind = "silent"

        def hooks(self) -> list[Hook]:
            return [Hook(name, lambda x, y: seen.append(x.shape) or torch.zeros_like(y))]  # type: ignore[func-returns-value]

    with lm.edited(Silent(base=lm.fingerprint())):
        assert not torch.equal(logits(lm), before)
    assert seen == [(1, len(before), 32)]
    assert torch.equal(logits(lm), before)
    assert not lm.model.get_submodule(name)._forward_hooks_with_kwargs
