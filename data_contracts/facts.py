"""Flat facts about rows: one row per example, one scalar per column, so that built-in expectations judge nested text.

Facts carry no text, so a report of them leaks none. `fact_columns(kind)` lists them; the ones that need explaining:

- `<field>_roles`: one letter per message (s u a t; `-` for a plain string): a turn order is one regular expression.
- `n_json_quoted`: texts that are whole JSON strings, quotes included: what a coercing reader leaves behind.
- `n_control_markers`: messages that hold a chat template's own tokens, which a tokenizer would take for real ones.
- `n_packed_turns`: plain strings that are a list of messages written out as JSON.
- `is_garbled`: a text holds U+FFFD, or UTF-8 that was once read as Latin-1.
- `n_undescribed_calls`: calls of a tool, or with an argument, that the row's `tools` do not describe.
- `is_contradicted`: another row says the opposite: the same pair the other way round, the same reply with the other label.
- `is_echo`: the reply begins with the whole prompt; of a pair, both replies do.
- `is_duplicate`, `is_duplicate_prompt`: exact repeats of an earlier row or prompt (system turn included).
- `is_near_duplicate`: no exact repeat, but nearly one of an earlier row, system turns apart (near_duplicates.py).
- `prompt_hash`, `overlaps_eval`: of the prompt without its system turn, case and white space levelled, so that the same
  question is found whether it stands in a string or in a conversation. A single user turn that is held out counts too.
- `quotes_eval`: some 13 words in a row, anywhere in the example, stand in exactly one held-out prompt: the passage length of
  GPT-3's contamination study (arXiv:2005.14165, appendix C). Passages that several prompts share are their template.
- `n_held_out`: how many prompts it was compared with; 0 means that nobody looked.
"""

from collections.abc import Iterable

import pandas as pd
import polars as pl
import pyarrow as pa

from data_contracts.batch_facts import BANDS, batch_facts, digest_columns
from data_contracts.canonical import RowsFile, batches_of
from data_contracts.kinds import Kind, kind_of
from data_contracts.leaks import Leaks
from data_contracts.sources import KIND_METADATA

_COMMON = (
    *("row", "n_messages", "n_empty_messages", "n_json_quoted", "n_control_markers", "has_placeholder"),
    *("n_packed_turns", "is_garbled", "is_near_duplicate"),
    *("is_duplicate", "is_duplicate_prompt", "prompt_hash", "overlaps_eval", "quotes_eval", "n_held_out"),
)
_OF_KIND = {
    "prompt_completion": ("is_echo",),
    "preference": (
        *("is_tie", "is_contradicted", "is_echo", "chosen_is_prefix", "rejected_is_prefix"),
        *("is_chosen_longer", "len_ratio"),
    ),
    "unpaired_preference": ("is_desired", "is_contradicted", "is_echo"),
    "stepwise_supervision": ("n_steps", "is_all_right", "is_all_wrong"),
    "eval": ("has_rival_answer",),
}


def facts(
    rows: pa.Table | RowsFile, kind: str, held_out: Iterable[str] | None = None, passages: frozenset[str] = frozenset()
) -> pd.DataFrame:
    """Return the facts about each row of what `rows.read_rows` or `rows.store_rows` made; of a file's text little is in memory.

    `held_out` and `passages` are the `prompts` and the `passages` of a `held_out.HeldOut`.
    """
    asked = kind_of(kind)
    _check_kind(rows.schema, asked)
    leaks = Leaks(held_out or (), passages)
    found = pl.concat([batch_facts(batch, asked, leaks) for batch in batches_of(rows)])
    return found.with_columns(_about_the_set(asked)).select(fact_columns(kind)).to_pandas()


def fact_columns(kind: str) -> list[str]:
    """Return the names of the facts, in their order."""
    asked = kind_of(kind)
    per_field = [f"{name}_{fact}" for name in asked.texts() for fact in ("roles", "chars")]
    of_tools = ("n_undescribed_calls",) if asked.takes_tools else ()
    return [*_COMMON, *per_field, *of_tools, *_OF_KIND.get(kind, ())]


def _check_kind(schema: pa.Schema, kind: Kind) -> None:
    made = (schema.metadata or {}).get(KIND_METADATA, b"").decode()
    if made != kind.name:
        raise ValueError(f"the table holds {made or 'unchecked'} rows, not {kind.name}. Read it with rows.read_rows")


def _about_the_set(kind: Kind) -> list[pl.Expr]:
    """Return the facts about each row that take all the others to tell."""
    whole, asked = pl.struct(digest_columns("whole")), pl.struct(digest_columns("asked"))
    found = [
        whole.is_first_distinct().not_().alias("is_duplicate"),
        (pl.any_horizontal(~pl.col(BANDS).is_first_distinct()) & whole.is_first_distinct()).alias("is_near_duplicate"),
        asked.is_first_distinct().not_().alias("is_duplicate_prompt"),
    ]
    if kind.name == "preference":
        preferred, turned = pl.struct(digest_columns("preferred")), pl.struct(digest_columns("reversed"))
        as_preferred = turned.struct.rename_fields(digest_columns("preferred"))
        found.append((pl.col("__differ") & as_preferred.is_in(preferred.implode())).alias("is_contradicted"))
    if kind.name == "unpaired_preference":
        rivals = pl.col("is_desired").n_unique().over(digest_columns("replied"))
        found.append((rivals > 1).alias("is_contradicted"))
    if kind.name == "eval":  # the same question elsewhere in the set with another answer
        rivals = pl.struct(digest_columns("answered")).n_unique().over(digest_columns("asked"))
        found.append((rivals > 1).alias("has_rival_answer"))
    return found
