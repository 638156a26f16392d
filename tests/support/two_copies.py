"""A program that runs an installed rnnfast and a hub package of it side by side: ``python two_copies.py LOADER FOLDER``.

FOLDER is what `release.hub.build` wrote. LOADER is "kernels" for the library of that name, or "importlib" to load the package
as that library does. Prints the name of the hub package. Needs TRITON_INTERPRET=1.
"""

import importlib.util
import json
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType

import torch

import rnnfast


def load(loader: str, folder: Path) -> ModuleType:
    if loader == "kernels":
        from kernels import get_local_kernel

        return get_local_kernel(folder, backend="cpu")
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text(encoding="utf-8"))["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    assert spec is not None and spec.loader is not None
    package = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(package)
    return package


def results(package: ModuleType) -> list[torch.Tensor]:
    """Output and gradients of an LSTM and of a cell that is derived here, on the interpreted kernels."""
    torch.manual_seed(0)
    layers = [package.LSTM(5, 6, num_layers=2), package.Layer(package.cells.slstm, 5, 6)]
    x, found = torch.randn(3, 2, 5), []
    with package.use_backend("triton"):
        for layer in layers:
            y, _ = layer(x)
            y.square().sum().backward()
            found += [y.detach(), *(weight.grad for weight in layer.parameters())]
    return found


def torchs() -> list[torch.Tensor]:
    """What torch.nn gives in float64 for the first of these layers."""
    torch.manual_seed(0)
    layer = torch.nn.LSTM(5, 6, num_layers=2)
    rnnfast.Layer(rnnfast.cells.slstm, 5, 6)  # draws weights, as above
    x = torch.randn(3, 2, 5).double()
    y, _ = layer.double()(x)
    y.square().sum().backward()
    return [y.detach(), *(weight.grad for weight in layer.parameters() if weight.grad is not None)]


def main(loader: str, folder: str) -> None:
    hub = load(loader, Path(folder))
    theirs, installed, copied = torchs(), results(rnnfast), results(hub)
    for a, b in zip(installed, copied, strict=True):
        assert torch.equal(a, b), "the two copies differ"
    for a, b in zip(copied, theirs, strict=False):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max(), "not what torch.nn gives"

    model = torch.nn.Sequential(torch.nn.GRU(2, 3))
    hub.accelerate(model, report=None)
    assert isinstance(model[0], hub.GRU) and not isinstance(model[0], rnnfast.GRU)
    for package in (rnnfast, hub):
        forward = getattr(torch.ops, package.__name__).forward
        assert str(forward) == f"{package.__name__}.forward" and forward in package.FLOP_FORMULAS
        with warnings.catch_warnings(record=True) as caught, package.use_backend("triton"):
            warnings.simplefilter("always")
            package.LSTM(2, 2).double()(torch.zeros(1, 1, 2, dtype=torch.float64))
        assert [each.filename for each in caught] == [__file__], "a warning names the user's line"

    own = importlib.import_module(f"{hub.__name__}.choice.child").own
    told = subprocess.run(own("check", "--help"), check=True, capture_output=True, text=True).stdout
    assert "--cell" in told, "a child process runs a module of the hub package"
    print(hub.__name__)


if __name__ == "__main__":
    main(*sys.argv[1:])
