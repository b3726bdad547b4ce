"""General ability through lm-evaluation-harness (the extra `ability`), around the live model.

What the harness does to the objects it is given is not left to chance: it gets a copy of the tokenizer, no response
cache (it is keyed by the request's text only, so it would return another model's answers), and the weights are checked
afterwards, for it ties head and embedding, which would undo an edit of either.
"""

import copy
import hashlib
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import torch

from retcon.arguments import list_of_texts
from retcon.checked import as_bytes
from retcon.errors import InvalidSetting, MissingPackage, NotEditable, how_to_install
from retcon.evaluation.records import Record, When, whole_model_record
from retcon.lm.model import LM

DEFAULT_TASKS = ("sst2", "mrpc", "cola", "rte", "mmlu", "mnli")
"""AlphaEdit's choice; its own figures are weighted F1 on 100 items each, with prompts of its own: not comparable."""


def ability(
    lm: LM,
    tasks: Sequence[str] = DEFAULT_TASKS,
    *,
    when: When = "final",
    step: int = 0,
    n_shot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[Record]:
    """Return every metric of every task, for the current model; standard errors are in the details.

    Args:
        tasks: names of the harness, or paths of task files (`.yaml`) of your own.
        n_shot: examples in front of each item; None as the task has it.
        limit: items per leaf task (for `mmlu`: per subject); None takes all.

    Raises:
        MissingPackage: lm-eval is not installed.
        InvalidSetting: a task is unknown to it.
        NotEditable: the harness changed the model's weights.
    """
    try:
        harness, models = import_module("lm_eval"), import_module("lm_eval.models.huggingface")
    except ImportError:
        raise MissingPackage(
            f"general ability needs the package lm-eval ({how_to_install('ability')}); without it, perplexity "
            "(text) and locality say what is left of the model"
        ) from None
    mark, tasks = _mark(lm), list_of_texts(tasks, "tasks")
    with lm.frozen_eval(), _generators_kept():
        wrapped = models.HFLM(
            pretrained=lm.model,
            tokenizer=copy.deepcopy(lm.tokenizer),
            batch_size=batch_size,
            max_length=lm.context_length,
        )
        try:
            found = harness.simple_evaluate(
                model=wrapped,
                tasks=list(tasks),
                num_fewshot=n_shot,
                limit=limit,
                bootstrap_iters=0,
                log_samples=False,
                random_seed=seed,
                numpy_random_seed=seed,
                torch_random_seed=seed,
                fewshot_random_seed=seed,
            )
        except (KeyError, ValueError) as error:
            raise InvalidSetting(f"lm-eval cannot run {', '.join(tasks)}: {error}") from error
    if _mark(lm) != mark:
        raise NotEditable("lm-eval changed the model's weights (it ties head and embedding); results are void")
    return [] if found is None else _records(found, when, step)  # None: not the process that reports


def _records(found: dict[str, Any], when: When, step: int) -> list[Record]:
    records = []
    for task, values in found["results"].items():
        n = found.get("n-samples", {}).get(task, {}).get("effective", 0)
        for key, value in values.items():
            metric, comma, rule = key.partition(",")
            if not comma or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            error = values.get(f"{metric}_stderr,{rule}")
            variant = f"lm_eval.{metric}" if rule == "none" else f"lm_eval.{metric}.{rule}"
            detail = f"standard error {error:.4g}" if isinstance(error, float) else None
            records.append(whole_model_record(when, task, variant, float(value), int(n), step, detail))
    return records


@contextmanager
def _generators_kept() -> Iterator[None]:
    """Put the global generators, which the harness seeds, back as they were."""
    numpy = import_module("numpy")
    states = random.getstate(), numpy.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        numpy.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _mark(lm: LM) -> str:
    digest = hashlib.sha256()
    for name, parameter in lm.model.named_parameters(remove_duplicate=False):
        digest.update(name.encode())
        digest.update(as_bytes(parameter))
    return digest.hexdigest()
