"""A finished result gets its card, and goes to its repository on the hub where one is named.

Repositories are made private: who wants others to see a model opens it on the hub. A run never
fails by it; the upload can be repeated at any time.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from engine.child import child_environment
from engine.config import RunConfig, read_config
from engine.errors import UserError, WorkError
from engine.events import Note, Phase
from engine.hub_id import REPOSITORY_NAMES, is_repository_name
from engine.publish.card import write_card
from engine.runs import RunFolder
from engine.runs.folder import require_unchanged
from engine.visible import first_line, visible


def publish_result(run: RunFolder, result: Path, config: RunConfig) -> Iterator[Note | Phase]:
    """Write README.md into `result`, and upload it where the config names a repository.

    Fails no run, whose weights are safe on the disk: what goes wrong becomes a note that says how
    to repeat it.
    """
    try:
        write_card(run, result)
    except (OSError, UserError) as error:
        yield Note("warning", f"the model card could not be written: {error}")
    if config.hub_model_id:
        yield Phase("upload", detail=config.hub_model_id)
        worked, message = _push_in_own_process(run)
        yield Note("info" if worked else "warning", message)


def push(run: RunFolder, repository: str | None = None) -> str:
    """Upload the run's adapter or model to `repository`, else to the config's hub_model_id.

    Returns its address. A repository that is not there yet is made, private. Raises UserError where
    none is named or nothing is finished, WorkError where the hub refuses or cannot be reached.
    """
    config = read_config(run.config).config
    name = repository or config.hub_model_id
    if not name:
        raise UserError(
            "No repository is named.",
            "The run's config has no hub_model_id.",
            f"Name one: windtunnel push {visible(run.name, one_line=True)} --to you/your-model",
        )
    folder = run.model if config.adapter is None else run.adapter
    if not folder.is_dir():
        raise UserError(
            f"The run {visible(run.name, one_line=True)} has no finished result.",
            f"There is no {visible(str(folder), one_line=True)}.",
            "Resume it, or wait for its end.",
        )
    if not is_repository_name(name):
        raise UserError(
            f"{visible(name, one_line=True)} is no name of a repository.",
            REPOSITORY_NAMES,
            "Correct hub_model_id, or name another: --to you/your-model",
        )
    require_unchanged(run, folder)
    # Imported here: `import engine.publish` stays light.
    import huggingface_hub
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()
    try:
        made = huggingface_hub.create_repo(name, private=True, exist_ok=True)
        huggingface_hub.upload_folder(
            repo_id=made.repo_id, folder_path=folder, commit_message=f"Windtunnel run {run.name}"
        )
    # A lost connection is an error of the client's HTTP library, which is another in each release.
    except Exception as error:
        raise WorkError(
            f"{visible(name, one_line=True)} could not be uploaded.",
            f"{first_line(error)}.",
            f"Log in with `hf auth login`, then repeat it: {repeat_command(run)}",
        ) from error
    return str(made)


def _push_in_own_process(run: RunFolder) -> tuple[bool, str]:
    """Whether it worked, and one sentence: a trainer leaves the hub for good once its model and
    rows are there, so a process of its own does it."""
    environment = child_environment()
    environment.pop("HF_HUB_OFFLINE", None)
    done = subprocess.run(
        [sys.executable, "-m", "engine.publish.hub", str(run.path)],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        errors="replace",
    )
    if done.returncode == 0:
        return True, f"uploaded to {visible(done.stdout.strip(), one_line=True)} (private)"
    error = visible((done.stderr.strip().splitlines() or ["no reason given."])[-1], one_line=True)
    return False, f"not uploaded: {error} Repeat it with: {repeat_command(run)}"


def repeat_command(run: RunFolder) -> str:
    return f"windtunnel push {visible(str(run.path), one_line=True)}"


def main() -> int:
    """Upload the result of the run in the folder that is named; prints its address."""
    try:
        print(push(RunFolder(Path(sys.argv[1]).resolve())))
    except UserError as error:
        print(error.what, error.why, file=sys.stderr)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
