"""A real MySQL for the tests: the ``mysqld`` on PATH, else Debian's package, unpacked into the user's cache folder.

No root is needed and the system stays as it is: apt works on folders of its own, with the machine's own mirror, and the
server runs on the libraries and the loader of its own suite. ``python real_mysql.py`` fetches it and prints its folder.

Belongs here: how the server is had. Not here: how it is run, which is ``local.mysql``'s.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock

from ghsync_dagster.settings import load_settings

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ghsync_dagster.settings import Settings

_SUITE = "sid"
_PACKAGE = "mysql-server-core"
_KEYS = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_SECONDS = 600
# Its scripts need Perl; the server does not.
_LEFT_OUT = "perl"
_SOURCES = ["indextargets", "--format", "$(SITE)", "Created-By: Packages", "Component: main"]
# Each path is the tests' own. What the machine's apt.conf says of proxies holds, what it says of clean-ups does not.
_APT_CONF = """
Dir::Etc::SourceList "{folder}/sources.list";
Dir::Etc::SourceParts "-";
Dir::State "{folder}/state";
Dir::State::status "{folder}/status";
Dir::Cache "{folder}/cache";
Dir::Log "{folder}/log";
Debug::NoLocking "true";
Acquire::Languages "none";
Acquire::Retries "3";
Acquire::IndexTargets::deb::DEP-11::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-small::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons::DefaultEnabled "false";
Acquire::IndexTargets::deb::DEP-11-icons-hidpi::DefaultEnabled "false";
APT::Install-Recommends "false";
APT::Sandbox::User "";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear DPkg::Post-Invoke;
"""
_STATUS = (
    "Package: {package}\nStatus: install ok installed\nVersion: 99\nMulti-Arch: allowed\nArchitecture: {architecture}\n"
)
_SCRIPT = '#!/bin/sh\nexec {loader} --library-path {libraries} {mysqld} "$@"\n'


class NotToBeHadError(Exception):
    """There is neither a MySQL on PATH, nor can Debian's package be fetched; says why."""


def real_mysql(settings: Settings) -> Path:
    """Return the folder of a ``mysqld`` that is a MySQL; fetch Debian's where there is none.

    Args:
        settings: ``cache_dir`` is where it is kept, for all checkouts.

    Raises:
        NotToBeHadError: It can't be had on this machine.
    """
    on_path = shutil.which("mysqld")
    if on_path and "mariadb" not in _run([on_path, "--version"]).lower():
        return Path(on_path).parent
    home = settings.cache_dir / "mysql-server"
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".lock"):
        found = sorted(home.glob("*/bin/mysqld"))
        if not found:
            found = [_fetch(home)]
    return found[-1].parent


def _fetch(home: Path) -> Path:
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        raise NotToBeHadError("no mysqld on PATH, and no apt-get to fetch Debian's")
    mirrors = dict.fromkeys(_run(["apt-get", *_SOURCES]).split())
    reasons = []
    for mirror in mirrors:
        with tempfile.TemporaryDirectory(prefix=".part-", dir=home) as part:
            try:
                return _unpack(home, Path(part), _download(Path(part), mirror))
            except NotToBeHadError as error:
                reasons.append(str(error))
    raise NotToBeHadError("; ".join(reasons) or "apt has no sources")


def _download(folder: Path, mirror: str) -> list[Path]:
    """Return the files of the server's package and of all that it needs, the C library and the loader included."""
    architecture = _run(["dpkg", "--print-architecture"]).strip()
    for name in ("state/lists/partial", "cache/archives/partial", "log"):
        (folder / name).mkdir(parents=True)
    keys = f"[signed-by={_KEYS}] " if _KEYS.exists() else ""
    (folder / "sources.list").write_text(f"deb {keys}{mirror} {_SUITE} main\n", encoding="utf-8")
    # To apt this machine is empty, but for Perl.
    status = _STATUS.format(package=_LEFT_OUT, architecture=architecture)
    (folder / "status").write_text(status, encoding="utf-8")
    (folder / "apt.conf").write_text(_APT_CONF.format(folder=folder), encoding="utf-8")
    apt = ["apt-get", "--quiet=2", f"--config-file={folder / 'apt.conf'}"]
    _run([*apt, "update"])
    _run([*apt, "install", "--yes", "--download-only", _PACKAGE])
    return sorted((folder / "cache/archives").glob("*.deb"))


def _unpack(home: Path, folder: Path, packages: Sequence[Path]) -> Path:
    """Unpack the packages below ``home``, whole or not at all, and return the script that starts the server."""
    version = next((path.name.split("_")[1] for path in packages if path.name.startswith(f"{_PACKAGE}_")), "")
    root = folder / "root"
    for package in packages:
        _run(["dpkg-deb", "--extract", str(package), str(root)])
    loader = next(root.glob("usr/lib/*/ld-linux-*"), None)
    mysqld = root / "usr/sbin/mysqld"
    if loader is None or not mysqld.exists():
        raise NotToBeHadError(f"{_SUITE} has no {_PACKAGE} for this machine")
    target = home / version.replace("%3a", "-")

    def inside(path: Path) -> str:
        return shlex.quote(str(target / path.relative_to(root)))

    script = _SCRIPT.format(loader=inside(loader), libraries=inside(loader.parent), mysqld=inside(mysqld))
    (root / "bin").mkdir(exist_ok=True)
    (root / "bin/mysqld").write_text(script, encoding="utf-8")
    (root / "bin/mysqld").chmod(0o755)
    root.rename(target)
    return target / "bin/mysqld"


def _run(command: Sequence[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotToBeHadError(f"{command[0]}: {error}") from None
    if done.returncode != 0:
        raise NotToBeHadError(f"{command[0]} {command[-1]}: {done.stderr.strip() or done.returncode}")
    return done.stdout


if __name__ == "__main__":
    try:
        sys.stdout.write(f"{real_mysql(load_settings())}\n")
    except NotToBeHadError as error:
        sys.exit(f"no real MySQL for the tests: {error}")
