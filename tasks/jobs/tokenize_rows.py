"""Facts about rows as a trainer reads them: by the model's own tokenizer, its chat template and TRL's truncation.

`python -m tasks.jobs.tokenize_rows REQUEST.json`; the request names the canonical Parquet of the rows, the model, what trains
on them by which arguments, and the Parquet to write: `row` and the columns of `TOKEN_FACTS` for that method, one line per row.
It renders and encodes in batches, where TRL does both row by row. That the outcome is TRL's own is held by the tests, against
its trainers, and by every training job, which counts its trainer's tokens against these (`training.prove_rows`).
"""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from data_contracts.token_facts import TOKEN_FACTS
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.conversations import messages_of, tools_of

_CONFIG_CLASSES = {
    "sft": "SFTConfig",
    "reward_model": "RewardConfig",
    "dpo": "DPOConfig",
    "kto": "KTOConfig",
    "grpo": "GRPOConfig",
    "rloo": "RLOOConfig",
}
_BATCH_ROWS = 1000
Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Side:
    """A prompt and one reply to it, as strings or as messages; a whole text or conversation has no prompt."""

    prompt: str | Messages | None
    reply: str | Messages | None

    def whole(self, eos: str) -> str | Messages:
        """Return both in one; TRL closes a plain reply with the EOS token."""
        if isinstance(self.reply, str):
            closed = self.reply if self.reply.endswith(eos) else self.reply + eos
            return (self.prompt or "") + closed
        return (self.prompt or []) + self.reply


@dataclass
class Encoded:
    """The tokens of one side, and where the prompt's end in them; what is masked out of the loss besides the prompt."""

    prompt: list[int] | None
    ids: list[int]
    mask: list[int] | None = None


def main(request: Path) -> None:
    asked = json.loads(request.read_text())
    logging.set_verbosity_error()  # "longer than the model's maximum" is a fact here
    tokenizer = load_tokenizer(asked["model"], asked["tokenizer"])
    use = Use(asked["method"], asked["args"], tokenizer, asked["context"])
    found: list[dict[str, Any]] = []
    for batch in pq.ParquetFile(asked["rows"]).iter_batches(batch_size=_BATCH_ROWS):
        found += use.facts(batch.to_pylist())
    pq.write_table(pa.Table.from_pylist(found), asked["output"])


def load_tokenizer(model: str, args: dict[str, Any]) -> PreTrainedTokenizerBase:
    """Return the tokenizer as it will be when it trains: SFT's own arguments may change it, as SFTTrainer does."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    if args.get("eos_token"):
        tokenizer.eos_token = args["eos_token"]
    path = args.get("chat_template_path")
    if path and Path(path).is_file():
        tokenizer.chat_template = Path(path).read_text(encoding="utf-8")
    elif path:
        other = AutoTokenizer.from_pretrained(path)
        tokenizer.add_tokens(list(other.added_tokens_decoder.values()))
        tokenizer.chat_template, tokenizer.eos_token = other.chat_template, other.eos_token
    return tokenizer


class Use:
    """One trainer's way to read rows."""

    def __init__(self, method: str, args: dict[str, Any], tokenizer: PreTrainedTokenizerBase, context: int | None):
        self.method, self.tokenizer, self.context = method, tokenizer, context
        self.args = _defaults(method) | args
        self.max_length = self.args.get("max_length")
        self.keep_end = self.args.get("truncation_mode") == "keep_end"
        self.packing = bool(self.args.get("packing"))
        self.special = re.compile("|".join(map(re.escape, _special(tokenizer))) or r"(?!)")
        self.ends = _end_tokens(tokenizer)
        self.blank: dict[int, bool] = {}
        self.template = _training_template(tokenizer) if self.args.get("assistant_only_loss") else None

    def facts(self, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the facts about each row, in their order."""
        sides = [list(self._sides(row)) for row in rows]
        texts = [[self._rendered(side, tools_of(row)) for side in each] for row, each in zip(rows, sides, strict=True)]
        renders = [all(text is not None for text in each) for each in texts]
        encoded = iter(self._encoded([text for each, ok in zip(texts, renders, strict=True) if ok for text in each]))
        found = []
        for row, each, text, ok in zip(rows, sides, texts, renders, strict=True):
            said = self._about(each, text, [next(encoded) for _ in each]) if ok else self._unrendered()
            found.append(
                {"row": row["row"], "renders": ok}
                | {name: said[name] for name in TOKEN_FACTS[self.method] if name != "renders"}
            )
        return found

    def _sides(self, row: dict[str, Any]) -> Iterator[Side]:
        text = {name: messages_of(row[name]) for name in row if name in _FIELDS}
        if "chosen" in text:
            yield from (Side(text["prompt"], text[name]) for name in ("chosen", "rejected"))
        elif "completion" in text:
            yield Side(text["prompt"], text["completion"])
        elif "prompt" in text:
            yield Side(text["prompt"], None)
        else:
            yield Side(None, text["messages"] if "messages" in text else text["text"])

    def _rendered(self, side: Side, tools: list[dict] | None) -> "Text | None":
        """Return the prompt's and the whole's text, or None where the template refuses the row."""
        try:
            prompt = None if side.prompt is None else self._render(side.prompt, tools, opens_reply=True)
            whole = None if side.reply is None else self._render(side.whole(self.tokenizer.eos_token or ""), tools)
            mask = self._mask(side, tools) if self.template and side.reply is not None else None
        except Exception:  # a template raises whatever it likes: jinja's errors, its own, KeyError, TypeError
            return None
        is_plain = isinstance(side.prompt if side.reply is None else side.reply, str)
        return Text(prompt, whole, is_plain, mask)

    def _render(self, text: str | Messages, tools: list[dict] | None, opens_reply: bool = False) -> str:
        if isinstance(text, str):
            return text
        return self.tokenizer.apply_chat_template(
            text, tools=tools, tokenize=False, add_generation_prompt=opens_reply, chat_template=self.template,
            **(self.args.get("chat_template_kwargs") or {}),
        )  # fmt: skip

    def _mask(self, side: Side, tools: list[dict] | None) -> list[int]:
        """Return 1 for each token of the assistant's, as the template's {% generation %} marks it."""
        marked = self.tokenizer.apply_chat_template(
            side.whole(""), tools=tools, tokenize=True, return_dict=True, return_assistant_tokens_mask=True,
            chat_template=self.template,
        )  # fmt: skip
        return marked["assistant_masks"]

    def _encoded(self, texts: "list[Text]") -> list[Encoded]:
        prompts = self._ids([text.prompt for text in texts], texts)
        wholes = self._ids([text.whole for text in texts], texts)
        return [
            Encoded(prompt, prompt if whole is None else whole, text.mask)
            for prompt, whole, text in zip(prompts, wholes, texts, strict=True)
        ]

    def _ids(self, strings: Sequence[str | None], texts: "list[Text]") -> list[list[int] | None]:
        """Return the tokens of each string; a rendered one has its special tokens already."""
        ids: list[list[int] | None] = [None] * len(strings)
        for plain in (True, False):
            wanted = [n for n, text in enumerate(texts) if text.is_plain == plain and strings[n] is not None]
            if wanted:
                encoded = self.tokenizer([strings[n] for n in wanted], add_special_tokens=plain)["input_ids"]
                for n, each in zip(wanted, encoded, strict=True):
                    ids[n] = each
        return ids

    def _about(self, sides: list[Side], texts: "list[Text]", encoded: list[Encoded]) -> dict[str, Any]:
        trained = [self._trained(it) for it in encoded]
        dropped = self._is_dropped(encoded, trained)
        longest = max(len(it.ids) for it in encoded)
        return {
            "keeps_text": all(_keeps(side, text) for side, text in zip(sides, texts, strict=True)),
            "round_trips": all(self._round_trips(text, it) for text, it in zip(texts, encoded, strict=True)),
            "n_injected": sum(self._injected(side) for side in sides),
            "length": longest,
            "n_trained": 0 if dropped else min(map(len, trained)),
            "n_prepared": 0 if dropped else self._prepared(encoded),
            "is_dropped": dropped,
            "is_untrained": not dropped and not all(trained),
            "is_truncated": not dropped and self._cuts() and longest > self.max_length,
            "learns_to_end": dropped or all(map(self._learns_to_end, encoded, trained)),
            "prompt_is_prefix": all(it.prompt is None or it.ids[: len(it.prompt)] == it.prompt for it in encoded),
            "differs": dropped or len({tuple(ids) for ids in trained}) == len(trained),
            "has_room": self._has_room(longest),
        }

    def _unrendered(self) -> dict[str, Any]:
        return {"keeps_text": True, "round_trips": True, "n_injected": 0, "length": 0, "n_trained": 1, "n_prepared": 0,
                "is_dropped": False, "is_untrained": False, "is_truncated": False, "learns_to_end": True,
                "prompt_is_prefix": True, "differs": True, "has_room": True}  # fmt: skip

    def _trained(self, side: Encoded) -> list[int]:
        """Return the tokens of a side that are in the loss after truncation."""
        start = len(side.prompt or []) if self._masks_prompt() else 0
        kept = range(len(side.ids))
        if self.max_length is not None and not self.packing:
            kept = kept[-self.max_length :] if self.keep_end else kept[: self.max_length]
        return [side.ids[n] for n in kept if n >= start and (side.mask is None or side.mask[n])]

    def _masks_prompt(self) -> bool:
        """Tell whether the prompt is left out of the loss; a reward model reads it."""
        return self.method in ("dpo", "kto") or (self.method == "sft" and self.args.get("completion_only_loss") is not False)

    def _is_dropped(self, encoded: list[Encoded], trained: list[list[int]]) -> bool:
        """Tell whether TRL 1.12 leaves the row out; it says so in the title of a progress bar."""
        if self.method == "sft":
            return not self.packing and not trained[0]
        if self.max_length is None:
            return False
        if self.method == "reward_model":
            return any(len(it.ids) > self.max_length for it in encoded)
        return not self.keep_end and len(encoded[0].prompt) >= self.max_length

    def _cuts(self) -> bool:
        """Tell whether what is longer than `max_length` loses its end: some ways to pack go on in another sequence."""
        return self.max_length is not None and not (
            self.packing and self.args.get("packing_strategy") in ("wrapped", "bfd_split")
        )

    def _prepared(self, encoded: list[Encoded]) -> int:
        if self.method == "sft":
            return len(encoded[0].ids) if self.packing else min(len(encoded[0].ids), self.max_length or sys.maxsize)
        shared = len(encoded[0].prompt) if self.method == "dpo" else 0  # DPO keeps one prompt and two replies
        return shared + sum(max(0, len(it.ids) - shared) for it in encoded)

    def _learns_to_end(self, side: Encoded, trained: list[int]) -> bool:
        if self._cuts() and len(side.ids) > self.max_length:
            return True  # it is truncated, which has a fact of its own
        last = next((token for token in reversed(trained) if not self._is_blank(token)), None)
        return last in self.ends

    def _is_blank(self, token: int) -> bool:
        if token not in self.blank:
            self.blank[token] = not self.tokenizer.decode([token]).strip()
        return self.blank[token]

    def _round_trips(self, text: "Text", side: Encoded) -> bool:
        written = text.prompt if text.whole is None else text.whole
        normalizer = self.tokenizer.backend_tokenizer.normalizer if self.tokenizer.is_fast else None
        written = normalizer.normalize_str(written) if normalizer else written  # of é and é one is meant to become the other
        read = self.tokenizer.decode(side.ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        return _squeezed(written) in _squeezed(read) if text.is_plain else _squeezed(written) == _squeezed(read)

    def _injected(self, side: Side) -> int:
        """Count special tokens in what was said; a plain string may be rendered text, whose tokens are meant."""
        turns = [turn for part in (side.prompt, side.reply) if isinstance(part, list) for turn in part]
        return sum(len(self.special.findall(turn.get("content") or "")) for turn in turns)

    def _has_room(self, length: int) -> bool:
        return self.context is None or length + (self.args.get("max_completion_length") or 0) <= self.context


@dataclass(frozen=True)
class Text:
    """What the tokenizer is given for one side."""

    prompt: str | None
    whole: str | None
    is_plain: bool
    mask: list[int] | None = None


_FIELDS = ("prompt", "completion", "chosen", "rejected", "messages", "text")


def _defaults(method: str) -> dict[str, Any]:
    """Return the arguments of TRL's own config that a profile has not set."""
    if method not in _CONFIG_CLASSES:
        return {}
    import trl

    return {field.name: field.default for field in fields(getattr(trl, _CONFIG_CLASSES[method]))}


def _training_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the template that marks what the assistant says, as SFTTrainer finds it; raises if there is none."""
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    if has_generation_markers(tokenizer.chat_template):
        return tokenizer.chat_template
    return get_training_chat_template(tokenizer)


def _special(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({*added, *tokenizer.all_special_tokens}, key=len, reverse=True)


def _end_tokens(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the tokens at which generation stops: the tokenizer's, and those of the model's generation config."""
    path = Path(tokenizer.name_or_path) / "generation_config.json"
    own = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return {*(own if isinstance(own, list) else [own]), tokenizer.eos_token_id} - {None}


def _keeps(side: Side, text: "Text") -> bool:
    turns = [turn for part in (side.prompt, side.reply) if isinstance(part, list) for turn in part]
    spoken = [turn["content"].strip() for turn in turns if turn["role"] != "tool" and not turn.get("tool_calls")]
    shown = text.prompt if text.whole is None else text.whole
    return all(said in shown for said in spoken)


def _squeezed(text: str) -> str:
    return "".join(text.split())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
