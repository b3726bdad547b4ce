"""Hooks of attachments on a model's modules.

What hangs there is looked at, never remembered, so that bringing it about can be cut anywhere and done again.
"""

from collections.abc import Sequence
from typing import Any

from torch import nn

from retcon.attachment import Attachment, Hook


class Hung:
    """A forward hook that an attachment has on a module."""

    def __init__(self, owner: str, number: int, hook: Hook) -> None:
        self.mark = (owner, number)
        """The attachment's id, and which of its hooks this is."""
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple[Any, ...], named: dict[str, Any], output: Any) -> Any:
        """Return what the module gives back instead: of a tuple, the first part is replaced."""
        inputs = args[0] if args else next(iter(named.values()))  # attention is called by keyword
        if isinstance(output, tuple):
            return (self.hook.call(inputs, output[0]), *output[1:])
        return self.hook.call(inputs, output)


def hooked(block: nn.Module) -> bool:
    """Return whether an attachment that is attached acts on a module of the block."""
    return any(isinstance(hook, Hung) for module in block.modules() for hook in module._forward_hooks.values())


class Hooks:
    """Brings the hooks of attachments onto a model and takes them off."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._used: frozenset[str] = frozenset()  # names of modules on which one may hang

    def bring(self, attachments: Sequence[Attachment]) -> None:
        """Have the hooks of these attachments, in order, and no others. Repeatable."""
        wanted: dict[str, list[Hung]] = {}
        for attachment in attachments:
            for number, hook in enumerate(attachment.hooks()):
                wanted.setdefault(hook.module, []).append(Hung(attachment.id, number, hook))
        self._used = self._used | wanted.keys()
        for name in sorted(self._used):
            module = self._model.get_submodule(name)
            named = module._forward_hooks_with_kwargs  # noted after the hook itself, so a cut may leave it out
            hanging = {key: hook for key, hook in module._forward_hooks.items() if isinstance(hook, Hung)}
            own = wanted.get(name, [])
            if [hook.mark for hook in hanging.values()] == [
                hook.mark for hook in own
            ] and named.keys() >= hanging.keys():
                continue
            for key in hanging:
                named.pop(key, None)
                module._forward_hooks.pop(key, None)
            for each in own:
                module.register_forward_hook(each, with_kwargs=True)
        self._used = frozenset(wanted)
