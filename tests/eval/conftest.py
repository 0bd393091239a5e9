"""Makes `eval_helpers` importable for the tests here, and for the processes that they spawn."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
