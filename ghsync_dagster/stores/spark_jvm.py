"""The JVM of Spark's driver, with its output in our log.

Belongs here: how it is launched, and which lines of its output nobody can act on. Not here: the session in it.
"""

from __future__ import annotations

import os
import re
import threading
from typing import TYPE_CHECKING, Final

from pyspark import SparkConf, SparkContext
from pyspark.errors import PySparkException
from pyspark.java_gateway import launch_gateway

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.logging import get_logger, redact

if TYPE_CHECKING:
    from collections.abc import Mapping

_NEEDLESS: Final = re.compile(r"WARNING: Using incubator modules: |Picked up (JAVA|JDK)_\w+: ")
"""What Java prints because of Spark's own command line."""
_READ_SECONDS: Final = 5.0
log = get_logger("spark")


def launch_jvm(configuration: Mapping[str, str]) -> None:
    """Launch the JVM, unless this process has one already.

    Args:
        configuration: Spark's settings by name; those of the JVM itself have an effect only here.

    Raises:
        ConfigError: It ended at once; the message has its first line of output, which names the cause.
    """
    if SparkContext._gateway is not None:  # noqa: SLF001  pyspark has no other word for it
        return
    conf = SparkConf().setAll(list(configuration.items()))
    read, write = os.pipe()
    first_lines: list[str] = []
    reader = threading.Thread(target=_log_output, args=(read, first_lines), name="spark-output", daemon=True)
    reader.start()
    try:
        gateway = launch_gateway(conf, {"stderr": write})  # type: ignore[no-untyped-call]
    except (PySparkException, OSError) as error:
        os.close(write)
        reader.join(_READ_SECONDS)
        raise ConfigError(
            f"Spark's JVM does not start ({first_lines[0] if first_lines else type(error).__name__}).",
            way_out="Check JAVA_HOME (17 or newer), SPARK_DRIVER_MEMORY and SPARK_DRIVER_JAVA_OPTIONS.",
        ) from None
    os.close(write)
    SparkContext._ensure_initialized(gateway=gateway)  # noqa: SLF001  as the session's own start does


def _log_output(pipe: int, first_lines: list[str]) -> None:
    """Log the lines of a pipe until all its writers are gone; keep the first line."""
    with os.fdopen(pipe, encoding="utf-8", errors="replace") as lines:
        for line in lines:
            text = redact(line.rstrip())
            if text and not _NEEDLESS.match(text):
                if not first_lines:
                    first_lines.append(text)
                log.warning(text)
