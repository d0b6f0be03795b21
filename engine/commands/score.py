"""`octant score`: what a reward model says of conversations or comparisons."""

from __future__ import annotations

import argparse
from importlib import import_module

from corpus_tools.conversations.files import examples
from corpus_tools.inputs import expand_inputs
from corpus_tools.records import BadRecord
from engine.commands._layout import run_in_layout
from engine.data.chat.tokens import ChatEncoder
from engine.data.tokenizer import Tokenizer
from engine.distributed.environment import LaunchEnvironment
from engine.distributed.topology import Topology
from engine.errors import DataError
from engine.generate.request import ScoreRequest


def run(args: argparse.Namespace) -> int:
    """Refuse what can be seen at once; then score."""
    request = ScoreRequest(args.checkpoint, args.data, args.template, args.batch_size, args.tokenizer, args.json,
                           args.dtype, args.device, args.base)
    files = expand_inputs([args.data])

    def encode(tokenizer: Tokenizer, template: str) -> list[list[list[int]]]:
        encoder = ChatEncoder(tokenizer, template)
        records = []
        for file in files:
            for found in examples(file):
                if isinstance(found.value, BadRecord):
                    raise DataError(str(found.value))
                records.append([encoder.encode(turns, "last", found.value.tools).tokens.tolist()
                                for turns in found.value.alternatives])
        return records

    def on_this_rank(topology: Topology, launched: LaunchEnvironment | None) -> None:
        module = import_module("engine.generate.score")                                     # torch from here on
        module.score_texts(request, encode, topology, launched)

    return run_in_layout(args, on_this_rank)
