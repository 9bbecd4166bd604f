"""Flat facts about rows: one row per example, one scalar per column, so that built-in expectations judge nested text.

Facts carry no text, so a report of them leaks none. `fact_columns(kind)` lists them; the ones that need explaining:

- `<field>_roles`: one letter per message (s u a t; `-` for a plain string): a turn order is one regular expression.
- `n_json_quoted`: texts that are whole JSON strings, quotes included: what a coercing reader leaves behind.
- `n_control_markers`: messages that hold a chat template's own tokens, which a tokenizer would take for real ones.
- `n_packed_turns`: plain strings that are a list of messages written out as JSON.
- `is_garbled`: a text holds U+FFFD, or UTF-8 that was once read as Latin-1.
- `n_undescribed_calls`: calls of a tool that the row's `tools` do not describe.
- `is_contradicted`: another row says the opposite: the same pair the other way round, the same reply with the other label.
- `is_echo`: the reply begins with the whole prompt; of a pair, both replies do.
- `is_duplicate`, `is_duplicate_prompt`: exact repeats of an earlier row or prompt (system turn included).
- `prompt_hash`, `overlaps_eval`: of the prompt without its system turn, case and white space levelled, so that the same
  question is found whether it stands in a string or in a conversation. A single user turn that is held out counts too.
- `quotes_eval`: some 13 words in a row, anywhere in the example, stand in exactly one held-out prompt: the passage length of
  GPT-3's contamination study (arXiv:2005.14165, appendix C). Passages that several prompts share are their template.
- `n_held_out`: how many prompts it was compared with; 0 means that nobody looked.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable

import pandas as pd
import polars as pl
import polars.selectors as cs
import pyarrow as pa

from data_contracts.kinds import CALL_CODE, ROLE_CODES, TOOLS, Kind, kind_of
from data_contracts.sources import KIND_METADATA

# The control tokens of the templates of Llama 2-4, Qwen, Gemma, Mistral, Phi and SmolLM. The tokenizer's own list is
# checked by the job, which has the tokenizer; this one catches the usual ones before a GPU is asked for.
_CONTROL_MARKERS = (
    r"<\|(im_start|im_end|im_sep|endoftext|begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id"
    r"|header_start|header_end|eot|user|assistant|system|end)\|>|<(start|end)_of_turn>|\[/?INST\]|</s>"
)
_VISIBLE = r"[^\s\p{Z}\p{Cc}\p{Cf}]"  # zero-width spaces, byte order marks and null characters show nothing either
_JSON_STRING = r'\A\s*"(\\.|[^"\\\n])*"\s*\z'
# Messages written out as JSON, or as Python shows them, in a column of text.
_PACKED_TURNS = r"""(?s)\A\s*\[\s*\{.*?['"](role|from)['"]\s*:\s*['"](system|user|assistant|tool|human|gpt)['"]"""
_GARBLED = r"\x{FFFD}|[ÂÃ][\x{80}-\x{BF}]|â€"  # bytes that were no text, and UTF-8 that was read as Latin-1
_PLACEHOLDER = r"\{\{\s*\w+\s*\}\}|(?i)(\A|\n)[\s<`]*no ?input[\s>`.]*\z"  # unfilled {{name}}; Alpaca's "No input"

PASSAGE_WORDS = 13
_ROLE, _CONTENT, _CALLS = (pl.element().struct.field(name) for name in ("role", "content", "tool_calls"))
_SAID = pl.concat_str(_CONTENT, _CALLS, ignore_nulls=True)  # a turn may be a call and no more
_COMMON = (
    *("row", "n_messages", "n_empty_messages", "n_json_quoted", "n_control_markers", "has_placeholder"),
    *("n_packed_turns", "is_garbled"),
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
    table: pa.Table, kind: str, held_out: Iterable[str] | None = None, passages: frozenset[str] = frozenset()
) -> pd.DataFrame:
    """Return the facts about each row of a table that `rows.read_rows` made.

    `held_out` are the `prompt_hashes`, and `passages` the `prompt_passages`, of rows that must not be trained on.
    """
    asked = kind_of(kind)
    _check_kind(table, asked)
    held = frozenset(held_out or ())
    rows = _as_messages(table, asked)
    return (
        rows.select(
            "row",
            *_counts(asked),
            *_repeats(asked, table.schema.names),
            *_about_fields(asked),
            *_about_kind(asked),
            pl.Series("n_undescribed_calls", _undescribed_calls(rows, asked.texts()), dtype=pl.Int64),
            pl.Series("prompt_hash", _hashes(rows)),
            pl.Series("overlaps_eval", _overlaps(rows, held), dtype=pl.Boolean),
            pl.Series("quotes_eval", _quotes(rows, asked.texts(), passages), dtype=pl.Boolean),
            n_held_out=pl.lit(len(held)),
        )
        .select(fact_columns(kind))
        .to_pandas()
    )


def fact_columns(kind: str) -> list[str]:
    """Return the names of the facts, in their order."""
    asked = kind_of(kind)
    per_field = [f"{name}_{fact}" for name in asked.texts() for fact in ("roles", "chars")]
    of_tools = ("n_undescribed_calls",) if asked.takes_tools else ()
    return [*_COMMON, *per_field, *of_tools, *_OF_KIND.get(kind, ())]


def prompt_hashes(table: pa.Table, kind: str) -> set[str]:
    """Return the hashes of a table's prompts, to be held out of others."""
    return set(_hashes(_as_messages(table, kind_of(kind))))


def prompt_passages(table: pa.Table, kind: str) -> frozenset[str]:
    """Return every passage of a table's prompts that only one of them has, to be looked for in others' texts."""
    spoken = pl.col("__asked").list.filter(_ROLE != "system")
    prompts = set(_as_messages(table, kind_of(kind)).select(spoken.list.eval(_CONTENT).list.join("\n")).to_series())
    counts = Counter(passage for prompt in prompts for passage in _passages_of(prompt))
    return frozenset(passage for passage, count in counts.items() if count == 1)


def _check_kind(table: pa.Table, kind: Kind) -> None:
    made = (table.schema.metadata or {}).get(KIND_METADATA, b"").decode()
    if made != kind.name:
        raise ValueError(f"the table holds {made or 'unchecked'} rows, not {kind.name}. Read it with rows.read_rows")


def _as_messages(table: pa.Table, kind: Kind) -> pl.DataFrame:
    """Make each text field a list of messages, a plain string being one of no role, and add the prompt."""
    frame = pl.from_arrow(table)
    is_standard = frame.schema[table.schema.names[0]] == pl.String
    given = (kind.standard if is_standard else kind.conversational) + kind.strings + kind.steps
    columns = [_messages(name, frame.schema[name]) for name in given]
    frame = frame.with_columns(column.alias(name) for column, name in zip(columns, kind.texts(), strict=True))
    return frame.with_columns(_asked(kind).alias("__asked"))


def _messages(name: str, type_: pl.DataType) -> pl.Expr:
    """Return a column as lists of role, content and calls, whatever it holds: a string, strings, or messages."""
    plain = pl.struct(role=pl.lit("text"), content=pl.element(), tool_calls=pl.lit(None, pl.String))
    if type_ == pl.String:
        return pl.concat_list(name).list.eval(plain)
    if type_ == pl.List(pl.String):
        return pl.col(name).list.eval(plain)
    if any(field.name == "tool_calls" for field in type_.inner.fields):
        return pl.col(name)
    spoken = pl.struct(role=_ROLE, content=_CONTENT, tool_calls=pl.lit(None, pl.String))
    return pl.col(name).list.eval(spoken)


def _asked(kind: Kind) -> pl.Expr:
    """Return what is asked before the first reply: the prompt, or the opening turns of a whole conversation."""
    if kind.name != "language_modeling":
        return pl.col("prompt")
    first_reply = _roles("messages").str.find(f"[a{CALL_CODE}]")
    return pl.col("messages").list.head(pl.when(first_reply > 0).then(first_reply).otherwise(pl.col("messages").list.len()))


def _roles(name: str) -> pl.Expr:
    letters = _ROLE.replace_strict(ROLE_CODES | {"text": "-"}, default="?", return_dtype=pl.String)
    return pl.col(name).list.eval(pl.when(_CALLS.is_null()).then(letters).otherwise(pl.lit(CALL_CODE))).list.join("")


def _text(name: str) -> pl.Expr:
    return pl.col(name).list.eval(_SAID).list.join("\n").str.strip_chars()


def _chars(name: str) -> pl.Expr:
    return pl.col(name).list.eval(_SAID.str.len_chars()).list.sum().cast(pl.Int64)


def _exact(name: str) -> pl.Expr:
    """Return a string that two fields share exactly if they hold the same messages: role, length and text of each."""
    message = pl.concat_str(_ROLE, pl.lit(" "), _SAID.str.len_bytes().cast(pl.String), pl.lit(" "), _SAID)
    return pl.col(name).list.eval(message).list.join("")


def _counts(kind: Kind) -> list[pl.Expr]:
    """Return how many messages a row has in all its fields, and how many of them are as named."""
    fields = kind.texts()

    def count(condition: pl.Expr, among: tuple[str, ...] = fields) -> pl.Expr:
        return pl.sum_horizontal(pl.col(name).list.eval(condition.cast(pl.Int64)).list.sum() for name in among)

    in_a_turn = _ROLE != "text"  # a plain string may well be rendered text, whose control tokens are meant
    return [
        count(_ROLE.is_not_null()).alias("n_messages"),
        count(~_SAID.str.contains(_VISIBLE)).alias("n_empty_messages"),
        count(_CONTENT.str.contains(_JSON_STRING)).alias("n_json_quoted"),
        count(_SAID.str.contains(_CONTROL_MARKERS) & in_a_turn).alias("n_control_markers"),
        (count(_SAID.str.contains(_PLACEHOLDER)) > 0).alias("has_placeholder"),
        count(_CONTENT.str.contains(_PACKED_TURNS) & ~in_a_turn).alias("n_packed_turns"),
        (count(_SAID.str.contains(_GARBLED)) > 0).alias("is_garbled"),
    ]


def _repeats(kind: Kind, columns: list[str]) -> list[pl.Expr]:
    fields = kind.texts()
    extras = [name for name in columns if name not in (*kind.standard, *fields, "row")]
    whole = [_exact(name) for name in fields] + [cs.by_name(name) for name in extras]  # `pl.col` takes some for patterns
    return [
        pl.struct(part.alias(f"part_{n}") for n, part in enumerate(whole)).is_first_distinct().not_().alias("is_duplicate"),
        _exact("__asked").is_first_distinct().not_().alias("is_duplicate_prompt"),
    ]


def _about_fields(kind: Kind) -> list[pl.Expr]:
    fields = kind.texts()
    return [_roles(name).alias(f"{name}_roles") for name in fields] + [_chars(name).alias(f"{name}_chars") for name in fields]


def _about_kind(kind: Kind) -> list[pl.Expr]:
    if kind.name == "preference":
        return _about_pairs()
    if kind.name == "unpaired_preference":
        rivals = pl.col("label").n_unique().over(_exact("prompt"), _text("completion"))
        return [pl.col("label").alias("is_desired"), (rivals > 1).alias("is_contradicted"), _is_echo()]
    if kind.name == "stepwise_supervision":
        return [
            pl.col("labels").list.len().cast(pl.Int64).alias("n_steps"),
            pl.col("labels").list.all().alias("is_all_right"),
            (~pl.col("labels").list.any()).alias("is_all_wrong"),
        ]
    if kind.name == "prompt_completion":
        return [_is_echo()]
    if kind.name == "eval":  # the same question elsewhere in the set with another answer
        return [(_text("answer").n_unique().over(_exact("__asked")) > 1).alias("has_rival_answer")]
    return []


def _is_echo() -> pl.Expr:
    return _begins_with_prompt("completion").alias("is_echo")


def _begins_with_prompt(name: str) -> pl.Expr:
    return (_text("prompt") != "") & _text(name).str.starts_with(_text("prompt"))


def _about_pairs() -> list[pl.Expr]:
    """Return how chosen and rejected compare, white space around them apart."""
    chosen, rejected = _text("chosen"), _text("rejected")
    differ = chosen != rejected
    return [
        (~differ & (_roles("chosen") == _roles("rejected"))).alias("is_tie"),
        (differ & _one_way("rejected", "chosen").is_in(_one_way("chosen", "rejected").implode())).alias("is_contradicted"),
        (_begins_with_prompt("chosen") & _begins_with_prompt("rejected")).alias("is_echo"),
        (differ & rejected.str.starts_with(chosen)).alias("chosen_is_prefix"),
        (differ & chosen.str.starts_with(rejected)).alias("rejected_is_prefix"),
        (_chars("chosen") > _chars("rejected")).alias("is_chosen_longer"),
        ((_chars("chosen") + 1) / (_chars("rejected") + 1)).alias("len_ratio"),
    ]


def _one_way(better: str, worse: str) -> pl.Expr:
    """Return a number that two pairs share if they prefer the same text to the same other on one prompt."""
    return pl.struct(prompt=_exact("__asked"), better=_text(better), worse=_text(worse)).hash()


def _undescribed_calls(rows: pl.DataFrame, fields: tuple[str, ...]) -> list[int]:
    """Count for each row the calls of tools that its `tools` do not describe."""
    if TOOLS not in rows.columns:
        return [0] * rows.height
    calls = rows.select(pl.concat_list(pl.col(name).list.eval(_CALLS) for name in fields).list.drop_nulls()).to_series()
    return [_undescribed(json.loads(tools), each) for tools, each in zip(rows[TOOLS], calls, strict=True)]


def _undescribed(tools: list[dict], calls: Iterable[str]) -> int:
    described = {tool["function"]["name"] for tool in tools}
    called = [call["function"]["name"] for turn in calls for call in json.loads(turn)]
    return sum(name not in described for name in called)


def _hashes(rows: pl.DataFrame) -> list[str]:
    spoken = pl.col("__asked").list.filter(_ROLE != "system")
    return [_hash(text) for text in rows.select(spoken.list.eval(_CONTENT).list.join("\n")).to_series()]


def _overlaps(rows: pl.DataFrame, held_out: frozenset[str]) -> list[bool]:
    """Tell for each row whether its prompt, or any one user turn anywhere in it, is held out."""
    if not held_out:
        return [False] * rows.height
    turns = pl.col("messages" if "messages" in rows.columns else "prompt").list.filter(_ROLE == "user")
    asked = rows.select(turns.list.eval(_CONTENT)).to_series().to_list()
    return [
        whole in held_out or any(_hash(turn) in held_out for turn in each)
        for whole, each in zip(_hashes(rows), asked, strict=True)
    ]


def _quotes(rows: pl.DataFrame, fields: tuple[str, ...], passages: frozenset[str]) -> list[bool]:
    """Tell for each row whether one of the passages stands in any of its texts."""
    if not passages:
        return [False] * rows.height
    texts = rows.select(pl.concat_str([_text(name) for name in fields], separator="\n")).to_series()
    return [not passages.isdisjoint(_passages_of(text)) for text in texts]


def _passages_of(text: str) -> set[str]:
    words = text.casefold().split()
    return {" ".join(words[start : start + PASSAGE_WORDS]) for start in range(len(words) - PASSAGE_WORDS + 1)}


def _hash(text: str) -> str:
    levelled = " ".join(text.casefold().split())
    return hashlib.blake2b(levelled.encode(), digest_size=8).hexdigest()
