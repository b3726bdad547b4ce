"""What a tokenizer's identity depends on, and what it does not."""

from tokenizers import processors

from retcon.lm.tokenizer import chat_hash, tokenizer_hash
from tests.conftest import tokenizer


def test_every_rule_counts_and_is_noticed_when_it_changes() -> None:
    assert tokenizer_hash(tokenizer()) == tokenizer_hash(tokenizer())
    assert len({tokenizer_hash(tokenizer(kind)) for kind in ("gpt", "bos", "eos", "piece")}) == 4
    own = tokenizer()
    before = tokenizer_hash(own)
    own.backend_tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    assert tokenizer_hash(own) == tokenizer_hash(tokenizer("bos")) != before
    own = tokenizer()
    own.add_tokens(["a whole phrase"])
    assert tokenizer_hash(own) != before


def test_how_a_call_pads_does_not_count() -> None:
    own = tokenizer()
    before = tokenizer_hash(own), chat_hash(own)
    own.pad_token = own.eos_token
    own("Rome", padding="max_length", max_length=9, truncation=True)
    assert own.backend_tokenizer.padding is not None
    assert (tokenizer_hash(own), chat_hash(own)) == before
    other = tokenizer()
    other.pad_token = other.eos_token
    other("Rome", padding="max_length", max_length=9, truncation=True)
    assert (tokenizer_hash(other), chat_hash(other)) == before  # the first time, too
    assert other.backend_tokenizer.padding is not None


def test_a_chat_template_counts_for_conversations_alone() -> None:
    own = tokenizer()
    text, chat = tokenizer_hash(own), chat_hash(own)
    own.chat_template = "{{ messages }}"
    assert tokenizer_hash(own) == text
    assert chat_hash(own) != chat
    template = chat_hash(own)
    own.bos_token = "</s>"
    assert chat_hash(own) != template
