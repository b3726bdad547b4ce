"""What the tests share; the tiny random models that they run on are in `recipes.tiny`."""

import gc
import os

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from collections.abc import Callable, Iterable
from typing import Any

import jaxtyping
import pytest
import torch
from recipes.tiny import FAMILIES as FAMILIES
from recipes.tiny import FLOAT32_INSIDE as FLOAT32_INSIDE
from recipes.tiny import TEXT as TEXT
from recipes.tiny import UNLIKE as UNLIKE
from recipes.tiny import WINDOWED as WINDOWED
from recipes.tiny import tiny_model as tiny_model
from recipes.tiny import tokenizer as tokenizer

from retcon.edits import Edit
from retcon.lm.fingerprint import fingerprint
from retcon.lm.layouts import LAYOUTS
from retcon.lm.model import LM
from retcon.lm.prompts import Row
from retcon.memory.moments import GivenMoments, collect_moments

CORE = ("gemma2", "gpt2", "gpt_neox", "gptj", "llama", "mixtral", "phi3", "qwen2_moe", "qwen3_5_text")
"""Families that differ in structure; the everyday suite takes these, `make test-all` the others."""
BROAD = (
    "contract/test_methods.py",
    "memory/test_fast_values.py",
    "methods/test_fast_path.py",
    "methods/test_advised.py",
)
"""Tests of everything on every family, of which the everyday suite takes the first three."""
FIRST = ("gpt2", "gptj", "llama")
SHAPED = pytest.StashKey[dict[str, str]]()
WHOLE_RUNS = (
    "behaviour/", "bench/", "cli/", "cluster/", "contract/", "evaluation/", "export/", "methods/", "parity/", "store/",
    "web/", "workflow/", "world/", "locate/test_figures.py", "locate/test_tracing.py", "test_attachment.py",
    "test_examples.py", "test_guides.py", "test_readme.py",
)  # fmt: skip
"""Tests of methods, commands and whole runs, in which shapes are not checked (checking takes about as long as the work)
but where a test asks for it: the contract battery does, once for every method."""


def everyday(*kept: Any, of: Iterable[Any], rows: bool = False) -> list[Any]:
    """Values for `parametrize`, of which `make test` takes those that are kept and `make test-all` the others.

    Args:
        rows: every value is a tuple, with a value for each of several names.
    """
    marked = [(value if rows else (value,), [] if value in kept else [pytest.mark.long]) for value in of]
    return [pytest.param(*values, marks=marks) for values, marks in marked]


class Models(dict[str, LM]):
    """One LM per family, made when it is first asked for, so that a run pays for the families it tests."""

    def __missing__(self, family: str) -> LM:
        self[family] = LM(tiny_model(family), tokenizer())
        return self[family]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what is parametrised with a family outside `CORE` as `long`; in the broadest files, outside `FIRST`."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            family = item.callspec.params.get("family") or item.callspec.params.get("model_type")
            kept = FIRST if item.location[0].endswith(BROAD) else CORE
            if family in LAYOUTS and family not in kept:
                item.add_marker("long")


def pytest_collection_finish() -> None:
    """Take what was imported out of the garbage collector's sight: it looks at all of it wherever memory is short."""
    gc.collect()
    gc.freeze()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Check shapes in tests of the parts, in the first case of each."""
    test = item.nodeid.partition("[")[0]
    first = item.session.stash.setdefault(SHAPED, {}).setdefault(test, item.nodeid) == item.nodeid
    whole = any(part in test for part in WHOLE_RUNS)
    jaxtyping.config.update("jaxtyping_disable", whole or not first)


@pytest.fixture
def shapes() -> None:
    """Check shapes in this test, whatever its folder."""
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def tiny() -> Callable[..., LM]:
    """tiny(family, dtype=float64, tokenizer="gpt", n_layers=4) -> LM."""

    def make(
        family: str = "gptj", dtype: torch.dtype = torch.float64, *, tok: str = "gpt", n_layers: int = 4, seed: int = 0
    ) -> LM:
        return LM(tiny_model(family, dtype, n_layers=n_layers, seed=seed), tokenizer(tok), name=f"tiny-{family}")

    return make


@pytest.fixture
def edit() -> Edit:
    return Edit("The capital of {} is", "France", "Rome", "Paris", id="france")


@pytest.fixture
def edits() -> list[Edit]:
    return [
        Edit("The capital of {} is", "France", "Rome", "Paris", id="france"),
        Edit("The mother tongue of {} is", "Danielle Darrieux", "Italian", "French", id="darrieux"),
        Edit("{} lived in", "Leonardo da Vinci", "São Paulo", "Florence", id="leonardo"),
        Edit("You know that {}", "Łódź", "a town in Greece", None, id="lodz"),
    ]


def random_moments(
    lm: LM, *, kinds: tuple[str, ...] = ("down_proj", "o_proj"), n_tokens: int = 1600, experts: bool = False
) -> GivenMoments:
    """Full-rank second moments of every layer, from random tokens."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 400, (n_tokens // 16, 16), generator=generator).tolist()
    sites = [lm.site(layer, kind) for layer in range(lm.n_layers) for kind in kinds if lm.has(layer, kind)]  # type: ignore[arg-type]
    if experts:
        sites = [s for layer in range(lm.n_layers) if lm.kinds[layer].experts for s in lm.expert_sites(layer)]
    found = collect_moments(lm, sites, [Row(tuple(r), len(r)) for r in ids])
    return GivenMoments({s.id: m for s, m in found.items()})


@pytest.fixture
def randn() -> Callable[..., torch.Tensor]:
    """randn(*shape) in float64, the same every time."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def untouched() -> Callable[[LM], Any]:
    """Everything that a call must leave as it was, as one comparable value."""

    def look(lm: LM) -> Any:
        hooks = sum(
            len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in lm.model.modules()
        )
        return (
            fingerprint(lm.model),
            hooks,
            [m.training for m in lm.model.modules()],
            [p.requires_grad for p in lm.model.parameters()],
            [p.grad is None for p in lm.model.parameters()],
            lm.tokenizer.padding_side,
            torch.get_rng_state().tolist(),
            [d.id for d in lm.applied],
        )

    return look
