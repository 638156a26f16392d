"""The kernel hub of Hugging Face: their library loads what ``make hub`` lays out, beside an installed rnnfast."""

import os
import re
import subprocess
import sys
from pathlib import Path

from support.packages import needs

from release import hub

needs("kernels")

ROOT = Path(__file__).resolve().parents[2]
DIGESTS = """
import sys
from kernels._rust import Digest, DigestAlgorithm, Metadata
metadata = Metadata.read_from_file(f"{sys.argv[1]}/metadata.json")
metadata.digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, sys.argv[1]))
"""


def test_loads_beside_an_installed_rnnfast(tmp_path):
    """tests/support/two_copies.py says what is compared. The digests of the files are those that the library computes."""
    folders = hub.build(tmp_path / "build" / "hub")
    (tmp_path / "rnnfast").symlink_to(ROOT / "rnnfast")  # a checkout itself has a folder with the name of the library, kernels/
    env = {name: value for name, value in os.environ.items() if not name.startswith("RNNFAST_")}
    env |= {"PYTHONPATH": str(tmp_path), "TRITON_INTERPRET": "1", "PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    for folder in folders:
        subprocess.run([sys.executable, "-c", DIGESTS, str(folder)], check=True, cwd=tmp_path, env=env)
    command = [sys.executable, str(ROOT / "tests" / "support" / "two_copies.py"), "kernels", str(tmp_path / "build" / "hub")]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("_rnnfast_cpu_")

    page = (ROOT / "docs" / "integrations" / "hub.md").read_text(encoding="utf-8")
    (program,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    del env["TRITON_INTERPRET"], env["PYTHONPATH"]  # as its reader runs it, without an installed rnnfast
    subprocess.run([sys.executable, "-c", program], check=True, cwd=tmp_path, env=env)
