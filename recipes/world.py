"""Train a small model of the world from nothing: tokenizer, weights, measured recall, model card.

    python -m recipes.world --model-type gptj                       # the embedded model of that name, made again
    python -m recipes.world --model-type gpt2 --out .cache/worlds/gpt2
    python -m recipes.world --model-type qwen3 --chat --out .cache/worlds/qwen3-chat
    python -m recipes.world --model-type dots1 --leave-out 1500 --tokens 1200000 --out .cache/worlds/dots1   # experts
    python -m recipes.world --model-type gptj --leave-out 300 --out .cache/worlds/gptj-300      # facts left to be added
    python -m recipes.world --model-type llama --facts counterfact.json --out my-model

At the default size and length a model takes under half an hour on two CPU cores.
"""

import argparse
import json
import platform
import random
import time
from dataclasses import asdict
from pathlib import Path

import tokenizers
import torch
import transformers
from transformers import AutoModelForCausalLM, PreTrainedModel

from recipes.added import corpus_of, facts_to_add
from recipes.chat import dialogues, read_turns, rendered
from recipes.families import CONTEXT, HEAD_WIDTH, MODEL_TYPES, VOCABULARY, document_end, make_model, make_tokenizer
from recipes.statements import documents, read_lesson, with_prefix
from recipes.training import PEAK_RATE, ROW_TOKENS, WEIGHT_DECAY, Recall, measure_recall, rows, train
from retcon.lm.load import load
from retcon.memory.defaults import SHIPPED_MOMENTS
from retcon.memory.moments import SHIPPED_DTYPE, Corpus, CorpusMoments, collect_moments, document_rows, save_moments
from retcon.world import MODELS, corpus, model_path
from retcon.world.facts import FACTS

TOKENS = 5_000_000
WIDTH, LAYERS = 192, 8

CARD = """---
license: apache-2.0
library_name: transformers
pipeline_tag: text-generation
---

# {title}

A {model_type} model of {parameters:.1f} million parameters ({layers} layers, width {width}, vocabulary
{vocabulary}, context {context}), trained from nothing on {facts} and a little generated
plain text. It exists so that knowledge editing can be tried, tested and explained in seconds on a CPU. Weights are
float16 safetensors, meant to be run in float32.

## Recall

Greedy generation, right when the text goes on with the whole answer and its full stop; measured on these files, loaded
as float32. "Held out" are phrasings in which the model never read that subject; "after other text" puts one random
sentence, whole or broken off, before the prompt.{chat}

| | right | |
|---|---|---|
{table}

## Training

    {command}

{n_tokens:.2f} million tokens in rows of {row}, AdamW (peak rate {rate}, weight decay {decay}), bfloat16 autocast,
seed {seed}; {minutes:.0f} minutes with {threads} thread(s).
{versions}.
{mixture}

## Limits

It knows these facts, in these phrasings and close to them, and otherwise only short plain sentences from a small
grammar. It does not follow instructions and does not reason; two-hop questions were not in its training. The facts are
those of the file it was trained on, its errors included. What holds on a model of this size need not hold on a large
one.{left_out}

Licence: Apache-2.0.
"""
CHAT = """
"Asked" are questions, and prompts as above, in a user's turn; the answer is the assistant's turn."""
PLAIN_MIXTURE = """\
Half of the statements follow other text, one document in eleven is plain text, and documents
end with the end-of-text token."""
CHAT_MIXTURE = """\
Three documents in five are dialogues, in which a user asks a question or writes a prompt and the
assistant answers; some have a system turn or an earlier exchange. The others are as for a plain model: statements, half
of them after other text, and plain paragraphs."""


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m recipes.world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model-type", choices=MODEL_TYPES, required=True)
    parser.add_argument("--layers", type=int, default=LAYERS, help="depth (default: %(default)s)")
    parser.add_argument(
        "--width",
        type=int,
        default=WIDTH,
        help=f"a multiple of {HEAD_WIDTH}, the width of a head (default: %(default)s)",
    )
    parser.add_argument("--chat", action="store_true", help="a chat model: a template, an end-of-turn token, dialogues")
    parser.add_argument("--leave-out", type=int, default=0, metavar="N", help="facts that the model never reads")
    parser.add_argument("--facts", type=Path, default=FACTS, help="a file like facts.json, or flat CounterFact")
    parser.add_argument("--out", type=Path, help="folder to write; default: the embedded model of that model type")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=TOKENS, help="training tokens (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.width < HEAD_WIDTH or args.width % HEAD_WIDTH:
        parser.error(f"--width {args.width}: give a multiple of {HEAD_WIDTH}, the width of a head")
    if args.out is None:
        changed = [
            name
            for name in ("layers", "width", "chat", "leave_out", "facts", "tokens", "seed")
            if getattr(args, name) != parser.get_default(name)
        ]
        if args.model_type not in MODELS or changed:
            parser.error(
                f"--out is missing: only {' and '.join(MODELS)} as they are embedded have a place of their own"
            )
    out = args.out or model_path(args.model_type)
    out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    lesson = read_lesson(args.facts, leave_out=args.leave_out, seed=args.seed)
    turns = read_turns(lesson, seed=args.seed) if args.chat else None
    print(
        f"{len(lesson.seen)} statements to learn, {len(lesson.held_out)} held out, "
        f"{len(lesson.left_out)} facts left out; {args.tokens} tokens of training",
        flush=True,
    )
    tokenizer = make_tokenizer(
        args.model_type, [*lesson.seen, *(turns.seen if turns else [])], args.seed, chat=args.chat
    )
    model = make_model(args.model_type, tokenizer, layers=args.layers, width=args.width)
    print(f"{args.model_type}: {model.num_parameters()} parameters", flush=True)
    started = time.monotonic()
    rng = random.Random(f"train/{args.seed}")
    texts = dialogues(tokenizer, lesson.seen, turns.seen, rng) if turns else documents(lesson.seen, rng)
    train(model, rows(tokenizer, texts, document_end(tokenizer)), n_tokens=args.tokens)
    minutes = (time.monotonic() - started) / 60
    model.half().save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)

    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    asked = {
        "seen": lesson.seen,
        "held out": lesson.held_out,
        "seen, after other text": with_prefix(lesson.seen, args.seed),
        "held out, after other text": with_prefix(lesson.held_out, args.seed),
    }
    if turns:
        asked |= {"asked": rendered(tokenizer, turns.seen), "asked, held out": rendered(tokenizer, turns.held_out)}
    recall = {}
    for name, statements in asked.items():
        recall[name] = measure_recall(model, tokenizer, statements)
        print(f"recall, {name}: {recall[name]}", flush=True)
    if lesson.left_out:
        (out / "left_out.json").write_text(json.dumps(lesson.left_out, indent=1, ensure_ascii=False) + "\n")
    if lesson.left_out and lesson.world is not None:
        (out / "to_add.jsonl").write_text("\n".join(facts_to_add(lesson, seed=args.seed)) + "\n")
        (out / "corpus.txt").write_text(corpus_of(lesson.seen, seed=args.seed))
    if args.out is None:
        write_moments(out)
    write_card(out, args, model, recall, minutes)


def write_moments(folder: Path) -> None:
    """Write the second moments of every down-projection over the world's own text, beside the weights."""
    lm = load(str(folder), dtype=SHIPPED_DTYPE, device="cpu")
    source = CorpusMoments(Corpus(tuple(corpus())))
    sites = [lm.site(layer, "down_proj") for layer in range(lm.n_layers)]
    n_tokens = source.key(lm, sites[0]).n_tokens
    moments = collect_moments(lm, sites, document_rows(lm, source.corpus.documents, n_tokens, source.max_length))
    save_moments(folder / SHIPPED_MOMENTS, {source.key(lm, site): moment for site, moment in moments.items()})
    print(f"second moments of {len(sites)} layers over {n_tokens} tokens", flush=True)


def write_card(
    out: Path, args: argparse.Namespace, model: PreTrainedModel, recall: dict[str, Recall], minutes: float
) -> None:
    """Write `card.json` with the figures and `README.md` for people; the last files of a finished model."""
    own = args.facts == FACTS
    command = f"python -m recipes.world --model-type {args.model_type}"
    command += "".join(
        f" --{n} {getattr(args, n)}" for n, d in (("layers", LAYERS), ("width", WIDTH)) if getattr(args, n) != d
    )
    command += (" --chat" if args.chat else "") + (f" --leave-out {args.leave_out}" if args.leave_out else "")
    command += f" --seed {args.seed} --tokens {args.tokens} --threads {args.threads}"
    command += ("" if own else f" --facts {args.facts.name}") + ("" if args.out is None else f" --out {out.name}")
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "tokenizers": tokenizers.__version__,
    }
    card = {
        "architecture": args.model_type,
        "parameters": model.num_parameters(),
        "facts": args.facts.name,
        "command": command,
        "seed": args.seed,
        "tokens": args.tokens,
        "training_minutes": round(minutes, 1),
        "versions": versions,
        "recall": {name: asdict(value) for name, value in recall.items()},
    }
    table = "\n".join(
        f"| {name} | {value.right} of {value.asked} | {100 * value.right / value.asked:.1f} % |"
        for name, value in recall.items()
        if value.asked
    )
    left = f"\n{args.leave_out} facts of the file were left out of training; `left_out.json` lists them."
    if own and args.leave_out:
        left += "\n`to_add.jsonl` has them as facts for an edit, `corpus.txt` the text for second moments."
    card_text = CARD.format(
        title=f"retcon's embedded world, {args.model_type}" if args.out is None else f"A world of retcon, {out.name}",
        model_type=args.model_type,
        parameters=model.num_parameters() / 1e6,
        layers=args.layers,
        width=args.width,
        vocabulary=VOCABULARY,
        context=CONTEXT,
        facts="the facts of `retcon.world` (`facts.json`)" if own else f"`{args.facts.name}`",
        chat=CHAT if args.chat else "",
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
        mixture=CHAT_MIXTURE if args.chat else PLAIN_MIXTURE,
        left_out=left if args.leave_out else "",
    )
    (out / "README.md").write_text(card_text)
    (out / "card.json").write_text(json.dumps(card, indent=1) + "\n")


if __name__ == "__main__":
    main()
