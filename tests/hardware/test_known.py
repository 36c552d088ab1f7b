"""`--assume`: which card a text means, and what is refused."""

import re

import pytest

from engine.errors import UserError
from engine.hardware import assume, known_gpus, listed_gpus, poll, speed_of
from engine.hardware.machine import short_name
from engine.units import GIB


@pytest.mark.parametrize(
    ("text", "count", "name", "gibibytes"),
    [
        ("NVIDIA H100 80GB HBM3 x2", 2, "H100 80GB HBM3", 79.65),
        ("RTX 4090", 1, "RTX 4090", 23.99),
        ("rtx4090", 1, "RTX 4090", 23.99),
        ("4090", 1, "RTX 4090", 23.99),
        ("NVIDIA GeForce RTX 3090", 1, "RTX 3090", 24.0),
        ("h100", 1, "H100 80GB HBM3", 79.65),
        ("h100x2", 2, "H100 80GB HBM3", 79.65),
        ("H100:8", 8, "H100 80GB HBM3", 79.65),
        ("H100 PCIe", 1, "H100 PCIe", 79.65),
        ("4 x A100 80GB", 4, "A100-SXM4-80GB", 80.0),
        ("A100-40g", 1, "A100-SXM4-40GB", 40.0),
        ("2 × B200", 2, "B200", 179.06),
        ("8*H200", 8, "H200", 140.4),
        ("A6000", 1, "RTX A6000", 47.99),
        ("dgx spark", 1, "GB10", 119.68),
        ("24 GB", 1, "24 GB GPU", 24.0),
        ("2x80GB", 2, "80 GB GPU", 80.0),
        ("24gb x 2", 2, "24 GB GPU", 24.0),
        ("16 GB GPU", 1, "16 GB GPU", 16.0),  # as it is called once it is planned
        ("80 GiB", 1, "80 GB GPU", 80.0),
        ("RTX 3060", 1, "RTX 3060", 12.0),
        ("RTX 3060 x2", 2, "RTX 3060", 12.0),
        ("2x RTX 3060 12 GB", 2, "RTX 3060", 12.0),
        ("rtx4060ti 16g", 1, "RTX 4060 Ti 16GB", 16.0),
        ("5060 Ti 8GB", 1, "RTX 5060 Ti 8GB", 7.96),
        ("RTX 5060 8GB", 1, "RTX 5060", 7.96),
        ("RTX 4060 8 GB x2", 2, "RTX 4060", 8.0),
        ("L40", 1, "L40", 44.99),
        ("A10G", 1, "A10G", 22.49),
        ("GB200", 1, "GB200", 185.03),
        ("B300 x8", 8, "B300 SXM6 AC", 268.59),
        # Not listed: by memory, and the name tells the generation.
        ("RTX 3060 8GB", 1, "RTX 3060 8GB", 8.0),
        ("RTX 3080 12 GB x2", 2, "RTX 3080 12GB", 12.0),
        ("NVIDIA GeForce RTX 4090 Laptop GPU 16GB", 1, "RTX 4090 Laptop GPU 16GB", 16.0),
        ("A100 64GB", 1, "A100 64GB", 64.0),
    ],
)
def test_a_text_means_cards(text: str, count: int, name: str, gibibytes: float) -> None:
    machine = assume(text)
    assert machine.assumed
    assert machine.usable_gpus == machine.gpus
    assert [gpu.uuid for gpu in machine.gpus] == [f"planned-{index}" for index in range(count)]
    for gpu in machine.gpus:
        assert gpu.short_name == name
        assert gpu.memory_total_bytes == gpu.memory_free_bytes
        assert gpu.memory_total_bytes == pytest.approx(gibibytes * GIB, abs=0.006 * GIB)
        assert gpu.unified is (name == "GB10")
    assert poll(machine).gpus == machine.gpus


@pytest.mark.parametrize(
    ("text", "nodes", "count", "name"),
    [
        ("8 x 8 H100", 8, 8, "H100 80GB HBM3"),
        ("8x8 H100 80GB", 8, 8, "H100 80GB HBM3"),
        ("2 x 4 x A100 80GB", 2, 4, "A100-SXM4-80GB"),
        ("2 x H100 x8", 2, 8, "H100 80GB HBM3"),
        ("2 x 4 3090 Ti", 2, 4, "RTX 3090 Ti"),
        ("2 x 3090 Ti", 1, 2, "RTX 3090 Ti"),
        ("2 x 4 x 80 GB", 2, 4, "80 GB GPU"),
        ("H100 x64", 8, 8, "H100 80GB HBM3"),
        ("H100 x10", 1, 10, "H100 80GB HBM3"),
    ],
)
def test_computers_come_before_their_cards(text: str, nodes: int, count: int, name: str) -> None:
    machine = assume(text)
    assert (machine.nodes, len(machine.gpus)) == (nodes, count)
    assert machine.gpus[0].short_name == name
    assert str(nodes) in machine.problems[0].what or nodes == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("A100", "A100-SXM4-40GB (40.0 GiB) or A100-SXM4-80GB (80.0 GiB)"),
        ("RTX 6000", "RTX 6000 Ada Generation (48.0 GiB) or RTX PRO 6000"),
        ("4060 Ti", "RTX 4060 Ti 8GB (8.0 GiB) or RTX 4060 Ti 16GB (16.0 GiB)"),
        ("L41", "L40 (45.0 GiB)"),
        ("RTX 3050 Ti", "Write that too, as in --assume 'RTX 3050 Ti 8GB'"),
        ("V100", "is 7.0, and the torch of the package index begins with 7.5."),
        ("Tesla P40 24GB", "Tesla P40 is too old to plan for."),
        ("RTX 3060 0GB", "Memory is more than 0"),
        ("RTX 3060 99999GB", "Memory is more than 0 and at most"),
        ("RTX 4091", "RTX 4090 (24.0 GiB)"),
        ("Radeon", "Known are T4, A10, L4, RTX 4090"),
        ("", "No GPU is named. Known are "),
        ("x2", "No GPU is named. Known are "),
        ("MX450", "There is no GPU named MX450."),
        ("0 x H100", "0 GPUs cannot be planned for."),
        ("H100 x 5000", "5000 GPUs cannot be planned for."),
        ("0 GB", "Memory is more than 0"),
        ("9" * 5000 + " GB", "Memory is more than 0"),
        ("H100 x" + "9" * 5000, "There is no GPU named H100 x999"),
        ("99999 GB", "Memory is more than 0 and at most"),
        ("\x1b[31mred", "There is no GPU named ␛[31mred."),
    ],
)
def test_a_text_that_means_no_one_card_names_the_nearest(text: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)) as caught:
        assume(text)
    assert caught.value.exit_status == 2
    assert "--assume '" in caught.value.fix


@pytest.mark.parametrize("known", known_gpus(), ids=lambda known: known.name)
def test_every_known_card_is_found_by_its_names(known) -> None:
    # "RTX 4060 Ti" is the driver's name of two cards.
    shared = {name for other in known_gpus() if other is not known for name in other.spellings}
    own = {known.name, short_name(known.name), known.name.lower(), *known.aliases}
    for spelling in own - {each for each in own if each.replace(" ", "").lower() in shared}:
        (gpu,) = assume(spelling).gpus
        assert (gpu.name, gpu.compute_capability) == (known.name, known.compute_capability)
        assert gpu.architecture
    assert known.source
    (note,) = assume(known.name).problems
    assert known.source in note.why


@pytest.mark.parametrize("known", known_gpus(), ids=lambda known: known.name)
def test_the_name_of_a_card_that_is_not_listed_tells_as_much_as_of_one_that_is(known) -> None:
    """The patterns of generations against every card of the list, with a memory that none has."""
    name = re.sub(r"\b\d+GB\b", "", short_name(known.name))
    (gpu,) = assume(f"{name} 1 GB").gpus
    assert gpu.compute_capability == known.compute_capability
    assert gpu.memory_total_bytes == GIB


def test_tables_show_some_of_the_cards() -> None:
    listed = listed_gpus()
    assert {"NVIDIA H100 80GB HBM3", "Tesla T4"} <= {gpu.name for gpu in listed}
    assert len(listed) < len(known_gpus())
    assert all(gpu.speed for gpu in listed)


def test_a_card_is_as_fast_as_its_namesake_with_other_memory() -> None:
    speed = speed_of("NVIDIA GeForce RTX 4060 Ti")
    assert speed == speed_of("NVIDIA GeForce RTX 4060 Ti 16GB")
    assert speed is not None
    assert speed_of("NVIDIA GeForce RTX 2080 Ti") is None


def test_a_plan_says_how_well_the_memory_is_known() -> None:
    (note,) = assume("H100 PCIe").problems
    assert note.id == "planned"
    assert note.why.startswith("Its memory is not checked: ")
