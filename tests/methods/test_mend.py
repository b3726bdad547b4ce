"""MEND: an edit against autograd, the outer gradient, training, files, and the released layout (T44 to T51)."""

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch.func import functional_call
from torch.testing import assert_close

from retcon.chat import Chat
from retcon.checked import read_checked
from retcon.edits import Case, Edit, Query
from retcon.errors import InvalidEdit, InvalidSetting, MalformedFile, WrongBase
from retcon.lm.forward import answer_places, gold, log_probs
from retcon.lm.model import LM
from retcon.methods.common import hypernetwork
from retcon.methods.common.hypernetwork import Drawn, base_log_probs, examples, outer_losses, pieces
from retcon.methods.malmen import Malmen
from retcon.methods.mend import Mend
from retcon.methods.mend_release import from_release
from retcon.training.objective import answer_rows

SMALL = dict(layers=(1, 3), modules=("up_proj", "down_proj"), rank=6, steps=0, n_validation=1)


def cases(edits: list[Edit]) -> list[Case]:
    """Each edit with one rephrasing and one neighbour."""
    return [
        Case(
            edit.id,
            (edit,),
            (
                Query("paraphrase/0", "paraphrase", f"I read that {edit.text}", edit.target_new),
                Query("neighborhood/0", "neighborhood", "The train to Italy", "stood still"),
            ),
        )
        for edit in edits
    ]


def editor(lm: LM, edits: list[Edit], path, **settings) -> Mend:
    """MEND with an editor for the model, trained for `steps` steps."""
    method = Mend(**{**SMALL, **settings})
    method.fit(lm, cases(edits), path / "editor.safetensors")
    return Mend(editor=str(path / "editor.safetensors"))


def drawn(lm: LM, edits: list[Edit]) -> list[Drawn]:
    return [Drawn(e.edit, e.rephrasings[0], e.others[0]) for e in examples(lm, cases(edits))]


@pytest.mark.parametrize("family", ["gpt2", "llama", "phi3", "opt"])
def test_untrained_an_edit_is_one_gradient_step(family, tiny, edits, tmp_path):
    lm = tiny(family)
    delta = editor(lm, edits, tmp_path, normalise=False, step_size=0.5).propose(lm, edits)
    parameters = dict(lm.model.named_parameters())
    total = 0
    for row in answer_rows(lm, edits):
        log_p = lm.model(torch.tensor([row.ids[:-1]])).logits[0].log_softmax(-1)
        total = total - log_p[row.n_prompt - 1 :].gather(1, torch.tensor(row.target_ids)[:, None]).mean()
    gradients = torch.autograd.grad(total, [parameters[name] for name in delta.changes])
    for (name, found), gradient in zip(delta.changes.items(), gradients, strict=True):
        here = delta.dense(name, parameters[name].shape)
        moved = here != 0 if len(found) == 1 and found[0].region else torch.ones_like(here, dtype=torch.bool)
        assert_close(here, -0.5 * gradient * moved)
    assert {r.id for r in delta.report} == {e.id for e in edits}


@pytest.mark.parametrize("method", [Mend, Malmen])
@pytest.mark.parametrize("axis", ["paraphrase", "neighborhood"])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_is_longer_than_the_context_is_named_before_training(method, axis, family, tiny, edits, tmp_path):
    lm, found = tiny(family), cases(edits)
    long = Query(f"{axis}/1", axis, "The train stood still. " * 200, "late")
    found[2] = replace(found[2], queries=(*found[2].queries, long))
    stages: list[str] = []
    with pytest.raises(InvalidEdit, match=f"case 'leonardo', query '{axis}/1': .* tokens at once"):
        method(**SMALL | dict(steps=2)).fit(lm, found, tmp_path / "editor", progress=lambda *at: stages.append(at[0]))
    assert not stages


def test_a_rephrasing_in_a_chat_is_taught_to_end_as_its_edit_is(tiny, edits):
    lm = tiny("llama")
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}"
    chat = Chat(train_end=True)
    (case,) = cases(edits[:1])
    asked = replace(
        case, edits=(replace(edits[0], chat=chat),), queries=tuple(replace(q, chat=chat) for q in case.queries)
    )
    (found,) = examples(lm, [asked])
    rephrasing, other = found.rephrasings[0], found.others[0]
    assert [row.ids[-1] == lm.tokenizer.unk_token_id for row in (found.edit, rephrasing, other)] == [True, True, False]


def test_of_several_edits_in_a_case_each_has_its_own_rephrasings(tiny, edits):
    lm, (rome, italian, place) = tiny("llama"), edits[:3]
    again = replace(rome, prompt="You know that {} has", id="again")
    queries = [
        Query(f"paraphrase/{i}", "paraphrase", f"I read that {edit.text}", edit.target_new)
        for i, edit in enumerate([rome, italian])
    ]

    def rephrasings(*edits: Edit) -> list[tuple[int, ...]]:
        return [[row.ids for row in e.rephrasings] for e in examples(lm, [Case("c", edits, tuple(queries))])]

    own = [row.ids for row in answer_rows(lm, [rome, italian, place, again])]
    to_rome, to_italian = (lm.encode(q.prompt, q.target).ids for q in queries)
    assert rephrasings(rome) == [[to_rome, to_italian]], "a case of one edit is its own"
    assert rephrasings(rome, italian, place) == [[to_rome], [to_italian], [own[2]]]
    assert rephrasings(rome, again) == [[own[0]], [own[3]]], "which of the two is asked cannot be told"


def test_pieces_of_a_batch_add_up_whatever_is_padded(tiny, edits, tmp_path):
    lm = tiny("gptj")
    mend = editor(lm, edits, tmp_path, steps=3, batch_size=2, learning_rate=1e-3)
    together, reverse = mend.propose(lm, edits), mend.propose(lm, edits[::-1])
    alone = [mend.propose(lm, [edit]) for edit in edits]
    for name in together.changes:
        shape = lm.parameter(name).shape
        assert_close(together.dense(name, shape), sum(delta.dense(name, shape) for delta in alone))
        assert_close(together.dense(name, shape), reverse.dense(name, shape))
    n_tokens = len(answer_rows(lm, edits[:1])[0].ids) - 1
    assert all(rank <= n_tokens for rank in alone[0].ranks().values())


@pytest.mark.parametrize("locality_at", ["everywhere", "answers"])
def test_the_outer_gradient_is_that_through_the_changed_weights(locality_at, tiny, edits):
    """T49, against a model whose weights are W' as tensors of the graph."""
    lm, method = tiny("gpt2"), Mend(**{**SMALL, "step_size": 0.3, "locality_at": locality_at})
    sites, facts = method.sites(lm), drawn(lm, edits)
    network = method.untrained(lm, sites).train()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    with lm.frozen_eval():
        method.loss(lm, network, sites, facts).backward()
        found = {name: p.grad.clone() for name, p in network.named_parameters()}
        network.zero_grad()
        network.eval()  # the statistics have been seen
        factors = pieces(lm, sites, [fact.edit for fact in facts])
        total = 0
        for b, fact in enumerate(facts):
            changed = {}
            for i, (site, (u, delta)) in enumerate(zip(sites, factors, strict=True)):
                real = (delta[b] != 0).any(-1)
                u_new, delta_new = network.transform(i, u[b, real], delta[b, real])
                w = site.weight - network.step_sizes[i] * delta_new.T @ u_new
                changed[site.name] = w.T if site.transposed else w
            asked, stays = fact.rephrasing, fact.other
            said = log_probs(functional_call(lm.model, changed, (torch.tensor([asked.ids[:-1]]),)).logits[0])
            nll = -gold(said[answer_places([asked])[1]], [asked]).mean()
            now = log_probs(functional_call(lm.model, changed, (torch.tensor([stays.ids]),)).logits[0])
            before = log_probs(lm.model(torch.tensor([stays.ids])).logits[0])
            places = answer_places([stays])[1] if locality_at == "answers" else slice(None)
            kl = (before.exp() * (before - now)).sum(-1)[places].mean()
            total = total + (0.1 * nll + kl) / len(facts)
        total.backward()
    for name, parameter in network.named_parameters():
        assert_close(found[name], parameter.grad, msg=name)


def test_nothing_diverges_where_nothing_changes(tiny, edits):
    lm = tiny("llama")
    with lm.frozen_eval():
        facts = drawn(lm, edits)
        nll, kl = outer_losses(lm, facts, base_log_probs(lm, facts, "answers"), [], "answers")
    assert_close(kl, torch.zeros(len(edits), dtype=torch.float64), atol=1e-12, rtol=0)
    assert (nll > 0).all()


def test_training_lowers_the_loss_and_leaves_the_model_alone(tiny, edits, untouched, tmp_path):
    lm = tiny("llama", torch.float32)
    before = untouched(lm)
    heard = []
    Mend(**{**SMALL, "steps": 30, "validate_every": 10, "learning_rate": 1e-4, "batch_size": 3}).fit(
        lm, cases(edits), tmp_path / "e", progress=lambda *told: heard.append(told)
    )
    assert untouched(lm) == before
    assert heard[-1] == ("training", 30, 30)
    delta = Mend(editor=str(tmp_path / "e")).propose(lm, edits[:1])
    assert untouched(lm) == before
    assert delta.provenance["settings"]["layers"] == [1, 3]
    assert delta.provenance["settings"]["editor"] == "e"
    assert len(delta.provenance["editor_sha256"]) == 64
    assert not (tmp_path / "e.unfinished").exists()


def test_an_editor_is_of_the_unedited_model(tiny, edits, tmp_path):
    lm, method = tiny("gpt2", torch.float32), Mend(**{**SMALL, "steps": 1, "batch_size": 2})
    method.fit(lm, cases(edits), tmp_path / "unedited")
    delta = Mend(editor=str(tmp_path / "unedited")).propose(lm, edits)
    with lm.edited(delta):
        method.fit(lm, cases(edits), tmp_path / "edited")
        assert [d.id for d in lm.applied] == [delta.id]
    assert (tmp_path / "edited").read_bytes() == (tmp_path / "unedited").read_bytes()


@pytest.mark.parametrize("method", [Mend, Malmen])
def test_without_blocks_the_step_sizes_alone_are_trained(method, tiny, edits, tmp_path):
    lm, out = tiny("llama", torch.float32), tmp_path / "editor"
    fitted = method(**SMALL | dict(n_blocks=0, steps=2, step_size=1e-3, batch_size=2))
    assert [point.step for point in fitted.curve(fitted.fit(lm, cases(edits), out))] == [0, 2]
    with pytest.raises(InvalidSetting, match=r"clip must be positive, found 0\.0"):  # it would let no gradient through
        method(clip=0.0)


def test_what_cannot_be_kept_or_trained_on_is_refused_before_training(tiny, edits, tmp_path):
    lm, stages = tiny("llama"), []
    for method, out, text in (
        (Mend(**SMALL), tmp_path, "is a directory; give the name of a file"),
        (Mend(**SMALL, editor="old"), tmp_path / "new", "a new editor is trained, not 'old'; leave editor out"),
    ):
        with pytest.raises(InvalidSetting, match=text):
            method.fit(lm, cases(edits), out, progress=lambda *at: stages.append(at[0]))
    assert not stages
    assert not list(tmp_path.iterdir())


def test_a_killed_training_ends_with_the_same_file(tiny, edits, tmp_path, monkeypatch):
    lm = tiny("gpt2", torch.float32)
    method = Mend(**{**SMALL, "steps": 9, "validate_every": 3, "batch_size": 2})
    method.fit(lm, cases(edits), tmp_path / "whole")
    real, calls = Mend.loss, []

    def killed(self, *given):
        calls.append(given)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(self, *given)

    monkeypatch.setattr(Mend, "loss", killed)
    with pytest.raises(KeyboardInterrupt):
        method.fit(lm, cases(edits), tmp_path / "part")
    monkeypatch.undo()
    assert (tmp_path / "part.unfinished").exists()
    method.fit(lm, cases(edits), tmp_path / "part")
    assert (tmp_path / "part").read_bytes() == (tmp_path / "whole").read_bytes()


def test_an_editor_is_read_once_and_again_when_its_file_is_another(tiny, edits, tmp_path, monkeypatch):
    lm, read = tiny("llama", torch.float32), []
    monkeypatch.setattr(hypernetwork, "read_checked", lambda *a: read.append(a[0]) or read_checked(*a))
    mend = editor(lm, edits, tmp_path, step_size=0.1)
    first, second = mend.propose(lm, edits), mend.propose(lm, edits[:1])
    assert len(read) == 1
    assert first.provenance["editor_sha256"] == second.provenance["editor_sha256"]
    name = next(iter(second.changes))
    alone = editor(lm, edits, tmp_path, step_size=0.2).propose(lm, edits[:1])
    assert len(read) == 2
    assert alone.provenance["editor_sha256"] != first.provenance["editor_sha256"]
    shape = lm.parameter(name).shape
    assert_close(alone.dense(name, shape), 2 * second.dense(name, shape))
    lm.parameter(name).data.add_(1e-3)
    with pytest.raises(WrongBase, match="was trained for"):
        mend.propose(lm, edits)


def test_what_cannot_be_edited_with_is_said(tiny, edits, tmp_path):
    lm = tiny("llama", torch.float32)
    with pytest.raises(InvalidSetting, match=r"retcon fit MODEL CASES --method mend --out FILE"):
        Mend().propose(lm, edits)
    with pytest.raises(MalformedFile, match="no such file"):
        Mend(editor=str(tmp_path / "nothing")).propose(lm, edits)
    with pytest.raises(MalformedFile, match="is a directory; mend's editor is a file"):
        Mend(editor=str(tmp_path)).propose(lm, edits)
    mend = editor(lm, edits, tmp_path)
    assert replace(mend, rank=6).propose(lm, edits[:1]) == mend.propose(lm, edits[:1])
    for read in (lambda: replace(mend, rank=5).propose(lm, edits), lambda: replace(mend, rank=5).as_trained()):
        with pytest.raises(
            InvalidSetting, match=r"mend: rank is 5, and the editor .*editor\.safetensors was trained with 6"
        ):
            read()
    with pytest.raises(WrongBase, match="was trained for"):
        mend.propose(tiny("llama", torch.float32, seed=1), edits)
    path = tmp_path / "editor.safetensors"
    other = r"editor.safetensors: not the trained editor asked for \(method: found 'mend', wanted 'malmen'\)"
    with pytest.raises(MalformedFile, match=other):
        Malmen(editor=str(path)).propose(lm, edits)
    path.write_bytes(path.read_bytes()[:-3] + b"abc")
    with pytest.raises(MalformedFile, match="damaged"):
        mend.propose(lm, edits)
    with pytest.raises(InvalidSetting, match="trained on 4 cases at least, found 2"):
        Mend(**SMALL).fit(lm, cases(edits[:2]), tmp_path / "f")
    with pytest.raises(InvalidSetting, match="layer 7 asked for"):
        Mend(layers=(7,)).fit(lm, cases(edits), tmp_path / "f")
    with pytest.raises(InvalidSetting, match="rank must be at least 1"):
        Mend(rank=0)
    with pytest.raises(InvalidSetting, match=r"but those of routed experts, .*; name others, o_proj for"):
        Mend(**SMALL).fit(tiny("mixtral"), cases(edits), tmp_path / "f")


def test_a_released_editor_is_read_by_name_with_its_sign(tiny, edits, tmp_path, randn):
    lm = tiny("gpt2", torch.float32)
    names = [f"transformer.h.{i}.mlp.{m}.weight" for i in (2, 3) for m in ("c_proj", "c_fc")]
    tensors = {"edit_lrs": torch.tensor([0.1, 0.2, 0.3, 0.4])}
    wide = {(128, 32): ("c_proj", 0, 2), (32, 128): ("c_fc", 1, 3)}
    for shape in wide:
        width, prefix = sum(shape), f"mend.{shape}"
        tensors |= {
            f"{prefix}.{v}_{s}": randn(n).abs().float()
            for v, n in zip("uv", shape, strict=True)
            for s in ("mean", "s", "std")
        }
        tensors[f"{prefix}.k"] = torch.tensor([40.0])
        for i in range(2):
            layer = {
                "u": 0.05 * randn(width, 5), "v": randn(5, width), "bias": 0.1 * randn(width),
                "mode_shift.weight": 0.1 * randn(2, width), "mode_scale.weight": randn(2, width),
            }  # fmt: skip
            tensors |= {f"{prefix}.mlp.layers.{i}.{name}": t.float() for name, t in layer.items()}
    save_file(tensors, tmp_path / "released")
    from_release(lm, tmp_path / "released", tmp_path / "own", matrices=names)
    delta = Mend(editor=str(tmp_path / "own")).propose(lm, edits)
    assert delta.provenance["settings"]["sign"] == 1
    with lm.frozen_eval():
        for j, name in enumerate(names):
            site = next(s for s in Mend(layers=(2, 3), modules=("down_proj", "up_proj")).sites(lm) if s.name == name)
            shape = (site.weight.shape[1], site.weight.shape[0])
            mode, get = wide[shape].index(j) - 1, lambda k, s=shape: tensors[f"mend.{s}.{k}"]
            total = 0
            for row in answer_rows(lm, edits):
                ((u, g),) = pieces(lm, [site], [row])
                u, g = u[0], g[0]
                u, g = u[(g != 0).any(-1)], g[(g != 0).any(-1)]
                z = torch.cat(
                    [(x - get(f"{v}_mean")) / ((get(f"{v}_s") / 39) ** 0.5 + 1e-7) for v, x in (("u", u), ("v", g))], -1
                )
                for i in range(2):
                    layer = {
                        k: get(f"mlp.layers.{i}.{k}")
                        for k in ("u", "v", "bias", "mode_shift.weight", "mode_scale.weight")
                    }
                    inner = (layer["u"] @ (layer["v"] @ z.T)).T + layer["bias"]
                    inner = layer["mode_scale.weight"][mode] * inner + layer["mode_shift.weight"][mode]
                    z = z + inner.clamp(min=0)
                u, g = z.split(list(shape), -1)
                total = total + tensors["edit_lrs"][j] * u.T @ g
            assert_close(delta.dense(name, lm.parameter(name).shape, torch.float32), total, atol=2e-3, rtol=1e-3)
    del tensors["mend.(32, 128).k"]
    save_file(tensors, tmp_path / "released")
    with pytest.raises(MalformedFile, match=r"mend\.\(32, 128\)\.k is missing"):
        from_release(lm, tmp_path / "released", tmp_path / "own", matrices=names)


def test_the_file_says_what_it_is_from(tiny, edits, tmp_path):
    from safetensors import safe_open

    lm = tiny("llama", torch.float32)
    editor(lm, edits, tmp_path)
    with safe_open(tmp_path / "editor.safetensors", framework="pt") as file:
        record = json.loads(file.metadata()["retcon"])
    assert record["about"]["fingerprint"] == lm.fingerprint()
    assert record["about"]["settings"]["rank"] == 6
    assert record["about"]["cases"] == 4
