"""Masked tuning inside routed experts: parts, gradients and attributions against autograd on the weights themselves."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from benchmarks.released_ctp import ReleasedCtp
from torch import Tensor
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.lm.site import Site
from retcon.locate.attribution import Attribution, answer_probabilities, attribute
from retcon.locate.paths import assess, node_scores, paths, slots_of
from retcon.methods.adalora import AdaLora
from retcon.methods.ctp import Ctp
from retcon.methods.ft import Ft
from retcon.methods.kne import Kne
from retcon.methods.lora import Lora
from retcon.training.objective import AnswerLoss, answer_rows
from retcon.training.parts import (
    Part,
    TrainedColumns,
    TrainedDense,
    TrainedEntries,
    TrainedLowRank,
    TrainedRows,
    attached,
    changes,
)

FAMILIES = ("mixtral", "gpt_oss")
"""Stored (out, in), gate and up one after the other; stored (in, out), interleaved, with biases."""


def loss(lm: LM, edits: Sequence[Edit]) -> Tensor:
    rows = answer_rows(lm, edits)
    return AnswerLoss(lm, rows)(range(len(rows))).mean()


def weight_gradients(lm: LM, edits: Sequence[Edit], sites: Sequence[Site]) -> list[Tensor]:
    """Of each site, by autograd on the parameter that holds it."""
    with lm.frozen_eval(), torch.enable_grad():
        parameters = {site.name: lm.parameter(site.name) for site in sites}
        for parameter in parameters.values():
            parameter.requires_grad_(True)
        found = dict(zip(parameters, torch.autograd.grad(loss(lm, edits), list(parameters.values())), strict=True))
    gradients = []
    for site in sites:
        g = found[site.name][site.expert]
        g = g.T if site.transposed else g
        gradients.append(g if site.rows is None else g[site.rows])
    return gradients


def busiest(lm: LM, edits: Sequence[Edit], kind: Any = "down_proj", layer: int = 1) -> Site:
    """An expert that the edits reach."""
    sites = lm.expert_sites(layer, kind)
    return max(zip(sites, weight_gradients(lm, edits, sites), strict=True), key=lambda pair: float(pair[1].norm()))[0]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["down_proj", "up_proj", "gate_proj"])
def test_a_part_in_an_expert_is_the_change_of_its_matrix(
    family: str, kind: str, tiny: Callable[..., LM], edits: list[Edit], randn: Callable[..., Tensor]
) -> None:
    """What it adds while it is attached is what its change does in the weights; its gradient is the matrix's."""
    lm = tiny(family)
    site = busiest(lm, edits, kind)
    (g,) = weight_gradients(lm, edits, [site])
    out, into = site.weight.shape
    some, other = torch.tensor([1, 4, 7]), torch.tensor([0, 5])
    made: dict[str, tuple[Callable[[Tensor], Part], Tensor]] = {
        "rows": (lambda v: TrainedRows(site, some, v), g[some]),
        "columns": (lambda v: TrainedColumns(site, other, v), g[:, other].T),
        "entries": (lambda v: TrainedEntries(site, torch.tensor([3, into + 2, 5 * into]), v),
                    torch.stack([g[0, 3], g[1, 2], g[5, 0]])),
        "dense": (lambda v: TrainedDense(site, v), g),
    }  # fmt: skip
    low_rank = TrainedLowRank(site, 0.1 * randn(out, 2), 0.1 * randn(2, into))
    parts: list[Part] = [low_rank]
    for make, wanted in made.values():
        values = torch.zeros_like(wanted, requires_grad=True)
        part = make(values)
        with lm.frozen_eval(), attached([part]):
            loss(lm, edits).backward()
        assert_close(values.grad, wanted, rtol=1e-6, atol=1e-10)
        parts.append(make(0.1 * randn(*wanted.shape)))
    with lm.frozen_eval(), torch.no_grad():
        before = loss(lm, edits)
        with attached(parts):
            beside = loss(lm, edits)
        delta = lm.delta(changes(parts))
        with lm.edited(delta):
            written = loss(lm, edits)
        assert torch.equal(loss(lm, edits), before)
    assert_close(beside, written, rtol=1e-7, atol=1e-9)
    assert not torch.isclose(before, written, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_changes_of_several_matrices_meet_in_one_expert(
    family: str, tiny: Callable[..., LM], edits: list[Edit], randn: Callable[..., Tensor]
) -> None:
    lm = tiny(family)
    layer, expert = 1, busiest(lm, edits).expert
    assert expert is not None
    parts: list[Part] = []
    for kind in ("down_proj", "up_proj", "gate_proj"):
        for e in (expert, (expert + 1) % 4):
            site = lm.expert_sites(layer, kind)[e]  # type: ignore[arg-type]
            parts.append(TrainedDense(site, 0.1 * randn(*site.weight.shape)))
    with lm.frozen_eval(), torch.no_grad(), attached(parts):
        beside = loss(lm, edits)
    with lm.edited(lm.delta(changes(parts))), lm.frozen_eval(), torch.no_grad():
        assert_close(beside, loss(lm, edits), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["down_proj", "up_proj"])
def test_attributions_of_experts_are_the_integral_over_their_weights(
    family: str, kind: Any, tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    """All experts of a block are scaled together; rows, columns and entries of each."""
    lm = tiny(family)
    sites = lm.expert_sites(2, kind)
    how = Attribution(n_points=2, quadrature="midpoint")
    points, weights = how.points()
    total = [torch.zeros(*site.weight.shape, dtype=torch.float64) for site in sites]
    parameter = lm.parameter(sites[0].name)
    kept = parameter.detach().clone()
    for alpha, weight in zip(points.tolist(), weights.tolist(), strict=True):
        with torch.no_grad():  # only these matrices of a fused parameter
            for site in sites:
                matrix = parameter[site.expert].T if site.transposed else parameter[site.expert]
                matrix[slice(None) if site.rows is None else site.rows] *= alpha
        for row in answer_rows(lm, edits):
            with lm.frozen_eval(), torch.enable_grad():
                parameter.requires_grad_(True)
                log_p = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
                tokens = torch.tensor(row.target_ids)
                f = log_p[row.n_prompt - 1 : len(row.ids) - 1].gather(1, tokens[:, None]).exp().sum()
                (g,) = torch.autograd.grad(f, parameter)
            for i, site in enumerate(sites):
                mine = g[site.expert].T if site.transposed else g[site.expert]
                total[i] += weight / len(edits) * (mine if site.rows is None else mine[site.rows])
        with torch.no_grad():
            parameter.copy_(kept)
    wanted = [site.weight * t for site, t in zip(sites, total, strict=True)]
    for unit, of in (("row", lambda t: t.sum(1)), ("column", lambda t: t.sum(0)), ("entry", lambda t: t.reshape(-1))):
        for found, full in zip(attribute(lm, edits, sites, how, unit), wanted, strict=True):  # type: ignore[arg-type]
            assert_close(found, of(full), rtol=1e-5, atol=1e-9)  # type: ignore[operator]


def test_attributions_of_a_layer_sum_to_what_its_experts_carry(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    """Completeness (Sundararajan et al. 2017): F(w) - F(0)."""
    lm = tiny("mixtral")
    sites = lm.expert_sites(3)
    how = Attribution(n_points=16, quadrature="gauss")
    total = sum(float(scores.sum()) for scores in attribute(lm, edits, sites, how))
    whole = answer_probabilities(lm, edits, how).mean()
    parameter = lm.parameter(sites[0].name)
    kept = parameter.detach().clone()
    with torch.no_grad():
        parameter.zero_()
        without = answer_probabilities(lm, edits, how).mean()
        parameter.copy_(kept)
    assert_close(total, float(whole - without), rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize(("family", "key_matrix"), [("mixtral", "both"), ("gpt_oss", "up"), ("llama", "both")])
def test_nodes_of_all_experts_are_scored_together(
    family: str, key_matrix: Any, tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    """Scores from activations are those of the weights' own gradients, in the order of the matrices."""
    lm = tiny(family)
    slots = slots_of(lm, key_matrix)
    for score in ("z_abs", "signed_sum"):
        for slot, found in zip(slots, assess(lm, edits, slots, score), strict=True):  # type: ignore[arg-type]
            if slot.site.expert is None:
                with lm.frozen_eval(), torch.enable_grad():
                    parameter = lm.parameter(slot.site.name).requires_grad_(True)
                    gradients = list(torch.autograd.grad(loss(lm, edits), parameter))
            else:
                gradients = weight_gradients(lm, edits, slot.sites)
            whole = torch.cat([slot.by_node(g) for g in gradients], 1)
            assert_close(found, node_scores(whole, score), rtol=2e-3, atol=2e-5)  # type: ignore[arg-type]


def changed_places(lm: LM, delta: Any) -> dict[str, Tensor]:
    """Where a delta changes which parameter; taken off again, every byte is back."""
    before = {name: parameter.detach().clone() for name, parameter in lm.model.named_parameters()}
    lm.apply(delta)
    moved = {name: lm.parameter(name).detach() != old for name, old in before.items()}
    lm.revert(delta)
    assert all(torch.equal(lm.parameter(name), old) for name, old in before.items())
    return {name: where for name, where in moved.items() if bool(where.any())}


@pytest.mark.parametrize("granularity", ["row", "column"])
def test_kne_changes_its_ensemble_of_experts_rows_and_nothing_else(
    granularity: Any, tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    lm = tiny("mixtral", torch.float32)
    kne = Kne(granularity=granularity, budget=None, p=0.03, n_points=2, epochs=2, learning_rate=1e-2)
    delta = kne.propose(lm, edits)
    assert delta.state is not None
    wanted: dict[str, Tensor] = {}
    for site in kne.sites(lm):
        inside = wanted.setdefault(site.name, torch.zeros_like(lm.parameter(site.name), dtype=torch.bool))
        assert site.expert is not None
        units = delta.state.get(f"{site.layer}.down_proj.{site.expert}", torch.empty(0, dtype=torch.long))
        if granularity == "row":
            inside[site.expert][units] = True
        else:
            inside[site.expert][:, units] = True
    moved = changed_places(lm, delta)
    assert sum(int(m.sum()) for m in moved.values()) > 0
    assert not any(bool((where & ~wanted[name]).any()) for name, where in moved.items())
    ensemble = {name: units for name, units in delta.state.items() if name not in ("base", "granularity")}
    assert sum(map(len, ensemble.values())) == round(0.03 * 4 * 4 * (32 if granularity == "row" else 64))
    again = Kne(**{**vars(kne), "reuse": True}).propose(lm, edits, state=delta.state)
    assert {name: units.tolist() for name, units in again.state.items()} == {  # type: ignore[union-attr]
        name: units.tolist() for name, units in delta.state.items()
    }


def test_ctp_changes_the_nodes_of_its_paths_through_experts(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("mixtral", torch.float32)
    delta = Ctp(n_positive=3, epochs=2, learning_rate=1e-2, stop_loss=0.0, reassess=1).propose(lm, edits)
    assert changed_places(lm, delta)
    once = Ctp(n_positive=3, epochs=1, learning_rate=1e-2, stop_loss=0.0).propose(lm, edits)
    moved = changed_places(lm, once)
    found = paths(lm, edits, n_positive=3)
    for t, slot in enumerate(found.slots):
        width = lm.expert_sites(0)[0].weight.shape[1]
        nodes = {divmod(n, width) for n in [*found.positive.in_slot(t), *found.negative.in_slot(t)]}
        for site in slot.sites:
            where = moved[site.name][site.expert]
            own = where if site.rows is None else where[site.rows]
            touched = own.any(0 if slot.is_value else 1).nonzero()[:, 0].tolist()
            assert {(site.expert, node) for node in touched} == {n for n in nodes if n[0] == site.expert}


def test_shared_and_routed_experts_are_a_choice(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("dots1")
    assert {site.expert for site in Kne().sites(lm)} == {None}
    assert {site.expert for site in Kne(mlp="experts").sites(lm)} == {None, 0, 1, 2, 3}  # the first block is dense
    with pytest.raises(InvalidSetting, match="has no q_proj in these layers"):
        Kne(modules=("q_proj",), layers=(0,)).sites(tiny("qwen3_5_text"))


def test_fine_tuning_and_adapters_in_experts(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm = tiny("mixtral", torch.float32)
    for method in (
        Ft(layers=(2,), modules=("down_proj",), epochs=2, learning_rate=1e-3),
        Lora(layers=(2,), modules=("down_proj", "up_proj"), rank=2, epochs=2, learning_rate=1e-3),
    ):
        delta = method.propose(lm, edits)
        assert all(".2.mlp.experts." in name for name in changed_places(lm, delta))
    with pytest.raises(InvalidSetting, match="not trained whole; name matrices"):
        Ft(layers=(2,), modules=("block",)).propose(lm, edits)


def reached(lm: LM, edits: Sequence[Edit], layer: int, kind: Any) -> list[bool]:
    """Whether a token of the edits is routed to each expert."""
    return [bool(g.any()) for g in weight_gradients(lm, edits, lm.expert_sites(layer, kind))]


def test_an_expert_that_no_token_reaches_stays_as_it_is(tiny: Callable[..., LM]) -> None:
    """One token reaches two experts of four in each block; which ones in the first block, no edit of an MLP changes."""
    lm = tiny("mixtral", torch.float32)
    edits = [Edit("{}", "a", "b", separator="", id="short")]
    assert [len(row.ids) for row in answer_rows(lm, edits)] == [2]  # the last token is not read
    hit = {kind: reached(lm, edits, 0, kind) for kind in ("down_proj", "up_proj")}
    assert [sum(found) for found in hit.values()] == [2, 2]

    def stray(delta: Any) -> bool:
        """Whether an expert of the first block has moved that was not reached."""
        moved = changed_places(lm, delta)
        names = {lm.expert_sites(0, kind)[0].name for kind in hit}  # type: ignore[arg-type]
        return any(bool(moved[n][e].any()) for n in names & set(moved) for e in range(4) if not hit["up_proj"][e])

    for allocate, orthogonality in ((True, 0.5), (True, 0.0), (False, 0.5)):
        settings: Any = dict(allocate=allocate, orthogonality=orthogonality, modules=("down_proj",))
        delta = AdaLora(rank=2, target_rank=1, epochs=3, **settings).propose(lm, edits)
        assert delta.changes
        assert not stray(delta)
    for expert in range(4):
        state = {f"0.down_proj.{expert}": torch.tensor([0, 3])}
        delta = Kne(reuse=True, epochs=2, learning_rate=1e-2).propose(lm, edits, state=state)
        assert bool(delta.changes) == hit["down_proj"][expert]
        assert delta.report[0].stopped == "steps"
    for kind, seed in itertools.product((Ctp, ReleasedCtp), range(3)):
        ctp = kind(score="random", n_positive=1, epochs=2, learning_rate=1e-2)
        assert not stray(ctp.propose(lm, edits, seed=seed))
    mirror = Ctp(score="random", n_positive=1, epochs=2, learning_rate=1e-2, contrast="mirror")
    for seed in range(3):  # what T- is asked moves T+, reached or not
        assert mirror.propose(lm, edits, seed=seed).report[0].steps == 2


def test_an_expert_that_no_token_reaches_has_no_attribution(tiny: Callable[..., LM]) -> None:
    lm = tiny("mixtral")
    edits = [Edit("{}", "a", "b", separator="", id="short")]
    for kind in ("down_proj", "up_proj"):
        for site, hit in zip(lm.expert_sites(1, kind), reached(lm, edits, 1, kind), strict=True):  # type: ignore[arg-type]
            (scores,) = attribute(lm, edits, [site], Attribution(n_points=2))
            assert bool(scores.any()) == hit
