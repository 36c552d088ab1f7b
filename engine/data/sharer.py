"""One of several processes that read the same rows, each for its share: `-m engine.data.sharer`.

Its first line of input is an order, the others answer what it asks for; what it makes goes out in
frames (`shares`). It ends when its input does, so it never outlives who asks. No torch.
"""

import json
import os
import queue
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import IO, Any

from msgspec import Raw
from msgspec.json import Decoder

from engine.chat.conversation import RowProblem
from engine.chat.tokenizer import ChatTokenizer, reopen
from engine.data.checkup import CountRows
from engine.data.prepare import MakeBlocks
from engine.data.rows import Web
from engine.data.shares import (
    Asked,
    Ended,
    Failed,
    Order,
    Said,
    Sent,
    load,
    make_parts,
    pack,
)
from engine.data.web_images import read_kept
from engine.errors import UserError, WorkError

# Some thirty blocks may wait for their turn; a system may allow less.
_PIPE_BYTES = 2**20


class _AskedFor:
    """Images of the web: who gave the order fetches them, so that its limits hold for all."""

    def __init__(self, say: Callable[[Said], None], answers: "queue.SimpleQueue[bytes]") -> None:
        self._say = say
        self._answers = answers

    def fetch(self, url: str) -> bytes:
        self._say(Asked(url))
        problem = json.loads(self._answers.get())["problem"]
        if problem:
            raise RowProblem(*problem)
        return read_kept(url)

    def finish(self) -> None:
        """It is told by whoever fetches."""


def _carry_out(line: bytes, say: Callable[[Said], None], web: Web) -> None:
    order: Order[Any] = Decoder(Order[CountRows | MakeBlocks], dec_hook=load).decode(line)
    tokenizer = _open(order) if order.fingerprint else None
    parts = make_parts(order.task, tokenizer, web if order.fetches else None, order.share)
    for part in parts:
        say(Sent(Raw(pack(part.made)), part.read_bytes, part.ends_block))
    say(Ended())


def _open(order: Order[Any]) -> ChatTokenizer:
    origin = order.spec or order.file
    assert origin is not None
    tokenizer = reopen(origin)
    if tokenizer.fingerprint != order.fingerprint:
        raise WorkError(
            "The tokenizer changed while rows were being read.",
            f"{order.file} is not what it was at the start.",
            "Wait until nothing writes to it and run again.",
        )
    return tokenizer


def _listen(lines: IO[bytes], answers: "queue.SimpleQueue[bytes]") -> None:
    for line in lines:
        answers.put(line)
    os._exit(0)


def main() -> None:
    """Carries out one order."""
    # Libraries may print; only frames may reach the pipe.
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    with suppress(ImportError, OSError):
        from fcntl import F_SETPIPE_SZ, fcntl

        fcntl(out.fileno(), F_SETPIPE_SZ, _PIPE_BYTES)
    lines = queue.SimpleQueue[bytes]()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, lines), daemon=True).start()

    def say(said: Said) -> None:
        frame = pack(said)
        out.write(len(frame).to_bytes(8, "little") + frame)
        out.flush()

    status = 0
    try:
        _carry_out(lines.get(), say, _AskedFor(say, lines))
    except UserError as error:
        say(Failed(error.what, error.why, error.fix, error.exit_status))
    except BaseException:
        # Its last line is what whoever asks says of the end.
        traceback.print_exc()
        status = 1
    # The thread that listens would hold up an orderly end.
    os._exit(status)


if __name__ == "__main__":
    main()
