"""The wizard's end of the worker process: answers by id, cancelled requests, dead processes."""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path

import pytest

from engine.config import DatasetConfig, RunConfig
from engine.data.requests import CheckRows, PreviewRows, Progress, ReadShape, Warm
from engine.errors import UserError
from engine.wizard.reading import DataWorker
from tests.support.stand_in import SAMPLE


def place(path: str = SAMPLE, folder: Path = Path()) -> tuple[RunConfig, Path]:
    return RunConfig(base_model="demo-tiny", datasets=(DatasetConfig(path=path),)), folder


def rows(path: Path, count: int) -> str:
    message = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a " * 20}]
    path.write_text((json.dumps({"messages": message}) + "\n") * count)
    return path.name


async def test_requests_are_answered_by_id_and_a_preview_waits_for_no_count(tmp_path) -> None:
    worker = DataWorker()
    name = rows(tmp_path / "many.jsonl", 20_000)
    reported: list[Progress] = []
    await worker.ask(PreviewRows(*place(), row=1, count=1))
    count = asyncio.create_task(worker.ask(CheckRows(*place(name, tmp_path)), reported.append))
    while not any(each.phase == "reading" for each in reported):
        await asyncio.sleep(0.01)
    answer = await worker.ask(PreviewRows(*place(), row=3, count=2))
    assert [row.number for row in answer.rows] == [3, 4]
    assert not count.done()
    count.cancel()
    with pytest.raises(asyncio.CancelledError):
        await count
    # The thread of the long requests is free again: this would else wait for all rows.
    assert (await worker.ask(CheckRows(*place()))).rows == 104
    assert reported[-1].rows < 20_000
    await worker.close()


async def test_what_the_process_refuses_is_a_sentence(tmp_path) -> None:
    worker = DataWorker()
    with pytest.raises(UserError, match=r"There is no gone\.jsonl"):
        await worker.ask(CheckRows(*place("gone.jsonl", tmp_path)))
    await worker.close()


async def test_a_killed_process_is_a_sentence_and_the_next_request_starts_another(tmp_path) -> None:
    worker = DataWorker()
    name = rows(tmp_path / "many.jsonl", 20_000)
    await worker.warm()
    first = worker.process_id
    asked = asyncio.create_task(worker.ask(CheckRows(*place(name, tmp_path))))
    await asyncio.sleep(0.1)
    os.kill(first, signal.SIGKILL)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="signal 9"):
        await asked
    assert (await worker.ask(ReadShape(*place(), count=1))).columns == ("messages",)
    assert worker.process_id != first
    await worker.close()
    assert worker.process_id is None


async def test_a_process_that_cannot_start_or_babbles_is_a_sentence() -> None:
    with pytest.raises(UserError, match="could not be started"):
        await DataWorker(["/no/such/program"]).ask(Warm())
    dying = "import sys; sys.exit('no module named \\x1b[31m engine')"
    with pytest.raises(UserError) as caught:
        await DataWorker([sys.executable, "-c", dying]).ask(Warm())
    assert "status 1: no module named ␛[31m engine" in caught.value.why
    babbling = DataWorker([sys.executable, "-c", "print('hello'); input(); input()"])
    with pytest.raises(UserError, match="ended"):
        await babbling.ask(Warm())
    await babbling.close()


async def test_it_ends_with_the_app_even_while_it_works(tmp_path) -> None:
    worker = DataWorker()
    name = rows(tmp_path / "many.jsonl", 20_000)
    asked = asyncio.create_task(worker.ask(CheckRows(*place(name, tmp_path))))
    while worker.process_id is None:
        await asyncio.sleep(0.01)
    process = worker.process_id
    await worker.close()
    with pytest.raises(UserError):
        await asked
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)
