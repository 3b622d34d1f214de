"""`make bench`: every benchmark, each in a process of its own; they print ratios and never fail on speed."""

import subprocess
import sys
from pathlib import Path


def main() -> int:
    code = 0
    for path in sorted(Path(__file__).parent.glob("bench_*.py")):
        print(f"\n== {path.stem}", flush=True)
        code |= subprocess.run([sys.executable, "-m", f"tests.bench.{path.stem}"], check=False).returncode
    return code


if __name__ == "__main__":
    sys.exit(main())
