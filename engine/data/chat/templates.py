"""Templates by name, the tokenizer's own, and those in files.

A built-in template marks what the model says, so that what is learned is never guessed: an answer and what ends it.

    chatml   <|im_start|>user⏎…<|im_end|>⏎<|im_start|>assistant⏎[…<|im_end|>]⏎       (OpenAI; Qwen)
    llama2   <s>[INST] <<SYS>>⏎…⏎<</SYS>>⏎⏎… [/INST][ … </s>]                       (Touvron et al. 2023; texts trimmed)
    llama3   <|start_header_id|>user<|end_header_id|>⏎⏎…<|eot_id|>… [… <|eot_id|>]   (Meta's model card; texts trimmed)
    alpaca   Below is an instruction … ### Instruction:⏎…⏎⏎### Response:⏎[…</s>]⏎⏎   (Taori et al. 2023)
    plain    prompt and completion side by side, and the end of the text: […</s>]

`auto` is the template that the tokenizer brings: `chat_template.jinja`, or `chat_template` in its configuration.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from engine.data.chat.jinja import Template
from engine.data.tokenizer_base import Tokenizer
from engine.errors import DataError
from engine.reading import read_bytes, read_object

MOST_TEMPLATE_BYTES = 1 << 20
SUFFIX = ".jinja"

CHATML = """\
{% for message in messages %}
{{ '<|im_start|>' + message['role'] + '\\n' -}}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + '<|im_end|>' }}{% endgeneration %}
{% else %}
{{ message['content'] + '<|im_end|>' -}}
{% endif %}
{{ '\\n' -}}
{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA2 = """\
{% set ns = namespace(system='') %}
{% for message in messages %}
{% if message['role'] == 'system' %}
{% set ns.system = '<<SYS>>\\n' + message['content'] + '\\n<</SYS>>\\n\\n' %}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ ' ' + message['content'] | trim + ' ' + eos_token }}{% endgeneration %}
{% elif message['role'] == 'user' %}
{{ bos_token + '[INST] ' + (ns.system + message['content']) | trim + ' [/INST]' -}}
{% set ns.system = '' %}
{% else %}
{{ raise_exception('it has no turns of ' + message['role']) -}}
{% endif %}
{% endfor %}
"""

LLAMA3 = """\
{{ bos_token -}}
{% for message in messages %}
{% set role = 'ipython' if message['role'] == 'tool' else message['role'] %}
{{ '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' -}}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}
{% else %}
{{ message['content'] | trim + '<|eot_id|>' -}}
{% endif %}
{% endfor %}
{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}
"""

ALPACA = """\
{{ bos_token -}}
{% if messages[0]['role'] == 'system' %}
{{ messages[0]['content'] + '\\n\\n' -}}
{% else %}
{{ 'Below is an instruction that describes a task. Write a response that appropriately completes the request.\\n\\n' -}}
{% endif %}
{% for message in messages %}
{% if message['role'] == 'user' %}
{{ '### Instruction:\\n' + message['content'] + '\\n\\n### Response:\\n' -}}
{% elif message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{{ '\\n\\n' if not loop.last else '' -}}
{% elif message['role'] == 'tool' %}
{{ raise_exception('it has no turns of tool') -}}
{% endif %}
{% endfor %}
"""

PLAIN = """\
{% for message in messages %}
{% if message['role'] == 'assistant' %}
{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}
{% else %}
{{ message['content'] -}}
{% endif %}
{% endfor %}
"""

BUILT_IN: Mapping[str, str] = MappingProxyType(
    {"chatml": CHATML, "llama2": LLAMA2, "llama3": LLAMA3, "alpaca": ALPACA, "plain": PLAIN})


def open_template(spec: str, tokenizer: Tokenizer) -> Template:
    """`auto`, a name of `BUILT_IN`, or the path of a .jinja file.

    Raises:
        DataError: there is none, or it is no template.
    """
    tokens = {key: tokenizer.special_text(number)
              for key, number in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eod_id))}
    if spec in BUILT_IN:
        return Template(spec, BUILT_IN[spec], tokens)
    folder = _folder_of(tokenizer)
    tokens |= {} if folder is None else _named_tokens(folder)
    if spec == "auto":
        name, source = _own(tokenizer, folder)
        return Template(name, source, tokens)
    if not spec.endswith(SUFFIX):
        raise DataError(f"data.template {spec}: there is auto, {', '.join(BUILT_IN)}, or a file that ends in {SUFFIX}")
    return Template(spec, _read(Path(spec)), tokens)


def _folder_of(tokenizer: Tokenizer) -> Path | None:
    path = getattr(tokenizer, "path", None)
    return None if path is None else Path(path).parent


def _own(tokenizer: Tokenizer, folder: Path | None) -> tuple[str, str]:
    """(name, source) of the template that a tokenizer brings."""
    if folder is not None and (folder / f"chat_template{SUFFIX}").exists():
        return str(folder / f"chat_template{SUFFIX}"), _read(folder / f"chat_template{SUFFIX}")
    found = None if folder is None else _configuration(folder).get("chat_template")
    if isinstance(found, list):                                  # several by name, as for use with tools
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    if not isinstance(found, str):
        raise DataError(f"data.template is auto, but the tokenizer {tokenizer.name} brings no template: choose one of "
                        f"{', '.join(BUILT_IN)}, or a {SUFFIX} file")
    return f"of {tokenizer.name}", found


def _named_tokens(folder: Path) -> dict[str, str]:
    """`bos_token`, `pad_token` … as the configuration of a tokenizer writes them."""
    tokens: dict[str, str] = {}
    for key, value in _configuration(folder).items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            tokens[key] = text
    return tokens


def _configuration(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_object(path, "the configuration of a tokenizer", DataError) if path.exists() else {}


def _read(path: Path) -> str:
    try:
        return read_bytes(path, MOST_TEMPLATE_BYTES).decode()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise DataError(f"chat template {path} cannot be read: {reason}") from None
