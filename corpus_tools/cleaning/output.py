"""The folder of a cleaned corpus: filled out of sight, then all at once, and never in the place of another.

Files are made in `_unfinished/`, a name that `octant prepare` passes over.  When all are there they move up,
`_report.json` last: it says from what the folder was made, and that it is whole.  A run that was killed while they
moved is finished when it is given again; one that was killed before begins anew.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from corpus_tools.cleaning.report import REPORT, REPORT_TEXT, Report
from corpus_tools.inputs import InputFile
from engine.errors import RequestError

UNFINISHED = "_unfinished"
OURS = re.compile(rf"clean-\d{{5}}\.jsonl\.gz(\.partial)?|{re.escape(REPORT)}|{re.escape(REPORT_TEXT)}")


def begin(folder: Path, inputs: Sequence[InputFile], made_from: str, overwrite: bool) -> Report | None:
    """Make room for files in `folder / UNFINISHED`; or the report where just this was cleaned already.

    Raises:
        RequestError: the folder holds anything else, unless it is of our making and `overwrite` is asked for.
    """
    staged = folder / UNFINISHED
    _refuse_foreign(folder, inputs)
    if not overwrite:
        report = Report.read(staged)
        if report is not None and report.made_from == made_from:
            finish(folder)
        report = Report.read(folder)
        if report is not None and report.made_from == made_from:
            return report
        if any(path != staged for path in _content(folder)):
            raise RequestError(
                f"--output {folder} holds what was cleaned from other files or with other rules: give another folder, "
                "or replace it with --overwrite"
            )
    shutil.rmtree(staged, ignore_errors=True)
    staged.mkdir(parents=True)
    return None


def finish(folder: Path) -> None:
    """Everything is there: move it up, in the place of what was there."""
    staged = folder / UNFINISHED
    if (staged / REPORT_TEXT).exists():  # it moves first, so nothing has moved yet
        (folder / REPORT).unlink(missing_ok=True)
        for path in _content(folder):
            if path != staged:
                path.unlink()
    for path in sorted(_content(staged), key=lambda path: (path.name == REPORT, path.name != REPORT_TEXT)):
        os.replace(path, folder / path.name)
    staged.rmdir()


def _refuse_foreign(folder: Path, inputs: Sequence[InputFile]) -> None:
    staged = folder / UNFINISHED
    content = [path for path in (*_content(folder), *_content(staged)) if path != staged]
    if foreign := [path.name for path in content if not OURS.fullmatch(path.name)]:
        names = ", ".join(foreign[:3])
        raise RequestError(f"--output {folder} holds other files ({names}); give an empty folder")
    if any(Path(file.path).resolve().is_relative_to(folder.resolve()) for file in inputs if file.path != "-"):
        raise RequestError(f"--output {folder} holds the input; give another folder")


def _content(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []
