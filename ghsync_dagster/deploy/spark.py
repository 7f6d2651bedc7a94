"""A part of a standalone Spark cluster, from the Spark and the Java that the driver has.

Belongs here: how its process is started. Not here: what runs on it.
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Final, NoReturn

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.jvm.java import find_java, installed_spark

if TYPE_CHECKING:
    from ghsync_dagster.settings import Settings

_SCHEME: Final = "spark://"
_UI_PORT: Final = "8081"


def start(settings: Settings, role: str, cores: int, memory: str) -> NoReturn:
    """Become the master or a worker of the cluster that SPARK_MASTER names.

    Args:
        settings: ``spark_master`` is the cluster.
        role: ``master`` or ``worker``.
        cores: Cores that a worker offers.
        memory: Memory that a worker offers.

    Raises:
        ConfigError: SPARK_MASTER names no standalone cluster, or there is no such role.
    """
    master = settings.spark_master
    if not master.startswith(_SCHEME):
        raise ConfigError(f"SPARK_MASTER is {master}, no standalone cluster.", way_out="Set it to spark://HOST:7077.")
    port = master.rpartition(":")[2]
    here = ("--host", socket.gethostname(), "--webui-port", _UI_PORT)
    roles = {
        "master": ("master.Master", *here, "--port", port),
        "worker": (
            "worker.Worker",
            *here,
            "--work-dir",
            "/tmp/work",  # noqa: S108  the container's own
            "--cores",
            str(cores),
            "--memory",
            memory,
            master,
        ),
    }
    if role not in roles:
        raise ConfigError(f"A Spark cluster has no {role}.", way_out="Name master or worker.")
    name, *options = roles[role]
    program = installed_spark().parent / "bin" / "spark-class"
    environment = os.environ | {"JAVA_HOME": str(find_java(settings).home)}
    os.execve(program, [str(program), f"org.apache.spark.deploy.{name}", *options], environment)  # noqa: S606
