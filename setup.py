from setuptools import setup

setup(
    packages=["rnnfast", "rnnfast.kernels", "rnnfast.kernels.cells"],
    package_dir={"rnnfast": "rnnfast", "rnnfast.kernels": "kernels", "rnnfast.kernels.cells": "kernels/cells"},
)
