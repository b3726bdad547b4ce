"""One pass over text for the second moments of all sites, in chunks, so that a killed pass can be taken up again.

A chunk's products are summed in float32 where the keys are and then added to float64 sums; only block rows of the lower
triangle are computed. The order of chunks and batches is a function of the rows and of a budget of tokens per batch,
and the budget is kept with the partial sums: a pass that was killed ends with the sums it would have had, bit for bit.
Chunks are pieces of work for `lm.workers`. Their sums are added in the chunks' order, so that the bits do not depend on
how many workers there are.
"""

import functools
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from retcon.checked import Kind, cached, keep
from retcon.errors import InvalidSetting, NonFinite, OutOfMemory, RetconWarning
from retcon.lm.batches import halved, is_out_of_memory, release_memory
from retcon.lm.capacity import free_bytes, planned_bytes
from retcon.lm.forward import Point, TensorName, run
from retcon.lm.model import LM
from retcon.lm.offload import put_away
from retcon.lm.prompts import Row, pad
from retcon.lm.site import Site
from retcon.work import Here, in_order, silent

CHUNK_TOKENS = {"cpu": 16_384, "cuda": 131_072}
"""Tokens between two additions to the float64 sums, at most, by kind of device. Partial sums are saved between chunks,
and rows of like length are looked for within one."""
PASS_TOKENS = {"cpu": 1024, "cuda": 32_768}
"""Padded tokens of one forward pass, at most, by kind of device."""
SAVE_EVERY = 30.0
"""Seconds between two savings of partial sums."""
PARTIAL_SUMS = Kind("partial sums of second moments", format=3, computation=1)
MAX_PADDING_SHARE = 1 / 32
"""Share of padding that a batch of a fair size may have; it is fair from a thirty-second of the budget on."""


@dataclass(frozen=True)
class Collected:
    """One site's second moment."""

    moment: Float[Tensor, "d_in d_in"]
    """E[k k^T], float64 on the CPU."""
    convergence: float | None
    """||C1 - C2|| / ||C|| (Frobenius), C1 and C2 from the two halves of the rows; None for a single row."""
    n_routed: int = 0
    """Tokens that a routed expert has seen."""
    shrunk_to: int | None = None
    """Padded tokens of one forward pass, where memory ran out and smaller passes were allowed."""


def collect(
    lm: LM,
    sites: Sequence[Site],
    rows: Sequence[Row],
    *,
    max_batch_tokens: int | None = None,
    shrink: bool = False,
    progress: Callable[[int, int], None] = silent,
    partial: Path | None = None,
    save_every: float | None = None,
) -> Iterator[tuple[Site, Collected]]:
    """Yield the second moments of all sites from one pass, handed over one by one, so that each can be put away.

    E[k k^T] over every token of the rows, first positions included, padding excluded. On the unedited weights (applied
    deltas are reverted for the pass), stopping at the highest site. Products are summed in float32 (or the model's own
    wider dtype) within a chunk, chunks in float64. Where memory runs out the sums are put out of the way and the chunk
    is done again, which changes no bit.

    Args:
        max_batch_tokens: padded tokens of one forward pass; by default as many as the planned memory allows.
        shrink: where memory runs out all the same, go on with half as many tokens a pass, with a warning: the moments
            are then others in their last bits.
        partial: where partial sums are kept every now and then; a pass of the same rows and sites begins with what it
            finds there. The caller deletes it once the moments are safe.
        save_every: seconds between two savings, `SAVE_EVERY` by default; more where saving takes long.

    Raises:
        InvalidSetting: there are no rows.
        NonFinite: a moment came out NaN or infinite.
        OutOfMemory: a pass does not fit, and `shrink` does not allow a smaller one; or not even one row fits. What has
            been summed is kept in `partial`.
    """
    if not rows:
        raise InvalidSetting("no rows given to collect second moments from; give at least one with a token")
    chunks = chunked([len(r.ids) for r in rows], CHUNK_TOKENS.get(lm.device.type, CHUNK_TOKENS["cpu"]))
    sums = {s: _Sum(s) for s in sites}
    planned = max_batch_tokens or _budget(lm, rows)
    state = _State(_digest(lm, sites, rows, chunks), 0, planned, planned)
    if partial is not None:
        state = _load(partial, state, sums, shrink)
    ends = list(accumulate(sum(len(rows[j].ids) for j in chunk) for chunk in chunks))
    n_half = min(range(1, len(chunks) + 1), key=lambda n: abs(2 * ends[n - 1] - ends[-1]))
    saved, pause = time.monotonic(), SAVE_EVERY if save_every is None else save_every
    here = isinstance(lm.workers, Here)

    def make_room() -> None:
        for site_sum in sums.values():
            site_sum.make_room()

    work = SumOfChunk(dict(map(_point_and_width, sites)), state.budget, shrink, here, make_room if here else None)
    pieces = [tuple(rows[j] for j in chunk) for chunk in chunks[state.n_done :]]
    with lm.frozen_eval(), lm.without_deltas():
        try:
            for products, budget in in_order(lm.workers.map(lm, work, pieces, silent)):
                for site_sum in sums.values():
                    site_sum.add(products.pop(0))
                state.budget = min(state.budget, budget)
                state.n_done += 1
                if state.n_done == n_half < len(chunks):
                    for site_sum in sums.values():
                        site_sum.keep_half()
                progress(ends[state.n_done - 1], ends[-1])
                if partial is not None and time.monotonic() - saved >= pause:
                    started = time.monotonic()
                    _save(partial, state, sums)
                    saved = time.monotonic()
                    pause = max(pause, 20 * (saved - started))
        except OutOfMemory:
            if partial is not None and state.n_done:
                _save(partial, state, sums)
            raise
    _warn_of_few({site: site_sum.n_routed for site, site_sum in sums.items() if site.expert is not None})
    for site in sites:
        found = sums.pop(site).result(ends[n_half - 1], ends[-1])
        yield site, found if state.budget == state.planned else replace(found, shrunk_to=state.budget)


def chunked(lengths: Sequence[int], most: int) -> list[range]:
    """Return consecutive rows in chunks of at most that many tokens (or one row), two chunks or more if possible."""
    size = min(most, -(-sum(lengths) // 2))
    chunks: list[range] = []
    start = n_tokens = 0
    for i, length in enumerate(lengths):
        if n_tokens and n_tokens + length > size:
            chunks.append(range(start, i))
            start, n_tokens = i, 0
        n_tokens += length
    return [*chunks, range(start, len(lengths))]


def batched(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Return indices grouped by length into batches of at most `budget` padded tokens (or one row).

    A batch of a fair size takes no row that would bring its padding above `MAX_PADDING_SHARE`.
    """
    groups: list[list[int]] = []
    real = 0
    for i in sorted(range(len(lengths)), key=lambda i: (lengths[i], i)):
        padded = (len(groups[-1]) + 1) * lengths[i] if groups else 0  # ascending: the newcomer is the longest
        wasteful = real >= budget // 32 and padded - real - lengths[i] > MAX_PADDING_SHARE * padded
        if groups and padded <= budget and not wasteful:
            groups[-1].append(i)
            real += lengths[i]
        else:
            groups.append([i])
            real = lengths[i]
    return groups


class SumOfChunk:
    """The products of one chunk of rows, as work that can be sent elsewhere.

    Args:
        widths: of each site's keys, by the point where they are read.
        budget: padded tokens of one forward pass. Where memory runs out and `shrink` allows fewer, later chunks in this
            process begin with what was found to fit.
        shrink: as `collect` has it.
        on_device: leave the sums where the keys are; else they come to the CPU, and can travel.
        make_room: puts what this process holds out of the way, before a chunk that did not fit is tried again.
    """

    def __init__(
        self,
        widths: Mapping[Point, int],
        budget: int,
        shrink: bool,
        on_device: bool,
        make_room: Callable[[], None] | None,
    ) -> None:
        self.widths, self.budget, self.shrink = widths, budget, shrink
        self.on_device, self.make_room = on_device, make_room

    def __call__(self, lm: LM, piece: Sequence[Row], progress: Callable[[int], None]) -> tuple[list["_Products"], int]:
        """Return the products of every site, and the budget that they could be summed with."""
        with lm.frozen_eval(), lm.without_deltas(), torch.no_grad():
            found = list(self._of_chunk(lm, piece).values())
        if not self.on_device:
            for products in found:
                products.blocks = [block.cpu() for block in products.blocks]
        return found, self.budget

    def _of_chunk(self, lm: LM, rows: Sequence[Row]) -> dict[Point, "_Products"]:
        longest = max(len(r.ids) for r in rows)
        tried = False
        while True:
            found = {point: _Products(width, point.expert is not None) for point, width in self.widths.items()}
            try:
                for group in batched([len(r.ids) for r in rows], self.budget):
                    _add_batch(lm, found, [rows[i] for i in group])
                return found
            except (RuntimeError, MemoryError) as error:
                if tried:
                    self.budget = _smaller(error, self.budget, longest, self.shrink)
                elif not is_out_of_memory(error):
                    raise
            del found
            if not tried and self.make_room is not None:
                self.make_room()
            tried = True
            release_memory()


def _smaller(error: BaseException, budget: int, longest: int, shrink: bool) -> int:
    """Return the budget to go on with after memory ran out, with a warning.

    Raises:
        OutOfMemory: there is none that is allowed.
        BaseException: `error` again, where it is another one.
    """
    if not is_out_of_memory(error):
        raise error
    if budget <= longest:
        raise OutOfMemory(
            f"a text of {longest:,} tokens does not fit into memory; load the model in bfloat16, give the corpus in "
            "shorter documents, or use a device with more memory"
        ) from error
    if not shrink:
        raise OutOfMemory(
            f"memory ran out in a forward pass of {budget:,} tokens of the corpus. Free some memory and run again "
            "(what has been read is kept), or allow smaller passes with shrink=True (--shrink); the second moments, "
            "and deltas made with them, then differ in their last bits from those that another run would give"
        ) from error
    budget = halved(error, budget, longest)
    warnings.warn(
        f"memory ran out; going on with at most {budget:,} tokens of the corpus a pass, as shrink allows: these second "
        "moments are others, in their last bits, than a run with enough memory gives (their record says so)",
        RetconWarning,
        stacklevel=6,
    )
    return budget


def _point_and_width(site: Site) -> tuple[Point, int]:
    """Return where the keys of a site's moment are read, and how wide they are."""
    tensor: TensorName = "key" if site.kind == "down_proj" else "attn_key"
    return Point(site.layer, tensor, site.expert), site.shape[1]


def _add_batch(lm: LM, found: dict[Point, "_Products"], rows: Sequence[Row]) -> None:
    batch = pad(rows, lm.device)
    longest = batch.ids.shape[1]
    index = None
    if any(len(r.ids) < longest for r in rows):
        index = torch.cat([torch.arange(len(r.ids)) + i * longest for i, r in enumerate(rows)]).to(lm.device)

    run(lm, batch, {point: functools.partial(products.add, index=index) for point, products in found.items()})


def _edges(d: int) -> list[int]:
    """Return where the block rows of a d x d matrix begin and end."""
    n_blocks = min(max(d // 96, 1), 8)
    return [d * i // n_blocks for i in range(n_blocks + 1)]


def _blocks(d: int, dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    """Return zeros for the lower triangle of a d x d matrix: row i of blocks spans the columns up to its own."""
    spans = pairwise(_edges(d))
    return [torch.zeros(end - start, end, dtype=dtype, device=device) for start, end in spans]


class _Products:
    """Sum of k k^T over one chunk, in float32 (or the keys' own wider dtype), as block rows of its lower triangle."""

    def __init__(self, d: int, routed: bool) -> None:
        self.d, self.routed, self.n_routed = d, routed, 0
        self.blocks: list[Tensor] = []

    def add(self, keys: Float[Tensor, "*rows d_in"], index: Int[Tensor, " n_real"] | None) -> None:
        """Add the products of these keys, or of those that `index` names."""
        keys = keys.flatten(0, -2)
        if index is not None:
            keys = keys.index_select(0, index.to(keys.device))
        if self.routed:
            keys = keys[keys.any(1)]
            self.n_routed += len(keys)
        wide = torch.promote_types(keys.dtype, torch.float32)
        if not self.blocks:
            self.blocks = _blocks(self.d, wide, keys.device)
        exact_halves = keys.is_cuda and keys.dtype != wide and hasattr(torch.ops.aten.mm, "dtype")
        if not exact_halves:
            keys = keys.to(wide)
        for block, (start, end) in zip(self.blocks, pairwise(_edges(self.d)), strict=True):
            left, right = keys[:, start:end].T, keys[:, :end]
            if exact_halves:  # products of 16-bit numbers are exact in float32, in which they are summed
                block += torch.mm(left, right, out_dtype=wide)
            else:
                block.addmm_(left, right)


class _Sum:
    """Running sum of k k^T of one site over chunks, float64, as block rows of its lower triangle."""

    @torch.inference_mode(False)  # what is made here is added to in place, in plain modes
    def __init__(self, site: Site) -> None:
        self.site, self.d = site, site.shape[1]
        self.edges = _edges(self.d)
        device = site.device
        needed = 8 * self.d * self.d  # little more than float64 sums and float32 partial ones take
        roomy = device.type == "cuda" and free_bytes(device) > 16 * needed
        self.total = _blocks(self.d, torch.float64, device if roomy else torch.device("cpu"))
        self.half: list[Tensor] = []
        self.n_routed = 0

    def add(self, products: _Products) -> None:
        """Add a chunk's sum to the whole."""
        for total, block in zip(self.total, products.blocks, strict=True):
            total += block.to(total.device)
        self.n_routed += products.n_routed

    def make_room(self) -> None:
        """Put what is kept where the system, or the CPU, can hold it, with the same bits."""
        with suppress(OSError):  # no room on the disk either
            self.total, self.half = [[put_away(t.cpu()) for t in each] for each in (self.total, self.half)]

    def keep_half(self) -> None:
        """Remember the sum as it is now, which is the first half's."""
        self.half = [total.to(torch.float32) for total in self.total]

    def result(self, n_first: int, n: int) -> Collected:
        """Return the moment over n tokens, n_first of them the first half's; worked out where the sums are."""
        moment = self.total[0].new_empty(self.d, self.d)
        for total, start, end in zip(self.total, self.edges, self.edges[1:], strict=False):
            block = total / n
            block[:, start:] = block[:, start:].tril() + block[:, start:].tril(-1).T
            moment[start:end, :end] = block
            moment[:start, start:end] = block[:, :start].T
        if not torch.isfinite(moment.sum()):
            raise NonFinite(f"the second moment of {self.site.id} is NaN or infinite; load the model in a wider dtype")
        if self.site.expert is not None:
            moment = with_few_tokens(moment, self.n_routed)
        if not self.half:
            return Collected(moment.cpu(), None, self.n_routed)
        squares = moment.new_zeros(())
        for total, half, start in zip(self.total, self.half, self.edges, strict=False):
            half = half.to(total.device)
            change = half.double() / n_first
            change -= (total - half) / (n - n_first)
            squares += 2 * change.square().sum() - change[:, start:].square().sum()
        return Collected(moment.cpu(), float(squares) ** 0.5 / float(moment.norm()), self.n_routed)


UNSEEN = 1e12
"""Second moment of an expert that no token of the corpus was routed to: nothing is known of its keys, so that it is not
written."""


TOKENS_WANTED = 10
"""Tokens per key dimension under which an expert's second moment is smoothed."""


def with_few_tokens(moment: Float[Tensor, "d_ff d_ff"], n_routed: int) -> Float[Tensor, "d_ff d_ff"]:
    """Return a routed expert's second moment, made safe to invert where few tokens reached it.

    Under `TOKENS_WANTED` per dimension a hundredth of the mean diagonal is added to the diagonal.
    """
    width = len(moment)
    if n_routed >= TOKENS_WANTED * width:
        return moment
    identity = torch.eye(width, dtype=moment.dtype, device=moment.device)
    return moment + 0.01 * moment.trace() / width * identity if n_routed else UNSEEN * identity


def _warn_of_few(n_routed: Mapping[Site, int]) -> None:
    """Say, once for all of them, which routed experts the corpus says little of, and what becomes of their moments."""
    few = {site: n for site, n in n_routed.items() if n < TOKENS_WANTED * site.shape[1]}
    for sites, outcome in (
        ([site for site, n in few.items() if n], "their second moments are smoothed"),
        ([site for site, n in few.items() if not n], "their keys are unknown and they are not written"),
    ):
        if sites:
            least = min(sites, key=lambda site: few[site])
            warnings.warn(
                f"too few tokens of the corpus were routed to {len(sites)} of {len(n_routed)} experts "
                f"({few[least]} to {least.id}, the fewest of these; {TOKENS_WANTED * least.shape[1]} are wanted for "
                f"{least.shape[1]} key dimensions); {outcome}. A longer corpus has more",
                RetconWarning,
                stacklevel=4,
            )


# --- how much at once --------------------------------------------------------------------------------------------


def _budget(lm: LM, rows: Sequence[Row]) -> int:
    """Return the padded tokens of one forward pass: what half of the planned memory holds, up to a maximum."""
    d_model, d_ff = lm.d_model, lm.d_ff
    longest = max(len(r.ids) for r in rows)
    per_token = lm.dtype.itemsize * (12 * d_model + 6 * d_ff) + 12 * lm.config.num_attention_heads * longest
    most = PASS_TOKENS.get(lm.device.type, PASS_TOKENS["cpu"])
    return max(min(most, planned_bytes(lm) // 2 // per_token), longest)


# --- partial sums on disk ----------------------------------------------------------------------------------------


@dataclass
class _State:
    """How far a pass has come."""

    digest: str
    """Of the model's dtype, rows, chunks and sites."""
    n_done: int
    """Chunks that are in the sums."""
    planned: int
    """Padded tokens of one forward pass, as memory was planned with."""
    budget: int
    """From here on; less than planned where memory ran out and `shrink` allowed it."""


def _digest(lm: LM, sites: Sequence[Site], rows: Sequence[Row], chunks: Sequence[range]) -> str:
    ends = [c.stop for c in chunks]
    digest = hashlib.sha256(json.dumps([str(lm.dtype), [s.id for s in sites], ends]).encode())
    for row in rows:
        digest.update(json.dumps(row.ids).encode())
    return digest.hexdigest()


def _save(path: Path, state: _State, sums: dict[Site, _Sum]) -> None:
    """Write the sums so that a crash at any point leaves the old file or the new one."""
    tensors: dict[str, Tensor] = {}
    for site, site_sum in sums.items():
        tensors |= {f"{site.id}:{i}": total.cpu() for i, total in enumerate(site_sum.total)}
        tensors |= {f"{site.id}:{i}:half": half.cpu() for i, half in enumerate(site_sum.half)}
        tensors[f"{site.id}:routed"] = torch.tensor(site_sum.n_routed)
    about = {"n_done": state.n_done, "planned": state.planned, "budget": state.budget}
    keep(path, PARTIAL_SUMS, {"digest": state.digest}, tensors, about)


@torch.inference_mode(False)
def _load(path: Path, fresh: _State, sums: dict[Site, _Sum], shrink: bool) -> _State:
    """Fill the sums from a file of the same pass, and say how far it came; `fresh` where there is none.

    Sums of smaller passes are taken up only where such are allowed.
    """
    found = cached(path, PARTIAL_SUMS, {"digest": fresh.digest})
    if found is None:
        return fresh
    tensors, about = found
    if about["budget"] < about["planned"] and not shrink:
        return fresh
    wanted = {f"{s.id}:{i}" for s, site_sum in sums.items() for i in range(len(site_sum.total))}
    if not (wanted | {f"{site.id}:routed" for site in sums}) <= tensors.keys():  # of a version that kept less
        return fresh
    for site, site_sum in sums.items():
        site_sum.n_routed = int(tensors[f"{site.id}:routed"])
        for i, total in enumerate(site_sum.total):
            total.copy_(tensors[f"{site.id}:{i}"])
            if f"{site.id}:{i}:half" in tensors:
                site_sum.half.append(tensors[f"{site.id}:{i}:half"])
    return _State(fresh.digest, about["n_done"], about["planned"], about["budget"])
