"""One step of a value search on recorded states: a forward and a backward pass for all active edits, and an update.

The losses of the edits are added up, and since no vector enters two of them, each edit descends as if alone: its own
Adam state, clamp, step count and end.
"""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import islice, product
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.lm.forward import Hook, input_rows, log_probs, logits_at
from retcon.lm.model import LM
from retcon.lm.offload import offloading, put_away
from retcon.lm.replay import ReplayState, capture_states, replaying
from retcon.memory.values.objective import Labels, ValueSearch, ValueSite, kl_divergence, loss_of
from retcon.memory.values.rows import EditRows, active_part
from retcon.memory.values.state import SearchState

MAX_KL_PADDING_TOKENS = {"cpu": 64}
"""Tokens of padding up to which KL rows, one token long, join the rewriting rows: a pass of their own costs more."""
MAX_KL_PADDING_TOKENS_ON_ACCELERATOR = 256


RowKind = Literal["rewriting", "kl"]
"""Rows that end in the new answer, or rows whose prediction at the subject shall stay."""


@dataclass(frozen=True, order=True)
class Shape:
    """How large the tensors of a step are. A device plans and captures its work by shape."""

    places: int
    """Edits; places without an edit that is searched repeat one that has ended."""
    columns: int
    """Active tokens of a rewriting row."""
    prefix: int
    """Tokens before those that enter through attention keys and values."""
    labels: int
    """Answer tokens that rewriting rows predict, and tokens in their place that count nowhere."""
    kl_columns: int = 0
    """Active tokens of a KL row."""
    kl_prefix: int = 0
    """Tokens before those of a KL row."""


@dataclass(frozen=True)
class Pass:
    """Rows of the active edits that are replayed together."""

    recorded: ReplayState
    kinds: tuple[RowKind, ...]
    """Which of their rows, in this order."""
    changed: list[Int[Tensor, "2 _"]]
    """Per site, the rows and columns at which its vectors are added."""
    labels: Int[Tensor, "2 labels"]
    """Rows and columns whose logits are read."""
    ends: Int[Tensor, " labels"]
    """The same places as flat indices, row * columns + column, ascending."""


@dataclass
class ActiveBatch:
    """The edits that are being optimised now, and the tensors that their steps share."""

    edits: list[int]
    """The edit of each place."""
    passes: list[Pass]
    labels: Labels
    state: SearchState
    fresh: bool = True
    """Whether some edits have yet to make their first step."""


class Recorded:
    """Some edits' recorded parts, held at once.

    Args:
        rows: of the edits, in the order in which they are activated.
        offload: where memory is short, what is recorded and what steps leave for their backward passes goes out of the
            way (`lm.offload`), which takes longer and changes no bit.
    """

    def __init__(
        self, lm: LM, rows: Sequence[EditRows], sites: Sequence[ValueSite], search: ValueSearch, offload: bool = False
    ) -> None:
        self.lm, self.rows, self.sites, self.search = lm, rows, sites, search
        self.offload = offload
        self.dtype = torch.promote_types(lm.dtype, torch.float32)
        self.n_contexts = len(rows[0].rewriting)
        first, self.points = active_part(lm, sites)
        reads = {
            s.point: [r.position(s.where) if j == 0 else None for e in rows for j, r in enumerate(e.rewriting)]
            for s in sites
            if s.point.layer < first
        }
        kl = [e.kl for e in rows if e.kl is not None]
        self.with_kl = bool(kl)
        texts = [r for e in rows for r in input_rows(e.rewriting)] + kl  # in this order they are recorded and picked
        starts = [s for e in rows for s in e.starts] + [e.kl_start for e in rows if e.kl is not None]
        contexts = [j for e in rows for j in range(self.n_contexts)] + [-1] * len(kl)
        reads = {point: [*at, *[None] * len(kl)] for point, at in reads.items()}
        states, read = capture_states(lm, texts, starts, first, reads, prefix_group=contexts)
        self.states = self._away(states)
        self.clean = [read.get(s.point) for s in sites]
        """Per site below the active part, each edit's clean value; the others have it after an edit's first pass."""

    def _away(self, states: ReplayState) -> ReplayState:
        if not self.offload:
            return states
        keys, values = (tuple(put_away(x) for x in part) for part in (states.keys, states.values))
        return replace(states, states=put_away(states.states), keys=keys, values=values)

    def _offloading(self, now: ActiveBatch) -> AbstractContextManager[None]:
        """Return the scope in which a step leaves little for its backward pass, where memory is short."""
        if not self.offload:
            return nullcontext()
        recorded = [
            x for part in now.passes for x in (part.recorded.states, *part.recorded.keys, *part.recorded.values)
        ]
        return offloading([*self.lm.model.parameters(), *self.lm.model.buffers(), *recorded])

    @property
    def nbytes(self) -> int:
        """Memory that the recorded parts take."""
        return self.states.nbytes

    def state(self, edits: Sequence[int]) -> SearchState:
        """Return the state of these edits before their first step."""
        clean = [None if x is None else x[list(edits)] for x in self.clean]
        return SearchState.new(self.lm, self.sites, len(edits), clean, self.search)

    def shape(self, edits: Sequence[int]) -> Shape:
        """Return the smallest shape for these edits."""
        kl = [(row, self.rows[e].kl_start) for e in edits if (row := self.rows[e].kl) is not None]
        return Shape(
            places=len(edits),
            columns=max(self.rows[e].columns for e in edits),
            prefix=max(max(self.rows[e].starts) for e in edits),
            labels=sum(self._n_labels(e) for e in edits),
            kl_columns=max(len(r.ids) - start for r, start in kl) if kl else 0,
            kl_prefix=max(start for _, start in kl) if kl else 0,
        )

    def shape_for_any(self, places: int) -> Shape:
        """Return the smallest shape that holds any `places` of the edits.

        Two columns at least: for a single one transformers reads whether the mask hides anything, and the CPU waits.
        """
        most = sorted((self._n_labels(e) for e in range(len(self.rows))), reverse=True)
        shape, two = self.shape(range(len(self.rows))), min(2, self.states.states.shape[1])
        return replace(
            shape,
            places=places,
            columns=max(shape.columns, two),
            labels=sum(most[:places]),
            kl_columns=max(shape.kl_columns, two) if self.with_kl else 0,
        )

    def _n_labels(self, edit: int) -> int:
        return sum(len(r.target_ids) for r in self.rows[edit].rewriting)

    def batch(self, edits: list[int], state: SearchState, shape: Shape | None = None) -> ActiveBatch:
        """Return what the next steps of these edits share.

        Args:
            shape: with as many places as there are edits; the smallest one by default.
        """
        shape = shape or self.shape(edits)
        targets = [r.target_ids for e in edits for r in self.rows[e].rewriting]
        device = self.lm.device
        per_row = torch.tensor([len(t) for t in targets], device=device)
        padding = len(edits) * (shape.columns - 1)
        together = padding <= MAX_KL_PADDING_TOKENS.get(device.type, MAX_KL_PADDING_TOKENS_ON_ACCELERATOR)
        kinds: tuple[RowKind, ...] = ("rewriting", "kl") if self.with_kl else ("rewriting",)
        of_row = [row for row, ids in enumerate(targets) for _ in ids]
        unused = shape.labels - len(of_row)
        return ActiveBatch(
            edits=edits,
            passes=[self._pass(edits, shape, of) for of in ([kinds] if together else [(kind,) for kind in kinds])],
            labels=Labels(
                tokens=torch.tensor([token for ids in targets for token in ids] + [0] * unused, device=device),
                rows=torch.tensor(of_row + [len(targets)] * unused, device=device),
                per_row=per_row,
            ),
            state=state,
        )

    def _pass(self, edits: Sequence[int], shape: Shape, kinds: tuple[RowKind, ...]) -> Pass:
        recorded: list[int] = []
        changed: list[list[tuple[int, int]]] = [[] for _ in self.sites]
        labels: list[tuple[int, int]] = []
        for kind in kinds:
            for number, of_sites, read in self._rewriting_rows(edits) if kind == "rewriting" else self._kl_rows(edits):
                row = len(recorded)
                for places, column in zip(changed, of_sites, strict=True):
                    if column is not None:
                        places.append((row, column))
                labels += [(row, column) for column in read]
                recorded.append(number)
            if kind == "rewriting":  # tokens that count nowhere fill the shape
                known, everywhere = set(labels), product(range(len(recorded)), range(shape.columns))
                labels += islice((place for place in everywhere if place not in known), shape.labels - len(labels))
        columns = max(shape.columns if kind == "rewriting" else shape.kl_columns for kind in kinds)
        prefix = max(shape.prefix if kind == "rewriting" else shape.kl_prefix for kind in kinds)
        device = self.lm.device
        return Pass(
            recorded=self._away(self.states.select(recorded, columns=columns, prefix=prefix)),
            kinds=kinds,
            changed=[
                torch.tensor(places, dtype=torch.long, device=self._device(site)).view(-1, 2).T
                for site, places in zip(self.sites, changed, strict=True)
            ],
            labels=torch.tensor(labels, device=device).T,
            ends=torch.tensor(sorted(row * columns + at for row, at in labels), device=device),
        )

    def _rewriting_rows(self, edits: Sequence[int]) -> Iterator[tuple[int, list[int | None], list[int]]]:
        """Yield each row's number among the recorded ones, the column of every site, and the columns that are read."""
        for e in edits:
            for j, (row, start) in enumerate(zip(self.rows[e].rewriting, self.rows[e].starts, strict=True)):
                first = row.n_prompt - 1 - start
                of_sites: list[int | None] = [row.position(site.where) - start for site in self.sites]
                yield e * self.n_contexts + j, of_sites, list(range(first, first + len(row.target_ids)))

    def _kl_rows(self, edits: Sequence[int]) -> Iterator[tuple[int, list[int | None], list[int]]]:
        """Do as `_rewriting_rows`; a site that is not at the subject has no column."""
        for e in edits:
            row = self.rows[e].kl
            assert row is not None
            last = len(row.ids) - 1 - self.rows[e].kl_start
            of_sites = [last if site.where == "subject_last" else None for site in self.sites]
            yield len(self.rows) * self.n_contexts + e, of_sites, [last]

    def _device(self, site: ValueSite) -> torch.device:
        return self.lm.site(site.point.layer, "o_proj").device

    def logits(
        self, now: ActiveBatch, vectors: Sequence[Float[Tensor, "edits d"]]
    ) -> tuple[Float[Tensor, "labels vocab"], Float[Tensor, "edits vocab"] | None]:
        """Return logits at the labels and at the KL rows' subjects with `vectors` added at the sites.

        The state takes in the activations there.
        """
        every, state = self.n_contexts, now.state

        def hook(s: int, part: Pass) -> Hook:
            site = self.sites[s]

            def add(value: Tensor) -> Tensor:
                rows, columns = part.changed[s].to(value.device)
                rewrites = "rewriting" in part.kinds
                if rewrites and self.points[s] == site.point:  # else nothing below the site is run
                    bare = slice(0, len(now.edits) * every, every)
                    seen = value.detach()[rows[bare], columns[bare]].to(self.dtype)
                    going = state.going.to(value.device)[:, None]
                    state.activation[s] = torch.where(going, seen, state.activation[s])
                vector = vectors[s].to(value.device, value.dtype)
                added = [vector.repeat_interleave(every, dim=0)] if rewrites else []
                added += [vector] if "kl" in part.kinds and site.where == "subject_last" else []
                return value.index_put((rows, columns), torch.cat(added), accumulate=True)

            return add

        below_the_last = all(p.layer < self.lm.n_layers - 1 for p in self.points)
        n_read: dict[RowKind, int] = {"rewriting": len(now.labels.tokens), "kl": len(now.edits)}
        found: dict[RowKind, Tensor] = {}
        for part in now.passes:
            hooks = {point: hook(s, part) for s, point in enumerate(self.points) if part.changed[s].numel()}
            labels = (part.labels[0], part.labels[1])
            with replaying(self.lm, part.recorded, ends=part.ends if below_the_last else None, planned=True) as inputs:
                logits = logits_at(self.lm, inputs, labels, hooks)
            found |= zip(part.kinds, logits.split([n_read[kind] for kind in part.kinds]), strict=True)
        return found["rewriting"], found.get("kl")

    def step(self, now: ActiveBatch, *, only_measure: bool) -> None:
        """Run the batch once, take in what it found, and update the vectors of those edits that go on.

        Args:
            only_measure: no edit can go on after this step, so that there is nothing to update.
        """
        state = now.state
        vectors = [offset.clone().requires_grad_() for offset in state.offset]
        with torch.enable_grad(), self._offloading(now):
            logits, kl_logits = self.logits(now, vectors)
            if now.fresh:
                for s, (init, activation) in enumerate(zip(state.init, state.activation, strict=True)):
                    state.init[s] = torch.where(state.steps.to(init.device)[:, None] == 0, activation, init)
            kl = None if kl_logits is None else self._divergence(now, kl_logits)
            now.fresh = False
            loss = loss_of(
                log_probs(logits), kl, now.labels, vectors, state.init, self.sites, self.search, state.nll_factor
            )
            gradients = None if only_measure else torch.autograd.grad(loss.total.sum(), vectors)
        state.take(loss.detach(), self.search)
        if gradients is not None:
            state.descend(gradients, self.sites)

    def _divergence(self, now: ActiveBatch, kl_logits: Float[Tensor, "edits vocab"]) -> Float[Tensor, " edits"]:
        log_p, state = log_probs(kl_logits), now.state
        if state.original is None:
            state.original = log_p.detach()
        elif now.fresh:
            begins = (state.steps == 0).to(log_p.device)[:, None]
            state.original = torch.where(begins, log_p.detach(), state.original)
        return kl_divergence(log_p, state.original)
