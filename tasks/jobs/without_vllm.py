"""Import before trl's trainers in jobs that generate nothing: TRL imports vLLM wherever it is installed, for seconds."""

from trl import import_utils

import_utils.is_vllm_available = lambda *args, **kwargs: False
