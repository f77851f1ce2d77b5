"""What somebody does first who has installed the wheel, and nothing else: run with the Python of that environment.

    python tests/fresh.py [--numpy]      from any folder but the checkout

Checks that the package is the installed one, what the wheel says of itself, that only torch is needed (`--numpy`: NumPy
is there as well), the README's first snippet, and the command line.
"""

import argparse
import subprocess
import sys
import tempfile
import warnings
from importlib import metadata
from pathlib import Path

README = Path(__file__).resolve().parents[1] / "README.md"
STAND_INS = """
import torch
from torch import nn
model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
batches, rank = [torch.randn(7, 3) for _ in range(3)], 0
def evaluate(model): return model(batches[0]).sum()
"""


def main() -> None:
    """Print a line for each thing that holds; end with an error at the first that does not."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--numpy", action="store_true", help="NumPy is installed")
    has_numpy = parser.parse_args().numpy
    warnings.filterwarnings("ignore", "Failed to initialize NumPy")  # torch's own, where it is not there
    installed = {distribution.metadata["Name"].lower() for distribution in metadata.distributions()}
    assert ("numpy" in installed) == has_numpy, "NumPy is installed" if not has_numpy else "NumPy is not installed"
    for absent in ("lightning", "deepspeed", "safetensors", "tqdm", "matplotlib"):
        assert absent not in installed, f"{absent} is installed: this is no empty environment"
    about = metadata.metadata("sharded-avg")
    assert about["Author"] == "the sharded_avg developers", about["Author"]
    assert about["Description-Content-Type"] == "text/markdown"
    assert (about.get_payload() or about["Description"]).strip() == README.read_text().strip()
    assert "weight averaging" in about["Keywords"]
    addresses = dict(text.split(", ", 1) for text in about.get_all("Project-URL", []))
    assert addresses.keys() >= {"Documentation", "Source", "Changelog", "Issues"}, addresses
    print("metadata    the README is the description; authors, keywords, addresses")

    import sharded_avg

    place = Path(sharded_avg.__file__).resolve().parent
    assert place != README.parent / "sharded_avg", "the checkout was imported, not the wheel"
    print(f"import      sharded_avg {sharded_avg.__version__} from {place}")
    snippet = README.read_text().partition("```python\n")[2].partition("```")[0]
    folder = tempfile.mkdtemp()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", STAND_INS + snippet],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    print("snippet     the README's first one runs")
    for command in (
        ["inspect", "run/average"],
        ["consolidate", "run/average", "model.safetensors"],
        ["doctor", "--quick"],
    ):
        script = Path(sys.executable).with_name("sharded-avg")
        done = subprocess.run([script, *command], cwd=folder, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        print(f"command     sharded-avg {' '.join(command)}")


if __name__ == "__main__":
    main()
