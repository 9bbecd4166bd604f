"""Drift between retrains: a small snapshot of the facts last accepted, and how far the facts of new rows lie from it.

The measure is the population stability index (PSI) over the snapshot's bins, less what chance alone gives two samples of these
sizes. A test's p-value would not do: at 100,000 rows a Kolmogorov-Smirnov test is sure of 2 % more length, which no training
would notice. Few rows hide a drift: `psi_noise` says how large a one, and fewer than 50 show next to nothing.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from scipy.special import chdtri  # scipy.stats has the same as chi2.isf, for 0.7 s of import

from data_contracts.contract import Contract, judge_by, read_contract
from data_contracts.verdict import RuleResult

_NO_MEASURE = {"row", "prompt_hash", "n_held_out"}  # which row it is, and with how much it was compared
_DECILES = np.arange(1, 11) / 10
_VALUES_KEPT = 50
_EMPTY = 0.5  # rows that an empty bin counts for: its logarithm would be infinite
_RARE = 5  # bins with fewer rows last time are taken together, as W. G. Cochran advises (Biometrics 10(4), 1954)
_CHANCE = 0.001  # how often samples of one distribution may differ by more than what is called noise
_FACTS_SHOWN = 3
_COLUMNS = (
    *("row", "fact", "psi", "psi_noise", "psi_above_noise"),
    *("n_new_values", "n_new_values_above_noise", "is_known", "note"),
)


def snapshot(facts: pd.DataFrame, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return what later facts are compared with, ready for JSON: each fact's kind, its bins and the rows in each.

    `columns` are the types of the rows' own columns, by their names. `counts` has one entry more than `bins`, for what lies in
    none: above the last edge, or another value. Raises ValueError for facts that no contract accepts: no rows, or nulls.
    """
    _refuse_gaps(facts)
    profiles = {name: _profile(facts[name]) for name in _measures(facts)}
    return {"num_rows": len(facts), "columns": dict(columns), "facts": profiles}


def compare(last: Mapping[str, Any], facts: pd.DataFrame, columns: Mapping[str, str]) -> pd.DataFrame:
    """Return one row per fact that is measured in both, and per column that is not the same, those that moved the most first.

    A fact that only one of them has is none of the data's doing: the code that measures has changed.

    - `psi`, `psi_noise`, `psi_above_noise`: how far the fact moved, what chance explains of it, and the rest.
    - `n_new_values`: values that the snapshot does not list, 0 if it was cut to the most frequent ones. A boolean has none.
    - `n_new_values_above_noise`: those of them that are too frequent to have been missed by chance.
    - `is_known`: False for a column of the rows that is new, gone or of another type; no number applies and all are 0.
    - `note`: what a person is told beside the PSI: the most frequent new value, or how the column changed.

    Raises ValueError for facts of no rows, or with nulls.
    """
    _refuse_gaps(facts)
    measured = [name for name in _measures(facts) if last["facts"].get(name, {}).get("kind") == _kind(facts[name])]
    moved = [_moved(name, last, facts) for name in measured]
    table = pd.DataFrame([*_changed(last["columns"], columns), *moved], columns=_COLUMNS)
    table = table.sort_values("psi_above_noise", ascending=False, kind="stable", ignore_index=True)
    return table.assign(row=range(len(table)))


def judge_drift(
    last: Mapping[str, Any], facts: pd.DataFrame, columns: Mapping[str, str], limits: Mapping[str, float]
) -> list[RuleResult]:
    """Return how each rule of `drift.yaml` went, with some of its limits set by name; each counts facts, not rows.

    Raises ContractInvalid for a limit that is not usable, and ValueError for facts that no contract accepts.
    """
    moved = compare(last, facts, columns)
    verdict = judge_by(moved, drift_contract().with_limits(limits))
    return [_about_facts(result, moved) for result in verdict.results]


@cache
def drift_contract() -> Contract:
    """Return the contract that a comparison is held to."""
    return read_contract(Path(__file__).with_name("drift.yaml"), columns=_COLUMNS)


def split_limits(limits: Mapping[str, float]) -> tuple[dict[str, float], dict[str, float]]:
    """Return the limits of a dataset's `contract` block apart: those of its kind's contract, and those of the drift."""
    of_drift = {name: value for name, value in limits.items() if name in drift_contract().limits}
    return {name: value for name, value in limits.items() if name not in of_drift}, of_drift


def _refuse_gaps(facts: pd.DataFrame) -> None:
    if facts.empty or facts.isna().any(axis=None):
        raise ValueError(f"{len(facts)} rows of facts, or nulls among them, have no distribution: their contract refuses them")


def _measures(facts: pd.DataFrame) -> list[str]:
    return [name for name in facts.columns if name not in _NO_MEASURE]


def _profile(values: pd.Series) -> dict[str, Any]:
    kind, bins = _kind(values), _bins(values)
    return {"kind": kind, "bins": bins, "counts": _counts(values, kind, bins).tolist()}


def _kind(values: pd.Series) -> str:
    return "numeric" if is_numeric_dtype(values) and not is_bool_dtype(values) else "category"


def _bins(values: pd.Series) -> list:
    """Return the upper edges of a numeric fact's bins, or the values of another that are counted one by one."""
    if _kind(values) == "numeric":
        # An edge just below the least value, so that what is less than any of these stands apart, as what is more does above
        # the last edge: a fact that was constant is then seen to leave on either side.
        least = np.nextafter(values.min(), -np.inf)
        return np.unique([least, *np.quantile(values, _DECILES, method="inverted_cdf")]).tolist()
    if is_bool_dtype(values):
        return ["False", "True"]  # though none was True: both are known, and the PSI says how many there are now
    return values.astype(str).value_counts().index[:_VALUES_KEPT].tolist()


def _counts(values: pd.Series, kind: str, bins: list) -> np.ndarray:
    """Return the rows in each bin, and last those in none of them."""
    if kind == "numeric":
        return np.bincount(np.searchsorted(bins, values), minlength=len(bins) + 1)
    place = pd.Index(bins, dtype="str").get_indexer(values.astype(str))  # -1: a value that is not among them
    return np.bincount(np.where(place < 0, len(bins), place), minlength=len(bins) + 1)


def _moved(name: str, last: Mapping[str, Any], facts: pd.DataFrame) -> dict[str, Any]:
    """Return one row of the comparison."""
    was, values = last["facts"][name], facts[name]
    sizes = last["num_rows"], len(facts)
    psi, noise = _psi(np.array(was["counts"]), _counts(values, was["kind"], was["bins"]), sizes)
    new = _new_values(was, values)
    likely = (sizes[1] / sum(sizes)) ** new  # that all rows of a value fall into the new set, were it as frequent in both
    return {
        "fact": name,
        "psi": psi,
        "psi_noise": noise,
        "psi_above_noise": max(0.0, psi - noise),
        "n_new_values": len(new),
        "n_new_values_above_noise": int((likely < _CHANCE).sum()),
        "is_known": True,
        "note": f"new value {new.index[0]!r:.60}" if len(new) else "",
    }


def _changed(last: Mapping[str, str], columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return one row for each column of the rows that is not as it was."""
    notes = {name: f"is new ({columns[name]})" for name in columns.keys() - last.keys()}
    notes |= dict.fromkeys(last.keys() - columns.keys(), "is gone")
    both = last.keys() & columns.keys()
    notes |= {name: f"was {last[name]} and is {columns[name]}" for name in both if last[name] != columns[name]}
    unknown = dict.fromkeys(_COLUMNS, 0) | {"is_known": False}
    return [unknown | {"fact": name, "note": notes[name]} for name in sorted(notes)]


def _psi(last: np.ndarray, new: np.ndarray, sizes: tuple[int, int]) -> tuple[float, float]:
    """Return the PSI and what 999 in 1000 pairs of samples of these sizes from one distribution stay below.

    The bound is the chi-squared one, over the bins that either has rows in, of Yurdakul and Naranjo, "Statistical properties of
    the population stability index", Journal of Risk Model Validation 14(4), 2020.
    """
    rare = last < _RARE
    rare[-1] = True  # with the values of a snapshot that was cut: which of the rare ones it lists is chance
    last, new = (np.append(counts[~rare], counts[rare].sum()) for counts in (last, new))
    used = (last > 0) | (new > 0)
    expected, actual = (np.maximum(counts[used], _EMPTY) / size for counts, size in zip((last, new), sizes, strict=True))
    noise = chdtri(max(1, used.sum() - 1), _CHANCE) * (1 / sizes[0] + 1 / sizes[1])
    return float(((actual - expected) * np.log(actual / expected)).sum()), float(noise)


def _new_values(was: Mapping[str, Any], values: pd.Series) -> pd.Series:
    """Return the rows of each value that the snapshot does not list, the most frequent first; none where it was cut."""
    if was["kind"] == "numeric" or was["counts"][-1]:
        return pd.Series(dtype=int)
    return values.astype(str).value_counts().drop(was["bins"], errors="ignore")


def _about_facts(result: RuleResult, moved: pd.DataFrame) -> RuleResult:
    """Return a result that speaks of facts: its row numbers are no lines of a source, and its example names the first."""
    found = moved.iloc[[row - 1 for row in result.rows[:_FACTS_SHOWN]]].itertuples()
    if result.column == "psi_above_noise":
        said = [f"{it.fact} PSI {it.psi:.2f}" for it in found]
    else:
        said = [f"{it.fact} {it.note}" for it in found]
    return replace(result, rows=(), example=", ".join(said) or None, unit="facts")
