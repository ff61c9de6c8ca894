"""Where things lie."""

from pathlib import Path

TESTS = Path(__file__).parent.parent
ROOT = TESTS.parent
DEMO = ROOT / "examples" / "demo"
SHARED = ROOT.parent / "shared" / "data"
