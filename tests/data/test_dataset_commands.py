import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from engine.chat.tokenizer import open_tokenizer
from engine.cli import build_app, dataset
from engine.errors import UserError
from tests.support.data import chat

opened = cache(open_tokenizer)
PREVIEW_KEYS = {"row", "line", "ok", "error", "input_ids", "labels", "kinds", "sources"}


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """A command line -> (exit status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    # Opening takes a second: once a model is enough for all these commands.
    monkeypatch.setattr("engine.chat.tokenizer.open_tokenizer", opened)
    app = build_app()

    def command(*arguments: object) -> tuple[int, str, str]:
        status = app(
            [str(word) for word in arguments],
            exit_on_error=False,
            print_error=False,
            result_action="return_value",
        )
        return status, *capsys.readouterr()

    return command


@pytest.fixture
def thinking_row() -> dict[str, Any]:
    row = chat("q", "done")
    row["messages"][1]["reasoning_content"] = "well"
    return row


@pytest.fixture
def config_file(tmp_path, model, write_jsonl, thinking_row) -> Path:
    write_jsonl([chat("q", "a"), "bad", thinking_row])
    (tmp_path / "sub").mkdir()
    path = tmp_path / "sub" / "config.yml"
    path.write_text(
        f"base_model: {model}\nsequence_len: 64\ntrain_on_thinking: false\n"
        "dataset_prepared_path: store\ndatasets:\n  - path: ../rows.jsonl\n"
    )
    return path


class TestCheck:
    def test_json_has_the_contracts_keys(self, run, write_jsonl, model):
        path = write_jsonl([chat("q"), 7])
        status, out, _ = run("check", path, "--model", model, "--json")
        found = json.loads(out)
        assert status == 0
        assert (found["rows"], found["usable"]) == (2, 1)
        assert {"line", "message", "what", "fix"} <= set(found["problems"][0])
        assert found["tokens"]["total"] > found["tokens"]["learned"] > 0

    def test_a_config_brings_model_and_dataset(self, run, config_file):
        status, out, _ = run("check", config_file, "--json")
        found = json.loads(out)
        assert (status, found["rows"], found["over_sequence_len"]) == (0, 3, 0)
        assert found["tokens"]["learned"] == 2 + 2

    def test_strict_fails_on_a_bad_row(self, run, write_jsonl):
        path = write_jsonl([chat("q"), 7])
        assert run("check", path)[0] == 0
        assert run("check", path, "--strict")[0] == 1

    def test_rows_that_the_entry_leaves_out_are_no_faults(self, run, write_jsonl, tmp_path, model):
        rows = [{"question": "q", "answer": "a", "good": number > 1} for number in range(4)]
        write_jsonl(rows)
        config = tmp_path / "c.yml"
        config.write_text(
            f"base_model: {model}\nsequence_len: 64\n"
            "datasets: [{path: rows.jsonl, field_label: good}]\n"
        )
        status, out, _ = run("check", config, "--strict")
        assert (status, out.count("The row's good is false.")) == (0, 1)
        assert "· 2 rows: The row's good is false. (lines 1, 2 of rows.jsonl)" in out
        left = json.loads(run("check", config, "--strict", "--json")[1])["left_out"]
        assert (left["bad"], left["judged"]) == (2, 2)
        write_jsonl([*rows, "bad"])
        assert run("check", config, "--strict")[0] == 1

    def test_rows_of_alpaca_are_read_as_the_refusal_of_their_type_says(self, run, write_jsonl):
        data = write_jsonl([{"instruction": "q", "input": "c", "output": "a"}])
        (config := data.with_name("c.yml")).write_text(
            f"base_model: demo-tiny\ndatasets: [{{path: {data.name}, type: alpaca}}]\n"
        )
        with pytest.raises(UserError, match=r"Write type: chat_template\. It reads"):
            run("check", config)
        config.write_text(config.read_text().replace("alpaca", "chat_template"))
        assert json.loads(run("check", config, "--json")[1])["usable"] == 1

    def test_text_names_line_reason_and_repair(self, run, write_jsonl):
        row = chat("q")
        row["messages"][1]["role"] = "robot"
        status, out, _ = run("check", write_jsonl([chat("q"), row]))
        assert status == 0
        assert "2 rows, 1 usable" in out
        assert "✗ line 2 of rows.jsonl, message 1:" in out

    def test_no_control_byte_reaches_the_terminal(self, run, write_jsonl):
        row = chat("q")
        row["messages"][1]["role"] = "ro\x1b]0;bot\x07"
        _, out, _ = run("check", write_jsonl([chat("q"), row], "ro\x1b[2Jws\u202e.jsonl"))
        assert "✗ line 2 of ro␛[2Jws⟨U+202E⟩.jsonl" in out
        assert not set(out) & set("\x1b\x07\u202e")

    def test_a_missing_file_is_a_wrong_request(self, run):
        with pytest.raises(UserError) as caught:
            run("check", "missing.jsonl")
        assert caught.value.exit_status == 2

    def test_equal_problems_are_one_line_with_count_and_first_lines(self, run, write_jsonl):
        _, out, _ = run("check", write_jsonl([7] * 50))
        assert out.count(" of rows.jsonl") == 1
        place = "(lines 1, 2, 3, 4, 5 … of rows.jsonl)"
        assert f"✗ 50 rows: The row is not a JSON object. {place} It is a number." in out

    def test_how_a_file_is_read_is_said(self, run, tmp_path):
        (tmp_path / "rows.jsonl").write_text(json.dumps([chat("q"), chat("r")]))
        assert "· rows.jsonl: one JSON array" in run("check", "rows.jsonl")[1]
        document = json.loads(run("check", "rows.jsonl", "--json")[1])
        assert [note["file"] for note in document["files"]] == ["rows.jsonl"]


class TestPreview:
    def test_json_of_one_row_is_one_document(self, run, write_jsonl, model):
        path = write_jsonl([chat("q", "a"), chat("r", "b")])
        status, out, _ = run("preview", path, "--model", model, "--row", 2, "--json")
        entry = json.loads(out)
        assert status == 0
        assert set(entry) >= PREVIEW_KEYS
        assert (entry["row"], entry["line"], entry["ok"], entry["error"]) == (2, 2, True, None)
        assert entry["kinds"] == ["bos", "user", "user", "user", "text", "eos"]
        assert entry["labels"] == [-100] * 4 + entry["input_ids"][4:]
        assert entry["sources"] == [-1, 0, 0, 0, 1, 1]

    def test_all_is_one_object_a_line_and_bad_rows_are_among_them(self, run, config_file):
        status, out, _ = run("preview", config_file, "--all", "--json")
        entries = [json.loads(line) for line in out.splitlines()]
        assert status == 0
        assert [entry["row"] for entry in entries] == [1, 2, 3]
        assert [entry["ok"] for entry in entries] == [True, False, True]
        assert set(entries[1]["error"]) >= {"what", "why", "fix"}
        assert entries[1]["input_ids"] == entries[1]["labels"] == []

    def test_the_first_row_is_the_default(self, run, config_file):
        assert json.loads(run("preview", config_file, "--json")[1])["row"] == 1

    @pytest.mark.parametrize(
        ("arguments", "learned"), [([], 2), (["--think"], 5), (["--no-think"], 2)]
    )
    def test_the_thinking_switch_overrides_the_config(self, run, config_file, arguments, learned):
        _, out, _ = run("preview", config_file, "--row", 3, "--json", *arguments)
        entry = json.loads(out)
        assert sum(label != -100 for label in entry["labels"]) == learned
        assert entry["kinds"].count("think") == 3

    def test_text_marks_what_is_learned_without_colour(self, run, config_file, monkeypatch):
        status, out, _ = run("preview", config_file, "--row", 3, "--think")
        assert status == 0
        assert re.search(r"^- user +0/3 +⟦INST⟧q⟦/INST⟧$", out, re.MULTILINE)
        assert re.search(r"^\+ think +3/3 +‹⟦THINK⟧well⟦/THINK⟧›$", out, re.MULTILINE)
        assert "learned by kind: bos 0/1, user 0/3, think 3/3, text 1/1, eos 1/1" in out
        assert "‹…›: learned" in out
        assert "\x1b" not in out

    def test_a_terminal_underlines_unless_no_color_is_set(self, run, config_file, monkeypatch):
        monkeypatch.setattr(dataset, "underlines", lambda: True)
        _, out, _ = run("preview", config_file, "--row", 1)
        assert "\x1b[4ma\x1b[24m" in out
        assert "underlined: learned" in out

    def test_a_terminal_gets_lines_no_wider_than_itself(self, run, write_jsonl, model, monkeypatch):
        path = write_jsonl([chat("why " * 40, "because " * 40 + "\nit is"), 7])
        monkeypatch.setattr(dataset, "terminal_columns", lambda: 60)
        monkeypatch.setattr(dataset, "underlines", lambda: True)
        _, out, _ = run("preview", path, "--model", model, "--all")
        plain = re.sub(r"\x1b\[\d+m", "", out).splitlines()
        assert max(map(len, plain)) <= 60
        assert plain[2].startswith("- user")
        assert plain[3].startswith(" " * 26 + "why")
        for line in out.splitlines():
            assert line.count("\x1b[4m") == line.count("\x1b[24m")
            assert "\x1b[4m " not in line

    def test_marks_are_explained_where_there_are_any(self, run, config_file):
        assert "control token" in run("preview", config_file, "--all")[1]
        assert "control token" not in run("preview", config_file, "--row", 2)[1]

    def test_text_that_spells_a_control_token_does_not_look_like_one(self, run, write_jsonl, model):
        path = write_jsonl([chat("[THINK] ⟦THINK⟧ \x1b[31m \u202e ‹", "line 1\nline 2")])
        _, out, _ = run("preview", path, "--model", model)
        assert "[THINK] ⟨U+27E6⟩THINK⟨U+27E7⟩ ␛[31m ⟨U+202E⟩ ⟨U+2039⟩" in out
        assert "\x1b" not in out
        assert re.search(r"line 1␊\n +line 2", out)

    def test_a_bad_row_is_a_sentence(self, run, config_file):
        status, out, _ = run("preview", config_file, "--row", 2)
        assert status == 0
        assert "✗ row 2, line 2 of rows.jsonl: The row is not a JSON object." in out

    def test_strict_fails_when_a_shown_row_learns_nothing(self, run, config_file):
        assert run("preview", config_file, "--row", 1, "--strict")[0] == 0
        status, _, message = run("preview", config_file, "--all", "--strict", "--json")
        assert (status, message) == (1, "1 of 3 shown rows learn nothing.\n")

    @pytest.mark.parametrize(
        ("arguments", "why"),
        [
            (["--row", 9], "has no row 9"),
            (["--row", 0], "counted from 1"),
            (["--row", 1, "--all"], "contradict"),
        ],
    )
    def test_wrong_rows_are_refused(self, run, config_file, arguments, why):
        with pytest.raises(UserError, match=why) as caught:
            run("preview", config_file, *arguments)
        assert caught.value.exit_status == 2

    def test_only_what_decides_about_rows_is_refused(self, run, config_file):
        own = config_file.read_text("utf-8")
        config_file.write_text(f"{own}rl: dpo\nrelora: true\ndeepspeed: a.json\n", "utf-8")
        assert run("preview", config_file, "--row", 1)[0] == 0
        config_file.write_text(f"{own}curriculum_sampling: true\nuse_dft: true\n", "utf-8")
        with pytest.raises(UserError, match="2 problems") as caught:
            run("preview", config_file, "--row", 1)
        assert "curriculum_sampling: true is not supported" in caught.value.why

    def test_without_a_model_it_asks_for_one(self, run, write_jsonl):
        with pytest.raises(UserError, match="Add --model"):
            run("preview", write_jsonl([chat("q")]))


class TestReasoningEffort:
    def test_it_changes_the_settings_that_the_prompt_states(self, run, write_jsonl):
        path = write_jsonl([chat("q", "a")])
        tokenizer = opened("mistral-small-4")
        for effort in ("none", "high"):
            arguments = ("--model", "mistral-small-4", "--reasoning-effort", effort, "--json")
            entry = json.loads(run("preview", path, *arguments)[1])
            assert f'"{effort}"' in "".join(tokenizer.pieces(entry["input_ids"]))
            assert "settings" in entry["kinds"]


class TestPrepare:
    def test_json_has_the_contracts_keys_and_a_second_call_reuses(self, run, config_file):
        status, out, _ = run("prepare", config_file, "--json")
        made = json.loads(out)
        assert status == 0
        assert (made["rows"], made["bad_rows"], made["reused"]) == (2, 1, False)
        assert (made["learned_tokens"], made["used_rows"]) == (4, 2)
        assert made["tokens"] > 4
        assert made["seconds"] > 0
        assert Path(made["path"]).parent == config_file.parent / "store"
        assert json.loads(run("prepare", config_file, "--json")[1])["reused"]

    def test_test_datasets_are_prepared_too(self, run, config_file, write_jsonl):
        write_jsonl([chat("q"), chat("r")], "test.jsonl")
        with config_file.open("a") as file:
            file.write("test_datasets:\n  - path: ../test.jsonl\n")
        assert json.loads(run("prepare", config_file, "--json")[1])["test_rows"] == [2]
        assert len(list((config_file.parent / "store").glob("*/meta.json"))) == 2

    def test_text_says_what_was_left_out(self, run, config_file):
        status, out, _ = run("prepare", config_file)
        assert status == 0
        assert "2 rows, 15 tokens, 4 learned: tokenized in" in out
        assert "! rows that cannot be used: 1" in out
        assert "✗ line 2 of rows.jsonl" in out
        assert "nothing tokenized" in run("prepare", config_file)[1]

    def test_how_rows_were_read_is_said_in_the_words_of_check(self, run, config_file, write_jsonl):
        odd = {
            "question": "q",
            "context": "c",
            "answer": "a </s>",
            "hint": "h",
            "stars": 1,
            "id": 7,
        }
        write_jsonl([chat("q"), odd])
        made, checked = (run(command, config_file)[1] for command in ("prepare", "check"))
        lines = [line for line in made.splitlines() if line in checked.splitlines()]
        for word in ("hint", "ratings", "stands before", "</s>", "not read: id"):
            assert any(word in line for line in lines), word
        assert lines == sorted(lines, key=lambda line: "!·".index(line[0]))

    def test_which_files_are_not_learned_is_said(self, run, config_file, write_jsonl, tmp_path):
        (tmp_path / "set").mkdir()
        for name in ("train", "test"):
            write_jsonl([chat(name)], f"set/{name}.jsonl")
        config_file.write_text(config_file.read_text().replace("rows.jsonl", "set"))
        made = json.loads(run("prepare", config_file, "--json")[1])
        assert (made["rows"], [note["file"] for note in made["files"]]) == (1, ["test.jsonl"])
        for command in ("prepare", "check", "preview"):
            said = run(command, config_file)[1]
            assert said.count("· test.jsonl: the split test, which is not learned") == 1

    def test_a_tokenizer_folder_is_found_from_the_config(self, run, config_file, tmp_path, model):
        (config_file.parent / "own").symlink_to(model)
        text = config_file.read_text()
        for key in ("base_model: own", "base_model: other/none\ntokenizer_config: ./own"):
            config_file.write_text(text.replace(f"base_model: {model}", key))
            assert json.loads(run("check", config_file, "--json")[1])["tokens"]["learned"] == 4
            assert json.loads(run("preview", config_file, "--json")[1])["ok"]
            assert json.loads(run("prepare", config_file, "--json")[1])["learned_tokens"] == 4

    def test_a_data_file_is_no_config(self, run, write_jsonl):
        with pytest.raises(UserError, match="is not a config file"):
            run("prepare", write_jsonl([chat("q")]))

    def test_a_config_without_datasets_is_refused(self, run, tmp_path, model):
        (tmp_path / "c.yml").write_text(f"base_model: {model}\n")
        for command in ("prepare", "check", "preview"):
            with pytest.raises(UserError, match="names no dataset"):
                run(command, tmp_path / "c.yml")


def test_what_is_not_read_and_what_would_read_it_are_said(run, write_jsonl, model):
    path = write_jsonl([{"question": "q", "answer": "a", "rationale": "since", "id": 7}])
    _, out, _ = run("check", path)
    assert "! rationale: in 100% of rows, not read, such as 'since'" in out
    assert "· not read: id 100% of rows (ids, sources)" in out
    assert "    field_thinking: rationale\n" in out
    document = json.loads(run("check", path, "--json")[1])
    assert document["proposed"]["field_thinking"] == "rationale"
    assert [each["name"] for each in document["unread"]] == ["rationale", "id"]
    assert "· Not read: rationale, 'since'." in run("preview", path, "--model", model)[1]
