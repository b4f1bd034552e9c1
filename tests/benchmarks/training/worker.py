"""One rank of one contestant: some steps, timed; rank 0 writes what came out as JSON. Started by training_peers.py."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent))
from network import batch_of, make_network

LR, CLIP = 3e-4, 1.0
Step = Callable[[torch.Tensor, torch.Tensor], float]


def ours(stage: str, options: dict[str, Any]) -> Step:
    from drivetrain.contracts.precision import Dtypes
    from drivetrain.plugins.checkpoint.none import NoCheckpointing
    from drivetrain.plugins.optimizer.adamw import AdamW
    from drivetrain.plugins.partitioner.none import NoPartitioner
    from drivetrain.plugins.partitioner.zero import Zero1Partitioner, Zero2Partitioner, Zero3Partitioner
    from drivetrain.training.prepared import Prepared
    from drivetrain.training.ranks import joined_ranks

    stages = {"none": NoPartitioner, "zero1": Zero1Partitioner, "zero2": Zero2Partitioner, "zero3": Zero3Partitioner}
    plugin = stages[stage]
    optimizer = AdamW(AdamW.Config(lr=LR, decay_vectors=True))
    ranks = contextlib.ExitStack().enter_context(joined_ranks(torch.device("cpu"), "gloo", 600))
    prepared = Prepared(
        make_network(),
        lambda named: optimizer.make(optimizer.groups(named)),
        partitioner=plugin(plugin.Config.model_validate(options)),
        checkpoint=NoCheckpointing(NoCheckpointing.Config()),
        dtypes=Dtypes("float32", "float32"),
        ranks=ranks,
        clip_norm=CLIP,
    )

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        with prepared.accumulating():
            loss = prepared.model(ids, targets)
            prepared.backward(loss)
        prepared.step()
        return float(loss.detach())

    return step


def torch_step(model: torch.nn.Module) -> Step:
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        loss = model(ids, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def ddp(stage: str, options: dict[str, Any]) -> Step:
    return torch_step(torch.nn.parallel.DistributedDataParallel(make_network(), gradient_as_bucket_view=True))


def fsdp2(stage: str, options: dict[str, Any]) -> Step:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = make_network()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return torch_step(model)


def deepspeed(stage: str, options: dict[str, Any]) -> Step:
    import deepspeed as engine

    engine.init_distributed(dist_backend="gloo")
    model = make_network()
    config = {
        "train_micro_batch_size_per_gpu": int(os.environ["ROWS"]),
        "gradient_accumulation_steps": 1,
        "gradient_clipping": CLIP,
        "zero_optimization": {"stage": int(stage), **options},
    }
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    wrapped, *_ = engine.initialize(model=model, optimizer=optimizer, config=config)

    def step(ids: torch.Tensor, targets: torch.Tensor) -> float:
        loss = wrapped(ids, targets)
        wrapped.backward(loss)
        wrapped.step()
        return float(loss.detach())

    return step


CONTESTANTS = {"ours": ours, "ddp": ddp, "fsdp2": fsdp2, "deepspeed": deepspeed}


def peak_bytes() -> int:
    """The largest resident set so far, of Linux."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def main(job: dict[str, Any]) -> None:
    rank = int(os.environ["RANK"])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    step = CONTESTANTS[job["contestant"]](job["stage"], job["options"])
    batches = [batch_of(n, rank, job["rows"], job["length"]) for n in range(job["warmup"] + job["steps"])]
    losses = [step(*batch) for batch in batches[: job["warmup"]]]
    seconds = []
    for batch in batches[job["warmup"] :]:
        dist.barrier()
        started = time.perf_counter()
        losses.append(step(*batch))
        seconds.append(time.perf_counter() - started)
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, (losses, seconds, peak_bytes()))
    if rank == 0:
        tokens = job["rows"] * job["length"] * len(told)
        per_step = [max(rank_seconds) for rank_seconds in zip(*(one[1] for one in told), strict=True)]
        result = {
            "tokens_per_second": tokens * len(per_step) / sum(per_step),
            "best_tokens_per_second": tokens / min(per_step),
            "losses": [sum(values) / len(told) for values in zip(*(one[0] for one in told), strict=True)],
            "peak_bytes": max(one[2] for one in told),
            "torch": torch.__version__,
        }
        Path(job["result"]).write_text(json.dumps(result), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
