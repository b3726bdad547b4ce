"""MEMIT, MEMIT-seq, PMET, EMMET, AlphaEdit, ROME and R-ROME against plain transcriptions (float64)."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.memory.moments import GivenMoments
from retcon.methods.common.choosing import method
from tests.conftest import random_moments
from tests.parity.plain import Place, edit_group, forward, optimise
from tests.parity.test_jeep import CONTEXTS, plain_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*larger than the weight")
SEARCH: dict[str, Any] = dict(clamp=2.0, weight_decay=0.02, steps=6, learning_rate=0.2, kl_factor=0.0625)
LAYERS = (0, 1, 2)
FAMILIES = [pytest.param("gptj", "gpt", marks=pytest.mark.long), ("llama", "bos")]


def searched(lm: LM, rows: Any, places: list[Place], settings: dict[str, Any], **more: Any) -> list[Tensor]:
    """z per place, all edits."""
    search = dict(steps=settings["steps"], lr=settings["learning_rate"], kl_factor=settings["kl_factor"])
    model = copy.deepcopy(lm.model)
    found = [optimise(model, r, kl, places, **search, **({"stop": "loss", "threshold": 0.05} | more)) for r, kl in rows]
    return [torch.stack([init[s] + delta[s] for init, delta, _ in found]) for s in range(len(places))]


def by_layer(lm: LM) -> dict[int, Tensor]:
    moments = random_moments(lm).by_name
    return {layer: moments[lm.site(layer, "down_proj").name] for layer in range(lm.n_layers)}


def held_to(lm: LM, family: str, delta: Any, wanted: dict[int, Tensor]) -> None:
    # GPT-J's attention computes in float32 whatever the weights are, so batched and single rows part at 1e-7
    tolerance = dict(rtol=5e-4, atol=5e-5) if family == "gptj" else dict(rtol=1e-6, atol=1e-8)
    assert set(delta.changes) == {lm.site(layer, "down_proj").name for layer in wanted}
    for layer, update in wanted.items():
        assert float(update.norm()) > 1e-3
        assert_close(delta.dense(lm.site(layer, "down_proj").name, update.shape), update, **tolerance)


def memit(k: Tensor, r: Tensor, c: Tensor) -> Tensor:
    return r @ k.T @ torch.linalg.inv(2.0 * c + k @ k.T)


def emmet(k: Tensor, r: Tensor, c: Tensor) -> Tensor:
    inverse = torch.linalg.inv(3.0 * c + 0.5 * torch.eye(len(c), dtype=c.dtype))
    return r @ torch.linalg.inv(k.T @ inverse @ k + 0.1 * torch.eye(k.shape[1], dtype=c.dtype)) @ k.T @ inverse


def alphaedit(k: Tensor, r: Tensor, c: Tensor) -> Tensor:
    s, u = torch.linalg.eigh(c)
    null = u[:, s < s.median()]
    p = null @ null.T
    return torch.linalg.solve(p @ k @ k.T + 0.5 * torch.eye(len(c), dtype=c.dtype), p @ k @ r.T).T


METHODS: dict[str, tuple[dict[str, Any], Any]] = {
    "memit": (dict(layers=LAYERS, moment_weight=2.0), memit),
    "emmet": (dict(layers=LAYERS, moment_weight=3.0, identity_weight=0.5, stabiliser=0.1), emmet),
    "alphaedit": (dict(layers=LAYERS, ridge=0.5, threshold_mode="rank"), alphaedit),
}


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize(("family", "tok"), FAMILIES)
def test_batch_methods_with_values_at_the_block(
    name: str, family: str, tok: str, tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    lm, edits = tiny(family, tok=tok), edits[:2]
    settings, solve = METHODS[name]
    m = lm.site(0, "down_proj").weight.shape[1]
    if name == "alphaedit":
        settings = settings | dict(null_threshold=((m - 1) // 2) / m)  # as many as lie below the median
    rows = [plain_rows(lm, e) for e in edits]
    z = searched(lm, rows, [Place(LAYERS[-1], "block", "subject_last", 2.0, 0.02)], SEARCH)[0]
    wanted = edit_group(
        copy.deepcopy(lm.model), [r for r, _ in rows], LAYERS, z, "subject_last", "block", float, 0.0, by_layer(lm),
        solve=solve,
    )  # fmt: skip
    delta = method(name, **settings, **SEARCH).propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm))
    held_to(lm, family, delta, wanted)


@pytest.mark.parametrize(("family", "tok"), FAMILIES)
def test_pmet(family: str, tok: str, tiny: Callable[..., LM], edits: list[Edit]) -> None:
    lm, edits = tiny(family, tok=tok), edits[:2]
    rows = [plain_rows(lm, e) for e in edits]
    places = [Place(2, "mlp", "subject_last", 2.0, 0.02), Place(2, "attn", "subject_last", 2.0, 0.03)]
    settings = SEARCH | dict(kl_factor=0.3, steps=8)
    z = searched(lm, rows, places, settings, settled_factor=0.1, settled_kl=0.01)[0]
    wanted = edit_group(
        copy.deepcopy(lm.model), [r for r, _ in rows], LAYERS, z, "subject_last", "mlp", math.sqrt, 2.0, by_layer(lm)
    )
    pmet = method("pmet", layers=LAYERS, moment_weight=2.0, attn_weight_decay=0.03, **settings)
    held_to(lm, family, pmet.propose(lm, edits, contexts=CONTEXTS, moments=random_moments(lm)), wanted)


def test_memit_in_sequence_with_its_key_cache(tiny: Callable[..., LM], edits: list[Edit]) -> None:
    """The second batch's A holds the first one's keys, read again on the edited weights."""
    lm = tiny("llama", tok="bos")
    moments, model = by_layer(lm), copy.deepcopy(lm.model)
    seq = method("memit", layers=LAYERS, moment_weight=2.0, cache_keys=True, **SEARCH)
    given = dict(contexts=CONTEXTS, moments=random_moments(lm))
    first = seq.propose(lm, edits[:2], **given)
    lm.apply(first)
    second = seq.propose(lm, edits[2:], **given, state=first.state)

    cache = {layer: torch.zeros_like(c) for layer, c in moments.items()}
    for batch in (edits[:2], edits[2:]):
        rows = [plain_rows(lm, e) for e in batch]
        here = copy.copy(lm)
        here.model = model
        z = searched(here, rows, [Place(2, "block", "subject_last", 2.0, 0.02)], SEARCH)[0]
        layer_of = iter(LAYERS)

        def solve(k: Tensor, r: Tensor, c: Tensor, layer_of: Any = layer_of) -> Tensor:
            return r @ k.T @ torch.linalg.inv(2.0 * c + cache[next(layer_of)] + k @ k.T)

        group = ([r for r, _ in rows], LAYERS, z, "subject_last", "block", float, 0.0, moments)
        wanted = edit_group(model, *group, solve=solve)
        for layer in LAYERS:
            for edit_rows, _ in rows:
                keys = [forward(model, r.prompt, reads=[(layer, "key")])[1][layer, "key"][r.subject] for r in edit_rows]
                k = 0.5 * keys[0] + 0.5 * torch.stack(keys[1:]).mean(0)
                cache[layer] += torch.outer(k, k)
    held_to(lm, "llama", second, wanted)


@pytest.mark.parametrize("name", ["rome", "r_rome"])
@pytest.mark.parametrize(("family", "tok"), FAMILIES)
def test_one_fact(name: str, family: str, tok: str, tiny: Callable[..., LM], edit: Edit) -> None:
    lm = tiny(family, tok=tok)
    rows, kl = plain_rows(lm, edit)
    v_star = searched(lm, [(rows, kl)], [Place(1, "mlp", "subject_last", 2.0, 0.02)], SEARCH)[0][0]
    read = [forward(lm.model, r.prompt, reads=[(1, "key"), (1, "mlp")])[1] for r in rows]
    k = torch.stack([seen[1, "key"][r.subject] for seen, r in zip(read, rows, strict=True)])
    y = torch.stack([seen[1, "mlp"][r.subject] for seen, r in zip(read, rows, strict=True)])
    u = torch.linalg.inv(by_layer(lm)[1]) @ k.mean(0)
    if name == "rome":  # direction from the mean key, denominator and residual from the bare prompt
        update = torch.outer((v_star - y[0]) / (k[0] @ u), u)
    else:
        update = torch.outer((v_star - y.mean(0)) / (k.mean(0) @ u), u)
    moments = GivenMoments(random_moments(lm).by_name)
    own = dict(min_denominator=0.0) if name == "rome" else {}
    delta = method(name, layer=1, **SEARCH, **own).propose(lm, [edit], contexts=CONTEXTS, moments=moments)
    held_to(lm, family, delta, {1: update})
