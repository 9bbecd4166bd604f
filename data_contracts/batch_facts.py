"""The facts about some thousands of rows, by polars, and digests of their texts for what only the whole set can tell."""

import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import polars as pl
import polars.selectors as cs
import pyarrow as pa

from data_contracts.kinds import CALL_CODE, ROLE_CODES, TOOLS, Kind
from data_contracts.leaks import Leaks, hash_of
from data_contracts.near_duplicates import NUM_BANDS, band_numbers

# The control tokens of the templates of Llama 2-4, Qwen, Gemma, Mistral, Phi and SmolLM. The tokenizer's own list is
# checked by the job, which has the tokenizer; this one catches the usual ones before a GPU is asked for.
_CONTROL_MARKERS = (
    r"<\|(im_start|im_end|im_sep|endoftext|begin_of_text|end_of_text|start_header_id|end_header_id|eot_id|eom_id"
    r"|header_start|header_end|eot|user|assistant|system|end)\|>|<(start|end)_of_turn>|\[/?INST\]"
)
_VISIBLE = r"[^\s\p{Z}\p{Cc}\p{Cf}]"  # zero-width spaces, byte order marks and null characters show nothing either
_JSON_STRING = r'\A\s*"(\\.|[^"\\\n])*"\s*\z'
# Messages written out as JSON, or as Python shows them, in a column of text.
_PACKED_TURNS = r"""(?s)\A\s*\[\s*\{.*?['"](role|from)['"]\s*:\s*['"](system|user|assistant|tool|human|gpt)['"]"""
_GARBLED = r"\x{FFFD}|[ÂÃ][\x{80}-\x{BF}]|â€"  # bytes that were no text, and UTF-8 that was read as Latin-1
_UNFILLED = r"\{\{\s*\w+\s*\}\}"  # {{name}}
_HEAD_CHARS = 32
_NO_INPUT = r"(?i)(\A|\n)[\s<`]*no ?input[\s>`.]*\z"  # Alpaca's; anchored at its end, and by itself, it costs next to nothing

_ROLE, _CONTENT, _CALLS, _SAID = (pl.element().struct.field(name) for name in ("role", "content", "tool_calls", "said"))
BANDS = [f"__band_{number}" for number in range(NUM_BANDS)]
_SEEDS = (1, 2)  # two hashes of 64 bits: among 1 M texts, one in 10^26 runs would take two for the same


def batch_facts(batch: pa.Table, kind: Kind, leaks: Leaks) -> pl.DataFrame:
    """Return one row per row: each fact that needs no other row, and the digests and bands of what it must match."""
    rows = as_messages(batch, kind)
    asked = asked_texts(rows)
    hashes = [hash_of(text) for text in asked]
    no_row = [False] * rows.height
    with ThreadPoolExecutor(1) as beside:  # what numpy does holds Python's lock, which polars does not need
        bands = beside.submit(band_numbers, _spoken(rows, kind))
        rows = rows.with_columns(_texts(kind))
        found = rows.select(
            "row",
            *_counts(kind),
            *_digests(kind, batch.schema.names),
            *_about_fields(kind),
            *_about_kind(kind),
            *([pl.col("row").is_in(_ties(rows).implode()).alias("is_tie")] if kind.name == "preference" else []),
        )
    return found.with_columns(
        pl.Series("n_undescribed_calls", _undescribed_calls(rows, kind.texts()), dtype=pl.Int64),
        *(pl.Series(name, band) for name, band in zip(BANDS, bands.result().T, strict=True)),
        pl.Series("prompt_hash", hashes, dtype=pl.String),
        pl.Series("overlaps_eval", leaks.overlaps(asked, hashes, user_turns(rows) if leaks.prompts else []), dtype=pl.Boolean),
        pl.Series("quotes_eval", leaks.quotes(whole_texts(rows, kind)) if leaks.passages else no_row, dtype=pl.Boolean),
        n_held_out=pl.lit(len(leaks.prompts)),
    )


def as_messages(batch: pa.Table, kind: Kind) -> pl.DataFrame:
    """Make each text field a list of messages, a plain string being one of no role, and add the prompt."""
    frame = pl.from_arrow(batch)
    is_standard = frame.schema[batch.schema.names[0]] == pl.String
    given = (kind.standard if is_standard else kind.conversational) + kind.strings + kind.steps
    columns = [_messages(name, frame.schema[name]) for name in given]
    frame = frame.with_columns(column.alias(name) for column, name in zip(columns, kind.texts(), strict=True))
    return frame.with_columns(_asked(kind).alias("__asked"))


def asked_texts(rows: pl.DataFrame) -> list[str]:
    """Return what each of `as_messages` asks, without its system turn."""
    spoken = pl.col("__asked").list.filter(_ROLE != "system")
    return rows.select(spoken.list.eval(_CONTENT).list.join("\n")).to_series().to_list()


def digest_columns(name: str) -> list[str]:
    """Return the columns that two rows share exactly if they have the same `name`."""
    return [f"__{name}_{seed}" for seed in _SEEDS]


def _messages(name: str, type_: pl.DataType) -> pl.Expr:
    """Return a column as lists of role, content, calls and what was said, whatever it holds: a string, strings, or messages."""
    no_calls = pl.lit(None, pl.String)
    plain = pl.struct(role=pl.lit("text"), content=pl.element(), tool_calls=no_calls, said=pl.element())
    if type_ == pl.String:
        return pl.concat_list(name).list.eval(plain)
    if type_ == pl.List(pl.String):
        return pl.col(name).list.eval(plain)
    if any(field.name == "tool_calls" for field in type_.inner.fields):
        said = pl.concat_str(_CONTENT, _CALLS, ignore_nulls=True)  # a turn may be a call and no more
        return pl.col(name).list.eval(pl.struct(role=_ROLE, content=_CONTENT, tool_calls=_CALLS, said=said))
    return pl.col(name).list.eval(pl.struct(role=_ROLE, content=_CONTENT, tool_calls=no_calls, said=_CONTENT))


def _asked(kind: Kind) -> pl.Expr:
    """Return what is asked before the first reply: the prompt, or the opening turns of a whole conversation."""
    if kind.name != "language_modeling":
        return pl.col("prompt")
    first_reply = _roles("messages").str.find(f"[a{CALL_CODE}]")
    return pl.col("messages").list.head(pl.when(first_reply > 0).then(first_reply).otherwise(pl.col("messages").list.len()))


def _roles(name: str) -> pl.Expr:
    letters = _ROLE.replace_strict(ROLE_CODES | {"text": "-"}, default="?", return_dtype=pl.String)
    return pl.col(name).list.eval(pl.when(_CALLS.is_null()).then(letters).otherwise(pl.lit(CALL_CODE))).list.join("")


def _texts(kind: Kind) -> list[pl.Expr]:
    """Return each field's whole text, white space around it apart, which several facts share."""
    return [_text(name).alias(f"__{name}") for name in kind.texts()]


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

    ends_text = _SAID.str.contains("</s>", literal=True) & ~_SAID.str.contains("<s>", literal=True)  # with it, it is HTML
    in_a_turn = _ROLE != "text"  # a plain string may well be rendered text, whose control tokens are meant
    has_placeholder = _SAID.str.contains(_UNFILLED) | _SAID.str.contains(_NO_INPUT)
    return [
        count(_ROLE.is_not_null()).alias("n_messages"),
        count(~_SAID.str.contains(_VISIBLE)).alias("n_empty_messages"),
        count(_CONTENT.str.contains(_JSON_STRING)).alias("n_json_quoted"),
        count((_SAID.str.contains(_CONTROL_MARKERS) | ends_text) & in_a_turn).alias("n_control_markers"),
        (count(has_placeholder) > 0).alias("has_placeholder"),
        count(_CONTENT.str.contains(_PACKED_TURNS) & ~in_a_turn).alias("n_packed_turns"),
        (count(_SAID.str.contains(_GARBLED)) > 0).alias("is_garbled"),
    ]


def _digests(kind: Kind, columns: list[str]) -> list[pl.Expr]:
    fields = kind.texts()
    extras = [name for name in columns if name not in (*kind.standard, *fields, "row")]
    said = {
        "whole": [_exact(name) for name in fields] + [_extra(name, kind) for name in extras],
        "asked": [_exact("__asked")],
    }
    if kind.name == "preference":
        said["preferred"] = [_exact("__asked"), pl.col("__chosen"), pl.col("__rejected")]
        said["reversed"] = [_exact("__asked"), pl.col("__rejected"), pl.col("__chosen")]
    if kind.name == "unpaired_preference":
        said["replied"] = [_exact("prompt"), pl.col("__completion")]
    if kind.name == "eval":
        said["answered"] = [pl.col("__answer")]
    return [digest for name, parts in said.items() for digest in _digest(name, parts)]


def _extra(name: str, kind: Kind) -> pl.Expr:
    if kind.labels.get(name) == list[bool]:  # polars hashes no lists
        return pl.col(name).list.eval(pl.element().cast(pl.String)).list.join(" ")
    return cs.by_name(name)  # `pl.col` takes some names for patterns


def _digest(name: str, parts: list[pl.Expr]) -> list[pl.Expr]:
    """Return columns that are equal if every part is, in its place."""
    return [
        pl.concat_str([part.hash(seed).cast(pl.String) for part in parts], separator=" ").hash(seed).alias(column)
        for seed, column in zip(_SEEDS, digest_columns(name), strict=True)
    ]


def _about_fields(kind: Kind) -> list[pl.Expr]:
    fields = kind.texts()
    return [_roles(name).alias(f"{name}_roles") for name in fields] + [_chars(name).alias(f"{name}_chars") for name in fields]


def _about_kind(kind: Kind) -> list[pl.Expr]:
    if kind.name == "preference":
        return _about_pairs()
    if kind.name == "unpaired_preference":
        return [pl.col("label").alias("is_desired"), _is_echo()]
    if kind.name == "stepwise_supervision":
        return [
            pl.col("labels").list.len().cast(pl.Int64).alias("n_steps"),
            pl.col("labels").list.all().alias("is_all_right"),
            (~pl.col("labels").list.any()).alias("is_all_wrong"),
        ]
    return [_is_echo()] if kind.name == "prompt_completion" else []


def _is_echo() -> pl.Expr:
    return _begins_with_prompt("completion").alias("is_echo")


def _begins_with_prompt(name: str) -> pl.Expr:
    return (pl.col("__prompt") != "") & pl.col(f"__{name}").str.starts_with(pl.col("__prompt"))


def _about_pairs() -> list[pl.Expr]:
    """Return how chosen and rejected compare, white space around them apart."""
    chosen, rejected = pl.col("__chosen"), pl.col("__rejected")
    differ = chosen != rejected
    return [
        differ.alias("__differ"),
        (_begins_with_prompt("chosen") & _begins_with_prompt("rejected")).alias("is_echo"),
        (differ & rejected.str.starts_with(chosen)).alias("chosen_is_prefix"),
        (differ & chosen.str.starts_with(rejected)).alias("rejected_is_prefix"),
        (_chars("chosen") > _chars("rejected")).alias("is_chosen_longer"),
        ((_chars("chosen") + 1) / (_chars("rejected") + 1)).alias("len_ratio"),
    ]


def _ties(rows: pl.DataFrame) -> pl.Series:
    """Return the numbers of the pairs whose replies are equal but for how much white space, and which, parts their words.

    White space is looked for in what few pairs begin alike, so that it costs next to nothing.
    """
    pair = pl.col("__chosen"), pl.col("__rejected")
    one, other = (text.str.head(_HEAD_CHARS).str.replace_all(r"\s+", "") for text in pair)
    tests = (
        pair[0].str.head(1) == pair[1].str.head(1),
        one.str.starts_with(other) | other.str.starts_with(one),
        pair[0].str.replace_all(r"\s+", " ") == pair[1].str.replace_all(r"\s+", " "),
        _roles("chosen") == _roles("rejected"),
    )
    found = rows.select("row", "chosen", "rejected", "__chosen", "__rejected")
    for test in tests:
        found = found.filter(test)
    return found["row"]


def _undescribed_calls(rows: pl.DataFrame, fields: tuple[str, ...]) -> list[int]:
    """Count for each row the calls of tools, or with arguments, that its `tools` do not describe."""
    if TOOLS not in rows.columns:
        return [0] * rows.height
    calls = rows.select(pl.concat_list(pl.col(name).list.eval(_CALLS) for name in fields).list.drop_nulls()).to_series()
    return [_undescribed(json.loads(tools), each) for tools, each in zip(rows[TOOLS], calls, strict=True)]


def _undescribed(tools: list[dict], calls: Iterable[str]) -> int:
    described = {tool["function"]["name"]: tool["function"].get("parameters") for tool in tools}
    called = [call["function"] for turn in calls for call in json.loads(turn)]
    return sum(call["name"] not in described or not _takes(described[call["name"]], call["arguments"]) for call in called)


def _takes(schema: object, arguments: dict) -> bool:
    """Tell whether a tool's schema names every argument; one that names none, or lets more be given, takes all."""
    named = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(named, dict) or not named or schema.get("additionalProperties"):
        return True
    return arguments.keys() <= named.keys()


def _spoken(rows: pl.DataFrame, kind: Kind) -> list[str]:
    """Return the whole of each row without its system turns."""
    fields = [pl.col(name).list.filter(_ROLE != "system").list.eval(_SAID).list.join("\n") for name in kind.texts()]
    return rows.select(pl.concat_str(fields, separator="\n")).to_series().to_list()


def user_turns(rows: pl.DataFrame) -> list[list[str]]:
    """Return the texts of the user's turns in what each of `as_messages` asks, or in its whole conversation."""
    turns = pl.col("messages" if "messages" in rows.columns else "prompt").list.filter(_ROLE == "user")
    return rows.select(turns.list.eval(_CONTENT)).to_series().to_list()


def whole_texts(rows: pl.DataFrame, kind: Kind) -> list[str]:
    """Return the whole of each of `as_messages`."""
    return rows.select(pl.concat_str([_text(name) for name in kind.texts()], separator="\n")).to_series().to_list()
