"""`recommend`, `estimate` and train's refusal on the command line: input, exit status, JSON."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeGuard

import pytest

from engine.catalog import find_model
from engine.cli import main
from engine.config import read_config
from engine.events import Ended, Event
from engine.runs import Follower, RunFolder, status
from tests.fakes.nvml import RTX_4090, FakeDriver
from tests.support.extras import needs_trainer

SAMPLE = Path(__file__).parents[2] / "presets" / "samples" / "harbour-pilot" / "train.jsonl"
SMALL_GPU = (
    "gpu name=NVIDIA_Small uuid=GPU-cccc-1 pci=00000000:01:00.0 total=4294967296"
    " used=0 reserved=0 cc=8.9 util=0 temp=41 power=28000 limit=450000"
)
LARGE = """
base_model: ministral-3-3b
datasets:
  - path: rows.jsonl
    type: chat_template
adapter: lora
lora_r: 16
sequence_len: 2048
sample_packing: true
micro_batch_size: 4
gradient_checkpointing: true
"""
ESTIMATE_KEYS = {
    *("peak_allocated_bytes", "device_bytes", "host_bytes", "disk_bytes", "parts"),
    *("trainable_parameters", "total_parameters", "targets", "verdict", "range_bytes", "source"),
}


def is_end(event: Event) -> TypeGuard[Ended]:
    return isinstance(event, Ended)


Command = Callable[..., tuple[int, str, str]]


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WINDTUNNEL_RUNS", str(tmp_path / "home"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_bytes(SAMPLE.read_bytes())
    path = tmp_path / "large.yml"
    path.write_text(LARGE, "utf-8")
    return path


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Command:
    """A command line -> (exit status, stdout, stderr)."""

    def command(*words: str) -> tuple[int, str, str]:
        return main(words), *capfd.readouterr()

    return command


class TestRecommend:
    def test_the_verdict_comes_first_and_the_config_can_be_read(
        self, run: Command, tmp_path: Path
    ) -> None:
        code, out, err = run("recommend", "--model", "ministral-3-3b", "--assume", "RTX 4090")
        assert (code, err) == (0, "")
        assert out.startswith("✓ fits: needs ")
        assert "RTX 4090 can give 22.8 of 24.0\n" in out
        assert "\n✗ full: " in out
        (tmp_path / "printed.yml").write_text(out[out.index("# A Windtunnel config") :], "utf-8")
        assert read_config(tmp_path / "printed.yml").config.adapter == "lora"

    def test_json_holds_what_the_contract_promises(self, run: Command) -> None:
        arguments = ("--model", "magistral-small-2509", "--assume", "24 GB", "--json")
        code, out, err = run("recommend", *arguments, "lora_r=8")
        assert (code, err) == (0, "")
        printed = json.loads(out)
        assert printed.keys() >= {"config", "reasons", "estimate", "alternatives", "device"}
        assert printed["config"]["lora_r"] == 8
        assert printed["reasons"]["lora_r"].startswith("yours (recommended 32: ")
        assert set(printed["config"]) - {"base_model"} <= set(printed["reasons"])
        assert printed["estimate"].keys() >= ESTIMATE_KEYS
        assert {"name", "changes", "device_bytes", "verdict", "trade"} <= set(
            printed["alternatives"][0]
        )
        assert printed["device"]["planned"]

    def test_the_written_config_is_what_estimate_reads_back(
        self, run: Command, tmp_path: Path
    ) -> None:
        arguments = ("--model", "ministral-3-8b", "--assume", "RTX 4090", "--json")
        _, out, _ = run("recommend", *arguments, "-o", "made.yml")
        advised = json.loads(out)["estimate"]
        text = (tmp_path / "made.yml").read_text("utf-8")
        assert "learning_rate: 0.0002  # usual for adapters, at any rank\n" in text
        code, out, err = run("estimate", "made.yml", "--assume", "RTX 4090", "--json")
        assert (code, err) == (0, "")
        assert {k: json.loads(out)[k] for k in advised} == advised

    def test_it_says_how_to_train_what_it_wrote(self, run: Command) -> None:
        code, out, _ = run("recommend", "--model", "demo-tiny", "-o", "made.yml")
        assert code == 0
        assert out.endswith("Written to made.yml. Train it with: windtunnel train made.yml\n")
        assert "base_model" not in out

    def test_a_full_fine_tune_is_asked_for_by_no_adapter(self, run: Command) -> None:
        for nothing in ("adapter=", "adapter=null"):
            arguments = ("--model", "ministral-3-3b", "--assume", "H100", "--json", nothing)
            code, out, _ = run("recommend", *arguments)
            printed = json.loads(out)
            assert code == 0
            assert "adapter" not in printed["config"]
            assert printed["config"]["learning_rate"] == 2e-5
            assert printed["reasons"]["adapter"].startswith("yours (recommended lora: ")

    def test_a_model_that_is_not_trained_yet_says_so(self, run: Command, tmp_path: Path) -> None:
        config = dict(find_model("ministral-3-3b").config)
        packed = json.dumps(config | {"quantization_config": {"quant_method": "awq"}})
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed" / "config.json").write_text(packed)
        code, out, _ = run("recommend", "--model", "./packed", "--assume", "H200")
        assert code == 0
        assert "✗ not trained yet: Its weights are stored as AWQ" in out

    def test_more_cards_than_a_run_uses_are_said(self, run: Command) -> None:
        _, out, _ = run("recommend", "--model", "ministral-3-3b", "--assume", "H100 x2")
        assert "· there are 2 of them; a run uses one so far\n" in out

    def test_without_a_planned_card_the_one_here_counts(
        self, run: Command, nvml: FakeDriver
    ) -> None:
        nvml.set(RTX_4090)
        _, out, _ = run("recommend", "--model", "ministral-3-3b", "--json")
        printed = json.loads(out)
        assert printed["device"]["uuid"] == "GPU-bbbb-1"
        assert not printed["device"]["planned"]
        assert printed["attention"]["backend"] == "flash_attention_torch"
        assert "attn_implementation" not in printed["config"]
        used = 25757220864 - 600000000 - 400000000
        assert printed["device"]["can_give_bytes"] <= used


class TestRecommendWithData:
    DATA = ("--data", "rows.jsonl", "--model", "demo-tiny")

    def test_lengths_come_from_the_rows(self, run: Command, config: Path) -> None:
        code, out, err = run("recommend", *self.DATA, "--assume", "RTX 4090", "--json")
        assert (code, err) == (0, "")
        printed = json.loads(out)
        assert "longest row has 70 tokens" in printed["reasons"]["sequence_len"]
        assert "104 rows are few" in printed["reasons"]["num_epochs"]
        assert printed["config"]["datasets"][0]["path"] == "rows.jsonl"
        assert len(printed["config"]["sample_prompts"]) == 3

    def test_a_config_saved_elsewhere_still_finds_its_rows(
        self, run: Command, config: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "configs").mkdir()
        code, _, err = run("recommend", *self.DATA, "-o", "configs/made.yml")
        assert (code, err) == (0, "")
        os.chdir(tmp_path / "configs")
        (given,) = read_config("made.yml").config.datasets
        assert given.path == str(tmp_path / "rows.jsonl")
        code, out, err = run("check", "made.yml", "--json")
        assert (code, err) == (0, "")
        assert json.loads(out)["usable"] == 104

    def test_rows_that_none_can_be_used_of_are_refused(self, run: Command, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"messages": []}\n', "utf-8")
        code, out, err = run("recommend", *self.DATA)
        assert (code, out) == (2, "")
        assert "No row of rows.jsonl can be used." in err


class TestEstimate:
    def test_a_card_with_room_is_told_what_computing_every_layer_once_gains(
        self, run: Command, config: Path
    ) -> None:
        _, out, _ = run("estimate", str(config), "--assume", "H100")
        (line,) = [line for line in out.splitlines() if "would fit" in line]
        assert re.match(
            r"· gradient_checkpointing=false would fit: [\d.]+ of 75.7 GiB, every", line
        )
        _, out, _ = run("estimate", str(config), "--assume", "H100", "--json")
        faster = json.loads(out)["faster"]
        assert faster["changes"] == {"gradient_checkpointing": False}
        assert faster["verdict"] == "fits"
        more = str(config), "gradient_checkpointing=false"
        _, out, _ = run("estimate", *more, "--assume", "H100", "--json")
        assert json.loads(out)["faster"] is None

    def test_json_holds_what_the_contract_promises(self, run: Command, config: Path) -> None:
        code, out, err = run("estimate", str(config), "--assume", "RTX 4090", "--json")
        assert (code, err) == (0, "")
        printed = json.loads(out)
        assert printed.keys() >= ESTIMATE_KEYS
        assert sum(printed["parts"].values()) == printed["peak_allocated_bytes"]
        assert printed["targets"] == {"lora_target_linear": 182}
        low, high = printed["range_bytes"]
        assert low < printed["peak_allocated_bytes"] < high
        assert (printed["verdict"], printed["source"]) == ("fits", "formula")

    @pytest.mark.parametrize(
        ("assumed", "mark", "code"),
        [("RTX 4090", "✓ fits", 0), ("11 GB", "! tight", 0), ("8 GB", "✗ does not fit", 3)],
    )
    def test_the_exit_status_is_3_only_where_it_does_not_fit(
        self, run: Command, config: Path, assumed: str, mark: str, code: int
    ) -> None:
        found, out, err = run("estimate", str(config), "--assume", assumed)
        assert (found, err) == (code, "")
        assert out.startswith(f"{mark}: needs ")
        assert run("estimate", str(config), "--assume", assumed, "--json")[0] == code

    def test_parts_modules_and_parameters_are_listed(self, run: Command, config: Path) -> None:
        (config.parent / "rows.jsonl").unlink()
        _, out, _ = run("estimate", str(config), "lora_target_modules=[q_proj]", "--assume", "4090")
        assert re.search(r"^  linear +\d+\.\d GiB$", out, re.MULTILINE)
        assert re.search(r"^  driver and slack +\d+\.\d GiB$", out, re.MULTILINE)
        assert (
            "8,192 tokens at once; 2,981,888 of 3,849,090,048 parameters are trainable (0.08%)"
            in out
        )
        assert "adapter on 26 modules by q_proj\n" in out

    def test_what_axolotl_would_hold_is_named_where_it_differs(
        self, run: Command, config: Path
    ) -> None:
        _, out, _ = run("estimate", str(config), "--assume", "4090")
        (line,) = [line for line in out.splitlines() if "Axolotl would hold" in line]
        assert line.startswith("· without driver and slack ")
        _, out, _ = run(
            "estimate", str(config), "base_model=magistral-small-2507", "--assume", "H200"
        )
        assert "Axolotl" not in out  # it has no vision tower
        found = json.loads(run("estimate", str(config), "--assume", "4090", "--json")[1])
        gained = sum(found["axolotl"]["differences"].values())
        assert found["axolotl"]["peak_allocated_bytes"] == found["peak_allocated_bytes"] + gained

    def test_changes_are_estimated_and_not_written(self, run: Command, config: Path) -> None:
        def needed(*changes: str) -> int:
            _, out, _ = run("estimate", str(config), *changes, "--assume", "H100", "--json")
            return int(json.loads(out)["device_bytes"])

        (config.parent / "rows.jsonl").unlink()
        assert needed("micro_batch_size=8") > needed() > needed("adapter=qlora", "load_in_4bit=1")
        assert config.read_text("utf-8") == LARGE

    def test_the_rows_are_counted_and_the_deciding_one_is_named(
        self, run: Command, config: Path
    ) -> None:
        plain = ("estimate", str(config), "sample_packing=false", "--assume", "4090")
        _, out, _ = run(*plain)
        assert re.search(r"^row \d+ has 70 tokens$", out, re.MULTILINE)
        assert re.search(r"^· \d+ steps, about .* tokens a second \(formula\)$", out, re.MULTILINE)
        counted = json.loads(run(*plain, "--json")[1])
        assert counted["rows_counted"] == 104
        assert counted["tokens_at_once"] == 4 * 70
        (config.parent / "rows.jsonl").unlink()
        _, out, _ = run(*plain)
        assert "rows are taken to have sequence_len: 2,048 tokens (its rows could not be" in out
        assert json.loads(run(*plain, "--json")[1])["rows_counted"] is None

    def test_what_does_not_fit_is_followed_by_the_ladder_and_by_larger_cards(
        self, run: Command, config: Path
    ) -> None:
        (config.parent / "rows.jsonl").unlink()
        code, out, _ = run("estimate", str(config), "--assume", "8 GB")
        assert code == 3
        assert "to make it fit, each on top of those above:" in out
        assert re.search(r"^✓ .*: \d\.\d GiB, saves \d", out, re.MULTILINE)
        (values,) = re.findall(r"^behind the config, that is: (.*)$", out, re.MULTILINE)
        assert run("estimate", str(config), *values.split(), "--assume", "8 GB")[0] == 0
        assert "as it is it fits: " in out
        printed = json.loads(run("estimate", str(config), "--assume", "8 GB", "--json")[1])
        assert [rung["verdict"] for rung in printed["ladder"]][-1] == "fits"
        assert all(rung["saves_bytes"] > 0 for rung in printed["ladder"])

    def test_a_model_folder_beside_the_config_is_read(
        self, run: Command, config: Path, tmp_path: Path
    ) -> None:
        write_shape(tmp_path / "model")
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
        code, out, _ = run("estimate", str(config), "base_model=model", "--assume", "4090")
        assert code == 0
        assert "3,849,090,048 parameters" in out


BAD = [
    (("recommend",), ["--model"]),
    (("recommend", "--model", "nope"), ["no model named nope", "windtunnel models"]),
    (("recommend", "--model", "demo-tiny", "--assume", "Voodoo 2"), ["no GPU named Voodoo 2"]),
    (("recommend", "--model", "demo-tiny", "--assume", "A100"), ["40.0 GiB", "80.0 GiB"]),
    (("recommend", "--model", "demo-tiny", "--data", "gone.jsonl"), ["There is no gone.jsonl."]),
    (("recommend", "--model", "demo-tiny", "--goal", "vision"), ["reads no images"]),
    (("recommend", "--model", "mistral-small-3.2", "--goal", "think"), ["does not think"]),
    (("recommend", "--model", "demo-tiny", "--goal", "fame"), ["fame", "text", "vision"]),
    (("recommend", "--model", "demo-tiny", "lora_r"), ["sets no key", "key=value"]),
    (("recommend", "--model", "demo-tiny", "loar_r=3"), ["loar_r", "lora_r"]),
    (("recommend", "--model", "demo-tiny", "lora_r=many"), ["lora_r"]),
    (("recommend", "--model", "demo-tiny", "adapter=qlora", "load_in_4bit=no"), ["load_in_4bit"]),
    (("recommend", "--model", "demo-tiny", "lora_target_modules=[query]"), ["matches no module"]),
    (("estimate",), ["CONFIG"]),
    (("estimate", "gone.yml"), ["gone.yml was not found"]),
    (("estimate", "{config}", "--assume", "A100"), ["more than one GPU"]),
    (("estimate", "{config}", "lora_r"), ["sets no key"]),
    (("estimate", "{config}", "lora_target_modules=[query]"), ["matches no module", "q_proj"]),
    (("estimate", "{config}", "base_model=./absent"), ["absent"]),
    (("estimate", "{config}", "rl=dpo"), ["rl"]),
    (("models", "--assume", "A100"), ["more than one GPU"]),
    (("models", "--assume", ""), ["No GPU is named"]),
]


@pytest.mark.parametrize(("words", "said"), BAD, ids=[" ".join(words) for words, _ in BAD])
def test_a_wrong_request_is_three_lines(
    words: tuple[str, ...], said: list[str], run: Command, config: Path
) -> None:
    code, out, err = run(*(word.format(config=config) for word in words))
    assert (code, out) == (2, "")
    assert len(err.strip().splitlines()) >= 3
    assert "Traceback" not in err
    assert all(each in err for each in said), err


def write_shape(folder: Path) -> Path:
    """A model folder that holds a config.json and no weights: nothing of it can be loaded."""
    folder.mkdir()
    shape: dict[str, Any] = dict(find_model("ministral-3-3b").config)
    (folder / "config.json").write_text(json.dumps(shape), "utf-8")
    return folder


@needs_trainer
class TestTrainIsRefusedWhereItWouldMissTheCard:
    """The driver shows a card, and the torch of the tests computes on the CPU alone."""

    @pytest.fixture(autouse=True)
    def card(self, nvml: FakeDriver) -> None:
        nvml.set(RTX_4090)

    @pytest.mark.parametrize("more", [(), ("--detach",), ("--max-steps", "0")])
    def test_before_there_is_a_run(
        self, run: Command, config: Path, home: Path, more: tuple[str, ...]
    ) -> None:
        code, out, err = run("train", str(config), *more)
        assert (code, out) == (2, "")
        assert re.match(r"The installed torch \S+ cannot use a GPU\.", err)
        assert "Install the build of torch for CUDA" in err
        assert not home.exists()

    def test_a_model_that_has_to_be_fetched_first(
        self, run: Command, config: Path, home: Path
    ) -> None:
        code, _, err = run("train", str(config), "base_model=someone/another-model")
        assert (code, "cannot use a GPU" in err) == (2, True)
        assert not home.exists()

    def test_whoever_wants_the_processor_hides_the_card(
        self, run: Command, config: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        code, out, _ = run("train", str(config), "base_model=demo-tiny", "--max-steps", "0")
        assert (code, "Dry run" in out) == (0, True)

    def test_an_answer(self, run: Command, config: Path, tmp_path: Path) -> None:
        folder = RunFolder(tmp_path / "there")
        folder.path.mkdir()
        folder.config.write_text(config.read_text("utf-8"), "utf-8")
        code, _, err = run("generate", str(folder.path), "--prompt", "hi")
        assert (code, "cannot use a GPU" in err) == (2, True)

    def test_a_measurement(self, run: Command, config: Path) -> None:
        code, _, err = run("fit", str(config))
        assert (code, "cannot use a GPU" in err) == (2, True)

    @pytest.mark.parametrize("here", [(), (RTX_4090,)])
    def test_a_run_that_was_planned_on_another_computer(
        self, run: Command, config: Path, tmp_path: Path, nvml: FakeDriver, here: tuple[str, ...]
    ) -> None:
        nvml.set(*here)
        folder = RunFolder(tmp_path / "there")
        folder.path.mkdir()
        folder.config.write_text(config.read_text("utf-8"), "utf-8")
        folder.plan.write_text(json.dumps({"device": {"kind": "cuda", "name": "H100"}}), "utf-8")
        code, _, err = run("resume", str(folder.path))
        assert code == 2
        assert "no GPU can be used here" in err or "cannot use a GPU" in err
        assert not folder.events.exists()


class TestTrainIsRefusedWhereItDoesNotFit:
    @pytest.fixture(autouse=True)
    def small_gpu(self, nvml: FakeDriver) -> None:
        nvml.set(SMALL_GPU)

    def test_with_exit_status_3_and_before_there_is_a_run(
        self, run: Command, config: Path, home: Path
    ) -> None:
        code, out, err = run("train", str(config))
        assert (code, out) == (3, "")
        lines = err.strip().splitlines()
        assert len(lines) == 3
        assert re.fullmatch(r"It does not fit: \d+\.\d GiB are needed\.", lines[0])
        assert lines[1] == "Small can give 3.8 GiB of 4.0 GiB."
        assert lines[2].endswith("--anyway starts it all the same.")
        assert not home.exists()

    def test_and_what_it_names_instead_would_fit(
        self, run: Command, config: Path, nvml: FakeDriver
    ) -> None:
        nvml.set(SMALL_GPU.replace("4294967296", "8589934592"))
        _, _, err = run("train", str(config))
        (values,) = re.findall(r"It fits with: (.*); these can stand behind the config", err)
        assert "adapter=qlora load_in_4bit=true" in values
        assert run("estimate", str(config))[0] == 3
        code, out, _ = run("estimate", str(config), *values.split(" "))
        assert (code, out[:6]) == (0, "✓ fits")

    @needs_trainer
    def test_unless_anyway(
        self, run: Command, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("engine.hardware.reading.read_torch_cuda", lambda: "13.0")
        folder = tmp_path / "here"
        changes = [f"base_model={write_shape(tmp_path / 'model')}", f"output_dir={folder}"]
        assert run("train", str(config), *changes)[0] == 3
        assert not folder.exists()
        code, _, err = run("train", str(config), *changes, "--anyway")
        assert code == 2, err
        # The torch of the tests computes on the CPU alone, which the trainer sees.
        (ended,) = [e.event for e in Follower(folder / "events.jsonl").read() if is_end(e.event)]
        assert ended.outcome == "failed"
        assert ended.what == "The run is planned for Small, and no GPU can be used here."
        assert "sees none" in ended.why
        assert status(RunFolder(folder)) == "failed"
        plan = json.loads((folder / "plan.json").read_text("utf-8"))
        assert plan["estimate"]["verdict"] == "does not fit"
        assert plan["device"]["uuid"] == "GPU-cccc-1"


class TestPrecision:
    def test_a_card_before_ampere_trains_in_float32_and_says_so(
        self, run: Command, config: Path
    ) -> None:
        why = "bfloat16 begins with compute capability 8.0, and T4 has 7.5"
        for card, said in (("T4", True), ("RTX 4090", False)):
            for words in (("estimate", str(config)), ("recommend", "--model", "ministral-3-3b")):
                _, out, _ = run(*words, "--assume", card)
                assert (why in out) == said, out

    def test_bfloat16_is_not_emulated_there(
        self, run: Command, config: Path, nvml: FakeDriver, home: Path
    ) -> None:
        _, out, _ = run("estimate", str(config), "bf16=true", "--assume", "T4")
        assert "✗ bf16: It has compute capability 7.5" in out
        nvml.set("gpu name=Tesla_T4 uuid=GPU-t4 total=16106127360 cc=7.5")
        code, _, err = run("train", str(config), "bf16=true")
        assert code == 2
        assert err.startswith("bf16: true cannot be used on T4.")
        assert not home.exists()


class TestShardedOptimizers:
    FILE = str(Path(__file__).parents[1] / "golden" / "config" / "mistral4-fft-text.yml")

    def test_one_that_cannot_be_sharded_is_refused_with_the_one_that_can(
        self, run: Command
    ) -> None:
        code, out, err = run("estimate", self.FILE, "--assume", "H200 x8")
        assert (code, out) == (2, "")
        assert "optimizer: adamw_bnb_8bit cannot be sharded, and fsdp_config is set." in err
        assert "Write optimizer: adamw_torch_8bit." in err

    def test_no_line_proposes_one(self, run: Command) -> None:
        code, out, _ = run(
            "estimate", self.FILE, "optimizer=adamw_torch_8bit", "--assume", "H200 x8"
        )
        assert code in (0, 3)
        assert not {"bnb", "paged"} & set(re.findall("bnb|paged", out)), out
