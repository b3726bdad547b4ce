"""LayerwiseReader against plain passes: readings from the bottom up, with layers changing in between."""

from collections.abc import Callable

import pytest
import torch
from torch.testing import assert_close

from retcon.lm.forward import Point, activations
from retcon.lm.layerwise import LayerwiseReader, Reading
from retcon.lm.model import LM
from retcon.lm.prompts import Row, pad
from tests.conftest import FAMILIES, FLOAT32_INSIDE, everyday

ENDS = [[7, 3, 9, 5], [11, 2, 14]]
"""Tokens behind what the rows of a kind begin with in common."""


def rows_of(common: tuple[int, int] = (9, 0)) -> tuple[list[Row], list[int]]:
    generator = torch.Generator().manual_seed(0)
    rows, prefix_group = [], []
    for number, (n, ends) in enumerate(zip(common, ENDS, strict=True)):
        beginning = torch.randint(3, 400, (n,), generator=generator).tolist()
        for i, more in enumerate(ends):
            # the first token behind the beginning differs, so that it is no longer than it is meant to be
            ids = (*beginning, 401 + i, *torch.randint(3, 400, (more - 1,), generator=generator).tolist())
            rows.append(Row(ids, len(ids), subject_last=len(ids) - 2))
            prefix_group.append(number)
    return rows, prefix_group


def change(lm: LM, layer: int, *, seed: int) -> object:
    site = lm.site(layer, "down_proj")
    generator = torch.Generator().manual_seed(seed)
    d, m = site.weight.shape
    left, right = (torch.randn(n, 1, generator=generator, dtype=torch.float64) for n in (d, m))
    return lm.delta({site.name: [site.stored(left, 0.3 * right.T)]})


def check(lm: LM, reader: LayerwiseReader, rows: list[Row], points: list[Point], keep: int) -> None:
    plain = activations(lm, pad(rows), {p: torch.tensor([r.subject_last for r in rows]) for p in points})
    sums, weights = [i % 2 for i in range(len(rows))], [float(i % 5) for i in range(1, len(rows) + 1)]
    reading = Reading([r.position("subject_last") for r in rows], sums, weights)
    read = reader.read(dict.fromkeys(points, reading), keep)
    close = 2e-5 if lm.model.config.model_type in FLOAT32_INSIDE else 1e-9
    for point in points:
        weighted = plain[point] * torch.tensor(weights, dtype=lm.dtype)[:, None]
        wanted = torch.stack([weighted[k::2].sum(0) for k in range(max(sums) + 1)])
        assert_close(read[point], wanted, rtol=close, atol=close * float(wanted.abs().max()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("keep_bytes", everyday(1e9, of=[0.0, 1e9]))
def test_readings_equal_plain_passes_while_the_layers_change(
    family: str, keep_bytes: float, tiny: Callable[..., LM]
) -> None:
    lm = tiny(family)
    rows, prefix_group = rows_of()
    reader = LayerwiseReader(lm, rows, prefix_group, keep_bytes=keep_bytes, max_batch_tokens=25)
    assert reader.keeps == (keep_bytes > 0)
    check(lm, reader, rows, [Point(1, "key"), Point(2, "block")], keep=1)
    with lm.edited(change(lm, 1, seed=0)):
        check(lm, reader, rows, [Point(2, "key"), Point(2, "mlp")], keep=2)
        with lm.edited(change(lm, 2, seed=1)):
            check(lm, reader, rows, [Point(3, "attn_key"), Point(3, "block")], keep=3)
            assert reader.reached == (3 if keep_bytes else 0)


def test_a_change_below_starts_it_again_at_the_tokens(tiny: Callable[..., LM]) -> None:
    lm = tiny("llama")
    rows, prefix_group = rows_of()
    reader = LayerwiseReader(lm, rows, prefix_group, keep_bytes=1e9)
    points = [Point(3, "key")]
    check(lm, reader, rows, points, keep=3)
    with lm.edited(change(lm, 1, seed=0)):
        check(lm, reader, rows, points, keep=2)
    check(lm, reader, rows, points, keep=3)
    check(lm, reader, rows, [Point(0, "key")], keep=0)


def test_rows_that_share_nothing_or_everything(tiny: Callable[..., LM]) -> None:
    lm = tiny("gpt2")
    rows, _ = rows_of((0, 0))
    check(lm, LayerwiseReader(lm, rows, [0] * len(rows), keep_bytes=1e9), rows, [Point(2, "mlp")], keep=1)
    check(lm, LayerwiseReader(lm, rows[:1] * 3, [0] * 3, keep_bytes=1e9), rows[:1] * 3, [Point(2, "mlp")], keep=1)
    check(lm, LayerwiseReader(lm, rows[:1], [0], keep_bytes=1e9), rows[:1], [Point(2, "mlp")], keep=1)


def test_rows_that_are_read_low_are_run_no_further(tiny: Callable[..., LM]) -> None:
    """Of what prefixed rows give above the keys nothing is read, so none of it is computed; the sums are the same."""
    lm = tiny("llama")
    rows, prefix_group = rows_of((9, 4))
    deep = [number == 1 for number in prefix_group]  # with a beginning that is not the longest
    tokens, one_sum = [r.position("subject_last") for r in rows], [0] * len(rows)
    readings = {
        Point(1, "key"): Reading(tokens, one_sum, [1.0] * len(rows)),
        Point(3, "block"): Reading(tokens, one_sum, [float(d) for d in deep]),
    }
    seen: dict[int, int] = {}

    def count(layer: int) -> Callable[..., None]:
        def add(module: object, args: tuple[torch.Tensor, ...], output: object) -> None:
            seen[layer] = seen.get(layer, 0) + args[0].shape[0]

        return add

    found = []
    for given in (None, deep):
        reader = LayerwiseReader(lm, rows, prefix_group, keep_bytes=1e9, deep=given)
        seen.clear()
        handles = [lm.site(layer, "down_proj").module.register_forward_hook(count(layer)) for layer in (0, 2)]
        found.append(reader.read(readings, keep=1))
        for handle in handles:
            handle.remove()
        above = sum(deep) if given else len(rows)
        assert seen[2] - seen[0] == above - len(rows)  # the common beginnings are run in both
    for point in readings:
        assert_close(found[0][point], found[1][point], rtol=1e-9, atol=1e-9)
