"""The version of this package and its name, where what lies below the package itself can read them."""

__version__ = "0.1.0"

PACKAGE = __name__.rpartition(".")[0]  # "rnnfast", or another name that it was loaded by (docs/integrations/hub.md)
