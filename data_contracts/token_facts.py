"""The names of the facts about rows as a trainer reads them, which only the job environment can tell.

- `renders`: the chat template took the row. Every other fact of a row that it refused is as if nothing were wrong.
- `keeps_text`: each turn of user, assistant and system stands in the rendering as it was written, white space around it apart.
- `round_trips`: decoding the tokens gives the rendered text again, white space apart.
- `n_injected`: special tokens of the tokenizer inside the turns' own text.
- `length`: tokens of the longest side, prompt included, before any truncation.
- `n_trained`: tokens of the side with the fewest that are in the loss, after truncation; 0 if it is dropped.
- `n_prepared`: tokens of the row in the trainer's own prepared dataset.
- `is_dropped`: TRL leaves the row out: nothing of its reply is left, or (reward model) it is longer than `max_length`.
- `is_untrained`: it is kept, and none of its tokens is in the loss.
- `learns_to_end`: on each side that is not truncated the last token in the loss, white space apart, is an EOS token.
- `prompt_is_prefix`: the prompt's tokens are the first tokens of the whole; where not, the mask between them is shifted.
- `differs`: what is left of chosen and rejected is not the same.
- `has_room`: the prompt and the longest completion that is asked for fit the model's context.
"""

_TEXT = ("renders", "keeps_text", "round_trips", "n_injected", "length")
_COUNTS = (*_TEXT, "n_trained", "n_prepared")
_KEPT = ("is_dropped", "is_untrained", "is_truncated", "learns_to_end", "prompt_is_prefix")
_TRAINED = (*_COUNTS, *_KEPT)
TOKEN_FACTS = {
    "sft": _TRAINED,
    "reward_model": (*_TRAINED, "differs"),
    "dpo": (*_TRAINED, "differs"),
    "kto": _TRAINED,
    "grpo": (*_TEXT, "has_room"),
    "rloo": (*_TEXT, "has_room"),
    "evaluate": (*_TEXT, "has_room"),
}
