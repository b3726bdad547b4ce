"""Teacher-forced scores against plain forward passes, and everything that must not change them."""

import copy
import math
import random
from collections.abc import Callable
from itertools import combinations, pairwise
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from retcon.boundary import separator_between
from retcon.errors import InvalidEdit
from retcon.evaluation.score import TokenScore, alike, score, score_rows
from retcon.lm.decoding import WORTH, remembers
from retcon.lm.forward import logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode, n_common
from tests.conftest import FAMILIES, TEXT, WINDOWED, tiny_model, tokenizer

Make = Callable[..., LM]

ITEMS = [
    ("The capital of France is", "Paris"),
    ("The capital of France is", "Rome"),
    ("Zürich, São Paulo and Łódź are", "東京 🗼"),
    ("The mother tongue of Leonardo da Vinci is", "Italian. He lived in Florence"),
    ("عاصمة فرنسا", "nai\u0308ve cafe\u0301"),
    ("I read", "You know the way home"),
]


def plain(lm: LM, row: Row, *, left: int = 0, positions: bool = True) -> tuple[Tensor, list[int]]:
    """Log-probabilities and argmaxes at the target, from one row by itself, padded on the left by `left` tokens."""
    ids = torch.tensor([[7] * left + list(row.ids)])
    mask = torch.tensor([[0] * left + [1] * len(row.ids)])
    more = {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if positions else {}
    with torch.no_grad():
        logits = lm.model(ids, attention_mask=mask, **more).logits[0, left + row.n_prompt - 1 : -1]
    log_p = logits.float().log_softmax(-1)
    return log_p.gather(1, torch.tensor(row.target_ids)[:, None])[:, 0], logits.argmax(-1).tolist()


def assert_same(found: TokenScore, logp: Tensor, pred: list[int], target: tuple[int, ...]) -> None:
    assert found.target == target
    assert found.pred == tuple(pred)
    torch.testing.assert_close(torch.tensor(found.logp), logp.float(), atol=1e-5, rtol=1e-5)


# --- what a score is -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_equals_single_rows_unpadded_and_padded_on_the_left(family: str, tiny: Make) -> None:
    lm = tiny(family, n_layers=2)
    for item, found in zip(ITEMS, score(lm, ITEMS), strict=True):
        row = encode(lm.tokenizer, *item)
        assert_same(found, *plain(lm, row), row.target_ids)
        if family not in (*WINDOWED, "bloom", "granite_swa", "mpt", "vaultgemma"):  # padded rows see nothing: NaN
            assert_same(found, *plain(lm, row, left=5), row.target_ids)


def test_padding_on_the_left_without_positions_would_show_on_gpt2(tiny: Make) -> None:
    lm = tiny("gpt2", n_layers=2)
    row = encode(lm.tokenizer, *ITEMS[0])
    right, wrong = plain(lm, row)[0], plain(lm, row, left=5, positions=False)[0]
    assert (right - wrong).abs().max() > 0.1


def test_predictions_are_read_one_place_before_their_tokens(tiny: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny(n_layers=2)
    rows = [Row((5, 6, 7, 8, 9, 10), 4), Row(tuple(range(20, 30)), 9)]  # the longer one makes the batch 9 wide
    read: list[tuple[list[int], list[int], int]] = []

    def spy(lm: LM, batch: Any, places: Any) -> Tensor:
        read.append((places[0].tolist(), places[1].tolist(), batch.ids.shape[1]))
        return logits_at(lm, batch, places)

    monkeypatch.setattr("retcon.evaluation.score.logits_at", spy)
    short, long = score_rows(lm, rows)
    assert read == [([0, 0, 1], [3, 4, 8], 9)]
    assert (short.target, long.target) == ((9, 10), (29,))


def test_single_tokens_over_the_vocabulary_sum_to_one(tiny: Make) -> None:
    lm = tiny("llama", n_layers=2)
    prompt = encode(lm.tokenizer, "The capital of France is").ids
    scores = score_rows(lm, [Row((*prompt, token), len(prompt)) for token in range(512)])
    assert math.fsum(math.exp(-s.nll_sum) for s in scores) == pytest.approx(1, abs=1e-5)
    assert sum(s.all_correct for s in scores) == 1
    for s in scores:
        assert s.tok_acc == s.all_correct == s.first_correct
        assert s.nll_mean == s.nll_sum


@pytest.mark.parametrize("family", ["gpt2", "gptj", "llama"])
def test_the_models_own_continuation_is_all_correct(family: str, tiny: Make) -> None:
    lm = tiny(family, n_layers=2)
    prompt = encode(lm.tokenizer, "The capital of France is").ids
    ids, best = list(prompt), []
    for _ in range(5):
        with torch.no_grad():
            log_p = lm.model(torch.tensor([ids])).logits[0, -1].float().log_softmax(-1)
        best.append(float(log_p.max()))
        ids.append(int(log_p.argmax()))
    found = score_rows(lm, [Row(tuple(ids), len(prompt))])[0]
    assert found.all_correct
    assert found.tok_acc == 1
    assert found.nll_mean == pytest.approx(-sum(best) / 5, abs=1e-5)


def test_gold_and_own_choices_compared() -> None:
    found = TokenScore(logp=(-3.0, -0.1, -0.1, -0.2), pred=(7, 9, 9, 4), target=(5, 9, 9, 4))
    assert found.tok_acc == 0.75
    assert not found.all_correct
    assert not found.first_correct
    assert found.nll_sum == pytest.approx(3.4)
    assert found.nll_mean == pytest.approx(0.85)
    assert str(TokenScore((0.0,), (5,), (5,)).nll_mean) == "0.0"  # certain: no sign


def test_accuracies_agree_with_each_other(tiny: Make) -> None:
    lm = tiny("gpt2", n_layers=2)
    for found in score(lm, ITEMS):
        assert found.tok_acc in [k / len(found.target) for k in range(len(found.target) + 1)]
        assert found.all_correct == (found.tok_acc == 1)
        assert found.first_correct or not found.all_correct


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_what_is_not_finite_says_so(bad: float) -> None:
    assert TokenScore((-1.0, -2.0), (1, 2), (1, 2)).finite
    assert not TokenScore((-1.0, bad), (1, 2), (1, 2)).finite


# --- batches, order, memory ----------------------------------------------------------------------------------------


def close(a: list[TokenScore], b: list[TokenScore]) -> bool:
    return all(
        x.pred == y.pred and x.target == y.target and x.logp == pytest.approx(y.logp, abs=1e-5)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_batches_order_and_company_change_nothing(family: str, tiny: Make) -> None:
    lm = tiny(family, n_layers=2)
    together = score(lm, ITEMS)
    assert close(together, [score(lm, [item])[0] for item in ITEMS])
    assert close(together, score(lm, ITEMS, max_batch_tokens=1))
    assert close(together, score(lm, ITEMS, max_batch_tokens=20))
    assert close(together, score(lm, ITEMS[::-1])[::-1])
    long = ("The train stood still. " * 10, "home")
    assert close(together, score(lm, [long, *ITEMS])[1:])
    assert score(lm, []) == []


def test_half_precision_batches_agree_within_rounding(tiny: Make) -> None:
    lm = tiny("gptj", torch.bfloat16, n_layers=2)
    together, alone = score(lm, ITEMS), [score(lm, [item])[0] for item in ITEMS]
    for x, y in zip(together, alone, strict=True):
        assert x.logp == pytest.approx(y.logp, abs=0.25)  # logits near 10 are 0.06 apart in bfloat16
    pairs = [(p, q) for x, y in zip(together, alone, strict=True) for p, q in zip(x.pred, y.pred, strict=True)]
    assert sum(p == q for p, q in pairs) >= 0.95 * len(pairs)


def test_a_prompt_with_several_answers_runs_once_where_one_input_will_do(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    rows = [Row((5, 6, 7), 2), Row((5, 6, 8), 2), Row((5, 6, 8, 9), 2), Row((5, 6), 1)]
    alone = [score_rows(lm, [row])[0] for row in rows]
    shapes: list[tuple[int, ...]] = []
    embedding = lm.model.get_submodule(lm.layout.embedding)
    embedding.register_forward_pre_hook(lambda _, args: shapes.append(tuple(args[0].shape)))
    assert close(score_rows(lm, rows), alone)
    assert shapes == [(1, 3)]


SYSTEM = tuple(range(60, 84))
"""What every prompt of a chat begins with."""
EVERYDAY = ("gptj", "gemma2", "bloom")


@pytest.mark.parametrize("family", [f if f in EVERYDAY else pytest.param(f, marks=pytest.mark.long) for f in FAMILIES])
def test_a_long_common_beginning_runs_once(family: str, tiny: Make) -> None:
    lm = tiny(family)
    own = [(5, 6, 7, 8), (5, 6, 9), (10, 11, 12, 13, 14, 15), (20, 21)]
    rows = [Row((*SYSTEM, *ids), len(SYSTEM) + 1) for ids in own]
    alone = [score_rows(lm, [row])[0] for row in rows]
    tokens: list[int] = []
    with lm.block(0).register_forward_hook(lambda _, __, output: tokens.append(size_of(output))):
        found = score_rows(lm, rows)
    for x, y in zip(found, alone, strict=True):
        assert x.logp == pytest.approx(y.logp, abs=2e-4)
        assert x.pred == y.pred
    assert tokens[0] == (len(SYSTEM) if remembers(lm) else 4 * (len(SYSTEM) + 5))
    assert sum(tokens) <= (len(SYSTEM) + 4 * 5 if remembers(lm) else tokens[0])


def size_of(output: Any) -> int:
    """Tokens in a block's output."""
    states: Tensor = output[0] if isinstance(output, tuple) else output
    return states.shape[:-1].numel()


def test_families_run_as_few_tokens_as_any_cut_into_runs_would() -> None:
    draw = random.Random(0)
    for _ in range(20):
        texts = {(1, 2, 3, *(draw.randrange(2) for _ in range(draw.randint(1, 6)))) for _ in range(8)}
        inputs = sorted(texts)
        limits = [draw.randint(1, len(ids) - 1) for ids in inputs]

        def saved(cut: list[range], inputs: Any = inputs, limits: Any = limits) -> int:
            return sum(
                min(n_common([inputs[i] for i in run]), *(limits[i] for i in run)) * (len(run) - 1)
                for run in cut
                if len(run) > 1
            )

        n = len(inputs)
        edges = [[0, *between, n] for k in range(n) for between in combinations(range(1, n), k)]
        most = max(saved([range(a, b) for a, b in pairwise(cut)]) for cut in edges)
        families = alike(inputs, limits, 1000)
        assert [i for _, members in families for i in members] == list(range(n))
        assert sum(start * (len(members) - 1) for start, members in families) in (most, 0)
        assert max(start for start, _ in families) > 0 or most < WORTH * sum(map(len, inputs))


def test_running_out_of_memory_halves_the_batch(tiny: Make) -> None:
    lm = tiny(n_layers=2)
    expected = score(lm, ITEMS)
    sizes: list[int] = []

    def room_for(tokens: int) -> Any:
        def tight(_: object, args: tuple[Tensor]) -> None:
            sizes.append(args[0].numel())
            if sizes[-1] > tokens:
                raise torch.OutOfMemoryError("no room")

        return lm.model.get_submodule(lm.layout.embedding).register_forward_pre_hook(tight)

    handle = room_for(40)
    assert close(score(lm, ITEMS), expected)
    assert max(sizes) > 40
    handle.remove()
    room_for(0)
    with pytest.raises(torch.OutOfMemoryError):
        score(lm, ITEMS)


def test_progress_counts_up_to_all(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    rows = [encode(lm.tokenizer, *item) for item in ITEMS]
    seen: list[tuple[int, int]] = []
    score_rows(lm, rows, max_batch_tokens=40, on_progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1]
    assert seen == sorted(seen)


# --- tokenizers ----------------------------------------------------------------------------------------------------


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """One whose tokens reach across spaces, so that a prompt's last token may hold the answer's first."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tok.train_from_iterator([t for text in TEXT for t in [text] * 3], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, eos_token="</s>")


@pytest.mark.parametrize("kind", ["gpt", "bos", "eos", "piece", "merging"])
def test_prompt_and_target_read_as_written_in_every_tokenizer(kind: str) -> None:
    tok = merging_tokenizer() if kind == "merging" else tokenizer(kind)
    lm = LM(tiny_model("gpt2", n_layers=1), tok)
    items = [*ITEMS[:2], ("The capital of", "France")] if kind == "piece" else ITEMS  # its alphabet is small
    found = score(lm, items)
    for (prompt, target), s in zip(items, found, strict=True):
        ids = encode(tok, prompt).ids
        assert len(s.target) > 0
        text = tok.decode([*ids, *s.target], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        if s.boundary_merge:  # answers that had to be tokenised alone may have lost the space before them
            assert text.replace(" ", "") == (prompt + target).replace(" ", "")
        else:
            assert text == prompt + separator_between(prompt, target) + target
        assert "\ufffd" not in text
    reaching = kind in ("piece", "merging")  # these two do not break text at spaces
    assert any(s.boundary_merge for s in found) == reaching


def test_the_pad_token_is_of_no_account() -> None:
    def scores(pad: str | None, items: list[tuple[str, str]] = ITEMS) -> list[TokenScore]:
        tok = copy.deepcopy(tokenizer("gpt"))
        tok.pad_token = pad
        return score(LM(tiny_model("gpt2", n_layers=1), tok), items)

    odd = [*ITEMS, ("It ended </s> and I read", "</s> twice")]
    assert scores("</s>", odd) == scores("<unk>", odd) == scores(None, odd)


def test_a_separator_for_scripts_without_spaces(tiny: Make) -> None:
    lm = tiny(n_layers=1)
    assert lm.tokenizer.decode(score(lm, [("東京", "東京")])[0].target) == "東京"
    assert lm.tokenizer.decode(score(lm, [("東京", "東京")], separator=" ")[0].target) == " 東京"


def test_an_empty_target_is_refused(tiny: Make) -> None:
    with pytest.raises(InvalidEdit, match="the target after 'I read' is empty"):
        score(tiny(n_layers=1), [("I read", " ")])


@pytest.mark.parametrize("fails", [False, True])
def test_the_model_is_left_as_it_was(
    fails: bool, tiny: Make, untouched: Callable[[LM], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = tiny(n_layers=1)
    lm.model.train()
    next(lm.model.parameters()).requires_grad_(False)
    look = untouched(lm)
    if fails:
        monkeypatch.setattr("retcon.evaluation.score.logits_at", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            score(lm, ITEMS)
    else:
        score(lm, ITEMS)
    assert untouched(lm) == look
