"""Integrated gradients over weights: the identities (T7 to T10, T14, T15, T18, T19) and exact selection (T12, T13)."""

from collections.abc import Sequence

import pytest
import torch
from torch.testing import assert_close

from retcon.attachment import Beside, Hook
from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting, NonFinite
from retcon.lm.model import LM
from retcon.lm.site import Site
from retcon.locate.attribution import Attribution, answer_probabilities, attribute, select
from retcon.locate.neurons import attribute_neurons
from retcon.training.objective import answer_rows
from tests.conftest import FAMILIES, everyday

GAUSS = dict(n_points=16, quadrature="gauss")
SMOOTH = ("gpt2", "gpt_neox")  # float64 all through; others compute a norm or the attention in float32


def sites_of(lm: LM, *kinds: str) -> list[Site]:
    return [lm.site(layer, kind) for layer in range(lm.n_layers) for kind in kinds or ("down_proj",)]


class scaled:
    """The model with some matrices multiplied by a factor, or single rows or columns of one."""

    def __init__(self, sites: Sequence[Site], factor: float, row: int | None = None, column: int | None = None) -> None:
        self.sites, self.factor, self.row, self.column = sites, factor, row, column

    def __enter__(self) -> None:
        self.kept = [site.module.weight.detach().clone() for site in self.sites]
        with torch.no_grad():
            for site in self.sites:
                math = site.module.weight.T if site.transposed else site.module.weight
                part = slice(None) if site.rows is None else site.rows
                if self.row is not None:
                    math[self.row] *= self.factor
                elif self.column is not None:
                    math[:, self.column] *= self.factor
                else:
                    math[part] *= self.factor

    def __exit__(self, *_: object) -> None:
        with torch.no_grad():
            for site, kept in zip(self.sites, self.kept, strict=True):
                site.module.weight.copy_(kept)


def mean_f(lm: LM, facts: Sequence[Edit], how: Attribution) -> torch.Tensor:
    return answer_probabilities(lm, facts, how).mean()


def by_weight_gradients(lm: LM, facts, sites, how) -> list[torch.Tensor]:
    """Per site, w̄ * integral of dF/dw(alpha w̄), written out: one backward pass with weight gradients per point."""
    totals = [torch.zeros(*site.weight.shape, dtype=torch.float64) for site in sites]
    groups = [[i] for i in range(len(sites))] if how.path == "layer" else [list(range(len(sites)))]
    points, weights = how.points()
    for fact in facts:
        (row,) = answer_rows(lm, [fact], how.answer)
        for group in groups:
            for alpha, weight in zip(points.tolist(), weights.tolist(), strict=True):
                with lm.frozen_eval(), scaled([sites[i] for i in group], alpha):
                    for i in group:
                        sites[i].module.weight.requires_grad_(True)
                    log_p = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
                    tokens = torch.tensor(row.target_ids)
                    each = log_p[row.n_prompt - 1 : len(row.ids) - 1].gather(1, tokens[:, None])[:, 0]
                    (each.cumsum(0) if how.probability == "joint" else each).exp().sum().backward()
                    for i in group:
                        g = sites[i].module.weight.grad
                        g = g.T if sites[i].transposed else g
                        totals[i] += weight * (g if sites[i].rows is None else g[sites[i].rows])
                        sites[i].module.weight.grad = None
    return [site.weight * total / len(facts) for site, total in zip(sites, totals, strict=True)]


@pytest.mark.parametrize("family", SMOOTH)
@pytest.mark.parametrize("kind", ["down_proj", "q_proj"])
def test_completeness(family, kind, tiny, edits):
    """T7 and T14: a layer's attributions sum to F(w) - F(0), those of all layers for the joint path."""
    lm = tiny(family)
    sites = sites_of(lm, kind)
    how = Attribution(path="layer", **GAUSS)
    for site, scores in zip(sites, attribute(lm, edits, sites, how), strict=True):
        with scaled([site], 0.0):
            without = mean_f(lm, edits, how)
        assert_close(scores.sum(), mean_f(lm, edits, how) - without, rtol=0, atol=1e-10)
    joint = Attribution(path="joint", **GAUSS)
    with scaled(sites, 0.0):
        without = mean_f(lm, edits, joint)
    total = sum(s.sum() for s in attribute(lm, edits, sites, joint))
    assert_close(total, mean_f(lm, edits, joint) - without, rtol=0, atol=1e-10)


class Bent(Beside):
    """Bends what a module puts out, and adds to it."""

    kind = "bent"

    def hooks(self) -> list[Hook]:
        return [Hook(self.settings["module"], lambda _, out: out + torch.tanh(5 * out.flip(-1)) + 0.5)]


@pytest.mark.parametrize("module", ["mlp", "mlp.c_proj", "mlp.dropout"])
def test_completeness_where_an_attachment_acts_on_the_mlp(module, tiny, edits):
    """The output of the down-projection does not enter the stream as it is."""
    lm = tiny("gpt2")
    site, how = lm.site(1, "down_proj"), Attribution(**GAUSS | dict(n_points=64))
    with lm.edited(Bent(base=lm.fingerprint(), settings={"module": f"transformer.h.1.{module}"})):
        (scores,) = attribute(lm, edits, [site], how)
        with scaled([site], 0.0):
            without = mean_f(lm, edits, how)
        assert_close(scores.sum(), mean_f(lm, edits, how) - without, rtol=0, atol=1e-8)
        (by_hand,) = by_weight_gradients(lm, edits, [site], how)
    assert_close(scores, by_hand.sum(1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["gemma4_text", "lfm2"])
def test_layers_that_share_keys_and_layers_that_have_a_state(family, tiny, edits):
    """A whole pass, and a replay of every token, in place of a replay from the first live one."""
    lm = tiny(family)
    sites = [lm.site(layer, "down_proj") for layer in (1, 2)]
    how = Attribution(n_points=2, quadrature="midpoint")
    for found, wanted in zip(attribute(lm, edits, sites, how), by_weight_gradients(lm, edits, sites, how), strict=True):
        assert_close(found, wanted.sum(1), rtol=1e-4, atol=1e-9)


def test_errors_of_the_quadratures(tiny, edits):
    """T7: the right rule's error falls as 1/m, the midpoint's as 1/m^2."""
    lm = tiny("gpt2")
    site = lm.site(3, "down_proj")
    exact = attribute(lm, edits, [site], Attribution(**GAUSS))[0].sum()

    def error(rule: str, m: int) -> float:
        how = Attribution(n_points=m, quadrature=rule)
        return abs(float(attribute(lm, edits, [site], how)[0].sum() - exact))

    assert 1.8 < error("right", 32) / error("right", 64) < 2.2
    assert 3.6 < error("midpoint", 32) / error("midpoint", 64) < 4.4


def test_one_point_is_gradient_times_weight(tiny, edits):
    """T8: m = 1 of the right rule, and `local` for every layer at once."""
    lm = tiny("gpt2")
    sites = sites_of(lm)
    local = attribute(lm, edits, sites, Attribution(path="local"))
    one = attribute(lm, edits, sites, Attribution(path="layer", n_points=1))
    for site, a, b in zip(sites, local, one, strict=True):
        assert_close(a, b, rtol=1e-9, atol=1e-15)
        (full,) = by_weight_gradients(lm, edits, [site], Attribution(path="layer", n_points=1))
        assert_close(a, full.sum(1), rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("path", ["layer", "joint"])
@pytest.mark.parametrize("family", everyday("gpt2", "gptj", "phi3", of=FAMILIES))
def test_activations_give_what_weight_gradients_give(family, path, tiny, edits):
    """T9 (I3, I4), on every architecture, fused and parallel projections and the replay included; entries too."""
    lm = tiny(family)
    places = [(1, "up_proj"), (1, "down_proj"), (2, "v_proj"), (3, "down_proj")]
    sites = [lm.site(layer, kind) for layer, kind in places if lm.has(layer, kind)]
    how = Attribution(path=path, n_points=3)
    wanted = by_weight_gradients(lm, edits[:2], sites, how)
    close = dict(rtol=1e-7, atol=1e-12) if family in SMOOTH else dict(rtol=2e-3, atol=2e-7)
    for unit, of in (("row", lambda e: e.sum(1)), ("column", lambda e: e.sum(0)), ("entry", lambda e: e.reshape(-1))):
        for found, entries in zip(attribute(lm, edits[:2], sites, how, unit), wanted, strict=True):
            assert_close(found, of(entries), **close)


def test_rows_and_columns_of_a_layer_sum_to_the_same(tiny, edits):
    """T15."""
    lm = tiny("gpt2")
    sites = sites_of(lm, "up_proj", "down_proj")
    how = Attribution(n_points=4)
    for rows, columns in zip(*(attribute(lm, edits, sites, how, unit) for unit in ("row", "column")), strict=True):
        assert_close(rows.sum(), columns.sum(), rtol=1e-9, atol=1e-15)


def test_a_group_of_one_row_is_its_ablation(tiny, edit):
    """T10 (I5): scaling one row alone, the integral is F with it less F without; so is that of one column."""
    lm = tiny("gpt2")
    site = lm.site(2, "down_proj")
    points, weights = Attribution(**GAUSS).points()
    for place in (dict(row=5), dict(column=7)):
        total = 0.0
        for alpha, weight in zip(points.tolist(), weights.tolist(), strict=True):
            with scaled([site], alpha, **place):
                (entries,) = by_weight_gradients(lm, [edit], [site], Attribution(path="local"))
                moved = entries[5] if "row" in place else entries[:, 7]  # (alpha w) dF/dw there
                total += weight * float(moved.sum()) / alpha
        with scaled([site], 0.0, **place):
            without = mean_f(lm, [edit], Attribution())
        assert abs(total - float(mean_f(lm, [edit], Attribution()) - without)) < 1e-10


def test_duplicates_of_a_fact_score_as_the_fact(tiny, edit):
    """T18; and the mean over facts is the mean of theirs."""
    lm = tiny("gptj")
    sites, how = sites_of(lm), Attribution(n_points=4)
    other = Edit("{} lived in", "Leonardo da Vinci", "São Paulo", id="leonardo")
    a, b = attribute(lm, [edit], sites, how), attribute(lm, [other], sites, how)
    for one, twice in zip(a, attribute(lm, [edit] * 3, sites, how), strict=True):
        assert_close(one, twice, rtol=1e-6, atol=1e-12)
    for x, y, mean in zip(a, b, attribute(lm, [edit, other], sites, how), strict=True):
        assert_close((x + y) / 2, mean, rtol=1e-6, atol=1e-12)


def test_joint_and_conditional_probability_agree_on_one_token(tiny):
    """T19; on more tokens they differ."""
    lm = tiny("gpt2")
    sites = sites_of(lm)
    single, longer = Edit("The capital of {} is", "France", "a"), Edit("The capital of {} is", "France", "Rome")
    assert [len(r.target_ids) for r in answer_rows(lm, [single, longer])] == [1, 2]
    for edit, same in ((single, True), (longer, False)):
        a, b = (attribute(lm, [edit], sites, Attribution(n_points=3, probability=p)) for p in ("conditional", "joint"))
        assert all(torch.allclose(x, y) for x, y in zip(a, b, strict=True)) == same
    (wanted,) = by_weight_gradients(lm, [longer], sites[1:2], Attribution(n_points=3, probability="joint"))
    (found,) = attribute(lm, [longer], sites[1:2], Attribution(n_points=3, probability="joint"))
    assert_close(found, wanted.sum(1), rtol=1e-8, atol=1e-15)


def test_the_true_answer_can_be_attributed(tiny, edits):
    lm = tiny("llama")
    how = Attribution(path="local", answer="target_true")
    a = attribute(lm, edits[:1], sites_of(lm), how)
    swapped = Edit("The capital of {} is", "France", "Paris", id="swapped")
    b = attribute(lm, [swapped], sites_of(lm), Attribution(path="local"))
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    with pytest.raises(InvalidEdit, match="no target_true"):
        attribute(lm, edits, sites_of(lm), how)


def test_the_model_is_left_alone_and_no_weight_gets_a_gradient(tiny, edits, untouched):
    lm = tiny("gpt_neox")
    lm.model.train()
    before = untouched(lm)
    for unit in ("row", "column", "entry"):
        attribute(lm, edits, sites_of(lm, "q_proj", "down_proj"), Attribution(n_points=2), unit)
    assert untouched(lm) == before


def test_half_precision_models_are_attributed_in_float32(tiny, edits):
    how = Attribution(n_points=4)
    models = [tiny("llama", dtype) for dtype in (torch.float32, torch.bfloat16)]
    exact, rough = (torch.cat(attribute(lm, edits, sites_of(lm), how)) for lm in models)
    assert rough.dtype == torch.float32
    assert float(torch.corrcoef(torch.stack([exact, rough]))[0, 1]) > 0.9


@pytest.mark.parametrize(
    "bad", [dict(path="all"), dict(quadrature="left"), dict(n_points=0), dict(probability="p"), dict(answer="old")]
)
def test_settings_are_checked(bad):
    with pytest.raises(InvalidSetting, match=next(iter(bad))):
        Attribution(**bad)


# --- selection ---------------------------------------------------------------------------------------------------


def brute(scores: list[torch.Tensor], count: int) -> list[list[int]]:
    """Everything sorted by score descending, then tensor, then index."""
    flat = sorted((-float(v), t, i) for t, s in enumerate(scores) for i, v in enumerate(s))[:count]
    return [sorted(i for _, t, i in flat if t == tensor) for tensor in range(len(scores))]


@pytest.mark.parametrize("count", [1, 2, 7, 50, 121, 150])
def test_selection_is_exact_and_ties_go_to_the_first(count):
    """T12, with many ties, both zeros, huge and tiny values."""
    generator = torch.Generator().manual_seed(0)
    scores = [
        torch.randn(60, generator=generator),
        (3 * torch.randn(50, generator=generator)).round(),
        torch.tensor([0.0, -0.0] * 10),
        torch.cat([torch.logspace(-40, 38, 10), -torch.logspace(-40, 38, 10)]),
    ]
    chosen = select(scores, count)
    assert [c.tolist() for c in chosen] == brute(scores, count)
    assert sum(map(len, chosen)) == count
    inside = torch.cat([s[c] for s, c in zip(scores, chosen, strict=True)])
    mask = [torch.ones(len(s), dtype=torch.bool).index_fill(0, c, False) for s, c in zip(scores, chosen, strict=True)]
    outside = torch.cat([s[m] for s, m in zip(scores, mask, strict=True)])
    assert not len(outside) or inside.min() >= outside.max()


def test_selection_does_not_depend_on_scale(randn):
    """T13."""
    scores = [randn(40).float(), randn(30).float()]
    a, b = select(scores, 13), select([s * 2.0**9 for s in scores], 13)
    assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.long
def test_selection_takes_more_values_than_torch_quantile(randn):
    scores = [torch.rand(2**23 + 1, generator=torch.Generator().manual_seed(i)) for i in range(2)]
    with pytest.raises(RuntimeError, match="too large"):
        torch.quantile(torch.cat(scores), 0.99)
    chosen = select(scores, 1000)
    assert sum(map(len, chosen)) == 1000
    least = min(float(s[c].min()) for s, c in zip(scores, chosen, strict=True))
    assert 1000 <= sum(int((s >= least).sum()) for s in scores) < 1010  # a rand has some ties


def test_something_is_attributed(tiny, edits):
    lm, how = tiny("gpt2"), Attribution(n_points=1)
    with pytest.raises(InvalidSetting, match="no facts were given"):
        attribute(lm, [], sites_of(lm), how)
    with pytest.raises(InvalidSetting, match="no sites were given"):
        attribute(lm, edits, [], how)
    with pytest.raises(InvalidSetting, match="no facts were given"):
        answer_probabilities(lm, [], how)
    assert torch.equal(answer_probabilities(lm, iter(edits), how), answer_probabilities(lm, edits, how))
    given, once = attribute(lm, edits, sites_of(lm), how), attribute(lm, iter(edits), sites_of(lm), how)
    assert all(map(torch.equal, once, given))
    with pytest.raises(InvalidSetting, match="no rows were given"):
        attribute_neurons(lm, [])


def test_selection_refuses_what_it_cannot_rank():
    with pytest.raises(NonFinite, match="NaN"):
        select([torch.tensor([1.0, float("nan")])], 1)
    for count in (0, 3):
        with pytest.raises(InvalidSetting, match=f"{count} units asked for; there are 2"):
            select([torch.zeros(2)], count)
