"""A model of the Hugging Face Hub as a folder: fetched once by `huggingface_hub`, where it is installed, to its cache.

Safetensors, configuration and tokenizer are fetched, no pickles and no other formats.  Where the network is
switched off (HF_HUB_OFFLINE) or absent, what the cache holds already is used.
"""

from __future__ import annotations

from pathlib import Path

from engine.errors import CheckpointError
from engine.instead import is_hub_name

WANTED = ["*.json", "*.safetensors", "tokenizer.model", "*.tiktoken", "*.jinja"]


def local_folder(source: str) -> Path:
    """The folder `source`, or that of the model of this name on the Hub.

    Raises:
        CheckpointError: it is a name, and the model cannot be fetched.
    """
    if not is_hub_name(source):
        return Path(source)
    try:
        import huggingface_hub  # optional package
    except ImportError:
        raise CheckpointError(f"{source}: no such folder, and models of the Hugging Face Hub are fetched with the "
                              "package huggingface_hub: pip install 'octant[hf]'") from None
    print(f"fetching {source} from the Hugging Face Hub", flush=True)
    try:
        return Path(huggingface_hub.snapshot_download(source, allow_patterns=WANTED))
    except Exception as error:                               # of the network, of access, of the name: a dozen classes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{source}: no such folder, and it cannot be fetched from the Hugging Face Hub: "
                              f"{reason:.300}") from None
