"""MEND: a trained network turns the gradient of an edit into the change of the weights.

Mitchell et al. 2022, arXiv:2110.11309v2, section 3; symbols as there. Departures: docs/methods/mend.md.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retcon.delta import Change, Delta
from retcon.edits import Case, Edit, check_edits
from retcon.errors import InvalidSetting, MalformedFile
from retcon.lm.model import LM, Site
from retcon.memory.contexts import Contexts
from retcon.memory.moments import Moments
from retcon.memory.values import ValueCache
from retcon.methods.common.contract import Progress, State, recorded, silent
from retcon.methods.common.hypernetwork import (
    Drawn,
    HypernetworkSettings,
    Where,
    base_log_probs,
    fit_editor,
    gather_pieces,
    load_editor,
    outer_losses,
    pieces,
    with_a_piece,
    write_editor,
)
from retcon.methods.common.proposal import reported
from retcon.methods.common.settings import NotNegative
from retcon.training.hypernetwork import Hypernetwork, not_zero
from retcon.training.objective import answer_rows
from retcon.training.parts import LowRankByRow, Part

EPS = 1e-7
"""Added to deviations that are divided by."""


@dataclass(frozen=True, kw_only=True)
class Mend(HypernetworkSettings):
    """Model editor networks with gradient decomposition."""

    name: ClassVar[str] = "mend"

    sign: Literal[-1, 1] = -1
    """W' = W + sign eta G~. 1: as released, where training has to find out that a loss is to go down."""
    step_size: float = 1e-4
    """Where eta starts, which is learned for each matrix."""
    learning_rate: NotNegative = 1e-6
    """Adam's, for the networks."""
    step_size_learning_rate: NotNegative = 1e-4
    """Adam's, for eta."""
    edit_weight: NotNegative = 0.1
    """c_e: weight of the loss on rephrasings."""
    locality_weight: NotNegative = 1.0
    """Weight of the divergence on prompts that should stay; the paper's is 1."""
    locality_at: Where = "everywhere"
    """After which tokens of those prompts the model is compared with itself: all, or those that predict the answer."""
    clip: NotNegative = 100.0
    """Largest norm of a gradient."""

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
        """The change that writes `edits`, whose pieces are added up; the model is untouched.

        Only the editor is used: nothing is searched, drawn or kept.

        Raises:
            InvalidEdit, ConflictingEdits: an edit cannot mean anything, or contradicts another.
            InvalidSetting: no editor is named.
            MalformedFile, WrongBase: the editor cannot be read, or is another model's.
        """
        check_edits(edits)
        method, editor = load_editor(self, lm, untrained)
        record = recorded(method, lm, edits, seed=seed, editor_sha256=editor.sha256)
        if not edits:
            return lm.delta({}, **record)
        with lm.frozen_eval():
            found = gather_pieces(lm, editor.sites, answer_rows(lm, edits), with_a_piece)
            changes: dict[str, list[Change]] = {}
            for i, (site, (u, delta)) in enumerate(zip(editor.sites, found, strict=True)):
                left, right = method.pseudo_gradient(editor.network, i, u, delta)
                changes.setdefault(site.name, []).append(site.stored(left.T.cpu(), right.cpu()))
                (progress or silent)("matrices", i + 1, len(found))
        return reported(lm, lm.delta(changes, **record))

    @torch.no_grad()
    def pseudo_gradient(self, network: Hypernetwork, i: int, u: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
        """sign eta G~ of the i-th matrix as factors (n x out, n x in): G~ = sum_t delta~_t u~_t^T (equation 5)."""
        u_new, delta_new = network.transform(i, u, delta)
        return delta_new, self.sign * network.step_sizes[i] * u_new

    def fit(
        self,
        lm: LM,
        cases: Sequence[Case],
        out: str | Path,
        *,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> Path:
        """Train an editor for the model on cases other than those to be edited, and write it to `out` (algorithm 1).

        Each step takes `batch_size` edits, each by itself: the gradient on its prompt, a loss on one of its rephrasings
        and one on a prompt that should stay. A run that was killed goes on when it is given the same again.

        Raises:
            InvalidSetting: too few cases, or a layer that the model does not have.
            OutOfMemory: networks, gradients and Adam's moments do not fit.
            NonFinite: the loss overflows.
        """
        sites = self.sites(lm)
        network = untrained(self, lm, sites, seed)
        others = [p for p in network.parameters() if p is not network.step_sizes]
        optimizers = [
            torch.optim.Adam(others, lr=self.learning_rate),
            torch.optim.Adam([network.step_sizes], lr=self.step_size_learning_rate),
        ]

        def gradient(drawn: Sequence[Drawn]) -> float:
            total = self.loss(lm, network, sites, drawn)
            total.backward()
            return float(total.detach())

        @torch.no_grad()
        def loss(drawn: Sequence[Drawn]) -> float:
            return float(self.loss(lm, network, sites, drawn))

        return fit_editor(
            self, lm, cases, out, network, optimizers, gradient, loss, clip=self.clip, seed=seed, progress=progress
        )

    def loss(self, lm: LM, network: Hypernetwork, sites: Sequence[Site], drawn: Sequence[Drawn]) -> Tensor:
        """c_e L_e + L_loc (equation 4), the mean over examples that are each edited by itself.

        u and delta are constants here, so that no second derivative is taken.
        """
        found = pieces(lm, sites, [d.edit for d in drawn])
        counted = [not_zero(u, delta) for u, delta in found]
        for i, (u, delta) in enumerate(found):
            network.network(i).observe(u[counted[i]], delta[counted[i]])
        parts: list[Part] = []
        for i, (site, (u, delta)) in enumerate(zip(sites, found, strict=True)):
            u_new, delta_new = network.transform(i, u, delta)
            left = delta_new * counted[i][..., None]
            right = self.sign * network.step_sizes[i] * u_new
            parts.append(LowRankByRow(site, torch.cat([left, left]), torch.cat([right, right])))
        nll, kl = outer_losses(lm, drawn, base_log_probs(lm, drawn, self.locality_at), parts, self.locality_at)
        return self.edit_weight * nll.mean() + self.locality_weight * kl.mean()


def untrained(method: Mend, lm: LM, sites: Sequence[Site], seed: int = 0) -> Hypernetwork:
    """An editor that leaves pieces as they are: an edit is one gradient step of size eta, if nothing is normalised."""
    return Hypernetwork(
        [(site.shape[1], site.shape[0]) for site in sites],
        step_size=method.step_size,
        rank=method.rank,
        n_blocks=method.n_blocks,
        scale_at="inside",
        normalise=method.normalise,
        eps=EPS,
        dtype=torch.promote_types(lm.dtype, torch.float32),
        seed=seed,
    ).to(lm.device)


# --- released editors ------------------------------------------------------------------------------------------------


def from_release(
    lm: LM, released: str | Path, out: str | Path, *, matrices: Sequence[str], step_sizes: Sequence[float] | None = None
) -> Path:
    """Write an editor made of the released code's trained networks (eric-mitchell/mend, EasyEdit), sign +1.

    Args:
        released: their state dict as a safetensors file; docs/methods/mend.md says how to make one of a .pt file.
        matrices: names of the edited parameters in the order of the release's `inner_params`.
        step_sizes: eta of each, where the file has no `edit_lrs`.

    Raises:
        MalformedFile: the file cannot be read, or is not of that layout; the message names the tensor.
        InvalidSetting: the model has no such matrices.
    """
    try:
        tensors = load_file(str(released))
    except (OSError, SafetensorError) as error:
        raise MalformedFile(f"{released}: not a readable safetensors file ({error})") from None
    sites = [_site_of(lm, name) for name in matrices]
    shapes = [(site.shape[1], site.shape[0]) for site in sites]
    etas = tensors.get("edit_lrs") if step_sizes is None else torch.tensor(step_sizes)
    if etas is None or len(etas) != len(sites):
        found = "no edit_lrs" if etas is None else f"{len(etas)} step sizes"
        raise MalformedFile(f"{released}: {found}, for {len(sites)} matrices; name the matrices it was trained for")
    own: dict[str, Tensor] = {"step_sizes": etas.float()}
    for shape in dict.fromkeys(shapes):
        own |= {f"networks.{shape[0]}x{shape[1]}.{k}": t for k, t in _renamed(tensors, shape, str(released)).items()}
    rank = next(len(t) for name, t in own.items() if name.endswith("blocks.0.V"))
    n_blocks = sum(name.endswith(".U") for name in own) // len(set(shapes))
    layers = tuple(sorted({site.layer for site in sites}))
    kinds = tuple(dict.fromkeys(site.kind for site in sites))
    method = Mend(layers=layers, modules=kinds, rank=rank, n_blocks=n_blocks, sign=1)
    order = {site.name: i for i, site in enumerate(method.sites(lm))}
    if sorted(order) != sorted(site.name for site in sites):
        raise InvalidSetting(f"mend: every layer must have the same matrices edited, found {', '.join(matrices)}")
    network = untrained(method, lm, method.sites(lm))
    network.load_state_dict(_reordered(own, [order[site.name] for site in sites], shapes))
    settings = {name: value for name, value in asdict(method).items() if name != "editor"}
    about = {
        "settings": settings,
        "fingerprint": lm.fingerprint(),
        "model": lm.label,
        "curve": [],
        "source": Path(released).name,
    }
    write_editor(out, "mend", network, about)
    return Path(out)


NAMES = {
    "U": "u",
    "V": "v",
    "b": "bias",
    "scale": "mode_scale.weight",
    "shift": "mode_shift.weight",
}
"""A block's tensors, and what the released code calls them."""


def _renamed(tensors: Mapping[str, Tensor], shape: tuple[int, int], where: str) -> dict[str, Tensor]:
    """The tensors of one network by our names."""
    prefix = f"mend.{shape}"

    def get(name: str) -> Tensor:
        if f"{prefix}.{name}" not in tensors:
            raise MalformedFile(f"{where}: {prefix}.{name} is missing; found: {', '.join(sorted(tensors)[:6])}, ...")
        return tensors[f"{prefix}.{name}"].float()

    found = {
        "normaliser.count": get("k").reshape(()).double(),
        "normaliser.mean": torch.cat([get("u_mean"), get("v_mean")]),
        "normaliser.squares": torch.cat([get("u_s"), get("v_s")]),
    }
    i = 0
    while i == 0 or f"{prefix}.mlp.layers.{i}.u" in tensors:
        found |= {f"blocks.{i}.{own}": get(f"mlp.layers.{i}.{theirs}") for own, theirs in NAMES.items()}
        i += 1
    return found


def _reordered(own: dict[str, Tensor], places: Sequence[int], shapes: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
    """Put what there is of each matrix in our order: `places` says where each of theirs goes."""
    found = dict(own)
    found["step_sizes"] = own["step_sizes"][torch.tensor(places).argsort()]
    for shape in set(shapes):
        mine = torch.tensor([p for p, s in zip(places, shapes, strict=True) if s == shape]).argsort()
        for name in own:
            if name.startswith(f"networks.{shape[0]}x{shape[1]}.") and name.endswith((".scale", ".shift")):
                found[name] = own[name][mine]
    return found


def _site_of(lm: LM, parameter: str) -> Site:
    for layer in range(lm.n_layers):
        for kind in ("gate_proj", "up_proj", "down_proj"):
            if lm.has(layer, kind) and (site := lm.site(layer, kind)).name == parameter and site.rows is None:
                return site
    raise InvalidSetting(f"{lm.name!r} has no MLP matrix {parameter!r}")
