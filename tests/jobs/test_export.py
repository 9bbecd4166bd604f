"""The export: what is written, each way in which a folder can be another model than the trained one, and who notices."""

import json
import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from profiles.schema import Generation
from tasks.jobs import without_vllm  # noqa: F401  (before any trainer is imported)

pytestmark = pytest.mark.job
EXPORT = {"max_model_len": 64, "num_probes": 8, "max_new_tokens": 8, "startup_timeout_seconds": 300}
EXPORT |= {"generation": Generation().model_dump()}
CARD = {"profile": "test", "description": "", "base_model": "tiny", "licence": None, "lineage": {"base model": "tiny"}}
CARD |= {"metrics": {"accuracy/policy": 0.5}}


@pytest.fixture
def merged(spec, sft_adapter):
    from tasks.jobs import merge

    job = spec("merge", None, {"policy": sft_adapter})
    return job, merge.main(job)


@pytest.fixture
def exported(spec, sft_adapter, merged):
    """An export written and checked, not served: its spec, and the trained tokenizer."""
    from tasks.jobs.export import check_export, write_export
    from tasks.jobs.models import load_tokenizer

    inputs = {"policy": sft_adapter, "merge": str(merged[0].output)}
    job = spec("export", "eval", inputs, **EXPORT, card=CARD)
    tokenizer = load_tokenizer(job)
    write_export(job, tokenizer)
    check_export(job, tokenizer)
    return job, tokenizer


def edit(path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def perturb(folder) -> None:
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if tensors[name].ndim == 2)
    tensors[name][0, 0] += 1e-2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def add_token(folder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(folder)


def change_eos(folder) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.eos_token = next(token for token in tokenizer.all_special_tokens if token != tokenizer.eos_token)
    tokenizer.save_pretrained(folder)


def change_template(folder) -> None:
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text() + " ")


SABOTAGE = {
    "one tensor perturbed": (perturb, "model.safetensors has other bytes"),
    "the shard missing": (lambda folder: (folder / "model.safetensors").unlink(), "in the merged checkpoint alone"),
    "a shard of something else": (
        lambda folder: save_file({"x": torch.ones(1)}, folder / "model-2.safetensors"),
        "export alone",
    ),
    "another template": (change_template, "the chat template is"),
    "another EOS": (change_eos, "the policy learned to end with"),
    "one token more": (add_token, "<extra>"),
    "a temperature": (lambda folder: edit(folder / "generation_config.json", temperature=0.7), "temperature 0.7"),
    "EOS of the server": (lambda folder: edit(folder / "generation_config.json", eos_token_id=[0]), "eos_token_id"),
    "another dtype": (lambda folder: edit(folder / "config.json", dtype="bfloat16"), "dtype 'bfloat16'"),
    "code": (lambda folder: edit(folder / "config.json", auto_map={"AutoModel": "mine.Model"}), "would run code"),
}


@pytest.mark.parametrize("what", SABOTAGE)
def test_export_that_is_not_what_was_trained_is_refused_before_it_is_served(exported, what):
    from tasks.jobs.export import check_export

    job, tokenizer = exported
    break_it, reason = SABOTAGE[what]
    break_it(job.output)
    with pytest.raises(RuntimeError, match=reason):
        check_export(job, tokenizer)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "modeling_mine.py", "training_args.bin", "notes.txt"])
def test_file_that_no_server_needs_is_refused_by_name(spec, sft_adapter, merged, name):
    from tasks.jobs.export import write_export
    from tasks.jobs.models import load_tokenizer

    (merged[0].output / name).write_bytes(b"whatever")
    job = spec("export", "eval", {"policy": sft_adapter, "merge": str(merged[0].output)}, **EXPORT, card=CARD)
    with pytest.raises(RuntimeError, match=name):
        write_export(job, load_tokenizer(job))


def test_export_says_its_sampling_defaults_and_what_it_was_made_of(exported):
    job, tokenizer = exported
    written = json.loads((job.output / "generation_config.json").read_text())
    # nothing said would be 1.0 in vLLM, whatever do_sample is
    assert written == {
        "do_sample": False,
        "temperature": 0.0,
        "eos_token_id": [tokenizer.eos_token_id],
        "pad_token_id": tokenizer.pad_token_id,
    }
    card = (job.output / "README.md").read_text()
    assert "| base model | tiny |" in card and "accuracy/policy | 0.500" in card and "license: unknown" in card
    assert not (job.output / "certificate.json").exists()


def test_sampling_that_the_profile_asks_for_is_in_the_export(exported):
    from tasks.jobs.export import generation_config

    job, tokenizer = exported
    job.config["generation"] = Generation(temperature=0.7, top_p=0.9, top_k=0, max_new_tokens=5).model_dump()
    asked = generation_config(job, tokenizer)
    assert (asked["do_sample"], asked["temperature"], asked["top_p"], asked["max_new_tokens"]) == (True, 0.7, 0.9, 5)
    assert "top_k" not in asked and "repetition_penalty" not in asked


# --- parity, by hand: a vocabulary of three, of which 2 is the end ------------------------------------------------------------

EOS = 2
# log p of the three tokens at each place: 0.7, 0.2, 0.1 and 0.2, 0.2, 0.6
LOGITS = torch.tensor([[0.7, 0.2, 0.1], [0.2, 0.2, 0.6]]).log()
BASE = torch.zeros(2, 3)  # every token is as likely


def answer(*ids: int, finish: str = "stop", logps: list[float] | None = None) -> dict:
    exact = [LOGITS[place, token].item() for place, token in enumerate(ids)]
    return {"ids": list(ids), "finish": finish, "logps": logps or exact}


def probe(given: dict, prompt=(5, 6), rendered=(5, 6)) -> dict:
    from tasks.jobs.parity import judged

    places = len(given["ids"])
    found = judged(LOGITS[:places], BASE[:places], given, [EOS])
    return given | {"prompt_ids": list(prompt), "rendered_ids": list(rendered)} | found


def failures(*probes: dict, dtype: str = "float32") -> list[str]:
    from tasks.jobs.parity import verdict

    return verdict(list(probes), dtype)["failures"]


def test_answer_of_the_policys_own_tokens_passes():
    from tasks.jobs.parity import verdict

    summary = verdict([probe(answer(0, EOS))], "float32")
    assert summary["failures"] == [] and summary["greedy_match_ratio"] == 1.0 and summary["num_tokens"] == 2
    assert summary["token_mult_prob_error"] == pytest.approx(1.0, abs=1e-6)


def test_token_that_the_policy_would_not_write_fails_with_its_gap():
    given = probe(answer(1, EOS))
    assert given["gaps"] == pytest.approx([math.log(0.7 / 0.2), 0.0], abs=1e-6)
    (why,) = failures(given)
    assert "token 0 of the answer is 1" in why and "1.25 nats below its own 0" in why


def test_tie_within_the_margin_of_the_dtype_passes_and_is_no_exact_match():
    from tasks.jobs.parity import judged, verdict

    logits = torch.tensor([[0.50, 0.45, 0.05]]).log()  # log(0.50 / 0.45) = 0.105 nats: below 0.5, above 0.001
    given = {"ids": [1], "finish": "length", "logps": [math.log(0.45)], "prompt_ids": [5], "rendered_ids": [5]}
    given |= judged(logits, BASE[:1], given, [EOS])
    assert verdict([given], "bfloat16")["failures"] == [] and verdict([given], "bfloat16")["greedy_match_ratio"] == 0.0
    assert "0.105 nats" in verdict([given], "float32")["failures"][0]


def test_other_prompt_tokens_fail_with_the_place():
    (why,) = failures(probe(answer(0, EOS), prompt=(5, 7, 6)))
    assert "3 tokens for 2, from token 1" in why


@pytest.mark.parametrize(
    "given",
    [answer(0, EOS, finish="length"), answer(EOS, EOS), answer(0, finish="stop")],
    ids=["goes on to the limit", "goes on behind the end", "stops without the end"],
)
def test_answer_that_ends_otherwise_fails(given):
    from tasks.jobs.parity import stops_right

    assert not stops_right(given, [EOS])
    assert stops_right(answer(0, EOS), [EOS]) and stops_right(answer(0, finish="length"), [EOS])


def test_probabilities_that_differ_by_more_than_a_twentieth_fail():
    near, far = math.log(1.04), math.log(1.06)
    own = [LOGITS[0, 0].item(), LOGITS[1, EOS].item()]
    assert failures(probe(answer(0, EOS, logps=[value - near for value in own])), dtype="bfloat16") == []
    (why,) = failures(probe(answer(0, EOS, logps=[value - far for value in own])), dtype="bfloat16")
    assert "1.0600" in why
    (why,) = failures(probe(answer(0, EOS, logps=[value - math.log(1.002) for value in own])))  # float32 rounds less
    assert "1.0020 (limit 1.001)" in why


def test_served_probabilities_as_near_to_the_bases_fail_however_near_the_two_are():
    from tasks.jobs.parity import judged

    policy, base = torch.tensor([[0.51, 0.49]]).log(), torch.tensor([[0.50, 0.50]]).log()
    for served, fails in ((0.51, False), (0.50, True), (0.504, True), (0.506, False)):
        given = {"ids": [0], "finish": "length", "logps": [math.log(served)], "prompt_ids": [5], "rendered_ids": [5]}
        given |= judged(policy, base, given, [EOS])
        assert bool(failures(given, dtype="bfloat16")) == fails, served


@pytest.mark.parametrize("where", ["policy", "server", "later token"])
def test_what_is_not_a_number_is_no_proof(where):
    from tasks.jobs.parity import judged

    given, logits = answer(0, EOS), LOGITS.clone()
    if where == "policy":
        logits[0] = math.nan
    elif where == "later token":
        logits[1] = math.nan
    else:
        given["logps"] = [math.nan, math.nan]
    given |= judged(logits, BASE, given, [EOS]) | {"prompt_ids": [5], "rendered_ids": [5]}
    assert failures(given)


def test_no_probe_no_token_and_a_probability_of_0_are_no_proof_either():
    assert "no token at all" in failures()[0]
    assert failures(probe(answer(0, EOS, logps=[-9999.0, -9999.0])))


def test_digest_of_several_templates_tells_them_apart():
    from tasks.jobs.parity import digest

    assert digest({"default": "a", "tool_use": "b"}) == digest({"tool_use": "b", "default": "a"})
    assert len({digest("a"), digest({"default": "a"}), digest({"default": "b"}), digest(None)}) == 4


def test_server_that_samples_otherwise_by_default_is_named():
    from tasks.jobs.parity import other_defaults

    assert other_defaults({"temperature": 0.0, "top_k": -1}, {"temperature": 0.0}) == []
    assert "temperature is 1 where the export says 0" in other_defaults({}, {"temperature": 0.0})[0]
    assert "top_p" in other_defaults({"temperature": 0.7, "top_p": 1.0}, {"temperature": 0.7, "top_p": 0.9})[0]
    assert (
        "max_tokens is 64"
        in other_defaults({"temperature": 0.0, "max_tokens": 64}, {"temperature": 0.0, "max_new_tokens": 8})[0]
    )


@pytest.mark.parametrize(("shift", "reason"), [(0.0, "merge's rounding to float32"), (-1.0, "computes it in another way")])
def test_failure_says_whether_the_server_or_the_merge_is_why(shift, reason, exported):
    """What is served is the merged checkpoint's, or further from it than from the policy."""
    from tasks.jobs.export import whence
    from tasks.jobs.models import load_released

    job, _ = exported
    prompt, ids = [5, 6], [7, 8]
    logits = load_released(str(job.output)).eval()(torch.tensor([prompt + ids])).logits[0, 1:-1].double()
    logps = torch.log_softmax(logits, -1).gather(-1, torch.tensor(ids)[:, None])[:, 0].detach() + shift
    probes = [{"prompt_ids": prompt, "ids": ids, "logps": logps.tolist(), "errors": [0.5, 0.5]}]
    assert reason in whence(job, probes)


# --- really served -----------------------------------------------------------------------------------------------------------


@pytest.mark.timeout(600)
def test_export_is_served_by_vllm_and_answers_like_the_trained_policy(spec, sft_adapter, merged):
    from tasks.jobs import export

    inputs = {"policy": sft_adapter, "merge": str(merged[0].output)}
    sampling = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "repetition_penalty": 1.3, "max_new_tokens": 6}
    job = spec("export", "eval", inputs, **EXPORT | {"generation": EXPORT["generation"] | sampling}, card=CARD)
    result = export.main(job)
    assert result.metrics["greedy_match_ratio"] == 1.0 and result.metrics["token_mult_prob_error"] < 1.001
    proof = json.loads((job.output / "parity.json").read_text())
    assert len(proof["probes"]) == 8 and all(probe["prompt_ids"] == probe["rendered_ids"] for probe in proof["probes"])
    assert not list(job.output.glob("*.bin")) and (job.output / "model.safetensors").is_file()


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("strength", "dtype", "why"),
    [(1.0, "float32", "nats below its own"), (0.1, "bfloat16", "as near to the base's|differ by a factor")],
    ids=["far from the policy", "near it, in bfloat16"],
)
def test_export_of_the_base_instead_of_the_policy_is_caught(strength, dtype, why, spec, sft_adapter, made, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from tasks.jobs import export

    policy, base = tmp_path / "policy", tmp_path / "base"
    shutil.copytree(sft_adapter, policy)
    weights = policy / "adapter_model.safetensors"
    tensors = {name: tensor * strength if "lora_B" in name else tensor for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    AutoModelForCausalLM.from_pretrained(made / "base_model", dtype=getattr(torch, dtype)).save_pretrained(base)
    AutoTokenizer.from_pretrained(sft_adapter).save_pretrained(base)
    inputs = {"policy": str(policy), "merge": str(base)}
    with pytest.raises(RuntimeError, match=why):
        export.main(spec("export", "eval", inputs, **EXPORT | {"dtype": dtype}, card=CARD))
