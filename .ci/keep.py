"""Keeps the result of a run under version control, as `examples/results/NAME.json` or that of benchmarks/.

    python examples/quantize.py
    python .ci/keep.py results/quantize/quantize.json

Curves stay out, which make a file large and a table not, and so does the folder of the run.
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LEFT_OUT = ("curves", "paths")


def keep(path: Path) -> Path:
    """Copies a file to the folder of its program, a list of numbers in a line."""
    (program,) = [*ROOT.glob(f"examples/{path.stem}.py"), *ROOT.glob(f"benchmarks/{path.stem}.py")]
    content = json.loads(path.read_text(encoding="utf-8"))
    content = {key: value for key, value in content.items() if key not in LEFT_OUT}
    if "options" in content:
        del content["options"]["output"]
    text = json.dumps(content, indent=1)
    text = re.sub(r"\[\s+[^][{}]+\]", lambda found: " ".join(found[0].split()), text)
    kept = program.parent / "results" / path.name
    kept.parent.mkdir(exist_ok=True)
    kept.write_text(text + "\n", encoding="utf-8")
    return kept


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(f"Kept: {keep(Path(name)).relative_to(ROOT)}")
