"""The scope in which the model's own forward runs blocks and tokens from some on."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retcon.lm.forward import Inputs, Places
from retcon.lm.model import LM
from retcon.lm.replay.fused import OWN_CODE_ON, fused
from retcon.lm.replay.states import Replayable
from retcon.lm.scopes import method_as
from retcon.lm.site import SiteName

if TYPE_CHECKING:
    from transformers import Cache


@contextmanager
def replaying(
    lm: LM,
    state: Replayable,
    *,
    cache: "Cache | None" = None,
    ends: Int[Tensor, " n"] | None = None,
    planned: bool = False,
) -> Iterator[Inputs]:
    """Inside, the model runs from block `state.first` and from column 0 on; gives what `run` and `logits_at` take.

    Hooks and places count columns. Of the blocks below, only the output of `state.first - 1` can be hooked.

    Args:
        cache: `state.cache(lm)`, from a caller who reads the tokens' attention keys and values from it afterwards.
        ends: let the last block compute these tokens alone (`flat_places`), for a caller who reads no other of its
            outputs.
        planned: the shapes are those of many passes, so that a card's plans for them are worth making.
    """
    with _blocks_below_answer(lm, state), ExitStack() as stack:
        if lm.device.type not in OWN_CODE_ON:
            stack.enter_context(fused(lm, state.first))
        if ends is not None and state.first < lm.n_layers:
            _end_at(lm, state, ends, stack)
        rows, columns = state.states.shape[:2]
        yield Inputs((rows, columns), state.arguments(lm, cache or state.cache(lm)), state.first, planned)


@contextmanager
def running_at(
    places: Int[Tensor, " n"],
    entries: Sequence[nn.Module],
    end: nn.Module,
    fill_values: Float[Tensor, "rows columns w"],
) -> Iterator[None]:
    """Inside, modules that treat every token by itself run at some tokens only.

    Args:
        places: which tokens, as flat indices, row * columns + column.
        entries: modules that read the input.
        end: the module whose output counts; an entry, or what the entries' outputs lead to.
        fill_values: what the end gives elsewhere; written over at `places`.
    """
    shapes: list[tuple[int, ...]] = []  # OPT's MLP sees (rows x columns, width)
    at = places.to(fill_values.device)

    def narrow(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        shapes.append(args[0].shape[:-1])
        return (args[0].reshape(-1, args[0].shape[-1]).index_select(0, at), *args[1:])

    def widen(_: nn.Module, __: tuple[Any, ...], output: Tensor) -> Tensor:
        whole = fill_values.view(-1, output.shape[-1]).index_copy_(0, at, output)
        return whole.view(*shapes[-1], output.shape[-1]).clone()  # Falcon's block adds to it in place

    with ExitStack() as stack:
        for module in entries:
            stack.enter_context(module.register_forward_pre_hook(narrow))
        stack.enter_context(end.register_forward_hook(widen))
        yield


def mlp_entries(lm: LM, layer: int) -> list[nn.Module]:
    """Return the modules that read the input of a block's MLP; one where the matrices are fused."""
    kinds: tuple[SiteName, ...] = ("up_proj", "gate_proj")
    return list(dict.fromkeys(lm.site(layer, kind).module for kind in kinds if lm.has(layer, kind)))


def flat_places(places: Places, columns: int) -> Int[Tensor, " n"]:
    """Return the places as flat indices, row * columns + column, ascending, each once. The CPU waits for it."""
    rows, at = places
    return (rows * columns + at).unique()


def _end_at(lm: LM, state: Replayable, at: Int[Tensor, " n"], stack: ExitStack) -> None:
    """Run the last block's out-projection and MLP at these places only; elsewhere they give 0, which nothing reads."""
    layer = lm.n_layers - 1
    out = lm.site(layer, "o_proj").module
    device = lm.site(layer, "o_proj").device
    parts = [([out], out)]
    if lm.has(layer, "down_proj"):
        parts.append((mlp_entries(lm, layer), lm.site(layer, "down_proj").module))
    for entries, end in parts:
        stack.enter_context(running_at(at, entries, end, torch.zeros_like(state.states, device=device)))


@contextmanager
def _blocks_below_answer(lm: LM, state: Replayable) -> Iterator[None]:
    """Blocks below the first that runs return the recorded states at once; hooks on them still work."""
    states = state.states
    answer = states if lm.block_outputs is None else (states, *[None] * (lm.block_outputs - 1))
    with ExitStack() as stack:
        for layer in range(state.first):
            stack.enter_context(method_as(lm.block(layer), "forward", lambda *_, **__: answer))
        if state.first == 0:  # no block to answer: what enters the first one is exchanged
            hook = _exchanging_input(states)
            stack.enter_context(lm.block(0).register_forward_pre_hook(hook, with_kwargs=True))
        yield


def _exchanging_input(states: Tensor) -> Callable[..., Any]:
    def exchange(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return ((states, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": states})

    return exchange
