"""What may be applied to a model: changes that fit its parameters, hooks inside its blocks, made for this base."""

import warnings
from typing import TYPE_CHECKING

from retcon.attachment import Attachment
from retcon.errors import DeltaMismatch, OtherParents, WrongBase

if TYPE_CHECKING:
    from retcon.lm.model import LM


def check_fits(lm: "LM", delta: Attachment, other_base: bool) -> None:
    """Check that a delta, or an attachment of another kind, may be applied; warn where it was made on top of others.

    Raises:
        WrongBase: it was made for another base, and `other_base` does not allow that.
        DeltaMismatch: it does not fit a parameter, or hooks a module that it must not.
        NotEditable: it touches a parameter that must not be edited.
        NonFinite: it holds NaN or infinity.
    """
    lm.check_shapes(delta)
    for name in delta.changes:
        lm.check_editable(name)
    for hook in delta.hooks():
        _check_module(lm, hook.module)
    if delta.base != lm.fingerprint():
        if not other_base:
            made = delta.provenance.get("model", "another model")
            raise WrongBase(
                f"delta {delta.id} was made for {made} (fingerprint {delta.base[:12]}), this is {lm.name!r} in "
                f"{str(lm.dtype).removeprefix('torch.')} (fingerprint {lm.fingerprint()[:12]}). Load the model "
                "it was made for (one that was wrapped, in the same dtype)",
                python=", or pass other_base=True if they differ harmlessly.",
                option=", or add --other-base if they differ harmlessly.",
                page=".",
            )
    elif delta.parents != (found := tuple(d.id for d in lm.applied)) and delta.id not in found:
        warnings.warn(
            f"delta {delta.id} was proposed on top of [{', '.join(delta.parents) or 'the base'}] and is applied on "
            f"top of [{', '.join(found) or 'the base'}]; its effect may differ from what its report says",
            OtherParents,
            stacklevel=3,
        )


def _check_module(lm: "LM", name: str) -> None:
    inside = lm.layout.block.removesuffix("{}")
    if name.removeprefix(inside).count(".") < 1 or not name.startswith(inside):
        raise DeltaMismatch(f"attachments hook modules inside blocks ({inside}0.mlp, say), not {name!r}")
    try:
        lm.model.get_submodule(name)
    except AttributeError:
        raise DeltaMismatch(f"model {lm.name!r} has no module {name!r}; was it made for another one?") from None
