"""What locate-then-edit methods share on the way from a batch of edits to a Delta, around their own steps.

A method opens a `proposing` scope, searches values, writes them, and asks for the delta:

    with proposing(self, lm, edits, [group], arguments) as proposal:
        values = proposal.search(sites, search)
        proposal.write(group, values.target(0))
        return proposal.delta(values.report)

Changes are applied inside the scope, and reverted at its end.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.delta import Change, Delta, EditReport
from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting, LargeChange, RetconWarning
from retcon.lm.batches import in_batches
from retcon.lm.forward import TensorName, answer_places, gold, log_probs, logits_at
from retcon.lm.layouts import Layout
from retcon.lm.model import LM
from retcon.lm.prompts import Where, encode_edit, pad
from retcon.lm.site import Site
from retcon.memory.contexts import Contexts
from retcon.memory.defaults import default_moments
from retcon.memory.keys import KeyAverage, KeyReader
from retcon.memory.moments import GivenMoments, Moments
from retcon.memory.values import ValueCache, Values, ValueSearch, ValueSite, search_values
from retcon.memory.write import LayerGroup, is_routed, write, written_sites
from retcon.methods.common.contract import UpdateFilter, check_depth, recorded
from retcon.methods.common.registry import check_subjects
from retcon.work import Progress, silent

OUT_OF_RANGE = 5.0
"""Norm of a change over that of its weight, per root of the number of edits, from which a warning is given: single
edits that disable a model (ROME's tiny denominators) are at tens and more, ordinary ones of embedded models at 1."""


@dataclass(frozen=True)
class ProposeArguments:
    """What a call of `propose` was given besides model, edits and state."""

    contexts: Contexts | None
    moments: Moments | None
    values: ValueCache | None
    keep_values: bool
    seed: int
    progress: Progress | None
    update_filter: UpdateFilter | None = None


@dataclass
class Proposal:
    """One batch of edits inside its `proposing` scope."""

    method: Any
    lm: LM
    edits: Sequence[Edit]
    arguments: ProposeArguments
    contexts: Contexts
    """Those of the arguments, or sampled ones; `moments` likewise."""
    moments: Moments
    sites: list[Site]
    last: Where
    """The last token position at which keys are read."""
    scope: ExitStack
    changes: dict[str, list[Change]] = field(default_factory=dict)
    keys: dict[str, Float[Tensor, "n_edits m"]] = field(default_factory=dict)
    """Keys that were written, by parameter name."""
    readers: dict[tuple[Contexts, KeyAverage], KeyReader] = field(default_factory=dict)
    """What has read the keys so far: a second group's reading starts where the first one's ended."""
    plans: list[Mapping[str, Any]] = field(default_factory=list)
    """How the searches were cut up."""
    searched: dict[str, Tensor] = field(default_factory=dict)
    """What the searches found, where it is kept: by number of the search, site, and part."""

    def search(self, sites: Sequence[ValueSite], search: ValueSearch) -> Values:
        """Return values for the batch (`memory.values.search_values`) on the weights as they are now."""
        progress = self.arguments.progress or silent
        values = search_values(
            self.lm,
            self.edits,
            sites,
            self.contexts,
            search,
            progress=lambda n: progress("values", n, len(self.edits)),
            cache=self.arguments.values,
        )
        if self.arguments.keep_values:
            self.searched |= {f"{len(self.plans)}.{name}": tensor for name, tensor in values.tensors().items()}
        self.plans.append(values.plan)
        return values

    def write(
        self,
        group: LayerGroup,
        targets: Float[Tensor, "n_edits d_model"],
        *,
        contexts: Contexts | None = None,
        key_average: KeyAverage = "two_level",
    ) -> None:
        """Write `targets` into the group's layers (`memory.write.write`); `contexts` other than the batch's own."""
        contexts = self.contexts if contexts is None else contexts
        if (contexts, key_average) not in self.readers:
            self.readers[contexts, key_average] = KeyReader(
                self.lm, self.edits, contexts, average=key_average, last=self.last
            )
        written = write(
            self.lm,
            self.edits,
            targets,
            group,
            contexts,
            self.moments,
            self.scope,
            key_average=key_average,
            update_filter=self.arguments.update_filter,
            reader=self.readers[contexts, key_average],
        )
        for name, changes in written.changes.items():
            self.changes.setdefault(name, []).extend(changes)
        self.keys |= written.keys

    def delta(
        self, report: Sequence[EditReport] = (), *, state: Mapping[str, Tensor] | None = None, **notes: Any
    ) -> Delta:
        """Return what was written as a delta, reports completed by what the model says now; `notes` go on record."""
        record = recorded(
            self.method,
            self.lm,
            self.edits,
            contexts=self.contexts,
            moments=self.moments,
            sites=self.sites,
            seed=self.arguments.seed,
            values=self.plans,
            **notes,
        )
        found = report_after(self.lm, self.edits, report)
        self.scope.close()  # a delta is proposed on the model as it was
        delta = self.lm.delta(self.changes, report=found, state=state, values=self.searched or None, **record)
        warn_of_size(self.lm, delta)
        return delta


@contextmanager
def proposing(
    method: Any, lm: LM, edits: Sequence[Edit], groups: Sequence[LayerGroup], arguments: ProposeArguments
) -> Iterator[Proposal]:
    """Check layers, make contexts and moments where none are given; the model is as it was afterwards.

    Raises:
        InvalidEdit: an edit names no subject, and the method needs one.
        InvalidSetting: a layer the model does not have.
        NotEditable: a matrix that must not be edited.
    """
    check_subjects(method, edits)
    written = [s for g in groups for s in sites_of(method.name, lm, g.layers, g.module, routed=g.routed)]
    sites = list({site.id: site for site in written}.values())  # groups may share a layer
    for site in sites:
        lm.check_editable(site.name)
    if at_subject := [group for group in groups if group.where == "subject_last"]:
        warn_of_subjects(method.name, lm, edits, top=max(group.layers[-1] for group in at_subject))
    contexts, moments = arguments.contexts, arguments.moments
    if not edits:
        contexts, moments, sites = contexts or Contexts(), moments or GivenMoments({}), []
    contexts = method.sampled_contexts(lm, arguments.seed) if contexts is None else contexts
    moments = default_moments(lm) if moments is None else moments
    if not method.uses_moments:
        sites = []
    moments.prepare(lm, sites)
    with lm.scope(), ExitStack() as scope:
        yield Proposal(
            method=method,
            lm=lm,
            edits=edits,
            arguments=arguments,
            contexts=contexts,
            moments=moments,
            sites=sites,
            last="prediction" if any(g.where == "prediction" for g in groups) else "subject_last",
            scope=scope,
        )


def sites_of(
    name: str,
    lm: LM,
    layers: Sequence[int],
    module: Literal["down_proj", "o_proj"] = "down_proj",
    *,
    routed: bool = False,
) -> list[Site]:
    """Return the matrices that a method writes in these layers; `routed` as in `LM.sites`.

    Raises:
        InvalidSetting: a layer the model does not have.
    """
    check_depth(name, lm, layers)
    return [site for layer in layers for site in written_sites(lm, layer, module, routed=routed)]


def only_one(name: str, edits: Sequence[Edit]) -> None:
    """Check that a method that writes one fact is handed no more.

    Raises:
        InvalidEdit: it is.
    """
    if len(edits) > 1:
        raise InvalidEdit(
            f"{name} writes one fact at a time, found {len(edits)} edits; retcon.in_steps({name}, lm, "
            "edits) writes them one on top of the other (retcon edit does so by itself), or take a batch method: memit"
        )


def target_tensor(
    name: str, lm: LM, wanted: TensorName, *, layers: Sequence[int] = (), routed: bool = False
) -> TensorName:
    """Return the tensor at which a method measures values on this model: the MLP's output where a post-norm follows.

    Through a norm no write can bring the block's output to a wanted value. Routed experts have no output of their own
    to measure at: there it is the block's.

    Raises:
        InvalidSetting: routed experts would be written, and a norm or a factor is between them and the block's output.
    """
    if experts := [lm.kinds[layer] for layer in layers if layer < lm.n_layers and is_routed(lm, layer, routed)]:
        if between := what_stands_between(experts):
            raise InvalidSetting(
                f"{name}: on {lm.config.model_type!r} {between} stands between the routed experts and the residual "
                "stream, and values are measured there; kne, ctp and fine-tuning of the attention work"
            )
        return "block"
    if wanted == "block" and not all(kind.adds_mlp_output for kind in lm.kinds):
        between = what_stands_between(lm.kinds) or "a factor"
        warnings.warn(
            f"{name}: values belong at the block's output, but on {lm.model.config.model_type!r} {between} stands "
            "between the MLP and that; they are searched and measured at the MLP's output instead",
            RetconWarning,
            stacklevel=4,
        )
        return "mlp"
    return wanted


def what_stands_between(kinds: Sequence[Layout]) -> str | None:
    """Return what is between the MLPs of such blocks and the residual stream, in words; None: nothing."""
    if any(kind.mlp_post_norm for kind in kinds):
        return "a norm"
    return "a factor" if any(kind.residual_multiplier for kind in kinds) else None


def warn_of_subjects(name: str, lm: LM, edits: Sequence[Edit], *, top: int) -> None:
    """Warn of edits whose subject is no place for a value: it cannot reach the answer, or its key is an outlier.

    Args:
        top: the last layer in which a value is written at the subject.
    """
    rows = [encode_edit(lm.tokenizer, edit) for edit in edits]

    def named(found: Sequence[Edit]) -> str:
        """Name the first of several edits; one by itself goes unnamed, so that a run of them is warned of once."""
        if len(edits) == 1:
            return ""
        shown = ", ".join(f"{edit.id!r} ({edit.subject!r})" for edit in found[:3])
        return f": {shown}" + (f" and {len(found) - 3:,} more" if len(found) > 3 else "")

    lost = [e for e, row in zip(edits, rows, strict=True) if row.position("subject_last") < row.prediction]
    if lost and top == lm.n_layers - 1:
        warnings.warn(
            f"{name}: what the last layer ({top}) writes at the subject does not reach an answer predicted at a later "
            f"token{named(lost)}. Write lower layers",
            RetconWarning,
            stacklevel=5,
        )
    first = [e for e, row in zip(edits, rows, strict=True) if row.position("subject_last") == 0]
    if first:
        warnings.warn(
            f"{name}: the subject is the prompt's first token, whose key is unlike the same word's after other "
            f"text{named(first)}. Write the fact with text before it",
            RetconWarning,
            stacklevel=5,
        )


def warn_of_size(lm: LM, delta: Delta) -> None:
    """Warn where a change dwarfs the weight it is added to."""
    for name, norm in delta.norms().items():
        own = float(lm.parameter(name).detach().norm())
        if norm > OUT_OF_RANGE * own * math.sqrt(max(len(delta.report), 1)):
            warnings.warn(
                f"{name}: the change (norm {norm:.3g}) is {norm / own:.0f} times larger than the weight ({own:.3g}), "
                "which usually disables a model; lower the clamp, give the second moment more weight, or edit fewer "
                "facts at once",
                LargeChange,
                stacklevel=5,
            )


def report_after(lm: LM, edits: Sequence[Edit], report: Sequence[EditReport]) -> tuple[EditReport, ...]:
    """Return the reports with what the model says now on the edits' bare prompts: a forward pass per batch of rows."""
    found = answers(lm, edits)
    return tuple(
        replace(r, final_probability=probability, greedy_match=match)
        for r, (probability, match) in zip(report, found, strict=True)
    )


def reported(lm: LM, delta: Delta) -> Delta:
    """Return the delta with a report of each edit, for methods that search nothing: what the model says with it."""
    with lm.edited(delta):
        found = answers(lm, delta.edits)
    return replace(
        delta,
        report=tuple(
            EditReport(edit.id, probability, 0, "written", final_probability=probability, greedy_match=match)
            for edit, (probability, match) in zip(delta.edits, found, strict=True)
        ),
    )


def answers(lm: LM, edits: Sequence[Edit]) -> list[tuple[float, bool]]:
    """Return, per edit on its bare prompt, the new answer's geometric-mean probability per token, and whether each of
    its tokens is the model's first choice."""
    rows = [encode_edit(lm.tokenizer, edit, answer=edit.target_new) for edit in edits]

    def read(group: list[int]) -> list[tuple[float, bool]]:
        chosen = [rows[i] for i in group]
        at, positions = answer_places(chosen)
        log_p = log_probs(logits_at(lm, pad(chosen, lm.device), (at, positions)))
        tokens = torch.tensor([token for r in chosen for token in r.target_ids])
        picked, first = gold(log_p, chosen).cpu(), log_p.argmax(-1).cpu() == tokens
        each = range(len(chosen))
        return [(float(picked[at == j].mean().exp()), bool(first[at == j].all())) for j in each]

    with lm.frozen_eval(), torch.no_grad():
        return in_batches([len(r.ids) for r in rows], read)
