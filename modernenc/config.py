"""The typed schema of a run, and where its YAML files live.

`conf/` holds the parts (one YAML file is one option of one group), `recipes/` the runs. Each field is explained here, gets its
value in `conf/`, and is chosen in a recipe. The range of a number and the choices of a word stand in its annotation, which
`modernenc.ranges` checks. Token budgets are floats so that `5e9` may be written; they must be whole numbers.
"""

from collections.abc import Iterator
from dataclasses import field, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

from annotated_types import Ge, Gt, Interval, MultipleOf
from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

from modernenc.frozen import frozen

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent  # an installed wheel, else a checkout
CONF_DIR = _ROOT / "conf"
RECIPES_DIR = _ROOT / "recipes"

_RESUMABLE = {"resumable": True}
"""Mark of a field that says where and how fast a run trains, not what: a resume may change it."""
_IDENTITY = {"identity": True}
"""Mark of a field that the program sets and no resume may change: which run this is."""

RENAMED = {
    "data.window_rows": "data.buffer_rows",
    "trainer.recompute_every": "trainer.activation_checkpointing_every",
    "rehearse": "smoke_test",
    "watch.z": "watch.z_threshold",
    "estimate.price": "estimate.price_per_hour",
    "init.layers": "init.layer_mapping",
    "optim.adamw_lr": "optim.adamw_lr_ratio, relative to optim.lr",
}
"""Former names of keys, each with the present one."""


@frozen
class Ramp:
    """A batch-size ramp: stages of `start_rows`, `start_rows + step_rows`, ... below the phase's `batch_rows`."""

    tokens: Annotated[float, Ge(0), MultipleOf(1)] = 0
    """Tokens of all stages together; 0 means no ramp."""
    start_rows: Annotated[int, Ge(0)] = 0
    """Rows of the global batch in the first stage."""
    step_rows: Annotated[int, Ge(0)] = 0
    """Rows added from one stage to the next."""
    equal: Annotated[str, Literal["steps", "tokens"]] = "steps"
    """Whether all stages last the same number of `steps`, so that a stage's tokens are proportional to its rows, or of
    `tokens`, so that the batch grows linearly in tokens."""


@frozen
class Phase:
    """One row of the curriculum table."""

    tokens: Annotated[float, Gt(0), MultipleOf(1)] = MISSING
    """Budget in tokens of row capacity (rows x seq_len); the phase ends at the first step boundary at or past it."""
    seq_len: Annotated[int, Ge(8)] = MISSING
    """Row length in tokens, special tokens included."""
    batch_rows: Annotated[int, Ge(0)] = MISSING
    """Rows of the global batch, over all ranks and accumulation."""
    ramp: Ramp = field(default_factory=Ramp)
    """Batch-size ramp at the start of the phase."""
    lr: Annotated[float, Interval(gt=0, le=100)] = MISSING
    """Peak learning rate of the phase, on the scale of `optim.lr`."""
    lr_curve: str = MISSING
    """Shape of the learning rate from the end of the warmup to the end of the phase: a function of `modernenc.schedules`."""
    warmup_tokens: Annotated[float, Ge(0), MultipleOf(1)] = 0
    """Tokens of linear warmup at the start of the phase."""
    first_lr_factor: Annotated[float, Interval(ge=0, le=1)] = 0
    """Fraction of `lr` at which the warmup begins, in [0, 1]; above 0 it continues from where the previous phase ended."""
    final_lr_factor: Annotated[float, Interval(ge=0, le=1)] = 0
    """Fraction of `lr` left at the end of a decaying curve, in [0, 1]."""
    weight_decay: Annotated[float, Interval(ge=0, le=10)] = MISSING
    """Weight decay of parameters with two or more dimensions; each optimizer's docstring says how it scales with the learning
    rate."""
    mask_ratio: Annotated[float, Interval(gt=0, lt=1)] = MISSING
    """Fraction of the text tokens that are predicted, in (0, 1)."""
    causal_share: Annotated[float, Interval(ge=0, le=1)] = 0
    """Fraction of the phase, from its start, in which each token is predicted from those before it; masked LM follows. All
    tokens teach, so that a run leaves its first plateau sooner: Gisserot-Boukhlef et al. 2025, arXiv:2507.00994."""
    mix: dict[str, Annotated[float, Ge(0)]] = MISSING
    """Relative proportion of tokens by source (`wiki`), or by one slice of a source (`wiki/slice-001`); 0 leaves it out."""
    objectives: dict[str, Annotated[int, Interval(ge=0, le=1_000)]] = field(default_factory=dict)
    """Steps of each objective in one cycle: `masked_lm`, or one of `tasks`; empty means masked LM alone. A phase without masked
    LM draws no text: its `batch_rows` is 0, its `mix` is empty, and `seq_len` and `mask_ratio` apply to validation."""
    backbone: dict[str, Any] = field(default_factory=dict)
    """Attributes of the backbone to set when the phase starts, such as `global_rope_theta`."""


@frozen
class Task:
    """Multiple choice in the layout of SWAG: a context and four endings, one of which is right."""

    train: str = field(default=MISSING, metadata=_RESUMABLE)
    """CSV file with the columns sent1, sent2, ending0 to ending3 and label, 0 to 3."""
    validation: str = field(default=MISSING, metadata=_RESUMABLE)
    """CSV file of held-out items with the same columns."""
    validation_items: Annotated[int, Ge(1)] = 1_000
    """Number of held-out items that are used, from the first on."""
    seq_len: Annotated[int, Ge(16)] = MISSING
    """Length in tokens of a context with one ending, special tokens included; a longer context loses its beginning."""
    batch_items: Annotated[int, Ge(1)] = MISSING
    """Items of the global batch, over all ranks and accumulation; the clock counts 4 x seq_len tokens for each."""
    lr_factor: Annotated[float, Gt(0)] = 1
    """Learning rate of the task's steps as a fraction of the phase's; more than 0."""


@frozen
class Init:
    """Where the first weights come from."""

    source: str = ""
    """Checkpoint of any run (*.ckpt), folder of a Hugging Face model, or checkpoint of the ModernBERT repository (*.pt), whose
    weights the run starts from; the run's backbone may be wider and deeper. Empty means random weights."""
    layer_mapping: Annotated[str, Literal["by_depth", "by_type"]] = "by_depth"
    """How the layers of the source map to a deeper backbone: `by_depth` takes the layer at the same relative depth,
    `by_type` the nearest layer of the same attention type."""
    tokenizer: str = ""
    """The source's tokenizer.json, if its tokenizer is not the data's: embeddings are then carried over by how tokens are
    spelled."""
    unigram: bool = False
    """Without a source, start the decoder's bias at the frequency of each token in the first mix, so that no step is spent on
    learning it."""
    neighbours: bool = False
    """Without a source, start the embedding of each token from the tokens that stand beside it in the first mix, counted in
    seconds, so that fewer steps are spent on learning which tokens are alike."""


@frozen
class Data:
    """Where the shards are, and how lanes pack them into rows."""

    root: str = field(default=MISSING, metadata=_RESUMABLE)
    """Folder that `python -m data_prep` wrote, or the URL of a copy: s3://, gs://, az://, sftp://, hf://datasets/ORG/NAME@REVISION/."""
    cache: str = field(default="", metadata=_RESUMABLE)
    """Folder on this machine for the shards of a remote root; empty for a local one, which is read in place."""
    timeout_s: Annotated[float, Gt(0)] = field(default=60, metadata=_RESUMABLE)
    """Seconds without data after which a read of a remote counts as failed; a read is tried three times."""
    lanes: Annotated[int, Ge(0)] = MISSING
    """Number of lanes: the unit of data order, and the largest number of ranks. The rows of a step come from that many packing
    buffers, so few lanes mean few documents. 0 chooses a number that suits the corpus (`modernenc.planning.sizes`)."""
    buffer_rows: Annotated[int, Ge(0)] = MISSING
    """Size of a lane's packing buffer in rows: the text that it packs at a time. 0 chooses a size that suits the corpus."""
    from_corpus: list[str] = field(default_factory=list, metadata=_RESUMABLE)
    """Settings that were 0 and were chosen by the corpus; filled in by the program, for readers of config.yaml."""
    workers: Annotated[int, Literal[0, 1]] = field(default=MISSING, metadata=_RESUMABLE)
    """Loader processes per rank: 0 or 1. The data do not depend on it."""
    loader_timeout_s: Annotated[float, Gt(0)] = field(default=900, metadata=_RESUMABLE)
    """Seconds without a step from the loader process after which the run ends: longer than all tries of a remote take."""
    hint: str = field(
        default="prepare it with: python -m data_prep +corpus=jsonl input=DIR out=data/NAME sources.text.licence=LICENCE",
        metadata=_RESUMABLE,
    )
    """Advice for a user who lacks the data. It ends with a command in which names in capitals are to be replaced."""


@frozen
class Trainer:
    """Hardware and precision. Nothing here changes which tokens a step sees."""

    accelerator: Annotated[str, Literal["auto", "cpu", "gpu"]] = MISSING
    """`auto` (a CUDA device if there is one, else the processor), `cpu` or `gpu`."""
    devices: Annotated[int, Ge(1)] = MISSING
    """Devices per node."""
    num_nodes: Annotated[int, Ge(1)] = 1
    """Nodes."""
    strategy: Annotated[str, Literal["auto", "ddp", "fsdp"]] = "auto"
    """How several devices share the work: auto (ddp if there are several), ddp, or fsdp (FSDP2, which splits weights and
    optimizer states over the devices)."""
    precision: Annotated[str, Literal["bf16-mixed", "32-true"]] = MISSING
    """`bf16-mixed` (fp32 weights, bf16 matrix products) or `32-true`."""
    timeout_s: Annotated[float, Gt(0)] = 600
    """Seconds that ranks wait for each other before the run ends: longer than the slowest step, validation and save."""
    determinism: Annotated[str, Literal["fast", "strict"]] = "fast"
    """`fast`, or `strict`: the same run gives the same bits on GPUs too, by slower kernels where necessary. A CPU always gives
    the same bits."""
    micro_batch_tokens: Annotated[int, Ge(1)] = MISSING
    """Row capacity of one forward pass per device; a micro-batch holds at least one row."""
    activation_checkpointing_every: Annotated[int, Ge(0)] = 0
    """Recompute every n-th layer in the backward pass instead of keeping its activations. 1 means every layer, which takes
    about a third more time on a CPU, and saves most memory; 0 means none. Results are bit-identical."""
    compile: bool = True
    """Compile the layers with torch.compile, on GPUs in bf16: about a minute at the first start, seconds later from torch's
    cache in the user's cache folder. Rounding differs from eager mode, so a run should not switch midway. The CPU path is never
    compiled, nor is a run with determinism=strict."""
    window_kernel: bool = False
    """Compute ModernBERT's attention with a window by a Triton kernel of this package, on GPUs in bf16. In Triton's interpreter
    it equals the other kernels; on a GPU it was not measured yet, which `python -m modernenc.bench gpu` does. Rounding differs,
    so a run should not switch midway."""


@frozen
class CheckpointSettings:
    """When to save. Checkpoints at phase boundaries are always written and never deleted."""

    every_tokens: Annotated[float, Ge(0)] = MISSING
    """Save each time this many tokens were seen; 0 means never."""
    every_minutes: Annotated[float, Ge(0)] = MISSING
    """Save each time this many minutes have passed; 0 means never."""
    keep_last: Annotated[int, Ge(1)] = MISSING
    """Number of checkpoints between boundaries to keep."""
    distributed: bool = False
    """Under trainer.strategy=fsdp, let each rank write its own shard, so that no rank gathers the whole; all nodes must see the
    folder. Any strategy on any number of ranks resumes from either kind."""


@frozen
class Validation:
    """When to validate, and on how much held-out text. Validation at phase boundaries always takes place."""

    every_tokens: Annotated[float, Ge(0)] = MISSING
    """Validate each time this many tokens were seen; 0 means at phase boundaries only."""
    tokens_per_source: Annotated[int, Ge(1)] = MISSING
    """Largest row capacity taken from each source's held-out text."""


@frozen
class Evaluate:
    """What `modernenc.evaluate --watch RUN_DIR`, a process beside the one that trains, evaluates of each checkpoint."""

    every_tokens: Annotated[float, Ge(0)] = 0
    """Evaluate a checkpoint each time this many tokens were seen; 0 means at the ends of phases only."""
    suites: dict[str, str] = field(default_factory=dict)
    """Suites, each with its arguments as on the command line: `mlm: --data data/demo`."""


@frozen
class Watch:
    """What the monitor reports when training has become unstable, and when the run stops."""

    action: Annotated[str, Literal["off", "warn", "stop"]] = MISSING
    """`off`, `warn`, or `stop`: end the run after `patience` spikes in a row, without saving, and name the checkpoint to
    go back to."""
    window_tokens: Annotated[float, Gt(0)] = MISSING
    """A new row of metrics is compared with the rows of the last `window_tokens` tokens."""
    z_threshold: Annotated[float, Gt(0)] = MISSING
    """A loss or log gradient norm this many robust standard deviations above the median counts as a spike."""
    max_skipped_steps: Annotated[int, Ge(1)] = MISSING
    """Number of steps in a row that may be skipped; then the run stops without saving."""
    patience: Annotated[int, Ge(1)] = MISSING
    """Number of consecutive spikes, in rows of metrics, after which `stop` stops."""


@frozen
class Logger:
    """Where metrics go besides `metrics.csv`."""

    every_steps: Annotated[int, Ge(1)] = MISSING
    """Steps between two rows of metrics."""
    wandb: Annotated[str, Literal["off", "offline", "online"]] = MISSING
    """Weights & Biases: off, offline, or online (which falls back to offline without a login)."""
    project: str = "modernenc"
    """Project in Weights & Biases."""
    run_id: str = ""
    """Id of the run in Weights & Biases, generated at the start. A resume continues under it; a rollback or a branch has its
    own, because what was logged cannot be taken back."""
    group: str = ""
    """Id of the run that this one descends from, by rollbacks and branches, or its own: the group in Weights & Biases."""


@frozen
class Cluster:
    """What `modernenc.launch` requests from SLURM; `trainer.devices` and `trainer.num_nodes` follow, one process per task."""

    nodes: Annotated[int, Ge(1)] = 1
    """Nodes."""
    tasks_per_node: Annotated[int, Ge(1)] = 1
    """Processes per node: as many as GPUs, if there are any."""
    gpus_per_node: Annotated[int, Ge(0)] = 0
    """GPUs per node; 0 requests none."""
    cpus_per_task: Annotated[int, Ge(1)] = 1
    """Processor cores per process: threads of the model on a CPU, the loader beside a GPU."""
    time: str = ""
    """Time limit in sbatch's format: hours:minutes:seconds."""
    signal_s: Annotated[int, Ge(1)] = 300
    """Seconds before the limit at which the run is signalled to save: longer than two steps, a validation and a save take."""
    partition: str = ""
    """Partition; empty leaves the choice to the cluster."""
    account: str = ""
    """Account; empty leaves the choice to the cluster."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive or --mem=64G."""
    srun_options: list[str] = field(default_factory=list)
    """Further options of srun, such as --container-image=IMAGE."""
    wrapper: list[str] = field(default_factory=list)
    """Command that runs the training command in a container, word by word: [apptainer, exec, --nv, image.sif]."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before training, such as: module load cuda."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the processes, such as NCCL_SOCKET_IFNAME. They are written into the job's script only, which no
    one else can read."""
    scratch: str = ""
    """Folder on each node's own disk: each job gets a TMPDIR there, deleted when it ends; empty leaves TMPDIR as it is."""


@frozen
class Estimate:
    """Assumptions for the time and cost estimates of `modernenc.plan`; training ignores them."""

    device: Annotated[str, Literal["a100", "h100", "h200", "rtx4090", ""]] = ""
    """Kind of GPU; empty omits hours and the check of memory."""
    mfu: Annotated[float, Interval(gt=0, le=1)] = 0.25
    """Model FLOP utilization: the fraction of the device's bf16 peak that training reaches. ModernBERT-base took 245.6 hours on
    8 H100, which is 0.26."""
    tokens_per_s: Annotated[float, Ge(0)] = 0
    """Measured tokens a second on one device; if it is not 0, it replaces `device` and `mfu`."""
    price_per_hour: Annotated[float, Ge(0)] = 0
    """Price of one device for an hour, in any currency."""


@frozen
class Run:
    """One reproducible training."""

    recipe: str = field(default=MISSING, metadata=_IDENTITY)
    """Name of the recipe; set by `+recipe=NAME`."""
    run_dir: str = field(default=MISSING, metadata=_IDENTITY)
    """Folder that the run writes."""
    branch_from: str = field(default="", metadata=_IDENTITY)
    """Checkpoint of another run to branch from, set by `+from=CKPT`; empty starts from the beginning."""
    smoke_test: str = ""
    """Corpus on which to try the recipe, scaled down to minutes on a laptop (`modernenc.planning.smoke_test`); empty trains
    it in full."""
    rollbacks: Annotated[int, Ge(0)] = field(default=0, metadata=_IDENTITY)
    """Number of times the run went back to a checkpoint; counted by `modernenc.resume`."""
    seed: Annotated[int, Interval(ge=0, lt=1 << 63)] = MISSING
    """Seed of initialisation, data order, masks and dropout."""
    backbone: dict[str, Any] = MISSING
    """`_target_`, a backbone class, and its arguments. `vocab_size` 0 means the size of the corpus's tokenizer, rounded up to a
    multiple of 64. An empty `_target_` (`backbone=of_source`) takes both from `init.source`, and keys set here change them."""
    optim: dict[str, Any] = MISSING
    """`_target_`, a function of `modernenc.model.optim`, and its arguments, among them `lr` and `weight_decay`."""
    clip_grad_norm: Annotated[float, Ge(0)] = 0
    """Largest norm of a step's gradient; a larger gradient is scaled down to it. 0 means no limit."""
    skip_norm_sigmas: Annotated[float, Ge(0)] = 0
    """A step is skipped whose gradient norm is more than this many standard deviations above the mean of the last 128 steps of
    its phase and objective; OLMo-core proposes 6. 0 skips none but those whose gradient is not finite."""
    init: Init = field(default_factory=Init)
    tasks: dict[str, Task] = field(default_factory=dict)
    """Objectives besides masked LM, by name; `+task@tasks.swag=multiple_choice` adds one. Each has its own head on the
    backbone."""
    phases: dict[str, Phase] = MISSING
    """The curriculum, in order."""
    data: Data = field(default_factory=Data)
    trainer: Trainer = field(default_factory=Trainer, metadata=_RESUMABLE)
    checkpoint: CheckpointSettings = field(default_factory=CheckpointSettings, metadata=_RESUMABLE)
    validation: Validation = field(default_factory=Validation, metadata=_RESUMABLE)
    evaluate: Evaluate = field(default_factory=Evaluate, metadata=_RESUMABLE)
    watch: Watch = field(default_factory=Watch, metadata=_RESUMABLE)
    logger: Logger = field(default_factory=Logger, metadata=_RESUMABLE)
    cluster: Cluster = field(default_factory=Cluster, metadata=_RESUMABLE)
    estimate: Estimate = field(default_factory=Estimate, metadata=_RESUMABLE)


def is_resumable(key: str) -> bool:
    """Return whether a resume may change the setting with this dotted key."""
    return _is_marked(key, "resumable")


def is_identity(key: str) -> bool:
    """Return whether the program itself sets this dotted key."""
    return _is_marked(key, "identity")


def resumable_keys() -> list[str]:
    """Return the keys, or groups of keys, that a resume may change."""
    return [key for key in _marked_keys(Run, "") if not key.startswith("data.from_corpus")]


def _is_marked(key: str, mark: str) -> bool:
    schema: Any = Run
    for part in key.split("."):
        if not is_dataclass(schema):
            schema = get_args(schema)[1] if len(get_args(schema)) == 2 else None  # a dict of `schema` by name
            continue
        described = next((one for one in fields(schema) if one.name == part), None)
        if described is None:
            return False
        if described.metadata.get(mark):
            return True
        schema = get_type_hints(schema)[part]
    return False


def _marked_keys(schema: Any, prefix: str) -> Iterator[str]:
    for one in fields(schema):
        hint = get_type_hints(schema)[one.name]
        within = get_args(hint)[-1] if get_args(hint) else hint
        name = f"{prefix}{one.name}" + (".NAME" if within is not hint and is_dataclass(within) else "")
        if one.metadata.get("resumable"):
            yield f"{name}.*" if is_dataclass(within) else name
        elif is_dataclass(within):
            yield from _marked_keys(within, f"{name}.")


def register() -> None:
    """Make the schema and the recipes known to Hydra, so that `+recipe=base` finds `recipes/base.yaml`."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Run)
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        store.store(group="recipe", name=path.stem, package="_global_", node=OmegaConf.load(path), provider=str(path))
