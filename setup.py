"""Refuses a tree without its link to the kernels, which would install without them. All else is in pyproject.toml."""

import os

from setuptools import setup

if not os.path.isdir(os.path.join("rnnfast", "kernels")):
    raise SystemExit(
        "rnnfast/kernels should be a link to the folder kernels/, and this copy of the sources has no links (from a zip, or on "
        "Windows). Delete the file rnnfast/kernels and copy the folder kernels into rnnfast, or clone with "
        "`git clone -c core.symlinks=true`."
    )

setup()
