"""Says where the packages lie: ``kernels/`` installs as ``rnnfast.kernels``. All else is in pyproject.toml."""

from setuptools import find_packages, setup

setup(
    packages=[
        *find_packages(include=["rnnfast", "rnnfast.*"]),
        "rnnfast.kernels",
        *(f"rnnfast.kernels.{name}" for name in find_packages("kernels")),
    ],
    package_dir={"rnnfast.kernels": "kernels"},
)
