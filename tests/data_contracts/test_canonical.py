"""Rows on their way to disk: never more than a chunk of them in memory, and the same rows and facts as in one piece."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from data_contracts.canonical import GROUP_ROWS, RowsFile
from data_contracts.facts import facts
from data_contracts.rows import RowsRefused, read_rows, store_rows

# Prints how much the peak memory grows, in bytes, from storing and measuring the first 6,000 rows to all of them; the chunks
# are an eighth of what they are, so that these rows fill several.
GROWTH = """
import resource, sys
from pathlib import Path
from data_contracts import canonical, sources
from data_contracts.facts import facts
from data_contracts.rows import store_rows
canonical.GROUP_ROWS, canonical._GROUP_BYTES, sources._CHUNK_BYTES = 1250, 4 << 20, 1 << 20
def peak_after(stop):
    facts(store_rows(Path(sys.argv[1]), "preference", Path(sys.argv[2]), stop=stop), "preference")
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
peak_after(6_000)  # what libraries keep to themselves they have by then
print(-peak_after(6_000) + peak_after(None))
"""


def test_rows_stored_are_the_rows_read(kind_and_form, clean_rows, write_rows, tmp_path):
    kind = kind_and_form[0]
    path = write_rows(clean_rows(*kind_and_form, 100))
    table, stored = read_rows(path, kind), store_rows(path, kind, tmp_path / "rows.parquet")
    assert stored.num_rows == 100
    assert stored.table().equals(table) and stored.schema.equals(table.schema, check_metadata=True)
    assert RowsFile.at(stored.path) == stored
    pd.testing.assert_frame_equal(facts(stored, kind, {"x"}), facts(table, kind, {"x"}))


def test_rows_refused_leave_no_file(clean_rows, write_rows, tmp_path):
    path = write_rows([*clean_rows("eval", "standard", 20_000), {"prompt": "Say 6"}])
    with pytest.raises(RowsRefused):
        store_rows(path, "eval", tmp_path / "rows.parquet")
    assert not (tmp_path / "rows.parquet").exists()


def test_rows_set_aside_keep_the_others_in_order(write_rows, tmp_path):
    rows = [{"text": n if n % 1000 == 7 else f"Text {n}"} for n in range(25_000)]
    stored = store_rows(write_rows(rows), "language_modeling", tmp_path / "rows.parquet", set_aside=[], keep_rest=True)
    kept = [n for n in range(25_000) if n % 1000 != 7]
    assert stored.table().to_pylist() == [{"text": f"Text {n}", "row": n} for n in kept]


def test_facts_that_take_the_whole_set_reach_across_its_parts(write_rows, tmp_path):
    """The second part repeats the first, turned round in every third row: a plain count tells what must be found."""
    first = [{"prompt": f"Say {n}", "chosen": "Yes", "rejected": "No"} for n in range(GROUP_ROWS)]
    second = [row | {"chosen": "No", "rejected": "Yes"} if n % 3 == 0 else row for n, row in enumerate(first)]
    stored = store_rows(write_rows(first + second), "preference", tmp_path / "rows.parquet")
    assert pq.ParquetFile(stored.path).num_row_groups > 1
    found = facts(stored, "preference")
    turned = [n % 3 == 0 for n in range(GROUP_ROWS)]
    assert found["is_duplicate_prompt"].tolist() == [False] * GROUP_ROWS + [True] * GROUP_ROWS
    assert found["is_duplicate"].tolist() == [False] * GROUP_ROWS + [not it for it in turned]
    assert found["is_contradicted"].tolist() == turned * 2


def test_memory_does_not_grow_with_the_rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    with path.open("w") as lines:
        for number in range(40_000):
            turns = [{"role": "user", "content": f"{number} words " * 100}]
            row = {"prompt": turns, "chosen": [{"role": "assistant", "content": f"well {number} " * 100}], "rejected": turns}
            lines.write(json.dumps(row) + "\n")
    command = [sys.executable, "-P", "-c", GROWTH, path, tmp_path / "rows.parquet"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < path.stat().st_size / 3
