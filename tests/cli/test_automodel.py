"""The same job for NeMo AutoModel: its YAML, what is refused, and its own loader on it."""

import json
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from engine.config import read_config
from tests.fakes import slurm
from tests.fakes.processes import wait_until
from tests.support.commands import Call
from tests.support.shell import check_script

MEDPIX = Path(__file__).parents[2] / "presets/recipes/mistral-medium-3.5/medpix-64gpu.yml"
GIB = 2**30


def export(call: Call, folder: Path, *words: str, recipe: Path = MEDPIX) -> dict[str, Any]:
    """The YAML that is written."""
    target = folder / "job.yml"
    code, _, err = call("export", recipe, *words, "--to", "automodel", "-o", target)
    assert (code, err) == (0, "")
    found: dict[str, Any] = YAML(typ="safe", pure=True).load(target.read_text("utf-8"))
    return found


def test_the_medpix_job_is_one_command(call: Call, tmp_path: Path) -> None:
    made = export(call, tmp_path)
    config = read_config(MEDPIX).config
    assert made["model"]["pretrained_model_name_or_path"] == "mistralai/Mistral-Medium-3.5-128B"
    assert made["dataset"]["path_or_dataset"] == "mmoukouba/MedPix-VQA"
    steps, layout = made["step_scheduler"], made["distributed"]
    assert (layout["tp_size"], layout["pp_size"], layout["dp_size"]) == (8, 8, None)
    assert layout["sequence_parallel"] is False
    assert made["checkpoint"]["enabled"] is True
    assert (steps["global_batch_size"], steps["local_batch_size"]) == (64, 8)
    assert "SIGUSR1" in steps["preemption_signal"]
    assert made["freeze_config"] == {
        "freeze_vision_tower": True,
        "freeze_modules": [{"glob": "*multi_modal_projector"}],
    }
    assert made["optimizer"]["lr"] == config.learning_rate
    assert made["lr_scheduler"]["min_lr"] == 1e-6
    assert made["dataloader"]["collate_fn"]["max_length"] == config.sequence_len
    assert "validation_dataset" not in made
    check_script(tmp_path / "job.sbatch")
    options = slurm.options_of((tmp_path / "job.sbatch").read_text("utf-8"))
    assert (options["nodes"], options["gpus-per-node"]) == ("8", "8")


def test_both_plans_of_it_are_compared(call: Call, tmp_path: Path) -> None:
    words = ("--to", "automodel", "-o", tmp_path / "job.yml", "--assume", "H100 80GB")
    found = call.document("export", MEDPIX, *words)
    cut, ours = found["automodel"], found["windtunnel"]
    assert (cut["name"], cut["verdict"]) == ("TP 8 x PP 8", "fits")
    # 16 bytes of each of 1/64 of the numbers, and the tower whole: it is cut by neither.
    assert 16 * 125.0e9 / 64 + 4 * 2.68e9 < sum(cut["parts"].values()) < 60 * GIB
    assert [(share["name"], share["verdict"]) for share in ours] == [
        ("FSDP2 over 64", "fits"),
        ("HSDP, 2 copies over 32 each", "fits"),
        ("HSDP, 4 copies over 16 each", "does not fit"),
        ("HSDP, 8 copies over 8 each", "does not fit"),
    ]
    # Half as many stages are filled and drained for less of the time, and 1/64 of the work stays.
    halves = export_sizes(call, tmp_path, "--pipeline", "4", "gradient_accumulation_steps=1")
    assert halves["parts"]["optimizer"] == pytest.approx(cut["parts"]["optimizer"], rel=0.1)
    assert 1 < cut["step_seconds"] / halves["step_seconds"] == pytest.approx(15 / 8 * 4 / 7)
    assert ours[0]["step_seconds"] < cut["step_seconds"]
    assert halves["parts"]["gathered"] > 1.8 * cut["parts"]["gathered"]


def export_sizes(call: Call, folder: Path, *words: str) -> dict[str, Any]:
    target = folder / "other.yml"
    rest = ("--to", "automodel", "-o", target, "--assume", "H100 80GB")
    found: dict[str, Any] = call.document("export", MEDPIX, *words, *rest)["automodel"]
    return found


@pytest.mark.parametrize(
    ("words", "frozen"),
    [
        (
            "unfrozen_parameters=[model\\.language_model\\.,model\\.multi_modal_projector\\.,lm_head]",
            {"freeze_vision_tower": True},
        ),
        (
            "unfrozen_parameters=[model\\.language_model\\.layers,model\\.language_model\\.norm]",
            {
                "freeze_vision_tower": True,
                "freeze_modules": [
                    {"glob": "*multi_modal_projector"},
                    {"glob": "*embed_tokens"},
                    {"glob": "*lm_head"},
                ],
            },
        ),
        ("unfrozen_parameters=[model,lm_head]", {"freeze_vision_tower": False}),
    ],
)
def test_frozen_is_named(words: str, frozen: dict[str, Any], call: Call, tmp_path: Path) -> None:
    assert export(call, tmp_path, words)["freeze_config"] == frozen


def test_an_adapter_is_put_on_the_same_modules(call: Call, tmp_path: Path) -> None:
    made = export(
        call, tmp_path, "adapter=lora", "lora_r=16", "lora_target_modules=[q_proj,v_proj]"
    )
    assert made["peft"]["target_modules"] == [
        "*language_model.layers.*.q_proj",
        "*language_model.layers.*.v_proj",
    ]
    assert (made["peft"]["dim"], made["peft"]["alpha"]) == (16, 32)
    assert (made["model"]["torch_dtype"], "freeze_config" in made) == ("bfloat16", False)


REFUSED = [
    ("dp_shard_size=8 --tensor 8 --pipeline 3", ["does not fit 8 ranks"]),
    ("dp_shard_size=12 --gpus-per-node 6 --tensor 3", ["TP 3", "8 heads"]),
    (
        "dp_shard_size=32 tensor_parallel_size=2 --tensor 1 --pipeline 8",
        ["A step of 32 sequences", "multiple of 64", "Make it 64 sequences"],
    ),
    ("base_model=mistral-small-4", ["is not cut along its matrices", "expert_parallel_size"]),
    ("adapter=qlora load_in_4bit=true", ["quantized"]),
    ("sample_packing=true", ["sample_packing=false"]),
    ("train_on_inputs=true", ["learn the answer alone"]),
    ("max_steps= num_epochs=1.5", ["counts whole epochs"]),
    ("unfrozen_parameters=[model\\.language_model\\.layers\\.8]", ["a part of a group"]),
    ("datasets[0].field_question=prompt", ["no reader for these rows"]),
    ("processor_type=", ["does not say that its rows have images"]),
    ("datasets[0].path=$HOME/rows", ["holds a $"]),
    ("adapter=lora peft_layers_to_transform=[1,2]", ["on some layers"]),
]


@pytest.mark.parametrize(("words", "said"), REFUSED, ids=[words for words, _ in REFUSED])
def test_what_automodel_would_do_wrongly_is_refused(
    words: str, said: list[str], call: Call, tmp_path: Path
) -> None:
    target = tmp_path / "job.yml"
    code, out, err = call("export", MEDPIX, *words.split(), "--to", "automodel", "-o", target)
    assert (code, out) == (2, "")
    assert all(each in err for each in said), err
    assert not target.exists()


@pytest.mark.parametrize("named", ["", "--environment DIR"])
def test_a_job_is_sent_when_environment_model_and_rows_are_there(
    named: str, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("AUTOMODEL_ENV", raising=False)
    words = [word.replace("DIR", str(tmp_path / "own")) for word in named.split()]
    rest = ("--cache", tmp_path / "cache", "--to", "automodel", "-o", tmp_path / "job.yml")
    *_, model, rows = missing = call.document("export", MEDPIX, *words, *rest)["missing"]
    assert ("has no bin/torchrun" if words else "pip install nemo-automodel") in missing[0]
    assert "hf download mistralai/Mistral-Medium-3.5-128B" in model
    assert "load_dataset" in rows
    code, _, err = call("export", MEDPIX, *words, *rest, "--submit")
    assert (code, missing[0]) == (2, " ".join(err.split("\n")).strip())
    # As datasets spells the folder of mmoukouba/MedPix-VQA.
    (tmp_path / "cache" / "datasets" / "mmoukouba___med_pix-vqa").mkdir(parents=True)
    monkeypatch.setenv("AUTOMODEL_ENV", str(tmp_path))
    (tmp_path / "own" / "bin").mkdir(parents=True)
    (tmp_path / "own" / "bin" / "torchrun").touch()
    assert call.document("export", MEDPIX, *words, *rest)["missing"] == [model]


TORCHRUN = """#!/bin/bash
work() {
  if [ "$SLURM_RESTART_COUNT" = 1 ]; then echo "going on"; exit 0; fi
  trap 'echo step-7 > LATEST; exit 0' USR1
  echo working; sleep 60 & wait
}
cd runs/job/checkpoints; work & work & wait; wait
"""
"""Dies of SIGUSR1 itself, as the real one does."""


def test_its_workers_are_told_of_the_limit_and_the_job_goes_on(
    call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", f"{tmp_path / 'slurm'}:/usr/bin:/bin")
    monkeypatch.setenv("FAKE_SLURM", str(tmp_path / "slurm"))
    own = tmp_path / "own" / "bin"
    own.mkdir(parents=True)
    (own / "torchrun").write_text(TORCHRUN, "utf-8")
    (own / "torchrun").chmod(0o755)
    (tmp_path / "runs" / "job" / "checkpoints").mkdir(parents=True)
    export(call, tmp_path, "--environment", str(tmp_path / "own"), "dp_shard_size=16")
    sent = subprocess.run(["sbatch", "job.sbatch"], capture_output=True, text=True, check=True)
    number = sent.stdout.strip()
    log = tmp_path / f"job-{number}.log"
    wait_until(lambda: log.exists() and log.read_text("utf-8").count("working") == 4)
    slurm.scancel("--signal=USR1", "--batch", number)
    job = slurm.wait_for_end(number)
    assert (job["state"], job["restarts"]) == ("COMPLETED", 1), log.read_text("utf-8")
    assert log.read_text("utf-8").count("going on") == 4


PACKAGES = (
    "nemo-automodel==0.7.*",
    "transformers==5.18.0",
    "megatron-fsdp==0.5.0",
    *("torchdata", "torchao", "flashoptim"),
)
"""What its loader and the classes that the YAML names import, beside what is here."""
LOAD = """
import json, sys, torch
from nemo_automodel.cli.utils import resolve_recipe_name
from nemo_automodel.components.config._arg_parser import parse_args_and_load_config
from nemo_automodel.components.utils.model_utils import apply_parameter_freezing
from nemo_automodel.recipes._dist_utils import parse_distributed_section
from nemo_automodel.recipes._typed_config import RecipeConfig
from transformers import Mistral3Config, Mistral3ForConditionalGeneration
config = parse_args_and_load_config(sys.argv[1], argv=[])
typed = RecipeConfig(config)
for name in ("step_scheduler", "checkpoint", "optimizer", "lr_scheduler", "loss_fn"):
    assert getattr(typed, name) is not None
assert typed.vlm_dataloader.dataset_config.path_or_dataset == "mmoukouba/MedPix-VQA"
sizes = parse_distributed_section(config.distributed.to_dict())
with torch.device("meta"):
    model = Mistral3ForConditionalGeneration(Mistral3Config())
apply_parameter_freezing(model, typed.freeze_config)
moved = {name for name, each in model.named_parameters() if each.requires_grad}
print(json.dumps({
    "recipe": resolve_recipe_name(config.recipe),
    "grid": [sizes["tp_size"], sizes["pp_size"]],
    "stage": str(sizes["pipeline_config"].dtype),
    "frozen": sorted({name.split(".")[1] for name, _ in model.named_parameters()}
                     - {name.split(".")[1] for name in moved}),
}))
"""


@pytest.mark.slow
def test_its_own_loader_takes_the_file(call: Call, tmp_path: Path) -> None:
    export(call, tmp_path)
    venv.create(tmp_path / "own", with_pip=True)
    python = tmp_path / "own" / "bin" / "python"
    install = [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *PACKAGES]
    done = subprocess.run(install, capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"the package index has no NeMo AutoModel 0.7: {done.stderr.strip()[-200:]}")
    (packages,) = (tmp_path / "own" / "lib").glob("python*/site-packages")
    here = [path for path in sys.path if path.endswith("site-packages")]
    (packages / "here.pth").write_text("\n".join(here) + "\n", "utf-8")
    loaded = subprocess.run(
        [python, "-c", LOAD, tmp_path / "job.yml"], capture_output=True, text=True
    )
    assert loaded.returncode == 0, loaded.stderr
    assert json.loads(loaded.stdout.splitlines()[-1]) == {
        "recipe": "nemo_automodel.recipes.vlm.finetune.FinetuneRecipeForVLM",
        "grid": [8, 8],
        "stage": "torch.bfloat16",
        "frozen": ["multi_modal_projector", "vision_tower"],
    }
