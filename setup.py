"""Build the compiled loops where there is a C compiler; without one the package works the same, only slower."""

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "fedspallm_appfl.tensors.native._kernels",
            ["src/fedspallm_appfl/tensors/native/kernels.c"],
            extra_compile_args=["-O3", "-ffp-contract=off"],
            optional=True,
        )
    ]
)
