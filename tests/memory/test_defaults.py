"""Contexts and moments that nobody named: the embedded models ship moments; other models need a corpus."""

import sys

import pytest
import torch
from torch.testing import assert_close

import retcon
from retcon import world
from retcon.delta import Dense
from retcon.errors import RetconWarning
from retcon.memory import defaults
from retcon.memory.contexts import sample_contexts
from retcon.memory.defaults import default_contexts, default_moments, shipped_text
from retcon.memory.moments import collect_moments, document_rows
from tests.conftest import tokenizer


@pytest.mark.parametrize("first", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", world.MODELS)
def test_an_embedded_model_has_one_fingerprint_and_its_shipped_moments_in_every_dtype(
    name, first, monkeypatch, tmp_path
):
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path))
    prints = set()
    for dtype in dict.fromkeys((first, "float32", "bfloat16", "float16")):
        lm = retcon.load(f"demo:{name}", dtype=dtype, device="cpu")
        prints.add(lm.fingerprint())
        source, sites = default_moments(lm), [lm.site(layer, "down_proj") for layer in range(lm.n_layers)]
        assert {source.stored(lm, site) for site in sites} == {source.shipped}
    assert len(prints) == 1


@pytest.mark.parametrize("name", world.MODELS)
def test_the_embedded_models_ship_moments_of_every_layer(name, monkeypatch, tmp_path):
    monkeypatch.setenv("RETCON_CACHE", str(tmp_path))
    lm = retcon.load(f"demo:{name}")
    source = default_moments(lm)
    sites = [lm.site(layer, "down_proj") for layer in range(lm.n_layers)]
    source.prepare(lm, sites)
    assert not (tmp_path / "moments").exists(), "the shipped file does not fit the shipped weights or text"
    site = sites[2]
    rows = document_rows(lm, source.corpus.documents, 20 * site.weight.shape[1], 1024)
    fresh = collect_moments(lm, [site], rows)[site]
    assert_close(source.second_moment(lm, site).double(), fresh, rtol=1e-3, atol=1e-4 * float(fresh.diagonal().mean()))
    assert float(torch.linalg.eigvalsh(source.second_moment(lm, site).double()).min()) > -1e-6


def test_without_corpus_or_datasets_the_shipped_text_serves_and_that_is_said(tiny, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    defaults.wikitext.cache_clear()
    with pytest.warns(RetconWarning, match=r"small text that ships with retcon.*'\.\[hub\]'.*moments=CorpusMoments"):
        moments = default_moments(tiny("llama"))
    assert moments.corpus == shipped_text()
    assert sum(map(len, moments.corpus.documents)) > 1_000_000  # characters: enough for keys of 16,384 dimensions


def test_contexts_of_a_model_are_sampled_once(tiny, monkeypatch):
    calls = []
    monkeypatch.setattr(
        defaults, "sample_contexts", lambda lm, **how: calls.append((lm.name, how)) or sample_contexts(lm, **how)
    )
    one, two = tiny("gptj"), tiny("llama")
    assert default_contexts(one, 0) == default_contexts(one, 0, "memit") == sample_contexts(one)
    for lm, seed, style in ((one, 1, "memit"), (one, 0, "rome_easyedit"), (two, 0, "memit")):
        assert default_contexts(lm, seed, style) == sample_contexts(lm, seed=seed, style=style)
    assert len(calls) == 4


def test_contexts_are_sampled_again_where_weights_or_tokenizer_have_changed(tiny):
    lm = tiny("llama")
    first = default_contexts(lm, 0)
    delta = lm.delta({(site := lm.site(0, "down_proj")).name: [Dense(full=torch.ones_like(site.weight))]})
    with lm.edited(delta):
        assert default_contexts(lm, 0) is first  # they are the base's
    with torch.no_grad():
        lm.head.weight.copy_(lm.head.weight.roll(1, 0))
    changed = default_contexts(lm, 0)
    assert changed == sample_contexts(lm) != first
    lm.tokenizer.backend_tokenizer.post_processor = tokenizer("bos").backend_tokenizer.post_processor
    assert default_contexts(lm, 0) == sample_contexts(lm) != changed
