"""The pass over a corpus: taken up again where it was killed, smaller batches when memory runs out, convergence."""

import warnings

import pytest
import torch
from torch.testing import assert_close

from retcon.checked import cached, keep
from retcon.errors import OutOfMemory, RetconWarning
from retcon.lm import offload
from retcon.lm.batches import is_out_of_memory
from retcon.lm.capacity import free_bytes
from retcon.lm.prompts import Row
from retcon.lm.site import Site
from retcon.memory import collect as module
from retcon.memory.collect import batched, chunked, collect


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setitem(module.CHUNK_TOKENS, "cpu", 40)


@pytest.fixture
def ragged():
    """24 rows of 3 to 26 random tokens."""
    generator = torch.Generator().manual_seed(3)
    return [Row(tuple(torch.randint(3, 400, (n,), generator=generator).tolist()), n) for n in range(3, 27)]


@pytest.fixture
def sites():
    return lambda lm: [lm.site(1, "down_proj"), lm.site(2, "o_proj")]


class Killed(Exception):
    pass


@pytest.mark.parametrize("after", [1, 5, 9])
def test_a_killed_pass_ends_with_the_identical_result(after, tiny, ragged, sites, tmp_path, monkeypatch):
    lm = tiny("gptj", torch.float32)
    whole = dict(collect(lm, sites(lm), ragged, max_batch_tokens=64))
    n_chunks = len(chunked([len(r.ids) for r in ragged], 40))
    assert n_chunks > 9
    heard = []

    def kill(done, total):
        heard.append(done)
        if len(heard) > after:
            raise Killed

    path = tmp_path / "a.partial"
    with pytest.raises(Killed):
        dict(collect(lm, sites(lm), ragged, max_batch_tokens=64, progress=kill, partial=path, save_every=0.0))
    again = []
    found = dict(
        collect(  # the budget on record holds, whatever memory would allow now
            lm, sites(lm), ragged, max_batch_tokens=999, progress=lambda done, _: again.append(done), partial=path
        )
    )
    assert n_chunks - after <= len(again) < n_chunks, "begun afresh"
    for (_, one), (_, other) in zip(whole.items(), found.items(), strict=True):
        assert torch.equal(one.moment, other.moment)
        assert one.convergence == other.convergence


def test_partial_sums_of_another_pass_or_damaged_ones_are_not_used(tiny, ragged, sites, tmp_path):
    lm = tiny("llama", torch.float32)
    path = tmp_path / "a.partial"
    list(collect(lm, sites(lm), ragged[::-1], partial=path, save_every=0.0))
    for _ in range(2):
        heard = []
        with pytest.warns(RetconWarning, match=r"a\.partial"):
            found = dict(collect(lm, sites(lm), ragged, partial=path, progress=lambda d, _, h=heard: h.append(d)))
        assert len(heard) == len(chunked([len(r.ids) for r in ragged], 40))
        for (_, one), (_, other) in zip(found.items(), collect(lm, sites(lm), ragged), strict=True):
            assert torch.equal(one.moment, other.moment)
        path.write_bytes(b"damaged")


def test_partial_sums_that_an_earlier_version_kept_are_not_used(tiny, ragged, sites, tmp_path):
    lm = tiny("llama", torch.float32)
    path = tmp_path / "a.partial"
    whole = {site.id: found.moment for site, found in collect(lm, sites(lm), ragged)}
    list(collect(lm, sites(lm), ragged, partial=path, save_every=0.0))
    identity = {"digest": module._digest(lm, sites(lm), ragged, chunked([len(r.ids) for r in ragged], 40))}
    tensors, about = cached(path, module.PARTIAL_SUMS, identity)
    keep(path, module.PARTIAL_SUMS, identity, {n: t for n, t in tensors.items() if "routed" not in n}, about)
    for site, found in collect(lm, sites(lm), ragged, partial=path):
        assert torch.equal(found.moment, whole[site.id])


def running_out(monkeypatch, *, over=30, times=10**6):
    """Let passes of more than so many tokens fail, after their products have been added; return the sizes tried."""
    whole, seen = module.run, []

    def tight(lm, batch, hooks):
        nonlocal times
        result = whole(lm, batch, hooks)
        seen.append(batch.ids.numel())
        if batch.ids.numel() > over and times:
            times -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(module, "run", tight)
    return seen


@pytest.mark.filterwarnings("error")
def test_a_chunk_is_done_again_with_the_sums_out_of_the_way_and_no_bit_changes(tiny, ragged, sites, monkeypatch):
    lm = tiny("gptj", torch.float32)
    monkeypatch.setattr(offload, "LEAST_BYTES", 1)
    wanted = list(collect(lm, sites(lm), ragged, max_batch_tokens=100))
    seen = running_out(monkeypatch, over=0, times=1)
    for (_, one), (_, other) in zip(wanted, collect(lm, sites(lm), ragged, max_batch_tokens=100), strict=True):
        assert torch.equal(one.moment, other.moment)
        assert (one.convergence, None) == (other.convergence, other.shrunk_to)
    assert seen[0] == seen[1], "the same pass again"


def test_without_leave_to_shrink_a_pass_that_does_not_fit_ends_the_work_and_keeps_it(
    tiny, ragged, sites, tmp_path, monkeypatch
):
    lm = tiny("llama", torch.float32)
    wanted = list(collect(lm, sites(lm), ragged))
    whole, path, heard = module.run, tmp_path / "a.partial", []
    hear = lambda done, total: (heard.append(done), len(heard) == 3 and running_out(monkeypatch, over=0))  # noqa: E731
    with pytest.raises(OutOfMemory, match=r"memory ran out in a forward pass.*--shrink"):
        list(collect(lm, sites(lm), ragged, progress=hear, partial=path))
    monkeypatch.setattr(module, "run", whole)
    again = []
    found = collect(lm, sites(lm), ragged, partial=path, progress=lambda done, total: again.append(done))
    for (_, one), (_, other) in zip(wanted, found, strict=True):
        assert torch.equal(one.moment, other.moment)
    assert len(again) == len(chunked([len(r.ids) for r in ragged], 40)) - 3


def test_with_leave_to_shrink_passes_get_smaller_and_the_result_says_so(tiny, ragged, sites, tmp_path, monkeypatch):
    lm = tiny("gpt2")  # which computes in float64 throughout
    wanted = dict(collect(lm, sites(lm), ragged))
    whole = module.run
    running_out(monkeypatch)
    path = tmp_path / "a.partial"
    with pytest.warns(RetconWarning, match="memory ran out; going on with at most") as told:
        found = dict(collect(lm, sites(lm), ragged, max_batch_tokens=100, shrink=True, partial=path, save_every=0.0))
    assert len(told) == 2  # 100, 50, 25; and it stays so
    for one, other in zip(wanted.values(), found.values(), strict=True):
        assert_close(one.moment, other.moment, rtol=1e-12, atol=1e-12)
        assert other.shrunk_to == 25
    monkeypatch.setattr(module, "run", whole)  # sums of smaller passes are another thing
    for one, other in zip(wanted.values(), dict(collect(lm, sites(lm), ragged, partial=path)).values(), strict=True):
        assert torch.equal(one.moment, other.moment)
        assert other.shrunk_to is None


def test_a_row_that_does_not_fit_is_an_error_and_so_is_any_other_failure(tiny, ragged, sites, monkeypatch):
    lm = tiny("gptj")

    def failing(error):
        def never(lm, batch, hooks):
            raise error

        return never

    for error, told in (
        (torch.OutOfMemoryError("CUDA out of memory"), (OutOfMemory, "a text of .* tokens does not fit")),
        (RuntimeError("shapes do not match"), (RuntimeError, "shapes do not match")),
    ):
        monkeypatch.setattr(module, "run", failing(error))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(told[0], match=told[1]):
                list(collect(lm, sites(lm), ragged, shrink=True))
        assert not any(p.requires_grad is False for p in lm.model.parameters())


def test_convergence_is_the_relative_distance_of_the_halves_moments(tiny, ragged):
    lm = tiny("llama", torch.float32)
    site = lm.site(1, "down_proj")
    found = dict(collect(lm, [site], ragged))[site]
    ends = [chunk.stop for chunk in chunked([len(r.ids) for r in ragged], 40)]
    half = sum(len(r.ids) for r in ragged) / 2
    middle = min(ends, key=lambda end: abs(sum(len(r.ids) for r in ragged[:end]) - half))
    parts = ragged[:middle], ragged[middle:]
    first, second = (dict(collect(lm, [site], part))[site].moment for part in parts)
    assert found.convergence == pytest.approx(float((first - second).norm() / found.moment.norm()), rel=1e-4)
    assert dict(collect(lm, [site], ragged[:1]))[site].convergence is None
    assert dict(collect(lm, [site], [ragged[5]] * 2))[site].convergence == pytest.approx(0, abs=1e-6)


def test_moments_are_exactly_symmetric_whatever_the_width(tiny, ragged):
    for family in ("gptj", "llama"):  # one block of rows and several
        lm = tiny(family, torch.float32, n_layers=2)
        for kind in ("down_proj", "o_proj"):
            site = lm.site(1, kind)
            c = dict(collect(lm, [site], ragged))[site].moment
            assert torch.equal(c, c.T)


def test_wide_keys_are_summed_in_block_rows(randn):
    site = Site(0, "down_proj", "wide", torch.nn.Linear(1000, 2), transposed=False)
    total, keys = module._Sum(site), randn(300, 1000)
    assert len(total.edges) == 9
    for part in keys.split(70):
        products = module._Products(1000, routed=False)
        products.add(part, None)
        total.add(products)
    assert_close(total.result(300, 300).moment, keys.T @ keys / 300)


def test_chunks_hold_every_row_in_order():
    lengths = [5, 30, 9, 50, 1, 1, 39, 40]
    chunks = chunked(lengths, 40)
    assert [i for chunk in chunks for i in chunk] == list(range(8))
    assert all(sum(lengths[i] for i in c) <= 40 or len(c) == 1 for c in chunks)
    assert len(chunked([10, 10], 40)) == 2
    assert chunked([10], 40) == [range(1)]


@pytest.mark.parametrize("budget", [1, 64, 4096])
def test_batches_keep_to_the_budget_and_waste_little(budget):
    lengths = torch.randint(1, 60, (200,), generator=torch.Generator().manual_seed(0)).tolist()
    groups = batched(lengths, budget)
    assert sorted(i for g in groups for i in g) == list(range(200))
    for group in groups:
        real, padded = sum(lengths[i] for i in group), len(group) * max(lengths[i] for i in group)
        assert padded <= budget or len(group) == 1
        last = lengths[group[-1]]
        assert real - last < budget // 32 or padded - real <= padded / 32


def test_memory_is_counted_and_its_end_recognised():
    assert 1e6 < free_bytes("cpu") < 1e14
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as failed:
        torch.empty(2**50)
    assert is_out_of_memory(failed.value)
    assert not is_out_of_memory(RuntimeError("shapes do not match"))
