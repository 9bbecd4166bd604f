"""Contracts: what rows of a kind must be, kept in `<kind>.yaml` beside this file, and the judgement by them."""

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pandas as pd
import yaml

from data_contracts import suite
from data_contracts.facts import fact_columns
from data_contracts.kinds import KINDS
from data_contracts.spark import Spark
from data_contracts.suite import ContractInvalid
from data_contracts.token_facts import TOKEN_FACTS
from data_contracts.verdict import Verdict

__all__ = ["Contract", "ContractInvalid", "contract_for", "judge", "judge_by", "offending_rows", "read_contract"]

QUARANTINE = "quarantine_ratio_max"
TOKENS = "tokens"
_FOLDER = Path(__file__).parent
_KEYS = {"type", "kwargs", "meta", "severity", "notes"}
_VALUE = re.compile(r"(?:(1) ([-/]) )?\$(\w+)")  # $limit, 1 - $limit, 1 / $limit
_BARE_DOLLAR = re.compile(r"(?<!\\)\$")
_ROW_COUNT = "expect_table_row_count_to_be_between"


@dataclass(frozen=True)
class Contract:
    """The rules for one kind of row, with the limits that a profile may set."""

    kind: str
    version: str
    limits: dict[str, float]
    expectations: tuple[dict, ...]  # as the file spells them, `$limit` unresolved
    columns: tuple[str, ...]  # of the table that is judged; none of them may be null
    loosened: tuple[str, ...] = ()
    quarantine_ratio_max: float = 0.0  # share of the rows that may be set aside so that the rest trains; 0: none
    spark: Spark | None = None  # what judges, if not pandas; no verdict depends on it

    def _limit_of(self, rule: dict) -> str:
        """Return the settings that decide about a rule, with their values; nothing where there are none."""
        return ", ".join(f"contract.{name} is {self.limits[name]}" for name in dict.fromkeys(_named_limits(rule)))

    def with_limits(self, limits: Mapping[str, float]) -> "Contract":
        """Return this contract with some limits set. Needs no Great Expectations: a profile can be checked by it."""
        limits = dict(limits)
        share = limits.pop(QUARANTINE, 0.0)
        if why := _not_a_limit(QUARANTINE, share):
            raise ContractInvalid(f"{self.kind} limit {QUARANTINE} is {share!r}: {why}")
        for name, value in limits.items():
            self._refuse_limit(name, value)
        wider = [name for name, value in limits.items() if _is_wider(name, value, self.limits[name])]
        loosened = tuple(f"{name} {self.limits[name]} → {limits[name]}" for name in wider)
        return replace(self, limits=self.limits | limits, loosened=loosened, quarantine_ratio_max=share)

    def _refuse_limit(self, name: str, value: object) -> None:
        if name not in self.limits:
            near = difflib.get_close_matches(name, [*self.limits, QUARANTINE], n=3, cutoff=0.4) or sorted(self.limits)
            raise ContractInvalid(f"the {self.kind} contract has no limit {name!r}. Nearest: {', '.join(near)}")
        if why := _not_a_limit(name, value):
            raise ContractInvalid(f"{self.kind} limit {name} is {value!r}: {why}")

    def of_held_out(self) -> "Contract":
        """Return this contract for rows that are held out themselves: there are no others to compare them with."""
        return replace(
            self, expectations=tuple(rule for rule in self.expectations if rule["kwargs"].get("column") != "n_held_out")
        )

    def with_tokens(self, methods: Mapping[str, str]) -> "Contract":
        """Return this contract with the rules about what each stage's tokenizer makes of the rows.

        `methods` are the stages that read the rows, each with its method; their columns are named `<stage>_<fact>`.
        """
        facts_by_stage = {stage: TOKEN_FACTS[method] for stage, method in methods.items()}
        tokens = read_contract(_FOLDER / f"{TOKENS}.yaml", columns=())
        asked = [
            {
                **rule,
                "kwargs": rule["kwargs"] | {"column": f"{stage}_{rule['kwargs']['column']}"},
                "meta": {"rule": f"{stage.replace('_', '-')}-{rule['meta']['rule']}"},
            }
            for stage, facts in facts_by_stage.items()
            for rule in tokens.expectations
            if rule["kwargs"]["column"] in facts
        ]
        columns = [f"{stage}_{fact}" for stage, facts in facts_by_stage.items() for fact in facts]
        return replace(
            self,
            limits=self.limits | (tokens.limits if asked else {}),
            expectations=(*self.expectations, *asked),
            columns=(*self.columns, *columns),
        )

    def resolved(self, facts: suite.Facts) -> list[dict]:
        """Return what Great Expectations is given: every rule with its numbers, and one for each column that holds a null.

        Where that can be seen beforehand the other columns need none, which is half the time that a judgement takes.
        """
        own = [
            {**rule, "kwargs": _resolve(rule["kwargs"], self.limits), "meta": rule["meta"] | {"limit": self._limit_of(rule)}}
            for rule in self.expectations
        ]
        return own + [_not_null(self.kind, column) for column in self.columns if _may_be_null(facts, column)]


def _named_limits(rule: dict) -> list[str]:
    return [match[3] for value in rule["kwargs"].values() if (match := _VALUE.fullmatch(str(value)))]


def judge(facts: pd.DataFrame, kind: str, limits: Mapping[str, float] | None = None) -> Verdict:
    """Judge the facts by the shipped contract of their kind, with some of its limits set by name.

    Raises ContractInvalid if the contract or a limit is not usable; bad data raise nothing, the verdict says it.
    """
    return judge_by(facts, contract_for(kind).with_limits(limits or {}))


def judge_by(facts: suite.Facts, contract: Contract) -> Verdict:
    """Judge the facts by a contract of one's own."""
    results, gx_result = suite.run(contract.resolved(facts), facts, contract.kind, contract.spark)
    return Verdict(
        kind=contract.kind,
        version=contract.version,
        passed=not any(result.status in ("ERROR", "FAIL") for result in results),
        n_rows=suite.num_rows(facts),
        results=tuple(results),
        limits=contract.limits,
        loosened=contract.loosened,
        gx_result=gx_result,
    )


def offending_rows(facts: suite.Facts, contract: Contract, verdict: Verdict) -> dict[int, list[str]]:
    """Return the rows that block: the number of each in its source, and the rules that do not hold for it."""
    blocking = {result.rule for result in verdict.failures() if result.status == "FAIL" and result.unexpected_count}
    rules = [rule for rule in contract.resolved(facts) if rule["meta"]["rule"] in blocking]
    return suite.offending_rows(rules, facts, contract.kind, contract.spark) if rules else {}


def contract_for(kind: str) -> Contract:
    """Return the shipped contract of a kind."""
    if kind not in KINDS:
        raise ContractInvalid(f"there is no contract for {kind!r}; there are {', '.join(KINDS)}")
    return read_contract(_FOLDER / f"{kind}.yaml")


def read_contract(path: Path, columns: Sequence[str] | None = None) -> Contract:
    """Read a contract and refuse one that could pass bad rows by being wrong itself.

    `columns` are those of the table that it judges, where that is not the facts of a kind of row.
    """
    spec = yaml.safe_load(path.read_text(encoding="utf-8"))
    if not isinstance(spec, dict) or set(spec) != {"kind", "version", "limits", "expectations"}:
        raise ContractInvalid(f"{path} must have exactly kind, version, limits and expectations")
    if (columns is None and spec["kind"] not in KINDS) or not isinstance(spec["version"], str):
        raise ContractInvalid(f"{path}: kind must be one of {', '.join(KINDS)}, and version a date in quotes")
    limits, rules = spec["limits"] or {}, spec["expectations"] or []
    for name, value in limits.items():
        if why := _not_a_limit(name, value):
            raise ContractInvalid(f"{path}: limit {name} is {value!r}: {why}")
    for number, rule in enumerate(rules, start=1):
        if why := _not_a_rule(rule):
            raise ContractInvalid(f"{path}: expectation {number} {why}")
    _check_whole(path, spec["kind"], limits, rules)
    columns = fact_columns(spec["kind"]) if columns is None else columns
    return Contract(spec["kind"], spec["version"], limits, tuple(rules), tuple(columns))


def _not_a_rule(rule: object) -> str | None:
    """Return what makes an entry no rule, or None."""
    if not isinstance(rule, dict) or set(rule) != _KEYS:
        return f"must have exactly {', '.join(sorted(_KEYS))}"
    if not isinstance(rule["meta"], dict) or not rule["meta"].get("rule"):
        return "has no meta.rule, by which its result is found again"
    if rule["severity"] not in ("critical", "warning"):
        return f"has severity {rule['severity']!r}: Great Expectations would drop it. Write critical or warning"
    if not isinstance(rule["notes"], str) or not rule["notes"].strip():
        return "has no notes: say what training would do if it did not hold"
    if not isinstance(rule["type"], str) or not isinstance(rule["kwargs"], dict):
        return "needs a type and its kwargs"
    return next((why for name, value in rule["kwargs"].items() if (why := _not_a_kwarg(name, value))), None)


def _not_a_kwarg(name: str, value: object) -> str | None:
    if "regex" in name:
        bare = _BARE_DOLLAR.search(str(value))
        return f"has a {name} with $, which lets a trailing newline pass. Write \\Z" if bare else None
    if isinstance(value, str) and "$" in value and not _VALUE.fullmatch(value):
        return f"has {name} {value!r}. Write $limit, 1 - $limit or 1 / $limit"
    return None


def _check_whole(path: Path, kind: str, limits: dict, rules: list[dict]) -> None:
    names = [rule["meta"]["rule"] for rule in rules]
    if kind != TOKENS and not any(rule["type"] == _ROW_COUNT and rule["severity"] == "critical" for rule in rules):
        raise ContractInvalid(f"{path} has no critical {_ROW_COUNT}: no rows, or no rules, would pass it")
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ContractInvalid(f"{path}: rule {', '.join(twice)} stands twice")
    used = {name for rule in rules for name in _named_limits(rule)}
    if used != set(limits):
        raise ContractInvalid(f"{path}: limits {sorted(used ^ set(limits))} are used and not set, or set and not used")


def _not_a_limit(name: str, value: object) -> str | None:
    """Return why a value cannot be that limit, or None. The name says the unit."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return "it must be a number"
    if name.endswith("_ratio_max") and not 0 <= value <= 1:
        return "a ratio lies between 0 and 1"
    if name.endswith("_min") and (not isinstance(value, int) or value < 1):
        return "it must be a whole number of at least 1, or an empty set would pass"
    if name.endswith("_factor_max") and value < 1:
        return "it must be at least 1"
    return None if value >= 0 else "it must not be negative"


def _is_wider(name: str, value: float, shipped: float) -> bool:
    return value < shipped if name.endswith("_min") else value > shipped


def _resolve(kwargs: dict, limits: Mapping[str, float]) -> dict:
    return {name: _number(value, limits) for name, value in kwargs.items()}


def _number(value: object, limits: Mapping[str, float]) -> object:
    match = _VALUE.fullmatch(value) if isinstance(value, str) else None
    if not match:
        return value
    one, sign, name = match.groups()
    limit = limits[name]
    # rounded, so that exactly the allowed share passes: 1 - 0.7 is a little more than 0.3
    return limit if not one else round(1 - limit if sign == "-" else 1 / limit, 12)


def _may_be_null(facts: suite.Facts, column: str) -> bool:
    return not isinstance(facts, pd.DataFrame) or column not in facts or bool(facts[column].isna().any())


def _not_null(kind: str, column: str) -> dict:
    return {
        "type": "expect_column_values_to_not_be_null",
        "kwargs": {"column": column},
        "meta": {"rule": f"{kind}-known-{column.replace('_', '-')}"},
        "severity": "critical",
        "notes": "a fact that is not known leaves every rule about it, and a column of nulls would pass them all",
    }
