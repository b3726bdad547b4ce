"""Which LM has which model: there is one at a time, since it alone knows how to undo its edits."""

import gc
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from torch import nn

from retcon.errors import UnsupportedModel
from retcon.lm.hooks import Hung
from retcon.lm.ledger import EditTrace
from retcon.plural import plural

if TYPE_CHECKING:
    from retcon.lm.model import LM

OWNERS: "WeakKeyDictionary[nn.Module, weakref.ref[LM]]" = WeakKeyDictionary()
"""The LM of each model that has one."""
_LEFT_EDITED: "WeakKeyDictionary[nn.Module, dict[str, EditTrace]]" = WeakKeyDictionary()
"""Of models whose LM is gone, the parameters in which it left deltas, and what shows whether these are still there."""


def refuse_taken(model: nn.Module, name: str) -> None:
    """Raise UnsupportedModel where another LM has the model, or one that is gone has left it edited."""
    reference = OWNERS.get(model)
    if reference is not None and reference() is not None:
        gc.collect()  # it may be waiting for that
        if reference() is not None:
            raise UnsupportedModel(
                f"{name!r} has an LM already, which alone knows how to undo its edits; use that one, or call its "
                "release() first"
            )
    parameters = dict(model.named_parameters(remove_duplicate=False))
    traces = _LEFT_EDITED.get(model, {})
    if left := [n for n, trace in traces.items() if n in parameters and trace.is_in(parameters[n])]:
        some = ", ".join(left[:3]) + (", ..." if len(left) > 3 else "")
        raise UnsupportedModel(
            f"{name!r} was left edited: its LM is gone, which alone knew how to undo its deltas in "
            f"{plural(len(left), 'parameter')} ({some}); load the model again, and keep its LM or revert_all() before "
            "it goes. LM(copy.deepcopy(model), tokenizer) takes the edited weights for a base"
        )
    for path, module in model.named_modules():
        for hook in module._forward_hooks.values():
            if isinstance(hook, Hung):
                raise UnsupportedModel(
                    f"{path} carries a hook of attachment {hook.mark[0]}, which an LM that is gone has left there, or "
                    "which came with a copy of an edited model; load the model again, or revert_all() before it is "
                    "copied"
                )


def set_owner(model: nn.Module, lm: "LM") -> None:
    """Note that `lm` is the model's, and, once `lm` is gone, whether it has left the model edited."""
    OWNERS[model] = weakref.ref(lm)
    noting = weakref.finalize(lm, _note_left, weakref.ref(model), lm._ledger.records)
    noting.atexit = False


def _note_left(model: "weakref.ref[nn.Module]", records: Mapping[str, Any]) -> None:
    if records and (alive := model()) is not None:
        parameters = dict(alive.named_parameters(remove_duplicate=False))
        there = [name for name in sorted(records) if name in parameters and not parameters[name].is_meta]
        traces = {name: EditTrace.of(records[name], parameters[name]) for name in there}
        _LEFT_EDITED[alive] = _LEFT_EDITED.get(alive, {}) | traces
