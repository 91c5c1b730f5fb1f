"""The folder of a run in progress: what it may replace, and what is left of a run without an epoch."""

import contextlib
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ppl_vae.training import saving
from ppl_vae.training.saving import Run


@dataclass
class Folder:
    """The folder of a run, if it has a path.

    Attributes:
        run: the run.
        made: whether ``open`` made the folder.
    """

    run: Run
    made: bool = False

    def open(self, *, overwrite: bool, resume: Callable[[Path], object] | None = None) -> None:
        """Create the run's folder; ``resume``, if given, is called with one that holds a run."""
        folder, replaces = self.run.path, False
        if folder is None:
            return
        if folder.exists() and not folder.is_dir():
            raise FileExistsError(f"output: expected a folder, {folder} is a file")
        # what a write was ended in counts for nothing
        leftovers = {saving.temporary(folder / name).name for name in saving.FILES}
        if folder.is_dir() and any(file.name not in leftovers for file in folder.iterdir()):
            replaces = saving.is_run(folder)
            if not (replaces or (resume is not None and (folder / saving.CONFIG).is_file())):
                raise FileExistsError(f"output: {folder} holds other files than a run; choose another folder")
            if resume is not None:
                resume(folder)
                return
            if not overwrite:
                raise FileExistsError(
                    f"output: {folder} holds a run; set overwrite or resume, or choose another"
                )
        try:
            if replaces:
                for name in (saving.CHECKPOINT, saving.MODEL, saving.HISTORY, saving.EVALUATION):
                    (folder / name).unlink(missing_ok=True)
                if not (folder / "plots").is_symlink():
                    shutil.rmtree(folder / "plots", ignore_errors=True)
            folder.mkdir(parents=True, exist_ok=True)
            saving.write_config(folder, self.run.config)
            self.made = not replaces
        except OSError as error:
            raise OSError(f"output: can't write to {folder}: {error.strerror}") from None

    def remove_if_empty(self) -> None:
        """Remove the folder that ``open`` made if no epoch came to be saved in it."""
        folder = self.run.path
        if folder is None or not self.made or self.run.history:
            return
        for name in saving.FILES:
            (folder / name).unlink(missing_ok=True)
            saving.temporary(folder / name).unlink(missing_ok=True)
        shutil.rmtree(folder / "tensorboard", ignore_errors=True)
        with contextlib.suppress(OSError):  # other files are the caller's
            folder.rmdir()


def open_folders(output: Path, runs: Sequence[Run], *, overwrite: bool) -> list[Folder]:
    """Create the folders of runs in one; nothing is replaced before all are known to be free or runs."""
    if output.exists() and not output.is_dir():
        raise FileExistsError(f"output: expected a folder, {output} is a file")
    own = {run.path for run in runs}
    there = sorted(output.iterdir()) if output.is_dir() else []
    for path in there:
        if path not in own or not saving.is_run(path):
            raise FileExistsError(
                f"output: {output} holds {path.name}, which is none of these {len(own)} runs; choose another"
            )
    if there and not overwrite:
        raise FileExistsError(f"output: {output} holds runs; set overwrite, or choose another")
    folders = [Folder(run) for run in runs]
    for folder in folders:
        folder.open(overwrite=overwrite)
    return folders
