"""Where runs live, how they are named, and how a name finds them again."""

import os
import threading
from pathlib import Path

import pytest

from engine.errors import UserError, WorkError
from engine.runs import RunFolder, create_run, find_run, list_runs, run_home


def test_a_run_lives_under_the_option_then_the_variable_then_the_data_folder(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert create_run("a", home=tmp_path / "x").path == tmp_path / "x" / "runs" / "a"
    assert create_run("a").path == home / "runs" / "a"
    monkeypatch.delenv("WINDTUNNEL_RUNS")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    assert run_home() == tmp_path / "data" / "windtunnel"
    assert create_run("a").path == tmp_path / "data" / "windtunnel" / "runs" / "a"


def test_output_dir_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert create_run("ignored", output_dir="my out/é").path == tmp_path / "my out" / "é"


def test_no_other_user_looks_into_a_run(home: Path, tmp_path: Path) -> None:
    before = os.umask(0o022)
    try:
        made = [create_run("a"), create_run("b", output_dir=str(tmp_path / "out" / "b"))]
    finally:
        os.umask(before)
    assert [run.path.stat().st_mode & 0o777 for run in made] == [0o700, 0o700]


def test_the_folder_has_the_names_of_the_contract(run: RunFolder) -> None:
    names = "config.yml plan.json events.jsonl engine.log lock control.jsonl data checkpoints "
    paths = [run.config, run.plan, run.events, run.log, run.lock, run.control, run.data]
    paths += [run.checkpoints, run.adapter, run.model]
    assert [path.name for path in paths] == (names + "adapter model").split()
    assert {path.parent for path in paths} == {run.path}


def test_a_name_that_is_taken_gets_a_number(home: Path) -> None:
    names = [create_run("tune").name for _ in range(3)]
    assert names == ["tune", "tune-2", "tune-3"]


def test_runs_created_at_the_same_moment_get_different_folders() -> None:
    made: list[Path] = []
    threads = [
        threading.Thread(target=lambda: made.append(create_run("tune").path)) for _ in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 12


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../up", "a/b", "-rf", "a b", "a\nb", "\x1b[2J", "é", "x" * 101, "a\0"]
)
def test_a_name_that_is_no_plain_word_is_refused(name: str) -> None:
    with pytest.raises(UserError) as caught:
        create_run(name)
    assert caught.value.exit_status == 2
    assert "\x1b" not in str(caught.value)


def test_a_folder_that_holds_a_run_is_refused_unless_it_is_resumed(tmp_path: Path) -> None:
    run = create_run("r", output_dir=tmp_path / "out")
    run.events.write_text("{}\n")
    with pytest.raises(UserError, match="already holds a run"):
        create_run("r", output_dir=tmp_path / "out")
    assert create_run("r", output_dir=tmp_path / "out", resume=True) == run
    assert run.events.read_text() == "{}\n"


def test_a_folder_with_checkpoints_and_no_events_is_refused(tmp_path: Path) -> None:
    (tmp_path / "out" / "checkpoints" / "step-5").mkdir(parents=True)
    with pytest.raises(UserError, match="already holds a run"):
        create_run("r", output_dir=tmp_path / "out")


def test_a_folder_that_waits_to_start_and_one_of_other_files_are_taken(tmp_path: Path) -> None:
    (tmp_path / "config.yml").write_text("base_model: demo-tiny\n")
    (tmp_path / "notes.txt").write_text("mine")
    create_run("r", output_dir=tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"
    assert (tmp_path / "config.yml").read_text() == "base_model: demo-tiny\n"


def test_there_must_be_a_run_to_resume(tmp_path: Path) -> None:
    for output_dir in (tmp_path / "none", None):
        with pytest.raises(UserError, match="holds no run"):
            create_run("none", resume=True, output_dir=output_dir)
    assert not (tmp_path / "none").exists()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(WorkError, match="cannot be made"):
        create_run("r", output_dir=tmp_path / "file" / "out")
    with pytest.raises(WorkError, match="cannot be made"):
        create_run("r", home=tmp_path / "file")
    (tmp_path / "runs").write_text("in the way")
    with pytest.raises(WorkError, match="cannot be made"):
        create_run("r", home=tmp_path)
    with pytest.raises(WorkError, match="cannot be made"):
        create_run("r", output_dir="nul\0byte")


def test_a_run_is_found_by_name_anywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    elsewhere = create_run("ignored", output_dir=tmp_path / "disk" / "big-one")
    other_home = create_run("small-one", home=tmp_path / "other")
    create_run("plain")
    monkeypatch.chdir("/")
    assert find_run("big-one") == elsewhere
    assert find_run("small-one") == other_home
    assert {run.name for run in list_runs()} == {"plain", "big-one", "small-one"}
    assert [run.name for run in list_runs(tmp_path / "other")] == ["small-one"]


def test_a_run_is_indexed_once_and_forgotten_with_its_folder(home: Path, tmp_path: Path) -> None:
    for _ in range(3):
        create_run("r", output_dir=tmp_path / "out")
    assert len((home / "index.jsonl").read_text().splitlines()) == 1
    (tmp_path / "out").rename(tmp_path / "moved")
    assert list_runs() == []
    assert find_run(tmp_path / "moved").name == "moved"


def test_an_index_with_torn_and_foreign_lines_still_serves(home: Path, tmp_path: Path) -> None:
    create_run("r", output_dir=tmp_path / "one")
    with (home / "index.jsonl").open("a") as file:
        file.write('[]\n{"path": 3}\n{"path": "relative"}\n{"pa')
    create_run("r", output_dir=tmp_path / "two")
    assert {run.name for run in list_runs()} == {"one", "two"}


def test_an_index_that_cannot_be_written_is_no_reason_to_fail(home: Path, tmp_path: Path) -> None:
    home.write_text("a file where the folder should be")
    assert create_run("r", output_dir=tmp_path / "out").path.is_dir()


def test_runs_are_listed_once_and_the_latest_first(home: Path, tmp_path: Path) -> None:
    runs = [create_run(name) for name in ("old", "new", "middle")]
    for run, when in zip(runs, (100, 300, 200), strict=True):
        run.events.write_text("{}\n")
        os.utime(run.events, (when, when))
    (tmp_path / "link").symlink_to(runs[0].path)
    create_run("r", output_dir=tmp_path / "link", resume=True)
    (home / "runs" / "no-run").mkdir()
    assert [run.name for run in list_runs()] == ["new", "middle", "old"]


def test_a_name_that_is_not_there_is_answered_with_the_nearest(home: Path) -> None:
    create_run("support-magistral")
    with pytest.raises(UserError) as caught:
        find_run("suport-magistral")
    assert "support-magistral" in caught.value.why
    assert ": 1 run. The nearest" in caught.value.why
    with pytest.raises(UserError) as caught:
        find_run("\x1b[2J")
    assert "\x1b" not in str(caught.value)


def test_two_runs_of_one_name_are_distinguished_by_their_folders(tmp_path: Path) -> None:
    runs = [create_run("r", output_dir=tmp_path / place / "same") for place in ("a", "b")]
    with pytest.raises(UserError) as caught:
        find_run("same")
    assert all(str(run.path) in caught.value.why for run in runs)
    assert find_run(runs[1].path) == runs[1]


def test_a_run_is_found_by_its_folder_too(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_run(str(run.path)) == run
    monkeypatch.chdir(run.path.parent)
    assert find_run("./first") == run
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(run.path / "empty"))
    assert find_run("first") == run
    with pytest.raises(UserError, match="holds no run"):
        find_run("./second")
