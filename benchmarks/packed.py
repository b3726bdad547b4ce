"""Edits of a model whose matrices stay packed, in 4 and 8 bits, beside those of the model in float.

    python -m benchmarks.packed --model demo:llama --n 50 --alone 10

The model is packed by bitsandbytes (nf4 with quantised scales; 8 bits), saved, and loaded with `packed=True`. Batch
methods write `--n` facts at once, methods for one fact write `--alone` facts, each measured by itself, with the model's
presets and second moments of its own keys. One line of JSON per model and method: Score, ES, GS, LS (`cf.prob_mean`),
how many edits the model says first, processor seconds per edit, and bytes: of the model as it is in memory, and of the
floats that an applied edit puts in place of packed matrices.
"""

import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import retcon
from benchmarks.common import cases_of, command_line, edited_and_measured, machine, moments_of, percents
from retcon import world
from retcon.edits import Case
from retcon.evaluation import evaluate
from retcon.lm.model import LM
from retcon.methods.common.contract import Method

METHODS = ("memit", "jeep", "rome", "kne", "ft")
PACKINGS: dict[str, dict[str, Any]] = {
    "8 bits": {"load_in_8bit": True},
    "4 bits": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
}


def packed(model: str, how: dict[str, Any], folder: Path) -> LM:
    """Pack a model in float, save it, and load it packed."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    place = str(world.model_path(model.removeprefix("demo:"))) if model.startswith("demo:") else model
    AutoModelForCausalLM.from_pretrained(
        place, quantization_config=BitsAndBytesConfig(**how), dtype=torch.float32
    ).save_pretrained(folder)
    AutoTokenizer.from_pretrained(place).save_pretrained(folder)
    return retcon.load(str(folder), packed=True, device="cpu")


def edited(lm: LM, method: Method, cases: list[Case], **given: Any) -> dict[str, Any]:
    """Return the figures of the cases, edited at once where the method takes them, else each by itself."""
    pre = evaluate(lm, cases, generate=False)
    alone = not method.supports_batches
    found = edited_and_measured(lm, method, cases, alone=alone, pre=pre, clock=time.process_time, **given)
    in_place = (module for name, module in lm.packed.items() if name in found.delta.changes)
    return {
        **percents(found.evaluation.summary()),
        "first": found.first,
        "seconds_per_edit": round(found.seconds / len(cases), 2),
        "float_bytes": sum(module.shape.numel() * module.dtype.itemsize for module in in_place),
    }


def main() -> None:
    parser = command_line(__doc__, cases=True, corpus=True, quiet=True)
    parser.add_argument("--n", type=int, default=50, help="cases written at once")
    parser.add_argument("--alone", type=int, default=10, help="cases of methods for one fact")
    parser.add_argument("--methods", nargs="+", default=METHODS)
    asked = parser.parse_args()
    print(f"# {machine()}", flush=True)
    with TemporaryDirectory() as folder:
        for how in ("float32", *PACKINGS):
            lm = retcon.load(asked.model) if how == "float32" else packed(asked.model, PACKINGS[how], Path(folder, how))
            contexts, moments = retcon.sample_contexts(lm, seed=asked.seed), moments_of(lm, asked.corpus)
            for name in asked.methods:
                cases = cases_of(asked.data, asked.start, asked.n, asked.seed)
                method = retcon.method(name, for_model=lm, cases=cases)
                cases = cases if method.supports_batches else cases[: asked.alone]
                line = {"model": asked.model, "weights": how, "model_bytes": lm.model_bytes(), "method": name}
                found = edited(lm, method, cases, contexts=contexts, moments=moments, seed=asked.seed)
                print(json.dumps({**line, "n": len(cases), **found}, ensure_ascii=False), flush=True)


if __name__ == "__main__":
    main()
