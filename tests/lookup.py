"""A tiny real editor beside the weights: a lookup that replaces one MLP's output where its input is a stored key.

It is what GRACE does in one layer, without its growing and splitting of balls. Beside it, an editor at the prompt.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

import torch
from torch import Tensor

from retcon.attachment import Beside, Cost, EditReport, Hook, register
from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.methods.common.contract import Method

RADIUS = 1e-3
"""Distance between an input and a key within which the value is given; keys of other prompts lie much further."""


@register
@dataclass(frozen=True, eq=False, kw_only=True)
class Lookup(Beside):
    """Keys and values of one module."""

    kind = "lookup"

    def hooks(self) -> Sequence[Hook]:
        return (Hook(self.settings["module"], self._look_up),)

    def _look_up(self, inputs: Tensor, outputs: Tensor) -> Tensor:
        keys, values = self.tensors["keys"].to(inputs.device), self.tensors["values"].to(outputs)
        distance, nearest = torch.cdist(inputs.double(), keys.double().expand(len(inputs), *keys.shape)).min(-1)
        return torch.where((distance < RADIUS)[..., None], values[nearest], outputs)

    def cost(self) -> Cost:
        return Cost(nbytes=self.nbytes(), flops_per_token=3.0 * self.tensors["keys"].numel())

    def joined(self, later: Self) -> Self:
        tensors = {name: torch.cat([self.tensors[name], later.tensors[name]]) for name in ("keys", "values")}
        return replace(
            later, tensors=tensors, parents=self.parents, report=(*self.report, *later.report),
            edits=(*self.edits, *later.edits),
        )  # fmt: skip


@register
@dataclass(frozen=True, eq=False, kw_only=True)
class InContext(Beside):
    """The new facts as sentences before every prompt."""

    kind = "in-context"

    def prompt(self, text: str) -> str:
        return f"{self.settings['before']} {text}"

    def cost(self) -> Cost:
        return Cost(prompt_characters=len(self.settings["before"]) + 1)


@dataclass(frozen=True, kw_only=True)
class LookupEditor(Method):
    """Writes the first token of answers into a lookup: the key is what enters the MLP at the prompt's end."""

    layer: int = 1
    steps: int = 60
    name: ClassVar[str] = "lookup"

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Any = None,
        moments: Any = None,
        state: Mapping[str, Tensor] | None = None,
        values: Any = None,
        keep_values: bool = False,
        seed: int = 0,
        progress: Callable[[str, int, int], None] | None = None,
    ) -> Lookup:
        module = lm.layout.block.format(self.layer) + ".mlp"
        found = [self._key_and_value(lm, module, edit) for edit in edits]
        keys, searched, probabilities = zip(*found, strict=True)
        return Lookup(
            base=lm.fingerprint(),
            parents=tuple(a.id for a in lm.applied),
            tensors={"keys": torch.stack(keys), "values": torch.stack(searched)},
            settings={"module": module},
            edits=tuple(edits),
            report=tuple(
                EditReport(e.id, p, self.steps, "reached" if p > 0.5 else "steps", greedy_match=p > 0.5)
                for e, p in zip(edits, probabilities, strict=True)
            ),
            provenance={"method": "lookup", "seed": seed},
        )

    def _key_and_value(self, lm: LM, module: str, edit: Edit) -> tuple[Tensor, Tensor, float]:
        row = lm.encode(edit.text, edit.target_new)
        ids, place, answer = torch.tensor([row.ids]), row.prediction, row.target_ids[0]
        seen: list[Tensor] = []
        mlp = lm.model.get_submodule(module)
        handle = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, place]))
        with lm.frozen_eval(), torch.no_grad():
            lm.model(input_ids=ids, use_cache=False)
        handle.remove()
        value = torch.zeros_like(seen[0], requires_grad=True)
        optimizer = torch.optim.Adam([value], lr=0.3)

        def put(_: Any, __: Any, output: Tensor) -> Tensor:
            return torch.cat([output[:, :place], value.expand(1, 1, -1), output[:, place + 1 :]], dim=1)

        handle = mlp.register_forward_hook(put)
        try:
            with lm.frozen_eval():
                for _ in range(self.steps):
                    loss = -lm.model(input_ids=ids, use_cache=False).logits[0, place].log_softmax(-1)[answer]
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
        finally:
            handle.remove()
        return seen[0].clone(), value.detach().clone(), float((-loss.detach()).exp())
