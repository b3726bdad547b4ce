"""One prompt, run clean and corrupted."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from retcon.edits import Edit
from retcon.errors import NonFinite
from retcon.lm.forward import Inputs, Point, TensorName, logits_at, reading
from retcon.lm.model import LM
from retcon.lm.prompts import Batch, Row, encode, encode_edit, subject_tokens
from retcon.lm.site import SiteName
from retcon.locate.embeddings import EMBEDDING, changing_embeddings, reading_first_input
from retcon.locate.tracing.traces import Tracing
from retcon.seed import generator_of


def embedding_deviation(lm: LM, subjects: Sequence[str]) -> float:
    """Return the standard deviation of all entries of the subjects' token embeddings, each subject tokenised alone."""
    embedding = lm.model.get_submodule(lm.layout.embedding)
    ids = [i for subject in dict.fromkeys(subjects) for i in encode(lm.tokenizer, subject).ids]
    if not ids:
        return 0.0
    with torch.no_grad():
        return float(embedding(torch.tensor([ids], device=lm.device)).double().std())


@dataclass(frozen=True)
class Prompt:
    """A prompt, its clean run and its corrupted ones; tensors are on their blocks' devices."""

    row: Row
    subject: range
    answer: int
    high: float
    low: float
    noise: Float[Tensor, "samples subject width"]
    clean: dict[Point, Float[Tensor, "tokens d_model"]]
    corrupted: dict[Point, Float[Tensor, "samples tokens d_model"]]
    keys: list[Float[Tensor, "samples heads tokens d_head"]]
    """Of the corrupted runs, per block."""
    values: list[Float[Tensor, "samples heads tokens d_head"]]
    projected: list[list[Float[Tensor, "samples tokens width"]]]
    """What the attention projections put out in the corrupted runs, per block, in the order of
    `attention_projections`."""

    def first_samples(self, n: int) -> "Prompt":
        """Return the prompt with no more than n of the corrupted runs."""
        return replace(
            self,
            noise=self.noise[:n],
            corrupted={p: value[:n] for p, value in self.corrupted.items()},
            keys=[x[:n] for x in self.keys],
            values=[x[:n] for x in self.values],
            projected=[[x[:n] for x in block] for block in self.projected],
        )


def run_clean_and_corrupted(lm: LM, edit: Edit, settings: Tracing, deviation: float) -> Prompt | None:
    """Run the clean prompt and its corrupted copies in one pass; None where the model does not know the answer."""
    from transformers.cache_utils import Cache, DynamicLayer

    _ = lm.block_outputs  # found by a pass of its own, which must not meet the hooks of a trace
    row, subject = encode_edit(lm.tokenizer, edit), subject_tokens(lm.tokenizer, edit)
    rows = torch.arange(settings.samples + 1)
    last = torch.full_like(rows, row.prediction)
    batch = Batch(torch.tensor([row.ids] * len(rows), device=lm.device), torch.ones(len(rows), len(row.ids)).bool())
    noise = _noise(lm, len(subject), settings, deviation)
    found: dict[Point, Tensor] = {}
    tensors: tuple[TensorName, ...] = ("block", "mlp", "attn")
    points = [Point(layer, tensor) for layer in range(lm.n_layers) for tensor in tensors]
    hooks = {p: reading(found, p, Tensor.detach) for p in points if _wanted(p, settings)}
    projected: list[list[Tensor]] = [[] for _ in range(lm.n_layers)]
    cache = Cache(layer_class_to_replicate=DynamicLayer)
    inputs = Inputs.of(batch)
    if settings.replayed:
        inputs = replace(inputs, arguments={**inputs.arguments, "past_key_values": cache, "use_cache": True})
    corrupt = corrupting(rows - 1, subject, noise, settings)
    with ExitStack() as stack:
        stack.enter_context(changing_embeddings(lm, corrupt))
        stack.enter_context(reading_first_input(lm, reading(found, EMBEDDING, Tensor.detach)))
        for layer, into in enumerate(projected if settings.replayed else []):
            for module in attention_projections(lm, layer):
                hook = module.register_forward_hook(lambda _, __, output, into=into: into.append(output[1:].detach()))
                stack.enter_context(hook)
        logits = logits_at(lm, inputs, (rows, last), hooks)
    answer = int(logits[0].argmax())
    prob = refuse_non_finite(probability(logits, answer), edit)
    if edit.target_true and encode_edit(lm.tokenizer, edit, answer=edit.target_true).target_ids[0] != answer:
        return None
    return Prompt(
        row=row,
        subject=subject,
        answer=answer,
        high=float(prob[0]),
        low=float(prob[1:].mean()),
        noise=noise,
        clean={p: value[0] for p, value in found.items()},
        corrupted={p: value[1:] for p, value in found.items()},
        keys=[layer.keys[1:] for layer in cache.layers],
        values=[layer.values[1:] for layer in cache.layers],
        projected=projected,
    )


def _wanted(point: Point, settings: Tracing) -> bool:
    return settings.replayed or point.tensor == "block" or any(point.tensor in kind for kind in settings.kinds)


PROJECTIONS: tuple[SiteName, ...] = ("q_proj", "k_proj", "v_proj")


def attention_projections(lm: LM, layer: int) -> list[nn.Module]:
    """Return the modules that make a block's queries, attention keys and values; one where the family fuses them."""
    return list(dict.fromkeys(lm.site(layer, kind).module for kind in PROJECTIONS if lm.has(layer, kind)))


def _noise(lm: LM, n: int, settings: Tracing, deviation: float) -> Float[Tensor, "samples n width"]:
    generator = generator_of(settings.seed)
    weight = lm.model.get_submodule(lm.layout.embedding).weight
    shape = (settings.samples, n, weight.shape[1])
    if settings.distribution == "gaussian":
        drawn = torch.randn(shape, generator=generator, dtype=torch.float32)
    else:
        drawn = 2 * torch.rand(shape, generator=generator, dtype=torch.float32) - 1
    return (settings.noise * deviation * drawn).to(weight)


def corrupting(
    samples: Int[Tensor, " rows"], subject: range, noise: Float[Tensor, "samples subject width"], settings: Tracing
) -> Callable[[Tensor], Tensor]:
    """Return a change of embeddings: row i gets the noise of sample samples[i]; -1 leaves the row clean."""
    noisy = (samples >= 0).nonzero()[:, 0]

    def corrupt(embeddings: Tensor) -> Tensor:
        out = embeddings.clone()
        rows = noisy.to(out.device)
        drawn = noise[samples[noisy].to(noise.device)].to(out)
        span = slice(subject.start, subject.stop)
        out[rows, span] = drawn if settings.corruption == "replace" else out[rows, span] + drawn
        return out

    return corrupt


def probability(logits: Float[Tensor, "n vocab"], answer: int) -> Float[Tensor, " n"]:
    """Return the answer's probability, in float64, where the logits are."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return (logits[:, answer] - logits.logsumexp(-1)).exp().double()


def refuse_non_finite(prob: Float[Tensor, " n"], edit: Edit) -> Float[Tensor, " n"]:
    """Probabilities, on the CPU.

    Raises:
        NonFinite: one is NaN or infinite.
    """
    prob = prob.cpu()
    if not torch.isfinite(prob).all():
        raise NonFinite(f"edit {edit.id!r} ({edit.subject!r}): a probability is NaN or infinite; load a wider dtype")
    return prob
