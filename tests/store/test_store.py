"""A store: its states are bit for bit, nothing is searched that did not change, and files say who they are."""

import json
import pickle
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from retcon.atomic import write_atomically
from retcon.cli.log import log
from retcon.edits import Case, Edit, write_cases
from retcon.errors import (
    ConflictingEdits,
    InvalidEdit,
    InvalidSetting,
    MalformedFile,
    RetconWarning,
    StoreBusy,
    UnknownEntry,
    WrongBase,
)
from retcon.evaluation import read_cases
from retcon.lm.model import LM
from retcon.memory.corpus import Corpus
from retcon.memory.moments import CorpusMoments
from retcon.methods.ft import Ft
from retcon.methods.jeep import Jeep
from retcon.methods.kne import Kne
from retcon.methods.lora import Lora
from retcon.methods.memit import Memit
from retcon.methods.mend import Mend
from retcon.methods.prune import Prune
from retcon.methods.rect import Rect
from retcon.methods.rome import Rome
from retcon.store import Store
from retcon.store.journal import writing
from retcon.store.verify import verify
from tests.conftest import random_moments, tiny_model, tokenizer
from tests.store.facts import FACTS, TEXTS

Tiny = Callable[..., LM]
MEMIT = Memit(layers=(0, 1), steps=3, moment_weight=100.0)


@pytest.fixture
def moments(lm: LM) -> Any:
    return random_moments(lm)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two entries: three facts by MEMIT, then two one by one by ROME."""
    folder = tmp_path_factory.mktemp("prepared")
    lm = LM(tiny_model("gptj", torch.float32), tokenizer("gpt"), name="tiny-gptj")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RETCON_CACHE", str(folder / "cache"))
        store = Store.init(folder / "edits", lm)
        store.edit(lm, FACTS[:3], MEMIT, moments=random_moments(lm), message="three facts")
        store.edit(lm, iter(FACTS[3:]), Rome(layer=1, steps=3), moments=random_moments(lm))
    return store.path


@pytest.fixture
def store(prepared: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A copy of the prepared one."""
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "cache"))
    shutil.copytree(prepared, tmp_path / "edits", ignore=shutil.ignore_patterns("index.sqlite*"))
    return Store(tmp_path / "edits")


def test_a_store_can_be_pickled(store: Store) -> None:
    assert pickle.loads(pickle.dumps(store)).log() == store.log()


def weights(lm: LM) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lm.model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_every_state_is_its_deltas_in_order_bit_for_bit(store: Store, lm: LM) -> None:
    base = weights(lm)
    one, two = store.log()
    assert (one.action, one.message, one.after, two.after) == ("edit", "three facts", None, one.id)
    assert [len(store.state(at).deltas) for at in ("base", one.id, "HEAD", None)] == [0, 1, 3, 3]
    with store.at(lm, "HEAD~1"):
        with_one = weights(lm)
    for delta in store.deltas(one.id):
        lm.apply(delta)
    assert same(weights(lm), with_one)
    lm.revert_all()
    assert same(weights(lm), base)
    store.checkout(lm)
    store.checkout(lm, one.id)
    assert same(weights(lm), with_one)
    store.checkout(lm, "base")
    assert same(weights(lm), base)


def test_facts_are_one_readable_line_each_and_come_back_whole(store: Store) -> None:
    assert store.cases() == FACTS
    assert [line.fact for line in store.facts("HEAD~1")] == ["france", "darrieux", "leonardo"]
    first = (store.path / "facts" / f"{store.log()[0].id}.jsonl").read_text().splitlines()
    assert len(first) == 3
    assert json.loads(first[2])["edits"][0]["target_new"] == "São Paulo"
    assert "São Paulo" in first[2]
    cases, report = read_cases(store.path / "facts" / f"{store.log()[0].id}.jsonl")  # a file of facts like any other
    assert [(c.edits, c.queries) for c in cases] == [(c.edits, c.queries) for c in FACTS[:3]]
    assert not report.hints()


def test_reverting_an_entry_and_the_reverting(store: Store, lm: LM) -> None:
    with store.at(lm):
        before = weights(lm)
    state = store.state()
    undo = store.revert(store.log()[0].id)
    assert undo.about["on_top"] == list(state.deltas[1:])
    assert store.state().deltas == state.deltas[1:]
    assert [line.fact for line in store.facts()] == ["italy", "rocard"]
    with pytest.raises(UnknownEntry, match="nothing of it is in force"):
        store.revert(store.log()[0].id)
    back = store.revert(undo.id)
    assert back.action == "restore"
    assert store.state() == state  # in its old place, before those that were proposed on it
    with store.at(lm):
        assert same(weights(lm), before)


def test_reverting_says_what_to_revert_first(store: Store, lm: LM, moments: Any) -> None:
    without = store.revert_fact(lm, "darrieux", moments=moments)
    amended = store.amend(lm, "france", "Milan", moments=moments)
    with pytest.raises(
        UnknownEntry, match=rf"entry {amended.id} \(amend: .* Milan\) changed the same batch since; revert"
    ):
        store.revert(without.id)
    store.revert(amended.id)
    store.revert(without.id)
    assert [line.fact for line in store.facts()][:3] == ["france", "darrieux", "leonardo"]
    store.gc(values=True)
    with pytest.raises(UnknownEntry, match="it changed no facts"):
        store.revert("HEAD")


@pytest.mark.parametrize("what", ["an entry", "a fact of a batch"])
def test_what_comes_back_contradicts_nothing(what: str, store: Store, lm: LM, moments: Any) -> None:
    first = store.log()[0].id
    undo = store.revert(first) if what == "an entry" else store.revert_fact(lm, "france", moments=moments)
    other = Case("fr2", (replace(FACTS[0].edits[0], target_new="Milan", id="fr2"),), ())
    store.edit(lm, [other], MEMIT, moments=moments)
    before = store.log()
    with pytest.raises(ConflictingEdits, match=r"back fact 'france' .* 'fr2' in force .*: retcon revert --fact fr2"):
        store.revert(undo.id)
    assert store.log() == before
    store.revert_fact(lm, "fr2", moments=moments)
    assert store.revert(undo.id).action in ("restore", "revert")
    assert "france" in [line.fact for line in store.facts()]


def test_a_fact_leaves_its_batch_and_no_value_is_searched(store: Store, lm: LM, moments: Any) -> None:
    old = store.deltas()
    entry = store.revert_fact(lm, "darrieux", moments=moments)
    assert entry.about["searched"] == 0
    assert [line.fact for line in store.facts()] == ["france", "leonardo", "italy", "rocard"]
    new = store.deltas()
    assert [e.id for e in new[0].edits] == ["france", "leonardo"]
    assert new[1:] == old[1:]
    direct = MEMIT.propose(lm, [FACTS[0].edits[0], FACTS[2].edits[0]], moments=moments)
    assert direct.contexts == new[0].contexts
    for name in direct.changes:  # values are those that a search of the two alone would find
        shape = lm.parameter(name).shape
        torch.testing.assert_close(direct.dense(name, shape), new[0].dense(name, shape), rtol=1e-3, atol=1e-4)
    store.revert(entry.id)
    assert store.deltas() == old
    assert [line.fact for line in store.facts()] == list(TEXTS)


def test_a_batch_is_written_again_with_its_seed(tmp_path: Path, lm: LM) -> None:
    store, lora = Store.init(tmp_path / "edits", lm), Lora(layers=(1,), rank=2, epochs=2)
    store.edit(lm, FACTS[:3], lora, seed=7)
    with pytest.warns(RetconWarning, match="lora keeps none"):
        store.revert_fact(lm, "darrieux")
    (again,) = store.deltas()
    anew, other = (lora.propose(lm, [FACTS[i].edits[0] for i in (0, 2)], seed=seed) for seed in (7, 0))
    assert again.provenance["seed"] == 7
    assert again.id == anew.id != other.id


def test_values_found_on_what_the_batch_wrote_itself_are_searched_anew(tmp_path: Path, lm: LM, moments: Any) -> None:
    store = Store.init(tmp_path / "edits", lm)
    jeep = Jeep(low=(0, 1), high=(2,), low_clamp=1.0, high_clamp=1.0, steps=3, joint_optimisation=False)
    store.edit(lm, FACTS[:3], jeep, moments=moments)
    entry = store.revert_fact(lm, "darrieux", moments=moments)
    assert entry.about["searched"] == 2  # delta* of both that stay, since the low layers differ; delta' is known
    (again,) = store.deltas()
    anew = jeep.propose(lm, [FACTS[i].edits[0] for i in (0, 2)], moments=moments)
    for name in anew.changes:
        shape = lm.parameter(name).shape
        torch.testing.assert_close(again.dense(name, shape), anew.dense(name, shape), rtol=1e-3, atol=1e-4)


def test_searches_are_counted_where_they_happen(
    store: Store, lm: LM, moments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from retcon.memory.values import search

    ran: list[str] = []
    run = search._search
    monkeypatch.setattr(
        search, "_search", lambda lm, edits, *rest: ran.extend(e.id for e in edits) or run(lm, edits, *rest)
    )
    store.revert_fact(lm, "france", moments=moments)
    assert ran == []
    store.amend(lm, "leonardo", "Paris", moments=moments)
    assert ran == ["leonardo"]
    store.amend(lm, "leonardo", "Milan", moments=moments, repropose=True)
    assert ran == ["leonardo", "leonardo", "italy", "rocard"]


def test_an_amended_fact_keeps_its_place_and_its_checks_follow(store: Store, lm: LM, moments: Any) -> None:
    old = store.deltas()
    entry = store.amend(lm, "darrieux", "Greek", moments=moments)
    assert (entry.action, entry.about["searched"]) == ("amend", 1)
    assert entry.about["on_top"] == [d.id for d in old[1:]]
    assert [line.fact for line in store.facts()] == list(TEXTS)
    assert (store.path / "facts" / f"{entry.id}.jsonl").read_text().count("\n") == 1
    case = store.cases()[1]
    assert case.edits[0].target_new == "Greek"
    assert {q.axis: (q.target, q.contrast) for q in case.queries} == {
        "rewrite": ("Greek", "French"),
        "paraphrase": ("Greek", "French"),
        "neighborhood": ("still", "Greek"),
    }
    assert store.cases("HEAD~1") == FACTS
    with pytest.raises(InvalidEdit, match="has that answer already"):
        store.amend(lm, "darrieux", "Greek", moments=moments)


def test_a_batch_is_written_again_with_the_moments_of_its_own_text(tmp_path: Path, lm: LM) -> None:
    text = tmp_path / "corpus.txt"
    text.write_text("\n\n".join(f"The train to Milan stood, and {i} of {i * i} go home." for i in range(80)))
    store = Store.init(tmp_path / "edits", lm)
    store.edit(lm, FACTS[:2], MEMIT, moments=CorpusMoments(Corpus.from_file(text)), corpus=str(text))
    assert store.revert_fact(lm, "france").about["searched"] == 0
    text.rename(tmp_path / "moved.txt")
    log = store.log()
    with pytest.raises(MalformedFile, match=r"no such file .* was made with second moments of it; say where it is now"):
        store.amend(lm, "darrieux", "Greek")
    assert store.log() == log
    moved = CorpusMoments(Corpus.from_file(tmp_path / "moved.txt"))
    assert store.amend(lm, "darrieux", "Greek", moments=moved).action == "amend"


def test_a_method_of_single_facts_takes_out_its_own_delta(store: Store, lm: LM, moments: Any) -> None:
    old = store.state()
    entry = store.revert_fact(lm, "italy", moments=moments)
    assert entry.sets == {old.deltas[1]: (old.deltas[1], None)}
    assert store.state().deltas == (old.deltas[0], old.deltas[2])
    with pytest.raises(UnknownEntry, match="'italy' is no longer in force"):
        store.fact("italy")


def test_later_deltas_are_proposed_again_on_request(store: Store, lm: LM, moments: Any) -> None:
    old = store.state()
    entry = store.revert_fact(lm, "france", moments=moments, repropose=True)
    assert entry.about["proposed_again"] == list(old.deltas[1:])
    one, two, three = store.deltas()
    assert (two.parents, three.parents) == ((one.id,), (one.id, two.id))
    assert list(store.state().slots) == list(old.slots)


def test_a_batch_of_a_trained_method_asks_for_its_editor(
    tmp_path: Path, lm: LM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is looked for where it lay as seen from the store; elsewhere that has to be said, and it is checked."""
    monkeypatch.chdir(tmp_path)  # beside which no file is called "own", whatever lies beside the repository
    for size, name in ((0.5, "own"), (0.4, "other")):
        untrained = Mend(layers=(1, 2), modules=("down_proj",), rank=4, steps=0, n_validation=1, step_size=size)
        untrained.fit(lm, FACTS, tmp_path / name)
    store = Store.init(tmp_path / "edits", lm)
    store.edit(lm, FACTS[:2], Mend(editor=str(tmp_path / "own")))
    assert store.log()[0].about["files"] == {"editor": "../own"}
    (tmp_path / "own").rename(tmp_path / "moved")
    before = store.log()
    with pytest.raises(InvalidSetting, match=r"own: no such file; mend made delta .* editor=FILE"):
        store.revert_fact(lm, "france")
    with pytest.raises(InvalidSetting, match=r"other: not the editor that delta .* was made with"):
        store.amend(lm, "france", "Milan", editor=tmp_path / "other")
    assert store.log() == before
    assert store.amend(lm, "france", "Milan", editor=tmp_path / "moved").about["searched"] == 0
    (tmp_path / "moved").rename(tmp_path / "own")
    store.revert_fact(lm, "france", repropose=True)
    assert [line.fact for line in store.facts()] == ["darrieux"]
    assert store.deltas()[0].provenance["settings"]["editor"] == "own"


@dataclass(frozen=True, kw_only=True)
class Heir(Rome):
    """A method of one's own that inherits its name, and says more than ROME takes."""

    more: int = 1


def test_a_method_with_an_inherited_name_writes_its_facts_again_itself(tmp_path: Path, lm: LM, moments: Any) -> None:
    store = Store.init(tmp_path / "edits", lm)
    store.edit(lm, FACTS[:1], Heir(layer=1), moments=moments)
    store.amend(lm, "france", "Milan", moments=moments)
    (delta,) = store.deltas()
    assert (delta.provenance["method"], delta.provenance["class"]) == ("rome", f"{__name__}:Heir")
    store.edit(lm, FACTS[1:2], Rome(layer=1), moments=moments)
    with pytest.raises(InvalidSetting, match="leave it out"):
        store.amend(lm, "darrieux", "Greek", moments=moments, method=f"{__name__}:Heir")


def test_a_wrapped_method_of_ones_own_is_not_imported(
    tmp_path: Path, lm: LM, moments: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inherits.py").write_text(
        f"from dataclasses import dataclass\nfrom {__name__} import Heir\n\n\n"
        "@dataclass(frozen=True, kw_only=True)\nclass Own(Heir):\n    pass\n"
    )
    store = Store.init(tmp_path / "edits", lm)
    rect = Rect(base_method="inherits:Own", base_settings={"layer": 1})
    store.edit(lm, FACTS[:1], rect, moments=moments)
    monkeypatch.delitem(sys.modules, "inherits")
    with pytest.raises(InvalidSetting, match="was made by inherits:Own"):
        store.amend(lm, "france", "Milan", moments=moments)
    assert "inherits" not in sys.modules
    store.amend(lm, "france", "Milan", moments=moments, method="inherits:Own")


def test_files_of_a_methods_settings_are_found_again(tmp_path: Path, lm: LM, monkeypatch: pytest.MonkeyPatch) -> None:
    paraphrases = tmp_path / "cases.jsonl"
    write_cases(paraphrases, FACTS)
    (tmp_path / "elsewhere" / "below").mkdir(parents=True)
    (tmp_path / "elsewhere" / "cases.jsonl").write_text("another file")  # where "../cases.jsonl" is from "below" on
    monkeypatch.chdir(tmp_path / "elsewhere" / "below")
    store = Store.init(tmp_path / "edits", lm)
    store.edit(lm, FACTS[:2], Kne(layers=(0,), epochs=1, locate_on=str(paraphrases)))
    assert store.log()[0].about["files"] == {"locate_on": "../cases.jsonl"}
    with pytest.warns(RetconWarning, match="kne keeps none"):
        store.revert_fact(lm, "france")
    assert [line.fact for line in store.facts()] == ["darrieux"]


def test_a_file_of_a_wrapped_methods_settings_is_found_again(tmp_path: Path, lm: LM) -> None:
    write_cases(tmp_path / "cases.jsonl", FACTS)
    store = Store.init(tmp_path / "edits", lm)
    inner = Kne(layers=(0,), epochs=1, locate_on=str(tmp_path / "cases.jsonl")).settings
    store.edit(lm, FACTS[:2], Rect(base_method="kne", base_settings=inner))
    assert store.log()[0].about["files"] == {"base_settings.locate_on": "../cases.jsonl"}
    with pytest.warns(RetconWarning, match="rect keeps none"):
        store.revert_fact(lm, "france")
    assert [line.fact for line in store.facts()] == ["darrieux"]


def test_replayed_facts_are_taken_up_in_any_layers(tmp_path: Path, lm: LM) -> None:
    store = Store.init(tmp_path / "edits", lm)
    for layer, fact in enumerate(FACTS[:2]):
        store.edit(lm, [fact], Ft(layers=(layer,), epochs=1, replay=True))
    state = store.deltas()[-1].state
    assert state is not None
    assert len(json.loads(bytes(state["edits"].tolist()))) == 2


def test_what_a_wrapped_method_remembers_is_left_out_in_other_layers(tmp_path: Path, lm: LM, moments: Any) -> None:
    store = Store.init(tmp_path / "edits", lm)
    store.edit(
        lm,
        FACTS[:1],
        Rect(base_method="memit", base_settings=replace(MEMIT, cache_keys=True).settings),
        moments=moments,
    )
    other = replace(MEMIT, cache_keys=True, layers=(1, 2)).settings
    with pytest.warns(RetconWarning, match=r"made in layers \[0, 1\], this edit is in \[1, 2\]"):
        store.edit(lm, FACTS[1:2], Rect(base_method="memit", base_settings=other), moments=moments)


def test_a_delta_that_stands_for_those_before_it_is_refused(store: Store, lm: LM, moments: Any) -> None:
    before = store.log()
    prune = Prune(base_method="memit", base_settings=MEMIT.settings)
    with pytest.raises(InvalidSetting, match="prune replaces all deltas before it"):
        store.edit(
            lm,
            [replace(FACTS[0], id="spain", edits=(Edit("The capital of {} is", "Spain", "Rome"),))],
            prune,
            moments=moments,
        )
    assert store.log() == before
    assert not lm.applied
    alone = Store.init(store.path.parent / "alone", lm)
    alone.edit(lm, FACTS[:2], prune, moments=moments)
    alone.edit(lm, FACTS[2:3], MEMIT, moments=moments)
    alone.checkout(lm)
    alone.checkout(lm)
    assert len(lm.applied) == 2


def test_what_a_method_remembers_is_taken_up_where_it_still_fits(tmp_path: Path, lm: LM, moments: Any) -> None:
    remembering = replace(MEMIT, cache_keys=True)
    store = Store.init(tmp_path / "edits", lm)
    store.edit(lm, FACTS[:1], remembering, moments=moments)
    store.edit(lm, FACTS[1:2], remembering, moments=moments)
    keys = [next(iter(v for k, v in d.state.items() if k.startswith("keys/"))) for d in store.deltas() if d.state]
    assert [len(k) for k in keys] == [1, 2]
    with pytest.warns(RetconWarning, match=r"made in layers \[0, 1\], this edit is in \[1, 2\]"):
        store.edit(lm, FACTS[2:3], replace(remembering, layers=(1, 2)), moments=moments)
    store.edit(lm, FACTS[3:4], replace(MEMIT, layers=(1, 2)), moments=moments)  # remembers nothing
    assert store.deltas()[-1].state is None


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_holds_at_least_one_fact(tmp_path: Path, lm: LM, size: int) -> None:
    store = Store.init(tmp_path / "edits", lm)
    with pytest.raises(InvalidSetting, match=f"batch_size {size}: memit takes any number from 1"):
        store.edit(lm, FACTS[:2], MEMIT, batch_size=size)
    assert store.log() == ()


def test_a_fact_of_several_edits_is_named_where_the_method_writes_one(tmp_path: Path, lm: LM) -> None:
    store = Store.init(tmp_path / "edits", lm)
    two = replace(FACTS[0], id="two", edits=(*FACTS[0].edits, *FACTS[1].edits))
    with pytest.raises(InvalidEdit, match="fact 'two' consists of 2 edits, and rome writes one at a time"):
        store.edit(lm, [two], Rome(layer=1, steps=3))


def test_an_index_that_another_process_is_long_at_is_left_alone(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(store.facts()) == 5
    path = store.path / "index.sqlite"
    store.index.close()
    own = path.stat().st_ino
    connect = sqlite3.connect
    monkeypatch.setattr(sqlite3, "connect", lambda *args, **how: connect(*args, **{**how, "timeout": 0}))
    other = connect(path, isolation_level=None)
    other.execute("PRAGMA locking_mode=EXCLUSIVE")
    other.execute("BEGIN EXCLUSIVE")
    other.execute("DELETE FROM files WHERE 0")
    assert len(Store(store.path).facts()) == 5
    other.close()
    assert path.stat().st_ino == own


def test_an_amended_answer_stands_without_the_spaces_around_it(store: Store, lm: LM, moments: Any) -> None:
    store.amend(lm, "italy", " Milan ", moments=moments)
    line, _ = store.fact("italy")
    case = store.index.case(line)
    assert (case.edits[0].target_new, case.queries[0].target, case.queries[0].answers) == (
        "Milan",
        "Milan",
        (("Milan",),),
    )


def test_float16_halves_a_store_and_says_what_it_does_then(tmp_path: Path, lm: LM, moments: Any) -> None:
    whole, half = (Store.init(tmp_path / p, lm, precision=p) for p in ("float32", "float16"))  # type: ignore[arg-type]
    for store in (whole, half):
        store.edit(lm, FACTS[:3], MEMIT, moments=moments)
    (one,), (two,) = whole.deltas(), half.deltas()
    assert two.nbytes() * 2 == one.nbytes()
    with half.at(lm):
        from retcon.methods.common.proposal import answers

        found = answers(lm, two.edits)
    assert [r.final_probability for r in two.report] == [p for p, _ in found]
    half.revert_fact(lm, "france", moments=moments)
    assert half.deltas()[0].changes[next(iter(two.changes))][0].values().dtype == torch.float16


# --- what can be wrong -----------------------------------------------------------------------------------------------


def test_contradictions_and_repetitions_are_refused(store: Store, lm: LM) -> None:
    log = store.log()
    with pytest.raises(InvalidEdit, match="fact 'france' is in force already; leave it out, or amend it"):
        store.edit(lm, [FACTS[0]], MEMIT)
    other = Case("fr2", (replace(FACTS[0].edits[0], target_new="Milan", id="fr2"),), ())
    with pytest.raises(ConflictingEdits, match="retcon amend france --target Milan"):
        store.edit(lm, [other], MEMIT)
    spaced = Case("fr2", (replace(other.edits[0], target_new="New York"),), ())
    with pytest.raises(ConflictingEdits, match="retcon amend france --target 'New York'"):  # as a shell reads it
        store.edit(lm, [spaced], MEMIT)
    with pytest.raises(InvalidSetting, match="no facts"):
        store.edit(lm, [], MEMIT)
    assert store.log() == log


def test_unknown_names_say_what_there_is(store: Store, lm: LM) -> None:
    with pytest.raises(UnknownEntry, match=r"no entry 'nope' in this store; the last one is "):
        store.revert("nope")
    with pytest.raises(UnknownEntry, match="no fact 'nope'"):
        store.revert_fact(lm, "nope")
    with pytest.raises(UnknownEntry, match="HEAD~2: the log has 2 entries"):
        store.entry("HEAD~2")
    assert store.entry(store.log()[0].id[:5]) == store.log()[0]


def test_another_base_is_refused(store: Store, tiny: Tiny) -> None:
    other = tiny("gptj", torch.float32, seed=1)
    with pytest.raises(WrongBase, match="load the model the store was made for"):
        store.checkout(other)
    with pytest.raises(WrongBase):
        store.revert_fact(other, "france")
    assert other.applied == ()


def test_missing_and_damaged_files_are_named(store: Store, lm: LM, tmp_path: Path) -> None:
    delta = store.state().deltas[0]
    path = store.path / "deltas" / f"{delta}.safetensors"
    content = path.read_bytes()
    path.unlink()
    with pytest.raises(MalformedFile, match="not committed to git"):
        store.checkout(lm)
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(MalformedFile, match="git lfs pull"):
        store.checkout(lm)
    path.write_bytes((store.path / "deltas" / f"{store.state().deltas[1]}.safetensors").read_bytes())
    with pytest.raises(MalformedFile, match="was renamed"):
        store.checkout(lm)
    assert lm.applied == ()
    path.write_bytes(content)
    facts = store.path / "facts" / f"{store.log()[0].id}.jsonl"
    facts.write_text("<<<<<<< ours\n" + facts.read_text())
    with pytest.raises(MalformedFile, match=r"jsonl, line 1: holds the marks of a merge"):
        Store(store.path).facts()
    with pytest.raises(MalformedFile, match="holds no store; make one with"):
        Store(tmp_path)
    with pytest.raises(InvalidSetting, match="a store already"):
        Store.init(store.path, lm)


def test_an_init_that_was_killed_is_done_again(lm: LM, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "edits"
    for survived in range(4):  # .gitignore, .gitattributes, the log, and store.json, which makes it a store
        left = survived

        def write(path: Path, data: bytes) -> None:
            nonlocal left
            if not left:
                path.with_name(f".{path.name}.1-1.tmp").write_bytes(data[:3])
                raise KeyboardInterrupt
            left -= 1
            write_atomically(path, data)

        with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
            killed.setattr("retcon.store.store.write_atomically", write)
            Store.init(place, lm, lfs=True)
    (place / ".gitignore").write_text("mine\n")
    with pytest.raises(InvalidSetting, match="in use for something else"):
        Store.init(place, lm)
    (place / ".gitignore").unlink()
    assert Store.init(place, lm).log() == ()


def test_two_writers_one_is_refused_and_a_reader_is_not(store: Store) -> None:
    with writing(store.path):
        with pytest.raises(StoreBusy, match=r"another process \(pid \d+\) is writing"):
            Store(store.path).revert("HEAD")
        assert len(Store(store.path).facts()) == 5
    assert Store(store.path).revert("HEAD").action == "revert"


def test_the_index_is_made_again_from_the_files(store: Store) -> None:
    facts = store.facts()
    store.index.close()
    for damage in (b"", b"no database at all" * 100):
        (store.path / "index.sqlite").write_bytes(damage)
        for name in ("index.sqlite-wal", "index.sqlite-shm"):
            (store.path / name).unlink(missing_ok=True)
        again = Store(store.path)
        assert again.facts() == facts
        again.index.close()


def test_a_store_that_is_open_sees_what_another_process_writes(store: Store, lm: LM, moments: Any) -> None:
    assert len(store.facts()) == 5
    new = Edit("The capital of {} is", "Spain", "Rome", id="spain")
    Store(store.path).edit(lm, [Case("spain", (new,), ())], MEMIT, moments=moments)
    assert [line.fact for line in store.facts()][5:] == ["spain"]


def test_gc_removes_what_nothing_needs_and_says_so_later(store: Store, lm: LM, moments: Any) -> None:
    (store.path / "facts" / "notes").mkdir()  # somebody's own
    assert store.gc() == ([], 0)
    (store.path / "deltas" / "0123456789abcdef.safetensors").write_bytes(b"debris")
    assert store.gc() == (["deltas/0123456789abcdef.safetensors"], 6)
    first = store.state()
    store.amend(lm, "france", "Milan", moments=moments)
    removed, n_bytes = store.gc(before="HEAD")
    assert removed == [f"{folder}/{first.deltas[0]}.safetensors" for folder in ("deltas", "values")]
    assert n_bytes > 0
    store.checkout(lm)
    with pytest.raises(MalformedFile, match=r"no such file; entry \w+ \(gc\) removed it"):
        store.checkout(lm, store.log()[1].id)
    lm.revert_all()
    before = store.log()
    with pytest.raises(MalformedFile, match=r"no such file; entry \w+ \(gc\) removed it"):
        store.revert(before[-2].id)  # would bring back what is gone
    assert store.log() == before
    store.gc(values=True)
    with pytest.warns(UserWarning, match="has no values in the store"):
        assert store.revert_fact(lm, "france", moments=moments).about["searched"] == 2


# --- git -------------------------------------------------------------------------------------------------------------


def git(where: Path, *arguments: str) -> str:
    names = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "init.defaultBranch=main"]
    run = subprocess.run(["git", *names, *arguments], cwd=where, capture_output=True, text=True, check=True)
    return run.stdout


def test_two_branches_merge_and_two_changes_of_one_delta_do_not(
    store: Store, lm: LM, moments: Any, tmp_path: Path
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "edits")
    assert "index" not in git(tmp_path, "status", "--short")
    git(tmp_path, "commit", "-qm", "two entries")
    git(tmp_path, "checkout", "-qb", "side")
    store.revert_fact(lm, "italy", moments=moments)
    git(tmp_path, "add", "edits")
    git(tmp_path, "commit", "-qm", "side")
    git(tmp_path, "checkout", "-q", "main")
    store = Store(store.path)
    assert len(store.facts()) == 5
    store.amend(lm, "france", "Milan", moments=moments)
    git(tmp_path, "add", "edits")
    git(tmp_path, "commit", "-qm", "main")
    git(tmp_path, "merge", "-q", "side", "-m", "both")
    store = Store(store.path)
    assert [line.target for line in store.facts()] == ["Milan", "Italian", "São Paulo", "Italian"]
    git(tmp_path, "checkout", "-q", "-b", "third", "main~2")
    Store(store.path).revert_fact(lm, "france", moments=moments)
    git(tmp_path, "add", "edits")
    git(tmp_path, "commit", "-qm", "third")
    git(tmp_path, "merge", "-q", "main", "-m", "clash")
    with pytest.raises(MalformedFile, match="both change delta"):
        Store(store.path).facts()


def test_an_entry_whose_line_was_lost_is_asked_for(store: Store) -> None:
    undo = store.revert(store.log()[0].id)
    log = store.path / "log.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    for broken in ([*lines[1:]], [lines[2], *lines[:2]]):
        log.write_text("".join(broken))
        with pytest.raises(
            MalformedFile, match=f"entry {undo.id} changes delta .* no line before it has made that one"
        ):
            store.state()


def test_two_branches_that_answer_one_question_are_told_so(
    store: Store, lm: LM, moments: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "edits")
    git(tmp_path, "commit", "-qm", "two entries")
    edit = Edit("The capital of {} is", "Spain", "Rome", id="spain")
    for branch, answer in (("one", "Rome"), ("two", "Milan")):
        git(tmp_path, "checkout", "-qb", branch, "main")
        Store(store.path).edit(lm, [Case("spain", (replace(edit, target_new=answer),), ())], MEMIT, moments=moments)
        git(tmp_path, "add", "edits")
        git(tmp_path, "commit", "-qm", branch)
    git(tmp_path, "merge", "-q", "one", "-m", "both")
    merged = Store(store.path)
    assert [line.target for line in merged.facts() if line.fact == "spain"] == ["Milan", "Rome"]
    said = r"'spain' of entry \w+ \('Milan'\) and fact 'spain' of entry \w+ \('Rome'\) are both in force"
    with pytest.raises(ConflictingEdits, match=said):
        verify(merged, lm)
    log(store=store.path)
    assert "were two branches merged?" in capsys.readouterr().err
    merged.revert_fact(lm, "spain", moments=moments)
    assert [line.target for line in merged.facts() if line.fact == "spain"] == ["Milan"]
    log(store=store.path)
    assert "merged" not in capsys.readouterr().err
