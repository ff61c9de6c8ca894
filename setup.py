"""Build the compiled loops where there is a C compiler; without one the package works the same, only slower."""

import re
from pathlib import Path

from setuptools import Extension, setup

README = (Path(__file__).parent / "README.md").read_text("utf-8")

setup(
    # A package index has no files beside the page, so that relative links become their text, which names the file.
    long_description=re.sub(r"!?\[([^\]]+)\]\((?!https?:)[^)]+\)", r"\1", README),
    long_description_content_type="text/markdown",
    ext_modules=[
        Extension(
            "fedspallm_appfl.tensors.native._kernels",
            ["src/fedspallm_appfl/tensors/native/kernels.c"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ],
)
