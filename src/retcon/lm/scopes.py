"""Scopes of a model, and one thread at a time.

A scope ends when its `with` block does, or, where an interrupt kept its `__exit__` from running, when the scope object
is gone: the LM has only a weak reference to it, and its next call restores what the scope has changed.
"""

import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import nn

from retcon.errors import ModelBusy
from retcon.lm.hooks import Hung

if TYPE_CHECKING:
    from retcon.attachment import Attachment
    from retcon.lm.model import LM

BUSY_SECONDS = 30.0
"""How long a thread waits for another one."""


class Turn:
    """The turn of the thread that enters it, for as long as this object lives or until it is given up."""

    def __init__(self, of: "Turns") -> None:
        self.of = of
        self.thread: int | None = None

    def __enter__(self) -> "Turn":
        self.thread = threading.get_ident()
        self.of.take(self)
        return self

    def __exit__(self, failed: object = None, *_: object) -> None:
        if failed is not None:
            self.of.interrupted = True
        self.of.give_up(self)


class Turns:
    """Who may change a model now: the thread that has the oldest turn, and further ones inside it.

    There is no lock that an interrupt could leave locked: turns are in a list, whose single operations are atomic, and
    one that is gone does not count.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        self._queue: list[weakref.ref[Turn]] = []
        self.interrupted = False
        """Whether an exception has ended a turn since the LM last looked: scopes may be waiting to be collected."""

    def take(self, turn: Turn) -> None:
        """Wait until no other thread has an older turn.

        Raises:
            ModelBusy: another thread still has one after `BUSY_SECONDS`.
        """
        self._queue.append(weakref.ref(turn))
        deadline = time.monotonic() + BUSY_SECONDS
        while self._owner() != turn.thread:
            if time.monotonic() > deadline:
                self.give_up(turn)
                raise ModelBusy(
                    f"{self.what}: another thread is changing it or is inside a scope (lm.edited, a propose), and was "
                    f"not done after {BUSY_SECONDS:.0f} s. Threads take turns on one LM; load a second copy of the "
                    "model to work on both at once."
                )
            time.sleep(0.01)

    def give_up(self, turn: Turn) -> None:
        """End a turn."""
        with suppress(ValueError):
            self._queue.remove(weakref.ref(turn))

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn."""
        return self._owner() == threading.get_ident()

    def _owner(self) -> int | None:
        """Return the thread of the oldest turn that is still there."""
        for reference in list(self._queue):
            if (turn := reference()) is not None:
                return turn.thread
            with suppress(ValueError):
                self._queue.remove(reference)
        return None


_NOT_BEGUN = sys.maxsize
"""Serial number of a scope that nobody is inside."""


class Scope:
    """A stretch of code during which the model is otherwise than before, and the turn of the thread that enters it.

    Scopes of one LM end in the reverse order of their beginning: one that ends takes those with it that began inside it
    and were kept by an interrupt from ending themselves. A scope begins when it is entered, and can be entered again
    once it has ended.
    """

    made_by: ClassVar[str] = "scope"
    """The method of `LM` that returns it."""

    def __init__(self, lm: "LM") -> None:
        self._lm = lm
        self._turn: Turn | None = None
        self.serial = _NOT_BEGUN
        """Scopes that began later have larger ones."""

    def __enter__(self) -> "LM":
        """Begin the scope.

        Raises:
            ModelBusy: it is active already, or another thread has the model.
        """
        if self._turn is not None:
            raise ModelBusy(
                f"this scope of {self._lm.turns.what} is active, and a scope can be entered again only once it has "
                f"ended; make another one: lm.{self.made_by}(...)"
            )
        self._turn = Turn(self._lm.turns)
        try:
            self._turn.__enter__()
            self.serial = next(self._lm.serials)
            self.begin()
        except BaseException:
            self.__exit__(BaseException)
            raise
        return self._lm

    def __exit__(self, failed: object = None, *_: object) -> None:
        try:
            if self.serial != _NOT_BEGUN:
                self._lm.leave(self.serial)
        finally:
            turn, self._turn, self.serial = self._turn, None, _NOT_BEGUN
            if turn is not None:
                turn.__exit__(failed)

    def begin(self) -> None:
        """Make the model as this scope wants it; a plain scope ends the others inside it, and nothing more."""


class Edited(Scope):
    """The model with deltas while the scope lasts."""

    made_by = "edited"

    def __init__(self, lm: "LM", deltas: "tuple[Attachment, ...]", other_base: bool) -> None:
        super().__init__(lm)
        self._deltas, self._other_base = deltas, other_base

    def begin(self) -> None:
        for delta in self._deltas:
            self._lm.push(delta, self._other_base, weakref.ref(self))


class WithoutDeltas(Scope):
    """The base's own weights while the scope lasts."""

    made_by = "without_deltas"

    def begin(self) -> None:
        self._lm.hide(weakref.ref(self))


@contextmanager
def plain_modes() -> Iterator[None]:
    """Leave the caller's inference mode, in which nothing is trained, and its autocast, which makes other numbers."""
    with ExitStack() as modes:
        if torch.is_inference_mode_enabled():
            modes.enter_context(torch.inference_mode(False))
        for device_type in ("cpu", "cuda", "mps", "xpu"):
            if torch.is_autocast_enabled(device_type):
                modes.enter_context(torch.autocast(device_type, enabled=False))
        yield


class FrozenEval(Scope):
    """Eval mode, frozen parameters and plain modes for a while; the outermost remembers how the model was."""

    made_by = "frozen_eval"

    def __init__(self, lm: "LM") -> None:
        super().__init__(lm)
        self._modes = ExitStack()

    def begin(self) -> None:
        self._lm.freeze(weakref.ref(self))
        self._modes.enter_context(plain_modes())

    def __exit__(self, failed: object = None, *_: object) -> None:
        self._modes.close()
        super().__exit__(failed)


class SavedFlags:
    """How a model was before a scope froze it: modes, flags, forwards and hooks of every module."""

    def __init__(self, model: nn.Module, scope: "weakref.ref[Scope]") -> None:
        self.scope = scope
        self._modules = [(m, m.training, m.__dict__.get("forward"), _hooks(m)) for m in model.modules()]
        self._parameters = [(p, p.requires_grad) for p in model.parameters()]

    def restore(self) -> None:
        """Put back modes and flags, and what an interrupted pass of retcon's has left: hooks, forwards set aside.

        What other code has hung on the modules stays. Repeatable.
        """
        for module, training, forward, hooks in self._modules:
            module.training = training
            if _is_ours(module.__dict__.get("forward")):
                if forward is not None:
                    module.forward = forward
                else:
                    module.__dict__.pop("forward", None)
            for table, known in hooks:
                for key, hook in list(table.items()):
                    if key not in known and _is_ours(hook):
                        for each in (*_notes(module), table):
                            each.pop(key, None)
        for parameter, trainable in self._parameters:
            parameter.requires_grad_(trainable)


def _is_ours(function: Any) -> bool:
    """Return whether a pass of retcon's left it; what attachments have hung there is the ledger's business."""
    if isinstance(function, Hung):
        return False
    return str(getattr(function, "__module__", "")).startswith("retcon.")


def _hooks(module: nn.Module) -> list[tuple[Any, frozenset[int]]]:
    kinds = (module._forward_hooks, module._forward_pre_hooks)
    return [(kind, frozenset(kind)) for kind in kinds]


def _notes(module: nn.Module) -> Iterator[Any]:
    """Yield what torch notes about hooks beside them."""
    for name in ("_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called"):
        yield getattr(module, name, {})


@contextmanager
def method_as(module: nn.Module, name: str, method: Callable[..., Any]) -> Iterator[None]:
    """Give a module another method, until the end; late ends, of passes interrupted and cleared up, change nothing."""
    own = module.__dict__.get(name)  # accelerate, for one, sets `forward` on the instance
    setattr(module, name, method)
    try:
        yield
    finally:
        if module.__dict__.get(name) is method:
            if own is None:
                delattr(module, name)
            else:  # in one step, which no interrupt can halve
                setattr(module, name, own)
