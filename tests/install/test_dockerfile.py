"""The Dockerfile's instructions, carried out without Docker in a bare Debian of the same tools.

Its base image cannot be had everywhere: a fresh system of this computer's Debian stands in, where
root runs every RUN line as written. That the image itself can be built is not shown.
"""

import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.install.resolve import ROOT, NoIndex, Resolver

INSTRUCTIONS = [
    tuple(line.split(maxsplit=1))
    for line in (ROOT / "Dockerfile").read_text("utf-8").replace("\\\n", "").splitlines()
    if line and not line.startswith("#")
]


def arguments(word: str) -> list[str]:
    return [rest for name, rest in INSTRUCTIONS if name == word]


def test_it_ends_as_another_user_than_root_with_the_command_for_entry() -> None:
    assert arguments("USER") == ["pilot"]
    assert arguments("ENTRYPOINT") == ['["windtunnel"]']
    assert arguments("VOLUME") == arguments("WORKDIR") == ["/data"]


class System:
    """A bare Debian in a folder, and what the instructions have set so far."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
        self.environment = {"PATH": path, "HOME": "/root", "DEBIAN_FRONTEND": "noninteractive"}
        self.user, self.place = "root", "/"

    def run(self, line: str) -> str:
        """One line, in a process that takes its mounts with it. Fails the test where it fails."""
        proc = f"mount -t proc proc {shlex.quote(str(self.folder / 'proc'))}"
        inner = f"cd {self.place} && {line}"
        command = ["chroot", f"--userspec={self.user}", str(self.folder), "/bin/sh", "-c", inner]
        done = subprocess.run(
            ["unshare", "--mount", "sh", "-c", f"{proc} && exec {shlex.join(command)}"],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    def carry_out(self, word: str, rest: str) -> None:
        """One instruction."""
        if word == "RUN":
            self.run(rest)
        elif word == "COPY":
            assert rest == ". /src"
            files = subprocess.run(
                ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
            )
            for name in files.stdout.splitlines():
                target = self.folder / "src" / name
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, target)
        elif word == "ENV":
            for each in shlex.split(rest):
                name, _, value = each.partition("=")
                self.environment[name] = value.replace("$PATH", self.environment["PATH"])
        elif word == "USER":
            self.user, self.environment["HOME"] = rest, f"/home/{rest}"
        elif word == "WORKDIR":
            self.place = rest


@pytest.fixture
def system() -> Iterator[System]:
    """Debian as on this computer, with its mirror and its certificates."""
    if os.geteuid() or not shutil.which("debootstrap"):
        pytest.skip("a bare Debian is made by root, with debootstrap")
    try:
        Resolver("Linux x86_64", "3.12").resolve([])
    except NoIndex as error:
        pytest.skip(f"the package index cannot be reached: {error}")
    targets = ["apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE)"]
    listed = subprocess.run(targets, capture_output=True, text=True, check=True).stdout
    mirror, release = listed.split()[:2]
    with tempfile.TemporaryDirectory(prefix="windtunnel-debian-") as name:
        folder = Path(name, "root")
        subprocess.run(
            ["debootstrap", "--variant=minbase", release, str(folder), mirror],
            stdout=subprocess.DEVNULL,
            check=True,
        )
        for place in ("etc/apt", "usr/local/share/ca-certificates"):
            shutil.copytree(Path("/", place), folder / place, dirs_exist_ok=True)
        yield System(folder)


@pytest.mark.slow
def test_its_run_lines_make_a_whole_windtunnel_for_a_user(system: System) -> None:
    for word, rest in INSTRUCTIONS:
        system.carry_out(word, rest)
    assert system.run("id --user --name").strip() == "pilot"
    assert "ministral-3-3b" in system.run("windtunnel models")
    assert "No package is missing" in system.run("windtunnel doctor")
    # What triton does at the first launch of a kernel.
    include = "import sysconfig; print(sysconfig.get_path('include'))"
    system.run(
        "echo '#include <Python.h>' > /tmp/x.c"
        f' && gcc -shared -fPIC -I"$(python -c "{include}")" /tmp/x.c -o /tmp/x.so'
    )
    system.run("touch /data/rows.jsonl && windtunnel runs")
