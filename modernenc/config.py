"""The typed schema of a run, and where its YAML lives.

`conf/` holds the parts (one YAML = one option of one group), `recipes/` the runs. Each field is explained here, valued in
`conf/`, chosen in a recipe. Token budgets are floats so that `5e9` may be written; they must be whole.
"""

import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, OmegaConf

_PACKAGE = Path(__file__).resolve().parent
_ROOT = _PACKAGE if (_PACKAGE / "conf").is_dir() else _PACKAGE.parent  # installed wheel, else checkout
CONF_DIR = _ROOT / "conf"
RECIPES_DIR = _ROOT / "recipes"
UNFINISHED = ".tmp"
"""What the names of files end with that are not written to their end."""
CONFIG = "config.yaml"
"""The file of a run folder that holds the resolved configuration."""
TASK_FILES = re.compile(r"tasks\.\w+\.(train|validation)(=|$)")
"""Settings that say where the files of tasks are: a run may be resumed with others, when they hold the same."""


@dataclass
class Ramp:
    """A batch-size ramp: levels `start_rows`, `start_rows + step_rows`, ... below the phase's `batch_rows`."""

    tokens: float = 0
    """Tokens of all levels together; 0 means no ramp."""
    start_rows: int = 0
    """Rows of the global batch at the first level."""
    step_rows: int = 0
    """Rows added from one level to the next."""
    equal: str = "steps"
    """What each level lasts the same number of: steps, so that its tokens are proportional to its rows, or tokens, so that the
    batch grows linearly in tokens."""


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
    """Shape from the end of the warmup to that of the phase: a function of `modernenc.curriculum.LR_CURVES`."""
    warmup_tokens: float = 0
    """Tokens of linear warmup at the start of the phase."""
    first_lr_factor: float = 0
    """Share of `lr` that the warmup begins at, in [0, 1]; above 0 to warm up again from where the phase before ended."""
    final_lr_factor: float = 0
    """Share of `lr` left at the end of a decaying curve, in [0, 1]."""
    weight_decay: float = MISSING
    """Decay of the parameters that decay, as the optimizer defines it."""
    mask_ratio: float = MISSING
    """Share of the text tokens that are predicted, in (0, 1)."""
    mix: dict[str, float] = MISSING
    """Relative share of tokens by source (`wiki`), or by one slice of a source (`wiki/slice-001`); 0 leaves it out."""
    objectives: dict[str, int] = field(default_factory=dict)
    """How many of the steps of a cycle train what: `masked_lm`, or one of `tasks`; empty means masked LM alone. Without masked
    LM a phase draws no text: its `batch_rows` is 0, its `mix` empty, and `seq_len` and `mask_ratio` are for validation."""
    backbone: dict[str, Any] = field(default_factory=dict)
    """Attributes of the backbone to set when the phase starts, such as `global_rope_theta`."""


@dataclass
class Task:
    """Multiple choice, in the layout of SWAG: which of four endings a context goes on with."""

    train: str = MISSING
    """CSV file with the columns sent1, sent2, ending0 to ending3 and label, 0 to 3."""
    validation: str = MISSING
    """Another one, held out."""
    validation_items: int = 1_000
    """How many of its items are used, from the first on."""
    seq_len: int = MISSING
    """Length in tokens of a context with an ending, special tokens included; of longer ones the context's beginning is cut."""
    batch_items: int = MISSING
    """Items of the global batch, over all ranks and accumulation; the clock counts 4 x seq_len tokens for each."""
    lr_factor: float = 1
    """Learning rate of its steps, as a share of the phase's; more than 0."""


@dataclass
class Init:
    """The weights to begin with, when not random ones."""

    source: str = ""
    """Checkpoint of any run (*.ckpt), or folder of a Hugging Face model; the backbone may be wider and deeper; empty means
    random weights."""
    layers: str = "spread"
    """Which layers a deeper backbone takes: spread, the one as far down, or by_kind, the nearest of those that attend alike."""
    tokenizer: str = ""
    """The source's tokenizer.json, when it is not the data's: embeddings are carried over by what tokens are written like."""
    unigram: bool = False
    """Where there is no source: let the decoder's bias predict each token by its frequency in the first mix, so that no step is
    spent on learning these."""


@dataclass
class Data:
    """Where the blocks are and how lanes cut them into rows."""

    root: str = MISSING
    """Folder that `python -m data_prep` wrote, or the URL of a copy: s3://, gs://, az://, sftp://, hf://datasets/ORG/NAME@REVISION/."""
    cache: str = ""
    """Folder on this machine for the shards of a remote root; empty for a local one, which is read in place."""
    timeout_s: float = 60
    """How long a remote may be silent before a read of it counts as failed; it is tried three times."""
    lanes: int = MISSING
    """Number of lanes: the unit of order, and the largest number of ranks. Rows of a step come from as many buffers, so
    few lanes mean few documents. 0 means as many as suit the corpus, by `modernenc.sizes`."""
    buffer_rows: int = MISSING
    """Size of a lane's packing buffer: the rows that it packs at a time. 0 likewise."""
    from_corpus: list[str] = field(default_factory=list)
    """Settings that were 0 and are the corpus's now; filled in by `modernenc.sizes`, for who reads config.yaml."""
    workers: int = MISSING
    """Loader processes per rank: 0 or 1. The data do not depend on it."""
    hint: str = "prepare it with: python -m data_prep +corpus=jsonl input=DIR out=data/NAME sources.text.licence=LICENCE"
    """What to tell a user who lacks the data: it ends with a command, of which names in capitals are to be replaced."""


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
    """How several devices share the work: auto (ddp where there are several), ddp, or fsdp (FSDP2: weights and optimizer
    states are split over them)."""
    precision: str = MISSING
    """`bf16-mixed` (fp32 weights, bf16 matrix products) or `32-true`."""
    determinism: str = "fast"
    """fast, or strict: the same bits from the same run on GPUs too, by slower kernels where there are some; a CPU always gives
    the same bits."""
    micro_batch_tokens: int = MISSING
    """Row capacity of one forward pass per device; at least one row is taken."""
    recompute_every: int = 0
    """Keep no activations of every so many-th block but make them again in the backward pass: 1 means all blocks, which costs
    a third more time and saves most of the memory; 0 means none. Losses do not change by a bit."""
    compile: bool = False
    """On GPUs in bf16, have torch's compiler make one kernel of what lies between products, which costs a minute at each start.
    Numbers are rounded in other places then, so a run should end as it began. A CPU's path is not compiled."""


@dataclass
class Checkpoint:
    """When to save. Phase boundaries are always saved and always kept."""

    every_tokens: float = MISSING
    """Save each time this many tokens were seen; 0 means never."""
    every_minutes: float = MISSING
    """Save each time this much time has passed; 0 means never."""
    keep_last: int = MISSING
    """How many checkpoints between boundaries to keep."""
    distributed: bool = False
    """Under trainer.strategy=fsdp, have each rank write its own share, so that none gathers the whole; the folder must be one
    that all nodes see. Any strategy, on any number of ranks, goes on from either kind."""


@dataclass
class Validation:
    """When and on how much held-out text to validate. Phase boundaries always are."""

    every_tokens: float = MISSING
    """Validate each time this many tokens were seen; 0 means at phase boundaries only."""
    tokens_per_source: int = MISSING
    """Row capacity taken from each source's held-out text, at most."""


@dataclass
class Watch:
    """When to say that training goes wrong."""

    action: str = MISSING
    """off, warn, or stop: end the run after some spikes in a row, without saving, and say what to go back to."""
    window_tokens: float = MISSING
    """Rows of figures of the last so many tokens are what a new one is compared with."""
    z: float = MISSING
    """Robust standard deviations above the median, of loss or log gradient norm, that make a spike."""
    patience: int = MISSING
    """Spikes in a row, in rows of figures, after which `stop` stops."""


@dataclass
class Logger:
    """Where figures go besides `metrics.csv`."""

    every_steps: int = MISSING
    """Steps between two rows of figures."""
    wandb: str = MISSING
    """Weights & Biases: off, offline, or online (falls back to offline without a login)."""
    project: str = "modernenc"
    """Weights & Biases project."""
    run_id: str = ""
    """Weights & Biases' id of the run, made when it starts, so that what is resumed is one run there; a branch has its own."""


@dataclass
class Cluster:
    """What `modernenc.launch` asks SLURM for; one process per task, `trainer.devices` and `trainer.num_nodes` follow."""

    nodes: int = 1
    """Nodes."""
    tasks_per_node: int = 1
    """Processes per node: as many as GPUs, where there are some."""
    gpus_per_node: int = 0
    """GPUs per node; 0 asks for none."""
    cpus_per_task: int = 1
    """Processor cores per process: threads of the model on a CPU, the loader beside a GPU."""
    time: str = ""
    """Time limit, as sbatch takes it: hours:minutes:seconds."""
    signal_s: int = 300
    """Seconds before the limit at which the run is told to save: longer than a step, a validation and a save take."""
    partition: str = ""
    """Partition; empty leaves it to the cluster."""
    account: str = ""
    """Account; empty leaves it to the cluster."""
    options: list[str] = field(default_factory=list)
    """Further options of sbatch, such as --exclusive."""
    setup: list[str] = field(default_factory=list)
    """Shell lines before training, such as: module load cuda."""
    environment: dict[str, str] = field(default_factory=dict)
    """Variables of the processes, such as NCCL_SOCKET_IFNAME."""
    scratch: str = ""
    """Folder on each node's own disk: each job has its TMPDIR there, deleted when it ends; empty leaves TMPDIR as it is."""


@dataclass
class Estimate:
    """What `modernenc.plan` reckons time and money with; training does not look at it."""

    device: str = ""
    """One of `modernenc.estimate.DEVICES`; empty leaves out hours and whether memory suffices."""
    mfu: float = 0.25
    """Share of the device's bf16 peak that training reaches: ModernBERT's 245.6 hours on 8 H100 were 0.26."""
    tokens_per_s: float = 0
    """Tokens a second on one device, measured: it takes the place of `device` and `mfu` where it is not 0."""
    price: float = 0
    """Of one device for an hour, in any currency."""


@dataclass
class Run:
    """One reproducible training."""

    recipe: str = MISSING
    """Name of the recipe; set by `+recipe=NAME`."""
    run_dir: str = MISSING
    """Folder that the run writes."""
    branch_from: str = ""
    """Checkpoint of another run to go on from, set by `+from=CKPT`; empty starts afresh."""
    rehearse: str = ""
    """Corpus to rehearse the recipe on, cut down to minutes on a laptop by `modernenc.rehearsal`; empty trains it."""
    rollbacks: int = 0
    """How many times the run went back to a checkpoint; counted by `modernenc.resume`."""
    seed: int = MISSING
    """Seed of initialisation, data order, masks and dropout."""
    backbone: Any = MISSING
    """`_target_`: a backbone class, and its arguments. `vocab_size` 0 means that of the corpus's tokenizer, up to the next
    multiple of 64."""
    optim: Any = MISSING
    """`_target_`: a function of `modernenc.optim`, and its arguments; `lr` and `weight_decay` among them."""
    clip_grad_norm: float = 0
    """Largest norm of a step's gradient, which is scaled down to it; 0 means no limit."""
    init: Init = field(default_factory=Init)
    tasks: dict[str, Task] = field(default_factory=dict)
    """What phases may train besides masked LM, by name, as `+task@tasks.swag=multiple_choice` adds one; each has a head of its
    own on the backbone."""
    phases: dict[str, Phase] = MISSING
    """The curriculum, in the order written."""
    data: Data = field(default_factory=Data)
    trainer: Trainer = field(default_factory=Trainer)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    validation: Validation = field(default_factory=Validation)
    watch: Watch = field(default_factory=Watch)
    logger: Logger = field(default_factory=Logger)
    cluster: Cluster = field(default_factory=Cluster)
    estimate: Estimate = field(default_factory=Estimate)


def register() -> None:
    """Make the schema and the recipes known to Hydra, so that `+recipe=base` finds `recipes/base.yaml`."""
    store = ConfigStore.instance()
    store.store(name="run_schema", node=Run)
    for path in sorted(RECIPES_DIR.glob("*.yaml")):
        store.store(group="recipe", name=path.stem, package="_global_", node=OmegaConf.load(path), provider=str(path))


def plain(run: Run) -> dict[str, Any]:
    """A run as plain values."""
    return cast(dict[str, Any], OmegaConf.to_container(OmegaConf.structured(run)))


def save(run: Run) -> None:
    """Write the resolved configuration, whole or not at all."""
    path = Path(run.run_dir) / CONFIG
    OmegaConf.save(OmegaConf.structured(run), unfinished(path))
    unfinished(path).replace(path)


def unfinished(path: Path) -> Path:
    """Where a file is written before it has its name: beside it, and no other process writes there."""
    return path.with_name(f"{path.name}.{os.getpid()}{UNFINISHED}")


def load(run_dir: Path) -> Run:
    """The configuration that a run was started with; FileNotFoundError when the folder holds none."""
    path = run_dir / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{run_dir} holds no run: {CONFIG} is missing; give a folder that modernenc.train made")
    merged = OmegaConf.merge(OmegaConf.structured(Run), OmegaConf.load(path))
    return cast(Run, OmegaConf.to_object(merged))
