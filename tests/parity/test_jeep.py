"""JEEP against a plain transcription of its algorithm: same contexts, same moments, same weights, float64."""

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing import assert_close

from retcon.edits import Edit
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts
from retcon.methods.jeep import Jeep
from tests.conftest import random_moments
from tests.parity.plain import Place, PlainRow, edit_group, optimise

CONTEXTS = Contexts(("The train stood still. ", "I read. ", "You know. "))
SETTINGS: dict[str, Any] = dict(
    low=(0, 1), high=(2, 3), low_clamp=2.0, high_clamp=1.0, low_moment_weight=3.0, high_moment_weight=2.0,
    low_weight_decay=0.02, high_weight_decay=0.03, steps=6, learning_rate=0.2,
)  # fmt: skip


def plain_rows(lm: LM, edit: Edit) -> tuple[list[PlainRow], PlainRow]:
    """Rows from the tokenizer's own ids and offsets; the vocabulary here never merges across a space."""
    tok = lm.tokenizer

    def row(text: str, subject: str, target: str = "") -> PlainRow:
        enc = tok(text, return_offsets_mapping=True)
        end = text.index(subject) + len(subject)
        at = max(t for t, (a, b) in enumerate(enc["offset_mapping"]) if a <= end - 1 < b)
        return PlainRow(
            enc["input_ids"], tok(" " + target, add_special_tokens=False)["input_ids"] if target else [], at
        )

    text = edit.prompt.replace("{}", edit.subject)
    rows = [row(prefix + text, edit.subject, edit.target_new) for prefix in ("", *CONTEXTS.prefixes)]
    return rows, row(f"{edit.subject} is a", edit.subject)


def plain_jeep(lm: LM, edits: list[Edit], m: Jeep) -> dict[str, torch.Tensor]:
    """Steps 1 to 3 of the paper with the library's default tensor choice, for the settings the test varies."""
    model = copy.deepcopy(lm.model)
    moments = random_moments(lm).by_name

    def of(kind: str) -> dict[int, torch.Tensor]:
        return {layer: moments[lm.site(layer, kind).name] for layer in range(lm.n_layers)}

    tensor = "block" if m.sites == "block" else "mlp"
    high_tensor = "attn" if m.high_module == "attn" else tensor
    high_added = "attn" if m.sites == "release" else high_tensor
    low = Place(m.low[-1], tensor, "subject_last", m.low_clamp, m.low_weight_decay) if m.low else None
    high = Place(m.high[-1], high_added, "prediction", m.high_clamp, m.high_weight_decay) if m.high else None
    rows = [plain_rows(lm, e) for e in edits]
    search = dict(steps=m.steps, lr=m.learning_rate, kl_factor=m.kl_factor, threshold=m.value_search().threshold)

    def values(places: list[Place], with_kl: bool) -> list[torch.Tensor]:
        found = [optimise(model, r, kl if with_kl else None, places, **search) for r, kl in rows]
        out = []
        for s in range(len(places)):
            joint = places[s].where == "prediction" and m._high_target == "joint"
            base = torch.stack([f[2][s] if joint else f[0][s] for f in found])
            out.append(base + torch.stack([f[1][s] for f in found]))
        return out

    def divisor(kind: str) -> Callable[[int], float]:
        return float if kind == "even" else math.sqrt

    bare = [r for r, _ in rows]
    out: dict[str, torch.Tensor] = {}

    def low_step(z: torch.Tensor) -> None:
        group = edit_group(
            model, bare, m.low, z, "subject_last", tensor, divisor(m.low_spread), m.low_moment_weight, of("down_proj")
        )
        out.update({lm.site(layer, "down_proj").name: w for layer, w in group.items()})

    def high_step(z: torch.Tensor) -> None:
        kind = "o_proj" if m.high_module == "attn" else "down_proj"
        group = edit_group(
            model, bare, m.high, z, "prediction", high_tensor, divisor(m.high_spread), m.high_moment_weight, of(kind),
            m.high_module,
        )  # fmt: skip
        out.update({lm.site(layer, kind).name: w for layer, w in group.items()})

    if low and high and m.joint_optimisation:
        z_low, z_high = values([low, high], with_kl=True)
        if m.write_low:
            low_step(z_low)
        if m.write_high:
            high_step(z_high)
    else:
        if low:
            low_step(values([low], with_kl=True)[0])
        if high:
            high_step(values([high], with_kl=False)[0])
    return out


VARIANTS: dict[str, dict[str, Any]] = {
    "mlp": {},
    "release": dict(sites="release"),
    "block": dict(sites="block"),
    "block, clean": dict(sites="block", high_target="clean"),
    "mlp, joint target": dict(high_target="joint"),
    "w/o low": dict(low=()),
    "w/o high": dict(high=()),
    "w/o Step 2": dict(write_low=False),
    "w/o Step 3": dict(write_high=False),
    "MEMIT with root spread": dict(high=(), sites="block"),
    "MEMIT": dict(high=(), sites="block", low_spread="even"),
    "separate": dict(joint_optimisation=False),
    "even in Step 2": dict(low_spread="even"),
    "attention in Step 3": dict(high_module="attn"),
}


EVERYDAY = {("llama", "block"), ("gptj", "mlp")}


@pytest.mark.parametrize(
    ("family", "tok", "variant"),
    [
        pytest.param(family, tok, variant, marks=[] if (family, variant) in EVERYDAY else [pytest.mark.long])
        for family, tok in (("gptj", "gpt"), ("llama", "bos"))
        for variant in VARIANTS
    ],
)
def test_jeep_equals_its_transcription(
    family: str, tok: str, variant: str, tiny: Callable[..., LM], edits: list[Edit]
) -> None:
    lm = tiny(family, tok=tok)
    m = Jeep(**{**SETTINGS, **VARIANTS[variant]})
    delta = m.propose(lm, edits[:2], contexts=CONTEXTS, moments=random_moments(lm))
    wanted = plain_jeep(lm, edits[:2], m)
    assert set(delta.changes) == set(wanted)
    # GPT-J's attention computes in float32 whatever the weights are, so batched and single rows part at 1e-7
    tolerance = dict(rtol=2e-4, atol=2e-5) if family == "gptj" else dict(rtol=1e-7, atol=1e-9)
    for name, update in wanted.items():
        assert float(update.norm()) > 1e-3
        assert_close(delta.dense(name, update.shape), update, **tolerance)
