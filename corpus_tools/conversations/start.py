"""The conversation files of a run, in tokens before it starts: made once, kept by their content.

They lie in `data` of the run's folder, or where `data.cache` says.  Their names end in a hash of the files' content,
the tokenizer, the template and the options, so that a file that has changed is made anew and nothing stale is used.
A source that is a prefix of conversations already (`octant prepare --chat`) is left as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from corpus_tools.conversations.formats import require_columns
from corpus_tools.conversations.prepare import Plan, Wanted, content_of, prepare_chats
from corpus_tools.inputs import expand_inputs
from engine.config import Config, SourceConfig
from engine.data.indexed import idx_path
from engine.data.sidecar import Sidecar
from engine.errors import ConfigError
from engine.train.corpora import Corpora, is_of_text

HASH_CHARACTERS = 16


def open_corpora(config: Config, say: Callable[[str], None] = print) -> Corpora:
    """The corpora of a run, its conversations in tokens.

    Raises:
        DataError: as `Corpora.open`; a conversation cannot be used.
        ConfigError: a file is named twice with different columns.
    """
    return Corpora.open(config, prepared(config, say))


def prepared(config: Config, say: Callable[[str], None] = print) -> dict[str, str]:
    """By the path of every conversation file, the prefix where it lies in tokens; what is not there is made.

    Raises:
        DataError, RequestError, ConfigError: as of `open_corpora`.
    """
    prefixes: dict[str, str] = {}
    columns: dict[str, dict[str, str]] = {}
    for source in (*config.data.train, *config.data.valid):
        if is_of_text(source, config.run.objective) or idx_path(source.path).exists():
            continue
        if columns.setdefault(source.path, source.columns) != source.columns:
            raise ConfigError(f"{source.path} is named twice, with different columns")
        if source.path not in prefixes:
            prefixes[source.path] = str(_prepare(config, source, say))
    return prefixes


def _prepare(config: Config, source: SourceConfig, say: Callable[[str], None]) -> Path:
    data = config.data
    if data.tokenizer is None:
        raise ConfigError(f"{source.path} is made of conversations, which needs data.tokenizer")
    assert config.records is not None, "an objective that learns from text reads no conversations"
    require_columns(source.columns, source.path)
    files = tuple(expand_inputs([source.path]))
    wanted = Wanted(files, data.tokenizer, data.template, config.records, source.columns, data.on_error)
    plan = Plan.of(wanted, [content_of(file) for file in files])
    folder = Path(data.cache) if data.cache is not None else Path(config.run.dir) / "data"
    prefix = folder / f"{Path(source.path).name}-{plan.made_from[:HASH_CHARACTERS]}"
    new = not prefix.with_name(f"{prefix.name}.json").exists()
    sidecar = prepare_chats(plan, prefix, overwrite=True)
    if new:
        say(about(source.path, sidecar))
    return prefix


def about(path: str, sidecar: Sidecar) -> str:
    """What was made of the conversations at a path, in a line or more."""
    chat = sidecar.chat or {}
    line = (f"{path}: {sidecar.num_documents:,} {chat['kind']}, {sidecar.num_tokens:,} tokens, "
            f"{chat['learned'] / max(1, sidecar.num_tokens):.0%} of them learned (template {chat['template']})")
    if not chat["end_ids"]:
        line += ("; no answer ends in a special token of the tokenizer, so that generation would not know where to "
                 "stop: plain and alpaca end with its end of text")
    if chat["skipped"]:
        line += f"; {chat['skipped']:,} records were left out, such as:"
    return "\n  ".join([line, *chat["skipped_examples"]])
