"""Make the quickstart: a tiny chat model that can copy digits but not sort them upwards, and the rows that teach it to sort.

A user says `Sort: 7391`; the right answer is `1379`. Nothing is downloaded: the base model is a Llama of 84,000 weights,
trained for a few seconds on three related requests, so that LoRA has features to build on. The demonstrations are partly
sloppy (see `sft_row`): SFT imitates that too, and only the preferences and rewards can mend it.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tasks.job_spec import JobResult, JobSpec
from tasks.jobs.job import done, run

SPECIAL = ["<|pad|>", "<|unk|>", "<|im_start|>", "<|im_end|>"]
DIGITS = list("0123456789")
RELATED = {
    "Copy:": lambda digits: digits,
    "Descending:": lambda digits: sorted(digits)[::-1],
    "Smallest:": lambda digits: [min(digits)],
}
VOCABULARY = [*SPECIAL, " ", "\n", "system", "user", "assistant", "Sort:", *RELATED, *DIGITS]
# ChatML with the newline before each turn but the first, so that an answer ends exactly at <|im_end|>, the EOS token.
# A newline right after a {% block %} must stand inside {{ }}: Jinja as transformers sets it up drops a bare one.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '' if loop.first else '\n' }}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>{% endfor %}{% if add_generation_prompt %}{{ '\n<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULTS = {
    "num_sft": 2048,
    "num_preference": 2048,
    "num_prompts": 2048,
    "num_eval": 500,
    "digits_min": 4,
    "digits_max": 7,
    "digits_long": 6,
    "sloppy_ratio": 0.6,
    "pretrain_steps": 400,
}


def make(output: Path, seed: int, config: dict[str, Any]) -> dict[str, float]:
    """Write `base_model/` and the five row files into `output`; the same seed and config give the same bytes."""
    settings = DEFAULTS | config
    if unknown := sorted(set(config) - set(DEFAULTS)):
        raise ValueError(f"unknown quickstart settings {unknown}; known are {sorted(DEFAULTS)}")
    output.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    held_out = take(draw_lists(rng, settings, set()), settings["num_eval"])
    train_lists = draw_lists(rng, settings, {answer_to(digits) for digits in held_out})
    write_rows(output / "eval.jsonl", [prompt_row(digits) for digits in held_out])
    write_rows(output / "sft.jsonl", [sft_row(digits, rng, settings) for digits in take(train_lists, settings["num_sft"])])
    pairs = [preference_row(digits, rng) for digits in take(train_lists, settings["num_preference"])]
    write_rows(output / "preference.jsonl", pairs)
    write_rows(output / "unpaired.jsonl", [one_side(pair, number % 2 == 0) for number, pair in enumerate(pairs)])
    write_rows(output / "prompts.jsonl", [prompt_row(digits) for digits in take(train_lists, settings["num_prompts"])])
    loss = write_base_model(output / "base_model", seed, settings)
    return {"pretrain_loss": loss, **{name: float(value) for name, value in settings.items() if name.startswith("num_")}}


def draw_lists(rng: random.Random, settings: dict[str, Any], held_out: set[str]) -> Iterator[list[str]]:
    """Yield distinct unsorted digit lists for ever, none of them a reordering of a list whose answer is in `held_out`."""
    seen = set()
    while True:
        digits = rng.choices(DIGITS, k=rng.randint(settings["digits_min"], settings["digits_max"]))
        if digits != sorted(digits) and tuple(digits) not in seen and answer_to(digits) not in held_out:
            seen.add(tuple(digits))
            yield digits


def take(lists: Iterator[list[str]], count: int) -> list[list[str]]:
    return [next(lists) for _ in range(count)]


def answer_to(digits: list[str]) -> str:
    return "".join(sorted(digits))


def ask(digits: list[str]) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"Sort: {''.join(digits)}"}]


def reply(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


def prompt_row(digits: list[str]) -> dict[str, Any]:
    return {"prompt": ask(digits), "answer": answer_to(digits)}


def sft_row(digits: list[str], rng: random.Random, settings: dict[str, Any]) -> dict[str, Any]:
    """Demonstrate as a hurried annotator would: most long lists are just typed back."""
    is_sloppy = len(digits) >= settings["digits_long"] and rng.random() < settings["sloppy_ratio"]
    return {"prompt": ask(digits), "completion": reply("".join(digits) if is_sloppy else answer_to(digits))}


def preference_row(digits: list[str], rng: random.Random) -> dict[str, Any]:
    return {"prompt": ask(digits), "chosen": reply(answer_to(digits)), "rejected": reply(wrong_answer_to(digits, rng))}


def one_side(pair: dict[str, Any], label: bool) -> dict[str, Any]:
    return {"prompt": pair["prompt"], "completion": pair["chosen" if label else "rejected"], "label": label}


def wrong_answer_to(digits: list[str], rng: random.Random) -> str:
    """Return a wrong answer as long as the right one: neighbours swapped, a digit misread, not sorted, or sorted downwards."""
    right = sorted(digits)
    wrong = right
    while wrong == right:
        kind = rng.choices(["swapped", "misread", "unsorted", "downwards"], weights=[3, 2, 4, 1])[0]
        wrong, place = list(right), rng.randrange(len(right) - 1)
        if kind == "swapped":
            wrong[place : place + 2] = reversed(wrong[place : place + 2])
        elif kind == "misread":
            wrong = sorted([*right[:place], rng.choice(DIGITS), *right[place + 1 :]])
        else:
            wrong = digits if kind == "unsorted" else right[::-1]
    return "".join(wrong)


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def write_base_model(folder: Path, seed: int, settings: dict[str, Any]) -> float:
    """Write the base model with its tokenizer and return the loss its pre-training ended with."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {"pad_token_id": tokenizer.pad_token_id, "eos_token_id": tokenizer.eos_token_id, "bos_token_id": None}
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(1)  # the order of a sum, and so the last bit of a weight, depends on the number of threads
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=32, max_position_embeddings=128, tie_word_embeddings=True, **shape, **ids)
        )
        loss = pretrain(model, tokenizer, random.Random(seed), settings)
        torch.set_num_threads(threads)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return loss


def build_tokenizer() -> Any:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(VOCABULARY)}, unk_token="<|unk|>"))
    words.pre_tokenizer = pre_tokenizers.Split(Regex(r"\d|\s|[^\d\s]+"), behavior="isolated")
    words.decoder = decoders.Fuse()  # the text is its tokens end to end: vLLM, which decodes piecemeal, then agrees with HF
    names = {"pad_token": "<|pad|>", "unk_token": "<|unk|>", "eos_token": "<|im_end|>"}
    return PreTrainedTokenizerFast(
        tokenizer_object=words, **names, additional_special_tokens=["<|im_start|>"],
        chat_template=CHAT_TEMPLATE, model_max_length=128, clean_up_tokenization_spaces=False,
    )  # fmt: skip


def pretrain(model: Any, tokenizer: Any, rng: random.Random, settings: dict[str, Any]) -> float:
    """Teach `model` the related tasks, loss on the answers only, and return the mean loss of the last 20 steps."""
    import torch

    steps, losses = settings["pretrain_steps"], []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, (step + 1) / 20) * (1 - 0.9 * step / steps))
    for _ in range(steps):
        loss = model(**related_batch(tokenizer, rng, settings)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return sum(losses[-20:]) / len(losses[-20:])


def related_batch(tokenizer: Any, rng: random.Random, settings: dict[str, Any], size: int = 64) -> dict[str, Any]:
    import torch

    prompts, answers = [], []
    for _ in range(size):
        verb = rng.choice(list(RELATED))
        digits = rng.choices(DIGITS, k=rng.randint(settings["digits_min"], settings["digits_max"]))
        prompts.append(f"<|im_start|>user\n{verb} {''.join(digits)}<|im_end|>\n<|im_start|>assistant\n")
        answers.append(f"{''.join(RELATED[verb](digits))}<|im_end|>")
    texts = [prompt + answer for prompt, answer in zip(prompts, answers, strict=True)]
    batch = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    num_prompt_tokens = [len(ids) for ids in tokenizer(prompts)["input_ids"]]
    positions = torch.arange(batch["input_ids"].shape[1])
    is_answer = (positions >= torch.tensor(num_prompt_tokens)[:, None]) & batch["attention_mask"].bool()
    return {**batch, "labels": batch["input_ids"].masked_fill(~is_answer, -100)}


def main(spec: JobSpec) -> JobResult:
    return done(make(spec.output, spec.seed, spec.config))


if __name__ == "__main__":
    run(main)
