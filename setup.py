from setuptools import setup

setup(
    packages=["rnnfast", "rnnfast.kernels", "rnnfast.kernels.cells", "rnnfast.kernels.persistent"],
    package_dir={
        "rnnfast": "rnnfast",
        "rnnfast.kernels": "kernels",
        "rnnfast.kernels.cells": "kernels/cells",
        "rnnfast.kernels.persistent": "kernels/persistent",
    },
)
