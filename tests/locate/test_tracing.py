"""Causal tracing against brute force, one forward pass per cell with hooks of its own, and against its identities."""

import math
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidSetting, NonFinite, RetconWarning
from retcon.lm.forward import Point
from retcon.lm.model import LM
from retcon.lm.prompts import encode, encode_edit, subject_tokens
from retcon.locate import Trace, Traces, Tracing, causal_trace
from retcon.locate.tracing import GROUPS, default_window, embedding_deviation, packing
from retcon.locate.tracing.causal import trace_prompt
from retcon.locate.tracing.prompt import run_clean_and_corrupted
from tests.conftest import FAMILIES, everyday

Still = Callable[[str], LM]
EDIT = Edit("The mother tongue of {} is now", "Danielle Darrieux", "Italian", id="darrieux")
SHORT = Edit("{} is now", "France", "Italian", id="short")
"""For tests that run a cell at a time."""
ALL = Tracing(kinds=("block", "mlp", "attn", "severed_mlp", "severed_attn"), window=3, samples=2)
TOLERANCE = dict(rtol=1e-5, atol=1e-9)
"""Some architectures take their attention weights in float32, whatever the model's dtype."""


def by_hand(lm: LM, settings: Tracing, restore: dict[Any, list[int]], sever: str | None = None) -> float:
    """p(answer) under noise with hooked modules' outputs restored at tokens, sample by sample, one forward each."""
    row, subject = encode_edit(lm.tokenizer, EDIT), subject_tokens(lm.tokenizer, EDIT)
    ids = torch.tensor([row.ids])
    embedding = lm.model.get_submodule(lm.layout.embedding)
    deviation = float(embedding(torch.tensor([encode(lm.tokenizer, EDIT.subject).ids])).detach().std())
    noise = torch.randn(
        (settings.samples, len(subject), embedding.weight.shape[1]),
        generator=torch.Generator().manual_seed(settings.seed),
    )
    noise = (settings.noise * deviation * noise).double()

    def output_of(module: Any) -> Tensor:
        found: list[Tensor] = []
        handle = module.register_forward_hook(lambda _, __, out: found.append(first(out)))
        lm.model(ids)
        handle.remove()
        return found[0].view(1, len(row.ids), -1)

    def first(out: Any) -> Tensor:
        return out[0] if isinstance(out, tuple) else out

    def corrupt(sample: int) -> Any:
        def hook(_: Any, __: Any, out: Tensor) -> Tensor:
            out = out.clone()
            out[0, list(subject)] += noise[sample]
            return out

        return embedding.register_forward_hook(hook)

    def put(values: Tensor, tokens: list[int]) -> Any:
        def hook(_: Any, __: Any, out: Any) -> Any:
            new = first(out).clone()
            new.view(1, len(row.ids), -1)[0, tokens] = values[0, tokens]
            return (new, *out[1:]) if isinstance(out, tuple) else new

        return hook

    with torch.no_grad():
        answer = int(lm.model(ids).logits[0, -1].argmax())
        clean = {module: output_of(module) for module in restore}
        probabilities = []
        for sample in range(settings.samples):
            handles = [corrupt(sample)]
            if sever:
                kept = [m for m, _ in sites(lm, sever)]
                corrupted = {m: output_of(m) for m in kept}
                tokens = next(iter(restore.values()))
                handles += [m.register_forward_hook(put(corrupted[m], tokens)) for m in kept]
            handles += [m.register_forward_hook(put(clean[m], tokens)) for m, tokens in restore.items()]
            probabilities.append(lm.model(ids).logits[0, -1].softmax(-1)[answer])
            for handle in handles:
                handle.remove()
    return float(torch.stack(probabilities).mean())


def sites(lm: LM, tensor: str) -> list[tuple[Any, int]]:
    if tensor == "block":
        return [(lm.block(layer), layer) for layer in range(lm.n_layers)]
    kind = "down_proj" if tensor == "mlp" else "o_proj"
    return [(lm.site(layer, kind).module, layer) for layer in range(lm.n_layers)]  # type: ignore[arg-type]


def trace(lm: LM, settings: Tracing = ALL, edit: Edit = EDIT) -> Trace:
    (found,) = causal_trace(lm, (each for each in [edit]), settings).traces
    return found


@pytest.mark.parametrize("replayed", everyday(True, of=[True, False]))
@pytest.mark.parametrize("family", ["gptj", "gpt2", "gemma2", "opt"])
def test_every_kind_of_cell_is_as_by_hand(family: str, replayed: bool, still: Still) -> None:
    lm = still(family)
    found = trace(lm, replace(ALL, replayed=replayed))
    assert found.low == pytest.approx(by_hand(lm, ALL, {}), rel=1e-5)
    subject = found.subject
    for token in (subject.start, subject.stop - 1, len(found.tokens) - 1):
        for layer in (0, 2, 3):
            for kind in ("block", "severed_mlp", "severed_attn"):
                sever = kind.removeprefix("severed_") if kind != "block" else None
                wanted = by_hand(lm, ALL, {lm.block(layer): [token]}, sever)
                assert float(found.scores[kind][token, layer]) == pytest.approx(wanted, rel=1e-5), (kind, token, layer)
            for kind in ("mlp", "attn"):
                window = [m for m, at in sites(lm, kind) if layer - 1 <= at <= layer + 1]  # w = 3: l-1 to l+1
                wanted = by_hand(lm, ALL, {module: [token] for module in window})
                assert float(found.scores[kind][token, layer]) == pytest.approx(wanted, rel=1e-5), (kind, token, layer)


@pytest.mark.parametrize("family", everyday("gptj", "llama", "gemma2", of=FAMILIES))
def test_running_only_what_changes_gives_the_same(
    family: str, still: Still, untouched: Callable[[LM], Any], recwarn: pytest.WarningsRecorder
) -> None:
    lm = still(family)
    before = untouched(lm)
    fast = trace(lm)
    assert untouched(lm) == before
    plain = trace(lm, replace(ALL, replayed=False))
    assert not recwarn.list
    for kind in ALL.kinds:
        assert_close(fast.scores[kind], plain.scores[kind], **TOLERANCE)
        assert float((plain.scores[kind] - plain.low).abs().max()) > 1e-5, f"{kind}: nothing to see"


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
@pytest.mark.parametrize(("window", "replayed"), [(8, False), (64, True)])
def test_prompts_longer_than_an_attention_window_take_whole_passes(
    family: str,
    window: int,
    replayed: bool,
    tiny: Callable[..., LM],
    monkeypatch: pytest.MonkeyPatch,
    recwarn: pytest.WarningsRecorder,
) -> None:
    lm = tiny(family)
    lm.model.config.sliding_window = window
    calls: list[int] = []
    honest = packing.logits_at
    monkeypatch.setattr(packing, "logits_at", lambda *args, **kwargs: calls.append(1) or honest(*args, **kwargs))
    fast = trace(lm)
    assert bool(calls) == replayed
    plain = trace(lm, replace(ALL, replayed=False))
    for kind in ALL.kinds:
        assert_close(fast.scores[kind], plain.scores[kind], **TOLERANCE)
    assert not recwarn.list


@pytest.mark.parametrize("replayed", [True, False])
@pytest.mark.parametrize("family", ["bamba", "falcon_h1", "gemma4_text", "jamba", "lfm2", "mixtral", "qwen3_next"])
def test_models_that_no_replay_fits_take_whole_passes(family: str, replayed: bool, still: Still) -> None:
    """Blocks with a recurrent state, whose cache is not one of keys and values, and blocks without a dense MLP."""
    lm, settings = still(family), replace(ALL, kinds=("block",), replayed=replayed)
    found = trace(lm, settings)
    wanted = by_hand(lm, ALL, {lm.block(2): [found.subject.stop - 1]})
    assert float(found.scores["block"][found.subject.stop - 1, 2]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("replayed", [True, False])
def test_how_many_cells_share_a_pass_does_not_matter(replayed: bool, still: Still) -> None:
    lm, settings = still("opt"), replace(ALL, kinds=("mlp", "severed_attn"), replayed=replayed, samples=1)
    together, one_by_one = trace(lm, settings, SHORT), trace(lm, replace(settings, max_batch_tokens=1), SHORT)
    for kind in settings.kinds:
        assert_close(one_by_one.scores[kind], together.scores[kind], **TOLERANCE)


@pytest.mark.parametrize("family", ["gptj", "llama", "gemma2"])
@pytest.mark.parametrize("replayed", everyday(True, of=[True, False]))
def test_identities(family: str, replayed: bool, still: Still) -> None:
    lm = still(family)
    settings = replace(ALL, replayed=replayed)
    quiet = trace(lm, replace(settings, noise=0.0))
    assert quiet.low == pytest.approx(quiet.high, rel=1e-6)
    for scores in quiet.scores.values():  # invariant 59: no noise, no loss
        assert_close(scores, torch.full_like(scores, quiet.high), rtol=1e-5, atol=1e-9)
    found = trace(lm, settings)
    last = float(found.scores["block"][-1, -1])  # invariant 60: the last token's last state is all there is
    assert last == pytest.approx(found.high, rel=1e-6)
    before = found.scores["block"][: found.subject.start]  # invariant 62: nothing came from there
    assert_close(before, torch.full_like(before, found.low))
    everywhere = list(range(len(found.tokens)))
    for layer in range(lm.n_layers):  # invariant 61: all of one layer's states are the clean run
        assert by_hand(lm, ALL, {lm.block(layer): everywhere}) == pytest.approx(found.high, rel=1e-6)
    assert by_hand(lm, ALL, {lm.block(1): everywhere[: found.subject.start]}) == pytest.approx(found.low, rel=1e-6)


def test_a_severed_last_block_is_the_block(still: Still) -> None:
    found = trace(still("llama"))
    for kind in ("severed_mlp", "severed_attn"):  # nothing stands above it to be severed
        assert_close(found.scores[kind][:, -1], found.scores["block"][:, -1])


def test_a_window_of_one_is_one_layer(still: Still) -> None:
    lm = still("gptj")
    found = trace(lm, replace(ALL, window=1))
    token = found.subject.stop - 1
    for layer, (module, _) in enumerate(sites(lm, "mlp")):
        for at in (token, len(found.tokens) - 1):
            assert float(found.scores["mlp"][at, layer]) == pytest.approx(by_hand(lm, ALL, {module: [at]}), rel=1e-5)
    assert [default_window(n) for n in (1, 8, 26, 27, 28, 48)] == [1, 3, 10, 10, 10, 10]


def test_noise_is_drawn_once_and_by_seed(still: Still) -> None:
    lm, settings = still("llama"), replace(ALL, kinds=("mlp",))
    low = trace(lm, settings, SHORT).low
    assert low == trace(lm, replace(settings, max_batch_tokens=1), SHORT).low == trace(lm, edit=SHORT).low
    assert low != trace(lm, replace(settings, seed=1), SHORT).low
    lows = {
        trace(lm, replace(settings, distribution=d, corruption=c), SHORT).low
        for d in ("gaussian", "uniform")
        for c in ("add", "replace")
    }
    assert len(lows) == 4


def test_uniform_noise_is_as_much_below_zero_as_above(still: Still) -> None:
    settings = replace(ALL, kinds=("mlp",), distribution="uniform", noise=3.0, samples=8)
    lm = still("llama")
    with lm.frozen_eval():
        prompt = run_clean_and_corrupted(lm, SHORT, settings, 0.5)
    assert prompt is not None
    drawn = prompt.noise / (3.0 * 0.5)
    assert -1 <= float(drawn.min()) < -0.9
    assert 0.9 < float(drawn.max()) <= 1
    assert abs(float(drawn.mean())) < 0.1


def test_replaced_embeddings_forget_the_subject(still: Still) -> None:
    lm = still("llama")
    settings = replace(ALL, kinds=("block",), corruption="replace")
    others = [replace_subject(EDIT, "Leonardo da Vinci"), EDIT]
    assert len({len(subject_tokens(lm.tokenizer, e)) for e in others}) == 2  # so that the noise differs at least
    assert trace(lm, settings).low != trace(lm, replace(settings, corruption="add")).low


def replace_subject(edit: Edit, subject: str) -> Edit:
    return replace(edit, subject=subject, id="")


def test_the_noise_is_measured_in_the_subjects_embeddings(still: Still) -> None:
    lm = still("gemma2")  # whose embeddings are scaled on their way out
    embedding = lm.model.get_submodule(lm.layout.embedding)
    ids = [i for s in ("France", "Danielle Darrieux") for i in encode(lm.tokenizer, s).ids]
    wanted = float(embedding(torch.tensor([ids])).detach().std())
    assert embedding_deviation(lm, ["France", "Danielle Darrieux", "France"]) == pytest.approx(wanted)
    assert wanted > 2 * float(embedding.weight[ids].detach().std())


def test_facts_the_model_does_not_know_are_left_out(still: Still) -> None:
    lm = still("gptj")
    said = trace(lm).answer
    known = replace(EDIT, target_true=said.strip() or said, id="known")
    unknown = [replace(EDIT, target_true="Paris", id="unknown"), replace(EDIT, prompt="Once upon a time", id="absent")]
    if lm.encode(known.text, known.target_true).target_ids[0] != lm.encode(EDIT.text, said).target_ids[0]:
        known = replace(EDIT, id="known")
    heard: list[tuple[int, int]] = []
    found = causal_trace(lm, [known, *unknown], ALL, progress=lambda *a: heard.append(a))
    assert [t.id for t in found.traces] == ["known"]
    assert found.skipped == {
        "absent": "the subject does not occur in the prompt",
        "unknown": "the model does not say the original answer",
    }
    assert heard[-1] == (3, 3)
    with pytest.raises(
        InvalidSetting, match="nothing to trace: 1 left out, the model does not say the original answer"
    ):
        causal_trace(lm, unknown[:1], ALL)
    with pytest.raises(InvalidSetting, match="nothing to trace: no edits were given"):
        causal_trace(lm, [], ALL)


def test_a_replay_that_disagrees_is_not_used(still: Still, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = still("llama")
    plain = trace(lm, replace(ALL, replayed=False))
    honest = packing.logits_at

    def off(*args: Any, **kwargs: Any) -> Tensor:
        return honest(*args, **kwargs).roll(1, dims=-1)

    monkeypatch.setattr(packing, "logits_at", off)
    with pytest.warns(RetconWarning, match="whole passes are used, which takes longer"):
        found = causal_trace(lm, [EDIT], ALL)
    assert not found.settings.replayed
    assert_close(found.traces[0].scores["block"], plain.scores["block"])


def test_a_broken_model_is_refused(tiny: Callable[..., LM]) -> None:
    lm = tiny("gptj")
    with torch.no_grad():
        lm.site(3, "down_proj").module.weight[0, 0] = float("nan")  # type: ignore[index]
    with pytest.raises(NonFinite, match="'darrieux'"):
        causal_trace(lm, [EDIT], ALL)


# --- groups and averages -----------------------------------------------------------------------------------------


def made(n_tokens: int, subject: range, scores: Tensor, high: float = 0.9, low: float = 0.1) -> Trace:
    return Trace("x", tuple("t" * n_tokens), subject, "a", False, high, low, {"block": scores})


@pytest.mark.parametrize(
    ("n", "subject", "wanted"),
    [
        (9, range(2, 6), [[2], [3, 4], [5], [6], [7], [8]]),
        (9, range(2, 3), [[2], [], [2], [3], [4, 5, 6, 7], [8]]),  # one token: first and last
        (6, range(2, 6), [[2], [3, 4], [5], [], [], [5]]),  # at the end: nothing after it
        (7, range(2, 6), [[2], [3, 4], [5], [6], [], [6]]),  # one token after it, which is the last
        (1, range(1), [[0], [], [0], [], [], [0]]),
    ],
)
def test_groups_of_tokens(n: int, subject: range, wanted: list[list[int]]) -> None:
    found = made(n, subject, torch.zeros(n, 2)).groups()
    assert list(found) == list(GROUPS)
    assert [list(at) for at in found.values()] == wanted


def test_averages_are_over_tokens_first_and_prompts_then() -> None:
    one = made(6, range(1, 4), torch.arange(12.0).view(6, 2).double(), low=0.0)
    two = made(4, range(1, 4), torch.ones(4, 2).double(), high=0.5)
    found = Traces((one, two), {}, 1.0, Tracing(kinds=("block",)))
    effects = found.average("block")
    assert effects.n == (2, 2, 2, 1, 0, 2)
    assert effects.mean[4].isnan().all()
    assert effects.mean[1].tolist() == pytest.approx([(4 + 0.9) / 2, (5 + 0.9) / 2])
    assert effects.mean[3].tolist() == [8, 9]
    spread = abs((10 - 0.9) / 2) * 2**0.5  # standard deviation of two values
    assert float(effects.half_width[5, 0]) == pytest.approx(1.96 * spread / 2**0.5)
    mean, half = found.total()
    assert mean == pytest.approx((0.9 + 0.4) / 2)
    assert half == pytest.approx(1.96 * 0.25)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distribution": "normal"}, "unknown distribution of the noise 'normal'; known: gaussian, uniform"),
        ({"corruption": "swap"}, "unknown corruption 'swap'; known: add, replace"),
        ({"kinds": ("block", "key")}, "cannot restore key; known: block, mlp"),
        ({"kinds": ()}, "tracing needs a kind"),
        ({"window": 0}, "a window and samples of at least 1"),
        ({"samples": 0}, "a window and samples of at least 1"),
        ({"noise": -1.0}, "noise must be at least 0 and finite, found -1"),
        ({"noise": math.inf}, "noise must be at least 0 and finite, found inf"),
    ],
)
def test_settings_that_cannot_be(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidSetting, match=message):
        Tracing(**settings)


KINDS = ("block", "mlp", "attn", "severed_mlp")
EACH_KIND = (("gptj", "mlp"), ("gptj", "severed_mlp"), ("llama", "block"), ("llama", "attn"))
RUN = [(family, kind) for family in ("gptj", "llama", "opt") for kind in KINDS]


@pytest.mark.parametrize(("family", "kind"), everyday(*EACH_KIND, of=RUN, rows=True))
def test_only_what_a_cell_changes_is_run(family: str, kind: Any, still: Still) -> None:
    """Tokens through each MLP: those from the cell's own on, the last alone in the topmost block; none whose output is
    known, as it is of the tokens behind where an MLP beside attention reads what they were."""
    lm, samples = still(family), 2
    ran = [0] * lm.n_layers

    def counting(layer: int) -> Any:
        def count(_: Any, __: Any, out: Tensor) -> None:
            ran[layer] += out.numel() // out.shape[-1]

        return lm.site(layer, "down_proj").module.register_forward_hook(count)

    alone = replace(ALL, kinds=(kind,), window=1, samples=samples, max_batch_tokens=1)  # a cell at a time: no padding
    with lm.frozen_eval(), torch.no_grad():
        prompt = run_clean_and_corrupted(lm, SHORT, alone, 1.0)
        assert prompt is not None
        handles = [counting(layer) for layer in range(lm.n_layers)]
        trace_prompt(lm, SHORT, prompt, alone)
    for handle in handles:
        handle.remove()
    lengths = range(1, len(prompt.row.ids) - prompt.subject.start + 1)  # of the cells of one layer
    own, severed, parallel = len(lengths), kind == "severed_mlp", lm.layout.parallel
    above = sum(lengths) - own * severed
    first = own * (not severed) if parallel else above
    inside = own * (kind == "attn" and not parallel)
    wanted = [inside, *(inside + first + (layer - 1) * above for layer in range(1, lm.n_layers - 1))]
    assert ran[:-1] == [samples * tokens for tokens in wanted]
    last = own - severed  # one end per cell
    topmost = (lm.n_layers - 2) * last + (not severed) if parallel else (lm.n_layers - 1) * last + (inside > 0)
    assert ran[-1] == samples * topmost


@pytest.mark.parametrize("family", everyday("llama", "gpt2", of=["gptj", "llama", "gpt2", "gpt_neox"]))
def test_projections_run_for_changed_tokens_only(family: str, still: Still) -> None:
    """Attention keys: in the block above a restored state only of the cell's own token, then of every one from it on;
    queries too, but for the topmost block, where only the last token asks (a fused matrix gives both)."""
    lm, samples = still(family), 2
    ran: dict[tuple[int, str], int] = {}
    alone = replace(ALL, kinds=("block",), samples=samples, max_batch_tokens=1)
    with lm.frozen_eval(), torch.no_grad():
        prompt = run_clean_and_corrupted(lm, SHORT, alone, 1.0)
        assert prompt is not None
        handles = []
        for layer, kind in product(range(lm.n_layers), ("q_proj", "k_proj")):

            def count(_: Any, __: Any, out: Tensor, at: tuple[int, str] = (layer, kind)) -> None:
                ran[at] = ran.get(at, 0) + out.numel() // out.shape[-1] // samples

            handles.append(lm.site(layer, kind).module.register_forward_hook(count))  # type: ignore[arg-type]
        trace_prompt(lm, SHORT, prompt, alone)
    for handle in handles:
        handle.remove()
    lengths, top = range(1, len(prompt.row.ids) - prompt.subject.start + 1), lm.n_layers - 1
    own, above = len(lengths), sum(lengths)
    for layer in range(1, top):
        assert ran[layer, "q_proj"] == ran[layer, "k_proj"] == own + (layer - 1) * above
    assert ran[top, "k_proj"] == own + (top - 1) * above
    fused = family in ("gpt2", "gpt_neox")
    assert ran[top, "q_proj"] == (ran[top, "k_proj"] if fused else 1 + (top - 1) * own)


@pytest.mark.parametrize("n_layers", [1, 2])
@pytest.mark.parametrize("family", ["gptj", "llama"])
def test_shallow_models_are_traced_too(family: str, n_layers: int, tiny: Callable[..., LM]) -> None:
    lm = tiny(family, n_layers=n_layers)
    fast, plain = (trace(lm, replace(ALL, replayed=way)) for way in (True, False))
    for kind in ALL.kinds:
        assert_close(fast.scores[kind], plain.scores[kind], **TOLERANCE)


def test_points_below_the_first_change_are_not_run(still: Still) -> None:
    lm = still("llama")
    ran: list[int] = []
    handles = [
        lm.site(layer, "down_proj").module.register_forward_hook(lambda *_, at=layer: ran.append(at))
        for layer in range(lm.n_layers)
    ]
    trace(lm, replace(ALL, kinds=("block",)))
    for handle in handles:
        handle.remove()
    assert ran.count(0) < ran.count(1) < ran.count(2) < ran.count(3)
    assert Point(0, "block") < Point(1, "attn")
