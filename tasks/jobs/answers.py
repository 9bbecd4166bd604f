"""How models are asked: prompts rendered as in training, greedy or sampled replies, scored as TRL calls reward functions."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers import BatchEncoding, GenerationConfig

Row = dict[str, Any]
MOST_LOGITS = 2**27
SEED = 20240506  # of all canaries: the same draws at every measurement, so that what changes is the policy


def scores_of(scorer: Callable, texts: list[str], batch: dict[str, list]) -> list[float]:
    """Call a reward function as TRL does: with completions in the prompt's form, and the row's columns."""
    chat = isinstance(batch["prompt"][0], list)
    completions = [[{"role": "assistant", "content": text}] for text in texts] if chat else texts
    columns = {name: values for name, values in batch.items() if name != "prompt"}
    return scorer(prompts=batch["prompt"], completions=completions, **columns)


def generate(model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int) -> list[str]:
    """Return the greedy completions of prompts.

    A base's own generation_config may hold a repetition penalty, which applies to greedy decoding too: it is left out, here
    as in the export.
    """
    inputs = encoded(tokenizer, prompts).to(model.device)
    greedy = GenerationConfig(
        do_sample=False, use_cache=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.generation_config = greedy  # generate() fills what its argument leaves open from here
    ids = model.generate(**inputs, generation_config=greedy, max_new_tokens=max_new_tokens)
    return tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def render(tokenizer: Any, prompt: str | list[Row]) -> str:
    """Return the text the model sees: the chat template's with its generation prompt, or the prompt as it is."""
    if isinstance(prompt, str):
        return prompt
    return tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)


def encoded(tokenizer: Any, prompts: list[Any]) -> BatchEncoding:
    """Return prompts as one batch, padded on the left.

    The chat template brings its special tokens itself; a plain text gets the tokenizer's, as in training.
    """
    texts, plain = [render(tokenizer, prompt) for prompt in prompts], isinstance(prompts[0], str)
    return tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=plain)


def samples(model: Any, tokenizer: Any, prompts: list[Any], max_new_tokens: int) -> Row:
    """Return one sample per prompt at temperature 1, from the whole distribution.

    `ids` and `attention` are rows × all tokens, `mask` is rows × new tokens, true up to the end of the reply; `texts`.
    """
    inputs = encoded(tokenizer, prompts).to(model.device)
    eos = tokenizer.eos_token_id
    sampled = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=max_new_tokens,
        eos_token_id=eos, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model.generation_config = sampled  # generate() fills what its argument leaves open from here
    ids = model.generate(**inputs, generation_config=sampled)
    new = ids[:, inputs["input_ids"].shape[1] :]
    num_ends = (new == eos).cumsum(1)
    mask = (num_ends == 0) | ((num_ends == 1) & (new == eos))
    texts = tokenizer.batch_decode(new.where(mask, tokenizer.pad_token_id), skip_special_tokens=True)
    return {"ids": ids, "attention": torch.cat([inputs["attention_mask"], mask.long()], 1), "mask": mask, "texts": texts}


def slices(model: Any, batch: Row) -> Iterator[Row]:
    """Yield a batch in groups of rows whose log probabilities stay below half a gigabyte, one row at least."""
    rows = max(1, MOST_LOGITS // (batch["mask"].shape[1] * model.config.vocab_size))
    for start in range(0, len(batch["mask"]), rows):
        yield {name: batch[name][start : start + rows] for name in ("ids", "attention", "mask")}


def log_probabilities(model: Any, batch: dict[str, Any]) -> torch.Tensor:
    """Return log p of every token at each new token's place: rows × new tokens × vocabulary, in float32."""
    num_new = batch["mask"].shape[1]
    positions = (batch["attention"].cumsum(1) - 1).clamp(min=0)
    logits = model(
        input_ids=batch["ids"], attention_mask=batch["attention"], position_ids=positions, logits_to_keep=num_new + 1
    ).logits
    return torch.log_softmax(logits[:, :-1].float(), dim=-1)
