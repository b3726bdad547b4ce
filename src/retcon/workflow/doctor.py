"""Whether the library reads, edits, undoes and saves a model as it should: each claim tried on the model itself."""

import tempfile
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from retcon.attachment import Attachment
from retcon.edits import Edit
from retcon.errors import RetconError
from retcon.lm.forward import Point, gold, logits_at, run
from retcon.lm.generate import save_model
from retcon.lm.load import load_plain, quietly
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from retcon.lm.replay import capture_states, replaying, suffix_starts
from retcon.lm.site import Site, SiteName
from retcon.locate.advice import span
from retcon.memory.contexts import Contexts
from retcon.memory.keys import KeyReader, mean_keys
from retcon.memory.moments import GivenMoments
from retcon.memory.write import is_routed, written_sites
from retcon.methods.common.choosing import method
from retcon.methods.common.proposal import what_stands_between
from retcon.plural import plural

Outcome = Literal["passed", "failed", "skipped"]
TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}
"""Largest difference over the largest value. Wide in float64, since some families compute attention or routing in
float32; a wrong mask, position or matrix gives about 1."""
EDITS = [
    Edit("You know {}", "France", "Rome", id="france"),
    Edit("I read about {}", "Danielle Darrieux", "English", id="darrieux"),
]
CONTEXTS = Contexts(("The train stood still. ",))


@dataclass(frozen=True)
class Finding:
    """What one check found."""

    check: str
    outcome: Outcome
    detail: str


@dataclass(frozen=True)
class Examination:
    """All findings about a model."""

    model: str
    model_type: str
    dtype: str
    n_layers: int
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing failed."""
        return all(f.outcome != "failed" for f in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return the fields, for JSON."""
        return {**asdict(self), "passed": self.passed}


def examine(lm: LM) -> Examination:
    """Try everything that editing `lm` rests on; the model is as it was afterwards.

    Edits are tried with the identity for a second moment: whether an edit takes is asked, not how well.
    """
    checks: dict[str, Callable[[LM], tuple[Outcome, str]]] = {
        "layout": _layout,
        "orientation": _orientation,
        "experts": _experts,
        "replay": _replay,
        "keys": _keys,
        "rome": lambda lm: _edit(lm, "rome"),
        "memit": lambda lm: _edit(lm, "memit"),
        "jeep": lambda lm: _edit(lm, "jeep"),
        "kne": lambda lm: _edit(lm, "kne"),
        "undo": _undo,
        "save": _save,
    }
    findings = []
    for name, check in checks.items():
        try:
            outcome, detail = check(lm)
        except _Skipped as error:
            outcome, detail = "skipped", str(error)
        except RetconError as error:
            outcome, detail = "failed", str(error)
        except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, KeyError, AssertionError) as error:
            outcome, detail = "failed", f"{type(error).__name__}: {error}".splitlines()[0]
        findings.append(Finding(name, outcome, detail))
    dtype = str(lm.dtype).removeprefix("torch.")
    return Examination(lm.label, lm.config.model_type, dtype, lm.n_layers, tuple(findings))


# --- the checks ----------------------------------------------------------------------------------------------------


def _layout(lm: LM) -> tuple[Outcome, str]:
    """Report the layout's kinds of layers; that it fits was checked at load."""
    parts = []
    for kind in dict.fromkeys(lm.kinds):
        layers = [i for i, k in enumerate(lm.kinds) if k is kind]
        has = [name for name in get_args(SiteName) if getattr(kind, name) is not None]
        mlp = ("experts, one of them shared" if kind.down_proj else "routed experts") if kind.experts else ""
        parts.append(f"layers {span(layers)}: {', '.join(has)}{f'; {mlp}' if mlp else ''}")
    return "passed", " | ".join(parts)


def _orientation(lm: LM) -> tuple[Outcome, str]:
    """Check that W x + b is what the module itself gives, for each matrix of the first and the last block."""
    worst, n = 0.0, 0
    for layer in {0, lm.n_layers - 1}:
        for kind in get_args(SiteName):
            if not lm.has(layer, kind):
                continue
            site = lm.site(layer, kind)
            x = _random(5, site.shape[1], site)
            with torch.no_grad():
                whole = site.module(x)
            found = whole if site.rows is None else whole[:, site.rows.to(whole.device)]
            wanted = x @ site.weight.T
            worst, n = max(worst, _apart(found, wanted if site.bias is None else wanted + site.bias)), n + 1
    return _judged(lm, worst, plural(n, "matrix", "matrices"))


def _experts(lm: LM) -> tuple[Outcome, str]:
    """Check that weighted keys times the experts' matrices are what the experts give."""
    layers = [i for i, kind in enumerate(lm.kinds) if kind.experts]
    if not layers:
        return "skipped", "no routed experts"
    layer = layers[-1]
    seen: dict[Any, Tensor] = {}
    sites, module = lm.expert_sites(layer), lm.experts(layer)
    hooks: dict[Point, Any] = {Point(layer, "key", s.expert): _keep(seen, s.expert) for s in sites}
    caught: list[tuple[Any, Tensor]] = []

    def catch(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Tensor) -> None:
        caught.append(((*args, *kwargs.values()), out))

    with module.register_forward_hook(catch, with_kwargs=True), lm.frozen_eval(), torch.no_grad():
        run(lm, pad(_rows(lm), lm.device), hooks | {Point(layer, "block"): lambda value: None})
    (_, index, weights), out = caught[0]
    found = torch.zeros_like(out)
    for site in sites:
        found += seen[site.expert].flatten(0, 1) @ site.weight.T
    if (bias := getattr(module, "down_proj_bias", None)) is not None:
        found += (weights[..., None] * bias[index]).sum(1)
    return _judged(lm, _apart(found, out), f"{len(sites)} experts of layer {layer}")


def _replay(lm: LM) -> tuple[Outcome, str]:
    """Check that blocks run from the middle on recorded states give a plain pass's logits."""
    if lm.layout.earlier == "other":
        return "skipped", "layers share keys and values; values are searched the plain way"
    worst, firsts = 0.0, sorted({1, lm.n_layers // 2, lm.n_layers - 1} - {0})
    rows = _rows(lm)
    starts = suffix_starts(lm, [len(row.ids) // 2 for row in rows])
    each = torch.arange(len(rows))
    ends = torch.tensor([len(row.ids) - 1 for row in rows])
    with lm.frozen_eval(), torch.no_grad():
        plain = logits_at(lm, pad(rows, lm.device), (each, ends))
        for first in firsts:
            state, _ = capture_states(lm, rows, starts, first)
            with replaying(lm, state) as inputs:
                worst = max(worst, _apart(logits_at(lm, inputs, (each, ends - torch.tensor(starts))), plain))
    return _judged(lm, worst, f"from blocks {', '.join(map(str, firsts))}")


def _keys(lm: LM) -> tuple[Outcome, str]:
    """Check that keys read layer by layer are those of whole passes."""
    layers = [i for i in range(lm.n_layers) if lm.has(i, "down_proj")][:3]
    tensor: Literal["key", "attn_key"] = "key" if layers else "attn_key"
    layers = layers or list(range(min(3, lm.n_layers)))
    reader, value, worst = KeyReader(lm, EDITS, CONTEXTS), Point(layers[-1], "block"), 0.0
    for layer in layers:
        point = Point(layer, tensor)
        keys, _ = reader.read(point, "subject_last", value)
        plain, _ = mean_keys(lm, EDITS, CONTEXTS, point, "subject_last", value=value)
        worst = max(worst, _apart(keys, plain))
    return _judged(lm, worst, f"layers {span(layers)}")


def _edit(lm: LM, name: str) -> tuple[Outcome, str]:
    """Check that an edit makes its answer likelier, once in the weights."""
    proposed = _proposed(lm, name)
    before = _log_probability(lm, EDITS[0])
    with lm.edited(proposed):
        after = _log_probability(lm, EDITS[0])
    detail = f"log-probability of the answer {before:.2f} to {after:.2f}, {plural(len(proposed.changes), 'parameter')}"
    return ("passed" if after > before else "failed"), detail


def _undo(lm: LM) -> tuple[Outcome, str]:
    """Check that, applied and reverted, every byte is back."""
    delta = _any_delta(lm)
    before = {name: lm.parameter(name).detach().cpu().clone() for name in delta.changes}
    lm.apply(delta)
    changed = all(not torch.equal(lm.parameter(name).cpu(), old) for name, old in before.items())
    lm.revert(delta)
    same = all(torch.equal(lm.parameter(name).cpu(), old) for name, old in before.items())
    if not changed:
        return "failed", "applying changed nothing"
    return ("passed" if same else "failed"), f"{plural(len(before), 'parameter')}, bit for bit"


def _save(lm: LM) -> tuple[Outcome, str]:
    """Check that, saved and read by transformers alone, the edited model gives the same logits."""
    row = _rows(lm)[0]
    ids = torch.tensor([row.ids], device=lm.device)
    delta = _any_delta(lm)
    with tempfile.TemporaryDirectory() as folder, lm.edited(delta), lm.frozen_eval(), torch.no_grad(), quietly():
        edited = lm.model(ids, use_cache=False).logits
        with lm.as_floats():
            save_model(lm, folder)
        with torch.random.fork_rng():  # some families draw numbers while they are made
            again = load_plain(Path(folder), dtype=lm.dtype).to(lm.device)
        found = again(ids, use_cache=False).logits
    return _judged(lm, _apart(found, edited), "logits of the saved model")


# --- what they share -----------------------------------------------------------------------------------------------


class _Skipped(Exception):
    """A check that the model has nothing for; the message says why."""


def _proposed(lm: LM, name: str) -> Attachment:
    """Return a delta of one edit by that method in the model's middle.

    Raises:
        _Skipped: the method has nowhere to write.
    """
    with_mlp = [i for i in range(lm.n_layers) if lm.has(i, "down_proj") or lm.kinds[i].experts]
    dense = [i for i in with_mlp if lm.has(i, "down_proj")]
    middle = lambda layers: layers[len(layers) // 3 : len(layers) // 3 + 2]  # noqa: E731
    if name == "rome":
        if not dense:
            raise _Skipped("every expert is routed; memit and jeep write to those")
        settings = dict(layer=middle(dense)[0], use_moment=False, weight_decay=0.0, steps=8)
    elif name == "memit":
        settings = dict(layers=tuple(middle(with_mlp)), moment_weight=1e-3, weight_decay=0.0, clamp=4.0, steps=8)
    elif name == "jeep":
        low, high = tuple(middle(with_mlp)[:1]), tuple(with_mlp[-1:])
        settings = dict(low=low, high=high, low_moment_weight=1e-3, high_moment_weight=1e-3, low_clamp=4.0,
                        high_clamp=4.0, low_weight_decay=0.0, high_weight_decay=0.0, steps=8)  # fmt: skip
    else:
        settings = dict(epochs=3, n_points=2, learning_rate=1e-2)  # smaller steps are lost in bfloat16
    chosen = method(name, **settings)
    layers = [settings[n] for n in ("layer",) if n in settings]
    layers += [layer for n in ("layers", "low", "high") for layer in settings.get(n, ())]
    if what_stands_between([lm.kinds[layer] for layer in layers if is_routed(lm, layer, False)]):
        raise _Skipped("a norm or a factor stands between the routed experts and the residual stream")
    moments = _identity(lm, layers)
    with warnings.catch_warnings(action="ignore"):
        return chosen.propose(lm, EDITS[:1], contexts=CONTEXTS, moments=moments)


def _any_delta(lm: LM) -> Attachment:
    for name in ("memit", "rome"):
        with suppress(_Skipped):
            return _proposed(lm, name)
    site = lm.site(lm.n_layers // 2, "o_proj")
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(n, 1, generator=generator) for n in site.shape)
    return lm.delta({site.name: [site.stored(left, right.T)]})


def _identity(lm: LM, layers: Any) -> GivenMoments:
    return GivenMoments({s.id: torch.eye(s.shape[1]) for layer in layers for s in written_sites(lm, layer)})


def _rows(lm: LM) -> list[Row]:
    texts = ("The capital of France is a large town on a river", "You know Danielle Darrieux", "I read")
    return [lm.encode(text) for text in texts]


def _log_probability(lm: LM, edit: Edit) -> float:
    row = lm.encode(edit.text, edit.target_new)
    with lm.frozen_eval(), torch.no_grad():
        logits = lm.model(torch.tensor([row.ids], device=lm.device), use_cache=False).logits[0]
    log_p = logits.float().log_softmax(-1)
    return float(gold(log_p[row.n_prompt - 1 : len(row.ids) - 1], [row]).sum())


def _keep(into: dict[Any, Tensor], name: Any) -> Callable[[Tensor], None]:
    return lambda value: into.__setitem__(name, value.detach().clone())


def _random(n: int, width: int, site: Site) -> Tensor:
    return torch.randn(n, width, generator=torch.Generator().manual_seed(0)).to(site.device, site.dtype)


def _apart(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference over the largest value."""
    scale = float(wanted.abs().max())
    return float((found.to(wanted.device) - wanted).abs().max()) / (scale or 1.0)


def _judged(lm: LM, worst: float, what: str) -> tuple[Outcome, str]:
    return ("passed" if worst <= TOLERANCE[lm.dtype] else "failed"), f"{what}: at most {worst:.1e} apart"
