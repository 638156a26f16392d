"""The version of rnnfast, where what lies below the package itself can read it."""

__version__ = "0.1.0"
