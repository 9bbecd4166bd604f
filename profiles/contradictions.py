"""Settings that are each fine alone and wrong together, most of which TRL would let pass."""

import difflib
from collections.abc import Iterator

from profiles.drift import LOGGED, SIGNALS, Corridor
from profiles.schema import Dataset, Datasets, Evaluate, Gates, Generation, Grpo, Online, Profile, Recipe

SFT_KINDS = ("prompt_completion", "language_modeling")
BETA = {"grpo": 0.0, "rloo": 0.05}  # TRL's defaults; without a reference no kl is logged
MODELS = ("base", "sft", "champion")
SHARES = ("f1", "em", "quasi_exact_match", "prefix_exact_match")  # of lm-eval's tasks, beside acc…, exact_match… and pass@…


def contradictions(profile: Profile) -> list[str]:
    """Return one sentence per contradiction: the settings, their values, what follows and the way out."""
    recipe = profile.recipe
    found = [
        *_adapters(recipe),
        *_rewards(recipe),
        *_rendering(recipe),
        *_lengths(recipe),
        *_rows(recipe),
        *_prepared(recipe),
        *_drift(profile),
    ]
    return [*found, *_gates(profile), *_release(profile)]


def _adapters(recipe: Recipe) -> Iterator[str]:
    policy = recipe.policy
    if recipe.sft is None and policy.lora is None:
        yield (
            "recipe.sft is absent and recipe.policy.lora is not set: there would be no adapter to train or merge. "
            "Add recipe.sft, or set recipe.policy.lora."
        )
    if recipe.sft is not None and policy.lora is not None:
        yield (
            "recipe.policy.lora is set but recipe.sft trains an adapter that the policy goes on with: the second LoRA "
            "would never be used. Remove recipe.policy.lora, or recipe.sft."
        )
    yield from _modules_to_save(recipe)


def _modules_to_save(recipe: Recipe) -> Iterator[str]:
    policy = recipe.policy
    for stage in ("sft", "reward_model", "policy"):
        lora = getattr(getattr(recipe, stage), "lora", None)
        if lora and lora.modules_to_save and recipe.base_model.dtype == "bfloat16":
            yield (
                f"recipe.{stage}.lora.modules_to_save is set but recipe.base_model.dtype is 'bfloat16': PEFT trains those "
                "modules in bfloat16 itself, where a step below 1/256 of a weight is lost. Set dtype: float32, or drop it."
            )
    goes_on = recipe.sft is not None and recipe.sft.lora.modules_to_save and isinstance(policy, Grpo)
    if goes_on and policy.rollouts != "transformers" and policy.args.get("beta"):
        yield (
            f"recipe.sft.lora.modules_to_save is set and recipe.policy.rollouts is {policy.rollouts!r}: with args.beta > 0 TRL "
            "also sends the frozen reference's copies of those modules to vLLM, which has none. Set rollouts: transformers."
        )


def _rewards(recipe: Recipe) -> Iterator[str]:
    policy, used = recipe.policy, _trains_on_reward_model(recipe)
    if used and recipe.reward_model is None:
        yield (
            "recipe.policy.reward_functions names reward_model but recipe.reward_model is absent: nobody trains it. "
            "Add recipe.reward_model, or drop that reward."
        )
    if recipe.evaluate.win_rate and recipe.reward_model is None:
        yield (
            "recipe.evaluate.win_rate is true but recipe.reward_model is absent: nobody judges the answers. "
            "Add recipe.reward_model, or set win_rate to false."
        )
    if recipe.evaluate.scorer == "reward_model":
        yield (
            "recipe.evaluate.scorer is 'reward_model', which is no function: its judgement is a win rate. Set "
            "recipe.evaluate.win_rate: true, and a reward function as scorer."
        )
    if recipe.reward_model is not None and not used and not recipe.evaluate.win_rate:
        yield (
            f"recipe.reward_model is trained but recipe.policy.method {policy.method!r} does not read it: the stage "
            "would be paid for nothing. Drop recipe.reward_model (--set recipe.reward_model=null), or add "
            "{name: reward_model} to recipe.policy.reward_functions, or set recipe.evaluate.win_rate."
        )
    if isinstance(policy, Grpo) and _blind(policy):
        yield (
            "recipe.policy.args.vllm_importance_sampling_correction is false but recipe.policy.rollouts is "
            f"{policy.rollouts!r}: TRL then logs no difference to vLLM, and a dead weight sync would pass. Drop it."
        )
    if isinstance(policy, Online) and not any(r.weight > 0 for r in policy.reward_functions):
        yield "recipe.policy.reward_functions has only weights of 0: every advantage is 0 and nothing trains. Set one."


def _blind(policy: Grpo) -> bool:
    return policy.rollouts != "transformers" and policy.args.get("vllm_importance_sampling_correction") is False


def _rows(recipe: Recipe) -> Iterator[str]:
    data, policy = recipe.datasets, recipe.policy
    if recipe.sft is not None:
        yield from _fits("sft", data.sft, SFT_KINDS, "the SFT stage")
    if recipe.reward_model is not None:
        yield from _fits("preference", data.preference, ("preference",), "the reward-model stage")
    yield from _fits(policy.rows, getattr(data, policy.rows), (policy.kind,), f"recipe.policy.method {policy.method!r}")
    wanted = "preference" if recipe.evaluate.metric == "preference_accuracy" else "eval"
    yield from _fits("eval", data.eval, (wanted,), f"recipe.evaluate.metric {recipe.evaluate.metric!r}")


def _rendering(recipe: Recipe) -> Iterator[str]:
    """Say where training would render prompts otherwise than everything after it, requests to a server included."""
    for where, stage in (("sft", recipe.sft), ("policy", recipe.policy)):
        if stage is not None and stage.args.get("chat_template_kwargs"):
            yield (
                f"recipe.{where}.args.chat_template_kwargs is set: evaluation, canaries and a plain request to the server "
                "render prompts without it, so the policy would be judged and served on other prompts than it learned. Put "
                "what it says into the template itself, and name that by recipe.sft.args.chat_template_path."
            )


def _lengths(recipe: Recipe) -> Iterator[str]:
    """Say which lengths and sampling settings of the export could never be served, or would never act."""
    export, generation = recipe.export, recipe.export.generation
    asked = {"max_new_tokens": export.max_new_tokens, "generation.max_new_tokens": generation.max_new_tokens}
    for name, tokens in asked.items():
        if tokens is not None and tokens >= export.max_model_len:
            yield (
                f"recipe.export.{name} is {tokens} but recipe.export.max_model_len is {export.max_model_len}: no prompt fits "
                "before so long an answer. Raise max_model_len, or lower it."
            )
    idle = [name for name in ("top_p", "top_k", "min_p") if getattr(generation, name) != Generation.model_fields[name].default]
    if idle and generation.temperature == 0:
        yield (
            f"recipe.export.generation.{idle[0]} is {getattr(generation, idle[0]):g} but generation.temperature is 0: greedy "
            "decoding does not sample, so it would do nothing. Set a temperature, or drop it."
        )


def _fits(name: str, dataset: Dataset | None, kinds: tuple[str, ...], reader: str) -> Iterator[str]:
    wanted = " or ".join(kinds)
    if dataset is None:
        yield f"recipe.datasets.{name} is absent but {reader} reads it. Add it, with kind: {wanted}."
    elif dataset.kind not in kinds:
        yield (
            f"recipe.datasets.{name}.kind is {dataset.kind!r} but {reader} wants rows of kind {wanted}: the trainer "
            f"would mis-read or drop them. Give a dataset of kind {wanted}."
        )


def _prepared(recipe: Recipe) -> Iterator[str]:
    origins = {f"datasets.{name}": getattr(recipe.datasets, name) for name in Datasets.model_fields}
    origins["base_model"] = recipe.base_model
    asking = [name for name, origin in origins.items() if origin is not None and origin.prepared]
    if asking and recipe.prepare is None:
        yield f"recipe.{asking[0]}.prepared is set but recipe.prepare is absent: nothing makes it. Add recipe.prepare."
    if recipe.prepare is not None and recipe.prepare.base_model and recipe.base_model.prepared:
        yield (
            "recipe.prepare.base_model is true but recipe.base_model is itself made by the prepare stage: it cannot be "
            "there before. Set recipe.prepare.base_model to false."
        )


def _drift(profile: Profile) -> Iterator[str]:
    drift, policy, metric = profile.drift, profile.recipe.policy, profile.recipe.evaluate.metric
    for name, corridor in drift.signals.items():
        asked = name not in SIGNALS or corridor not in (None, Corridor(**SIGNALS[name]))
        own = name in LOGGED[policy.method] or (isinstance(policy, Online) and name.startswith("rewards/"))
        if asked and not own:
            logged = LOGGED[policy.method]
            near = difflib.get_close_matches(name, logged, n=3, cutoff=0.5) or sorted(logged)
            yield (
                f"drift.signals has {name!r}, which recipe.policy.method {policy.method!r} never logs: it would judge nothing. "
                f"There is: {', '.join(near)}."
            )
    samples = isinstance(policy, Online)
    logs_kl = samples and bool(policy.args.get("beta", BETA[policy.method]))
    if drift.signals.get("kl") is not None and not logs_kl and drift.canaries.num_prompts == 0:
        yield (
            f"drift.canaries.num_prompts is 0 and recipe.policy.method {policy.method!r} logs no kl"
            f"{' at beta 0.0' if samples else ' per token'}: nothing measures drift.signals.kl. Set num_prompts > 0, or "
            "drift.signals.kl: null."
        )
    blind = drift.canaries.num_prompts == 0 or metric != "accuracy" or not samples
    if "reward_hacking" in drift.model_fields_set and drift.reward_hacking and blind:
        yield (
            f"drift.reward_hacking is set but drift.canaries.num_prompts is {drift.canaries.num_prompts} and "
            f"recipe.evaluate.metric {metric!r} with method {policy.method!r}: there is no training or no "
            "held-out reward. Set num_prompts > 0 with metric accuracy and method grpo or rloo, or drift.reward_hacking: null."
        )
    yield from _on_halt(profile)


def _on_halt(profile: Profile) -> Iterator[str]:
    drift, args = profile.drift, profile.recipe.policy.args
    if drift.on_halt == "stop":
        if "retry" in drift.model_fields_set:
            yield "drift.retry is set but drift.on_halt is 'stop': nothing would be retried. Set on_halt: retry, or drop it."
        return
    if args.get("save_strategy", "no") == "no":
        yield (
            f"drift.on_halt is {drift.on_halt!r} but recipe.policy.args.save_strategy is 'no': there would be no checkpoint to "
            "go back to. Set save_strategy: steps and save_steps."
        )
    if args.get("save_total_limit"):
        yield (
            f"drift.on_halt is {drift.on_halt!r} but recipe.policy.args.save_total_limit is {args['save_total_limit']}: the "
            "last good checkpoint may be deleted before the halt. Drop save_total_limit."
        )
    if drift.on_halt == "retry":
        for name in drift.retry.change:
            value = args.get(name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not value:
                yield (
                    f"drift.retry.change.{name} multiplies recipe.policy.args.{name}, which is {value!r}: nothing would "
                    f"change. Set recipe.policy.args.{name}, or change another argument."
                )


def _release(profile: Profile) -> Iterator[str]:
    release = profile.release
    if not release.promote and release.push_to_hub:
        yield (
            "release.push_to_hub is set but release.promote is false: the run leaves a candidate, which is not pushed. Set "
            "promote: true, or drop it."
        )


def _gates(profile: Profile) -> Iterator[str]:
    gates, recipe = profile.gates, profile.recipe
    if "sft" in gates.better_than and recipe.sft is None:
        yield "gates.better_than names sft but recipe.sft is absent. Drop it from the list, or add recipe.sft."
    if gates.gain_min > 0 and not gates.better_than:
        yield (
            f"gates.gain_min is {gates.gain_min:g} but gates.better_than is empty: no gain would be judged. Name a model in "
            "better_than, or drop gain_min."
        )
    asked = {"gates.floors": [*gates.floors], "gates.not_worse": [*gates.not_worse]}
    asked["gates.metric"] = [gates.metric] if gates.metric and gates.better_than else []
    for setting, metrics in asked.items():
        for metric in metrics:
            yield from _measures(recipe, setting, metric)
    idle = [name for name in ("metric", "p_max") if name in gates.model_fields_set and getattr(gates, name) is not None]
    if idle and not gates.better_than:
        yield f"gates.{idle[0]} is set but gates.better_than is []: nothing would read it. Name a model, or drop it."
    if "approval_timeout_seconds" in gates.model_fields_set and not gates.approval:
        yield "gates.approval_timeout_seconds is set but gates.approval is false: nobody is asked. Set it to true, or drop it."
    yield from _limits(gates, gates.metric or recipe.evaluate.metric)
    yield from _win_rates(gates)


def _measures(recipe: Recipe, setting: str, metric: str) -> Iterator[str]:
    """Say that a metric of the gate is not measured, or is the very reward that the policy was trained to raise."""
    evaluate = recipe.evaluate
    if metric.startswith("win_rate_lc/"):
        yield (
            f"{setting} names {metric!r}, which is one number without a score per row: nothing can be tested by it. Name "
            f"'win_rate/{metric.partition('/')[2]}'."
        )
    elif not _is_measured(evaluate, metric):
        known = [evaluate.metric, *(f"reward/{name}" for name in evaluate.rewards), *(f"{t}/…" for t in evaluate.tasks)]
        known += [f"win_rate/{name}" for name in MODELS if evaluate.win_rate]
        yield (
            f"{setting} names {metric!r}, which recipe.evaluate does not measure: the gate could not judge it once everything "
            f"is trained. It measures: {', '.join(known)}. Name one of these, or add it to recipe.evaluate."
        )
    if metric.startswith("win_rate/") and _trains_on_reward_model(recipe):
        yield (
            f"{setting} names {metric!r}, which is judged by the reward model that recipe.policy.reward_functions trains the "
            "policy on: the policy learns to please it, better or not (arXiv:2210.10760). Judge by another metric."
        )


def _is_measured(evaluate: Evaluate, metric: str) -> bool:
    kind, _, name = metric.partition("/")
    if kind == "reward":
        return name in evaluate.rewards
    if kind == "win_rate":
        return evaluate.win_rate and name in MODELS
    # which tasks a group has, and what they measure, lm-eval is asked in tasks/check_profile.py
    return metric == evaluate.metric or bool(evaluate.tasks and metric.rpartition("/")[0])


def _trains_on_reward_model(recipe: Recipe) -> bool:
    policy = recipe.policy
    return isinstance(policy, Online) and any(r.name == "reward_model" and r.weight > 0 for r in policy.reward_functions)


def _limits(gates: Gates, metric: str) -> Iterator[str]:
    """Say which limits on shares, which lie in [0, 1], can never hold or always do."""
    if _is_share(metric) and gates.better_than and gates.gain_min >= (most := 0.5 if metric.startswith("win_rate/") else 1):
        yield f"gates.gain_min is {gates.gain_min:g} but {metric} cannot gain {most:g} or more: no policy passes. Lower it."
    for name, least in gates.floors.items():
        if _is_share(name) and not 0 < least < 1:
            never = "no interval of any number of rows lies there" if least >= 1 else "every policy is there"
            yield f"gates.floors.{name} is {least:g} but {name} is a share: {never}. Set it between 0 and 1."
    for name, margin in gates.not_worse.items():
        if _is_share(name) and margin >= 1:
            yield f"gates.not_worse.{name} is {margin:g} but {name} is a share: any loss passes. Set it to 0.03 or 0.05."


def _is_share(metric: str) -> bool:
    name = metric.rpartition("/")[2].partition(":")[0]
    of_a_task = "/" in metric and (name.startswith(("acc", "exact_match", "pass@")) or name in SHARES)
    return metric in ("accuracy", "preference_accuracy") or metric.startswith("win_rate/") or of_a_task


def _win_rates(gates: Gates) -> Iterator[str]:
    """Say where a win rate over one model is to show something of another."""
    kind, _, other = (gates.metric or "").partition("/")
    if kind == "win_rate" and gates.better_than and gates.better_than != [other]:
        yield (
            f"gates.metric is {gates.metric!r} but gates.better_than is [{', '.join(gates.better_than)}]: that win rate says "
            f"something of {other} alone. Set better_than to [{other}]."
        )
    for name in gates.not_worse:
        if name.startswith("win_rate/") and name != "win_rate/champion":
            yield (
                f"gates.not_worse names {name!r} but not_worse is judged against the champion. Name 'win_rate/champion', or "
                f"set gates.floors.{name}."
            )
