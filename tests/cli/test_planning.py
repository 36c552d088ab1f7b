"""`recommend`, `estimate`, `fit` and train's refusal: what they print, exit status, JSON."""

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from engine.catalog import find_model
from engine.config import DatasetConfig, read_config
from engine.events import Ended
from engine.hardware import read_machine
from engine.plan import cpu_device
from engine.plan.measured import HOME_VARIABLE
from engine.runs import Follower, RunFolder, status
from engine.units import GIB
from engine.wizard.draft import Draft
from engine.wizard.start import plan_run, spread, why_not
from tests.fakes.nvml import RTX_4090, FakeDriver
from tests.fakes.processes import ROOT
from tests.support.commands import Call
from tests.support.extras import needs_trainer
from tests.support.written_runs import write_run

SAMPLE = ROOT / "presets" / "samples" / "harbour-pilot" / "train.jsonl"
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
FIT, FITTER = ("fit", "tiny.yml"), "tests.fakes.fitter"
ESTIMATE_KEYS = {
    *("peak_allocated_bytes", "device_bytes", "host_bytes", "disk_bytes", "parts"),
    *("trainable_parameters", "total_parameters", "targets", "verdict", "range_bytes", "source"),
}


@pytest.fixture(autouse=True)
def _files(tmp_path: Path) -> None:
    """large.yml and its rows, where the commands work."""
    (tmp_path / "rows.jsonl").write_bytes(SAMPLE.read_bytes())
    (tmp_path / "large.yml").write_text(LARGE, "utf-8")


class TestRecommend:
    def test_the_verdict_comes_first_and_the_config_reads(self, call: Call, tmp_path: Path) -> None:
        code, out, err = call("recommend", "--model", "ministral-3-3b", "--assume", "RTX 4090")
        assert (code, err) == (0, "")
        assert out.startswith("✓ fits: needs ")
        assert "RTX 4090 can give 22.8 of 24.0\n" in out
        assert "\n✗ full: " in out
        (tmp_path / "printed.yml").write_text(out[out.index("# A Windtunnel config") :], "utf-8")
        assert read_config(tmp_path / "printed.yml").config.adapter == "lora"

    def test_json_holds_what_the_contract_promises(self, call: Call) -> None:
        asked = ("--model", "magistral-small-2509", "--assume", "24 GB", "lora_r=8")
        printed = call.document("recommend", *asked)
        assert printed.keys() >= {"config", "reasons", "estimate", "alternatives", "device"}
        assert printed["config"]["lora_r"] == 8
        assert printed["reasons"]["lora_r"].startswith("yours (recommended 32: ")
        assert set(printed["config"]) - {"base_model"} <= set(printed["reasons"])
        assert printed["estimate"].keys() >= ESTIMATE_KEYS
        assert {"name", "changes", "device_bytes", "verdict", "trade"} <= set(
            printed["alternatives"][0]
        )
        assert printed["device"]["planned"]

    def test_the_written_config_is_what_estimate_reads(self, call: Call, tmp_path: Path) -> None:
        asked = ("--model", "ministral-3-8b", "--assume", "RTX 4090", "-o", "made.yml")
        advised = call.document("recommend", *asked)["estimate"]
        text = (tmp_path / "made.yml").read_text("utf-8")
        assert "learning_rate: 0.0002  # usual for adapters, at any rank\n" in text
        read_back = call.document("estimate", "made.yml", "--assume", "RTX 4090")
        assert {key: read_back[key] for key in advised} == advised

    def test_it_says_how_to_train_what_it_wrote(self, call: Call) -> None:
        code, out, _ = call("recommend", "--model", "demo-tiny", "-o", "made.yml")
        assert code == 0
        assert out.endswith("Written to made.yml. Train it with: windtunnel train made.yml\n")
        assert "base_model" not in out

    def test_a_full_fine_tune_is_asked_for_by_no_adapter(self, call: Call) -> None:
        for nothing in ("adapter=", "adapter=null"):
            asked = ("--model", "ministral-3-3b", "--assume", "H100", nothing)
            printed = call.document("recommend", *asked)
            assert "adapter" not in printed["config"]
            assert printed["config"]["learning_rate"] == 2e-5
            assert printed["reasons"]["adapter"].startswith("yours (recommended lora: ")

    def test_a_model_that_is_not_trained_yet_says_so(self, call: Call, tmp_path: Path) -> None:
        config = dict(find_model("ministral-3-3b").config)
        packed = json.dumps(config | {"quantization_config": {"quant_method": "awq"}})
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed" / "config.json").write_text(packed)
        code, out, _ = call("recommend", "--model", "./packed", "--assume", "H200")
        assert code == 0
        assert "✗ not trained yet: Its weights are stored as AWQ" in out

    def test_more_cards_than_a_run_uses_are_said(self, call: Call) -> None:
        _, out, _ = call("recommend", "--model", "ministral-3-3b", "--assume", "H100 x2")
        assert "· there are 2; this run uses 2\n" in out

    def test_without_a_planned_card_the_one_here_counts(self, call: Call, nvml: FakeDriver) -> None:
        nvml.set(RTX_4090)
        printed = call.document("recommend", "--model", "ministral-3-3b")
        assert printed["device"]["uuid"] == "GPU-bbbb-1"
        assert not printed["device"]["planned"]
        assert printed["attention"]["backend"] == "flash_attention_torch"
        assert "attn_implementation" not in printed["config"]
        used = 25757220864 - 600000000 - 400000000
        assert printed["device"]["can_give_bytes"] <= used


class TestRecommendWithData:
    DATA = ("--data", "rows.jsonl", "--model", "demo-tiny")

    def test_lengths_come_from_the_rows(self, call: Call) -> None:
        printed = call.document("recommend", *self.DATA, "--assume", "RTX 4090")
        assert "longest row has 70 tokens" in printed["reasons"]["sequence_len"]
        assert "104 rows are few" in printed["reasons"]["num_epochs"]
        assert printed["config"]["datasets"][0]["path"] == "rows.jsonl"
        assert len(printed["config"]["sample_prompts"]) == 3

    def test_a_config_saved_elsewhere_finds_its_rows(self, call: Call, tmp_path: Path) -> None:
        (tmp_path / "configs").mkdir()
        code, _, err = call("recommend", *self.DATA, "-o", "configs/made.yml")
        assert (code, err) == (0, "")
        os.chdir(tmp_path / "configs")
        (given,) = read_config("made.yml").config.datasets
        assert given.path == str(tmp_path / "rows.jsonl")
        assert call.document("check", "made.yml")["usable"] == 104

    def test_rows_that_none_can_be_used_of_are_refused(self, call: Call, tmp_path: Path) -> None:
        (tmp_path / "rows.jsonl").write_text('{"messages": []}\n', "utf-8")
        code, out, err = call("recommend", *self.DATA)
        assert (code, out) == (2, "")
        assert "No row of rows.jsonl can be used." in err


class TestEstimate:
    def test_with_room_it_says_what_computing_every_layer_once_gains(self, call: Call) -> None:
        _, out, _ = call("estimate", "large.yml", "--assume", "H100")
        (line,) = [line for line in out.splitlines() if "would fit" in line]
        assert re.match(
            r"· gradient_checkpointing=false would fit: [\d.]+ of 75.7 GiB, every", line
        )
        faster = call.document("estimate", "large.yml", "--assume", "H100")["faster"]
        assert faster["changes"] == {"gradient_checkpointing": False}
        assert faster["verdict"] == "fits"
        more = "large.yml", "gradient_checkpointing=false"
        assert call.document("estimate", *more, "--assume", "H100")["faster"] is None

    def test_json_holds_what_the_contract_promises(self, call: Call) -> None:
        printed = call.document("estimate", "large.yml", "--assume", "RTX 4090")
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
        self, call: Call, assumed: str, mark: str, code: int
    ) -> None:
        found, out, err = call("estimate", "large.yml", "--assume", assumed)
        assert (found, err) == (code, "")
        assert out.startswith(f"{mark}: needs ")
        assert call("estimate", "large.yml", "--assume", assumed, "--json")[0] == code

    def test_parts_modules_and_parameters_are_listed(self, call: Call) -> None:
        Path("rows.jsonl").unlink()
        out = call("estimate", "large.yml", "lora_target_modules=[q_proj]", "--assume", "4090")[1]
        assert re.search(r"^  linear +\d+\.\d GiB$", out, re.MULTILINE)
        assert re.search(r"^  driver and slack +\d+\.\d GiB$", out, re.MULTILINE)
        assert (
            "8,192 tokens at once; 2,981,888 of 3,849,090,048 parameters are trainable (0.08%)"
            in out
        )
        assert "adapter on 26 modules by q_proj\n" in out

    def test_what_axolotl_would_hold_is_named_where_it_differs(self, call: Call) -> None:
        _, out, _ = call("estimate", "large.yml", "--assume", "4090")
        (line,) = [line for line in out.splitlines() if "Axolotl would hold" in line]
        assert line.startswith("· without driver and slack ")
        _, out, _ = call(
            "estimate", "large.yml", "base_model=magistral-small-2507", "--assume", "H200"
        )
        assert "Axolotl" not in out  # it has no vision tower
        found = call.document("estimate", "large.yml", "--assume", "4090")
        gained = sum(found["axolotl"]["differences"].values())
        assert found["axolotl"]["peak_allocated_bytes"] == found["peak_allocated_bytes"] + gained

    def test_changes_are_estimated_and_not_written(self, call: Call) -> None:
        def needed(*changes: str) -> int:
            found = call.document("estimate", "large.yml", *changes, "--assume", "H100")
            return int(found["device_bytes"])

        Path("rows.jsonl").unlink()
        assert needed("micro_batch_size=8") > needed() > needed("adapter=qlora", "load_in_4bit=1")
        assert Path("large.yml").read_text("utf-8") == LARGE

    def test_the_rows_are_counted_and_the_deciding_one_is_named(self, call: Call) -> None:
        plain = ("estimate", "large.yml", "sample_packing=false", "--assume", "4090")
        _, out, _ = call(*plain)
        assert re.search(r"^row \d+ has 70 tokens$", out, re.MULTILINE)
        assert re.search(
            r"^· \d+ steps, less than a minute at .* tokens a second \(formula\)$",
            out,
            re.MULTILINE,
        )
        counted = call.document(*plain)
        assert counted["rows_counted"] == 104
        assert counted["tokens_at_once"] == 4 * 70
        Path("rows.jsonl").unlink()
        _, out, _ = call(*plain)
        assert "rows are taken to have sequence_len: 2,048 tokens (its rows could not be" in out
        assert call.document(*plain)["rows_counted"] is None

    def test_what_does_not_fit_is_followed_by_ladder_and_larger_cards(self, call: Call) -> None:
        Path("rows.jsonl").unlink()
        code, out, _ = call("estimate", "large.yml", "--assume", "8 GB")
        assert code == 3
        assert "to make it fit, each on top of those above:" in out
        assert re.search(r"^✓ .*: \d\.\d GiB, saves \d", out, re.MULTILINE)
        (values,) = re.findall(r"^behind the config, that is: (.*)$", out, re.MULTILINE)
        assert call("estimate", "large.yml", *values.split(), "--assume", "8 GB")[0] == 0
        assert "as it is it fits: " in out
        printed = call.document("estimate", "large.yml", "--assume", "8 GB", status=3)
        assert [rung["verdict"] for rung in printed["ladder"]][-1] == "fits"
        assert all(rung["saves_bytes"] > 0 for rung in printed["ladder"])

    def test_a_model_folder_beside_the_config_is_read(self, call: Call, tmp_path: Path) -> None:
        write_shape(tmp_path / "model")
        (tmp_path / "elsewhere").mkdir()
        os.chdir(tmp_path / "elsewhere")
        config = tmp_path / "large.yml"
        code, out, _ = call("estimate", config, "base_model=model", "--assume", "4090")
        assert code == 0
        assert "3,849,090,048 parameters" in out


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
    def test_before_there_is_a_run(self, call: Call, home: Path, more: tuple[str, ...]) -> None:
        code, out, err = call("train", "large.yml", *more)
        assert (code, out) == (2, "")
        assert re.match(r"The installed torch \S+ cannot use a GPU\.", err)
        assert "Install the build of torch for CUDA" in err
        assert not home.exists()

    def test_a_model_that_has_to_be_fetched_first(self, call: Call, home: Path) -> None:
        code, _, err = call("train", "large.yml", "base_model=someone/another-model")
        assert (code, "cannot use a GPU" in err) == (2, True)
        assert not home.exists()

    def test_the_processor_hides_the_card(
        self, call: Call, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        code, out, _ = call("train", "large.yml", "base_model=demo-tiny", "--max-steps", "0")
        assert (code, "Dry run" in out) == (0, True)

    @pytest.mark.parametrize(
        "words", [("generate", "there", "--prompt", "hi"), ("fit", "large.yml")]
    )
    def test_an_answer_and_a_measurement(self, call: Call, words: tuple[str, ...]) -> None:
        Path("there").mkdir()
        Path("there/config.yml").write_text(LARGE, "utf-8")
        code, _, err = call(*words)
        assert (code, "cannot use a GPU" in err) == (2, True)

    @pytest.mark.parametrize("here", [(), (RTX_4090,)])
    def test_a_run_that_was_planned_on_another_computer(
        self, call: Call, tmp_path: Path, nvml: FakeDriver, here: tuple[str, ...]
    ) -> None:
        nvml.set(*here)
        folder = RunFolder(tmp_path / "there")
        folder.path.mkdir()
        folder.config.write_text(LARGE, "utf-8")
        folder.plan.write_text(json.dumps({"device": {"kind": "cuda", "name": "H100"}}), "utf-8")
        code, _, err = call("resume", str(folder.path))
        assert code == 2
        assert "no GPU can be used here" in err or "cannot use a GPU" in err
        assert not folder.events.exists()


class TestTrainIsRefusedWhereItDoesNotFit:
    @pytest.fixture(autouse=True)
    def small_gpu(self, nvml: FakeDriver) -> None:
        nvml.set(SMALL_GPU)

    def test_with_exit_status_3_and_before_there_is_a_run(self, call: Call, home: Path) -> None:
        code, out, err = call("train", "large.yml")
        assert (code, out) == (3, "")
        lines = err.strip().splitlines()
        assert len(lines) == 3
        assert re.fullmatch(r"It does not fit: \d+\.\d GiB are needed\.", lines[0])
        assert lines[1] == "Small can give 3.8 GiB of 4.0 GiB."
        assert lines[2].endswith("--anyway starts it all the same.")
        assert not home.exists()

    def test_and_what_it_names_instead_would_fit(self, call: Call, nvml: FakeDriver) -> None:
        nvml.set(SMALL_GPU.replace("4294967296", "8589934592"))
        _, _, err = call("train", "large.yml")
        (values,) = re.findall(r"It fits with: (.*); these can stand behind the config", err)
        assert "adapter=qlora load_in_4bit=true" in values
        assert call("estimate", "large.yml")[0] == 3
        code, out, _ = call("estimate", "large.yml", *values.split(" "))
        assert (code, out[:6]) == (0, "✓ fits")

    @needs_trainer
    @pytest.mark.slow  # 7 s: a whole trainer that ends at its card
    def test_unless_anyway(
        self, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("engine.hardware.reading.read_torch_cuda", lambda: "13.0")
        folder = tmp_path / "here"
        changes = [f"base_model={write_shape(tmp_path / 'model')}", f"output_dir={folder}"]
        assert call("train", "large.yml", *changes)[0] == 3
        assert not folder.exists()
        code, _, err = call("train", "large.yml", *changes, "--anyway")
        assert code == 2, err
        # What only the trainer can see: the torch of the tests computes on the CPU alone.
        assert "no GPU can be used here" in err
        assert "Traceback" not in err
        ended = Follower(folder / "events.jsonl").read()[-1].event
        assert isinstance(ended, Ended)
        assert ended.outcome == "failed"
        assert ended.what == "The run is planned for Small, and no GPU can be used here."
        assert "sees none" in ended.why
        assert status(RunFolder(folder)) == "failed"
        plan = json.loads((folder / "plan.json").read_text("utf-8"))
        assert plan["estimate"]["verdict"] == "does not fit"
        assert plan["device"]["uuid"] == "GPU-cccc-1"


class TestCardsThatNobodyLaidOut:
    """Axolotl trains a copy of the model on each card that is there."""

    @pytest.mark.parametrize(
        ("changes", "nodes", "added"),
        [
            ((), 1, ("dp_replicate_size=3",)),
            ((), 2, ("dp_replicate_size=6",)),
            (("dp_shard_size=2",), 1, ()),
            (("resume_from_checkpoint=true", "output_dir=begun"), 1, ("dp_replicate_size=2",)),
            (("resume_from_checkpoint=true", "output_dir=lone"), 1, ()),
        ],
    )
    def test_each_has_a_copy_and_a_run_keeps_what_it_began_with(
        self,
        nvml: FakeDriver,
        tmp_path: Path,
        changes: tuple[str, ...],
        nodes: int,
        added: tuple[str, ...],
    ) -> None:
        nvml.set(*[RTX_4090] * 3)
        for name, begun in (("begun", "dp_replicate_size: 2\n"), ("lone", "")):
            (tmp_path / name).mkdir()
            (tmp_path / name / "config.yml").write_text(LARGE + begun, "utf-8")
        assert spread(tmp_path / "large.yml", changes, nodes) == (*changes, *added)

    def test_and_is_estimated_so(self, call: Call, tmp_path: Path) -> None:
        (tmp_path / "large.yml").write_text(LARGE, "utf-8")
        for more, cards in (((), 4), (("dp_replicate_size=1",), 1)):
            printed = call.document("estimate", "large.yml", *more, "--assume", "RTX 4090 x4")
            assert printed["cards"] == cards


class TestMemoryOfTheComputer:
    """A plan for a CPU counts on all of it; whether it is free is asked where a run starts."""

    @pytest.fixture
    def demo(self, tmp_path: Path) -> Path:
        path = tmp_path / "demo.yml"
        path.write_text(LARGE.replace("ministral-3-3b", "demo-tiny"), "utf-8")
        return path

    @pytest.fixture(autouse=True)
    def busy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("engine.hardware.reading.read_memory", lambda: (16 * GIB, GIB // 4))

    def test_a_plan_does_not_move_with_what_is_free(self) -> None:
        here = read_machine()
        idle, busy = (replace(here, ram_available_bytes=free) for free in (8 * GIB, GIB))
        assert cpu_device(idle) == cpu_device(busy)
        small = cpu_device(replace(here, ram_total_bytes=8 * GIB))
        assert (small.can_give_bytes, small.ram_bytes) == (6 * GIB, 6 * GIB)

    def test_train_says_what_to_close(self, call: Call, demo: Path, home: Path) -> None:
        code, out, err = call("train", str(demo))
        assert (code, out) == (3, "")
        what, why, fix = err.strip().splitlines()
        assert what.startswith("Too little memory is free now: ")
        assert "Other programs leave 0.2 GiB of" in why
        assert fix == "Close some of them and start again; --anyway starts it all the same."
        assert not home.exists()
        assert plan_run(demo, (), anyway=True)

    @pytest.mark.slow  # counts its rows three times
    def test_it_has_to_hold_all_ranks_of_a_run(
        self, call: Call, demo: Path, home: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        one = call.document("estimate", str(demo), "dp_shard_size=2")["device_bytes"]
        memory = 2 * GIB + int(1.5 * one)
        monkeypatch.setattr("engine.hardware.reading.read_memory", lambda: (memory, memory))
        code, out, err = call("train", str(demo), "dp_shard_size=2")
        assert (code, out) == (3, "")
        assert err.startswith("It does not fit: 2 ranks of ")
        assert "Write a smaller dp_shard_size or dp_replicate_size" in err
        assert not home.exists()
        assert plan_run(demo, ("dp_shard_size=1",))

    def test_so_does_one_on_a_card_for_what_it_keeps_beside(
        self, call: Call, nvml: FakeDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        nvml.set(RTX_4090)
        needed = call.document("estimate", "large.yml")["host_bytes"]
        for free, refused in ((needed - 1, True), (needed, False)):
            memory = 64 * GIB, free
            monkeypatch.setattr("engine.hardware.reading.read_memory", lambda found=memory: found)
            code, _, err = call("train", "large.yml")
            assert ("Too little memory is free now" in err, code == 3) == (refused, refused)

    def test_so_do_the_wizard_and_a_question_to_a_run(self, call: Call, tmp_path: Path) -> None:
        machine = read_machine()
        rows = DatasetConfig(path="sample:harbour-pilot")
        draft = Draft(machine=machine, device=cpu_device(machine), model="demo-tiny", dataset=rows)
        error = why_not(draft)
        assert error
        assert error.what.startswith("Too little memory is free now: ")
        asked = write_run(tmp_path / "pilot", base_model="demo-tiny").path
        code, _, err = call("generate", str(asked), "--prompt", "Hi")
        assert (code, "--anyway tries it all the same" in err) == (3, True)


class TestPrecision:
    def test_a_card_before_ampere_trains_in_float32_and_says_so(self, call: Call) -> None:
        why = "bfloat16 begins with compute capability 8.0, and T4 has 7.5"
        for card, said in (("T4", True), ("RTX 4090", False)):
            for words in (("estimate", "large.yml"), ("recommend", "--model", "ministral-3-3b")):
                _, out, _ = call(*words, "--assume", card)
                assert (why in out) == said, out

    def test_bfloat16_is_not_emulated_there(self, call: Call, nvml: FakeDriver, home: Path) -> None:
        code, out, _ = call("estimate", "large.yml", "bf16=true", "--assume", "T4")
        assert code == 2
        assert "✗ bf16: It has compute capability 7.5" in out
        nvml.set("gpu name=Tesla_T4 uuid=GPU-t4 total=16106127360 cc=7.5")
        code, _, err = call("train", "large.yml", "bf16=true")
        assert code == 2
        assert err.startswith("bf16: true cannot be used on T4.")
        assert not home.exists()


class TestShardedOptimizers:
    FILE = str(Path(__file__).parents[1] / "golden" / "config" / "mistral4-fft-text.yml")

    def test_one_that_cannot_be_sharded_is_refused_with_the_one_that_can(self, call: Call) -> None:
        code, out, err = call("estimate", self.FILE, "--assume", "H200 x8")
        assert (code, out) == (2, "")
        assert "optimizer: adamw_bnb_8bit cannot be sharded, and fsdp_config is set." in err
        assert "Write optimizer: adamw_torch_8bit." in err

    def test_no_line_proposes_one(self, call: Call) -> None:
        code, out, _ = call(
            "estimate", self.FILE, "optimizer=adamw_torch_8bit", "--assume", "H200 x8"
        )
        assert code in (0, 3)
        assert not {"bnb", "paged"} & set(re.findall("bnb|paged", out)), out


class TestFit:
    """With a process that needs no torch."""

    @pytest.fixture(autouse=True)
    def measured(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where figures are kept, and tiny.yml."""
        monkeypatch.setenv(HOME_VARIABLE, str(tmp_path / "measured"))
        (tmp_path / "tiny.yml").write_text(
            "base_model: demo-tiny\n"
            "datasets: [{path: gone.jsonl, type: chat_template}]\n"
            "adapter: lora\nsequence_len: 64\nsample_packing: true\n"
        )
        return tmp_path / "measured"

    def test_one_reads_what_was_built_measured_and_kept(self, call: Call, measured: Path) -> None:
        code, out, err = call(*FIT, trainer=FITTER)
        assert code == 0
        assert "64 tokens at once of your rows, on this computer's CPU\n" in out
        assert "of RAM at most" in out
        assert "measured is +25.0% from it" in out
        assert "2,000  tokens/s" in out
        assert "7,200 steps, evaluations aside" in out
        (kept,) = measured.iterdir()
        assert out.endswith(f"Kept in {kept}\n")
        assert "3 steps␛[31m" in err

    def test_a_part_of_a_model_says_so(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FAKE_PART", "1")
        code, out, _ = call(*FIT, trainer=FITTER)
        assert code == 0
        assert "2 of 3 layers, all widths divided by 4: it checks the formula" in out
        assert "of random tokens" in out
        assert "the whole run" not in out

    def test_json_is_one_document_with_what_the_contract_names(self, call: Call) -> None:
        document = call.document(*FIT, "--keep", "ours", trainer=FITTER)
        assert document["peak_allocated_bytes"] == document["formula_bytes"] * 5 // 4
        assert document["tokens_per_second"] == 2000.0
        assert document["estimate"]["parts"]
        assert document["difference"] == pytest.approx(0.25, abs=1e-6)
        assert [Path(path).is_file() for path in document["kept"]] == [True, True]
        assert Path(document["kept"][1]).parent == Path("ours")

    def test_events_are_lines_of_the_vocabulary(self, call: Call) -> None:
        code, out, _ = call(*FIT, "--events", trainer=FITTER)
        assert code == 0
        lines = [json.loads(line) for line in out.splitlines()]
        assert [(line["type"], line["seq"]) for line in lines] == [("phase", 0), ("note", 1)]

    def test_changes_reach_the_measurement(self, call: Call) -> None:
        code, out, err = call(*FIT, "sequence_len=32", "--steps", "5", trainer=FITTER)
        assert code == 0
        assert "32 tokens at once" in out
        assert "5 steps" in err

    def test_what_does_not_fit_leaves_with_3_and_keeps_nothing(
        self, call: Call, measured: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FAKE_FAILS", "It does not fit: memory ran out in step 1.")
        code, _, err = call(*FIT, trainer=FITTER)
        assert code == 3
        said = ["It does not fit: memory ran out in step 1.", "It was full.", "Use less."]
        assert err.splitlines()[-3:] == said
        assert not measured.exists()

    def test_a_plan_knows_the_figure(self, call: Call, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        assert call.document("estimate", "tiny.yml")["tokens_per_second"] is None
        assert call.document(*FIT, trainer=FITTER)
        assert call.document("estimate", "tiny.yml")["tokens_per_second"] == 2000.0

    @needs_trainer
    @pytest.mark.slow
    def test_a_real_process_measures_the_demo_on_its_own_rows(
        self, call: Call, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        demo = ROOT / "presets" / "recipes" / "demo-tiny" / "lora.yml"
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        document = call.document("fit", demo, "--steps", "2")
        assert abs(document["difference"]) < 0.1
        assert (document["whole"], document["own_rows"]) == (True, True)
        assert len(document["losses"]) == 2
        assert document["run_seconds"] > 0
        assert document["device_bytes"] > document["peak_allocated_bytes"]
        plan = call.document("estimate", demo)
        assert plan["tokens_per_second"] == pytest.approx(document["tokens_per_second"])
        assert plan["duration"]["source"] == "measured"
