"""The value search of JEEP's released code, from a checkout of it that the user has: seconds an edit, one by one.

Nothing of that code is here. It is told of the model, of edits and of contexts by the names that it has for them, and
made to take all its steps. It wants a CUDA card.
"""

import contextlib
import importlib
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.common import timed
from retcon import world
from retcon.edits import Edit
from retcon.errors import InvalidSetting
from retcon.lm.model import LM
from retcon.memory.contexts import Contexts

SETTINGS = "hparams/JEEP/EleutherAI_gpt-j-6B_mcf.json"
"""The released settings for GPT-J on CounterFact."""


def check(checkout: Path) -> None:
    """Check that this is a checkout of the released code.

    Raises:
        InvalidSetting: it is none.
    """
    for name in ("jeep/compute_z.py", SETTINGS):
        if not (checkout / name).is_file():
            raise InvalidSetting(f"--released {checkout}: no {name} there; give a checkout of JEEP's released code")


def seconds_an_edit(
    checkout: Path, lm: LM, edits: Sequence[Edit], contexts: Contexts, layers: tuple[int, int], steps: int
) -> float:
    """Return the mean over all edits but the first, which warms up.

    Args:
        layers: of the low and the high value.
    """
    tokenizer: Any = AutoTokenizer.from_pretrained(world.model_path("gptj"))
    tokenizer.name_or_path, tokenizer.pad_token = "gpt-j-6b", tokenizer.pad_token or tokenizer.eos_token
    templates = [["{}"], [prefix.replace("{", " ").replace("}", " ") + "{}" for prefix in contexts.prefixes]]
    requests = [
        {"prompt": e.prompt, "subject": e.subject, "target_new": {"str": f" {e.target_new}"}, "case_id": i}
        for i, e in enumerate(edits)
    ]
    took = []
    with _importing(checkout), lm.frozen_eval(), contextlib.redirect_stdout(io.StringIO()):
        search: Callable[..., Any] = importlib.import_module("jeep.compute_z").compute_z_joint
        made = importlib.import_module("jeep.jeep_hparams").JEEPHyperParams
        given = json.loads((checkout / SETTINGS).read_text())
        last = lm.n_layers - 1
        settings = made(**given | {"v_num_grad_steps": steps, "min_loss": 2.0, "v_loss_layer": last})
        for request in requests:
            one = partial(search, lm.model, tokenizer, request, settings, *layers, templates)
            took.append(timed(one, device=lm.device)[1])
    return sum(took[1:]) / len(took[1:])


@contextlib.contextmanager
def _importing(checkout: Path) -> Iterator[None]:
    """Import from the checkout; what was imported from there is forgotten afterwards."""
    before = set(sys.modules)
    sys.path.insert(0, str(checkout))
    try:
        with contextlib.chdir(checkout):  # it reads a file of settings there
            yield
    finally:
        sys.path.remove(str(checkout))
        for name in set(sys.modules) - before:
            origin = getattr(sys.modules[name], "__file__", None) or ""
            if origin.startswith(str(checkout)):
                del sys.modules[name]
