"""KN: find the few MLP units that carry a fact, and rewrite their value vectors with the answers' embeddings.

Dai et al. 2022, arXiv:2104.08696, sections 3 and 4. No gradient step is taken. The paper's models are masked ones; what
a decoder changes, and what EasyEdit's port of it does: docs/methods/kn.md.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from retcon.delta import Change, Delta
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.locate.neurons import Grid, Neuron, attribute_neurons
from retcon.memory.contexts import Contexts
from retcon.memory.defaults import first_prefixes
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import Method, State, check_settings, recorded
from retcon.methods.common.proposal import reported
from retcon.methods.common.settings import Count, CountFromZero, NotNegative
from retcon.methods.common.tuning import check_no_end
from retcon.training.objective import answer_rows
from retcon.work import Progress, silent

MlpUnit = tuple[int, int]
"""Layer and index of an MLP unit."""


@dataclass(frozen=True, kw_only=True)
class Kn(Method):
    """Knowledge neurons."""

    name: ClassVar[str] = "kn"
    state_description: ClassVar[str] = ""

    neuron: Neuron = "value_input"
    """What is attributed: what multiplies a unit's value vector, or what enters its activation function (the port)."""
    n_points: Count = 20
    """m: points of the integral."""
    grid: Grid = "midpoint"
    """Where they lie: interval midpoints, `left` (the release) or both `ends` (the port)."""
    threshold: NotNegative = 0.2
    """t: a prompt's coarse set is what scores at least t times its highest score."""
    n_prefixes: CountFromZero = 4
    """Further prompts for each fact, with a sampled prefix before each; five are sampled."""
    share: float = 0.7
    """r: share of a fact's prompts in whose coarse sets a unit must be; moved by 0.05, up to six times, until two to
    five units are left. From three prompts on; below, the mean score is thresholded."""
    max_units: Count = 20
    """Units of a fact at most, by their mean score."""
    attributed: Literal["old", "target_new"] = "old"
    """The answer that is attributed: the edit's true one, or where there is none the model's own; or the new one."""
    subtract: NotNegative = 1.0
    """lambda_1: how much of the old answer's embedding is taken from each value vector."""
    add: NotNegative = 8.0
    """lambda_2: how much of the new answer's is added."""
    scale: Literal["norm", "none"] = "norm"
    """Embeddings as long as the value vector, or as they are (the port)."""
    signed: bool = True
    """Turn the change round where a unit's activation is negative, which it is for half the units of a gated MLP: there
    the value vector is taken away, not added. False: as published."""
    embedding: Literal["output", "input"] = "output"
    """Which rows are an answer's embeddings: those of the vocabulary projection, which is what reads value vectors, or
    of the input embedding (the port)."""
    erase: bool = False
    """Set the value vectors to zero instead: the fact is forgotten, and no new answer is written."""

    def __post_init__(self) -> None:
        check_settings(self)
        if self.threshold > 1:
            raise InvalidSetting(f"kn: threshold is a share of the highest score, at most 1; found {self.threshold}")
        if not 0 < self.share <= 1:
            raise InvalidSetting(f"kn: share must be above 0 and up to 1, found {self.share}")

    def propose(
        self,
        lm: LM,
        edits: Sequence[Edit],
        *,
        contexts: Contexts | None = None,
        moments: Moments | None = None,
        state: State | None = None,
        values: ValueCache | None = None,
        keep_values: bool = False,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Delta:
        """Return the change that writes `edits`, each by itself; moments and state are not used.

        Raises:
            InvalidSetting: the end of a turn is asked for, which is not trained; or more prefixes than are sampled.
        """
        check_no_end(self.name, edits, "writes the mean of an answer's embeddings")
        sites = [lm.site(layer, "down_proj") for layer in range(lm.n_layers)]
        for site in sites:
            lm.check_editable(site.name)
        if not edits:
            return lm.delta({}, **recorded(self, lm, edits, seed=seed))
        prefixes = first_prefixes(self.name, lm, self.n_prefixes, contexts, seed)
        olds = self._asking_for_the_old_answer(lm, edits)
        located = self._located(lm, edits if self.attributed == "target_new" else olds, prefixes)
        moved: dict[MlpUnit, Tensor] = {}
        for done, (edit, old, units) in enumerate(zip(edits, olds, located, strict=True), 1):
            e_old, e_new = (self._embedding(lm, answer) for answer in (old, edit))
            for (layer, j), sign in units.items():
                v = sites[layer].weight[:, j].to(e_old)
                if self.erase:
                    moved[layer, j] = -v
                else:
                    moved[layer, j] = moved.get((layer, j), 0) + sign * self._rewrite(v, e_old, e_new)
            (progress or silent)("neurons", done, len(edits))
        changes: dict[str, list[Change]] = {}
        for site in sites:
            here = sorted(j for layer, j in moved if layer == site.layer)
            if here:
                columns = torch.stack([moved[site.layer, j] for j in here], 1).cpu()
                changes[site.name] = [site.stored_columns(torch.tensor(here), columns)]
        record = recorded(self, lm, edits, contexts=Contexts(prefixes), seed=seed)
        return reported(lm, lm.delta(changes, **record))

    def _rewrite(
        self, v: Float[Tensor, " d_model"], e_old: Float[Tensor, " d_model"], e_new: Float[Tensor, " d_model"]
    ) -> Float[Tensor, " d_model"]:
        """Return what is added to a value vector: section 4.2's -lambda_1 e_old + lambda_2 e_new, in its length."""
        if self.scale == "norm":
            e_old, e_new = (e * (v.norm() / e.norm()) for e in (e_old, e_new))
        return self.add * e_new - self.subtract * e_old

    def _located(self, lm: LM, facts: Sequence[Edit], prefixes: Sequence[str]) -> Iterator[dict[MlpUnit, float]]:
        """Yield the units of each fact, each with the sign of its activation."""
        find = partial(attribute_neurons, n_points=self.n_points, grid=self.grid, neuron=self.neuron)
        widths = [lm.site(layer, "down_proj").shape[1] for layer in range(lm.n_layers)]
        units = [(layer, j) for layer, width in enumerate(widths) for j in range(width)]
        for fact in facts:
            rows = [answer_rows(lm, [fact], prefix=prefix)[0] for prefix in ("", *prefixes)]
            scores, activations = find(lm, rows)
            chosen = refine(torch.cat(scores, 1), self.threshold, self.share)[: self.max_units]
            mean = torch.cat(activations, 1).mean(0)
            sign = mean.sign() if self.signed else torch.ones_like(mean)
            yield {units[i]: float(sign[i]) for i in chosen}

    def _asking_for_the_old_answer(self, lm: LM, edits: Sequence[Edit]) -> list[Edit]:
        """Return the edits with the old answer in the new one's place."""
        unknown = [edit for edit in edits if edit.target_true is None]
        said = [text or edit.target_new for text, edit in zip(completions(lm, unknown), unknown, strict=True)]
        own = dict(zip((edit.id for edit in unknown), said, strict=True))
        return [replace(edit, target_new=edit.target_true or own[edit.id]) for edit in edits]

    def _embedding(self, lm: LM, edit: Edit) -> Float[Tensor, " d_model"]:
        """Return the mean of the answer tokens' rows."""
        module = lm.head if self.embedding == "output" else lm.model.get_submodule(lm.layout.embedding)
        matrix: Tensor = module.get_parameter("weight").detach()
        tokens = torch.tensor(answer_rows(lm, [edit])[0].target_ids, device=matrix.device)
        return matrix[tokens].to(torch.promote_types(matrix.dtype, torch.float32)).mean(0)


def completions(lm: LM, edits: Sequence[Edit]) -> list[str]:
    """Return what the model itself says after each prompt: a few words, up to the end of the sentence."""
    from retcon.lm.generate import Writing, texts_after

    how = Writing(max_new_tokens=4, stops=("\n", ".", ","))
    return texts_after(lm, [(edit.text, edit.chat) for edit in edits], how)


def coarse(scores: Float[Tensor, "n_prompts units"], threshold: float) -> Bool[Tensor, "n_prompts units"]:
    """Return the units that score at least `threshold` times the prompt's highest score, and above 0."""
    return (scores >= threshold * scores.amax(1, keepdim=True)) & (scores > 0)


def refine(scores: Float[Tensor, "n_prompts units"], threshold: float, share: float) -> list[int]:
    """Return the units in the coarse sets of `share` of the prompts, the highest mean score first; at least one.

    The share is moved by 0.05, up to six times, until two to five units are left (section 3.3). Of one or two prompts,
    the mean is thresholded.
    """
    mean = scores.mean(0)
    if len(scores) < 3:
        chosen = coarse(mean[None], threshold)[0]
    else:
        agreed = coarse(scores, threshold).double().mean(0)
        for _ in range(6):
            chosen = agreed >= max(share, 1e-9)
            n = int(chosen.sum())
            if 2 <= n <= 5:
                break
            share = min(share + 0.05, 1.0) if n > 5 else share - 0.05
        chosen = agreed >= max(share, 1e-9)
    if not bool(chosen.any()):
        return [int(mean.argmax())]
    found = chosen.nonzero()[:, 0]
    return [int(i) for i in found[mean[found].argsort(descending=True, stable=True)]]
