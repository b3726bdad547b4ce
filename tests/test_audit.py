"""An audit finds what was changed and by what, and takes it as a delta."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retcon.audit import Answer, audit
from retcon.delta import Delta, Dense, LowRank, Region, Rows
from retcon.edits import Edit
from retcon.errors import DeltaMismatch, NonFinite, RetconWarning
from retcon.lm.model import LM
from tests.conftest import tiny_model, tokenizer


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", ["gptj", "gpt2", "llama"])
def test_finds_matrices_rank_and_norm_and_what_explains_them(
    family: str, dtype: torch.dtype, tiny: Callable[..., LM], edit: Edit
) -> None:
    base, edited = tiny(family, dtype), tiny(family, dtype)
    site = edited.site(1, "down_proj")
    g = torch.Generator().manual_seed(0)
    change = site.stored(torch.randn(32, 3, generator=g), torch.randn(3, site.weight.shape[1], generator=g))
    delta = edited.delta({site.name: [change]})
    edited.apply(delta)
    found = audit(base, edited, edits=iter([edit]), known=iter([delta]))
    (difference,) = found.differences
    assert (difference.parameter, difference.rank) == (site.name, 3)
    assert difference.norm == pytest.approx(delta.norms()[site.name], rel=1e-2)
    assert found.unexplained is not None
    assert found.unexplained < 0.01
    other = edited.delta({site.name: [Dense(full=torch.ones(edited.parameter(site.name).shape))]})
    assert audit(base, edited, known=[other]).unexplained > 0.5  # type: ignore[operator]
    assert found.exact or dtype == torch.float32
    said = [lm.complete(edit.text, max_new_tokens=12).strip() for lm in (base, edited)]
    assert [found.answers[0].base, found.answers[0].edited] == said


def test_rounding_in_rows_that_became_large_is_no_rank(tiny: Callable[..., LM]) -> None:
    base, edited = tiny("llama"), tiny("llama")
    weight = edited.parameter("model.layers.1.mlp.down_proj.weight")
    g = torch.Generator().manual_seed(0)
    left = torch.randn(weight.shape[0], 3, generator=g, dtype=torch.float64)
    left[::8] *= 100
    with torch.no_grad():
        weight.copy_(weight + left @ torch.randn(3, weight.shape[1], generator=g, dtype=torch.float64))
    assert audit(base, edited).differences[0].rank == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_difference_as_a_delta_gives_the_edited_model_and_is_undone(
    dtype: torch.dtype, tiny: Callable[..., LM], tmp_path: Path
) -> None:
    base, edited = tiny("llama", dtype), tiny("llama", dtype)
    with torch.no_grad():  # somebody else's edit, by hand: three kinds
        edited.parameter("model.layers.1.mlp.down_proj.weight")[:] += 0.5
        edited.parameter("model.layers.2.mlp.down_proj.weight")[4] += 0.25
        edited.parameter("model.layers.0.self_attn.o_proj.weight")[:] += torch.randn(
            32, 32, generator=torch.Generator().manual_seed(0)
        ).to(dtype)
        edited.parameter("model.norm.weight")[:] += 0.5
    before = {name: p.clone() for name, p in base.model.state_dict().items()}
    found = audit(base, edited)
    assert len(found.differences) == 4
    assert found.exact
    assert isinstance(found.delta.changes["model.layers.1.mlp.down_proj.weight"][0], LowRank | Dense)
    assert isinstance(found.delta.changes["model.layers.2.mlp.down_proj.weight"][0], LowRank | Rows)
    found.delta.save(tmp_path / "d.safetensors")
    delta = Delta.load(tmp_path / "d.safetensors")
    base.apply(delta)
    assert all(torch.equal(p, edited.model.state_dict()[name]) for name, p in base.model.state_dict().items())
    base.revert(delta)
    assert all(torch.equal(p, before[name]) for name, p in base.model.state_dict().items())


@pytest.mark.parametrize("elsewhere", [False, True])
def test_rounding_explains_nothing_where_no_known_delta_acts(elsewhere: bool, tiny: Callable[..., LM]) -> None:
    base, edited = tiny("llama", torch.bfloat16), tiny("llama", torch.bfloat16)
    sites = [base.site(layer, "down_proj") for layer in (1, 2 if elsewhere else 1)]
    with torch.no_grad():  # a change too small for the rounding of a whole matrix, and the rank of one row
        edited.parameter(sites[0].name)[3, :4] += 0.002
    row = Rows(index=torch.tensor([5]), rows=1e-9 * torch.ones(1, sites[1].weight.shape[1]))
    found = audit(base, edited, known=[base.delta({sites[1].name: [row]})])
    assert found.unexplained is not None
    assert found.unexplained > (0.999 if elsewhere else 0.5)
    assert found.differences[0].rank == 1


def test_the_same_model_has_no_difference(tiny: Callable[..., LM]) -> None:
    base, other = tiny("llama"), tiny("llama")
    base.apply(base.delta({"model.norm.weight": [Dense(full=torch.ones(32, dtype=torch.float64))]}))  # is left aside
    found = audit(base, other)
    assert found.differences == ()
    assert found.exact
    assert found.delta.changes == {}
    assert (found.left_out, found.settings) == ({}, {})


def test_each_expert_that_differs_is_a_matrix_of_its_own() -> None:
    base, edited = (LM(tiny_model("mixtral", torch.bfloat16), tokenizer()) for _ in range(2))
    sites = edited.expert_sites(1)
    g = torch.Generator().manual_seed(0)
    factors = [torch.randn(n, 2, generator=g) for n in sites[2].weight.shape]
    edited.apply(edited.delta({sites[2].name: [sites[2].stored(factors[0], factors[1].T)]}))
    found = audit(base, edited)
    assert [(d.parameter, d.rank) for d in found.differences] == [(sites[2].name, 2)]
    (change,) = found.delta.changes[sites[2].name]
    assert change.region == Region(0, 2, 3)
    assert found.exact
    base.apply(found.delta)
    assert torch.equal(base.parameter(sites[2].name), edited.parameter(sites[2].name))


def test_buffers_and_settings_that_differ_are_reported(tiny: Callable[..., LM]) -> None:
    base, edited = (LM(tiny_model("glm4_moe", torch.float32), tokenizer()) for _ in range(2))
    name = next(name for name, _ in edited.model.named_buffers() if name.endswith("e_score_correction_bias"))
    edited.model.get_buffer(name).add_(1)
    found = audit(base, edited)
    assert list(found.left_out) == [name]
    assert "buffer" in found.left_out[name]
    assert not found.exact
    base, edited = tiny("llama"), tiny("llama")
    edited.model.config.rms_norm_eps = 0.5
    edited.model.config.rope_parameters["rope_theta"] = 5e5
    edited.model.config.pad_token_id = 7  # enters no forward pass
    found = audit(base, edited)
    assert found.settings == {"rms_norm_eps": (1e-6, 0.5), "rope_parameters.rope_theta": (1e4, 5e5)}


def test_shared_embeddings_are_reported_and_left_out_of_the_delta(tiny: Callable[..., LM]) -> None:
    base, edited = tiny("gpt2"), tiny("gpt2")
    with torch.no_grad():
        edited.parameter("transformer.wte.weight")[5] += 1
        edited.parameter("transformer.ln_f.weight")[:] += 1
    found = audit(base, edited)
    assert [d.parameter for d in found.differences] == ["transformer.wte.weight", "transformer.ln_f.weight"]
    assert list(found.left_out) == ["transformer.wte.weight"]
    assert "shared with lm_head.weight" in found.left_out["transformer.wte.weight"]
    assert list(found.delta.changes) == ["transformer.ln_f.weight"]
    assert not found.exact


def test_models_of_other_shapes_are_refused(tiny: Callable[..., LM]) -> None:
    with pytest.raises(DeltaMismatch, match="other parameters"):
        audit(tiny("llama"), tiny("gptj"))
    with pytest.raises(DeltaMismatch, match="other parameters"):
        audit(tiny("llama"), tiny("llama", n_layers=5))


def test_a_known_delta_that_is_not_in_the_edited_model_is_seen(tiny: Callable[..., LM]) -> None:
    base, edited = tiny("llama"), tiny("llama")
    names = [base.site(layer, "down_proj").name for layer in (1, 2)]
    ours, theirs = (base.delta({name: [Dense(full=torch.ones(base.shape_of(name)))]}) for name in names)
    edited.apply(ours)
    found = audit(base, edited, known=[ours, theirs])
    assert found.absent == {names[1]: pytest.approx(theirs.norms()[names[1]], rel=1e-6)}
    assert found.unexplained == pytest.approx(1.0, rel=1e-3)
    edited.revert_all()
    assert audit(base, edited, known=[theirs]).unexplained == float("inf")


def test_a_known_delta_of_another_model_is_refused_or_warned_of(tiny: Callable[..., LM]) -> None:
    base, edited = tiny("llama"), tiny("llama")
    name = base.site(1, "down_proj").name
    for odd, message in (
        (Delta({name: (Dense(full=torch.ones(3, 4)),)}, base=base.fingerprint()), f"{name}: a dense change of shape"),
        (Delta({"x.weight": (Dense(full=torch.ones(3, 4)),)}, base=base.fingerprint()), "no parameter 'x.weight'"),
    ):
        with pytest.raises(DeltaMismatch, match=message):
            audit(base, edited, known=[odd])
    other = Delta({name: (Dense(full=torch.ones(base.shape_of(name))),)}, base="another")
    with pytest.warns(RetconWarning, match="was made for other weights than those of"):
        audit(base, edited, known=[other])


def test_a_parameter_with_nan_is_named(tiny: Callable[..., LM]) -> None:
    base, edited = tiny("llama"), tiny("llama")
    edited.name = "theirs"
    with torch.no_grad():
        edited.parameter("model.layers.1.mlp.down_proj.weight")[0, 0] = float("nan")
    for pair in ((base, edited), (edited, base)):
        with pytest.raises(NonFinite, match=r"model.layers.1.mlp.down_proj.weight of theirs holds NaN"):
            audit(*pair)


@pytest.mark.parametrize(
    ("said", "took"),
    [("Rome", True), ("Rome, the capital", True), ("rome.", True), ("Romeo and Juliet", False), ("Paris", False)],
)
def test_an_answer_is_taken_in_whole_words(said: str, took: bool, edit: Edit) -> None:
    assert Answer(replace(edit, target_new="Rome"), "Paris", said).took == took
