"""Run a short suite on the corners of the versions that setup.cfg allows, each in an environment of its own.

    python .ci/matrix.py            # all corners
    python .ci/matrix.py oldest     # one of them

A corner is skipped, and said to be, where its interpreter is not on this machine. An environment takes up to 7 GB.
"""

import argparse
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".venv-matrix"
SUITE = ["tests/tensors", "tests/pruning", "tests/models", "tests/rounds", "tests/adaptors", "tests/runs/test_card.py"]


@dataclass(frozen=True)
class Corner:
    """Versions that go together.

    Attributes:
        python: the interpreter.
        pins: versions to install; everything else is what pip finds.
    """

    python: str
    pins: tuple[str, ...] = ()


CORNERS = {
    "oldest": Corner("3.10", ("torch==2.6.0", "transformers==5.17.0")),
    "pinned": Corner("3.11", ("--constraint", str(ROOT / "constraints.txt"))),
    "middle": Corner("3.12", ("torch==2.13.0",)),
    "newest": Corner("3.13"),
}


def interpreter(version: str) -> str | None:
    """A Python of that version that starts; None if there is none."""
    name = f"python{version}"
    pyenv = sorted(Path.home().glob(f".pyenv/versions/{version}.*/bin/{name}"))
    for one in (*map(str, pyenv), shutil.which(name)):
        if one and not subprocess.run([one, "--version"], capture_output=True).returncode:
            return one
    return None


def test(name: str, corner: Corner) -> str:
    """Install and test one corner; returns how it went in a word or two."""
    python = interpreter(corner.python)
    if python is None:
        return f"skipped, no Python {corner.python} here"
    bin = FOLDER / name / "bin"
    subprocess.run([python, "-m", "venv", FOLDER / name], check=True)
    subprocess.run([bin / "pip", "install", "--quiet", "--upgrade", "pip", "setuptools"], check=True)
    if subprocess.run([bin / "pip", "install", "--quiet", *corner.pins, "--editable", f"{ROOT}[dev]"]).returncode:
        return "does not install"
    if subprocess.run([bin / "python", "-c", "import torchvision"], capture_output=True).returncode:
        subprocess.run([bin / "pip", "uninstall", "--quiet", "--yes", "torchvision"], check=True)  # as in the Makefile
    failed = subprocess.run([bin / "python", "-m", "pytest", "-q", "-n", "2", *SUITE], cwd=ROOT).returncode
    return "failed" if failed else "passed"


def versions(name: str) -> str:
    """What was installed in a corner."""
    pip = FOLDER / name / "bin" / "pip"
    listed = subprocess.run([pip, "freeze"], capture_output=True, text=True).stdout.splitlines() if pip.exists() else []
    return " ".join(line for line in listed if line.startswith(("appfl==", "numpy==", "torch==", "transformers==")))


def main() -> int:
    """Test the corners that the command line names; returns the number that failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("corners", nargs="*", metavar="CORNER", help=f"of {', '.join(CORNERS)} (default: all)")
    names = parser.parse_args().corners or list(CORNERS)
    went = {name: test(name, CORNERS[name]) for name in names}
    for name, how in went.items():
        sys.stdout.write(f"{name}: Python {CORNERS[name].python}: {how}. {versions(name)}\n")
    return sum(how in ("failed", "does not install") for how in went.values())


if __name__ == "__main__":
    raise SystemExit(main())
