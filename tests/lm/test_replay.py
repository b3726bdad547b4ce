"""Replay against plain forwards: every architecture, ragged rows, sites of every kind."""

from collections.abc import Callable, Mapping

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from retcon.lm.forward import Hook, Point, adding, logits_at, run
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.lm.replay import ReplayState, capture_states, replaying
from retcon.locate.tracing.packing import PartialModule
from tests.conftest import FAMILIES, FLOAT32_INSIDE


def tolerance(family: str) -> dict[str, float]:
    """Attention of GPT-J and gemma 2 computes in float32 whatever the weights are."""
    close = 2e-5 if family in FLOAT32_INSIDE else 1e-10
    return dict(rtol=close, atol=close)


def ragged_rows(seed: int = 0) -> list[Row]:
    """Rows longer than the tiny models' sliding window of 8, of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    return [Row(tuple(torch.randint(3, 400, (n,), generator=generator).tolist()), n) for n in (19, 7, 23, 12, 4)]


STARTS = [11, 0, 17, 3, 3]


def replayed(
    lm: LM, state: ReplayState, places: tuple[Tensor, Tensor], hooks: Mapping[Point, Hook] | None = None
) -> Tensor:
    with replaying(lm, state) as inputs:
        return logits_at(lm, inputs, places, hooks)


def both(
    lm: LM, points: list[Point], where: list[int], first: int, *, starts: list[int] = STARTS
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits at the live tokens, and the gradient of their square sum by the added vectors; plainly and replayed."""
    rows = ragged_rows()
    generator = torch.Generator().manual_seed(1)
    d = lm.site(0, "down_proj").weight.shape[0]
    everyone, out = torch.arange(len(rows)), []
    at = [(i, t) for i, (r, s) in enumerate(zip(rows, starts, strict=True)) for t in range(s, len(r.ids))]
    row_of, token = torch.tensor(at).T
    start = torch.tensor(starts)
    base = [torch.randn(len(rows), d, generator=generator, dtype=torch.float64) for _ in points]
    with lm.frozen_eval():
        frozen, _ = capture_states(lm, rows, starts, first, max_batch_tokens=40)
        for live in (False, True):
            vectors = [v.clone().to(lm.dtype).requires_grad_() for v in base]
            offset = start if live else torch.zeros_like(start)
            hooks = {p: adding(everyone, torch.tensor(where) - offset, v) for p, v in zip(points, vectors, strict=True)}
            wanted = row_of, token - offset[row_of]
            logits = replayed(lm, frozen, wanted, hooks) if live else logits_at(lm, pad(rows), wanted, hooks)
            gradients = torch.autograd.grad((logits**2).sum(), vectors)
            out.append((logits.detach(), torch.stack(gradients)))
    return *out[0], *out[1]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    ("points", "first"),
    [
        ([Point(0, "block")], 1),
        ([Point(2, "block")], 3),
        ([Point(3, "block")], 4),
        ([Point(0, "attn")], 0),
        ([Point(1, "mlp"), Point(3, "mlp")], 1),
        ([Point(1, "attn"), Point(1, "mlp")], 1),
    ],
    ids=lambda x: str(x) if isinstance(x, int) else "+".join(f"{p.tensor}{p.layer}" for p in x),
)
def test_replay_equals_the_plain_forward(family: str, points: list[Point], first: int, tiny: Callable[..., LM]) -> None:
    logits, gradient, replayed, regradient = both(tiny(family), points, STARTS, first)
    close = tolerance(family)
    assert_close(replayed, logits, **close)
    assert_close(regradient, gradient, rtol=close["rtol"], atol=close["atol"] * float(gradient.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_can_be_selected_and_all_tokens_can_be_live(family: str, tiny: Callable[..., LM]) -> None:
    lm, rows = tiny(family), ragged_rows()
    chosen = [3, 0, 3]
    with lm.frozen_eval(), torch.no_grad():
        for starts in (STARTS, [0] * len(rows)):
            frozen, read = capture_states(lm, rows, starts, 2, {Point(1, "block"): [12, None, 17, 4, None]})
            seen: list[Tensor] = []
            wanted = torch.arange(3), torch.tensor([len(rows[i].ids) - 1 - starts[i] for i in chosen])
            logits = replayed(lm, frozen.select(chosen), wanted, {Point(3, "block"): seen.append})
            for j, i in enumerate(chosen):
                plain = lm.model(torch.tensor([rows[i].ids]), output_hidden_states=True)
                assert_close(logits[j], plain.logits[0, -1], **tolerance(family))
            assert seen[0].shape[1] == max(len(rows[i].ids) - starts[i] for i in chosen)
            states = lm.model(torch.tensor([rows[3].ids]), output_hidden_states=True).hidden_states
            assert_close(read[Point(1, "block")][2], states[2][0, 4], **tolerance(family))


def test_nothing_is_left_behind_even_on_failure(tiny: Callable[..., LM], untouched: Callable[[LM], object]) -> None:
    lm, rows = tiny("gptj"), ragged_rows()
    before = untouched(lm)

    def fail(_: Tensor) -> None:
        raise RuntimeError("stop here")

    with lm.frozen_eval():
        frozen, _ = capture_states(lm, rows, STARTS, 2)
        for first_tap in (Point(1, "block"), Point(3, "mlp")):
            with pytest.raises(RuntimeError, match="stop here"), replaying(lm, frozen) as inputs:
                run(lm, inputs, {first_tap: fail})
    assert untouched(lm) == before
    assert all("forward" not in m.__dict__ for m in lm.model.modules())


def test_a_point_below_the_live_blocks_is_refused(tiny: Callable[..., LM]) -> None:
    lm = tiny("llama")
    with lm.frozen_eval():
        frozen, _ = capture_states(lm, ragged_rows(), STARTS, 2)
        with pytest.raises(ValueError, match="does not run"), replaying(lm, frozen) as inputs:
            run(lm, inputs, {Point(1, "mlp"): lambda _: None})


@pytest.mark.parametrize("family", FAMILIES)
def test_a_module_run_partly_gives_what_is_known_elsewhere(family: str, tiny: Callable[..., LM]) -> None:
    """With its own outputs as the known ones nothing changes, and it has seen the live places only; with others, those
    stand at the other places."""
    lm, row, layer = tiny(family), Row(tuple(range(3, 10)), 7), 2
    everywhere = torch.zeros(7).long(), torch.arange(7)
    live = torch.tensor([[True, False, True, False, False, True, True]])
    down = lm.site(layer, "down_proj").module
    entries = [lm.site(layer, "up_proj").module]
    if lm.layout.gate_proj and (gate := lm.site(layer, "gate_proj").module) is not entries[0]:
        entries.append(gate)
    with lm.frozen_eval(), torch.no_grad():
        frozen, _ = capture_states(lm, [row], [0], 1)
        outputs: list[Tensor] = []
        point = Point(layer, "mlp")
        plain = replayed(lm, frozen, everywhere, {point: outputs.append})
        ran: list[int] = []
        handle = entries[0].register_forward_hook(lambda _, __, out: ran.append(out.numel() // out.shape[-1]))
        with PartialModule(live, entries, down, outputs[0]).running():
            same = replayed(lm, frozen, everywhere)
        handle.remove()
        with PartialModule(live, entries, down, 0 * outputs[0]).running():
            other = replayed(lm, frozen, everywhere, {point: outputs.append})
    assert ran == [4]
    assert_close(same, plain, **tolerance(family))
    assert_close(outputs[1], outputs[0] * live[:, :, None], **tolerance(family))
    assert not torch.equal(other, plain)


def test_a_replay_that_ends_late_leaves_what_came_after_it(tiny: Callable[..., LM]) -> None:
    """An interrupted pass is cleared up by the scope around it; its own end may come during another replay."""
    lm = tiny("llama")
    block = lm.block(0)
    state = ReplayState(1, torch.zeros(1, 3, lm.config.hidden_size, dtype=lm.dtype), (), (), (0,), (3,))
    late, later = replaying(lm, state), replaying(lm, state)
    late.__enter__()
    block.__dict__.pop("forward")
    late.__exit__(None, None, None)
    assert "forward" not in vars(block)
    late = replaying(lm, state)
    late.__enter__()
    block.__dict__.pop("forward")
    later.__enter__()
    now = block.forward
    late.__exit__(None, None, None)
    assert block.forward is now
    later.__exit__(None, None, None)
    assert "forward" not in vars(block)
