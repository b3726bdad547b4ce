"""Second moments: streaming equals direct, in one pass, on the base, cached under all that determines them."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from retcon import checked
from retcon.delta import Dense
from retcon.errors import InvalidSetting, MalformedFile, RetconWarning, TooFewTokens
from retcon.lm.forward import Point, run
from retcon.lm.prompts import pad
from retcon.memory import collect as collecting
from retcon.memory import moments as module
from retcon.memory.corpus import Corpus
from retcon.memory.moments import (
    CorpusMoments,
    GivenMoments,
    collect_moments,
    document_rows,
    load_moment,
    moment_keys,
    pack_triangle,
    save_moments,
    unpack_triangle,
)
from retcon.memory.solve import cholesky
from tests.conftest import FAMILIES, TEXT, random_moments

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def corpus():
    return Corpus(tuple(TEXT * 6))


def direct(lm, rows, point):
    """Sum of k k^T row by row, unpadded."""
    total, count = 0, 0
    for row in rows:
        seen = []
        with torch.no_grad():
            run(lm, pad([row]), {point: seen.append})
        total, count = total + sum(torch.outer(k, k) for k in seen[0][0]), count + len(row.ids)
    return total / count


@pytest.mark.parametrize("family", FAMILIES)
def test_streaming_equals_direct_for_any_batch_split(family, tiny):
    lm = tiny(family)
    rows = document_rows(lm, TEXT, 10_000, 64)
    sites = [lm.site(0, "down_proj"), lm.site(2, "down_proj"), lm.site(2, "o_proj")]
    points = [Point(0, "key"), Point(2, "key"), Point(2, "attn_key")]
    for max_tokens in (1, 100, 8192):
        found = collect_moments(lm, sites, rows, max_batch_tokens=max_tokens)
        for site, point in zip(sites, points, strict=True):
            assert_close(found[site], direct(lm, rows, point), rtol=1e-5, atol=1e-6)
    c = found[sites[0]]
    assert_close(c, c.T)
    assert float(torch.linalg.eigvalsh(c).min()) > -1e-9


def test_without_rows_that_is_said(tiny):
    lm = tiny("llama")
    with pytest.raises(InvalidSetting, match="no rows given to collect second moments from"):
        collect_moments(lm, [lm.site(1, "down_proj")], [])


def test_trace_is_the_mean_squared_key_norm(tiny):
    lm = tiny("llama")
    rows = document_rows(lm, TEXT, 10_000, 64)
    squares = []
    with torch.no_grad():
        for row in rows:
            run(lm, pad([row]), {Point(1, "key"): lambda k: squares.append((k[0] ** 2).sum(-1))})
    found = collect_moments(lm, [lm.site(1, "down_proj")], rows)
    assert_close(torch.cat(squares).mean(), next(iter(found.values())).trace())


def test_the_pass_stops_above_the_highest_site_and_leaves_the_model_alone(tiny, untouched):
    lm = tiny("llama")
    before = untouched(lm)
    reached = []
    handle = lm.block(3).register_forward_hook(lambda *_: reached.append(3))
    collect_moments(lm, [lm.site(2, "down_proj")], document_rows(lm, TEXT, 100, 64))
    handle.remove()
    assert not reached
    assert untouched(lm) == before


def test_moments_are_the_bases_even_while_deltas_are_live(tiny, corpus):
    lm = tiny("llama")
    clean = CorpusMoments(corpus, tokens_per_dimension=2).key(lm, lm.site(1, "down_proj"))
    rows = document_rows(lm, TEXT, 1000, 64)
    wanted = collect_moments(lm, [lm.site(1, "down_proj")], rows)
    site = lm.site(0, "down_proj")
    delta = lm.delta({site.name: [Dense(full=torch.ones_like(site.weight))]})
    with lm.edited(delta):
        found = collect_moments(lm, [lm.site(1, "down_proj")], rows)
        assert CorpusMoments(corpus, tokens_per_dimension=2).key(lm, lm.site(1, "down_proj")) == clean
    for a, b in zip(wanted.values(), found.values(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.filterwarnings("ignore:second moments from")
def test_collected_once_in_one_pass_and_kept(tiny, corpus, monkeypatch):
    lm = tiny("gptj")
    sites = [lm.site(layer, "down_proj") for layer in (0, 2)]
    passes = []
    whole = module.collect
    monkeypatch.setattr(module, "collect", lambda *a, **k: passes.append(1) or whole(*a, **k))
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    source.prepare(lm, sites)
    source.prepare(lm, sites)
    assert len(passes) == 1
    again = CorpusMoments(corpus, tokens_per_dimension=2)
    rows = document_rows(lm, corpus.documents, 2 * 128, 1024)
    direct_ = dict(whole(lm, sites, rows))
    for site in sites:
        assert_close(again.second_moment(lm, site).double(), direct_[site].moment, rtol=1e-5, atol=1e-6)
    assert len(passes) == 1
    other = CorpusMoments(Corpus((*corpus.documents, "More.")), tokens_per_dimension=2)
    other.prepare(lm, sites[:1])
    assert len(passes) == 2


@pytest.mark.filterwarnings("ignore:second moments from")
def test_a_moment_is_the_same_whatever_sites_are_collected_with_it(tiny, corpus, cache, monkeypatch):
    lm = tiny("gptj", torch.float32)
    sites = [lm.site(1, "o_proj"), lm.site(1, "down_proj"), lm.site(2, "o_proj")]
    assert len({s.shape[1] for s in sites}) == 2
    heard = []
    source = CorpusMoments(corpus, tokens_per_dimension=2, progress=lambda done, total: heard.append((done, total)))
    source.prepare(lm, sites)
    assert heard == sorted(heard)
    assert heard[-1] == (2 * 32 + 2 * 128,) * 2
    together = [source.second_moment(lm, s) for s in sites]
    monkeypatch.setenv("RETCON_CACHE", str(cache / "another"))
    for site, found in zip(sites, together, strict=True):
        assert torch.equal(CorpusMoments(corpus, tokens_per_dimension=2).second_moment(lm, site), found)


def test_a_key_names_everything_that_determines_a_moment(tiny, corpus):
    lm, other = tiny("gptj"), tiny("gptj", seed=1)
    site = lm.site(0, "down_proj")
    base = CorpusMoments(corpus).key(lm, site)
    assert base != CorpusMoments(corpus).key(other, other.site(0, "down_proj"))
    assert base != CorpusMoments(corpus).key(lm, lm.site(1, "down_proj"))
    assert base != CorpusMoments(corpus, tokens_per_dimension=5).key(lm, site)
    assert base != CorpusMoments(corpus, max_length=16).key(lm, site)
    for changed in (tiny("gptj", tok="bos"), tiny("gptj", torch.float32)):
        changed.remember_fingerprint(lm.fingerprint())
        assert base != CorpusMoments(corpus).key(changed, changed.site(0, "down_proj"))
    assert len({k.file for k in (base, CorpusMoments(corpus, max_length=16).key(lm, site))}) == 2


@pytest.mark.filterwarnings("ignore:second moments from")
@pytest.mark.parametrize("change", [{"tok": "bos"}, {"dtype": torch.bfloat16}], ids=str)
def test_the_same_weights_with_other_tokens_or_in_another_dtype_have_moments_of_their_own(change, tiny, corpus):
    lm, other = tiny("gptj", torch.float32), tiny("gptj", **{"dtype": torch.float32, **change})
    other.remember_fingerprint(lm.fingerprint())  # as of one checkpoint
    found = []
    for each in (lm, other):
        site, source = each.site(1, "down_proj"), CorpusMoments(corpus, tokens_per_dimension=2)
        found.append(source.second_moment(each, site))
        rows = document_rows(each, corpus.documents, 2 * 128, 1024)
        own = next(iter(module.collect(each, [site], rows)))[1].moment.float()
        assert_close(found[-1], own, rtol=0, atol=0)
    assert not torch.equal(*found)


@pytest.mark.filterwarnings("ignore:second moments from")
def test_shipped_moments_serve_in_every_dtype_and_only_the_tokens_that_they_were_collected_from(tiny, corpus, tmp_path):
    lm = tiny("gptj", torch.float32)
    site, source = lm.site(1, "down_proj"), CorpusMoments(corpus, tokens_per_dimension=2)
    wanted, path = source.second_moment(lm, site), tmp_path / "shipped.safetensors"
    path.write_bytes(source.key(lm, site).file.read_bytes())
    source.key(lm, site).file.unlink()
    shipped = replace(source, shipped=path)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        other = tiny("gptj", dtype)
        other.remember_fingerprint(lm.fingerprint())
        assert shipped.stored(other, other.site(1, "down_proj")) == path
        assert torch.equal(shipped.second_moment(other, other.site(1, "down_proj")), wanted)
    other = tiny("gptj", torch.float32, tok="bos")
    other.remember_fingerprint(lm.fingerprint())
    assert shipped.stored(other, other.site(1, "down_proj")) is None


def test_too_few_tokens(tiny):
    lm = tiny("gptj")
    with pytest.raises(TooFewTokens, match="128 dimensions"):
        CorpusMoments(Corpus(("Too short.",))).prepare(lm, [lm.site(0, "down_proj")])
    with pytest.warns(RetconWarning, match="a dimension"):
        CorpusMoments(Corpus(tuple(TEXT * 3))).prepare(lm, [lm.site(0, "down_proj")])


@pytest.mark.filterwarnings("ignore:second moments from")
@pytest.mark.parametrize("damage", ["text", "cut", "flipped", "foreign"])
def test_a_damaged_cache_file_is_collected_again_and_named(damage, tiny, corpus):
    lm = tiny("gptj")
    site, other = lm.site(0, "down_proj"), lm.site(1, "down_proj")
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    source.prepare(lm, [site, other])
    wanted, path = source.second_moment(lm, site), source.key(lm, site).file
    whole = path.read_bytes()
    path.write_bytes(
        {
            "text": b"not safetensors",
            "cut": whole[: len(whole) // 2],
            "flipped": whole[:-9] + bytes([whole[-9] ^ 1]) + whole[-8:],
            "foreign": source.key(lm, other).file.read_bytes(),
        }[damage]
    )
    with pytest.warns(RetconWarning, match=path.name):
        assert torch.equal(source.second_moment(lm, site), wanted)
    assert torch.equal(load_moment(path, source.key(lm, site)), wanted)


@pytest.mark.filterwarnings("ignore:second moments from")
def test_factors_of_two_layers_are_told_apart_when_their_files_are_swapped(tiny, corpus, monkeypatch):
    monkeypatch.setattr(module, "FACTOR_FILE_FROM", 100)
    lm = tiny("gptj")
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    sites = [lm.site(layer, "down_proj") for layer in (0, 1)]
    factors = [source.factor(lm, site) for site in sites]
    one, two = (source.key(lm, site).file_of("factor") for site in sites)
    first = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(first)
    for site, factor, path in zip(sites, factors, (one, two), strict=True):
        with pytest.warns(RetconWarning, match=rf"{path.name}: not the matrices made from a second moment asked for"):
            assert torch.equal(source.factor(lm, site), factor)


@pytest.mark.filterwarnings("ignore:second moments from")
def test_without_a_cache_that_can_be_written_moments_are_kept_in_memory(tiny, corpus, tmp_path, monkeypatch):
    lm = tiny("gptj")
    site = lm.site(0, "down_proj")
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    wanted = source.second_moment(lm, site)
    (tmp_path / "a file").write_text("")
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path / "a file"))
    checked._warned.clear()
    homeless = CorpusMoments(corpus, tokens_per_dimension=2)
    with pytest.warns(RetconWarning, match=r"cache cannot be written.*RETCON_CACHE") as caught:
        homeless.prepare(lm, [site])
        assert torch.equal(homeless.second_moment(lm, site), wanted)
        assert torch.equal(homeless.derived(lm, site, "half", lambda c: c / 2), wanted / 2)
    assert len([w for w in caught if "cache cannot" in str(w.message)]) == 1


@pytest.mark.filterwarnings("ignore:second moments from", "ignore:memory ran out")
def test_moments_of_smaller_passes_say_so_and_serve_only_where_such_are_allowed(tiny, corpus, monkeypatch):
    lm = tiny("gptj", torch.float32)
    site = lm.site(0, "down_proj")
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    wanted, half = source.second_moment(lm, site), source.derived(lm, site, "half", lambda c: c / 2)
    for path in (source.key(lm, site).file, source.key(lm, site).file_of("half")):
        path.unlink()
    whole, most = collecting.run, []

    def tight(lm, batch, hooks):
        most.append(batch.ids.numel())
        if batch.ids.numel() == max(most):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return whole(lm, batch, hooks)

    monkeypatch.setattr(collecting, "run", tight)
    shrunk = CorpusMoments(corpus, tokens_per_dimension=2, shrink=True)
    shrunk.prepare(lm, [site])
    assert "passes of" in shrunk.keys(lm, [site])[site.id]
    shrunk.derived(lm, site, "half", lambda c: c / 2)
    monkeypatch.setattr(collecting, "run", whole)
    assert source.keys(lm, [site])[site.id] in shrunk.keys(lm, [site])[site.id]
    with pytest.warns(RetconWarning, match="collected in smaller passes"):
        assert torch.equal(source.second_moment(lm, site), wanted)
    with pytest.warns(RetconWarning, match="not the matrices made from a second moment asked for"):
        assert torch.equal(source.derived(lm, site, "half", lambda c: c / 2), half)


@pytest.mark.filterwarnings("ignore:second moments from")
def test_files_hold_what_they_say(tiny, corpus):
    lm = tiny("gptj")
    site = lm.site(0, "down_proj")
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    source.prepare(lm, [site])
    key = source.key(lm, site)
    assert moment_keys(key.file) == [key]
    with pytest.raises(MalformedFile, match="holds no second moment"):
        load_moment(key.file, source.key(lm, lm.site(1, "down_proj")))


def test_given_moments_must_cover_the_sites(tiny):
    lm = tiny("gptj")
    with pytest.raises(InvalidSetting, match="no second moment given"):
        GivenMoments({}).prepare(lm, [lm.site(0, "down_proj")])
    site = lm.site(0, "down_proj")
    with pytest.raises(InvalidSetting, match=rf"second moment of .*: its keys are {site.shape[1]} wide, found 3"):
        GivenMoments({site.id: torch.eye(3)}).prepare(lm, [site])
    for wrong, found in ((torch.ones(3), r"\(3,\)"), (torch.eye(3).long(), "torch.int64"), ("C", "str")):
        with pytest.raises(InvalidSetting, match=rf"second moment of w: expected a square matrix of floats, .*{found}"):
            GivenMoments({"w": wrong})
    assert torch.equal(GivenMoments({"w": torch.eye(3).numpy()}).by_name["w"], torch.eye(3))


# --- what is made from a moment --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:second moments from")
@pytest.mark.parametrize("on_disk", [False, True])
def test_a_factor_is_that_of_the_stored_moment_and_large_ones_are_read_again(on_disk, tiny, corpus, cache, monkeypatch):
    if on_disk:
        monkeypatch.setattr(module, "FACTOR_FILE_FROM", 100)
    lm = tiny("gptj")
    site = lm.site(0, "down_proj")
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    lower = source.factor(lm, site)
    c = source.second_moment(lm, site).double()
    assert_close(lower @ lower.T, c)
    assert torch.equal(lower, lower.tril())
    files = sorted((cache / "moments").iterdir())
    assert len(files) == 1 + on_disk
    monkeypatch.setattr(module, "cholesky", lambda c, device: (torch.zeros_like(c), 0.0))
    assert torch.equal(CorpusMoments(corpus, tokens_per_dimension=2).factor(lm, site), lower if on_disk else 0 * lower)


@pytest.mark.filterwarnings("ignore:second moments from")
def test_what_is_derived_is_made_once_for_each_moment_and_name(tiny, corpus):
    lm = tiny("gptj")
    sites = [lm.site(layer, "down_proj") for layer in (0, 1)]
    made = []

    def build(c):
        made.append(c)
        return c[:3].double()

    for source in (CorpusMoments(corpus, tokens_per_dimension=2), random_moments(lm)):
        made.clear()
        for what in ("three", "three", "3"):
            for site in sites:
                assert torch.equal(source.derived(lm, site, what, build), source.second_moment(lm, site)[:3].double())
        assert len(made) == 4
    source = CorpusMoments(corpus, tokens_per_dimension=2)
    key = source.key(lm, sites[0])
    assert key.file_of("three") != key.file_of("3")
    key.file_of("three").write_bytes(b"damaged")
    with pytest.warns(RetconWarning, match="not a readable file of matrices"):
        again = source.derived(lm, sites[0], "three", build)
    assert torch.equal(again, source.second_moment(lm, sites[0])[:3].double())
    assert len(made) == 5


def test_a_stored_moment_that_rounding_left_indefinite_comes_with_its_jitter(tiny, tmp_path):
    lm = tiny("gptj")
    key = CorpusMoments(Corpus(tuple(TEXT))).key(lm, lm.site(0, "down_proj"))
    x = torch.randn(128, 20, generator=torch.Generator().manual_seed(0))
    save_moments(tmp_path / "a.safetensors", {key: x @ x.T})
    found = load_moment(tmp_path / "a.safetensors", key)
    lower, jitter = cholesky(found)
    assert jitter == 0.0
    assert_close(lower @ lower.T, found)
    assert_close(found.float(), x @ x.T, rtol=1e-4, atol=1e-4)


def test_packing_is_undone(randn):
    lower = randn(7, 7).tril()
    assert pack_triangle(lower).shape == (28,)
    assert torch.equal(unpack_triangle(pack_triangle(lower), 7), lower)


@pytest.mark.filterwarnings("ignore:second moments from")
def test_a_killed_collection_goes_on_and_leaves_nothing_behind(tiny, corpus, cache, monkeypatch):
    lm = tiny("gptj", torch.float32)
    sites = [lm.site(layer, "down_proj") for layer in (0, 2)]
    monkeypatch.setitem(collecting.CHUNK_TOKENS, "cpu", 64)
    monkeypatch.setattr(collecting, "SAVE_EVERY", 0.0)
    source = CorpusMoments(corpus, tokens_per_dimension=4)
    source.prepare(lm, sites)
    wanted = [source.second_moment(lm, s) for s in sites]
    halves = [source.convergence(lm, s) for s in sites]
    for file in (cache / "moments").iterdir():
        file.unlink()

    def kill(done, total):
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(source, progress=kill).prepare(lm, sites)
    assert [f.suffix for f in (cache / "moments").iterdir()] == [".partial"]
    heard = []
    replace(source, progress=lambda done, total: heard.append(done / total)).prepare(lm, sites)
    assert heard[0] > 64 / 512  # not with the first chunk
    for site, c, apart in zip(sites, wanted, halves, strict=True):
        assert torch.equal(source.second_moment(lm, site), c)
        assert source.convergence(lm, site) == apart
        assert 0 < apart < 1
    assert {f.suffix for f in (cache / "moments").iterdir()} == {".safetensors"}
