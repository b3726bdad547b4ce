"""Tokenisation against its definition: where a subject ends, where a target starts, nothing lost at the boundary."""

import copy
import random
import warnings
from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from retcon.boundary import separator_between
from retcon.chat import Chat
from retcon.edits import Edit
from retcon.errors import InvalidEdit, InvalidSetting, PositionNotFound, RetconWarning, UnsupportedModel
from retcon.lm.prompts import Row, encode, encode_edit, encode_trained, end_of_turn, pad, render, subject_tokens
from tests.conftest import TEXT, tokenizer

TOKENIZERS = ["gpt", "bos", "piece", "eos", "trimmed"]

SUBJECTS = [
    "France", "Danielle Darrieux", "São Paulo", "Łódź", "東京", "Ελλάδα", "naïve café", "1984", "C-3PO", "U.S.",
    '"Weird Al" Yankovic', "O'Brien", "Zürich-West", "🙂", "👩‍👩‍👧", "שלום", "القاهرة", "e\u0301clair", "a", "42",
    "(7)", "Hong  Kong", "İstanbul", "ﬁn",
]  # fmt: skip
WORDS = ["The", "capital", "of", "is", "in", "naïve", "東京", "1984", "-", '"quoted"', "(so)", "été", "🙂", "it's", "ß"]


def make_tokenizer(kind: str) -> Any:
    """Those of conftest, and `trimmed`: offsets without the leading space (as Llama 3), whose spaces have no width."""
    if kind != "trimmed":
        return tokenizer(kind)
    tok = Tokenizer.from_str(tokenizer("gpt").backend_tokenizer.to_str())
    tok.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)]),
        ]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def merging_tokenizer() -> Any:
    """BPE without a pre-tokenizer: its merges cross words and spaces."""
    tok = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>", "</s>", "<unk>"])
    tok.train_from_iterator(["the cat is Rome", "of is Rome the", "is Rome", "s Ro", " is R"] * 20, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tok, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def decode(tok: Any, ids: Any) -> str:
    """Text of the ids, BOS left out; byte tokens, which conftest's `piece` calls special, are kept."""
    return tok.decode([i for i in ids if i != 0], clean_up_tokenization_spaces=False)


def examples(seed: int, n: int) -> list[tuple[str, str, int]]:
    """(prompt, subject, start): the subject at the start, inside, at the end, or as the whole prompt."""
    rng, found = random.Random(seed), []
    for _ in range(n):
        subject = rng.choice(SUBJECTS)
        before = " ".join(rng.choices(WORDS, k=rng.randrange(4)))
        after = " ".join(rng.choices(WORDS, k=rng.randrange(4)))
        glue = [rng.choice([" ", " (", ' "']) if before else "", rng.choice([" ", ", ", "'s ", ". "]) if after else ""]
        head = before + glue[0]
        found.append((head + subject + glue[1] + after, subject, len(head)))
    return found


# --- the subject's last token --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:the token that ends the subject:retcon.errors.RetconWarning")
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_subject_is_complete_at_its_last_token_and_not_before(kind: str) -> None:
    tok = make_tokenizer(kind)
    for prompt, subject, start in examples(1, 150):
        row = encode(tok, prompt, subject_span=(start, start + len(subject)))
        last = row.position("subject_last")
        assert last is not None
        upto = prompt[: start + len(subject)]
        assert decode(tok, row.ids[: last + 1]).startswith(upto)
        assert not decode(tok, row.ids[:last]).startswith(upto)
        assert row.ids[last] not in (0, 1)
        assert row.target_ids == ()
        assert row.prompt_ids == row.ids


def test_bos_shifts_by_one_and_eos_by_nothing() -> None:
    plain, bos, eos = (tokenizer(kind) for kind in ("gpt", "bos", "eos"))
    for prompt, subject, start in examples(2, 60):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RetconWarning)
            a, b, c = (
                encode(t, prompt, "São Paulo", subject_span=(start, start + len(subject))) for t in (plain, bos, eos)
            )
        assert b.ids == (0, *a.ids) == c.ids  # the EOS behind is dropped
        assert a.subject_last is not None
        assert (b.subject_last, b.n_prompt) == (a.subject_last + 1, a.n_prompt + 1)
        assert (c.subject_last, c.n_prompt) == (b.subject_last, b.n_prompt)
        assert a.target_ids == b.target_ids == c.target_ids


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_a_prefix_shifts_by_its_own_length(kind: str) -> None:
    tok = make_tokenizer(kind)
    prefix = "The train stood still.\n\n"
    n_prefix = len(encode(tok, prefix + "x").ids) - len(encode(tok, "x").ids)
    for subject, template in product(["France", "São Paulo", "東京", "🙂"], ["The capital of {} is", "{} is", "In {}"]):
        edit = Edit(template, subject, "Rome")
        bare, prefixed = encode_edit(tok, edit), encode_edit(tok, edit, prefix)
        assert bare.subject_last is not None
        assert prefixed.subject_last is not None
        if template.startswith("{}") or kind == "piece":  # the first word's own space may join it or not
            assert decode(tok, prefixed.ids[: prefixed.subject_last + 1]).rstrip().endswith(subject)
        else:
            assert prefixed.subject_last == bare.subject_last + n_prefix
            assert prefixed.n_prompt == bare.n_prompt + n_prefix


@pytest.mark.filterwarnings("ignore:the token that ends the subject:retcon.errors.RetconWarning")
@pytest.mark.parametrize("kind", TOKENIZERS)
def test_the_subjects_tokens_begin_where_it_begins(kind: str) -> None:
    tok = make_tokenizer(kind)
    for prompt, subject, start in examples(seed=3, n=60):
        edit = Edit(prompt, subject, "x", subject_start=start)
        ids, at = encode_edit(tok, edit).ids, subject_tokens(tok, edit)
        assert at.stop - 1 == encode_edit(tok, edit).subject_last
        before, with_first = (decode(tok, ids[:n]).strip() for n in (at.start, at.start + 1))
        assert prompt[:start].strip().startswith(before), (prompt, subject)
        blank = not decode(tok, ids[at.start : at.start + 1]).strip()  # sentence-piece may give a word's space a token
        assert blank or len(with_first) > len(prompt[:start].strip()), (prompt, subject)


def test_the_last_occurrence_is_not_taken_for_the_first() -> None:
    tok = tokenizer()
    row = encode(tok, "France and France and France", subject_span=(11, 17))
    assert decode(tok, row.ids[: row.position("subject_last") + 1]) == "France and France"


def test_whitespace_behind_a_subject_does_not_count() -> None:
    tok = tokenizer()
    assert encode(tok, "In Rome he", subject_span=(3, 8)) == encode(tok, "In Rome he", subject_span=(3, 7))
    assert encode(tok, "In Rome \n", subject_span=(3, 8)).subject_last == encode(tok, "In Rome").prediction


def test_a_token_that_runs_past_the_subject_is_taken_with_a_warning() -> None:
    tok = merging_tokenizer()
    assert tok("the cat is Rome", return_offsets_mapping=True)["offset_mapping"] == [(0, 15)]
    with pytest.warns(RetconWarning, match=r"the token that ends the subject 'cat' in .* also covers text after it"):
        row = encode(tok, "the cat is Rome", subject_span=(4, 7))
    assert row.subject_last == 0


def test_no_token_no_position() -> None:
    tok = Tokenizer(models.BPE())
    tok.normalizer = normalizers.Replace("x", "")
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(TEXT, trainers.BpeTrainer(initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    fast = PreTrainedTokenizerFast(tokenizer_object=tok)
    with pytest.raises(PositionNotFound, match="no token covers the end of the subject 'x' in 'a x b'"):
        encode(fast, "a x b", subject_span=(2, 3))
    with pytest.raises(PositionNotFound, match="tokenised without a subject"):
        encode(fast, "a b").position("subject_last")
    assert encode(fast, "a b").position("prediction") == encode(fast, "a b").n_prompt - 1


def test_a_subject_that_is_not_in_the_prompt() -> None:
    with pytest.raises(InvalidEdit, match="does not occur in the prompt"):
        encode_edit(tokenizer(), Edit("The capital is", "France", "Rome"))


# --- prompt and target ---------------------------------------------------------------------------------------------

TARGETS = [
    "Rome",
    "São Paulo",
    "東京",
    "1984",
    '"so"',
    "(7)",
    "-",
    "🙂",
    "e\u0301clair",
    "שלום",
    "a town in Greece",
    "'s",
]


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_joint_tokens_spell_prompt_and_target(kind: str) -> None:
    tok, rng = make_tokenizer(kind), random.Random(3)
    for prompt, _, _ in examples(4, 120):
        target = rng.choice(TARGETS)
        row = encode(tok, prompt, target)
        assert len(row.target_ids) >= 1
        assert row.prompt_ids == encode(tok, prompt).ids
        text = prompt + separator_between(prompt, target) + target
        assert decode(tok, row.ids) == text
        assert decode(tok, row.prompt_ids) == prompt
        if row.boundary_merge:
            assert kind == "piece" or " " not in text[len(prompt) - 1 : len(prompt) + 1]  # merges take spaces in
            continue
        whole = tok(text)["input_ids"]  # what a model reads is what the whole text gives
        assert list(row.ids) == whole[: len(row.ids)]
        assert whole[len(row.ids) :] == ([1] if kind == "eos" else [])


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_whitespace_around_the_target_is_stripped_and_the_prompts_own_is_kept(kind: str) -> None:
    tok = make_tokenizer(kind)
    assert encode(tok, "The capital is", "  Rome\n") == encode(tok, "The capital is", "Rome")
    for prompt in ("The capital is ", "<|assistant|>\n", "A:\t"):
        row = encode(tok, prompt, "Rome")
        assert row.prompt_ids == encode(tok, prompt).ids
        assert decode(tok, row.prompt_ids) == prompt
        assert decode(tok, row.target_ids) == "Rome"


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_without_a_separator(kind: str) -> None:
    tok = make_tokenizer(kind)
    row = encode(tok, "日本の首都は", "東京", separator="")
    assert decode(tok, row.ids) == "日本の首都は東京"
    assert decode(tok, row.target_ids) == "東京"
    assert row.prompt_ids == encode(tok, "日本の首都は").ids


@pytest.mark.parametrize(
    ("prompt", "answer", "text"),
    [
        ("The capital of France is", "Rome", "The capital of France is Rome"),
        ("assistant\n", "Rome", "assistant\nRome"),
        ("The capital is ", "Rome", "The capital is Rome"),
        ('It is called "', 'Rome"', 'It is called "Rome"'),
        ('He said:"', "Rome", 'He said:"Rome'),
        ('It is called "Rome"', "by all", 'It is called "Rome" by all'),
        ("It is called \u201c", "Rome", "It is called \u201cRome"),
        ("The capital is", "\u2019s-Hertogenbosch", "The capital is \u2019s-Hertogenbosch"),
        ("The king", "\u201d, he said", "The king\u201d, he said"),
        ("Der Titel lautet", "\u00bbFaust\u00ab", "Der Titel lautet \u00bbFaust\u00ab"),
        ("Der Titel lautet \u00bb", "Faust\u00ab", "Der Titel lautet \u00bbFaust\u00ab"),
        ("Der Autor von \u00bbFaust\u00ab ist, wie der von \u201eEgmont\u201c", "Goethe", None),
        ("dell\u2019\u00ab", "Amleto", "dell\u2019\u00abAmleto"),
        ("Qui a \u00e9crit \u00ab Les Mis\u00e9rables \u00bb", "Victor Hugo", None),
        ("Hernani, dit \u00ab Hernani \u00bb, ou \u00ab", "H", "Hernani, dit \u00ab Hernani \u00bb, ou \u00abH"),
        ("\u201eWer hat Angst vor Virginia Woolf?\u201c", "Albee", None),
        ("\u201aFaust (1808)\u2018", "Goethe", None),
        ("\u00bbFaust!\u00ab und \u00bbUrfaust (1775)\u00ab", "Goethe", None),
        ("Who wrote \u201c Who\u2019s Afraid ? \u201d", "Albee", None),
        ('Who wrote " Who is Afraid ? "', "Albee", None),
        ('The 5" screen is called "', "Rome", 'The 5" screen is called "Rome'),
        ("Titeln \u00e4r (\u201d", "Faust\u201d)", "Titeln \u00e4r (\u201dFaust\u201d)"),
        ("France", "\u2019s capital", "France\u2019s capital"),
        ("France", "'s", "France's"),
        ("The people", "\u2019ll", "The people\u2019ll"),
        ("the", "\u201990s", None),
        ("the dogs'", "owner", "the dogs' owner"),
        ("The dogs\u2019", "owner", "The dogs\u2019 owner"),
        ("James'", "wife", "James' wife"),
        ("rock n'", "roll", "rock n' roll"),
        *(
            (f"{before}{sign}", after, f"{before}{sign}{after}")
            for sign in "'\u2019"
            for before, after in (
                ("Evian vend de l", "eau"),
                ("Il vient d", "Italie"),
                ("Qu", "est-ce"),
                ("Elle est \u00e0 l", "\u00e9cole"),
                ("Il capoluogo dell", "Umbria"),
                ("Nacque in un", "isola"),
                ("Visse all", "Aquila"),
                ("In nessun", "altra citt\u00e0"),
                ("Senz", "altro"),
                ("Dov", "\u00e8"),
                ("s'aident les uns les autres, entr", "eux"),
                ("by O", "Brien"),
                ("(L", "Aquila"),
                ("Saint-Jean-d", "Ang\u00e9ly"),
            )
        ),
        ("The sign 'l'", "means", "The sign 'l' means"),
        ("The motto \u2018one for all\u2019", "is", "The motto \u2018one for all\u2019 is"),
        ("The motto 'one for all'", "is", "The motto 'one for all' is"),
        ("she said '", "yes'", "she said 'yes'"),
        ("a semi-", "circle", "a semi-circle"),
        ("input/", "output", "input/output"),
        ("capital (", "Rome", "capital (Rome"),
        ('capital["France"] == "', "Rome", 'capital["France"] == "Rome'),
        ('x["', "key", 'x["key'),
        ("x = ", "1", "x = 1"),
        ("x =", "1", "x = 1"),
        ("capital=", "Rome", "capital=Rome"),
        ("It costs $", "5", "It costs $5"),
        ("\u00bf", "Roma?", "\u00bfRoma?"),
        ("1914\u2013", "1918", "1914\u20131918"),
        ("Paris \u2014", "the capital", "Paris \u2014 the capital"),
        ("A:", "Rome", "A: Rome"),
        ("France", ", whose capital", "France, whose capital"),
        ("It is", ".NET", "It is .NET"),
        ("法国的首都是", "罗马", "法国的首都是罗马"),
        ("法国的首都是：", "罗马", "法国的首都是：罗马"),
        ("法国的首都 is", "罗马", "法国的首都 is罗马"),
        ("法国的首都是", "Rome", "法国的首都是Rome"),
        ("フランスの首都は", "ローマ", "フランスの首都はローマ"),
        ("เมืองหลวงของฝรั่งเศสคือ", "โรม", "เมืองหลวงของฝรั่งเศสคือโรม"),
        ("프랑스의 수도는", "로마", "프랑스의 수도는 로마"),
        ("Tokyo (東京) is in", "Japan", "Tokyo (東京) is in Japan"),
    ],
)
def test_what_is_written_between_prompt_and_answer(prompt: str, answer: str, text: str | None) -> None:
    text = text or f"{prompt} {answer}"
    assert prompt + separator_between(prompt, answer) + answer == text
    assert Edit(prompt, None, answer).statement == text


def test_an_edits_own_separator_is_used_everywhere() -> None:
    tok = tokenizer()
    edit = Edit("The capital of {} is", "France", "Rome", separator=" = ")
    assert edit.statement == "The capital of France is = Rome"
    row = encode_edit(tok, edit, "I read. ", answer=edit.target_new)
    assert decode(tok, row.ids) == "I read. The capital of France is = Rome"
    assert decode(tok, row.prompt_ids) == "I read. The capital of France is"


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' and refuse %}{{ raise_exception('no system') }}"
    "{% endif %}[{{ m['role'] }}] {{ m['content'] | trim }}{% if not loop.last %} {% endif %}{% endfor %}"
    "{% if add_generation_prompt %} [assistant]{% endif %}"
)


def chat_tokenizer(kind: str, template: str = TEMPLATE) -> Any:
    tok = copy.deepcopy(tokenizer(kind))
    tok.chat_template = template
    return tok


@pytest.mark.parametrize("kind", ["gpt", "bos"])
def test_a_chat_prompt_is_the_users_turn_in_the_template(kind: str) -> None:
    tok = chat_tokenizer(kind)
    edit = Edit(" Name the capital of {}. ", "France", "Rome", chat=Chat("Answer about France."))
    row = encode_edit(tok, edit, "I read of France.", answer=edit.target_new)
    asked = "<s>[system] Answer about France. [user] I read of France. Name the capital of France. [assistant]"
    assert row.prompt_ids == tuple(tok(asked, add_special_tokens=False)["input_ids"])
    assert row.ids.count(0) == 1
    assert decode(tok, row.target_ids).strip() == "Rome"
    assert row.subject_last is not None
    until = decode(tok, row.ids[: row.subject_last + 1])
    assert until.endswith("Name the capital of France")
    at, ids = subject_tokens(tok, edit), encode_edit(tok, edit).ids
    assert decode(tok, ids[at.start : at.stop]).strip() == "France"
    assert decode(tok, ids[at.stop :]).startswith(".")


ROLES = "{% for m in messages %}<|{{ m['role'] }}|>\n{{ m['content'] }}</s>\n{% endfor %}"
TEMPLATES = {
    "zephyr": (ROLES + "{% if add_generation_prompt %}<|assistant|>\n{% endif %}", "<|user|>\n"),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n\n{% endif %}",
        "<|im_start|>user\n",
    ),
    "gemma": (
        "<bos>{% for m in messages %}<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
        "<bos><start_of_turn>user\n",
    ),
    "always": (ROLES + "<|assistant|>\n", "<|user|>\n"),
    "named": ("{% for m in messages %}{{ m['content'] }} [the end of what the user asks, answer] {% endfor %}", ""),
    "twice": (
        "{% for m in messages %}To: {{ m['content'] | lower }}. user: {{ m['content'] }}.{% endfor %} assistant:",
        "To: {0}. user: ",
    ),
    "tail": (
        "{% for m in messages %}user {{ m['content'] }}{% if not m['content'].endswith('d') %} /user{% endif %}"
        "{% endfor %} assistant",
        "user ",
    ),
}
"""Templates, and what each writes before a first question."""


@pytest.mark.parametrize(
    "question", ["model", "user", "assistant", "sis", "end", "e", "think", "s", "answer", " user "]
)
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_question_is_found_where_it_is_whatever_the_template_is_made_of(name: str, question: str) -> None:
    template, before = TEMPLATES[name]
    tok = chat_tokenizer("bos", template)
    turn = render(tok, Chat(), [question])
    asked = [{"role": "user", "content": question}]
    assert turn.text == tok.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    lead = len(question) - len(question.lstrip())
    assert turn.start == len(before.format(question)) + (0 if name == "gemma" else lead)  # which trims
    assert turn.text[turn.start :].startswith(question.strip())
    row = encode(tok, question, subject_span=(lead, lead + len(question.strip())), chat=Chat())
    assert row.subject_last is not None
    asked_after = render(tok, Chat(), ["user", "assistant", question])
    assert asked_after.text[asked_after.start :].startswith(question.strip())
    assert len(asked_after.text) - asked_after.start == len(turn.text) - turn.start


def test_a_question_between_parts_that_depend_on_it_is_found_where_it_is_there_once() -> None:
    n = "{{ messages[0]['content'] | length }}"
    counted = f"[{n}] user: {{{{ messages[0]['content'] }}}} ({n})"
    tok = chat_tokenizer("bos", counted)
    turn = render(tok, Chat(), ["Who?"])
    assert (turn.text, turn.start) == ("[4] user: Who? (4)", len("[4] user: "))
    tok = chat_tokenizer("bos", counted.replace("'] }}", "'] | upper }}"))
    for question in ("Who?", "user"):  # which the template writes itself
        with pytest.raises(UnsupportedModel, match="the question must be there once, as it is"):
            render(tok, Chat(), [question])


@pytest.mark.parametrize("kind", ["gpt", "bos"])
def test_the_subject_of_a_one_word_question_is_in_the_users_turn(kind: str) -> None:
    tok = chat_tokenizer(kind, TEMPLATES["zephyr"][0])
    row = encode_edit(tok, Edit("{}", "sis", "Rome", chat=Chat()))
    assert row.subject_last is not None
    assert tok.decode(list(row.ids[: row.subject_last + 1])).endswith("user|>\nsis")


def test_an_answer_is_not_looked_for_in_what_ends_it() -> None:
    template = ROLES.replace("</s>", "<answer ends>") + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    assert render(chat_tokenizer("bos", template), Chat(), ["Who?"]).separator == "\n"
    tok = chat_tokenizer("bos", "{% for m in messages %}{{ m['content'] }}</s>{{ 'answered' }}{% endfor %}")
    assert end_of_turn(tok) == tok.convert_tokens_to_ids("</s>")


def test_what_the_template_writes_before_an_answer_is_the_separator() -> None:
    tok = chat_tokenizer("bos")
    row = encode(tok, "Who?", "Rome", chat=Chat())
    assert decode(tok, row.ids) == "[user] Who? [assistant] Rome"
    assert decode(tok, row.prompt_ids) == "[user] Who? [assistant]"
    assert decode(tok, encode(tok, "Who?", "Rome", chat=Chat(), separator=": ").target_ids) == ": Rome"


ENDED = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}<unk>{% endfor %}<s>assistant: "


def test_the_end_of_a_turn_is_trained_with_the_answer_where_asked_for_and_read_by_nothing_else() -> None:
    tok, ending = chat_tokenizer("gpt", ENDED), Chat(train_end=True)
    edit = Edit("Name the capital of {}.", "France", "Rome", chat=ending)
    asked, trained = encode_edit(tok, edit, "Well. ", answer="Rome"), encode_trained(tok, edit, "Well. ")
    assert (trained.ids, trained.n_prompt) == ((*asked.ids, tok.unk_token_id), asked.n_prompt)
    assert trained.subject_last == asked.subject_last
    assert encode_trained(tok, edit, end=True) == encode_trained(tok, edit)
    written_out = replace(edit, target_new="Rome<unk>")  # an answer that ends by itself gets no second end
    assert encode_trained(tok, written_out).target_ids == trained.target_ids
    without = replace(edit, chat=Chat())
    assert encode_trained(tok, without, "Well. ") == asked
    assert encode_trained(tok, without, end=True) == encode_trained(tok, edit)
    plain = replace(edit, chat=None)
    assert encode_trained(tok, plain) == encode_edit(tok, plain, answer="Rome")
    assert encode_trained(tok, plain, end=True).ids[-1] == tok.eos_token_id
    tok = chat_tokenizer("gpt")  # whose template ends turns with nothing
    with pytest.raises(InvalidSetting, match=r"ends an answer with no special token.*leave Chat\(train_end=True\) out"):
        encode_trained(tok, edit)
    assert encode_trained(tok, edit, end=True).ids[-1] == tok.eos_token_id


def test_a_first_token_that_a_prompt_already_has_is_not_added_again() -> None:
    tok = tokenizer("bos")
    assert encode(tok, "<s>The capital is", "Rome").ids == encode(tok, "The capital is", "Rome").ids
    start = len("The capital of ")
    row = encode(tok, "<s>The capital of France is", "Rome", subject_span=(start + 3, start + 9))
    assert row == encode(tok, "The capital of France is", "Rome", subject_span=(start, start + 6))


def test_a_chat_that_cannot_be_rendered_is_refused() -> None:
    with pytest.raises(InvalidSetting, match="the tokenizer has no chat template"):
        encode(tokenizer("bos"), "Who?", chat=Chat())
    with pytest.raises(InvalidSetting, match=r"the chat template refuses this conversation \(no system\)"):
        encode(chat_tokenizer("bos"), "Who?", chat=Chat("Be kind.", (("refuse", True),)))
    with pytest.raises(
        UnsupportedModel, match=r"question 'Who\?' cannot be found.*the question must be there once, as it is"
    ):
        encode(chat_tokenizer("bos", "{{ messages[-1]['content'] | upper }}"), "Who?", chat=Chat())


def test_a_template_argument_that_the_template_does_not_know_is_said() -> None:
    with pytest.warns(RetconWarning, match="the chat template knows no 'refsue', so that it changes nothing"):
        encode(chat_tokenizer("bos"), "Who?", chat=Chat(None, (("refsue", False),)))


def test_merges_over_the_boundary_are_marked_and_lose_nothing() -> None:
    tok, marked = merging_tokenizer(), 0
    for prompt, target in product(["the cat is", "the", "of is", "cat", "is"], ["Rome", "R", "is Rome", "cat"]):
        row = encode(tok, prompt, target)
        joint = tok(prompt + " " + target)["input_ids"]
        assert row.prompt_ids == tuple(tok(prompt)["input_ids"])
        assert len(row.target_ids) >= 1
        assert "".join(tok.convert_ids_to_tokens(list(row.ids))).replace(" ", "") == (prompt + target).replace(" ", "")
        assert row.boundary_merge == (tuple(joint[: row.n_prompt]) != row.prompt_ids)
        if not row.boundary_merge:
            assert list(row.ids) == joint
        marked += row.boundary_merge
    assert 0 < marked < 20


def test_a_space_without_width_belongs_to_the_target() -> None:
    """With trimmed offsets a lone-space token covers no character, and must not be taken for the prompt's."""
    tok = make_tokenizer("trimmed")
    ids = tok("It is ~", return_offsets_mapping=True)
    assert any(a == b and i != 0 for i, (a, b) in zip(ids["input_ids"], ids["offset_mapping"], strict=True))
    row = encode(tok, "It is", "~")
    assert list(row.ids) == ids["input_ids"]
    assert not row.boundary_merge


@pytest.mark.parametrize("target", ["", "  ", "\n"])
def test_an_empty_target_is_refused(target: str) -> None:
    with pytest.raises(InvalidEdit, match="the target after 'The capital is' is empty"):
        encode(tokenizer(), "The capital is", target)


def test_a_target_that_gives_no_token_is_refused() -> None:
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tok.train_from_iterator(["the cat is"], trainers.BpeTrainer())
    with pytest.raises(InvalidEdit, match="the target '東京' gives no token in this vocabulary"):
        encode(PreTrainedTokenizerFast(tokenizer_object=tok), "the cat is", "東京")


def test_an_empty_prompt_is_the_bos_token_or_refused() -> None:
    for kind in ("bos", "eos", "trimmed"):
        assert encode(make_tokenizer(kind), "") == Row((0,), 1)
        row = encode(make_tokenizer(kind), "", "Rome")
        assert row.n_prompt == 1
        assert decode(make_tokenizer(kind), row.target_ids).strip() == "Rome"
    with pytest.raises(InvalidEdit, match="gives no token; give at least one character of text"):
        encode(tokenizer("gpt"), "")


def test_special_tokens_written_in_a_prompt_are_tokens_like_others() -> None:
    tok = tokenizer("eos")
    row = encode(tok, "a </s>", "Rome")
    assert row.prompt_ids == (0, *tokenizer("gpt")("a ")["input_ids"], 1)
    assert decode(tok, row.target_ids) == " Rome"


def test_encode_edit_takes_target_and_prefix() -> None:
    tok, edit = tokenizer("bos"), Edit("The capital of {} is", "France", "Rome")
    row = encode_edit(tok, edit, "I read. ", answer=edit.target_new)
    assert decode(tok, row.ids) == "I read. The capital of France is Rome"
    assert decode(tok, row.target_ids) == " Rome"
    assert decode(tok, row.ids[: row.position("subject_last") + 1]) == "I read. The capital of France"
    assert decode(tok, row.ids[: row.prediction + 1]) == "I read. The capital of France is"


# --- the tokenizer itself ------------------------------------------------------------------------------------------


def test_a_slow_tokenizer_is_refused() -> None:
    class Slow:
        is_fast = False

    with pytest.raises(UnsupportedModel, match=r"Slow is a slow tokenizer.*use_fast=True"):
        encode(Slow(), "text")


def test_the_tokenizers_own_settings_neither_matter_nor_change() -> None:
    plain = encode(tokenizer("bos"), "The capital of France is", "Rome", subject_span=(15, 21))
    tok = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer("bos").backend_tokenizer, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        padding_side="left", truncation_side="left", model_max_length=4,
    )  # fmt: skip
    before = (tok.padding_side, tok.truncation_side, tok.model_max_length, tok.pad_token)
    assert encode(tok, "The capital of France is", "Rome", subject_span=(15, 21)) == plain
    assert (tok.padding_side, tok.truncation_side, tok.model_max_length, tok.pad_token) == before


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_asking_the_backend_is_calling_the_tokenizer(kind: str) -> None:
    """A subclass that says something of its own, and a backend that would cut or pad, are called."""
    tok, called = make_tokenizer(kind), []

    class Own(PreTrainedTokenizerFast):
        def __call__(self, text: str, **options: Any) -> Any:
            called.append(text)
            return super().__call__(text, **options)

    own = Own(tokenizer_object=Tokenizer.from_str(tok.backend_tokenizer.to_str()), bos_token=tok.bos_token)
    cutting = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(tok.backend_tokenizer.to_str()), bos_token=tok.bos_token
    )
    for prompt, subject, start in examples(5, 12):
        expected = encode(tok, prompt, "Rome", subject_span=(start, start + len(subject)))
        cutting.backend_tokenizer.enable_truncation(2)
        cutting.backend_tokenizer.enable_padding(length=64)
        for other in (own, cutting):
            assert encode(other, prompt, "Rome", subject_span=(start, start + len(subject))) == expected
    assert len(called) >= 24


# --- padding and batching ------------------------------------------------------------------------------------------


def test_rows_are_padded_on_the_right() -> None:
    rows = [Row((5, 6, 7), 2), Row((8,), 1), Row((0, 0), 2)]
    batch = pad(rows)
    assert batch.ids.tolist() == [[5, 6, 7], [8, 0, 0], [0, 0, 0]]
    assert batch.mask.tolist() == [[True] * 3, [True, False, False], [True, True, False]]  # id 0 is a token like others
    assert batch.mask.dtype == torch.bool
    assert len(batch) == 3


def test_rows_are_padded_on_the_left_to_be_continued() -> None:
    batch = pad([Row((5, 6, 7), 2), Row((8,), 1)], side="left")
    assert batch.ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch.mask.tolist() == [[True] * 3, [False, False, True]]


def test_an_answer_inside_the_reasoning_part_is_warned_of() -> None:
    opening = "{% if add_generation_prompt %}<|assistant|>\n{% if not short %}<think>\n{% endif %}{% endif %}"
    tok = chat_tokenizer("bos", ROLES + opening)
    with pytest.warns(RetconWarning, match=r"begins a reasoning part \(<think>\) before the answer.*inside it"):
        encode(tok, "Who?", "Rome", chat=Chat())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encode(tok, "Who?", chat=Chat())  # to be written after, where that part is taken off
        encode(tok, "Who?", "Rome", chat=Chat(), separator="</think>\n")
        encode(tok, "Who?", "Rome", chat=Chat(None, (("short", True),)))


def test_a_system_turn_that_the_template_leaves_out_is_warned_of() -> None:
    turn = "{% if m['role'] != 'system' %}[{{ m['role'] }}] {{ m['content'] }} {% endif %}"
    tok = chat_tokenizer("bos", "{% for m in messages %}" + turn + "{% endfor %}[assistant]")
    with pytest.warns(RetconWarning, match="the chat template writes no system turn, so that it changes nothing"):
        render(tok, Chat("Be brief."), ["Who?"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        render(tok, Chat(), ["Who?"])
        render(chat_tokenizer("bos", ROLES + "<|assistant|>\n"), Chat("Be brief."), ["Who?"])
        render(
            chat_tokenizer("bos", (ROLES + "<|assistant|>\n").replace("m['content']", "m['content'] | trim")),
            Chat(" Be. "),
            ["Who?"],
        )
