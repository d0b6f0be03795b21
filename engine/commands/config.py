"""`octant config CONFIG.yaml [key=value …]`: the file as it will be read; `--schema`: what it may hold, for editors.

`--scripts`: where the batch scripts are, in a clone or in an installed package.
"""

from __future__ import annotations

import argparse
import json

from engine.config import config_names, load_config
from engine.config.editor_schema import editor_schema
from engine.errors import RequestError
from engine.shipped import shipped


def run(args: argparse.Namespace) -> int:
    """Print the resolved configuration, the schema or the folder.

    Raises:
        RequestError: none of the three was asked for.
        ConfigError: the configuration is wrong.
    """
    if args.schema:
        print(json.dumps(editor_schema(), indent=1, ensure_ascii=False))
    elif args.scripts:
        print(shipped("launch"))
    elif args.config is None:
        raise RequestError(f"give a CONFIG.yaml, one that comes with Octant ({', '.join(config_names())}), or --schema")
    else:
        print(load_config(args.config, args.overrides).dump(), end="")
    return 0
