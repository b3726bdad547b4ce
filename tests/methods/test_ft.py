"""The fine-tuning family: a step against autograd, bounds, decay, objectives (T31 to T35), and what a call keeps."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from retcon.chat import Chat
from retcon.edits import Case, Edit, Query, write_cases
from retcon.errors import DeltaMismatch, InvalidEdit, InvalidSetting, OutOfMemory, UnsupportedModel
from retcon.methods.common.choosing import method
from retcon.methods.common.fine_tuning import (
    _as_tensor,
    add_decay,
    earlier_edits,
    paraphrase_loss,
    project_onto_bounds,
    shrink,
)
from retcon.methods.ft import Ft
from retcon.methods.ft_l import FtL
from retcon.methods.ft_wd import FtWd
from retcon.methods.full_c import FullC
from retcon.methods.lora import Lora
from retcon.training.descent import losses_now
from retcon.training.objective import AnswerLoss, PromptLastLoss, answer_rows, trained_rows
from tests.conftest import FAMILIES

FAST: dict[str, Any] = dict(layers=(1,), learning_rate=1e-2, epochs=3)


def ft(**settings: Any) -> Ft:
    return Ft(**{**FAST, **settings})


def biggest(delta: Any) -> float:
    return max(float(c.values().abs().max()) for changes in delta.changes.values() for c in changes)


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_a_step_is_a_plain_autograd_step_of_torch_s_adam(family, weight_decay, tiny, edits):
    lm = tiny(family)
    delta = ft(epochs=2, stop_loss=0.0, weight_decay=weight_decay).propose(lm, edits)
    site, rows = lm.site(1, "down_proj"), answer_rows(lm, edits)
    names = [site.name] + ([site.bias_name] if site.bias is not None else [])
    weights = [lm.parameter(name) for name in names]
    before = [w.detach().clone() for w in weights]
    with lm.frozen_eval():
        for w in weights:
            w.requires_grad_(True)
        adam = torch.optim.Adam(weights, lr=1e-2, weight_decay=weight_decay)
        for _ in range(2):
            adam.zero_grad()
            AnswerLoss(lm, rows)(range(len(rows))).mean().backward()
            adam.step()
    tolerance = dict(rtol=1e-4, atol=1e-7) if family != "gpt2" else dict(rtol=1e-7, atol=1e-10)  # float32 inside
    assert set(delta.changes) == set(names)
    for name, w, w0 in zip(names, weights, before, strict=True):
        assert_close(delta.dense(name, w.shape), w.detach() - w0, **tolerance)


def test_the_box_holds_every_weight_and_is_reached(tiny, edits):
    """T31, on the float32 change of a bfloat16 model too."""
    for dtype in (torch.float64, torch.bfloat16):
        delta = ft(box=1e-3, epochs=4, learning_rate=1e-3).propose(tiny("gptj", dtype), edits)
        assert biggest(delta) == torch.tensor(1e-3, dtype=delta.changes[next(iter(delta.changes))][0].values().dtype)
    assert not ft(box=0.0).propose(tiny("gptj"), edits).changes


def test_the_box_may_be_centred_on_the_unedited_model(tiny, edits):
    lm = tiny("llama")
    settings = dict(box=5e-3, epochs=2, learning_rate=5e-3, stop_loss=0.0)
    first = ft(**settings).propose(lm, edits[:2])
    lm.apply(first)
    name = lm.site(1, "down_proj").name
    shape = lm.parameter(name).shape

    def total(second: Any) -> float:
        return float((first.dense(name, shape) + second.dense(name, shape)).abs().max())

    assert total(ft(**settings).propose(lm, edits[2:])) > 5.1e-3  # every call has a box of its own
    assert total(ft(anchor="base", **settings).propose(lm, edits[2:])) <= 5e-3 + 1e-12


def test_the_ball_bounds_the_norm_of_the_whole_change(tiny, edits):
    delta = ft(ball=0.02, layers=(1, 2)).propose(tiny("gpt2"), edits)
    assert_close(math.sqrt(sum(n**2 for n in delta.norms().values())), 0.02, rtol=1e-9, atol=0)


def test_projections_and_decay_on_numbers():
    """T34: decay to the base leaves an unmoved weight where it is, coupled decay does not."""
    values, weight = [torch.tensor([0.5, -0.2], requires_grad=True)], [torch.tensor([1.0, 2.0])]
    project_onto_bounds(values, [torch.tensor([0.6, 0.0])], 1.0, None)
    assert_close(values[0].detach(), torch.tensor([0.4, -0.2]))  # 0.5 + 0.6 is cut to 1.0
    project_onto_bounds(values, [None], None, 0.1)
    assert_close(float(values[0].detach().norm()), 0.1)
    with torch.no_grad():
        values[0].zero_()
    shrink(values, [torch.zeros(2)], 0.3)
    assert not bool(values[0].any())
    shrink(values, [torch.tensor([1.0, -1.0])], 0.25)
    assert_close(values[0].detach(), torch.tensor([-0.25, 0.25]))
    with torch.no_grad():
        values[0].zero_()
    values[0].grad = torch.zeros(2)
    add_decay(values, weight, 0.5)
    assert_close(values[0].grad, torch.tensor([0.5, 1.0]))


def test_the_power_law_is_that_of_the_published_settings_and_is_applied():
    """T35."""
    decay = FtWd(layers=(0,)).decay
    assert_close(decay(1), math.exp(0.15589562))
    assert_close(decay(10**4) / decay(10**2), 10 ** (-2 * 0.87028798))
    assert FtWd(layers=(0,), apply_decay=False).decay(5) == 0.0


def test_prompt_last_asks_one_distribution_for_all_tokens(tiny, edits):
    """T32: its minimum is log s, which is why early stop never comes; for one token it is the answer's loss."""
    lm = tiny("gpt2")
    rows = answer_rows(lm, edits)
    losses = PromptLastLoss(lm, rows)(range(len(rows)))
    for row, loss in zip(rows, losses.tolist(), strict=True):
        assert loss >= math.log(len(set(row.target_ids))) - 1e-12
    single = [type(row)(row.ids[: row.n_prompt + 1], row.n_prompt) for row in rows]
    assert_close(PromptLastLoss(lm, single)(range(4)), AnswerLoss(lm, single)(range(4)))
    delta = FtL(layers=(1,), box=None, learning_rate=0.1, epochs=10).propose(lm, edits[-1:])
    assert len(rows[-1].target_ids) > 1
    assert delta.report[0].stopped == "steps"
    assert delta.report[0].detail["nll"] >= math.log(len(set(rows[-1].target_ids)))


def test_what_is_known_already_is_left_alone(tiny, edits):
    """T33."""
    for skip in ("edit", "batch"):
        delta = ft(stop_loss=50.0, skip=skip).propose(tiny("llama"), edits)
        assert not delta.changes
        assert all((report.stopped, report.steps) == ("reached", 0) for report in delta.report)


def test_skipping_by_the_batch_keeps_learned_edits_in_the_step(tiny, edits):
    lm = tiny("gpt2")
    now = losses_now(AnswerLoss(lm, answer_rows(lm, edits))).values()
    between = (min(now) + sum(now) / len(now)) / 2  # one edit is below it, the mean is not
    by_edit, by_batch = (ft(epochs=1, stop_loss=between, skip=skip).propose(lm, edits) for skip in ("edit", "batch"))
    everything = ft(epochs=1, stop_loss=0.0).propose(lm, edits)
    name = lm.site(1, "down_proj").name
    assert torch.equal(by_batch.changes[name][0].values(), everything.changes[name][0].values())
    assert not torch.equal(by_edit.changes[name][0].values(), everything.changes[name][0].values())


def test_a_whole_block_is_trained_with_its_norms(tiny, edits):
    lm = tiny("gpt2")
    delta = FtWd(layers=(2,), learning_rate=1e-2, epochs=2).propose(lm, edits)
    assert set(delta.changes) == {n for n, _ in lm.model.named_parameters() if n.startswith("transformer.h.2.")}


@pytest.mark.parametrize("family", FAMILIES)
def test_a_block_of_matrices_and_norms_alone_is_trained_whole(family, tiny, edits):
    """Others were trained as if a mixer's output, or an activation's, were affine in them, or ended in a traceback."""
    lm, whole = tiny(family), FtWd(layers=(2,), learning_rate=1e-2, epochs=2, objective="target_new")
    if family in ("apertus", "diffllama", "granite_swa"):
        with pytest.raises(InvalidSetting, match=r"\.2\.(mlp\.act_fn|self_attn)\.\w+ \(\w+\), and a block with more"):
            whole.propose(lm, edits)
    else:
        report = whole.propose(lm, edits).report
        trained, merged = [[getattr(r, f"{when}_probability") for r in report] for when in ("search", "final")]
        assert trained == pytest.approx(merged, rel=1e-5)


@pytest.mark.parametrize(
    ("model_type", "layer", "other"),
    [
        ("qwen3_5_text", 0, r"linear_attn\.dt_bias \(Qwen3_5GatedDeltaNet\)"),
        ("lfm2", 0, r"conv\.conv\.weight \(Conv1d\)"),
        ("mixtral", 1, r"mlp\.gate\.weight \(MixtralTopKRouter\)"),
    ],
)
def test_a_block_with_other_parameters_is_refused_by_name(model_type, layer, other, tiny, edits):
    lm = tiny(model_type)
    with pytest.raises(InvalidSetting, match=rf"ft_wd: layer {layer} of .* has model\.layers\.{layer}\.{other}"):
        FtWd(layers=(layer,)).propose(lm, edits)
    with pytest.raises(InvalidSetting, match="not trained whole"):
        FtWd(layers=(layer,)).n_trained(lm)


def test_layers_are_whole_numbers_not_prefixes(tiny, edits):
    """T37."""
    lm = tiny("llama", n_layers=12)
    delta = ft(layers=(1,), epochs=1).propose(lm, edits)
    assert set(delta.changes) == {"model.layers.1.mlp.down_proj.weight"}


def test_all_mlps(tiny, edits):
    lm = tiny("phi3")
    delta = FullC(learning_rate=1e-3, epochs=1).propose(lm, edits)
    kinds = ("mlp.gate_up_proj", "mlp.down_proj")
    assert set(delta.changes) == {f"model.layers.{i}.{kind}.weight" for i in range(4) for kind in kinds}
    assert biggest(delta) <= 5e-4 + 1e-12


def test_the_end_of_the_text_is_learned_where_asked_for(tiny, edits):
    lm = tiny("llama")
    found = []
    for target_eos in (False, True):
        with lm.edited(ft(target_eos=target_eos, epochs=10).propose(lm, edits)):
            row = lm.encode(edits[0].text, edits[0].target_new)
            logits = lm.model(torch.tensor([row.ids])).logits[0, -1]
            found.append(float(logits.log_softmax(-1)[lm.tokenizer.eos_token_id].detach()))
    assert found[1] > found[0] + 1
    lm.tokenizer.eos_token, kept = None, lm.tokenizer.eos_token
    try:
        with pytest.raises(UnsupportedModel, match="no end-of-text token"):
            ft(target_eos=True).propose(lm, edits)
    finally:
        lm.tokenizer.eos_token = kept


def test_prefixes_are_trained_too_and_go_on_record(tiny, edits):
    from retcon.memory.contexts import Contexts

    lm = tiny("gpt2")
    contexts = Contexts(("The train stood still. ", "I read. ", "Late. "))
    delta = ft(n_prefixes=2).propose(lm, edits, contexts=contexts)
    assert delta.contexts == contexts.prefixes[:2]
    plain = ft().propose(lm, edits, contexts=contexts)
    rows = answer_rows(lm, edits, prefix="The train stood still. ")

    def loss(of: Any) -> float:
        with lm.edited(of), lm.frozen_eval():
            return sum(losses_now(AnswerLoss(lm, rows)).values())

    assert loss(delta) < loss(plain)
    assert delta.id != plain.id


def test_replay_trains_on_earlier_edits_and_is_kept_in_the_file(tiny, edits, tmp_path):
    from retcon.delta import Delta

    lm = tiny("gpt2")
    replaying = ft(replay=True, epochs=8)
    first = replaying.propose(lm, edits[:3])
    first.save(tmp_path / "first.safetensors")
    lm.apply(first)
    state = Delta.load(tmp_path / "first.safetensors").state
    second, forgetful = replaying.propose(lm, edits[3:], state=state), ft(epochs=8).propose(lm, edits[3:])
    assert [report.id for report in second.report] == ["lodz"]
    rows = answer_rows(lm, edits[:3])

    def loss(of: Any) -> float:
        with lm.edited(of), lm.frozen_eval():
            return sum(losses_now(AnswerLoss(lm, rows)).values())

    assert loss(second) < loss(forgetful)
    with pytest.raises(DeltaMismatch, match="holds no edits"):
        replaying.propose(lm, edits[3:], state={"keys": torch.zeros(2)})


def test_replay_does_not_train_again_what_was_taken_back(tiny, edits):
    lm, replaying = tiny("gpt2"), ft(replay=True, epochs=2)
    deltas: list[Any] = []
    for edit in edits[:3]:
        deltas.append(replaying.propose(lm, [edit], state=deltas[-1].state if deltas else None))
        lm.apply(deltas[-1])

    def replayed() -> list[str]:
        return [edit.id for edit in earlier_edits(lm, deltas[-1].state, edits[3:])]

    assert replayed() == ["leonardo", "darrieux", "france"]
    lm.revert(deltas[0])
    assert replayed() == ["leonardo", "darrieux"]
    fourth = replaying.propose(lm, edits[3:], state=deltas[-1].state)
    assert earlier_edits(lm, fourth.state, []) == [edits[3], edits[2], edits[1]]
    other = replaying.propose(lm, [replace(edits[0], target_new="Lyon", id="amended")])
    lm.apply(other)
    assert replayed() == ["amended", "leonardo", "darrieux"], "what is in force in its place is replayed"


def test_replay_reads_back_edits_without_a_subject_and_in_a_chat(tiny):
    lm = tiny("llama")
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    plain = Edit("You know that Rome is", None, "late", id="plain")
    asked = Edit("Who lived in {}?", "Rome", "Leonardo", id="asked", chat=Chat("Be short."))
    replaying = ft(replay=True, epochs=2)
    first = replaying.propose(lm, [plain, asked])
    assert earlier_edits(lm, first.state, []) == [plain, asked]
    assert len(replaying.propose(lm, [Edit("I read", None, "the", id="third")], state=first.state).report) == 1


@pytest.mark.parametrize(
    "now",
    [
        Edit("{} has the capital", "France", "Rome", relation_id="P36"),
        Edit("the Capital of  {} is", "france", "Rome"),
        Edit("The capital of France is", None, "Rome"),
    ],
)
def test_replay_forgets_an_answer_that_a_new_edit_takes_the_place_of(now, tiny):
    relation = now.relation_id
    before = Edit("The capital of {} is", "France", "Paris", relation_id=relation)
    other = Edit("The capital of {} is", "Italy", "Zürich", relation_id=relation)
    state = {"edits": _as_tensor([before, other])}
    assert earlier_edits(tiny(n_layers=2), state, [now]) == [other]


def test_an_edit_may_be_left_alone_by_its_paraphrases(tiny, edit, tmp_path):
    """The model finds one paraphrase likelier than the edit's own prompt, and one less so; a threshold in between."""
    lm, path = tiny("llama"), str(tmp_path / "cases.jsonl")
    prompts = ["I read that", "You know the", "The train stood still, so", "Italy is", "Zürich", "In 1984"]
    loss = {p: losses_now(AnswerLoss(lm, [lm.encode(p, edit.target_new)]))[0] for p in (edit.text, *prompts)}
    low, high = min(loss, key=loss.__getitem__), max(loss, key=loss.__getitem__)
    assert loss[low] < loss[edit.text] < loss[high]
    for paraphrase in (low, high):
        query = Query("paraphrase/0", "paraphrase", paraphrase, edit.target_new)
        write_cases(path, [Case("c", (edit,), (query,))])
        settings = dict(epochs=1, stop_loss=(loss[paraphrase] + loss[edit.text]) / 2)
        by_itself, by_paraphrase = ft(**settings).propose(lm, [edit]), ft(**settings, stop_on=path).propose(lm, [edit])
        assert bool(by_itself.changes) == (paraphrase == low)
        assert bool(by_paraphrase.changes) == (paraphrase == high)
        with lm.edited(by_paraphrase):
            after = losses_now(AnswerLoss(lm, [lm.encode(paraphrase, edit.target_new)]))[0]
        assert by_paraphrase.report[0].detail["nll"] == pytest.approx(after)  # what decides is what is reported
    query = Query("paraphrase/0", "paraphrase", "The train stood still. " * 200, edit.target_new)
    write_cases(path, [Case("c", (edit,), (query,))])
    with pytest.raises(InvalidEdit, match=r"edit 'france', query 'paraphrase/0': .* tokens at once"):
        ft(stop_on=path).propose(lm, [edit])
    with pytest.raises(InvalidSetting, match=r"no paraphrase of edit 'other'"):
        ft(stop_on=path).propose(lm, [Edit("{} is", "Rome", "Paris", id="other")])
    with pytest.raises(InvalidSetting, match="skip='edit'"):
        ft(stop_on="f", skip="batch")


def test_paraphrases_are_those_of_the_edit_s_answer_in_its_chat(tiny, edits, tmp_path):
    """Of a case with several edits, of two rows that contradict each other, and of facts that are put in a chat."""
    lm, path, (rome, italian) = tiny("llama"), str(tmp_path / "cases.jsonl"), edits[:2]
    lm.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}<unk>{% endfor %}"
    to_rome, to_italian = (
        Query(f"paraphrase/{i}", "paraphrase", f"I read that {edit.text}", edit.target_new)
        for i, edit in enumerate((rome, italian))
    )
    lyon = replace(rome, target_new="Lyon", id="lyon")
    write_cases(
        path,
        [Case("l", (lyon,), (replace(to_rome, target="Lyon"),)), Case("c", (rome, italian), (to_rome, to_italian))],
    )

    def stopping(*edits: Edit) -> list[list[tuple[int, ...]]]:
        return [[row.ids for row in group] for group in paraphrase_loss("ft", lm, edits, path).groups]

    assert stopping(rome, italian) == [[lm.encode(q.prompt, q.target).ids] for q in (to_rome, to_italian)]
    assert stopping(lyon) == [[lm.encode(to_rome.prompt, "Lyon").ids]]
    (row,) = trained_rows(lm, [replace(rome, prompt=to_rome.prompt, chat=Chat(train_end=True))])
    assert stopping(replace(rome, chat=Chat(train_end=True))) == [[row.ids]]


def test_what_training_takes_is_counted_before_it_begins(tiny, edits, monkeypatch):
    for lm, tuned in (
        (tiny("gpt2"), ft(layers=(1, 2), modules=("up_proj", "down_proj"))),
        (tiny("llama"), ft(modules=("block",))),
    ):
        assert tuned.n_trained(lm) == sum(v.numel() for part in tuned.parts(lm) for v in part.trained())
    lm = tiny("phi3")
    factors = [c for changes in Lora(rank=3).propose(lm, edits[:1]).changes.values() for c in changes]
    assert Lora(rank=3).n_trained(lm) == sum(c.left.numel() + c.right.numel() for c in factors)
    monkeypatch.setattr("retcon.methods.common.tuning.free_bytes", lambda device: 1000)
    monkeypatch.setattr(Ft, "parts", None)  # nothing is made before it is known to fit
    with pytest.raises(OutOfMemory, match=r"ft trains 4,128 values"):
        ft().propose(tiny("gpt2"), edits)


def test_batches_are_made_small_enough_for_the_updates_wanted():
    def size(n: int) -> int | None:
        return ft(batch_size=100, steps_per_epoch=30).schedule(n).batch_size

    assert [size(n) for n in (1, 30, 100, 3000, 10_000)] == [1, 1, 4, 100, 100]
    assert ft().schedule(7).batch_size is None


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        (dict(layers=(3, 1)), "must ascend"),
        (dict(modules=("block", "up_proj")), "has every matrix in it"),
        (dict(modules=("block",), train_bias=False), "trains biases too"),
        (dict(box=-1.0), "box must not be negative"),
        (dict(objective="prompt_last", target_eos=True), "belong to 'target_new'"),
        (dict(weight_decay=-0.1), "weight_decay must not be negative"),
        (dict(weight_decay=0.1, power_law=True), "power_law takes the place of weight_decay, found 0.1; set power_law"),
    ],
)
def test_settings_are_checked(settings, text):
    with pytest.raises(InvalidSetting, match=text):
        ft(**settings)


def test_what_the_model_does_not_have(tiny, edits):
    with pytest.raises(InvalidSetting, match="has layers 0 to 3"):
        ft(layers=(4,)).propose(tiny("gpt2"), edits)
    with pytest.raises(InvalidSetting, match="has no gate_proj in layer 1"):
        ft(modules=("gate_proj",)).propose(tiny("gpt2"), edits)
    for modules in (("gate_proj",), ("down_proj", "gate_proj")):
        with pytest.raises(InvalidSetting, match=r"full_c: .* has no gate_proj in its blocks"):
            FullC(modules=modules).propose(tiny("gpt2"), edits)


@pytest.mark.filterwarnings("ignore:no .* preset")
@pytest.mark.parametrize("name", ["ft", "ft_l", "ft_m", "ft_wd", "full_c"])
def test_every_model_gets_settings(name, tiny):
    lm = tiny("olmo2")
    assert all(part.trained() for part in method(name, for_model=lm).parts(lm))
