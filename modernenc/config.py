"""The typed schema of a run, and where its YAML files live.

`conf/` holds the parts (one YAML file is one option of one group), `recipes/` the runs. Each field is explained here, gets its
value in `conf/`, and is chosen in a recipe. Token budgets are floats so that `5e9` may be written; they must be whole numbers.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, cast, get_args, get_type_hints

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import ConfigKeyError

from modernenc.atomic import partial_path
from modernenc.quoting import assigned

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent  # an installed wheel, else a checkout
CONF_DIR = _ROOT / "conf"
RECIPES_DIR = _ROOT / "recipes"
CONFIG = "config.yaml"
"""Name of the file in a run folder that holds the resolved configuration."""

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
}
"""Former names of keys, each with the present one."""


@dataclass
class Ramp:
    """A batch-size ramp: stages of `start_rows`, `start_rows + step_rows`, ... below the phase's `batch_rows`."""

    tokens: float = 0
    """Tokens of all stages together; 0 means no ramp."""
    start_rows: int = 0
    """Rows of the global batch in the first stage."""
    step_rows: int = 0
    """Rows added from one stage to the next."""
    equal: str = "steps"
    """Whether all stages last the same number of `steps`, so that a stage's tokens are proportional to its rows, or of
    `tokens`, so that the batch grows linearly in tokens."""


@dataclass
class Phase:
    """One row of the curriculum table."""

    tokens: float = MISSING
    """Budget in tokens of row capacity (rows x seq_len); the phase ends at the first step boundary at or past it."""
    seq_len: int = MISSING
    """Row length in tokens, special tokens included."""
    batch_rows: int = MISSING
    """Rows of the global batch, over all ranks and accumulation."""
    ramp: Ramp = field(default_factory=Ramp)
    """Batch-size ramp at the start of the phase."""
    lr: float = MISSING
    """Peak learning rate of the phase, on the scale of `optim.lr`."""
    lr_curve: str = MISSING
    """Shape of the learning rate from the end of the warmup to the end of the phase: a function of `modernenc.schedules`."""
    warmup_tokens: float = 0
    """Tokens of linear warmup at the start of the phase."""
    first_lr_factor: float = 0
    """Fraction of `lr` at which the warmup begins, in [0, 1]; above 0 it continues from where the previous phase ended."""
    final_lr_factor: float = 0
    """Fraction of `lr` left at the end of a decaying curve, in [0, 1]."""
    weight_decay: float = MISSING
    """Weight decay of parameters with two or more dimensions; each optimizer's docstring says how it scales with the learning
    rate."""
    mask_ratio: float = MISSING
    """Fraction of the text tokens that are predicted, in (0, 1)."""
    mix: dict[str, float] = MISSING
    """Relative proportion of tokens by source (`wiki`), or by one slice of a source (`wiki/slice-001`); 0 leaves it out."""
    objectives: dict[str, int] = field(default_factory=dict)
    """Steps of each objective in one cycle: `masked_lm`, or one of `tasks`; empty means masked LM alone. A phase without masked
    LM draws no text: its `batch_rows` is 0, its `mix` is empty, and `seq_len` and `mask_ratio` apply to validation."""
    backbone: dict[str, Any] = field(default_factory=dict)
    """Attributes of the backbone to set when the phase starts, such as `global_rope_theta`."""


@dataclass
class Task:
    """Multiple choice in the layout of SWAG: a context and four endings, one of which is right."""

    train: str = field(default=MISSING, metadata=_RESUMABLE)
    """CSV file with the columns sent1, sent2, ending0 to ending3 and label, 0 to 3."""
    validation: str = field(default=MISSING, metadata=_RESUMABLE)
    """CSV file of held-out items with the same columns."""
    validation_items: int = 1_000
    """Number of held-out items that are used, from the first on."""
    seq_len: int = MISSING
    """Length in tokens of a context with one ending, special tokens included; a longer context loses its beginning."""
    batch_items: int = MISSING
    """Items of the global batch, over all ranks and accumulation; the clock counts 4 x seq_len tokens for each."""
    lr_factor: float = 1
    """Learning rate of the task's steps as a fraction of the phase's; more than 0."""


@dataclass
class Init:
    """Where the first weights come from."""

    source: str = ""
    """Checkpoint of any run (*.ckpt), or folder of a Hugging Face model, whose weights the run starts from; the run's backbone
    may be wider and deeper. Empty means random weights."""
    layer_mapping: str = "by_depth"
    """How the layers of the source map to a deeper backbone: `by_depth` takes the layer at the same relative depth,
    `by_type` the nearest layer of the same attention type."""
    tokenizer: str = ""
    """The source's tokenizer.json, if its tokenizer is not the data's: embeddings are then carried over by how tokens are
    spelled."""
    unigram: bool = False
    """Without a source, start the decoder's bias at the frequency of each token in the first mix, so that no step is spent on
    learning it."""


@dataclass
class Data:
    """Where the shards are, and how lanes pack them into rows."""

    root: str = field(default=MISSING, metadata=_RESUMABLE)
    """Folder that `python -m data_prep` wrote, or the URL of a copy: s3://, gs://, az://, sftp://, hf://datasets/ORG/NAME@REVISION/."""
    cache: str = field(default="", metadata=_RESUMABLE)
    """Folder on this machine for the shards of a remote root; empty for a local one, which is read in place."""
    timeout_s: float = field(default=60, metadata=_RESUMABLE)
    """Seconds without data after which a read of a remote counts as failed; a read is tried three times."""
    lanes: int = MISSING
    """Number of lanes: the unit of data order, and the largest number of ranks. The rows of a step come from that many packing
    buffers, so few lanes mean few documents. 0 chooses a number that suits the corpus (`modernenc.planning.sizes`)."""
    buffer_rows: int = MISSING
    """Size of a lane's packing buffer in rows: the text that it packs at a time. 0 chooses a size that suits the corpus."""
    from_corpus: list[str] = field(default_factory=list, metadata=_RESUMABLE)
    """Settings that were 0 and were chosen by the corpus; filled in by the program, for readers of config.yaml."""
    workers: int = field(default=MISSING, metadata=_RESUMABLE)
    """Loader processes per rank: 0 or 1. The data do not depend on it."""
    hint: str = field(
        default="prepare it with: python -m data_prep +corpus=jsonl input=DIR out=data/NAME sources.text.licence=LICENCE",
        metadata=_RESUMABLE,
    )
    """Advice for a user who lacks the data. It ends with a command in which names in capitals are to be replaced."""


@dataclass
class Trainer:
    """Hardware and precision. Nothing here changes which tokens a step sees."""

    accelerator: str = MISSING
    """Lightning's accelerator: auto, cpu or gpu."""
    devices: int = MISSING
    """Devices per node."""
    num_nodes: int = 1
    """Nodes."""
    strategy: str = "auto"
    """How several devices share the work: auto (ddp if there are several), ddp, or fsdp (FSDP2, which splits weights and
    optimizer states over the devices)."""
    precision: str = MISSING
    """`bf16-mixed` (fp32 weights, bf16 matrix products) or `32-true`."""
    determinism: str = "fast"
    """`fast`, or `strict`: the same run gives the same bits on GPUs too, by slower kernels where necessary. A CPU always gives
    the same bits."""
    micro_batch_tokens: int = MISSING
    """Row capacity of one forward pass per device; a micro-batch holds at least one row."""
    activation_checkpointing_every: int = 0
    """Recompute every n-th layer in the backward pass instead of keeping its activations. 1 means every layer, which takes
    about a third more time and saves most memory; 0 means none. Results are bit-identical."""
    compile: bool = False
    """Compile the layers with torch.compile on GPUs in bf16, which takes about a minute at each start. Rounding differs from
    eager mode, so a run should not switch midway. The CPU path is never compiled."""


@dataclass
class CheckpointSettings:
    """When to save. Checkpoints at phase boundaries are always written and never deleted."""

    every_tokens: float = MISSING
    """Save each time this many tokens were seen; 0 means never."""
    every_minutes: float = MISSING
    """Save each time this many minutes have passed; 0 means never."""
    keep_last: int = MISSING
    """Number of checkpoints between boundaries to keep."""
    distributed: bool = False
    """Under trainer.strategy=fsdp, let each rank write its own shard, so that no rank gathers the whole; all nodes must see the
    folder. Any strategy on any number of ranks resumes from either kind."""


@dataclass
class Validation:
    """When to validate, and on how much held-out text. Validation at phase boundaries always takes place."""

    every_tokens: float = MISSING
    """Validate each time this many tokens were seen; 0 means at phase boundaries only."""
    tokens_per_source: int = MISSING
    """Largest row capacity taken from each source's held-out text."""


@dataclass
class Watch:
    """Settings of the monitor that reports when training has become unstable."""

    action: str = MISSING
    """`off`, `warn`, or `stop`: end the run after `patience` spikes in a row, without saving, and name the checkpoint to
    go back to."""
    window_tokens: float = MISSING
    """A new row of metrics is compared with the rows of the last `window_tokens` tokens."""
    z_threshold: float = MISSING
    """A loss or log gradient norm this many robust standard deviations above the median counts as a spike."""
    patience: int = MISSING
    """Number of consecutive spikes, in rows of metrics, after which `stop` stops."""


@dataclass
class Logger:
    """Where metrics go besides `metrics.csv`."""

    every_steps: int = MISSING
    """Steps between two rows of metrics."""
    wandb: str = MISSING
    """Weights & Biases: off, offline, or online (which falls back to offline without a login)."""
    project: str = "modernenc"
    """Project in Weights & Biases."""
    run_id: str = ""
    """Id of the run in Weights & Biases, generated at the start. A resumed run continues under it; a branch has its own."""


@dataclass
class Cluster:
    """What `modernenc.launch` requests from SLURM; `trainer.devices` and `trainer.num_nodes` follow, one process per task."""

    nodes: int = 1
    """Nodes."""
    tasks_per_node: int = 1
    """Processes per node: as many as GPUs, if there are any."""
    gpus_per_node: int = 0
    """GPUs per node; 0 requests none."""
    cpus_per_task: int = 1
    """Processor cores per process: threads of the model on a CPU, the loader beside a GPU."""
    time: str = ""
    """Time limit in sbatch's format: hours:minutes:seconds."""
    signal_s: int = 300
    """Seconds before the limit at which the run is signalled to save: longer than a step, a validation and a save take."""
    partition: str = ""
    """Partition; empty leaves the choice to the cluster."""
    account: str = ""
    """Account; empty leaves the choice to the cluster."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive."""
    setup: list[str] = field(default_factory=list)
    """Shell lines that run before training, such as: module load cuda."""
    environment: dict[str, str] = field(default_factory=dict)
    """Environment variables of the processes, such as NCCL_SOCKET_IFNAME."""
    scratch: str = ""
    """Folder on each node's own disk: each job gets a TMPDIR there, deleted when it ends; empty leaves TMPDIR as it is."""


@dataclass
class Estimate:
    """Assumptions for the time and cost estimates of `modernenc.plan`; training ignores them."""

    device: str = ""
    """One of `modernenc.planning.devices.DEVICES`; empty omits hours and the check of memory."""
    mfu: float = 0.25
    """Model FLOP utilization: the fraction of the device's bf16 peak that training reaches. ModernBERT-base took 245.6 hours on
    8 H100, which is 0.26."""
    tokens_per_s: float = 0
    """Measured tokens a second on one device; if it is not 0, it replaces `device` and `mfu`."""
    price_per_hour: float = 0
    """Price of one device for an hour, in any currency."""


@dataclass
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
    rollbacks: int = field(default=0, metadata=_IDENTITY)
    """Number of times the run went back to a checkpoint; counted by `modernenc.resume`."""
    seed: int = MISSING
    """Seed of initialisation, data order, masks and dropout."""
    backbone: Any = MISSING
    """`_target_`, a backbone class, and its arguments. `vocab_size` 0 means the size of the corpus's tokenizer, rounded up to a
    multiple of 64."""
    optim: Any = MISSING
    """`_target_`, a function of `modernenc.model.optim`, and its arguments, among them `lr` and `weight_decay`."""
    clip_grad_norm: float = 0
    """Largest norm of a step's gradient; a larger gradient is scaled down to it. 0 means no limit."""
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


def plain(run: Run) -> dict[str, Any]:
    """Return a run's configuration as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(run)))


def from_plain(values: Any, run_dir: str = "") -> Run:
    """Return the run that plain values describe, in another folder if `run_dir` is given."""
    merged = OmegaConf.merge(OmegaConf.structured(Run), values, {"run_dir": run_dir} if run_dir else {})
    return cast(Run, OmegaConf.to_object(merged))


def changed(run: Run, overrides: list[str]) -> Run:
    """Return a copy of the run with `KEY=VALUE` settings changed."""
    merged = OmegaConf.structured(run)
    for key, value in assigned(overrides):
        change = OmegaConf.create()
        OmegaConf.update(change, key, value)
        merged = OmegaConf.merge(merged, change)
    return cast(Run, OmegaConf.to_object(merged))


def differences(old: Any, new: Any, key: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield each key at which two plain configurations differ, with the old and the new value; None means absent."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name in {**old, **new}:
            yield from differences(old.get(name), new.get(name), f"{key}.{name}" if key else name)
    elif old != new:
        yield key, old, new


def save(run: Run) -> None:
    """Write the resolved configuration into the run folder, whole or not at all."""
    path = Path(run.run_dir) / CONFIG
    OmegaConf.save(OmegaConf.structured(run), partial_path(path))
    partial_path(path).replace(path)


def load(run_dir: Path) -> Run:
    """Return the configuration that a run was started with.

    Raises FileNotFoundError if the folder holds none, ValueError if another version wrote it, with other keys.
    """
    path = run_dir / CONFIG
    if not path.is_file():
        give = run_dir / "latest" if (run_dir / "latest" / CONFIG).is_file() else "a folder that modernenc.train made"
        raise FileNotFoundError(f"{run_dir} holds no run: {CONFIG} is missing; give {give}")
    try:
        return from_plain(OmegaConf.load(path))
    except ConfigKeyError as error:
        raise ValueError(
            f"{path} was written by another version of modernenc: {error.key} is no key here; go on with the version that "
            "wrote it"
        ) from error
