"""The loop: per-edit early stop, mini-batches, what happens to NaN, and Adam row by row."""

from functools import partial

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting, NonFinite, RetconWarning
from retcon.lm.forward import answer_log_probs
from retcon.lm.prompts import Row
from retcon.training.descent import Schedule, Step, accumulate, descend, losses_now, shares, stepping
from retcon.training.nodes import Nodes, RowAdam, RowState
from retcon.training.objective import AnswerLoss, answer_nll, answer_rows, own_answer_tokens
from retcon.training.parts import TrainedRows, attached, changes, fresh

EDITS = [Edit("{} is", f"S{i}", "so", id=str(i)) for i in range(6)]


def quadratic(values, targets):
    """A toy: edit e's loss is (values - targets[e])^2."""
    return lambda items: ((values - targets[list(items)]) ** 2).reshape(len(items), -1).sum(1)


class Toy:
    """An AnswerLoss in miniature."""

    def __init__(self, values, targets):
        self.losses = quadratic(values, targets)
        self.rows = [Row(tuple(range(i + 2)), 1) for i in range(len(targets))]

    def __call__(self, items):
        return self.losses(items)

    def chunks(self, items):
        return [list(items)]


def run(values, targets, *, lr=0.1, **schedule):
    toy, schedule = Toy(values, targets), Schedule(**schedule)
    step = stepping(toy, torch.optim.SGD([values], lr=lr), schedule, "per_edit")
    return descend(EDITS[: len(targets)], step, partial(losses_now, toy), lambda: [values], schedule)


def test_an_edit_below_its_threshold_leaves_the_gradient():
    values = torch.zeros(2, requires_grad=True)
    targets = torch.tensor([[0.01, 0.0], [0.0, 2.0]])  # the first is reached from the start
    ended = run(values, targets, epochs=1, stop_loss=1e-2)
    assert_close(values.detach(), torch.tensor([0.0, 0.1 * 2 * 2.0 / 2]))  # mean over both, the first weighing nothing
    assert ended.steps == (0, 1)


def test_an_edit_that_rises_again_comes_back():
    values = torch.zeros(1, requires_grad=True)
    ended = run(values, torch.tensor([[0.05], [1.0]]), epochs=40, stop_loss=1e-2, lr=0.2)
    assert 0 < ended.steps[0] < ended.steps[1] == 40


def test_it_ends_when_all_are_reached_and_says_so():
    values = torch.zeros(1, requires_grad=True)
    ended = run(values, torch.tensor([[1.0], [1.05]]), epochs=200, stop_loss=1e-2)
    assert set(ended.stopped) == {"reached"}
    assert max(ended.loss) < 1e-2
    assert max(ended.steps) < 40
    none = run(torch.zeros(1, requires_grad=True), torch.tensor([[0.0]]), epochs=5)  # reached at the start
    assert none.steps == (0,)


def test_a_batch_that_is_left_out_whole_counts_for_none_of_its_edits():
    """One edit is above the threshold, the mean is not."""
    values = torch.zeros(1, requires_grad=True)
    ended = run(values, torch.tensor([[0.1], [0.5]]), epochs=6, stop_loss=0.2, skip="batch")
    assert not values.any()
    assert ended.steps == (0, 0)
    assert ended.stopped == ("reached", "steps")


def test_a_batch_that_is_not_left_out_counts_for_all_of_its_edits():
    values = torch.zeros(1, requires_grad=True)
    ended = run(values, torch.tensor([[0.1], [1.0]]), epochs=3, stop_loss=0.2, skip="batch", lr=0.01)
    assert ended.steps == (3, 3)
    assert ended.stopped == ("reached", "steps")


@pytest.mark.parametrize(("batch_size", "epochs"), [(None, 1), (2, 1), (1, 6)])
def test_one_batch_that_is_left_out_is_the_end(batch_size, epochs):
    """Of several, drawn anew in each epoch, another may be trained."""
    done: list[int] = []
    schedule = Schedule(epochs=6, stop_loss=0.2, skip="batch", batch_size=batch_size)
    left_out = Step({0: 0.01, 1: 0.25})
    descend(
        EDITS[:2], lambda _: left_out, lambda: left_out.losses, list, schedule, progress=lambda n, _: done.append(n)
    )
    assert done[-1] == epochs


def test_what_is_reported_are_the_losses_with_the_final_values():
    values = torch.zeros(3, requires_grad=True)
    targets = torch.eye(3)
    ended = run(values, targets, epochs=3, stop_loss=0.0)
    assert_close(torch.tensor(ended.loss), quadratic(values.detach(), targets)(range(3)))
    assert set(ended.stopped) == {"steps"}


@pytest.mark.parametrize("size", [1, 2, 4, 6])
def test_mini_batches_cover_every_edit_once_an_epoch(size):
    seen: list[int] = []

    def prepare(items):
        seen.extend(items)
        return Step(dict.fromkeys(items, 1.0), items)

    descend(EDITS, prepare, lambda: dict.fromkeys(range(6), 1.0), list, Schedule(epochs=2, batch_size=size), seed=3)
    assert sorted(seen[:6]) == sorted(seen[6:]) == list(range(6))
    if size < 6:
        assert seen[:6] != seen[6:]  # drawn anew


def test_pieces_of_a_batch_give_the_gradient_of_the_whole():
    values, targets = torch.zeros(2, requires_grad=True), torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    losses = quadratic(values, targets)
    share = shares([Row((0,) * (i + 2), 1) for i in range(5)], range(5), "per_token")
    assert_close(share.sum(), torch.tensor(1.0, dtype=torch.float64))
    found = accumulate(losses, [[0, 3], [1], [2, 4]], lambda i, loss: float(share[i]))
    pieces, values.grad = values.grad, None
    (losses(range(5)) @ share.float()).backward()
    assert_close(pieces, values.grad)
    assert_close(torch.tensor([found[i] for i in range(5)]), losses(range(5)).detach())


def test_reductions_differ_as_soon_as_answers_differ_in_length():
    rows = [Row((0, 1), 1), Row((0, 1, 2, 3), 1)]
    assert shares(rows, [0, 1], "per_edit").tolist() == [0.5, 0.5]
    assert shares(rows, [0, 1], "per_token").tolist() == [0.25, 0.75]
    assert shares(rows, [1], "per_token").tolist() == [1.0]


def test_a_loss_that_overflows_gives_back_the_last_finite_values():
    values = torch.zeros(1, requires_grad=True)
    losses = iter([1.0, 2.0, float("inf")])

    def prepare(items):
        return Step({0: next(losses)}, items, lambda: values.data.add_(1))

    with pytest.warns(RetconWarning, match=r"edit '0' \('S0'\): the loss became inf"):
        ended = descend(EDITS[:1], prepare, lambda: {0: values.item()}, lambda: [values], Schedule())
    assert ended.stopped == ("non_finite",)
    assert values.item() == 1.0  # where the last finite loss, 2.0, was seen
    assert ended.loss == (1.0,)


def test_a_loss_that_overflows_by_the_last_step_gives_back_the_last_finite_values():
    values = torch.zeros(1, requires_grad=True)
    with pytest.warns(RetconWarning, match=r"edit '0' \('S0'\): the loss became inf after 1 steps"):
        ended = run(values, torch.tensor([[1.0]]), epochs=1, lr=1e30)
    assert (ended.stopped, ended.loss) == (("non_finite",), (1.0,))
    assert values.item() == 0.0


def test_values_that_grow_between_epochs_are_given_back_too():
    values = [torch.zeros(1, requires_grad=True), torch.zeros((), requires_grad=True)]
    losses = iter([1.0, 2.0, float("inf")])

    def grow(epoch):
        if epoch:
            values[0] = torch.cat([values[0].detach(), torch.zeros(1)]).requires_grad_()

    def move():
        for tensor in values:
            tensor.data += 1

    with pytest.warns(RetconWarning, match="the loss became inf"):
        descend(
            EDITS[:1],
            lambda items: Step({0: next(losses)}, items, move),
            lambda: {0: 2.0},
            lambda: values,
            Schedule(),
            before_epoch=grow,
        )
    assert values[0].tolist() == [1.0, 0.0, 0.0]  # as the second epoch found them; the third added a row
    assert values[1].item() == 1.0


def test_a_model_without_finite_probabilities_is_refused():
    with pytest.raises(NonFinite, match=r"edit '0' \('S0'\).*before any step"):
        descend(EDITS[:1], lambda items: Step({0: float("nan")}), list, list, Schedule())
    with pytest.raises(NonFinite, match=r"edit '0' \('S0'\).*before any step"):
        descend(EDITS[:1], lambda items: Step({0: 1.0}), lambda: {0: float("nan")}, list, Schedule(epochs=0))


@pytest.mark.parametrize("bad", [dict(epochs=-1), dict(stop_loss=-0.1), dict(batch_size=0)])
def test_schedules_are_checked(bad):
    with pytest.raises(InvalidSetting, match=next(iter(bad))):
        Schedule(**bad)


# --- the loss ----------------------------------------------------------------------------------------------------


def test_the_loss_is_the_mean_over_answer_tokens(tiny, edits):
    lm = tiny("llama")
    rows = answer_rows(lm, edits)
    found = answer_nll(lm, rows)
    for row, loss in zip(rows, found, strict=True):
        logits = lm.model(torch.tensor([row.ids])).logits[0].log_softmax(-1)
        tokens = torch.tensor(row.target_ids)
        wanted = -logits[row.n_prompt - 1 : len(row.ids) - 1].gather(1, tokens[:, None]).mean()
        assert_close(loss, wanted, rtol=1e-6, atol=1e-8)
    assert {len(r.target_ids) for r in rows} != {1}


def test_own_answers_are_the_most_likely_tokens(tiny, edits):
    lm = tiny("gpt2")
    rows = answer_rows(lm, edits)
    said = own_answer_tokens(lm, rows)
    assert [len(s) for s in said] == [len(r.target_ids) for r in rows]
    flat = answer_log_probs(lm, rows).argmax(-1).tolist()
    assert [t for s in said for t in s] == flat
    assert answer_nll(lm, rows, said).sum() < answer_nll(lm, rows).sum()


def test_an_edit_without_a_true_answer_is_named(tiny, edits):
    with pytest.raises(InvalidEdit, match=r"'lodz'.*no target_true.*ask for another answer: answer='target_new'"):
        answer_rows(tiny("llama"), edits, "target_true")


# --- Adam, row by row ---------------------------------------------------------------------------------------------


def test_rows_of_adam_agree_with_torchs(randn):
    a = randn(4, 3).requires_grad_()
    b = a.detach().clone().requires_grad_()
    theirs, mine, state = torch.optim.Adam([a], lr=0.1), RowAdam(learning_rate=0.1), RowState.fresh(b)
    for _ in range(5):
        g = randn(4, 3)
        a.grad = g.clone()
        theirs.step()
        mine.step(b, g, state, torch.ones(4, dtype=torch.bool))
    assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_row_that_is_not_stepped_neither_moves_nor_ages(randn):
    b, state, adam = randn(2, 3), None, RowAdam(learning_rate=0.1)
    state = RowState.fresh(b)
    both, first = torch.tensor([True, True]), torch.tensor([True, False])
    adam.step(b, randn(2, 3), state, both)
    rest = b[1].clone()
    adam.step(b, randn(2, 3), state, first)
    assert torch.equal(b[1], rest)
    assert state.steps.tolist() == [2.0, 1.0]


def test_nodes_keep_their_change_when_others_join(tiny, randn):
    lm = tiny("gpt2")
    nodes = Nodes([lm.site(0, "up_proj")], "rows")
    nodes.add(torch.tensor([3, 1]))
    with torch.no_grad():
        nodes.tensors[0] += 1.0
        nodes.tensors[1] += 2.0
    state = RowState.fresh(nodes.tensors[0])
    state.steps[:] = 5
    before = nodes.tensors
    nodes.add(torch.tensor([1, 3]))  # both are here
    assert nodes.tensors is before
    nodes.add(torch.tensor([1, 9]))
    assert nodes.index.tolist() == [3, 1, 9]
    assert nodes.tensors[0].sum(1).tolist() == [32.0, 32.0, 0.0]
    assert nodes.tensors[1].tolist() == [2.0, 2.0, 0.0]
    kept = nodes.chosen(torch.tensor([1, 9])) & nodes.chosen(torch.tensor([3, 1]))
    assert state.grown(nodes.tensors[0], kept).steps.tolist() == [0.0, 5.0, 0.0]
    assert state.grown(nodes.tensors[0], torch.ones(3, dtype=torch.bool), 7.0).steps.tolist() == [5.0, 5.0, 7.0]


# --- what else the engine must carry ------------------------------------------------------------------------------


def test_a_box_around_the_start_is_one_projection_after_each_step(tiny, edits):
    """FT-L's constraint (T31), with nothing but `after_step`."""
    lm = tiny("llama", torch.float32)
    site, rows = lm.site(2, "down_proj"), answer_rows(lm, edits)
    one = TrainedRows(site, torch.arange(32), fresh(site, 32, 64))
    loss, schedule = AnswerLoss(lm, rows), Schedule(epochs=8)

    def project():
        with torch.no_grad():
            one.values.clamp_(-1e-3, 1e-3)

    with lm.frozen_eval(), attached([one]):
        step = stepping(loss, torch.optim.Adam([one.values], lr=5e-4), schedule, "per_edit")
        descend(edits, step, partial(losses_now, loss), lambda: [one.values], schedule, after_step=project)
    largest = changes([one])[site.name][0].values().abs().max()
    assert_close(largest, torch.tensor(1e-3))
