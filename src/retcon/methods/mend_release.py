"""Editors that MEND's released code has trained, as editors of our own."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from retcon.errors import InvalidSetting, MalformedFile
from retcon.lm.model import LM, Site
from retcon.methods.common.hypernetwork import write_editor
from retcon.methods.mend import Mend


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
    network = method.untrained(lm, method.sites(lm))
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


NAMES = {"U": "u", "V": "v", "b": "bias", "scale": "mode_scale.weight", "shift": "mode_shift.weight"}
"""A block's tensors, and what the released code calls them."""


def _renamed(tensors: Mapping[str, Tensor], shape: tuple[int, int], where: str) -> dict[str, Tensor]:
    """Return the tensors of one network by our names."""
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
