"""One battery: every method on architectures that differ in structure, one of each class on the others."""

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import pytest
import torch

import retcon
from retcon.chat import Chat
from retcon.edits import Case, Edit
from retcon.errors import InvalidEdit, InvalidSetting, UnsupportedModel
from retcon.lm.model import LM
from retcon.lm.prompts import encode_edit
from retcon.memory.contexts import Contexts
from retcon.memory.moments import GivenMoments
from retcon.methods.common.choosing import method
from retcon.methods.common.contract import Method, Trainable
from retcon.methods.common.registry import METHODS, method_class
from retcon.methods.common.sequence import in_steps
from tests.conftest import CORE, FAMILIES, everyday, random_moments, tiny_model, tokenizer
from tests.methods.common import same

CONTEXTS = Contexts(("The train stood still. ", "I read. "))

FREE: dict[str, Any] = dict(clamp=8.0, weight_decay=0.0, steps=6)
"""A value search that tiny random models answer to."""
SETTINGS: dict[str, dict[str, Any]] = {
    "ctp": dict(n_positive=6, learning_rate=2e-2, epochs=12),
    "kn": dict(n_points=4, n_prefixes=2),
    "kne": dict(budget=0.05, learning_rate=5e-2, n_points=4, epochs=12),
    "ft": dict(layers=(2,), learning_rate=5e-2, epochs=12),
    # their own objective, prompt_last, teaches no answer of several tokens
    "ft_l": dict(layers=(2,), learning_rate=5e-2, epochs=12, box=0.2, objective="target_new"),
    "ft_m": dict(layers=(2,), learning_rate=5e-2, epochs=12),
    "ft_wd": dict(layers=(2,), learning_rate=2e-2, epochs=12, objective="target_new"),
    "lora": dict(rank=4, learning_rate=5e-2, epochs=15, modules=("q_proj", "down_proj")),
    "adalora": dict(rank=4, target_rank=3, learning_rate=1e-1, epochs=25, modules=("q_proj", "down_proj")),
    "full_c": dict(learning_rate=1e-2, epochs=12, box=0.1),
    "alphaedit": dict(layers=(0, 1), null_threshold=0.7, threshold_mode="rank", ridge=0.1, **FREE),
    "emmet": dict(layers=(1,), **FREE),
    "jeep": dict(
        low=(0, 1),
        high=(2, 3),
        low_clamp=8.0,
        high_clamp=8.0,
        low_moment_weight=1.0,
        high_moment_weight=1.0,
        low_weight_decay=0.0,
        high_weight_decay=0.0,
        steps=6,
    ),
    "memit": dict(layers=(0, 1), moment_weight=1.0, **FREE),
    "pmet": dict(layers=(0, 1), moment_weight=1.0, attn_weight_decay=0.0, kl_factor=0.1, **FREE),
    "prune": dict(base_method="memit", base_settings=dict(layers=(0, 1), moment_weight=1.0, **FREE)),
    "r_rome": dict(layer=1, **FREE),
    "rect": dict(base_method="memit", base_settings=dict(layers=(0, 1), moment_weight=1.0, **FREE), keep_percent=60.0),
    "rome": dict(layer=1, **FREE),
}
"""Settings that make sense for four random layers of width 32."""
TRAINED: dict[str, dict[str, Any]] = {
    "malmen": dict(layers=(2, 3), normalise=False, step_size=1e-3),
    "mend": dict(layers=(2, 3), normalise=False, step_size=1e-2),
}
"""Methods with an editor, and what it is like: an untrained one takes a gradient step, enough for the contract."""

ENDING = [
    Edit("You know {}", "France", "Rome", "Paris", id="france"),
    Edit("He spoke of {}", "Danielle Darrieux", "Italian", "French", id="darrieux"),
    Edit("I read {}", "Leonardo da Vinci", "São Paulo", "Florence", id="leonardo"),
    Edit("You know that {}", "Łódź", "a town in Greece", None, id="lodz"),
]
"""Subjects that end their prompts: a random model carries nothing from an earlier token to the answer."""

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*larger than the weight"),  # as free a search in so small a model may well be
    pytest.mark.filterwarnings("ignore:.*a (norm|factor) stands between"),
]

SEEDLESS = {"ctp", "kne", "ft", "ft_l", "ft_m", "ft_wd", "full_c", "malmen", "mend"}
"""Methods that draw nothing for a single edit, so that every seed gives the same delta."""

ONE_OF_EACH_CLASS = ("jeep", "kne", "rect", "rome")
"""Two groups of layers, masked tuning, a wrapper, one fact: what the families outside `CORE` are tried with, and those
outside `EVERYDAY` in `make test`."""
EVERYDAY = ("gpt2",)
"""Every method is tried with it in `make test`, on stored (in, out) weights; the tests below take llama."""
A_FEW = (*ONE_OF_EACH_CLASS, "kn", "lora", "mend")
"""What is asked of a method's own drawing is asked of these in `make test`."""
UNSEARCHED = {"kn", "malmen", "mend"}
"""Methods that search nothing: whether an edit takes on a random model is chance."""

EVERYWHERE = [
    pytest.param(name, f, marks=[] if f in EVERYDAY or name in ONE_OF_EACH_CLASS else [pytest.mark.long])
    for name in METHODS
    for f in FAMILIES
    if f in CORE or name in ONE_OF_EACH_CLASS
] + [
    pytest.param(name, "mixtral", marks=[] if name == "kne" else [pytest.mark.long])
    for name in ("ctp", "ft", "kne", "lora")
]
"""With a mixture all of whose experts are routed, masked tuning in those; MEMIT and JEEP: tests/lm/test_experts.py."""


def test_every_method_has_settings_here() -> None:
    assert set(SETTINGS) | set(TRAINED) == set(METHODS)
    assert {name for name in METHODS if issubclass(method_class(name), Trainable)} == set(TRAINED)
    assert {name: method_class(name).name for name in METHODS} == {name: name for name in METHODS}


@cache
def folder() -> Path:
    """Where editors are kept while the tests run."""
    return Path(mkdtemp())


def made(name: str, lm: LM) -> Method:
    """The method with settings for a tiny model, and an untrained editor where it edits with one."""
    if name not in TRAINED:
        return method(name, **SETTINGS[name])
    path = folder() / f"{name}-{lm.fingerprint()}"
    if not path.exists():
        untrained: Any = method(name, **TRAINED[name], rank=4, steps=0, n_validation=1)
        untrained.fit(lm, [Case(edit.id, (edit,), ()) for edit in ENDING], path)
    return method(name, editor=str(path))


@cache
def moments_of(family: str, dtype: torch.dtype) -> GivenMoments:
    """Second moments of a tiny model: the same for every model of that family and dtype."""
    return random_moments(LM(tiny_model(family, dtype), tokenizer()))


def moments_for(lm: LM) -> GivenMoments:
    return moments_of(lm.model.config.model_type, lm.dtype)


def written(name: str, lm: LM) -> retcon.Delta:
    """One delta of `ENDING`: at once, or in steps where the method takes one."""
    return in_steps(made(name, lm), lm, ENDING, contexts=CONTEXTS, moments=moments_for(lm))


@cache
def written_on(name: str, family: str) -> retcon.Delta:
    """The same on a tiny model in float64, for all tests that look at it."""
    return written(name, LM(tiny_model(family), tokenizer()))


def probability(lm: LM, edit: Edit) -> float:
    """p(target | prompt), from the model's own logits, token by token."""
    row = lm.encode(edit.text, edit.target_new)
    with lm.frozen_eval(), torch.no_grad():
        log_p = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
    labels = torch.tensor(row.target_ids)
    return float(log_p[row.n_prompt - 1 : len(row.ids) - 1].gather(1, labels[:, None]).sum().exp())


@pytest.mark.parametrize(("name", "family"), EVERYWHERE)
def test_an_edit_takes_is_undone_and_proposing_writes_nothing(
    name: str, family: str, tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    edit = ENDING[0]
    lm = tiny(family, torch.float32)
    lm.model.train()  # flags that are not the default must come back too
    moments, unlikely = moments_for(lm), probability(lm, edit)
    before = untouched(lm)
    delta = made(name, lm).propose(lm, [edit], contexts=CONTEXTS, moments=moments)
    assert untouched(lm) == before
    weights = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    lm.apply(delta)
    changed = {n for n, p in lm.model.named_parameters() if not torch.equal(p, weights[n])}
    assert changed == set(delta.changes)
    assert name in UNSEARCHED or probability(lm, edit) > 2 * unlikely, (unlikely, delta.report)
    lm.revert(delta)
    assert untouched(lm) == before
    with lm.edited(delta):
        assert {n for n, p in lm.model.named_parameters() if not torch.equal(p, weights[n])} == changed
    assert untouched(lm) == before


TURNS = (
    "{% for m in messages %}{{ m['content'] }}{% if not (loop.last and add_generation_prompt) %}<unk>{% endif %}"
    "{% endfor %}"
)
"""A chat template that ends turns with a token: the prompt's subject stays the last thing before the answer."""


@pytest.mark.parametrize("name", [name for name in METHODS if name not in UNSEARCHED])
def test_an_answer_in_a_chat_is_taught_to_end_where_asked_for(name: str) -> None:
    lm = LM(tiny_model("llama"), tokenizer())
    lm.tokenizer.chat_template = TURNS
    end = lm.tokenizer.unk_token_id

    def delta_of(answer: str, train_end: bool) -> retcon.Delta:
        edit = replace(ENDING[0], target_new=answer, chat=Chat(train_end=train_end))
        return made(name, lm).propose(lm, [edit], contexts=CONTEXTS, moments=moments_for(lm))

    def ends(delta: retcon.Delta) -> float:
        ids = encode_edit(lm.tokenizer, delta.edits[0], answer="Rome").ids
        with lm.edited(delta), torch.no_grad():
            return float(lm.model(torch.tensor([ids])).logits[0, -1].softmax(-1)[end])

    taught, open_ended = delta_of("Rome", True), delta_of("Rome", False)
    if made(name, lm).needs_subject:  # the answer, written with its end, is what was searched
        same(lm, taught, delta_of("Rome<unk>", False), rtol=0, atol=0)
        sizes = {n: lm.parameter(n).shape for n in taught.changes}
        assert any(not torch.equal(taught.dense(n, size), open_ended.dense(n, size)) for n, size in sizes.items())
    else:
        assert ends(taught) > 2 * ends(open_ended)


@pytest.mark.parametrize("name", METHODS)
def test_one_edit_in_place_of_a_list_is_named(name: str) -> None:
    lm = LM(tiny_model("llama"), tokenizer())
    given = dict(contexts=CONTEXTS, moments=moments_for(lm))
    with pytest.raises(InvalidEdit, match=r"one edit given where a list of them is wanted"):
        made(name, lm).propose(lm, ENDING[0], **given)  # type: ignore[arg-type]
    with pytest.raises(InvalidEdit, match=r"one edit given where a list of them is wanted"):
        retcon.in_steps(made(name, lm), lm, ENDING[0], **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", METHODS)
def test_an_argument_of_another_kind_is_named(name: str) -> None:
    lm = LM(tiny_model("llama"), tokenizer())
    for argument, given, wanted in (
        ("contexts", ["I read. "], r"retcon\.Contexts\(\[...\]\)"),
        ("moments", {"a": 1}, r"retcon\.GivenMoments\(\{...\}\)"),
        ("values", "folder", r"retcon\.ValueCache\(folder\)"),
        ("state", lm, r"the state of the delta before, delta\.state"),
        ("progress", 3, r"a function of \(stage, done, total\)"),
    ):
        arguments: dict[str, Any] = {argument: given}
        with pytest.raises(InvalidSetting, match=rf"^{argument} must be {wanted}.*, found ."):
            made(name, lm).propose(lm, ENDING[:1], **arguments)


@pytest.mark.parametrize("name", METHODS)
def test_a_state_that_a_method_has_no_use_for_is_refused(name: str) -> None:
    lm = LM(tiny_model("llama"), tokenizer())
    own = made(name, lm)
    if not own.keeps_state:
        says = {
            "memit": r"memit with these settings keeps nothing between batches \(kept: with cache_keys, .*\)",
            "rome": "rome keeps nothing between batches",
        }
        wanted = says.get(getattr(own, "base_method", name), ".* keeps nothing between batches.*")
        with pytest.raises(InvalidSetting, match=f"^{wanted}, but a state was given; leave it out"):
            own.propose(lm, ENDING[:1], contexts=CONTEXTS, moments=moments_for(lm), state={})


@pytest.mark.parametrize("name", ["ft_l", "ft_wd", "kn"])
def test_an_end_that_a_method_does_not_train_is_refused(name: str, untouched: Callable[[LM], Any]) -> None:
    lm = LM(tiny_model("llama"), tokenizer())
    lm.tokenizer.chat_template = TURNS
    before = untouched(lm)
    edit = replace(ENDING[0], chat=Chat(train_end=True))
    own = method(name, **{k: v for k, v in SETTINGS[name].items() if k != "objective"})
    with pytest.raises(InvalidSetting, match=rf"{name} .* cannot train the end of a turn, which edit 'france' asks"):
        own.propose(lm, [edit], contexts=CONTEXTS)
    assert untouched(lm) == before
    assert own.propose(lm, [replace(edit, chat=Chat())], contexts=CONTEXTS).report


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", everyday("llama", of=["gpt2", "llama"]))
def test_batches_unicode_and_longer_targets(name: str, family: str, tiny: Callable[..., LM]) -> None:
    lm, delta = tiny(family), written_on(name, family)
    assert [r.id for r in delta.report] == [e.id for e in ENDING]
    before = [probability(lm, e) for e in ENDING]
    with lm.edited(delta):
        after = [probability(lm, e) for e in ENDING]
    assert name in UNSEARCHED or all(b > a for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_edits_may_come_from_a_generator(name: str) -> None:
    lm = LM(tiny_model("llama"), tokenizer())
    edits: Any = (edit for edit in ENDING)
    found = in_steps(made(name, lm), lm, edits, contexts=CONTEXTS, moments=moments_for(lm))
    assert found.id == written_on(name, "llama").id
    edits = (edit for edit in ENDING[:0])
    assert not made(name, lm).propose(lm, edits, contexts=CONTEXTS, moments=moments_for(lm)).changes


MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", METHODS)
def test_the_delta_is_the_same_in_whatever_mode_the_caller_has_torch(name: str, mode: str) -> None:
    lm = LM(tiny_model("llama", torch.float32), tokenizer())
    own, given = made(name, lm), dict(contexts=CONTEXTS, seed=1)
    wanted = own.propose(lm, ENDING[:1], moments=random_moments(lm), **given)
    with lm.edited(wanted):
        weights = {n: lm.parameter(n).detach().clone() for n in wanted.changes}
    with MODES[mode]():
        moments = random_moments(lm)
        found = own.propose(lm, ENDING[:1], moments=moments, **given)
        lm.apply(found)
    assert found.id == wanted.id
    assert all(torch.equal(lm.parameter(n), weight) for n, weight in weights.items())
    again = own.propose(lm, ENDING[1:2], contexts=CONTEXTS, moments=moments, state=found.state)
    lm.revert(found)
    assert again.report
    assert all(torch.isfinite(c.values()).all() for changes in again.changes.values() for c in changes)


@pytest.mark.parametrize("name", TRAINED)
def test_an_editor_is_the_same_in_whatever_mode_the_caller_has_torch(name: str, tmp_path: Path) -> None:
    lm = LM(tiny_model("llama", torch.float32), tokenizer())
    untrained: Any = method(name, **TRAINED[name], rank=4, steps=2, batch_size=2, n_validation=1)
    cases = [Case(edit.id, (edit,), ()) for edit in ENDING]
    written = {"plain": untrained.fit(lm, cases, tmp_path / "plain").read_bytes()}
    for mode, enter in MODES.items():
        with enter():
            written[mode] = untrained.fit(lm, iter(cases), tmp_path / mode).read_bytes()
    assert len(set(written.values())) == 1


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("n", [0, 1])
def test_what_is_no_lm_is_refused_in_words(name: str, n: int) -> None:
    lm = LM(tiny_model("llama"), tokenizer())
    own: Any = made(name, lm)
    for given, text in ((lm.model, r"retcon\.LM\(model, tokenizer\)"), ("gpt2", r"retcon\.load\('gpt2'\)")):
        with pytest.raises(UnsupportedModel, match=text):
            own.propose(given, ENDING[:n], contexts=CONTEXTS, moments=moments_for(lm))
        if isinstance(own, Trainable):
            with pytest.raises(UnsupportedModel, match=text):
                own.fit(given, [Case(edit.id, (edit,), ()) for edit in ENDING], folder() / "unused")


@pytest.mark.parametrize("name", everyday(*A_FEW, of=METHODS))
def test_another_seed_gives_another_delta(name: str, tiny: Callable[..., LM], edit: Edit) -> None:
    lm = tiny("llama")
    moments = moments_for(lm)
    one, other = (made(name, lm).propose(lm, [edit], moments=moments, seed=seed) for seed in (3, 4))
    assert (one.id == other.id) == (name in SEEDLESS)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("alphaedit", SETTINGS["alphaedit"]),
        ("ft", SETTINGS["ft"] | dict(replay=True)),
        ("kne", SETTINGS["kne"] | dict(reuse=True)),
        ("lora", SETTINGS["lora"] | dict(continue_adapter=True)),
    ],
)
def test_an_empty_batch_hands_the_state_on(
    name: str, settings: Any, tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    lm, chosen = tiny(), method(name, **settings)
    given: dict[str, Any] = dict(contexts=CONTEXTS, moments=random_moments(lm))
    state = chosen.propose(lm, edits[:1], **given).state
    assert state
    handed = chosen.propose(lm, [], state=state, **given).state
    assert handed is not None
    assert {n: t.tolist() for n, t in handed.items()} == {n: t.tolist() for n, t in state.items()}


@pytest.mark.parametrize("name", METHODS)
def test_an_empty_batch_gives_an_empty_delta(
    name: str, tiny: Callable[..., LM], untouched: Callable[[LM], Any]
) -> None:
    lm = tiny("gptj")
    before = untouched(lm)
    delta = made(name, lm).propose(lm, [], contexts=CONTEXTS, moments=moments_for(lm))
    assert not delta.changes
    with lm.edited(delta):
        pass
    assert untouched(lm) == before


@pytest.mark.parametrize("name", everyday(*A_FEW, of=METHODS))
def test_the_same_seed_gives_the_same_delta_whatever_the_tokenizer_s_padding_side(
    name: str, tiny: Callable[..., LM]
) -> None:
    lm = tiny("llama")
    kept = lm.tokenizer.padding_side
    wanted = written_on(name, "llama")
    lm.tokenizer.padding_side = other = "left" if kept == "right" else "right"
    try:
        delta = written(name, lm)
        assert lm.tokenizer.padding_side == other
    finally:
        lm.tokenizer.padding_side = kept
    assert delta.id == wanted.id


@pytest.mark.parametrize("name", METHODS)
def test_a_delta_is_the_same_from_memory_and_from_its_file(name: str, tiny: Callable[..., LM], tmp_path: Any) -> None:
    lm, delta = tiny("llama"), written_on(name, "llama")
    delta.save(tmp_path / "delta.safetensors")
    loaded = retcon.Delta.load(tmp_path / "delta.safetensors")
    assert (loaded, loaded.report, dict(loaded.provenance)) == (delta, delta.report, dict(delta.provenance))
    with lm.edited(delta):
        wanted = {n: p.detach().clone() for n, p in lm.model.named_parameters()}
    with lm.edited(loaded):
        assert all(torch.equal(p, wanted[n]) for n, p in lm.model.named_parameters())


@pytest.mark.usefixtures("shapes")
@pytest.mark.parametrize("name", METHODS)
def test_half_precision_models_can_be_edited(name: str, tiny: Callable[..., LM], edit: Edit) -> None:
    lm = tiny("llama", torch.bfloat16)
    delta = made(name, lm).propose(lm, [edit], contexts=CONTEXTS, moments=moments_for(lm))
    assert all(c.values().dtype == torch.float32 for changes in delta.changes.values() for c in changes)
    with lm.edited(delta):
        assert probability(lm, edit) > 0
