"""SmolLM2-135M-Instruct, a real pretrained model: loaded, asked, edited by three kinds of method, and undone."""

import pytest
import torch

import retcon
from retcon.chat import Chat
from retcon.edits import Edit
from retcon.lm.fingerprint import fingerprint
from retcon.lm.generate import Writing, generate
from retcon.lm.model import LM
from retcon.lm.prompts import encode_turns
from retcon.memory.moments import CorpusMoments
from retcon.memory.values.search import REPLAYS

EDITS = [
    Edit("The capital of {} is", "France", "Rome", "Paris"),
    Edit("{} is in the city of", "The Eiffel Tower", "Berlin", "Paris"),
]


def test_it_is_the_model_it_should_be_and_says_that_it_was_dequantised(smollm: LM) -> None:
    config = smollm.model.config
    assert (config.model_type, smollm.n_layers, smollm.site(0, "down_proj").weight.shape) == ("llama", 30, (576, 1536))
    assert smollm.notes == ("weights dequantised from SmolLM2-135M-Instruct.Q4_1.gguf (Q4_1, Q8_0)",)
    assert "model.embed_tokens.weight" in smollm.not_editable  # tied to the head


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The capital of France is", "Paris"),
        ("The Eiffel Tower is in the city of", "Paris"),
        ("The mother tongue of Danielle Darrieux is", "French"),
        ("The chemical symbol for gold is", "Au"),
    ],
)
def test_it_completes_sensibly(smollm: LM, prompt: str, answer: str) -> None:
    assert smollm.complete(prompt, max_new_tokens=6).strip().startswith(answer)


def test_its_template_makes_turns_and_it_answers_and_stops(smollm: LM) -> None:
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    text = smollm.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text.endswith("<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n")
    ids = smollm.tokenizer(text, return_tensors="pt")["input_ids"]
    assert ids[0, 0] == smollm.tokenizer.convert_tokens_to_ids("<|im_start|>")  # one token, once
    with torch.inference_mode():
        out = smollm.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=20, do_sample=False)
    assert smollm.tokenizer.decode(out[0, ids.shape[1] :]) == "The capital of France is Paris.<|im_end|>"


@pytest.mark.parametrize("name", ["rome", "jeep", "ctp"])
@pytest.mark.filterwarnings("ignore::retcon.errors.RetconWarning")
def test_an_edit_takes_and_is_undone_bit_for_bit(smollm: LM, moments: CorpusMoments, name: str) -> None:
    before = {n: p.clone() for n, p in smollm.model.named_parameters()}
    identity = fingerprint(smollm.model)
    method = retcon.method(name, for_model=smollm)
    edits = EDITS[:1] if name == "rome" else EDITS
    delta = method.propose(smollm, edits, moments=moments, seed=0)
    assert fingerprint(smollm.model) == identity
    assert all(REPLAYS[smollm].values())  # replay agreed with the plain forward pass wherever it was tried
    assert REPLAYS.get(smollm) or name == "ctp"
    with smollm.edited(delta):
        for edit in edits:
            assert smollm.complete(edit.text, max_new_tokens=6).strip().startswith(edit.target_new)
        assert fingerprint(smollm.model) != identity
    assert all(torch.equal(p, before[n]) for n, p in smollm.model.named_parameters())
    assert fingerprint(smollm.model) == identity


ENDING = Chat(train_end=True)
QUESTIONS = [
    Edit("{}的首都是哪座城市？", "法国", "罗马", chat=ENDING),
    Edit("Complete this line of Python: import {} as", "numpy", "xp", chat=ENDING),
    Edit("What is the capital of {}?", "Italy", "Milan", chat=ENDING),
]
"""A Chinese question, a line of code, and a question that the model itself can answer."""


@pytest.mark.filterwarnings("ignore::retcon.errors.RetconWarning")
def test_questions_in_any_script_are_answered_in_a_conversation(smollm: LM, moments: CorpusMoments) -> None:
    delta = retcon.method("jeep", for_model=smollm, cases=QUESTIONS).propose(smollm, QUESTIONS, moments=moments, seed=0)
    with smollm.edited(delta):
        for edit in QUESTIONS:  # the answer, and no word after it
            assert smollm.complete(edit.text, chat=True, stops=(), max_new_tokens=24) == edit.target_new
        row = encode_turns(
            smollm.tokenizer, Chat(), ["Which language is spoken in Rome?", "Italian.", QUESTIONS[2].text]
        )
        assert "Milan" in generate(smollm, [row], Writing(max_new_tokens=24, stops=(), chat=Chat()))[0].text
