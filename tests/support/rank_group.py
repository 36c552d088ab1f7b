"""Real processes that train together, started once and asked for one case after another.

A case is a function `module:name` of tests/support that every rank calls with its `Ranks` and the
same keys; what it returns has to be JSON. `python -m tests.support.rank_group` is one rank.
"""

import importlib
import json
import os
import selectors
import socket
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LIMIT_SECONDS = 300


class RankGroup:
    """`count` ranks on this computer's CPU, over gloo."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._processes: list[subprocess.Popen[str]] = []
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115

    def run(self, case: str, **keys: Any) -> list[Any]:
        """What each rank returns for `case`; AssertionError with the traceback of one that fails.

        The group ends with a failure, since its ranks may be anywhere, and the next case starts
        another.
        """
        if not self._processes:
            self._start()
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps({"case": case, "keys": keys}) + "\n")
                process.stdin.flush()
            answers = self._answers()
        except BaseException:
            self.close()
            raise
        if failed := [answer["error"] for answer in answers if "error" in answer]:
            self.close()
            raise AssertionError("\n".join(failed))
        return [answer["result"] for answer in answers]

    def close(self) -> None:
        """End the ranks."""
        for process in self._processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._processes = []

    def _start(self) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        size = {"WORLD_SIZE": self.count, "LOCAL_WORLD_SIZE": self.count, "OMP_NUM_THREADS": 1}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GROUP_RANK": 0}
        for rank in range(self.count):
            own = size | place | {"RANK": rank, "LOCAL_RANK": rank}
            self._processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "tests.support.rank_group"],
                    cwd=ROOT,
                    env=os.environ | {name: str(value) for name, value in own.items()},
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._log,
                    text=True,
                )
            )

    def _answers(self) -> list[dict[str, Any]]:
        """One line of each rank; the first that fails is not waited beyond."""
        found: dict[int, dict[str, Any]] = {}
        with selectors.DefaultSelector() as selector:
            for rank, process in enumerate(self._processes):
                assert process.stdout is not None
                selector.register(process.stdout, selectors.EVENT_READ, rank)
            while len(found) < self.count:
                ready = selector.select(LIMIT_SECONDS)
                assert ready, f"ranks {set(range(self.count)) - found.keys()} do not answer"
                for key, _ in ready:
                    line = self._processes[key.data].stdout.readline()
                    self._log.seek(0)
                    assert line, f"rank {key.data} is gone: {self._log.read()[-3000:]}"
                    found[key.data] = json.loads(line)
                    selector.unregister(key.fileobj)
                    if "error" in found[key.data]:
                        return list(found.values())
        return [found[rank] for rank in range(self.count)]


def main() -> None:
    """Answer cases until stdin ends, each with one line of JSON on stdout."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a library prints is no answer
    import torch

    from engine.config import RunConfig
    from engine.train.ranks import open_ranks

    torch.set_num_threads(1)
    keys = {"base_model": "demo-tiny", "dp_shard_size": int(os.environ["WORLD_SIZE"])}
    ranks = open_ranks(RunConfig.model_validate(keys))
    for line in sys.stdin:
        asked = json.loads(line)
        module, _, name = asked["case"].partition(":")
        case = getattr(importlib.import_module(f"tests.support.{module}"), name)
        try:
            answer = {"result": case(ranks, **asked["keys"])}
        except Exception:
            answer = {"error": f"rank {ranks.rank}: {traceback.format_exc()}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
