"""Changes and deltas as values: what fits, what they write out to, identity, files, PEFT."""

import copy
import json
import os
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.testing import assert_close

import retcon
from retcon import delta as delta_module
from retcon.checked import as_bytes
from retcon.delta import (
    Change,
    Columns,
    Delta,
    Dense,
    EditReport,
    Entries,
    LowRank,
    Region,
    Rows,
    smallest,
)
from retcon.edits import Case, Edit
from retcon.errors import DeltaMismatch, InvalidSetting, MalformedFile, NonFinite
from retcon.memory.moments import Corpus, CorpusMoments, GivenMoments
from tests.lm.deltas import KINDS, random_change, same_bytes

SHAPE = torch.Size((8, 6))
REGIONS = {"whole": None, "rows": Region(0, 2, 7), "columns": Region(1, 1, 4)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def i(*places: int) -> Tensor:
    return torch.tensor(places, dtype=torch.long)


# --- changes -------------------------------------------------------------------------------------------------------


def by_loops(change: Change, shape: tuple[int, int]) -> Tensor:
    """The change written out number by number, in float64."""
    total = torch.zeros(shape, dtype=torch.float64)
    region = change.region or Region(0, 0, shape[0])
    first, last = [0, 0], list(shape)
    first[region.axis], last[region.axis] = region.start, region.stop
    rows, columns = last[0] - first[0], last[1] - first[1]
    for r in range(rows):
        for c in range(columns):
            value: Any = 0.0
            if isinstance(change, LowRank):
                value = change.left[r].double() @ change.right[:, c].double()
            elif isinstance(change, Dense):
                value = change.full[r, c]
            elif isinstance(change, Rows) and r in change.index:
                value = change.rows[change.index.tolist().index(r), c]
            elif isinstance(change, Columns) and c in change.index:
                value = change.columns[r, change.index.tolist().index(c)]
            elif isinstance(change, Entries) and r * columns + c in change.index:
                value = change.entries[change.index.tolist().index(r * columns + c)]
            total[first[0] + r, first[1] + c] = float(value)
    return total


@pytest.mark.parametrize("place", REGIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_writes_out_to_what_it_says(kind: str, place: str) -> None:
    change = random_change(kind, SHAPE, region=REGIONS[place], dtype=torch.float64)
    change.check(SHAPE)
    assert_close(change.dense(SHAPE), by_loops(change, tuple(SHAPE)))
    assert change.dense(SHAPE).dtype == torch.float64
    assert change.dense(SHAPE, torch.bfloat16).dtype == torch.bfloat16
    total = torch.ones(SHAPE, dtype=torch.float64)
    change.add_to(total)
    change.add_to(total)
    assert_close(total, 1 + 2 * by_loops(change, tuple(SHAPE)))


def test_low_rank_products_are_added_in_row_blocks(monkeypatch: pytest.MonkeyPatch, randn: Any) -> None:
    change = LowRank(left=randn(8, 2), right=randn(2, 6))
    for block in (1, 6, 13, 48, 100):
        monkeypatch.setattr(delta_module, "_BLOCK", block)
        assert_close(change.dense(SHAPE), change.left @ change.right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (LowRank(left=torch.ones(8, 2), right=torch.ones(3, 6)), r"factors \(8, 2\) x \(3, 6\) do not give \(8, 6\)"),
        (LowRank(left=torch.ones(6, 2), right=torch.ones(2, 8)), r"do not give \(8, 6\)"),
        (LowRank(left=torch.ones(8), right=torch.ones(2, 6)), r"factors \(8,\) x \(2, 6\)"),
        (LowRank(left=torch.tensor(1.0), right=torch.ones(2, 6)), r"factors \(\) x \(2, 6\)"),
        (Rows(index=i(1), rows=torch.ones(1, 5)), r"rows of shape \(1, 5\) do not fit a parameter of \(8, 6\)"),
        (Rows(index=i(1, 2), rows=torch.ones(1, 6)), r"rows of shape \(1, 6\)"),
        (Rows(index=i(8), rows=torch.ones(1, 6)), "row index runs from 8 to 8, the parameter has 0 to 7"),
        (Rows(index=i(-1, 3), rows=torch.ones(2, 6)), "row index runs from -1 to 3, the parameter has 0 to 7"),
        (Rows(index=i(3, 3), rows=torch.ones(2, 6)), "row index names the same place twice"),
        (Rows(index=i(3).int(), rows=torch.ones(1, 6)), r"index must be a vector of int64, found \(1,\) torch\.int32"),
        (Rows(index=torch.tensor(3), rows=torch.ones(1, 6)), r"row index must be a vector of int64, found \(\)"),
        (Rows(index=i(1), rows=torch.ones(1, 6).long()), r"its values must be floating, found torch\.int64"),
        (Columns(index=i(1), columns=torch.ones(6, 1)), r"columns of shape \(6, 1\) do not fit"),
        (Columns(index=i(6), columns=torch.ones(8, 1)), "column index runs from 6 to 6, the parameter has 0 to 5"),
        (Columns(index=torch.tensor(1), columns=torch.ones(8, 1)), "column index must be a vector"),
        (Entries(index=i(1, 2), entries=torch.ones(3)), "3 entries at 2 places"),
        (Entries(index=i(48), entries=torch.ones(1)), "entry index runs from 48 to 48, the parameter has 0 to 47"),
        (Entries(index=i(5, 5), entries=torch.ones(2)), "entry index names the same place twice"),
        (Entries(index=i(1, 2)[None], entries=torch.ones(1, 2)), "entry index must be a vector"),
        (Dense(full=torch.ones(6, 8)), r"a dense change of shape \(6, 8\) does not fit \(8, 6\)"),
        (Dense(full=torch.ones(8, 6), region=Region(0, 0, 4)), r"does not fit \(4, 6\)"),
        (Dense(full=torch.ones(8, 6), region=Region(0, 4, 12)), r"start=4, stop=12\) lies outside .* \(8, 6\)"),
        (Dense(full=torch.ones(8, 6), region=Region(2, 0, 1)), "lies outside"),
        (Dense(full=torch.ones(8, 6), region=Region(0, 3, 3)), "lies outside"),
        (Dense(full=torch.ones(8, 6), region=Region(0, -8, 8)), "lies outside"),
        (Rows(index=i(3), rows=torch.ones(1, 6), region=Region(0, 4, 7)), "runs from 3 to 3, the parameter has 0 to 2"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_with_both_shapes(change: Change, message: str) -> None:
    with pytest.raises(DeltaMismatch, match=message):
        change.check(SHAPE)


@pytest.mark.parametrize("kind", ["low_rank", "rows", "columns"])
def test_matrix_kinds_do_not_fit_a_bias(kind: str) -> None:
    with pytest.raises(DeltaMismatch):
        random_change(kind, (8, 6)).check(torch.Size((8,)))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("kind", KINDS)
def test_numbers_that_are_none_are_refused(kind: str, value: float) -> None:
    change = random_change(kind, SHAPE)
    change.values().reshape(-1)[0] = value
    with pytest.raises(NonFinite, match=f"{kind} change: .* holds NaN or infinity"):
        change.check(SHAPE)


@pytest.mark.parametrize("kind", KINDS)
def test_empty_changes_fit_and_do_nothing(kind: str) -> None:
    change = random_change(kind, SHAPE, n=0)
    if kind == "dense":
        change = Dense(full=torch.zeros(SHAPE))
    change.check(SHAPE)
    assert change.dense(SHAPE).abs().sum() == 0


def test_bytes_of_a_change_are_those_of_its_tensors() -> None:
    assert Rows(index=i(1, 2), rows=torch.ones(2, 6).bfloat16()).nbytes() == 2 * 8 + 12 * 2


@pytest.mark.parametrize(("rank", "kind"), [(1, "low_rank"), (3, "low_rank"), (4, "dense"), (9, "dense")])
def test_the_smaller_exact_form_is_chosen(rank: int, kind: str, randn: Any) -> None:
    left, right = randn(8, rank), randn(6, rank).T  # not contiguous
    change = smallest(left, right)
    assert change.kind == kind
    assert change.nbytes() <= 48 * 8
    assert_close(change.dense(SHAPE), left @ right)
    assert all(t.is_contiguous() for t in change.tensors().values())


# --- deltas --------------------------------------------------------------------------------------------------------


def delta_of(*changes: Change, name: str = "w", **record: Any) -> Delta:
    return Delta({name: changes}, base=record.pop("base", "b"), **record)


REPORT = EditReport("é1", 0.9, 7, "reached", {"nll": 0.1})


def full_delta(dtype: torch.dtype = torch.float32) -> Delta:
    """Every kind, whole and in regions, on three parameters; one name has slashes and brackets."""
    changes = tuple(
        random_change(kind, SHAPE, seed, region=region, dtype=dtype)
        for seed, (kind, region) in enumerate((k, r) for k in KINDS for r in REGIONS.values())
    )
    return Delta(
        {"a.weight": changes[:7], "odd/name[0,1]/x": changes[7:], "bias": (random_change("dense", (5,), dtype=dtype),)},
        base="base",
        parents=("p1", "p2"),
        report=(REPORT, replace(REPORT, id="é2", detail={})),
        state={"cache/0": torch.randn(3, 3, dtype=torch.float64), "n": torch.tensor(4)},
        provenance={"method": "jeep", "layers": (1, 2), "text": "東京 \ud800", "none": None},
        supersedes=("s1",),
    )


def assert_same(a: Delta, b: Delta) -> None:
    assert a == b
    assert (a.id, a.base, a.parents, a.report, a.supersedes) == (b.id, b.base, b.parents, b.report, b.supersedes)
    assert a.provenance == b.provenance
    assert a.changes.keys() == b.changes.keys()
    for name in a.changes:
        assert len(a.changes[name]) == len(b.changes[name])
        for x, y in zip(a.changes[name], b.changes[name], strict=True):
            assert (type(x), x.region, x.tensors().keys()) == (type(y), y.region, y.tensors().keys())
            assert all(same_bytes(t, y.tensors()[n]) for n, t in x.tensors().items())
    assert (a.state is None) == (b.state is None)
    assert (a.state or {}).keys() == (b.state or {}).keys()
    assert all(same_bytes(t, (b.state or {})[n]) for n, t in (a.state or {}).items())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saving_and_loading_is_exact(dtype: torch.dtype, tmp_path: Path) -> None:
    delta = full_delta(dtype)
    delta.save(tmp_path / "d.safetensors")
    assert_same(Delta.load(tmp_path / "d.safetensors"), delta)
    assert os.listdir(tmp_path) == ["d.safetensors"]


@pytest.mark.parametrize("state", [None, {}, {"x": torch.ones(2)}], ids=["none", "empty", "tensors"])
def test_no_state_an_empty_one_and_a_full_one_are_told_apart(state: Any, tmp_path: Path) -> None:
    delta = delta_of(random_change("rows", SHAPE), state=state)
    delta.save(tmp_path / "d")
    loaded = Delta.load(tmp_path / "d")
    assert_same(loaded, delta)
    assert (loaded.state is None) == (state is None)


def test_edits_without_a_subject_come_back(tmp_path: Path) -> None:
    edits = (Edit("It rains in", None, "Spain", id="a"), Edit("{} is", "Rome", "old", "new", relation_id="P1", id="b"))
    delta = Delta({}, base="b", edits=edits)
    delta.save(tmp_path / "d.safetensors")
    assert Delta.load(tmp_path / "d.safetensors").edits == edits


def test_an_empty_delta_and_more_than_ten_changes_of_one_parameter(tmp_path: Path) -> None:
    for delta in (Delta({}, base="b"), delta_of(*(random_change("rows", SHAPE, s) for s in range(12)))):
        delta.save(tmp_path / "d")
        assert_same(Delta.load(tmp_path / "d"), delta)
    assert Delta({"w": ()}, base="b").changes == {}


def test_tensors_that_share_memory_or_lie_crosswise_can_be_saved(tmp_path: Path) -> None:
    index, whole = i(1, 4), torch.randn(4, 8)
    delta = Delta(
        {
            "a": (Rows(index=index, rows=whole[:2, :6]), Rows(index=index, rows=whole[2:, :6])),
            "b": (Rows(index=index, rows=whole[:2, 2:]), LowRank(left=whole[:, :6].T[:, :2], right=whole[:2])),
        },
        base="b",
        state={"all": whole, "again": whole},
    )
    delta.save(tmp_path / "d")
    assert_same(Delta.load(tmp_path / "d"), delta)


def test_tensors_that_ask_for_gradients_can_be_saved(tmp_path: Path) -> None:
    delta = delta_of(Dense(full=torch.ones(3, 3, requires_grad=True)))
    delta.save(tmp_path / "d")
    assert Delta.load(tmp_path / "d") == delta


def test_provenance_is_kept_as_json_gives_it_back() -> None:
    assert full_delta().provenance["layers"] == [1, 2]
    with pytest.raises(InvalidSetting, match="provenance must be JSON values"):
        Delta({}, base="b", provenance={"tensor": torch.ones(1)})


def again(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


@pytest.mark.parametrize("copied", [again, copy.deepcopy, copy.copy])
def test_deltas_can_be_pickled_and_copied(copied: Any) -> None:
    delta = full_delta()
    assert_same(copied(delta), delta)
    with pytest.raises(TypeError):
        copied(delta).changes["x"] = ()
    with pytest.raises(TypeError):
        copied(delta).provenance["x"] = 1


@pytest.mark.parametrize("copied", [again, copy.deepcopy, copy.copy])
def test_a_copy_of_a_deltas_record_is_the_callers(copied: Any) -> None:
    delta = full_delta()
    for own in (copied(delta.provenance), asdict(delta)["provenance"]):
        assert own == delta.provenance
        own["x"] = 1
    assert "x" not in delta.provenance


def test_a_delta_gives_its_fields_as_plain_values() -> None:
    delta = full_delta()
    fields = asdict(delta)
    assert Delta(**{**fields, "changes": delta.changes, "report": delta.report, "edits": delta.edits}) == delta
    assert [edit["id"] for edit in fields["edits"]] == [edit.id for edit in delta.edits]
    assert json.dumps(fields["provenance"]) == json.dumps(dict(delta.provenance))


@pytest.mark.parametrize("copied", [again, copy.deepcopy, copy.copy])
def test_what_holds_tensors_or_settings_is_copied_compared_and_hashed(copied: Any) -> None:
    rect = retcon.method("rect", base_method="rome", base_settings={"layer": 1})
    for value in (REPORT, rect, Case("c", (), (), meta={"row": 1})):
        assert {value} == {copied(value)}
    for held in (Dense(full=torch.ones(2, 2)), GivenMoments({"w": torch.eye(2)})):
        assert held in {held}
        assert held != copied(held)  # as tensors have no one answer
    assert copied(CorpusMoments(Corpus(["a b", "c"]))) == CorpusMoments(Corpus(["a b", "c"]))


def test_deltas_are_values() -> None:
    delta = full_delta()
    with pytest.raises(TypeError):
        delta.changes["x"] = ()  # type: ignore[index]
    with pytest.raises(TypeError):
        delta.provenance["x"] = 1  # type: ignore[index]
    assert delta in {full_delta()}
    assert delta != "delta"
    assert "jeep, 2 edits, 3 parameters" in repr(delta)
    assert "unknown method" in repr(Delta({}, base="b"))


def test_ids_differ_when_anything_that_acts_differs() -> None:
    row = Rows(index=i(1), rows=torch.ones(1, 6))
    other = [
        delta_of(row),
        delta_of(row, base="c"),
        delta_of(row, name="v"),
        delta_of(row, row),
        delta_of(row, parents=("p",)),
        delta_of(row, supersedes=("p",)),
        delta_of(row, report=(REPORT,)),
        delta_of(Rows(index=i(2), rows=torch.ones(1, 6))),
        delta_of(Rows(index=i(1), rows=torch.ones(1, 6).double())),
        delta_of(Rows(index=i(1), rows=torch.full((1, 6), 1.0000001))),
        delta_of(Rows(index=i(1), rows=torch.ones(1, 6), region=Region(0, 0, 6))),
        delta_of(Rows(index=i(1), rows=torch.ones(1, 6), region=Region(0, 0, 5))),
        delta_of(Rows(index=i(1), rows=torch.ones(1, 6), region=Region(1, 0, 6))),
        delta_of(Rows(index=i(1), rows=torch.ones(1, 12))),
        delta_of(Columns(index=i(1), columns=torch.ones(1, 6))),
        delta_of(Dense(full=torch.ones(1, 6))),
        delta_of(Dense(full=torch.ones(6, 1))),
        delta_of(Dense(full=torch.zeros(1, 6))),
        delta_of(Dense(full=-torch.zeros(1, 6))),
        Delta({}, base="b"),
    ]
    assert len({d.id for d in other}) == len(other)
    assert delta_of(Rows(index=i(1), rows=torch.ones(6, 1).T)).id == delta_of(row).id
    assert delta_of(row, provenance={"seed": 1}).id == delta_of(row).id


def test_norms_and_ranks_against_the_written_out_change() -> None:
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        kinds = [KINDS[int(k)] for k in torch.randint(4, (1 + seed % 3,), generator=generator)]
        kinds[0] = KINDS[seed % 5]
        regions = [list(REGIONS.values())[int(r)] for r in torch.randint(3, (len(kinds),), generator=generator)]
        changes = [
            random_change(kind, SHAPE, 100 * seed + n, region=region, dtype=torch.float64)
            for n, (kind, region) in enumerate(zip(kinds, regions, strict=True))
        ]
        delta = delta_of(*changes)
        dense = delta.dense("w", SHAPE)
        assert_close(dense, sum((by_loops(c, tuple(SHAPE)) for c in changes), torch.zeros(SHAPE, dtype=torch.float64)))
        try:
            assert delta.norms()["w"] == pytest.approx(float(dense.norm()), rel=1e-9)
        except DeltaMismatch:
            assert "entries" in kinds  # alone they do not tell the parameter's width
            assert len(kinds) > 1
        rank = delta.ranks()["w"]
        if set(kinds) & {"entries", "dense"}:
            assert rank is None
        else:
            assert rank is not None
            assert int(torch.linalg.matrix_rank(dense)) <= rank == 2 * len(kinds)


def test_norm_of_low_precision_changes_is_taken_in_float64() -> None:
    change = LowRank(left=torch.full((100, 1), 300.0).half(), right=torch.full((1, 100), 300.0).half())
    assert delta_of(change).norms()["w"] == pytest.approx(9e6)


def test_norms_of_entries_at_the_same_places() -> None:
    delta = delta_of(Entries(index=i(3, 9), entries=torch.ones(2)), Entries(index=i(9, 4), entries=torch.ones(2)))
    assert delta.norms()["w"] == pytest.approx(6**0.5)
    mixed = delta_of(Entries(index=i(3), entries=torch.ones(1)), Columns(index=i(0), columns=torch.ones(8, 1)))
    with pytest.raises(DeltaMismatch, match=r"use delta\.dense\(name, shape\)\.norm\(\)"):
        mixed.norms()


def test_bytes_view_of_any_tensor() -> None:
    assert bytes(as_bytes(torch.tensor([1, 2], dtype=torch.int16))) == b"\x01\x00\x02\x00"
    assert bytes(as_bytes(torch.tensor(1.0).bfloat16())) == b"\x80\x3f"
    assert bytes(as_bytes(torch.empty(0, 3))) == b""
    assert bytes(as_bytes(torch.tensor([[1, 2], [3, 4]], dtype=torch.uint8).T)) == b"\x01\x03\x02\x04"


# --- damaged and foreign files -------------------------------------------------------------------------------------


def test_missing_files_and_folders(tmp_path: Path) -> None:
    for path, what in ((tmp_path / "none", "no such file"), (tmp_path, "is a directory, expected a file")):
        with pytest.raises(MalformedFile, match=f"{path}: {what}"):
            Delta.load(path)


def test_a_file_cut_short_anywhere_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "d"
    full_delta().save(path)
    data = path.read_bytes()
    for n in [0, 3, 8, 9, 500, len(data) // 2, len(data) - 1]:
        path.write_bytes(data[:n])
        with pytest.raises(MalformedFile, match=f"{path}: not a readable safetensors file"):
            Delta.load(path)


def test_a_flipped_bit_anywhere_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "d"
    full_delta().save(path)
    data = path.read_bytes()
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(data), (150,), generator=generator).tolist()
    for place in [*places, *range(len(data) - 40, len(data))]:
        broken = bytearray(data)
        broken[place] ^= 1 << place % 7
        path.write_bytes(broken)
        with pytest.raises(MalformedFile):
            Delta.load(path)


def test_a_safetensors_file_that_is_no_delta(tmp_path: Path) -> None:
    path = tmp_path / "d"
    for metadata in (
        None,
        {"format": "pt"},
        {"retcon": "{"},
        {"retcon": "[]"},
        {"retcon": "{}"},
        {"retcon": '{"format": "retcon-delta-2"}'},
    ):
        save_file({"w": torch.ones(2)}, path, metadata=metadata)
        with pytest.raises(MalformedFile, match="a safetensors file, but not a retcon delta"):
            Delta.load(path)
    save_file({"w": torch.ones(2)}, path, metadata={"retcon": json.dumps({"format": "retcon-delta-99"})})
    with pytest.raises(
        MalformedFile, match="'retcon-delta-99', this version reads 'retcon-delta-2'; make the edit again"
    ):
        Delta.load(path)
    path.write_text("nothing of the kind")
    with pytest.raises(MalformedFile, match="not a readable safetensors file"):
        Delta.load(path)


def test_a_failed_save_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, old = tmp_path / "d", delta_of(random_change("rows", SHAPE))
    old.save(path)

    def failing(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "fsync", failing)
    with pytest.raises(OSError, match="disk full"):
        full_delta().save(path)
    monkeypatch.undo()
    assert Delta.load(path) == old
    assert os.listdir(tmp_path) == ["d"]
