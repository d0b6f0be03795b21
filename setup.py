"""Where the wheel's packages lie; everything else about the distribution is in pyproject.toml.

Three folders of the clone's root are installed inside `engine`: `kernels/`, as a top-level name, would shadow Hugging
Face's package, and `configs/` and `launch/` are names that belong to nobody.
"""

from setuptools import find_packages, setup

INSIDE = ("kernels", "kernels.triton", "configs", "launch")
PACKAGES = find_packages(include=["engine*", "checkpoints_tools*", "corpus_tools*"])

setup(
    packages=sorted({*PACKAGES, *(f"engine.{name}" for name in INSIDE)}),
    package_dir={f"engine.{name}": name.replace(".", "/") for name in INSIDE},
    package_data={"": ["py.typed"], "engine.config": ["presets/*.yaml"], "engine.configs": ["*.yaml"],
                  "engine.launch": ["*.sh"], "corpus_tools.cleaning": ["rules.yaml"]},
)
