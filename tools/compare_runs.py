"""Do two runs have the same numbers? For changes that should not alter any.

    python tools/compare_runs.py runs/before-s0 runs/after-s0

Compares metrics.jsonl line by line, times left out; prints the largest relative difference of every metric
that differs and exits with 1 if there is one.
"""

import json
import sys
from pathlib import Path

TIMES = {"seconds", "train_seconds", "images_per_second"}


def main(left: str, right: str) -> int:
    """Compare two run folders; return the exit status."""
    texts = [(Path(run) / "metrics.jsonl").read_text() for run in (left, right)]
    logs = [[json.loads(line) for line in text.splitlines()] for text in texts]
    worst: dict[str, float] = {}
    for a, b in zip(*logs, strict=False):
        for key in (a.keys() | b.keys()) - TIMES:
            x, y = a.get(key), b.get(key)
            if x != y:
                both = isinstance(x, (int, float)) and isinstance(y, (int, float))
                difference = abs(x - y) / max(abs(x), abs(y)) if both else float("inf")
                worst[key] = max(worst.get(key, 0.0), difference)
    print(f"{len(logs[0])} and {len(logs[1])} epochs")
    for key, difference in sorted(worst.items(), key=lambda item: -item[1]):
        print(f"{difference:9.2e}  {key}")
    same = not worst and len(logs[0]) == len(logs[1])
    print("identical" if same else "different")
    return 0 if same else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
