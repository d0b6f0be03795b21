"""Chat templates and loss masks: what is learned is read back out of the tokens, and is what was said."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from corpus_tools.conversations.formats import example_of
from corpus_tools.tokenizers.training import train_tokenizer
from engine.data.chat.conversation import Turn, problem_of
from engine.data.chat.jinja import Template
from engine.data.chat.spans import Renderer
from engine.data.chat.templates import BUILT_IN, open_template
from engine.data.chat.tokens import ChatEncoder, Text
from engine.data.tokenizer import HuggingFaceTokenizer, Tokenizer, load_tokenizer
from engine.errors import DataError
from tests.kit.chats import RECORDS, hf_tokenizer
from tests.kit.texts import chinese_texts, english_texts

# How published models write it, without marks: where answers are must be found.
QWEN = """\
{%- for message in messages %}
{%- if loop.first and messages[0]['role'] != 'system' %}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
LLAMA3 = """\
{%- for message in messages %}
{%- set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
                  + message['content'] | trim + '<|eot_id|>' %}
{%- if loop.index0 == 0 %}{%- set content = bos_token + content %}{% endif %}
{{- content }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
LLAMA2 = """\
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else none %}
{%- set said = messages if system is none else messages[1:] %}
{%- for message in said %}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}{{- raise_exception('roles must alternate') }}{% endif %}
{%- set content = message['content'] %}
{%- if loop.index0 == 0 and system is not none %}
{%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + content %}
{%- endif %}
{%- if message['role'] == 'user' %}
{{- bos_token + '[INST] ' + content.strip() + ' [/INST]' }}
{%- else %}
{{- ' '  + content.strip() + ' ' + eos_token }}
{%- endif %}
{%- endfor %}"""
THINKING = """\
{%- for message in messages %}
{%- set content = message.content %}
{%- if message.role == 'assistant' and '</think>' in content and not loop.last %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- elif message.role == 'assistant' and loop.last and '</think>' not in content %}
{%- set content = '<think>\\n\\n</think>\\n\\n' + content %}
{%- endif %}
{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
CALLING = """\
{%- for message in messages %}
{{- '<|im_start|>' + message.role + '\\n' + message.content }}
{%- for call in message.tool_calls or [] %}{{- '<call>' + (call.function | tojson) + '</call>' }}{% endfor %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}"""
OWN = {"qwen": QWEN, "llama3, unmarked": LLAMA3, "llama2, unmarked": LLAMA2}
# template: (what surrounds an answer in the learned text, whether answers are trimmed)
AROUND = {"chatml": ("", "<|im_end|>", False), "llama2": (" ", " </s>", True), "llama3": ("", "<|eot_id|>", True),
          "alpaca": ("", "</s>", False), "plain": ("", "</s>", False), "qwen": ("", "<|im_end|>", False),
          "llama3, unmarked": ("", "<|eot_id|>", True), "llama2, unmarked": (" ", " </s>", True)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return hf_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def encoder(folder: Path, template: str, tmp_path: Path) -> ChatEncoder:
    if template in BUILT_IN:
        return ChatEncoder(load_tokenizer(folder), template)
    path = tmp_path / "own.jinja"
    path.write_text(OWN.get(template, template), encoding="utf-8")
    return ChatEncoder(load_tokenizer(folder), str(path))


def decoded(tokenizer: Tokenizer, ids: np.ndarray) -> str:
    assert isinstance(tokenizer, HuggingFaceTokenizer)
    return tokenizer._tokenizer.decode(ids.tolist(), skip_special_tokens=False)


@pytest.mark.parametrize(("format", "template"), [*itertools.product(RECORDS, AROUND)])
def test_what_is_learned_is_what_the_assistant_said(format: str, template: str, folder: Path, tmp_path: Path) -> None:
    record, answers = RECORDS[format]
    chat = encoder(folder, template, tmp_path)
    before, behind, trims = AROUND[template]
    texts = [before + (answer.strip() if trims else answer) + behind for answer in answers]
    text = chat.encode(example_of(record).turns)
    assert decoded(chat.tokenizer, text.tokens[text.learned]) == "".join(texts)
    last = chat.encode(example_of(record).turns, "last")
    assert decoded(chat.tokenizer, last.tokens[last.learned]) == texts[-1]
    assert last.learned.tolist().index(True) == last.last_answer == text.last_answer
    prompt = decoded(chat.tokenizer, chat.prompt(example_of(record).prompt))
    assert prompt == decoded(chat.tokenizer, text.tokens[: text.last_answer]), "generation begins where learning does"


def test_an_answer_that_is_not_to_be_learned(folder: Path) -> None:
    chat = ChatEncoder(load_tokenizer(folder), "chatml")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "no", "weight": 0},
                {"role": "user", "content": "b"}, {"role": "assistant", "content": "yes", "weight": 1}]
    text = chat.encode(example_of({"messages": messages}).turns)
    assert decoded(chat.tokenizer, text.tokens[text.learned]) == "yes<|im_end|>"


def test_nothing_that_somebody_says_is_a_special_token(folder: Path, tmp_path: Path) -> None:
    turns = (Turn("user", "what does <|im_end|> do? </s>"), Turn("assistant", "<|im_end|> ends <|eot_id|>"))
    for template in AROUND:
        chat = encoder(folder, template, tmp_path)
        text = chat.encode(turns)
        specials = [number for number in text.tokens.tolist() if number in chat.tokenizer.specials.values()]
        clean = chat.encode((Turn("user", "what?"), Turn("assistant", "that")))
        wanted = [number for number in clean.tokens.tolist() if number in chat.tokenizer.specials.values()]
        assert specials == wanted, template
        assert "<|im_end|> ends <|eot_id|>" in decoded(chat.tokenizer, text.tokens[text.learned])
        asked = text.tokens[: text.last_answer]
        assert decoded(chat.tokenizer, chat.prompt(turns[:1])) == decoded(chat.tokenizer, asked)


@pytest.mark.parametrize("spec", ["bytes", "sentencepiece"])
@pytest.mark.parametrize("template", BUILT_IN)
def test_other_tokenizers(spec: str, template: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    tokenizer = load_tokenizer("bytes") if spec == "bytes" else load_tokenizer(sentencepiece_model(tmp_path_factory))
    chat = ChatEncoder(tokenizer, template)
    turns = (Turn("user", "你好 </s>"), Turn("assistant", "很好 😀 <|endoftext|>"),
             Turn("user", "b"), Turn("assistant", "c"))
    text = chat.encode(turns)
    heard = "".join(tokenizer.decode(part.tolist()).strip() for part in runs(text))
    end = {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}.get(template, "")
    assert heard.replace(" ", "") == f"很好😀<|endoftext|>{end}c{end}"
    if not end:
        assert [part[-1] for part in runs(text)] == [tokenizer.eod_id] * 2


def runs(text: Text) -> list[np.ndarray]:
    """The learned tokens, one array for every stretch of them."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], text.learned.astype(int), [0]])))
    return [text.tokens[a:b] for a, b in zip(edges[::2], edges[1::2], strict=True)]


def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sp")
    return train_tokenizer([*english_texts(4), *chinese_texts(20)], 900, folder / "tok")


@pytest.mark.parametrize("template", BUILT_IN)
def test_marks_are_those_of_transformers(template: str, folder: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    chat = ChatEncoder(load_tokenizer(folder), template)
    odd = [{"role": "user", "content": " \n x "}, {"role": "assistant", "content": "\n\n y  \n"},
           {"role": "user", "content": "é"}, {"role": "assistant", "content": "的😀"}]
    for record in [*(record for record, _ in RECORDS.values()), {"messages": odd}]:
        turns = example_of(record).turns
        want = theirs.apply_chat_template([turn.message() for turn in turns], chat_template=BUILT_IN[template],
                                          return_assistant_tokens_mask=True, return_dict=True)
        text = chat.encode(turns)
        assert text.tokens.tolist() == want["input_ids"]
        assert text.learned.astype(int).tolist() == want["assistant_masks"]


@pytest.mark.parametrize("template", OWN)
def test_unmarked_templates_give_the_ids_of_transformers(template: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    folder = hf_tokenizer(tmp_path, OWN[template])
    theirs, chat = transformers.AutoTokenizer.from_pretrained(folder), ChatEncoder(load_tokenizer(folder), "auto")
    for record, _ in RECORDS.values():
        turns = example_of(record).turns
        messages = [turn.message() for turn in turns]
        assert chat.encode(turns).tokens.tolist() == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
        asked = theirs.apply_chat_template(messages[:-1], add_generation_prompt=True, return_dict=True)["input_ids"]
        assert chat.prompt(turns[:-1]).tolist() == asked


PARTS = st.sampled_from([*"ab 好😀é\n\t.#:", "</s>", "<|im_end|>", "[/INST]", "<s>"])
ANY_TEXT = st.lists(PARTS, max_size=6).map("".join)
ANY_ANSWER = ANY_TEXT.filter(str.strip)


@pytest.mark.parametrize("template", BUILT_IN)
def test_answers_are_found_where_they_are_marked(template: str, folder: Path) -> None:
    """A built-in template and the same without its marks: what was searched for is what was marked."""
    tokenizer = load_tokenizer(folder)
    marked = open_template(template, tokenizer)
    source = marked.source.replace("generation %}", "if %}").replace("{% if %}", "{% if true %}")
    renderers = Renderer(marked, tokenizer), Renderer(Template(template, source, marked.tokens), tokenizer)
    assert not renderers[1].template.marks

    @settings(max_examples=150, deadline=None)
    @given(system=ANY_TEXT, said=st.lists(st.tuples(ANY_TEXT, ANY_ANSWER), min_size=1, max_size=3))
    def compare(system: str, said: list[tuple[str, str]]) -> None:
        if template == "plain":                    # writes nothing between: blanks alone are not told apart
            said = [(asked if asked.strip() else "q", answer) for asked, answer in said]
        turns = [Turn("system", system), *(turn for asked, answer in said
                                           for turn in (Turn("user", asked), Turn("assistant", answer)))]
        want, got = (renderer.render(tuple(turns)) for renderer in renderers)
        assert (got.text, got.answers) == (want.text, want.answers)

    compare()


def test_thoughts_are_learned_where_they_are_written(folder: Path, tmp_path: Path) -> None:
    chat = encoder(folder, THINKING, tmp_path)
    turns = (Turn("user", "a"), Turn("assistant", "<think>\nhm\n</think>\n\nfirst"), Turn("user", "b"),
             Turn("assistant", "second"))
    text = chat.encode(turns)
    assert decoded(chat.tokenizer, text.tokens[text.learned]) == \
        "first<|im_end|><think>\n\n</think>\n\nsecond<|im_end|>"


def test_calls_of_tools_are_learned(folder: Path, tmp_path: Path) -> None:
    chat = encoder(folder, CALLING, tmp_path)
    called = [{"from": "human", "value": "weather?"},
              {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "北京", "days": 3}}'},
              {"from": "observation", "value": "sunny"}, {"from": "gpt", "value": "It is sunny."}]
    text = chat.encode(example_of({"conversations": called}).turns)
    assert decoded(chat.tokenizer, text.tokens[text.learned]) == \
        '<call>{"name": "weather", "arguments": {"city": "北京", "days": 3}}</call><|im_end|>It is sunny.<|im_end|>'


def test_a_token_across_the_edge_is_learned(folder: Path) -> None:
    """The blank before and the first word are one token here: who says the word says both."""
    chat = ChatEncoder(load_tokenizer(folder), "plain")
    text = chat.encode((Turn("user", "the value is"), Turn("assistant", " self")))
    assert decoded(chat.tokenizer, text.tokens[text.learned]) == " self</s>"
    inside = chat.encode((Turn("user", "the value is "), Turn("assistant", "self")))
    assert decoded(chat.tokenizer, inside.tokens[inside.learned]) == " self</s>"


@pytest.mark.parametrize(("template", "problem"), [
    ("{% for m in messages %}", "endfor"),
    ("{{ raise_exception('never') }}", "never"),
    ("{{ messages.__class__.__mro__ }}", "unsafe|attribute"),
    ("{% for m in messages %}{{ m.content.foo.bar }}{% endfor %}", "undefined|no attribute"),
    ("{% for m in messages %}{{ m.content | length }} {% endfor %}", "differently"),
    ("{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}", "leaves out an answer"),
    ("{% generation %}a{% endgeneration %}{% generation %}b{% endgeneration %}", "marks 2 answers of 1"),
    ("{% for i in range(10 ** 9) %}x{% endfor %}", "[Rr]ange"),
])
def test_templates_that_fail(template: str, problem: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=problem):
        encoder(folder, template, tmp_path).encode((Turn("user", "ab"), Turn("assistant", "c")))


def test_where_templates_come_from(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="brings no template: choose one of chatml"):
        ChatEncoder(load_tokenizer(folder), "auto")
    with pytest.raises(DataError, match=r"there is auto, chatml.*\.jinja"):
        ChatEncoder(load_tokenizer(folder), "vicuna")
    with pytest.raises(DataError, match=r"gone\.jinja cannot be read: No such file"):
        ChatEncoder(load_tokenizer(folder), str(tmp_path / "gone.jinja"))
    beside = hf_tokenizer(tmp_path / "beside", template="not this one")
    (beside / "chat_template.jinja").write_text(QWEN)
    assert ChatEncoder(load_tokenizer(beside), "auto").renderer.template.source == QWEN
    named = hf_tokenizer(tmp_path / "named")
    (named / "tokenizer_config.json").write_text(
        '{"eos_token": "</s>", "chat_template": [{"name": "tool_use", "template": "x"}, '
        '{"name": "default", "template": "y"}]}')
    assert ChatEncoder(load_tokenizer(named), "auto").renderer.template.source == "y"


def test_roles_in_order() -> None:
    def said(*roles: str) -> str | None:
        return problem_of(tuple(Turn(role, "x") for role in roles))

    assert said("user", "assistant") is said("system", "user", "assistant", "tool", "tool", "assistant") is None
    for roles, problem in ((("assistant",), "at the beginning"), (("user", "user", "assistant"), "after that of user"),
                           (("user", "assistant", "assistant"), "after that of assistant"),
                           (("user", "system", "assistant"), "after that of user"), (("user",), "no answer"),
                           (("user", "assistant", "user"), "no answer"), ((), "no turns"),
                           (("tool", "assistant"), "tool")):
        assert problem in (said(*roles) or ""), roles
    assert "empty" in (problem_of((Turn("user", "x"), Turn("assistant", " \n"))) or "")
    assert problem_of((Turn("user", ""), Turn("assistant", "", extra={"tool_calls": [{}]}))) is None


def test_namespaces_keep_python_out() -> None:
    with pytest.raises(DataError, match="namespace has no"):
        Template("x", "{% set ns = namespace(_x=1) %}", {}).render([])
    assert Template("x", "{% set ns = namespace(self=1) %}{{ ns.self }}{{ dict(a=1) | tojson }}", {}).render([])[0] == \
        '1{"a": 1}'
