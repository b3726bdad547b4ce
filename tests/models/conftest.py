"""Models that are not shipped: fetched by `make smollm`, trained by `make worlds`, and looked for in `.cache/`."""

from pathlib import Path

import pytest

from retcon import world
from retcon.lm.load import load
from retcon.lm.model import LM
from retcon.memory.moments import Corpus, CorpusMoments

CACHE = Path(__file__).parents[2] / ".cache"
WORLDS = ("gpt2", "qwen2", "qwen3-chat", "dots1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.models)
            # the user's own cache, which may hold what an earlier version kept
            item.add_marker(pytest.mark.filterwarnings("ignore:.*it is not used and is made again"))


def model_at(folder: Path, command: str) -> LM:
    """Load the model in `folder`, or skip the test with the command that puts one there."""
    if not (folder / "model.safetensors").exists():
        pytest.skip(f"{folder.relative_to(CACHE.parent)} is not here; {command} makes it")
    return load(str(folder), device="cpu")


@pytest.fixture(scope="session")
def smollm() -> LM:
    return model_at(CACHE / "smollm2-135m", "make smollm")


@pytest.fixture(scope="session", params=WORLDS)
def trained_world(request: pytest.FixtureRequest) -> LM:
    folder = CACHE / "worlds" / request.param
    if not (folder / "card.json").exists():  # written last
        pytest.skip(f"{folder.relative_to(CACHE.parent)} is not here, or still in training; make worlds makes it")
    return model_at(folder, "make worlds")


@pytest.fixture(scope="session")
def moments() -> CorpusMoments:
    """Second moments over a small text: enough tokens for every key width here."""
    return CorpusMoments(Corpus(tuple(world.text(500))))
