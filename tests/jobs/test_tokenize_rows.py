"""What is said of rows and tokens is what TRL makes of them: each fact is held against a real trainer's dataset."""

import contextlib
import json
from typing import Any

import pytest
from datasets import Dataset
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from data_contracts.token_facts import TOKEN_FACTS
from tasks.jobs import without_vllm  # noqa: F401
from tasks.jobs.conversations import with_tool_calls
from tasks.jobs.tokenize_rows import Use
from tasks.jobs.training import prove_rows

from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer  # isort: skip

pytestmark = [pytest.mark.job, pytest.mark.timeout(600)]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% for call in m.tool_calls or [] %}{{ call.function | tojson }}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if tools %}{{ tools | length }} tools{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
STRICT = "{% if messages[0].role == 'system' %}{{ raise_exception('no system turn') }}{% endif %}" + CHATML


def tokenizer(template: str = CHATML, adds_bos: bool = False) -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer that merges over the border of prompt and reply, as real ones do."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|pad|>", "<|im_start|>", "<|im_end|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=420, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(["Say hello to the other one, and then count: one two three four."] * 9, trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 3)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>" if adds_bos else None, eos_token="<|im_end|>", pad_token="<|pad|>"
    )
    made.chat_template = template
    return made


TOKENIZER, WITH_BOS, WITH_MARKS = tokenizer(), tokenizer(adds_bos=True), tokenizer(MARKED)
SIZE = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "pad_token_id": 0}
CONFIG = LlamaConfig(vocab_size=len(TOKENIZER), **SIZE)

TEXT = st.text("abehlnot o 1\n\té😀", max_size=40) | st.sampled_from(
    ["one two", " three", "four" * 20, "x<|im_end|>y", "Say hello"]
)
PLAIN = TEXT.filter(str.strip)


@pytest.fixture(scope="module")
def saved_model(tmp_path_factory) -> str:
    """A model with a folder, from which DPOTrainer and KTOTrainer load their reference."""
    folder = tmp_path_factory.mktemp("model")
    LlamaForCausalLM(CONFIG).save_pretrained(folder)
    return str(folder)


def spoken(*roles: str) -> st.SearchStrategy[list[dict]]:
    return st.tuples(*(st.fixed_dictionaries({"role": st.just(role), "content": TEXT}) for role in roles)).map(list)


ASKED = st.one_of(spoken("user"), spoken("system", "user"), spoken("user", "assistant", "user"))
SAID = spoken("assistant")
ROWS = {
    "language_modeling": ({"text": PLAIN}, {"messages": st.one_of(spoken("user", "assistant"), spoken("user", "assistant") )}),
    "prompt_completion": ({"prompt": PLAIN, "completion": PLAIN}, {"prompt": ASKED, "completion": SAID}),
    "preference": (
        {"prompt": PLAIN, "chosen": PLAIN, "rejected": PLAIN},
        {"prompt": ASKED, "chosen": SAID, "rejected": SAID},
    ),
    "unpaired_preference": (
        {"prompt": PLAIN, "completion": PLAIN, "label": st.booleans()},
        {"prompt": ASKED, "completion": SAID, "label": st.booleans()},
    ),
}  # fmt: skip


def some(kind: str, form: int) -> st.SearchStrategy[list[dict]]:
    rows = st.lists(st.fixed_dictionaries(ROWS[kind][form]), min_size=4, max_size=8)
    return rows.map(lambda drawn: [row | {"row": number} for number, row in enumerate(drawn)])


ARGS = st.fixed_dictionaries({"max_length": st.sampled_from([None, 8, 24, 64])})
EITHER_END = st.fixed_dictionaries(
    {"max_length": st.sampled_from([None, 8, 24, 64]), "truncation_mode": st.sampled_from(["keep_start", "keep_end"])}
)
MANY = settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))


def prepared(trainer_class: type, config_class: type, args: dict, rows: list[dict], speaks: Any, model: Any = None) -> Any:
    """Return the real trainer, its dataset made; None if TRL left nothing to train on."""
    model = model or LlamaForCausalLM(CONFIG)
    config = config_class(output_dir="unused", report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, **args)
    with contextlib.suppress(IndexError, StopIteration):  # what some trainers raise on an empty dataset
        data = with_tool_calls(Dataset.from_list(rows))
        return trainer_class(model=model, args=config, train_dataset=data, processing_class=speaks)
    return None


def told(method: str, args: dict, rows: list[dict], speaks: Any) -> list[dict]:
    found = Use(method, args, speaks, None).facts(rows)
    assert [set(row) for row in found] == [{"row", *TOKEN_FACTS[method]}] * len(rows)
    return found


def kept(found: list[dict]) -> list[int]:
    return [row["row"] for row in found if not row["is_dropped"]]


@pytest.mark.parametrize("kind", ["language_modeling", "prompt_completion"])
@pytest.mark.parametrize(("form", "speaks"), [(0, TOKENIZER), (0, WITH_BOS), (1, TOKENIZER)], ids=["standard", "bos", "spoken"])
def test_sft_rows_are_kept_cut_and_masked_as_sfttrainer_does(kind, form, speaks):
    @MANY
    @given(some(kind, form), EITHER_END, st.sampled_from([None, False] if kind == "prompt_completion" else [None]))
    def check(rows, args, only):
        args = args | {"completion_only_loss": only}
        found = told("sft", args, rows, speaks)
        trainer = prepared(SFTTrainer, SFTConfig, args | {"eos_token": "<|im_end|>"}, rows, speaks)
        data = {row["row"]: row for row in trainer.train_dataset} if trainer else {}
        assert kept(found) == sorted(data)
        for fact in found:
            if row := data.get(fact["row"]):
                assert fact["n_prepared"] == len(row["input_ids"])
                assert fact["n_trained"] == sum(label != -100 for label in row["labels"])
                last = [label for label in row["labels"] if label != -100 and speaks.decode([label]).strip()][-1:]
                assert fact["learns_to_end"] == (fact["is_truncated"] or last == [speaks.eos_token_id])

    check()


def test_sft_on_the_assistants_turns_alone_is_masked_as_sfttrainer_does():
    rows = st.lists(
        st.fixed_dictionaries({"messages": spoken("user", "assistant", "user", "assistant")}), min_size=3, max_size=6
    )

    @MANY
    @given(rows.map(lambda drawn: [row | {"row": number} for number, row in enumerate(drawn)]), ARGS)
    def check(rows, args):
        args = args | {"assistant_only_loss": True}
        found = told("sft", args, rows, WITH_MARKS)
        trainer = prepared(SFTTrainer, SFTConfig, args, rows, WITH_MARKS)
        data = {row["row"]: row for row in trainer.train_dataset} if trainer else {}
        assert kept(found) == sorted(data)
        for row in data.values():
            assert found[row["row"]]["n_trained"] == sum(label != -100 for label in row["labels"])

    check()


@pytest.mark.parametrize(("form", "speaks"), [(0, TOKENIZER), (0, WITH_BOS), (1, TOKENIZER)], ids=["standard", "bos", "spoken"])
def test_pairs_are_kept_and_cut_as_dpotrainer_does(form, speaks, saved_model):
    @MANY
    @given(some("preference", form), EITHER_END)
    def check(rows, args):
        found = told("dpo", args, rows, speaks)
        trainer = prepared(DPOTrainer, DPOConfig, args, rows, speaks, LlamaForCausalLM.from_pretrained(saved_model))
        data = {row["row"]: row for row in trainer.train_dataset} if trainer else {}
        assert kept(found) == sorted(data)
        for fact in found:
            if row := data.get(fact["row"]):
                assert fact["n_prepared"] == sum(len(row[name]) for name in ("prompt_ids", "chosen_ids", "rejected_ids"))
                batch = trainer.data_collator([row])
                sides = [
                    ids[mask.bool()].tolist() for ids, mask in zip(batch["input_ids"], batch["completion_mask"], strict=True)
                ]
                assert fact["n_trained"] == min(map(len, sides))
                assert fact["differs"] == (sides[0] != sides[1])

    check()


@pytest.mark.parametrize("form", [0, 1], ids=["standard", "conversational"])
def test_pairs_are_kept_as_rewardtrainer_does(form):
    model = LlamaForSequenceClassification(LlamaConfig(vocab_size=len(TOKENIZER), num_labels=1, **SIZE))

    @MANY
    @given(some("preference", form), ARGS)
    def check(rows, args):
        found = told("reward_model", args, rows, TOKENIZER)
        trainer = prepared(RewardTrainer, RewardConfig, args, rows, TOKENIZER, model)
        data = {row["row"]: row for row in trainer.train_dataset} if trainer else {}
        assert kept(found) == sorted(data)
        for row in data.values():
            assert found[row["row"]]["n_prepared"] == len(row["chosen_ids"]) + len(row["rejected_ids"])

    check()


@pytest.mark.parametrize("form", [0, 1], ids=["standard", "conversational"])
def test_labelled_replies_are_kept_as_ktotrainer_does(form, saved_model):
    @MANY
    @given(some("unpaired_preference", form), ARGS)
    def check(rows, args):
        found = told("kto", args, rows, TOKENIZER)
        args = args | {"per_device_train_batch_size": 2, "loss_type": "apo_zero_unpaired"}  # the one without KL pairs
        trainer = prepared(KTOTrainer, KTOConfig, args, rows, TOKENIZER, LlamaForCausalLM.from_pretrained(saved_model))
        data = {row["row"]: row for row in trainer.train_dataset} if trainer else {}
        assert kept(found) == sorted(data)
        for row in data.values():
            ids = row["prompt_ids"], row["completion_ids"]
            assert found[row["row"]]["n_prepared"] == sum(map(len, ids))

    check()


def one(method: str, row: dict, speaks: Any = TOKENIZER, context: int | None = None, **args: Any) -> dict:
    return Use(method, args, speaks, context).facts([row | {"row": 0}])[0]


def user(text: str) -> list[dict]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict]:
    return [{"role": "assistant", "content": text}]


CLEAN = {"prompt": user("Say one"), "completion": assistant("one")}


def test_clean_row_has_nothing_said_against_it():
    found = one("sft", CLEAN)
    assert (
        found["renders"]
        and found["keeps_text"]
        and found["round_trips"]
        and found["learns_to_end"]
        and found["prompt_is_prefix"]
    )
    assert not (found["is_dropped"] or found["is_untrained"] or found["is_truncated"] or found["n_injected"])


@pytest.mark.parametrize(
    ("template", "fact"),
    [
        (STRICT, "renders"),
        (CHATML.replace("{{ m.content or '' }}", "{{ m.content.upper() }}"), "keeps_text"),
        (CHATML.replace("<|im_end|>", ""), "learns_to_end"),
        (CHATML.replace("assistant\n", "assistant\n<think>\n"), "prompt_is_prefix"),
    ],
    ids=["template raises", "template rewrites", "template never ends the turn", "template opens a thought"],
)
def test_template_that_does_not_suit_the_rows_is_seen(template, fact):
    row = {"prompt": [{"role": "system", "content": "Be brief"}, *user("Say one")], "completion": assistant("one")}
    assert one("sft", row)[fact]
    assert not one("sft", row, tokenizer(template))[fact]


def test_special_token_in_a_message_is_counted_and_in_rendered_text_is_not():
    assert one("sft", CLEAN | {"completion": assistant("a<|im_end|>b<|im_start|>")})["n_injected"] == 2
    assert one("sft", {"text": "<|im_start|>user\nSay one<|im_end|>"})["n_injected"] == 0


def test_characters_that_the_tokenizer_does_not_know_do_not_round_trip():
    few = Tokenizer(models.WordLevel({"<unk>": 0, "Say": 1, "one": 2, "<|im_end|>": 3, "<|pad|>": 4}, unk_token="<unk>"))
    few.pre_tokenizer = pre_tokenizers.Whitespace()
    knows = PreTrainedTokenizerFast(tokenizer_object=few, unk_token="<unk>", eos_token="<|im_end|>", pad_token="<|pad|>")
    assert one("sft", {"text": "Say one"}, knows)["round_trips"]
    assert not one("sft", {"text": "Say two"}, knows)["round_trips"]


def test_assistant_only_loss_without_marks_in_the_template_trains_nothing_and_says_so():
    unmarked = "{% for m in messages %}{{ m.role }}{% generation %}{% endgeneration %}{{ m.content }}<|im_end|>{% endfor %}"
    found = one("sft", {"messages": user("a") + assistant("b")}, tokenizer(unmarked), assistant_only_loss=True)
    assert found["is_dropped"]


def test_prompt_leaves_room_for_the_longest_reply_or_not():
    row = {"prompt": user("Say one")}
    length = one("grpo", row)["length"]
    assert one("grpo", row, context=length + 10, max_completion_length=10)["has_room"]
    assert not one("grpo", row, context=length + 9, max_completion_length=10)["has_room"]


def test_pair_that_truncation_makes_equal_is_seen():
    pair = {"prompt": user("Say"), "chosen": assistant("one " * 40 + "two"), "rejected": assistant("one " * 40 + "three")}
    assert one("dpo", pair, max_length=None)["differs"]
    assert not one("dpo", pair, max_length=20)["differs"]


def test_tool_calls_reach_the_template_as_they_stand_in_the_source():
    """Arrow alone would fill each call's arguments with those of all others, as nulls."""
    tools = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}]
    others = [{"type": "function", "function": {"name": "sub", "arguments": {"b": [2]}}}]
    empty = {"tool_call_id": None, "name": None}
    turns = [[{"role": "assistant", "content": None, "tool_calls": json.dumps(made)} | empty] for made in (calls, others)]
    asked = [{"role": "user", "content": "1 + 1", "tool_calls": None} | empty]
    rows = [{"messages": asked + turn, "tools": json.dumps(tools), "row": number} for number, turn in enumerate(turns)]
    data = with_tool_calls(Dataset.from_list(rows))
    assert data[0]["messages"] == [{"role": "user", "content": "1 + 1"}, {"role": "assistant", "tool_calls": calls}]
    found = told("sft", {}, rows, TOKENIZER)
    trainer = prepared(SFTTrainer, SFTConfig, {}, rows, TOKENIZER)
    assert [row["n_prepared"] for row in found] == [len(row["input_ids"]) for row in trainer.train_dataset]
    shown = TOKENIZER.decode(trainer.train_dataset[0]["input_ids"])
    assert '{"name": "add", "arguments": {"a": 1}}' in shown and "1 tools" in shown


@pytest.mark.parametrize(("more", "packing"), [(0, False), (1, False), (0, True), (1, True)])
def test_trainer_that_prepared_other_tokens_than_were_judged_does_not_train(more, packing, spec, tmp_path):
    rows = [CLEAN | {"row": number} for number in range(3)]
    found = told("sft", {}, rows, TOKENIZER)
    judged = {"rows": 3, "tokens": sum(row["n_prepared"] for row in found) + more, "truncated": 0}
    manifest = {"artifact": {"details": {"tokens": {"sft": judged}}}}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    asked = spec("sft", inputs={"rows": str(tmp_path)})
    data = prepared(SFTTrainer, SFTConfig, {"packing": packing, "max_length": 64}, rows, TOKENIZER).train_dataset
    with pytest.raises(RuntimeError, match="the contract judged 3 rows") if more else contextlib.nullcontext():
        prove_rows(asked, data, packing=packing)
