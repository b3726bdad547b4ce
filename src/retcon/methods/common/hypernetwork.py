"""What MEND and MALMEN share around their own formulas: the facts to train on, the training, and the trained file.

`fit_editor` trains a `Hypernetwork` on cases and writes it to a file; `load_editor` reads it back for a model. Which
gradient and which loss, the methods say.
"""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, TypeVar, get_args
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor

from retcon.checked import Kind, read_checked, write_checked
from retcon.edits import Case, Query, cases_hash, check_edits
from retcon.errors import InvalidSetting, MalformedFile, WrongBase
from retcon.evaluation.metrics import is_locality
from retcon.files import sha256_of
from retcon.lm.batches import MAX_BATCH_TOKENS, in_batches
from retcon.lm.forward import answer_places, gold, input_rows, log_probs, logits_at
from retcon.lm.model import LM, Site, SiteName, require_lm
from retcon.lm.prompts import Row, encode, ended, pad
from retcon.locate.gradients import catch
from retcon.methods.common.contract import Trainable, check_as_trained, check_depth, check_settings
from retcon.methods.common.settings import AnyLayers, Count, CountFromZero, Matrices, Positive, checked_settings
from retcon.methods.common.tuning import check_memory, sites_named
from retcon.training.fitting import CurvePoint, Fit, FitSchedule
from retcon.training.hypernetwork import Hypernetwork, ScaleAt, not_zero
from retcon.training.objective import answer_nll, rephrasings, trained_rows
from retcon.training.parts import Part, attached
from retcon.version import __version__
from retcon.work import Progress, silent

EDITOR = Kind("a trained editor", format=1, computation=1)
LEAST_CASES = 4
"""Cases that training needs: three to train on, one to validate with."""


@dataclass(frozen=True, kw_only=True)
class HypernetworkSettings(Trainable):
    """What a hypernetwork lets one set. All but `editor` is for `fit`; an edit has it from the editor's file."""

    state_description: ClassVar[str] = ""
    scale_at: ClassVar[ScaleAt]
    """Where a block's scale and shift act."""
    with_ridge: ClassVar[bool] = False
    """Whether a lambda is learned for each matrix, besides its eta."""
    eps: ClassVar[float]
    """Added to deviations that are divided by."""

    editor: str | None = None
    """File of the trained editor, which `fit` writes."""
    layers: AnyLayers = ()
    """Blocks that are edited, ascending, counted from 0; none: the last three."""
    modules: Matrices = ("gate_proj", "up_proj", "down_proj")
    """Matrices that are edited in each of them: kinds of sites, as far as the model has them, or a module's path inside
    a block."""
    step_size: float = 1e-4
    """Where eta starts, which is learned for each matrix."""
    rank: Count = 1920
    """Rank of a network's matrices U V, at most its width."""
    n_blocks: CountFromZero = 2
    """Blocks of a network."""
    normalise: bool = True
    """Put what enters a network to mean 0 and deviation 1."""
    batch_size: Count = 10
    """Edits of a training step."""
    steps: CountFromZero = 10_000
    """Training steps at most."""
    validate_every: Count = 100
    """Training steps between two validations."""
    patience: Count = 2_000
    """Training steps without a better validation loss after which training ends."""
    clip: Positive
    """Largest norm of a gradient."""
    anneal: bool = False
    """Let learning rates fall linearly to nothing over the steps."""
    n_validation: Count = 100
    """Cases to validate with, which are not trained on; a fifth of the cases at most."""

    def __post_init__(self) -> None:
        check_settings(self)

    def as_trained(self) -> Self:
        """Return the method with the settings that its editor was trained with; itself where no editor is named.

        Raises:
            MalformedFile: the file is no editor of this method.
            InvalidSetting: a setting is neither the default nor the one in the file.
        """
        return self if self.editor is None else with_settings_of(self, read_editor(self.name, Path(self.editor))[1])

    def untrained(self, lm: LM, sites: Sequence[Site], seed: int = 0) -> Hypernetwork:
        """Return an editor that leaves pieces as they are, or normalises them; `seed` draws U and V."""
        return Hypernetwork(
            [(site.shape[1], site.shape[0]) for site in sites],
            step_size=self.step_size,
            with_ridge=self.with_ridge,
            rank=self.rank,
            n_blocks=self.n_blocks,
            scale_at=self.scale_at,
            normalise=self.normalise,
            eps=self.eps,
            dtype=torch.promote_types(lm.dtype, torch.float32),
            seed=seed,
        ).to(lm.device)

    def new_editor(self, lm: LM, out: str | Path, seed: int) -> tuple[list[Site], Hypernetwork]:
        """Return the matrices that are edited and an untrained editor of them, once both can be trained and kept.

        Raises:
            InvalidSetting: `out` is a directory; an editor is named already; or as `sites`.
            NotEditable: as `sites`.
            OutOfMemory: networks, gradients, Adam's moments and the best networks do not fit.
        """
        if self.editor is not None:
            raise InvalidSetting(f"{self.name}: a new editor is trained, not {self.editor!r}; leave editor out")
        if Path(out).is_dir():
            raise InvalidSetting(f"{out} is a directory; give the name of a file for the editor")
        check_memory(self.name, lm, self.n_fitted(lm))
        sites = self.sites(lm)
        return sites, self.untrained(lm, sites, seed)

    def curve(self, editor: Path) -> Sequence[CurvePoint]:
        """Return the losses of the training.

        Raises:
            MalformedFile: the file is no editor of this method.
        """
        return [CurvePoint(**point) for point in read_editor(self.name, editor)[1]["curve"]]

    def schedule(self) -> FitSchedule:
        """Return how long to train."""
        return FitSchedule(
            steps=self.steps,
            validate_every=self.validate_every,
            patience=self.patience,
            clip=self.clip,
            anneal=self.anneal,
        )

    def sites(self, lm: LM) -> list[Site]:
        """Return the matrices that are edited, layer by layer.

        Raises:
            InvalidSetting: a layer or a path that the model does not have, or none of the matrices.
            NotEditable: one of the matrices shares its memory with other parameters.
        """
        require_lm(lm)
        layers = self.layers or tuple(range(max(lm.n_layers - 3, 0), lm.n_layers))
        check_depth(self.name, lm, layers)
        kinds = get_args(SiteName)
        found = [
            site
            for layer in layers
            for kind in self.modules
            if kind not in kinds or lm.has(layer, kind)  # type: ignore[arg-type]
            for site in sites_named(self.name, lm, [layer], [kind])
        ]
        if not found:
            experts = any(lm.kinds[layer].experts for layer in layers)
            raise InvalidSetting(
                f"{self.name}: {lm.name!r} ({lm.config.model_type}) has none of {', '.join(self.modules)} in layers "
                f"{', '.join(map(str, layers))}"
                f"{' but those of routed experts, which are not edited; name others, o_proj for instance' * experts}"
            )
        for site in found:
            lm.check_editable(site.name)
        return found

    def n_fitted(self, lm: LM) -> int:
        """Return how many values `fit` trains."""
        shapes = [tuple(site.shape) for site in self.sites(lm)]
        widths = [sum(shape) for shape in dict.fromkeys(shapes)]
        shared = sum(2 * min(self.rank, width) * width + width for width in widths)
        return self.n_blocks * (shared + 2 * sum(map(sum, shapes))) + (1 + self.with_ridge) * len(shapes)


# --- facts to train on ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A case as it is trained on."""

    edit: Row
    """The edit's prompt and its new answer: what the gradient is of."""
    rephrasings: tuple[Row, ...]
    """Other prompts that should get the new answer too; the edit's own where the case has none for it."""
    others: tuple[Row, ...]
    """Prompts with answers that should stay; none where the case has no neighbours."""


@dataclass(frozen=True)
class Drawn:
    """One training example's rows: an edit, one rephrasing, one prompt that should stay."""

    edit: Row
    rephrasing: Row
    other: Row


def examples(lm: LM, cases: Sequence[Case]) -> list[Example]:
    """Return each edit of the cases, with the rephrasings and the neighbours of its case.

    Of several edits in a case each has the rephrasings that ask for its answer alone.

    Raises:
        InvalidEdit: an edit that cannot mean anything; or one, a rephrasing or a neighbour is longer than the model's
            context.
    """
    found = []
    for case in cases:
        check_edits(case.edits)
        others = tuple(_encoded(lm, case, q) for q in case.queries if is_locality(q.axis) and q.target is not None)
        for edit, row in zip(case.edits, trained_rows(lm, case.edits), strict=True):
            asked = [query for query in rephrasings(case, edit) if query.target is not None]
            own = tuple(ended(lm.tokenizer, _encoded(lm, case, query), query.chat) for query in asked)
            found.append(Example(row, own or (row,), others))
    return found


def _encoded(lm: LM, case: Case, query: Query) -> Row:
    row = encode(lm.tokenizer, query.prompt, query.target, separator=query.separator, chat=query.chat)
    lm.check_length(query.prompt, row, what=f"case {case.id!r}, query {query.id!r}:")
    return row


def draw(pool: Sequence[Example], chosen: Sequence[Example], rng: random.Random) -> list[Drawn]:
    """Return a rephrasing and another prompt for each chosen example; without neighbours, another one's edit.

    That is one that is not chosen, as far as the pool has more: what MALMEN writes in the same step cannot stay.
    """
    edited, found = set(map(id, chosen)), []
    spare = [e for e in pool if id(e) not in edited]
    for example in chosen:
        others = example.others or (rng.choice(spare or [e for e in pool if e is not example]).edit,)
        found.append(Drawn(example.edit, rng.choice(example.rephrasings), rng.choice(others)))
    return found


# --- passes through the model --------------------------------------------------------------------------------------


def pieces(
    lm: LM, sites: Sequence[Site], rows: Sequence[Row]
) -> list[tuple[Float[Tensor, "batch seq in"], Float[Tensor, "batch seq out"]]]:
    """u and delta of each site, from one backward pass: what enters it, and dL_e/dy, L_e being each row's own loss.

    On `lm.device`, where the networks are.
    """
    found = {c.site: (c.x, c.g) for c in catch(sites, lambda: answer_nll(lm, rows).sum())}  # as the pass came by
    return [tuple(x.view(len(rows), -1, x.shape[-1]).to(lm.device) for x in found[site]) for site in sites]  # type: ignore[misc]


def gather_pieces(
    lm: LM, sites: Sequence[Site], rows: Sequence[Row], keep: Callable[[Sequence[Row], Tensor, Tensor], Tensor]
) -> list[tuple[Float[Tensor, "n in"], Float[Tensor, "n out"]]]:
    """Return the pieces of many rows, batch by batch as memory allows, in the order of the rows.

    Args:
        keep: from rows, u and delta to the (batch, seq) mask of the tokens that count.
    """

    def work(group: list[int]) -> list[list[tuple[Tensor, Tensor]]]:
        here = [rows[i] for i in group]
        by_row: list[list[tuple[Tensor, Tensor]]] = [[] for _ in group]
        for u, delta in pieces(lm, sites, here):
            mask = keep(here, u, delta)
            for r, found in enumerate(by_row):
                found.append((u[r, mask[r]], delta[r, mask[r]]))
        return by_row

    by_row = in_batches([len(row.ids) for row in rows], work)
    return [
        (torch.cat([found[s][0] for found in by_row]), torch.cat([found[s][1] for found in by_row]))
        for s in range(len(sites))
    ]


def with_a_piece(_: Sequence[Row], u: Tensor, delta: Tensor) -> Tensor:
    """Return all tokens that have a piece."""
    return not_zero(u, delta)


def at_answers(rows: Sequence[Row], u: Tensor, delta: Tensor) -> Tensor:
    """Return the tokens that predict answer tokens."""
    mask = torch.zeros(u.shape[:2], dtype=torch.bool, device=u.device)
    for r, row in enumerate(rows):
        mask[r, row.n_prompt - 1 : len(row.ids) - 1] = True
    return mask


def in_passes(drawn: Sequence[Drawn]) -> Iterator[Sequence[Drawn]]:
    """Return the examples in groups whose outer losses are one pass each."""
    longest = max(len(row.ids) for d in drawn for row in (d.rephrasing, d.other))
    size = max(1, MAX_BATCH_TOKENS // (2 * longest))
    return (drawn[i : i + size] for i in range(0, len(drawn), size))


ComparedAt = Literal["everywhere", "answers"]
"""After which tokens the model is compared with itself: all, or those that predict the answer."""


def compared_places(rows: Sequence[Row], where: ComparedAt) -> tuple[Tensor, Tensor]:
    """Return (row, position) of every token of these rows after which the model is compared."""
    if where == "answers":
        return answer_places(rows)
    at = [(i, t) for i, row in enumerate(rows) for t in range(len(row.ids))]
    return torch.tensor([i for i, _ in at]), torch.tensor([t for _, t in at])


@torch.no_grad()
def base_log_probs(lm: LM, drawn: Sequence[Drawn], where: ComparedAt) -> Float[Tensor, "n vocab"]:
    """Return what the model says in the prompts that should stay."""
    others = [d.other for d in drawn]
    return log_probs(logits_at(lm, pad(others, lm.device), compared_places(others, where)))


def outer_losses(
    lm: LM, drawn: Sequence[Drawn], base: Float[Tensor, "n vocab"], parts: Sequence[Part], where: ComparedAt
) -> tuple[Float[Tensor, " batch"], Float[Tensor, " batch"]]:
    """Return the outer losses of each example with `parts` attached, from one pass over 2 batch rows.

    Returns:
        The mean negative log-likelihood of the answer after the rephrasing; and the mean of KL(p_W || p_W') over the
        other prompt's places, in nats.
    """
    asked, others = [d.rephrasing for d in drawn], [d.other for d in drawn]
    rows = [*input_rows(asked), *others]
    answers = [(i, row.n_prompt - 1 + j) for i, row in enumerate(asked) for j in range(len(row.target_ids))]
    at, positions = compared_places(others, where)
    first = torch.tensor([i for i, _ in answers])
    places = torch.cat([first, at + len(asked)]), torch.cat([torch.tensor([t for _, t in answers]), positions])
    with attached(parts):
        log_p = log_probs(logits_at(lm, pad(rows, lm.device), places))
    said, now = log_p[: len(answers)], log_p[len(answers) :]
    nll = _mean_by_row(-gold(said, asked), first, len(drawn))
    kl = _mean_by_row((base.exp() * (base - now)).sum(-1), at, len(drawn))
    return nll, kl


def _mean_by_row(values: Float[Tensor, " n"], at: Tensor, n_rows: int) -> Float[Tensor, " n_rows"]:
    at = at.to(values.device)
    counts = torch.bincount(at, minlength=n_rows).to(values.dtype)
    return values.new_zeros(n_rows).index_add(0, at, values) / counts


# --- training ------------------------------------------------------------------------------------------------------


def fit_editor(
    method: HypernetworkSettings,
    lm: LM,
    cases: Sequence[Case],
    out: str | Path,
    network: Hypernetwork,
    optimizers: Sequence[torch.optim.Optimizer],
    backward: Callable[[Sequence[Drawn]], float],
    loss: Callable[[Sequence[Drawn]], float],
    *,
    seed: int,
    force: bool,
    progress: Progress | None,
) -> Path:
    """Train `network` on the cases and write it to `out`, with its settings, the model's fingerprint and the curve.

    Deltas that are applied are off meanwhile: an editor is of the unedited model. A run that was killed goes on from
    `out`.unfinished when it is given the same again, with the identical result.

    Args:
        backward: adds the gradient of the loss on some examples to the network's parameters, and returns the loss.
        loss: returns the loss alone.
    """
    out = Path(out)
    check_memory(method.name, lm, sum(p.numel() for p in network.parameters()))
    known = examples(lm, cases)
    if len(known) < LEAST_CASES:
        raise InvalidSetting(f"{method.name} is trained on {LEAST_CASES} cases at least, found {len(known)}")
    n_held_out = min(method.n_validation, len(known) // 5 or 1)
    shuffled = random.Random(f"{seed}/split").sample(known, len(known))
    held_out, trained = shuffled[:n_held_out], shuffled[n_held_out:]
    size = min(method.batch_size, len(trained))

    def step(i: int) -> float:
        rng = random.Random(f"{seed}/{i}")
        return backward(draw(trained, rng.sample(trained, size), rng))

    to_validate = draw(known, held_out, random.Random(f"{seed}/validation"))

    def validate() -> float:
        parts = [to_validate[i : i + size] for i in range(0, len(to_validate), size)]
        return sum(loss(part) * len(part) for part in parts) / len(to_validate)

    settings = {name: value for name, value in asdict(method).items() if name != "editor"}
    fingerprint = lm.fingerprint()
    identity = {
        "method": method.name,
        "settings": settings,
        "fingerprint": fingerprint,
        "dtype": str(lm.dtype).removeprefix("torch."),
        "cases": cases_hash(cases),
        "seed": seed,
    }
    unfinished = out.with_name(out.name + ".unfinished")
    fit = Fit(network, optimizers)
    with lm.without_deltas(), lm.frozen_eval():
        fit.run(
            step,
            validate,
            method.schedule(),
            unfinished=unfinished,
            identity=identity,
            force=force,
            progress=partial(progress or silent, "training"),
        )
    about = {
        "settings": settings,
        "fingerprint": fingerprint,
        "model": lm.label,
        "cases": len(known),
        "seed": seed,
        "best": asdict(fit.best_point),
        "curve": [asdict(point) for point in fit.curve],
    }
    write_editor(out, method.name, network, about)
    unfinished.unlink(missing_ok=True)
    return out


# --- the trained file ----------------------------------------------------------------------------------------------

Trained = TypeVar("Trained", bound=HypernetworkSettings)


def write_editor(out: str | Path, name: str, network: Hypernetwork, about: Mapping[str, Any]) -> None:
    """Write a trained editor, whole or not at all."""
    write_checked(out, EDITOR, {"method": name}, network.state_dict(), {"retcon": __version__, **about})


@dataclass(frozen=True)
class Editor:
    """A trained editor, as its file has it."""

    network: Hypernetwork
    sites: list[Site]
    sha256: str
    """Of its file; goes into every delta's record."""
    about: Mapping[str, Any]


_LOADED: WeakKeyDictionary[LM, tuple[tuple[Any, ...], Editor]] = WeakKeyDictionary()
"""The editor that each model was last edited with: what its file was, and itself."""


def load_editor(method: Trained, lm: LM) -> tuple[Trained, Editor]:
    """Return the method with the settings that its editor was trained with, and the editor.

    The file is read once: the model's next edit has the same editor, as long as the file is the same.

    Raises:
        InvalidSetting: no editor is named, or a setting is neither the default nor the one in its file.
        MalformedFile: the file is no editor of this method.
        WrongBase: it was trained for another model.
        UnsupportedModel: `lm` is no `LM`.
    """
    require_lm(lm)
    if method.editor is None:
        raise InvalidSetting(
            f"{method.name} edits with a trained editor, and none is named: train one "
            f"(retcon fit MODEL CASES --method {method.name} --out FILE) and set editor=FILE"
        )
    path = Path(method.editor)
    try:
        now = path.stat()
    except FileNotFoundError:
        raise no_such_file(method.name, path) from None
    source = (type(method), str(path), now.st_mtime_ns, now.st_ctime_ns, now.st_size, now.st_ino, lm.device, lm.dtype)
    known = _LOADED.get(lm)
    if known is not None and known[0] == source:
        editor = known[1]
        _check_base(path, editor.about, lm)
        return with_settings_of(method, editor.about), editor
    tensors, about = read_editor(method.name, path)
    sha256 = sha256_of(path)
    _check_base(path, about, lm)
    trained = with_settings_of(method, about)
    sites = trained.sites(lm)
    network = trained.untrained(lm, sites)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        raise MalformedFile(
            f"{path}: its tensors are not those of its settings ({str(error).splitlines()[-1]})"
        ) from None
    editor = Editor(network.to(lm.device).eval(), sites, sha256, about)
    _LOADED[lm] = source, editor
    return trained, editor


def read_editor(name: str, path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an editor's tensors and what its file says of it.

    Raises:
        MalformedFile: the file is no editor of that method.
    """
    if path.is_dir():
        raise MalformedFile(f"{path} is a directory; {name}'s editor is a file, which `retcon fit` writes")
    try:
        return read_checked(path, EDITOR, {"method": name})
    except FileNotFoundError:
        raise no_such_file(name, path) from None


def no_such_file(name: str, path: Path) -> MalformedFile:
    """Return the error for an editor that is not there."""
    return MalformedFile(f"{path}: no such file; {name}'s editor is what `retcon fit` writes")


def with_settings_of(method: Trained, about: Mapping[str, Any]) -> Trained:
    """Return the method with the settings in an editor's file.

    Raises:
        InvalidSetting: a setting is neither the default nor the one in the file.
    """
    trained = replace(method, **checked_settings(method.name, type(method), about["settings"]))
    check_as_trained(method, trained, [f.name for f in fields(method) if method.settings[f.name] != f.default])
    return trained


def _check_base(path: Path, about: Mapping[str, Any], lm: LM) -> None:
    if about["fingerprint"] != lm.fingerprint():
        raise WrongBase(
            f"{path} was trained for {about['model']}, and {lm.label} has other weights; train an editor for this model"
        )
