"""The kinds of plugin, in the order in which a run resolves them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One replaceable part of the system.

    name:     the middle of the entry-point group.
    contract: module and class that an implementation subclasses, as ``module:Class``.
    major:    major version of the contract; the entry-point group carries it.
    minor:    minor version that this core speaks; raised with every change of the contract that plugins can notice.
    decides:  what the part decides, in one line.
    default:  the name used when the configuration says nothing; ``auto`` ranks the candidates that probe well.
    purposes: the work that needs the part; a kind that only training needs is not resolved for serving.
    key:      the configuration key and command-line option; the kind's name unless that means something else there.
    """

    name: str
    contract: str
    decides: str
    default: str = "auto"
    major: int = 1
    purposes: tuple[str, ...] = ("serve", "train")
    key: str = ""
    minor: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "key", self.key or self.name)

    @property
    def group(self) -> str:
        """The entry-point group of this kind, for example ``drivetrain.attention.v1``."""
        return f"drivetrain.{self.name}.v{self.major}"

    @property
    def version(self) -> str:
        """Version of the contract that this core speaks, for example ``1.0``."""
        return f"{self.major}.{self.minor}"


_ORDERED = (
    Kind("platform", "drivetrain.contracts.platform:Platform", "devices, memory, streams, graph capture", minor=1),
    Kind("precision", "drivetrain.contracts.precision:Precision", "parameter, compute and reduction types"),
    Kind("source", "drivetrain.contracts.source:Source", "where a model name is fetched from"),
    Kind("loader", "drivetrain.contracts.loader:Loader", "how weight files are read"),
    Kind(
        "model",
        "drivetrain.contracts.model:Model",
        "the architecture that the weights are run through",
        key="architecture",  # the setting ``model`` names the weights
    ),
    Kind(
        "partitioner",
        "drivetrain.contracts.partitioner:Partitioner",
        "how parameters, gradients and optimizer state lie over ranks",
        default="none",
        purposes=("train",),
    ),
    Kind(
        "checkpoint",
        "drivetrain.contracts.checkpoint:CheckpointPolicy",
        "which activations are kept, recomputed or offloaded",
        default="none",
        purposes=("train",),
    ),
    Kind(
        "optimizer",
        "drivetrain.contracts.optimizer:Optimizer",
        "how gradients change parameters, and how fast",
        default="adamw",
        purposes=("train",),
    ),
    Kind(
        "store",
        "drivetrain.contracts.store:Store",
        "where training state is saved, and how",
        default="dcp",
        purposes=("train",),
    ),
    Kind("quantizer", "drivetrain.contracts.quantizer:Quantizer", "the formats of weights"),
    Kind("attention", "drivetrain.contracts.attention:AttentionBackend", "KV layout, and attention over it", minor=3),
    Kind(
        "kernels",
        "drivetrain.contracts.kernels:KernelProvider",
        "the implementation of each logical operation",
        minor=2,
    ),
    Kind(
        "recipe",
        "drivetrain.contracts.recipe:Recipe",
        "what is trained: data, batches, loss",
        default="sft",
        purposes=("train",),
    ),
    Kind(
        "tracker",
        "drivetrain.contracts.tracker:Tracker",
        "where the figures of a training run go",
        default="jsonl",
        purposes=("train",),
    ),
    Kind(
        "scheduler",
        "drivetrain.contracts.scheduler:Scheduler",
        "which requests get how many tokens in the next step",
        default="fcfs",
        purposes=("serve",),
    ),
    Kind(
        "frontend",
        "drivetrain.contracts.frontend:Frontend",
        "how requests arrive from outside the process",
        default="openai",
        purposes=("serve",),
    ),
)

KINDS: dict[str, Kind] = {kind.name: kind for kind in _ORDERED}
"""Every kind by name; iteration order is resolution order, so that each probe sees what is already chosen."""
