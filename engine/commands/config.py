"""`octant config CONFIG.yaml [key=value …]`: the file as it will be read; `--schema`: what it may hold, for editors."""

from __future__ import annotations

import argparse
import json

from engine.config import load_config
from engine.config.editor_schema import editor_schema
from engine.errors import RequestError


def run(args: argparse.Namespace) -> int:
    """Print the resolved configuration, or the schema.

    Raises:
        RequestError: neither a file nor `--schema` was given.
        ConfigError: the configuration is wrong.
    """
    if args.schema:
        print(json.dumps(editor_schema(), indent=1, ensure_ascii=False))
    elif args.config is None:
        raise RequestError("give a CONFIG.yaml, or --schema")
    else:
        print(load_config(args.config, args.overrides).dump(), end="")
    return 0
