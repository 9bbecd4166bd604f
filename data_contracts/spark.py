"""Facts on Spark, for sets that outgrow one machine: the same contracts by the same rules, and the same verdicts.

What Spark reads otherwise than pandas is levelled here, so that `suite.py` need not know it:

- `\\Z` lets a final newline pass in Java's regular expressions, and `.` refuses more line ends than a newline.
- A mean of booleans is no mean, but an error.
- The rows found come in no order, unless the table has one.
"""

import importlib.util
import logging
import os
import re
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet

_MEAN = "expect_column_mean_to_be_between"
_AS_NUMBER = "{}_as_number"
_ESCAPE = re.compile(r"\\(.)", re.DOTALL)
_LOCAL = {
    # Without these Spark listens where the machine's name leads, which is the network or, in a container, often nowhere.
    "spark.driver.bindAddress": "127.0.0.1",
    "spark.driver.host": "127.0.0.1",
    # One partition per core and not 200: a judgement is some hundred small jobs.
    "spark.sql.shuffle.partitions": str(os.cpu_count() or 1),
}
_QUIET = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "FATAL"}
_STARTING = threading.Lock()
_users = 0  # of the session: Prefect validates several datasets of a run in threads


class SparkUnusable(RuntimeError):
    """Spark cannot be started here; the data have not been judged."""


class Spark:
    """A running Spark session, and the folder for facts, which its workers must reach by the same path."""

    def __init__(self, session: Any, folder: Path) -> None:
        self._session, self._folder = session, folder
        self._last: tuple[pd.DataFrame | Path, Any] | None = None

    def table(self, facts: pd.DataFrame | Path) -> Any:
        """Return the facts as Spark's own table, ordered by `row`; what was asked for last is not written again."""
        if self._last is None or self._last[0] is not facts:
            self.forget()
            self._last = facts, self._read(facts).persist()
        return self._last[1]

    def forget(self) -> None:
        """Free what the last facts take in the workers' memory and in the folder."""
        if self._last is not None:
            facts, table = self._last
            table.unpersist()
            if isinstance(facts, pd.DataFrame):
                self._file().unlink()
            self._last = None

    def _read(self, facts: pd.DataFrame | Path) -> Any:
        from pyspark.sql import functions
        from pyspark.sql.types import BooleanType

        nothing = self._write(facts) if isinstance(facts, pd.DataFrame) else []
        table = self._session.read.parquet(str(self._file() if isinstance(facts, pd.DataFrame) else facts))
        flags = [field.name for field in table.schema if isinstance(field.dataType, BooleanType)]
        numbers = {_AS_NUMBER.format(name): functions.col(name).cast("int") for name in flags}
        nulls = dict.fromkeys(nothing, functions.lit(None))
        return table.withColumns(numbers | nulls).orderBy("row")

    def _write(self, facts: pd.DataFrame) -> list[str]:
        """Write the facts, and return the columns that are not among them: nulls alone, of which Spark would make integers."""
        table = pa.Table.from_pandas(facts, preserve_index=False)
        nothing = [field.name for field in table.schema if pa.types.is_null(field.type)]
        pyarrow.parquet.write_table(table.drop_columns(nothing), self._file())
        return nothing

    def _file(self) -> Path:
        return self._folder / "facts.parquet"


@contextmanager
def started(master: str, folder: Path | None = None) -> Iterator[Spark]:
    """Start Spark on a master (`local[*]`, or a cluster's URL), to be stopped afterwards.

    `folder` is where facts are put for the workers to read; on a `local` master it may be left out.
    Raises SparkUnusable if that cannot be, with what to install or to set.
    """
    if why := missing():
        raise SparkUnusable(why)
    if folder is None and not _is_local(master):
        raise SparkUnusable(f"the workers of {master!r} must read the facts: name a folder that they reach by the same path")
    with _session(master) as session, tempfile.TemporaryDirectory(prefix="facts-", dir=folder) as place:
        spark = Spark(session, Path(place))
        try:
            yield spark
        finally:
            spark.forget()


@contextmanager
def _session(master: str) -> Iterator[Any]:
    """Share the one session that a process can have, which GX finds by itself; who leaves last stops it."""
    global _users
    with _STARTING:
        session = _start(master)
        _users += 1
    try:
        yield session
    finally:
        with _STARTING:
            _users -= 1
            if not _users:
                session.stop()


def _start(master: str) -> Any:
    from py4j.protocol import Py4JError
    from pyspark.errors import PySparkException
    from pyspark.logger import PySparkLogger
    from pyspark.sql import SparkSession

    PySparkLogger.getLogger("DataFrameQueryContextLogger").setLevel(logging.CRITICAL)  # what it says is in the verdict
    builder = SparkSession.builder.master(master).appName("posttrain-contracts")
    try:
        return builder.config(map=_QUIET | (_LOCAL if _is_local(master) else {})).getOrCreate()
    except (PySparkException, Py4JError) as error:
        raise SparkUnusable(f"Spark does not start on {master!r} (it needs Java 17 or 21): {error}") from error


def _is_local(master: str) -> bool:
    return master.startswith("local")


def missing() -> str | None:
    """Return what must be installed before Spark can start here, or None."""
    if importlib.util.find_spec("pyspark") is None:
        return "pyspark is not installed. Install it beside the rest: make spark"
    java = Path(os.environ["JAVA_HOME"], "bin", "java") if os.environ.get("JAVA_HOME") else "java"
    if shutil.which(java) is None:
        return f"there is no {java}. Install Java 17 or 21 (openjdk-17-jre-headless), or set JAVA_HOME to one"
    return None


def spelled(expectations: list[dict], columns: list[str]) -> list[dict]:
    """Return the expectations so that Spark judges by them what pandas does."""
    return [expectation | {"kwargs": _kwargs(expectation, columns)} for expectation in expectations]


def _kwargs(expectation: dict, columns: list[str]) -> dict:
    kwargs = dict(expectation["kwargs"])
    if "regex" in kwargs:
        kwargs["regex"] = _java_regex(kwargs["regex"])
    number = _AS_NUMBER.format(kwargs.get("column"))
    if expectation["type"] == _MEAN and number in columns:
        kwargs["column"] = number
    return kwargs


def _java_regex(regex: str) -> str:
    return "(?d)" + _ESCAPE.sub(lambda escape: r"\z" if escape[1] == "Z" else escape[0], regex)
