"""The first files of a local server: made by its own program, and visible only once they are complete.

Not here: which program, and its input, which the server's own module knows.
"""

from __future__ import annotations

import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Final

from ghsync_dagster.domain.errors import UnavailableError

if TYPE_CHECKING:
    from collections.abc import Callable

_SECONDS: Final = 180
_OUTPUT_CHARACTERS: Final = 1500


def make_first_files(
    data: Path,
    command: Callable[[Path], list[str]],
    *,
    what: str,
    variable: str,
    given: Callable[[], str] | None = None,
) -> None:
    """Make a server's data in a folder that gets its name only once it is complete.

    Args:
        data: The folder, which must not exist.
        command: Returns the program and its arguments for a temporary folder, which it has to make.
        what: Names the files in the error, such as ``The data of mariadb``.
        variable: The setting that names an external server instead.
        given: Returns the program's input.

    Raises:
        UnavailableError: The program failed, or a file can't be read or written; the message ends with its output.
    """
    data.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=data.parent, prefix=".making-") as folder:
        part = Path(folder) / "data"
        try:
            done = subprocess.run(
                command(part),
                input=given() if given else None,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                timeout=_SECONDS,
                check=False,
            )
            output, failed = done.stdout, done.returncode != 0
        except (OSError, subprocess.TimeoutExpired) as error:
            output, failed = str(error), True
        if failed:
            raise UnavailableError(
                f"{what} could not be made in {data.parent}: {output.strip()[-_OUTPUT_CHARACTERS:]}",
                way_out=f"See whether the disk has room; or set {variable} to a server of your own.",
            )
        part.rename(data)
