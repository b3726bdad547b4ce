"""Gradient descent for many edits' values at once, on recorded states.

The losses of a chunk's edits are summed, and since no vector enters two of them, each edit descends as if alone: its
own Adam state, clamp, step count and end.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.delta import EditReport
from retcon.edits import Edit
from retcon.errors import NonFinite
from retcon.lm.forward import Hook, Point, input_rows, log_probs, logits_at
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.lm.replay import ReplayState, capture_states, replaying
from retcon.memory.contexts import Contexts
from retcon.memory.values.objective import (
    ValueSearch,
    ValueSite,
    kl_row,
    norm_names,
    rewriting_rows,
    with_kl,
)

BETAS, EPS = (0.9, 0.999), 1e-8
"""Adam's."""
MAX_KL_PADDING_TOKENS = {"cpu": 64}
"""Tokens of padding up to which KL rows, one token long, join the rewriting rows: a pass of their own costs more."""
MAX_KL_PADDING_TOKENS_ON_ACCELERATOR = 256


@dataclass(frozen=True)
class EditRows:
    """One edit as rows of tokens."""

    edit: Edit
    rewriting: tuple[Row, ...]
    """Prompt and answer in every context, bare first."""
    starts: tuple[int, ...]
    """First token that a site touches, per rewriting row."""
    kl: Row | None
    """"<subject> is a", up to the subject's last token; None without a KL term."""

    @classmethod
    def of(cls, lm: LM, edit: Edit, sites: Sequence[ValueSite], contexts: Contexts, search: ValueSearch) -> "EditRows":
        """Tokenise, for a search over `sites`."""
        rows = tuple(rewriting_rows(lm, edit, contexts))
        starts = tuple(min(r.position(s.where) for s in sites) for r in rows)
        kl = None
        if with_kl(sites, search):
            whole = kl_row(lm, edit)
            end = whole.position("subject_last") + 1
            kl = Row(whole.ids[:end], end, end - 1)
        return cls(edit, rows, starts, kl)

    @property
    def columns(self) -> int:
        """Active tokens of the longest rewriting row."""
        return max(len(r.ids) - 1 - s for r, s in zip(self.rewriting, self.starts, strict=True))


@dataclass(frozen=True)
class ValueOf:
    """What was found for one edit, per site, on the CPU."""

    init: tuple[Float[Tensor, " d"], ...]
    offset: tuple[Float[Tensor, " d"], ...]
    activation: tuple[Float[Tensor, " d"], ...]
    report: EditReport


def active_part(lm: LM, sites: Sequence[ValueSite]) -> tuple[int, list[Point]]:
    """The first block that must be run, and where each site's vector is then added.

    Adding to what a block's last summand puts out is adding to the block's output, so with one such site in the lowest
    layer that block need not run.
    """
    lowest = min(s.point.layer for s in sites)
    points = [s.point for s in sites]
    here = [i for i, p in enumerate(points) if p.layer == lowest]
    if len(here) > 1 or not _adds_to_the_output(lm, points[here[0]]):
        return lowest, points
    points[here[0]] = Point(lowest, "block")
    return lowest + 1, points


def _adds_to_the_output(lm: LM, point: Point) -> bool:
    if point.tensor == "block":
        return True
    summand = point.tensor == "mlp" or (point.tensor == "attn" and lm.layout.parallel)
    return summand and lm.layout.adds_mlp_output


def _zeros(lm: LM, point: Point, n: int, dtype: torch.dtype) -> Float[Tensor, "n d_model"]:
    """Vectors of the residual stream's width on the device of the point's block."""
    weight = lm.site(point.layer, "down_proj").weight
    return torch.zeros(n, weight.shape[0], dtype=dtype, device=weight.device)


@dataclass(frozen=True)
class _Pass:
    """Rows that are replayed together: all rewriting rows of the active edits, then all their KL rows."""

    frozen: ReplayState
    rewriting: bool
    """Whether the rewriting rows are among them."""
    kl: bool
    """Whether the KL rows are."""
    changed: list[Int[Tensor, "2 _"]]
    """Per site, the rows and columns at which its vectors are added."""
    labels: Int[Tensor, "2 labels"]
    """Rows and columns whose logits count."""


@dataclass
class ActiveBatch:
    """The edits that are being optimised now, and the tensors that their steps share."""

    edits: list[int]
    passes: list[_Pass]
    labels: Int[Tensor, " labels"]
    label_rows: Int[Tensor, " labels"]
    """Which rewriting row each label is of."""
    labels_per_row: Int[Tensor, " rows"]
    original: Float[Tensor, "edits vocab"] | None = None
    """Log-probabilities at the KL row's subject before any change; rows of edits yet to begin are void."""


class Chunk:
    """Some edits whose frozen parts are held at once.

    Args:
        rows: of the edits, in the order in which they are taken up.
    """

    def __init__(self, lm: LM, rows: Sequence[EditRows], sites: Sequence[ValueSite], search: ValueSearch) -> None:
        self.lm, self.rows, self.sites, self.search = lm, rows, sites, search
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
        starts = [s for e in rows for s in e.starts] + [len(r.ids) - 1 for r in kl]
        contexts = [j for e in rows for j in range(self.n_contexts)] + [-1] * len(kl)
        reads = {point: [*at, *[None] * len(kl)] for point, at in reads.items()}
        self.frozen, read = capture_states(lm, texts, starts, first, reads, prefix_group=contexts)
        # a site below the active part has its clean value now, the others have it after an edit's first pass
        zeros = [_zeros(lm, site.point, len(rows), self.dtype) for site in sites]
        self.activation = [
            read[s.point].to(z) if s.point in read else z.clone() for s, z in zip(sites, zeros, strict=True)
        ]
        self.init = [x.clone() for x in self.activation]
        self.offset, self.mean, self.square = ([z.clone() for z in zeros] for _ in range(3))
        self.steps = [0] * len(rows)
        self.factor = [1.0] * len(rows)
        self.found: dict[int, ValueOf] = {}

    @property
    def nbytes(self) -> int:
        """Memory that the frozen parts take."""
        return self.frozen.nbytes

    def run(self, max_active: int) -> Iterator[int]:
        """Optimise all, `max_active` at a time; gives the place of each edit in the chunk as it ends."""
        waiting = list(range(len(self.rows)))[::-1]
        now = self.activate([waiting.pop() for _ in range(min(max_active, len(waiting)))], None)
        while now.edits:
            ended = self._step(now)
            yield from ended
            if ended:
                going = [e for e in now.edits if e not in ended]
                going += [waiting.pop() for _ in range(min(max_active - len(going), len(waiting)))]
                if not going:
                    return
                now = self.activate(going, now)

    def logits(
        self, now: ActiveBatch, vectors: Sequence[Float[Tensor, "edits d"]]
    ) -> tuple[Float[Tensor, "labels vocab"], Float[Tensor, "edits vocab"] | None]:
        """Logits at the labels of the rewriting rows and at the KL rows' subjects, `vectors` added at the sites."""
        every = self.n_contexts

        def tap(s: int, part: _Pass) -> Hook:
            site = self.sites[s]

            def add(value: Tensor) -> Tensor:
                rows, columns = part.changed[s].to(value.device)
                if part.rewriting and self.points[s] == site.point:  # else nothing below the site is run
                    bare = slice(0, len(now.edits) * every, every)
                    self.activation[s][now.edits] = value.detach()[rows[bare], columns[bare]].to(self.dtype)
                vector = vectors[s].to(value.device, value.dtype)
                added = [vector.repeat_interleave(every, dim=0)] if part.rewriting else []
                added += [vector] if part.kl and site.where == "subject_last" else []
                return value.index_put((rows, columns), torch.cat(added), accumulate=True)

            return add

        below_the_last = all(p.layer < self.lm.n_layers - 1 for p in self.points)
        found: list[Tensor] = []
        for part in now.passes:
            hooks = {point: tap(s, part) for s, point in enumerate(self.points) if part.changed[s].numel()}
            labels = (part.labels[0], part.labels[1])
            with replaying(self.lm, part.frozen, ends=labels if below_the_last else None) as inputs:
                logits = logits_at(self.lm, inputs, labels, hooks)
            found += logits.split([len(now.labels)] * part.rewriting + [len(now.edits)] * part.kl)
        return found[0], found[1] if self.with_kl else None

    def activate(self, edits: list[int], before: ActiveBatch | None = None) -> ActiveBatch:
        """The tensors that the next steps share."""
        targets = [r.target_ids for e in edits for r in self.rows[e].rewriting]
        device = next(self.lm.head.parameters()).device
        labels_per_row = torch.tensor([len(t) for t in targets], device=device)
        original = None
        if before is not None and before.original is not None:
            original = before.original.new_zeros(len(edits), before.original.shape[1])
            stay = [(i, before.edits.index(e)) for i, e in enumerate(edits) if e in before.edits]
            if stay:
                here, there = zip(*stay, strict=True)
                original[list(here)] = before.original[list(there)]
        padding = len(edits) * (max(self.rows[e].columns for e in edits) - 1)
        together = padding <= MAX_KL_PADDING_TOKENS.get(device.type, MAX_KL_PADDING_TOKENS_ON_ACCELERATOR)
        kinds = [(True, self.with_kl)] if together or not self.with_kl else [(True, False), (False, True)]
        return ActiveBatch(
            edits=edits,
            passes=[self._pass(edits, rewriting=rewriting, kl=kl) for rewriting, kl in kinds],
            labels=torch.tensor([token for ids in targets for token in ids], device=device),
            label_rows=torch.arange(len(targets), device=device).repeat_interleave(labels_per_row),
            labels_per_row=labels_per_row,
            original=original,
        )

    def _pass(self, edits: Sequence[int], *, rewriting: bool, kl: bool) -> _Pass:
        rows: list[int] = []
        changed: list[list[tuple[int, int]]] = [[] for _ in self.sites]
        labels: list[tuple[int, int]] = []
        for e in edits if rewriting else ():
            for j, (row, start) in enumerate(zip(self.rows[e].rewriting, self.rows[e].starts, strict=True)):
                for s, site in enumerate(self.sites):
                    changed[s].append((len(rows), row.position(site.where) - start))
                labels += [(len(rows), row.n_prompt - 1 - start + t) for t in range(len(row.target_ids))]
                rows.append(e * self.n_contexts + j)
        for e in edits if kl else ():
            for s, site in enumerate(self.sites):
                if site.where == "subject_last":
                    changed[s].append((len(rows), 0))
            labels.append((len(rows), 0))
            rows.append(len(self.rows) * self.n_contexts + e)
        device = next(self.lm.head.parameters()).device
        return _Pass(
            frozen=self.frozen.select(rows),
            rewriting=rewriting,
            kl=kl,
            changed=[torch.tensor(places, dtype=torch.long).view(-1, 2).T for places in changed],
            labels=torch.tensor(labels, device=device).T,
        )

    def _step(self, now: ActiveBatch) -> list[int]:
        """One forward and backward pass and an update for the active edits; those that ended come back."""
        search, edits = self.search, now.edits
        vectors = [d[edits].requires_grad_() for d in self.offset]
        last = [self.steps[e] == search.steps - 1 for e in edits]
        begin = [e for e in edits if self.steps[e] == 0]
        with torch.enable_grad():
            logits, kl_logits = self.logits(now, vectors)
            for init, activation in zip(self.init, self.activation, strict=True):
                init[begin] = activation[begin]
            log_p = log_probs(logits)
            picked = log_p.gather(1, now.labels[:, None])[:, 0]
            nll_rows = log_p.new_zeros(len(now.labels_per_row)).index_add(0, now.label_rows, -picked)
            nll_rows = (nll_rows / now.labels_per_row).view(len(edits), -1)
            nll = nll_rows.mean(1)
            loss = nll * nll.new_tensor([self.factor[e] for e in edits])
            kl = torch.zeros_like(nll)
            if kl_logits is not None:
                kl = self._divergence(now, kl_logits)
                loss = loss + search.kl_factor * kl
            for site, vector, init in zip(self.sites, vectors, self.init, strict=True):
                decay = site.weight_decay * vector.norm(dim=1) / init[edits].norm(dim=1) ** 2
                loss = loss + decay.to(loss.device)
            gradients = None if all(last) else torch.autograd.grad(loss.sum(), vectors)
        reached = (-nll_rows.detach()).exp().mean(1)
        settled = self._settled(now, log_p) if search.settled_factor is not None else torch.zeros_like(reached)
        stopping = reached if search.stop == "probability" else loss.detach()
        # from here on the host waits for the numbers that the stop test needs
        table = torch.stack([stopping, reached, nll.detach(), kl.detach(), loss.detach(), settled]).double().cpu()
        done, ended = [], []
        for i, e in enumerate(edits):
            value, probability, *terms, all_likely = table[:, i].tolist()
            if not math.isfinite(terms[2]):
                edit = self.rows[e].edit
                raise NonFinite(f"edit {edit.id!r} ({edit.subject!r}): the loss is {terms[2]} at step {self.steps[e]}")
            over = value >= search.threshold if search.stop == "probability" else value < search.threshold
            if search.settled_factor is not None:
                self.factor[e] = search.settled_factor if all_likely else 1.0
                over = over or (bool(all_likely) and search.kl_factor * terms[1] <= search.settled_kl)
            done.append(over)
            if over or last[i]:
                ended.append(e)
                self.found[e] = self._result(e, over, probability, dict(zip(("nll", "kl", "loss"), terms, strict=True)))
        going = [i for i, e in enumerate(edits) if e not in ended]
        if going and gradients is not None:
            self._descend([edits[i] for i in going], [g[going] for g in gradients])
        return ended

    def _divergence(self, now: ActiveBatch, kl_logits: Float[Tensor, "edits vocab"]) -> Float[Tensor, " edits"]:
        """KL(edited || original) at the subject of "<subject> is a"."""
        log_p = log_probs(kl_logits)
        begins = torch.tensor([self.steps[e] == 0 for e in now.edits], device=log_p.device)
        if now.original is None:
            now.original = log_p.detach()
        elif any(self.steps[e] == 0 for e in now.edits):
            now.original = torch.where(begins[:, None], log_p.detach(), now.original)
        return (log_p.exp() * (log_p - now.original)).sum(1)

    def _settled(self, now: ActiveBatch, log_p: Float[Tensor, "labels vocab"]) -> Float[Tensor, " edits"]:
        """1 where every target token is the most likely one in every rewriting row."""
        wrong = (log_p.argmax(-1) != now.labels).to(log_p.dtype)
        per_row = wrong.new_zeros(len(now.labels_per_row)).index_add(0, now.label_rows, wrong)
        return (per_row.view(len(now.edits), -1).sum(1) == 0).to(log_p.dtype)

    @torch.no_grad()
    def _descend(self, edits: list[int], gradients: Sequence[Float[Tensor, "edits d"]]) -> None:
        """One step of Adam, each edit by its own count, and the way back onto its ball."""
        for e in edits:
            self.steps[e] += 1
        counts = [self.steps[e] for e in edits]
        beta, beta2 = BETAS
        for s, (site, gradient) in enumerate(zip(self.sites, gradients, strict=True)):
            mean = self.mean[s][edits].lerp(gradient, 1 - beta)
            square = (self.square[s][edits] * beta2).addcmul(gradient, gradient, value=1 - beta2)
            size = mean.new_tensor([self.search.learning_rate / (1 - beta**t) for t in counts])[:, None]
            root = mean.new_tensor([math.sqrt(1 - beta2**t) for t in counts])[:, None]
            offset = self.offset[s][edits] - size * mean / (square.sqrt() / root + EPS)
            radius = site.clamp * self.init[s][edits].norm(dim=1, keepdim=True)
            length = offset.norm(dim=1, keepdim=True)
            offset = torch.where(length > radius, offset * (radius / length), offset)
            self.mean[s][edits], self.square[s][edits], self.offset[s][edits] = mean, square, offset

    def _result(self, e: int, over: bool, probability: float, terms: dict[str, float]) -> ValueOf:
        init, offset, activation = (
            tuple(x[e].cpu() for x in part) for part in (self.init, self.offset, self.activation)
        )
        stopped = "reached" if over else "steps"
        for site, name, i, d in zip(self.sites, norm_names(self.sites), init, offset, strict=True):
            terms[f"{name}_offset"], terms[f"{name}_init"] = float(d.norm()), float(i.norm())
            if not over and float(d.norm()) >= site.clamp * float(i.norm()) * (1 - 1e-4):
                stopped = "clamped"
        return ValueOf(
            init, offset, activation, EditReport(self.rows[e].edit.id, probability, self.steps[e], stopped, terms)
        )
