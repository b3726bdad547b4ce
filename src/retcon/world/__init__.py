"""The embedded world: about 2,200 real facts, and two small models that know them.

    from retcon import world

    world.load_world().facts[0]         # Fact(subject=..., relation='P103', object='Chinese')
    world.cases(10, seed=0)             # edits with the queries that measure them
    world.model_path("gptj")            # a folder for `AutoModelForCausalLM.from_pretrained`

Importing it loads neither torch nor transformers. The models are made by `python -m recipes.world`.
"""

from pathlib import Path

from retcon.errors import UnsupportedModel
from retcon.world.cases import cases, corpus
from retcon.world.facts import Fact, Relation, TwoHop, World, load_world
from retcon.world.text import text

__all__ = ["MODELS", "Fact", "Relation", "TwoHop", "World", "cases", "corpus", "load_world", "model_path", "text"]

MODELS = ("gptj", "llama")
"""The embedded models by architecture: attention and MLP in parallel, and in sequence with a gated MLP."""


def model_path(name: str) -> Path:
    """Return the folder of an embedded model: weights, tokenizer, model card.

    Raises:
        UnsupportedModel: no model of that name is embedded.
    """
    if name not in MODELS:
        raise UnsupportedModel(f"no embedded model {name!r}; known: {', '.join(MODELS)}")
    return Path(__file__).parent / "models" / name
