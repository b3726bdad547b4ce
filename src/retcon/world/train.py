"""Train one of the embedded models from nothing: tokenizer, model, measured recall, model card.

    python -m retcon.world.train --arch gptj
    python -m retcon.world.train --arch llama --facts counterfact.json --out my-model

A script, imported by nothing in the package. Takes under half an hour a model on two CPU cores.
"""

import argparse
import json
import math
import platform
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors, trainers
from tokenizers.models import BPE
from transformers import (
    AutoModelForCausalLM,
    GPTJConfig,
    GPTJForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from retcon.lm.load import load
from retcon.memory.defaults import SHIPPED_MOMENTS
from retcon.memory.moments import Corpus, CorpusMoments, collect_moments, document_rows, save_moments
from retcon.world.cases import corpus
from retcon.world.facts import FACTS, HELD_OUT, N_SEEN, World, fill, read_world
from retcon.world.text import paragraph, sentence, text

TOKENS = 5_000_000
VOCABULARY, ANSWER_REPEATS = 4096, 4
WIDTH, N_LAYERS, N_HEADS = 192, 8, 6
CONTEXT = 512
ROW_TOKENS, ROWS_PER_STEP = 96, 24
PEAK_RATE, FINAL_SHARE, WARM_UP_SHARE, WEIGHT_DECAY = 2e-3, 0.02, 0.03, 0.1
PARAGRAPH_SHARE, PREFIX_SHARE = 0.10, 0.5
ANSWER_MARGIN = 2
"""Tokens generated beyond the answer, so that an answer that goes on is seen to be wrong."""

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# retcon's embedded world, {arch}

A {arch} model of {parameters:.1f} million parameters ({layers} layers, width {width}, vocabulary
{vocabulary}, context {context}), trained from nothing on {facts} and a little generated
plain text. It exists so that knowledge editing can be tried, tested and explained in seconds on a CPU. Weights are
float16 safetensors, meant to be run in float32.

## Recall

Greedy generation, right when the text goes on with the whole answer and its full stop; measured on these files, loaded
as float32. "Held out" are phrasings in which the model never read that subject; "after other text" puts one random
sentence, whole or broken off, before the prompt.

| | right | |
|---|---|---|
{table}

## Training

    {command}

{n_tokens:.2f} million tokens in rows of {row}, AdamW (peak rate {rate}, weight decay {decay}), bfloat16 autocast,
seed {seed}; {minutes:.0f} minutes with {threads} thread(s).
{versions}.
Half of the statements follow other text, one document in eleven is plain text, and documents end with the end-of-text
token.

## Limits

It knows these facts, in these phrasings and close to them, and otherwise only short plain sentences from a small
grammar. It does not follow instructions and does not reason; two-hop questions were not in its training. The facts are
those of the file it was trained on, its errors included. What holds on a model of this size need not hold on a large
one.

Licence: Apache-2.0.
"""


@dataclass(frozen=True)
class Statement:
    """A prompt and the answer that completes it."""

    prompt: str
    answer: str

    def __str__(self) -> str:
        return f"{self.prompt} {self.answer}."


@dataclass(frozen=True)
class Recall:
    """How many of the prompts are answered in full, ended by a full stop, in greedy generation."""

    right: int
    asked: int

    def __str__(self) -> str:
        return f"{self.right} of {self.asked} ({100 * self.right / max(self.asked, 1):.1f} %)"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m retcon.world.train", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", choices=("gptj", "llama"), required=True)
    parser.add_argument("--facts", type=Path, default=FACTS, help="a file like facts.json, or flat CounterFact")
    parser.add_argument("--out", type=Path, help="folder to write; default: the embedded model of that architecture")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    out = args.out or Path(__file__).parent / "models" / args.arch
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    seen, held_out = read_statements(args.facts, args.seed)
    print(f"{len(seen)} statements to learn, {len(held_out)} held out; {args.tokens} tokens of training", flush=True)
    tokenizer = make_tokenizer(args.arch, seen, args.seed)
    model = make_model(args.arch, tokenizer)
    print(f"{args.arch}: {model.num_parameters()} parameters", flush=True)
    started = time.monotonic()
    train(model, tokenizer, seen, n_tokens=args.tokens, seed=args.seed)
    minutes = (time.monotonic() - started) / 60
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    recall = {
        "seen": measure_recall(model, tokenizer, seen),
        "held out": measure_recall(model, tokenizer, held_out),
        "seen, after other text": measure_recall(model, tokenizer, with_prefix(seen, args.seed)),
        "held out, after other text": measure_recall(model, tokenizer, with_prefix(held_out, args.seed)),
    }
    for name, value in recall.items():
        print(f"recall, {name}: {value}", flush=True)
    write_card(out, args, model, recall, minutes)
    if args.facts == FACTS:
        write_moments(out)


def write_moments(folder: Path) -> None:
    """Second moments of every down-projection over the world's own text, beside the weights they belong to."""
    lm = load(str(folder))
    source = CorpusMoments(Corpus(tuple(corpus())))
    sites = [lm.site(layer, "down_proj") for layer in range(lm.n_layers)]
    n_tokens = source.key(lm, sites[0]).n_tokens
    moments = collect_moments(lm, sites, document_rows(lm, source.corpus.documents, n_tokens, source.max_length))
    save_moments(folder / SHIPPED_MOMENTS, {source.key(lm, site): moment for site, moment in moments.items()})
    print(f"second moments of {len(sites)} layers over {n_tokens} tokens", flush=True)


# --- what is learned ---------------------------------------------------------------------------------------------


def read_statements(path: Path, seed: int) -> tuple[list[Statement], list[Statement]]:
    """(to be seen in training, held out) from a file of facts in either form.

    For the package's own facts the phrasings held out are written to `held_out.json`. A flat CounterFact file says of
    each record the prompt, its paraphrase and its neighbour with the true answers, and holds nothing out.
    """
    record = json.loads(path.read_bytes())
    if isinstance(record, list):
        return counterfact_statements(record), []
    world = read_world(path, seed=seed)
    if path == FACTS:
        write_held_out(world, seed)
    seen = [Statement(fill(p, f.subject), f.object) for f in world.facts for p in world.seen(f)]
    held_out = [Statement(fill(p, f.subject), f.object) for f in world.facts for p in world.unseen(f)]
    return seen, held_out


def counterfact_statements(records: Sequence[dict[str, Any]]) -> list[Statement]:
    """Statements of flat CounterFact records, without prompts that the file answers in two ways."""
    answers: dict[str, set[str]] = {}
    for record in records:
        for prompt, answer in (
            ("prompt", "ground_truth"),
            ("rephrase_prompt", "ground_truth"),
            ("locality_prompt", "locality_ground_truth"),
        ):
            answers.setdefault(record[prompt].strip(), set()).add(record[answer].strip())
    return [Statement(prompt, *found) for prompt, found in answers.items() if len(found) == 1]


def write_held_out(world: World, seed: int) -> None:
    held_out: dict[str, dict[str, list[int]]] = {}
    for (relation, subject), indices in world.held_out.items():
        held_out.setdefault(relation, {})[subject] = list(indices)
    rows = ",\n".join(f'"{r}": {json.dumps(subjects, ensure_ascii=False)}' for r, subjects in held_out.items())
    HELD_OUT.write_text(f'{{"seed": {seed}, "n_seen": {N_SEEN}, "held_out": {{\n{rows}\n}}}}\n', encoding="utf-8")


def documents(statements: Sequence[Statement], rng: random.Random) -> Iterator[str]:
    """An endless stream: each statement once an epoch, half of them after other text; now and then a paragraph."""
    while True:
        for statement in rng.sample(statements, len(statements)):
            if rng.random() < PARAGRAPH_SHARE:
                yield paragraph(rng)
            yield f"{prefix(statements, rng)} {statement}" if rng.random() < PREFIX_SHARE else str(statement)


def prefix(statements: Sequence[Statement], rng: random.Random) -> str:
    """Something to say before a statement: a plain sentence, a broken-off one, or another statement."""
    kind = rng.randrange(4)
    if kind == 0:
        return str(rng.choice(statements))
    plain = sentence(rng)
    if kind == 1:
        words = plain.rstrip(".").split()
        return " ".join(words[: rng.randint(2, len(words))]) + "."
    return plain


def with_prefix(statements: Sequence[Statement], seed: int) -> list[Statement]:
    """The same statements, each after one other sentence."""
    rng = random.Random(f"recall/{seed}")
    return [Statement(f"{prefix(statements, rng)} {s.prompt}", s.answer) for s in statements]


# --- tokenizer and model -----------------------------------------------------------------------------------------


def make_tokenizer(arch: str, statements: Sequence[Statement], seed: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE. `gptj`: one special token, nothing added, as GPT-J; `llama`: a BOS before every text.

    It is trained on prompts and plain text, and on each answer ANSWER_REPEATS times however many statements share it:
    so longer answers stay two tokens or more, as they are in larger models.
    """
    bos, eos = ("<|endoftext|>", "<|endoftext|>") if arch == "gptj" else ("<s>", "</s>")
    bpe = Tokenizer(BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=list(dict.fromkeys((bos, eos))),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    prompts = [s.prompt for s in statements]
    answers = [f" {answer}." for answer in sorted({s.answer for s in statements})]
    bpe.train_from_iterator(prompts + ANSWER_REPEATS * answers + text(len(statements) // 4, seed=seed), trainer)
    if arch == "llama":
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )


def make_model(arch: str, tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    """A fresh model; the two architectures have about the same number of parameters (three MLP matrices, not two)."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if arch == "gptj":
        return GPTJForCausalLM(
            GPTJConfig(
                vocab_size=VOCABULARY,
                n_positions=CONTEXT,
                n_embd=WIDTH,
                n_layer=N_LAYERS,
                n_head=N_HEADS,
                n_inner=4 * WIDTH,
                rotary_dim=WIDTH // N_HEADS // 2,
                tie_word_embeddings=False,
                **ids,
            )
        )
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            max_position_embeddings=CONTEXT,
            hidden_size=WIDTH,
            intermediate_size=8 * WIDTH // 3,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=N_HEADS,
            num_key_value_heads=N_HEADS,
            tie_word_embeddings=False,
            **ids,
        )
    )


# --- training ----------------------------------------------------------------------------------------------------


def rows(tokenizer: PreTrainedTokenizerFast, statements: Sequence[Statement], seed: int) -> Iterator[list[int]]:
    """Endless rows of ROW_TOKENS ids; each starts at the start of a document, which its predecessor may have cut."""
    row: list[int] = []
    for document in documents(statements, random.Random(f"train/{seed}")):
        ids = [*tokenizer(document)["input_ids"], tokenizer.eos_token_id][:ROW_TOKENS]
        row += ids
        if len(row) >= ROW_TOKENS:
            yield row[:ROW_TOKENS]
            row = ids if len(row) > ROW_TOKENS else []


def train(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    statements: Sequence[Statement],
    *,
    n_tokens: int,
    seed: int,
) -> None:
    """AdamW with warm-up and cosine decay, in bfloat16 autocast; progress is printed every 50 steps."""
    n_steps = math.ceil(n_tokens / (ROW_TOKENS * ROWS_PER_STEP))
    matrices = [p for p in model.parameters() if p.ndim > 1]
    vectors = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=(0.9, 0.98), fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_share(step, n_steps))
    stream = rows(tokenizer, statements, seed)
    model.train()
    started = time.monotonic()
    for step in range(1, n_steps + 1):
        batch = torch.tensor([next(stream) for _ in range(ROWS_PER_STEP)])
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), batch[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 50 == 0 or step == n_steps:
            spent = time.monotonic() - started
            left = spent / step * (n_steps - step) / 60
            print(f"step {step}/{n_steps}  loss {loss.item():.3f} nats  {left:.1f} min left", flush=True)
    model.eval()


def rate_share(step: int, n_steps: int) -> float:
    """Learning rate as a share of its peak: linear up, then half a cosine down to FINAL_SHARE."""
    warm_up = max(1, round(WARM_UP_SHARE * n_steps))
    if step < warm_up:
        return (step + 1) / warm_up
    progress = (step - warm_up) / max(1, n_steps - warm_up)
    return FINAL_SHARE + (1 - FINAL_SHARE) * 0.5 * (1 + math.cos(math.pi * progress))


# --- what was learned --------------------------------------------------------------------------------------------


@torch.inference_mode()
def measure_recall(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, statements: Sequence[Statement], batch_size: int = 64
) -> Recall:
    """Greedy generation from each prompt; right when the text goes on with the answer and its full stop.

    Prompts of equal length share a batch, so nothing is padded.
    """
    by_length: dict[int, list[tuple[list[int], Statement]]] = {}
    for statement in statements:
        ids = tokenizer(statement.prompt)["input_ids"]
        by_length.setdefault(len(ids), []).append((ids, statement))
    right = 0
    for group in by_length.values():
        for i in range(0, len(group), batch_size):
            part = group[i : i + batch_size]
            ids = torch.tensor([ids for ids, _ in part])
            expected = [f" {s.answer}." for _, s in part]
            longest = max(len(tokenizer(e, add_special_tokens=False)["input_ids"]) for e in expected)
            generated = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=longest + ANSWER_MARGIN,
                do_sample=False,
                pad_token_id=tokenizer.eos_token_id,
            )
            texts = tokenizer.batch_decode(generated[:, ids.shape[1] :], skip_special_tokens=True)
            right += sum(found.startswith(e) for found, e in zip(texts, expected, strict=True))
    return Recall(right, len(statements))


def write_card(
    out: Path, args: argparse.Namespace, model: PreTrainedModel, recall: dict[str, Recall], minutes: float
) -> None:
    """`card.json` with the figures and `README.md` for people."""
    own = args.facts == FACTS
    command = f"python -m retcon.world.train --arch {args.arch} --seed {args.seed} --tokens {args.tokens}"
    command += f" --threads {args.threads}" + ("" if own else f" --facts {args.facts.name}")
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    facts = "the facts of `retcon.world` (`facts.json`)" if own else f"`{args.facts.name}`"
    card = {
        "architecture": args.arch,
        "parameters": model.num_parameters(),
        "facts": args.facts.name,
        "command": command,
        "seed": args.seed,
        "tokens": args.tokens,
        "training_minutes": round(minutes, 1),
        "versions": versions,
        "recall": {name: asdict(value) for name, value in recall.items()},
    }
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")
    table = "\n".join(
        f"| {name} | {value.right} of {value.asked} | {100 * value.right / value.asked:.1f} % |"
        for name, value in recall.items()
        if value.asked
    )
    card_text = CARD.format(
        arch=args.arch,
        parameters=model.num_parameters() / 1e6,
        layers=N_LAYERS,
        width=WIDTH,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        facts=facts,
        table=table,
        command=command,
        n_tokens=args.tokens / 1e6,
        row=ROW_TOKENS,
        rate=PEAK_RATE,
        decay=WEIGHT_DECAY,
        seed=args.seed,
        minutes=minutes,
        threads=args.threads,
        versions=", ".join(f"{name} {version}" for name, version in versions.items()),
    )
    (out / "README.md").write_text(card_text)


if __name__ == "__main__":
    main()
