"""The process behind `generate`, `chat` and `merge` without torch: it says back what it was asked.

FAKE_DIES makes it leave at once with those last words; FAKE_FAILS makes it tell that sentence.
"""

import json
import os
import sys
from pathlib import Path


def tell(**record: object) -> None:
    print(json.dumps(record), flush=True)


def main() -> int:
    if words := os.environ.get("FAKE_DIES"):
        print(words, file=sys.stderr)
        return 7
    if what := os.environ.get("FAKE_FAILS"):
        tell(error={"what": what, "why": "Because.", "fix": "Do it.", "exit_status": 1})
        return 1
    if sys.argv[1] == "merge":
        tell(done=1, total=2)
        Path(sys.argv[3]).mkdir()
        tell(merged=sys.argv[3])
        return 0
    print("a library says hello")
    tell(ready=True, trained=f"{sys.argv[2]}/adapter", model="m", report="")
    for line in sys.stdin:
        request = json.loads(line)
        last = request["messages"][-1]["content"]
        if last == "refuse me":
            tell(refused={"what": "Refused.", "why": "It asked.", "fix": "Ask less."})
            tell(end=True)
            continue
        turns = len(request["messages"])
        text = f"{'base' if request['base'] else 'tuned'}:{turns}:{json.dumps(last)}\x1b[31m"
        for piece in (text[:4], text[4:]):
            tell(text=piece)
        tell(answer={"text": text, "tokens": 2, "stopped": last != "long", "asked": request})
        tell(end=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
