"""Where a step of fine-tuning stays with its fact: what a layer's step does to the fact elsewhere, and to others.

A small step along -G_e, the gradient of a fact's loss L_e at one matrix, lowers any other loss L_x by <G_e, G_x>, and
its own by |G_e|^2: of what the fact gains, x gets the share <G_e, G_x> / |G_e|^2. Two kinds of x are asked: the fact
after a context, which is to be learned too, and the fact's answer after other facts' prompts, which is not.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.lm.prompts import Row, encode_edit
from retcon.lm.site import Site
from retcon.locate.gradients import catch
from retcon.memory.contexts import Contexts
from retcon.training.objective import answer_nll

N_CONTEXTS = 3
N_OTHERS = 3
LEAST = 0.01
"""A smaller share that others get counts as this: below it is chance."""


@dataclass(frozen=True, eq=False)
class Transfer:
    """What a step on a fact gives to others, by layer, as shares of what it gives to the fact; means over facts."""

    layers: tuple[int, ...]
    own: Float[Tensor, " layers"]
    """To the fact after contexts."""
    others: Float[Tensor, " layers"]
    """To its answer after other facts' prompts."""

    @property
    def ratio(self) -> Float[Tensor, " layers"]:
        """How much more the fact gets than others do."""
        return self.own / self.others.clamp_min(LEAST)

    def best(self) -> int:
        """Return the layer at which the fact gets most over what others get."""
        return self.layers[int(self.ratio.argmax())]


def transfer(
    lm: LM, edits: Sequence[Edit], among: Sequence[Edit], contexts: Contexts, sites: Sequence[Site]
) -> Transfer | None:
    """Return what a step on each of the edits gives to others, at each of `sites`; None where no edit has others.

    What is longer than the model's context is left out.

    Args:
        among: facts whose prompts are the others, of an edit's relation where that is known.
        contexts: of which the first prefixes are taken.
        sites: one dense matrix a layer.

    Raises:
        InvalidEdit, PositionNotFound: as `retcon.lm.prompts.encode_edit`.
    """

    def fitting(asked: Iterable[tuple[Edit, str]], answer: str, n: int) -> list[Row]:
        rows = (encode_edit(lm.tokenizer, edit, prefix, answer=answer) for edit, prefix in asked)
        return list(islice((row for row in rows if row.n_needed <= (lm.context_length or row.n_needed)), n))

    shares = []
    for edit in edits:
        own = fitting(((edit, prefix) for prefix in contexts.all), edit.target_new, 1 + N_CONTEXTS)
        wrong = fitting(((other, "") for other in others_of(edit, among)), edit.target_new, N_OTHERS)
        if len(own) > 1 and wrong:
            given = _given(lm, own + wrong, sites)
            shares.append(torch.stack([given[:, 1 : len(own)].mean(1), given[:, len(own) :].mean(1)]))
    if not shares:
        return None
    return Transfer(tuple(site.layer for site in sites), *torch.stack(shares).mean(0).cpu())


def others_of(edit: Edit, among: Sequence[Edit]) -> list[Edit]:
    """Return the facts with another answer, of the edit's relation if there are any, from the next one on."""
    first = next((i + 1 for i, other in enumerate(among) if other.id == edit.id), 0)
    found = [
        other
        for other in (*among[first:], *among[:first])
        if other.text != edit.text and edit.target_new not in (other.target_new, other.target_true)
    ]
    related = [other for other in found if edit.relation_id and other.relation_id == edit.relation_id]
    return related or found


def _given(lm: LM, rows: Sequence[Row], sites: Sequence[Site]) -> Float[Tensor, "sites rows"]:
    """Return <G_0, G_r> / |G_0|^2 of every row r, at each site: with G = sum_t g_t x_t^T no gradient is made whole."""
    found = []
    with lm.frozen_eval():
        for caught in catch(sites, lambda: answer_nll(lm, rows).sum()):
            x, g = (part.view(len(rows), -1, part.shape[-1]) for part in (caught.x, caught.g))
            inner = torch.einsum("ti,rsi,to,rso->r", x[0], x, g[0], g)
            found.append((inner / inner[0].clamp_min(torch.finfo(inner.dtype).tiny)).to(lm.device))
    return torch.stack(found)
