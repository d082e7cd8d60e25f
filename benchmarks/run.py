"""Run the benchmarks of this folder, all or those named: `python benchmarks/run.py [NAME ...]`.

Each one is a script: it prints a table and writes `results/<name>-<date>.json` beside the figures of earlier days.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent


def main(names: list[str]) -> int:
    """Run them one after the other, so that they do not disturb each other; 1 when one failed, 2 for unknown names."""
    scripts = [path for path in sorted(HERE.glob("*.py")) if "__main__" in path.read_text(encoding="utf-8")]
    known = {path.stem: path for path in scripts if path.name != Path(__file__).name}
    if unknown := [name for name in names if name not in known]:
        print(f"no benchmark {unknown[0]!r}; there are: {', '.join(known)}", file=sys.stderr)
        return 2
    failed = []
    for name in names or known:
        print(f"== {name}", flush=True)
        if subprocess.run([sys.executable, str(known[name])], cwd=HERE.parent, check=False).returncode:
            failed.append(name)
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
