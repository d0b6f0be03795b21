"""The operations of `kernels/` under a name that cannot shadow Hugging Face's package of the same name."""

from pathlib import Path

__path__.append(str(Path(__file__).resolve().parents[2] / "kernels"))
