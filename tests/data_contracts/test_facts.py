"""Facts say what is so: each is held against a second derivation that knows only the rows."""

import json
from collections import Counter

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from data_contracts.facts import fact_columns, facts
from data_contracts.held_out import HeldOut
from data_contracts.kinds import KINDS
from data_contracts.rows import read_rows


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def facts_of(write_rows):
    def read_and_look(rows: list[dict], kind: str, held_out=None):
        return facts(read_rows(write_rows(rows), kind), kind, held_out)

    return read_and_look


def test_facts_of_every_kind_have_its_columns_and_no_null(kind_and_form, clean_rows, facts_of):
    kind, form = kind_and_form
    found = facts_of(clean_rows(kind, form, 10), kind)
    assert list(found.columns) == fact_columns(kind)
    assert len(found) == 10
    assert not found.isna().any().any()
    assert not found[[name for name in found if name.startswith(("is_dup", "has_", "overlaps"))]].any().any()


def test_facts_about_a_conversation_are_counted_by_hand(facts_of):
    turns = [{"role": "system", "content": " \n"}, user('"quoted"'), assistant("a<|im_end|>b"), user("é"), assistant("x")]
    found = facts_of([{"messages": turns}], "language_modeling").iloc[0]
    assert found["messages_roles"] == "suaua"
    assert found["messages_chars"] == 2 + 8 + 12 + 1 + 1
    assert (found["n_messages"], found["n_empty_messages"], found["n_json_quoted"], found["n_control_markers"]) == (5, 1, 1, 1)


@pytest.mark.parametrize(
    ("text", "is_json_string"),
    [
        ('"plain"', 1),
        (r'"with \"escapes\" and \n"', 1),
        ('"Two," he said, "quotes"', 0),
        ('"a line\nbreak"', 0),
        ('"open', 0),
        ('"', 0),
    ],
)
def test_json_quoted_is_a_whole_json_string(text, is_json_string, facts_of):
    assert facts_of([{"text": text}], "language_modeling")["n_json_quoted"].tolist() == [is_json_string]


def test_control_markers_in_rendered_text_are_meant(facts_of):
    text = "<|im_start|>user\nHi<|im_end|>"
    assert facts_of([{"text": text}], "language_modeling")["n_control_markers"].tolist() == [0]
    row = {"prompt": [user(text)], "completion": [assistant("Hello")]}
    assert facts_of([row], "prompt_completion")["n_control_markers"].tolist() == [1]


@pytest.mark.parametrize(
    ("chosen", "rejected", "expected"),
    [
        ("yes", "yes", {"is_tie"}),
        ("yes", " yes\n", {"is_tie"}),
        ("yes, of course", "yes", {"rejected_is_prefix", "is_chosen_longer"}),
        ("yes", "yes, of course", {"chosen_is_prefix"}),
        ("yes", "no", {"is_chosen_longer"}),
        ("Yes", "yes", set()),
    ],
)
def test_facts_about_a_pair_say_how_its_sides_compare(chosen, rejected, expected, facts_of):
    plain = {"prompt": "Well?", "chosen": chosen, "rejected": rejected}
    spoken = {"prompt": [user("Well?")], "chosen": [assistant(chosen)], "rejected": [assistant(rejected)]}
    for row in (plain, spoken):
        found = facts_of([row], "preference").iloc[0]
        flags = {"is_tie", "chosen_is_prefix", "rejected_is_prefix", "is_chosen_longer"}
        assert {flag for flag in flags if found[flag]} == expected
        assert found["len_ratio"] == pytest.approx((len(chosen) + 1) / (len(rejected) + 1))


def test_duplicates_are_the_later_ones_and_only_exact(facts_of):
    pairs = [("a", "1"), ("b", "2"), ("a", "1"), ("a", "3"), ("A", "1"), ("a ", "1"), ("b", "2")]
    found = facts_of([{"prompt": p, "completion": c} for p, c in pairs], "prompt_completion")
    assert found["row"][found["is_duplicate"]].tolist() == [2, 6]
    assert found["row"][found["is_duplicate_prompt"]].tolist() == [2, 3, 6]


def test_duplicates_are_not_made_by_moving_text_between_messages(facts_of):
    split = [[user("ab"), assistant("c")], [user("a"), assistant("bc")], [user("ab")], [user("a"), user("b")]]
    assert not facts_of([{"messages": turns} for turns in split], "language_modeling")["is_duplicate"].any()


def test_duplicates_differ_by_their_extra_columns_and_system_turn(facts_of):
    rows = [{"prompt": "a", "solution": s} for s in ("1", "2", "1")]
    assert facts_of(rows, "prompt_only")["is_duplicate"].tolist() == [False, False, True]
    rows = [{"prompt": [{"role": "system", "content": s}, user("a")]} for s in ("x", "y", "x")]
    assert facts_of(rows, "prompt_only")["is_duplicate_prompt"].tolist() == [False, False, True]


def test_rival_answers_are_marked_on_every_side(facts_of):
    rows = [{"prompt": p, "answer": a} for p, a in (("a", "1"), ("b", "2"), ("a", "3"), ("b", "2"))]
    assert facts_of(rows, "eval")["has_rival_answer"].tolist() == [True, False, True, False]


def test_prompt_hash_is_the_same_for_every_way_to_ask(facts_of, write_rows):
    asked = "What is 2 + 2?"
    ways = {
        "eval": {"prompt": asked, "answer": "4"},
        "prompt_only": {"prompt": [{"role": "system", "content": "Be brief."}, user(f"  {asked.upper()}\n")]},
        "prompt_completion": {"prompt": "What is\t2 +  2?", "completion": "4"},
        "language_modeling": {"messages": [user(asked), assistant("4"), user("And 3 + 3?"), assistant("6")]},
    }
    hashes = [facts_of([row], kind)["prompt_hash"].iloc[0] for kind, row in ways.items()]
    assert len(set(hashes)) == 1
    assert HeldOut.of(read_rows(write_rows([ways["eval"]]), "eval"), "eval").prompts == set(hashes)


def test_overlap_is_found_in_the_prompt_and_in_any_user_turn(facts_of, write_rows):
    held_out = HeldOut.of(read_rows(write_rows([{"prompt": "And 3 + 3?", "answer": "6"}]), "eval"), "eval").prompts
    rows = [
        {"messages": [user("and 3 + 3?"), assistant("6")]},
        {"messages": [user("Hello"), assistant("Hi"), user("And 3 + 3?"), assistant("6")]},
        {"messages": [user("Hello"), assistant("And 3 + 3?")]},  # said by the model, not asked
    ]
    found = facts_of(rows, "language_modeling", held_out)
    assert found["overlaps_eval"].tolist() == [True, True, False]
    assert set(found["n_held_out"]) == {1}


def test_facts_of_a_table_of_another_kind_are_a_value_error(write_rows, clean_rows):
    table = read_rows(write_rows(clean_rows("eval", "standard", 3)), "eval")
    with pytest.raises(ValueError, match="eval rows, not prompt_only"):
        facts(table, "prompt_only")


_TEXT = st.sampled_from(["", " ", "a", "b", '"a"', "no input", "{{x}}", "ab", "</s>"])
_TURN = st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), _TEXT)
_TURNS = st.lists(_TURN, min_size=1, max_size=3)
_PAIRS = st.lists(st.fixed_dictionaries({"prompt": _TURNS, "chosen": _TURNS, "rejected": _TURNS}), min_size=1, max_size=6)


@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=_PAIRS)
def test_facts_of_random_pairs_agree_with_a_plain_count(rows, facts_of):
    found = facts_of(rows, "preference")
    every = [row["prompt"] + row["chosen"] + row["rejected"] for row in rows]
    assert found["n_messages"].tolist() == [len(turns) for turns in every]
    assert found["n_empty_messages"].tolist() == [sum(not turn["content"].strip() for turn in turns) for turns in every]
    assert found["n_control_markers"].tolist() == [sum(turn["content"] == "</s>" for turn in turns) for turns in every]
    assert found["has_placeholder"].tolist() == [
        any(turn["content"] in ("no input", "{{x}}") for turn in turns) for turns in every
    ]
    assert found["is_duplicate"].tolist() == [row in rows[:number] for number, row in enumerate(rows)]
    prompts = [row["prompt"] for row in rows]
    assert found["is_duplicate_prompt"].tolist() == [prompt in prompts[:n] for n, prompt in enumerate(prompts)]
    assert found["chosen_roles"].tolist() == ["".join(turn["role"][0] for turn in row["chosen"]) for row in rows]


def _repeats(values: list) -> int:
    return sum(count - 1 for count in Counter(values).values())


def test_facts_of_the_dpo_demo_agree_with_a_plain_count(shared_data):
    path = shared_data / "llama-factory-demo" / "dpo_en_demo.json"
    rows = json.loads(path.read_text())
    found = facts(read_rows(path, "preference", layout="sharegpt"), "preference")
    assert len(found) == len(rows) == 300
    assert found["is_duplicate_prompt"].sum() == _repeats([json.dumps(row["conversations"]) for row in rows]) == 5
    assert found["is_tie"].sum() == sum(row["chosen"]["value"] == row["rejected"]["value"] for row in rows)
    assert found["chosen_chars"].tolist() == [len(row["chosen"]["value"]) for row in rows]
    letters = {"system": "s", "human": "u", "gpt": "a"}
    assert found["prompt_roles"].tolist() == ["".join(letters[t["from"]] for t in row["conversations"]) for row in rows]


def test_facts_of_the_alpaca_demo_agree_with_a_plain_count(shared_data):
    path = shared_data / "llama-factory-demo" / "alpaca_en_demo.json"
    rows = json.loads(path.read_text())
    found = facts(read_rows(path, "prompt_completion", layout="alpaca"), "prompt_completion")
    assert found["is_duplicate_prompt"].sum() == _repeats([(row["instruction"], row["input"]) for row in rows]) == 14
    marked = [row["input"].lower().replace(" ", "").strip("`<>.") == "noinput" for row in rows]
    assert found["has_placeholder"].tolist() == marked
    assert sum(marked) == 8
    assert (found["completion_chars"] == 1).sum() == 1


@pytest.fixture
def renamed(shared_data, write_rows):
    """Reads one of GSM8K's two files as rows of a kind."""

    def read(name: str, kind: str, reply: str, path: str):
        lines = [json.loads(line) for line in (shared_data / "gsm8k" / name).read_text().splitlines()]
        rows = [{"prompt": line["question"], reply: line["answer"]} for line in lines]
        return read_rows(write_rows(rows, path), kind)

    return read


def test_facts_of_gsm8k_find_the_train_rows_that_quote_its_test_set_as_a_plain_search_does(shared_data, renamed):
    def lines(name: str) -> list[dict]:
        return [json.loads(line) for line in (shared_data / "gsm8k" / name).read_text().splitlines()]

    def thirteens(text: str) -> set[tuple[str, ...]]:
        words = text.casefold().split()
        return set(zip(*(words[start:] for start in range(13)), strict=False))

    asked = Counter(
        passage for question in {line["question"] for line in lines("test.jsonl")} for passage in thirteens(question)
    )
    own = {passage for passage, count in asked.items() if count == 1}
    quoting = [bool(thirteens(f"{line['question']}\n{line['answer']}") & own) for line in lines("train.jsonl")]
    passages = HeldOut.of(renamed("test.jsonl", "eval", "answer", "test.jsonl"), "eval").passages
    train = renamed("train.jsonl", "prompt_completion", "completion", "train.jsonl")
    assert facts(train, "prompt_completion", {"x"}, passages)["quotes_eval"].tolist() == quoting
    assert sum(quoting) == 4


def test_facts_of_gsm8k_see_its_test_set_in_a_train_set_that_holds_it(renamed):
    held_out = HeldOut.of(renamed("test.jsonl", "eval", "answer", "test.jsonl"), "eval").prompts
    train = renamed("train.jsonl", "prompt_completion", "completion", "train.jsonl")
    leaked = renamed("test.jsonl", "prompt_completion", "completion", "leaked.jsonl")
    assert train.num_rows == 7473
    assert not facts(train, "prompt_completion", held_out)["overlaps_eval"].any()
    assert facts(leaked, "prompt_completion", held_out)["overlaps_eval"].all()


def test_gsm8k_as_it_comes_is_refused_with_both_sets_of_columns(shared_data):
    with pytest.raises(ValueError) as refused:
        read_rows(shared_data / "gsm8k" / "test.jsonl", "eval")
    assert refused.value.total == 1319
    assert all(column in str(refused.value) for column in ("question", "prompt", "answer"))


def test_fact_columns_are_there_for_every_kind():
    assert all(len(fact_columns(kind)) == len(set(fact_columns(kind))) > 10 for kind in KINDS)


SHEEP = "a farmer has nine sheep and sells four of them on Monday before breakfast, how many are left"
TEMPLATE = "You are given a question about arithmetic and must answer it with one number only, please, and no more:"


@pytest.fixture
def passages(write_rows) -> frozenset[str]:
    prompts = [f"{TEMPLATE} {SHEEP}", f"{TEMPLATE} one plus one", "Say 6"]
    return HeldOut.of(read_rows(write_rows([{"prompt": p, "answer": "5"} for p in prompts]), "eval"), "eval").passages


@pytest.mark.parametrize(
    ("said", "quotes"),
    [
        ("It went: A FARMER  has nine sheep and sells four of them on Monday, they say", False),  # 12 words, and "Monday,"
        ("It went: A FARMER  has nine sheep and sells four of them on Monday before breakfast", True),
        (TEMPLATE, False),  # two prompts have it
        ("Say 6", False),  # too short to tell a quotation; a whole prompt is another fact's business
    ],
)
def test_row_quotes_eval_if_thirteen_words_of_one_held_out_prompt_alone_stand_in_it(said, quotes, passages, write_rows):
    rows = [{"prompt": "Tell me a story", "completion": said}, {"prompt": "Say 1", "completion": " 1."}]
    found = facts(read_rows(write_rows(rows, "train.jsonl"), "prompt_completion"), "prompt_completion", {"x"}, passages)
    assert found["quotes_eval"].tolist() == [quotes, False]


def _called(name: str, **arguments) -> dict:
    return {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}]}


@pytest.mark.parametrize(
    ("parameters", "call", "undescribed"),
    [
        ({"type": "object", "properties": {"city": {}}}, _called("weather", city="Rome"), 0),
        ({"type": "object", "properties": {"city": {}}}, _called("weather", city="Rome", day=None), 1),
        ({"type": "object", "properties": {"city": {}}, "additionalProperties": True}, _called("weather", day=1), 0),
        ({"type": "object"}, _called("weather", day=1), 0),
        (None, _called("weather", day=1), 0),
        ({"type": "object"}, _called("wether"), 1),
    ],
    ids=["described", "argument", "more allowed", "no properties", "no schema", "tool"],
)
def test_call_that_the_tools_of_its_row_do_not_describe_is_counted(parameters, call, undescribed, facts_of):
    tool = {"type": "function", "function": {"name": "weather"} | ({"parameters": parameters} if parameters else {})}
    row = {"messages": [user("And tomorrow?"), call, {"role": "tool", "content": "Rain"}, assistant("Rain.")], "tools": [tool]}
    found = facts_of([row], "language_modeling").iloc[0]
    assert (found["messages_roles"], found["n_undescribed_calls"]) == ("ucta", undescribed)


def test_near_duplicates_are_rows_that_nearly_repeat_an_earlier_one_and_no_exact_ones(facts_of):
    long = " ".join(f"word{n}" for n in range(200))
    texts = [long, long, long.replace("word100", "changed"), "Something else, and short."]
    found = facts_of([{"text": text} for text in texts], "language_modeling")
    assert found["is_duplicate"].tolist() == [False, True, False, False]
    assert found["is_near_duplicate"].tolist() == [False, False, True, False]


_SPACES = st.sampled_from(["", " ", "\n", "\t \t", "\u00a0 "])
_WORDS = st.lists(st.sampled_from(["a", "b", "ab", "é" * 40, "x" * 31]), max_size=8)
_REPLIES = st.builds(
    lambda words, one, other, more: (one.join(words), other.join(words) + more),
    _WORDS,
    _SPACES,
    _SPACES,
    _SPACES | st.just(" a"),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pairs=st.lists(_REPLIES, min_size=1, max_size=30))
def test_pair_is_a_tie_where_both_replies_have_the_same_words(pairs, write_rows):
    rows = [{"prompt": "Say it", "chosen": one, "rejected": other} for one, other in pairs]
    found = facts(read_rows(write_rows(rows), "preference"), "preference")
    assert found["is_tie"].tolist() == [one.split() == other.split() for one, other in pairs]
