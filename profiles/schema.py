"""The profile's types: `recipe` is identity, `drift` and `gates` judge it, `placement` says where it runs."""

import math
import re
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import AfterValidator, Field, model_validator

from profiles.drift import Drift
from profiles.strict import Strict

OWNED_ARGS = (
    "reward_weights",
    "reward_funcs",
) + ("output_dir", "report_to", "run_name", "seed", "data_seed", "use_vllm", "vllm_mode", "use_cpu", "logging_dir")


def _plain(value: Any) -> Any:
    """Refuse what has no one form in a fingerprint: NaN, infinity, dates, keys that are not text."""
    if isinstance(value, dict):
        if odd := [key for key in value if not isinstance(key, str)]:
            raise ValueError(f"has the key {odd[0]!r}, which is not text: quote it")
        for key, inner in value.items():
            try:
                _plain(inner)
            except ValueError as error:
                raise ValueError(f".{key} {error}") from None
    elif isinstance(value, list):
        for inner in value:
            _plain(inner)
    elif not isinstance(value, str | int | float | bool | None) or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"is {value!r}: only text, finite numbers, true, false, null, lists and mappings can be settings")
    return value


Settings = Annotated[dict[str, Any], AfterValidator(_plain)]


class Origin(Strict):
    """Where a model or dataset comes from: exactly one of a local path, a hub id, a file of the prepare stage."""

    path: str | None = Field(None, description="local file or folder, relative to the working directory")
    hub: str | None = Field(None, description="repository id on the Hugging Face hub; needs `revision`")
    revision: str | None = Field(None, description="commit, tag or branch on the hub; each run is keyed on its commit")
    prepared: str | None = Field(None, description="name of a file or folder that the prepare stage makes")

    @model_validator(mode="after")
    def _one_origin(self) -> "Origin":
        given = [name for name in ("path", "hub", "prepared") if getattr(self, name)]
        if len(given) != 1:
            raise ValueError(f"give exactly one of path, hub, prepared (given: {', '.join(given) or 'none'})")
        if (self.revision is None) == (self.hub is not None):
            raise ValueError("hub and revision go together: write revision: main to follow the branch, a commit to stay")
        return self


class BaseModelOrigin(Origin):
    dtype: Literal["float32", "bfloat16"] = "float32"
    licence: str | None = Field(None, description="licence of the base model, repeated in the export's model card")


Kind = Literal[
    "language_modeling",
    "prompt_completion",
    "preference",
    "unpaired_preference",
    "stepwise_supervision",
    "prompt_only",
    "eval",
]


class Dataset(Origin):
    """One dataset: what kind of rows it has, which of them to take, and how far its contract is tightened."""

    kind: Kind
    layout: Literal["trl", "sharegpt", "alpaca"] = "trl"
    columns: dict[str, str] = Field(
        default_factory=dict, description="the kind's column names to the source's; its other columns are left out"
    )
    split: str = "train"
    start: int = Field(0, ge=0)
    stop: int | None = Field(None, gt=0)
    contract: dict[str, float] = Field(default_factory=dict, description="limits of the contract, by name")
    engine: Literal["pandas", "spark"] = Field(
        "pandas", description="what judges the facts; POSTTRAIN_SPARK_MASTER says where Spark is. The verdict is the same"
    )


class Datasets(Strict):
    sft: Dataset | None = None
    preference: Dataset | None = None
    unpaired: Dataset | None = None
    prompts: Dataset | None = None
    eval: Dataset


def _expressions(pattern: dict[str, int]) -> dict[str, int]:
    """Refuse a key that is no regular expression: PEFT would find that out once the model is loaded."""
    for key in pattern:
        try:
            re.compile(key)
        except re.error as error:
            raise ValueError(f"has the key {key!r}, which is no regular expression for module names: {error}") from None
    return pattern


Pattern = Annotated[dict[str, Annotated[int, Field(gt=0)]], AfterValidator(_expressions)]


class Lora(Strict):
    """PEFT's LoraConfig by its own names; what is not here PEFT can train, but the merge certificate cannot prove."""

    r: int = Field(16, gt=0)
    lora_alpha: int = Field(32, gt=0)
    lora_dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: str | list[str] = "all-linear"
    use_rslora: bool = False
    use_dora: bool = Field(False, description="train each row's magnitude apart from its direction (arXiv:2402.09353)")
    rank_pattern: Pattern = Field(default_factory=dict, description="other ranks, by a regular expression for the module's end")
    alpha_pattern: Pattern = Field(default_factory=dict, description="other lora_alphas, likewise")
    modules_to_save: list[str] | None = Field(
        None, min_length=1, description="ends of names of modules to train whole, as lm_head, beside LoRA; float32 only"
    )


class Prepare(Strict):
    """Runs `tasks.jobs.make_<maker>` once, before anything else, to make data (and a base model) from code."""

    maker: str = Field(pattern=r"^[a-z][a-z0-9_]*$")
    config: Settings = Field(default_factory=dict)
    base_model: bool = Field(False, description="hand recipe.base_model to the maker, which samples from it")


class TrlStage(Strict):
    """`args` are fields of the TRL config class that `trl_config` names, checked against the installed one."""

    args: Settings = Field(default_factory=dict)

    @model_validator(mode="after")
    def _not_ours(self) -> "TrlStage":
        if ours := sorted(set(self.args) & set(OWNED_ARGS)):
            raise ValueError(f"args.{ours[0]} is set by the pipeline; remove it (the seed is recipe.seed, vLLM is `rollouts`)")
        return self


class Sft(TrlStage):
    lora: Lora


class RewardModelStage(TrlStage):
    lora: Lora | None = None
    eval_ratio: float = Field(0.1, gt=0, lt=1, description="share of the pairs held out to measure the reward model")


class RewardFunction(Strict):
    """A function of tasks/jobs/rewards.py, one of TRL's own as `trl.<name>`, or `reward_model` for the trained one."""

    name: str
    weight: float = Field(1.0, ge=0)


class PolicyStage(TrlStage):
    """What every policy method has; `rows` names the dataset that it trains on, `kind` what rows these must be."""

    rows: ClassVar[str]
    kind: ClassVar[str]
    lora: Lora | None = Field(None, description="a fresh adapter; only without an SFT stage, whose adapter goes on")


class Online(PolicyStage):
    """A method that answers prompts while it trains, and learns from what reward functions say of the answers."""

    rows = "prompts"
    kind = "prompt_only"
    reward_functions: list[RewardFunction] = Field(min_length=1)


class Grpo(Online):
    """Group relative policy optimisation (arXiv:2402.03300), TRL's GRPOTrainer."""

    method: Literal["grpo"]
    rollouts: Literal["auto", "vllm", "transformers"] = "auto"


class Rloo(Online):
    """REINFORCE with a leave-one-out baseline (arXiv:2402.14740), TRL's RLOOTrainer.

    Rollouts are transformers' own: that trainer logs no difference to vLLM, so a dead weight sync could not be seen.
    """

    method: Literal["rloo"]


class Dpo(PolicyStage):
    """Direct preference optimisation (arXiv:2305.18290), TRL's DPOTrainer."""

    rows = kind = "preference"
    method: Literal["dpo"]


class Kto(PolicyStage):
    """Kahneman-Tversky optimisation (arXiv:2402.01306) on single labelled answers, TRL's KTOTrainer."""

    rows = "unpaired"
    kind = "unpaired_preference"
    method: Literal["kto"]


Policy = Annotated[Grpo | Rloo | Dpo | Kto, Field(discriminator="method")]
METHODS = tuple(get_args(method.model_fields["method"].annotation)[0] for method in get_args(get_args(Policy)[0]))


class Evaluate(Strict):
    """Greedy answers of base, SFT, policy and champion to the same held-out rows, and lm-eval's tasks beside them."""

    metric: Literal["accuracy", "preference_accuracy"] = "accuracy"
    scorer: str = Field("exact_answer", description="reward function whose score of 1.0 counts as right")
    rewards: list[str] = Field(default_factory=list, description="reward functions, each the metric `reward/<name>`")
    win_rate: bool = Field(False, description="let recipe.reward_model judge the policy's answers against the others'")
    max_new_tokens: int = Field(64, gt=0)
    max_length: int = Field(1024, gt=0, description="preference_accuracy: longer pairs are cut there")
    batch_size: int = Field(32, gt=0)
    tasks: list[str] = Field(default_factory=list, description="tasks, groups or tags of lm-eval, or of `task_folder`")
    task_folder: str | None = Field(None, description="lm-eval tasks of one's own: YAML files and their data, in one folder")
    num_fewshot: int | None = Field(None, ge=0, description="examples before each question of a task; null: the task's own")
    limit: int | None = Field(None, gt=0, description="only the first rows of each task")
    backend: Literal["transformers", "vllm"] = Field("transformers", description="what answers lm-eval's tasks")

    @model_validator(mode="after")
    def _each_setting_is_read(self) -> "Evaluate":
        idle = [name for name in ("task_folder", "num_fewshot", "limit") if getattr(self, name) is not None]
        idle += ["backend"] if self.backend != "transformers" else []
        if idle and not self.tasks:
            raise ValueError(f"{idle[0]} is set but tasks is empty: nothing would read it. Name the tasks, or drop it")
        for name, given in (("rewards", self.rewards), ("tasks", self.tasks)):
            if twice := [item for item in given if given.count(item) > 1]:
                raise ValueError(f"{name} has {twice[0]!r} twice: its rows would count twice. Drop one")
        if "reward_model" in self.rewards:
            raise ValueError("rewards has 'reward_model', which is no function: its judgement is win_rate. Set win_rate: true")
        return self


class Generation(Strict):
    """The sampling defaults of the export, for requests that name none; by transformers' and vLLM's names."""

    temperature: float = Field(0.0, ge=0, description="0: greedy, as evaluated")
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: all tokens")
    min_p: float = Field(0.0, ge=0, lt=1)
    repetition_penalty: float = Field(1.0, gt=0)
    max_new_tokens: int | None = Field(None, gt=0, description="null: up to max_model_len")


class Export(Strict):
    """What plain `vllm serve` loads, and how the served model is compared with the trained one."""

    dtype: Literal["float32", "bfloat16"] | None = Field(
        None, description="of the merged weights; null: recipe.base_model.dtype. bfloat16 can round a small update away"
    )
    generation: Generation = Generation()
    max_model_len: int = Field(1024, gt=0)
    num_probes: int = Field(16, gt=0)
    max_new_tokens: int = Field(32, gt=0)
    startup_timeout_seconds: int = Field(300, gt=0)


class Recipe(Strict):
    seed: int = 42
    prepare: Prepare | None = None
    base_model: BaseModelOrigin
    datasets: Datasets
    sft: Sft | None = None
    reward_model: RewardModelStage | None = None
    policy: Policy
    evaluate: Evaluate = Evaluate()
    export: Export = Export()


def _asked(limits: dict[str, float | None]) -> dict[str, float]:
    """Leave out what is null: so a profile that extends another takes one of its limits back."""
    return {metric: limit for metric, limit in limits.items() if limit is not None}


class Gates(Strict):
    """What the merged candidate must show before it is exported, and who says yes to its release (docs/gates.md)."""

    metric: str | None = Field(None, description="what `better_than` is judged by; null: recipe.evaluate.metric")
    floors: Annotated[dict[str, float | None], AfterValidator(_asked)] = Field(
        default_factory=dict, description="least value by metric; the whole 95 % interval of the policy's own must be there"
    )
    better_than: list[Literal["base", "sft", "champion"]] = Field(
        default_factory=lambda: ["champion"],
        description="models that the policy must beat on the same rows; champion: the base where there is none yet",
    )
    gain_min: float = Field(0.0, ge=0, description="least gain over each of better_than, in points of the metric (0.02: two)")
    p_max: float = Field(0.05, gt=0, lt=0.5, description="level of the one-sided paired test of each gain")
    not_worse: Annotated[dict[str, Annotated[float, Field(gt=0)] | None], AfterValidator(_asked)] = Field(
        default_factory=dict,
        description="margin by metric: a loss against the champion as large as that must be ruled out (non-inferiority)",
    )
    approval: bool = Field(False, description="ask a person, on the run's page in Prefect, before the export is released")
    approval_timeout_seconds: int = Field(72 * 3600, gt=0, description="without an answer in this time the gate has failed")


class HubRepository(Strict):
    """A model repository on the Hugging Face hub; made if it is not there."""

    repo: str = Field(pattern=r"^[\w.-]+/[\w.-]+$", description="owner/name")
    private: bool = True


class Release(Strict):
    """What happens to an export that passed every gate; no part of what is trained."""

    promote: bool = Field(True, description="make it the champion; false leaves a candidate for `posttrain promote RUN`")
    served_at: str | None = Field(
        None,
        pattern=r"^https?://[\w.\-\[\]:]*[\w\]](:\d{1,5})?/?$",
        description="address of the server that must come to serve it, e.g. http://127.0.0.1:8000",
    )
    served_timeout_seconds: int = Field(600, gt=0)
    push_to_hub: HubRepository | None = Field(
        None, description="push the champion there; the token is HF_TOKEN or the Prefect Secret block hf-token"
    )


class StagePlacement(Strict):
    tags: list[str] = Field(
        default_factory=lambda: ["local"],
        min_length=1,
        description="what the work pool must be; [local]: a child process of the run itself",
    )
    queue: str = Field("interactive", description="queue of the work pool; `nightly` lets people go first")
    accelerate: str = Field("cpu", description="a file of profiles/accelerate/, without .yaml")
    python: str | None = Field(None, description="the job environment's interpreter; default: the one `make` built")
    timeout_seconds: int = Field(6 * 3600, gt=0, description="limit of one attempt at a stage")
    hang_seconds: int = Field(
        1800, gt=0, description="a job without a step, or before its first one a log line, for so long hangs"
    )
    retries: int = Field(3, ge=0, description="attempts after one that hung, died, ran out of memory or lost a connection")
    retry_delay_seconds: float = Field(10, ge=0, description="before the second attempt; doubled for each further one")
    checkpoint_seconds: int = Field(300, gt=0, description="between two checkpoints of a training job")
    env: dict[str, str] = Field(default_factory=dict, description="environment of the job: NCCL, OMP_NUM_THREADS, …")

    @model_validator(mode="after")
    def _local_alone(self) -> "StagePlacement":
        if "local" in self.tags and len(self.tags) > 1:
            raise ValueError(f"tags {self.tags}: local means this very process, it has no other tags beside it")
        return self


class Budget(Strict):
    """What one run may cost; it is refused, or stopped between two stages or attempts, where it would cost more."""

    cpu_hours: float | None = Field(None, gt=0, description="CPU time of all its jobs")
    gpu_hours: float | None = Field(None, gt=0, description="time of all its jobs times the GPUs that they hold")


NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"
STAGES = ("prepare", "sft", "reward_model", "policy", "evaluate", "merge", "export")


class Placement(Strict):
    """Where stages run: `default`, and by stage only what differs from it."""

    default: StagePlacement = StagePlacement()
    prepare: StagePlacement | None = None
    sft: StagePlacement | None = None
    reward_model: StagePlacement | None = None
    policy: StagePlacement | None = None
    evaluate: StagePlacement | None = None
    merge: StagePlacement | None = None
    export: StagePlacement | None = None

    def of(self, stage: str) -> StagePlacement:
        """Return the stage's placement: its own settings over the default's, `env` variable by variable."""
        own = getattr(self, stage)
        if own is None:
            return self.default
        return self.default.model_copy(update=own.model_dump(exclude_unset=True) | {"env": self.default.env | own.env})


class Profile(Strict):
    name: str = Field(pattern=NAME)
    description: str
    recipe: Recipe
    drift: Drift = Drift()
    gates: Gates = Gates()
    release: Release = Release()
    budget: Budget = Budget()
    placement: Placement = Placement()
