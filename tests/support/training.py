"""A small data set, runs on it, and a plain torch loop that says what their figures must be."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from drivetrain.training.order import SampleOrder, StepShape
from support.tiny_models import BOS, EOS, FolderCheckpoint, save_tiny

LENGTH = 96
ONE_THREAD = {"name": "cpu", "threads": 1}


def write_chats(path: Path, count: int = 24) -> Path:
    """Conversations of one exchange, all alike but for a number."""
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"Say {number * 37 % 101}"},
                {"role": "assistant", "content": f"The number is {number * 37 % 101}."},
            ]
        }
        for number in range(count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


def make_model(folder: Path) -> Path:
    """A tiny Llama."""
    save_tiny("llama", folder)
    return folder


def run_settings(model: Path, data: Path, folder: Path, **trainer: Any) -> dict[str, Any]:
    """Settings of a short run that keeps everything below ``folder``."""
    return {
        "model": str(model),
        "recipe": {"name": "sft", "data": str(data), "length": LENGTH},
        "optimizer": {"name": "adamw", "lr": 3e-3, "weight_decay": 0.1, "schedule": {"name": "cosine", "warmup": 2}},
        "platform": ONE_THREAD,
        "store": {"name": "dcp", "folder": str(folder / "state"), "every": 100, "background": False},
        "trainer": {"steps": 6, "micro_batch": 2, "folder": str(folder / "run"), **trainer},
    }


def train_in_processes(
    settings: Mapping[str, Any], folder: Path, processes: int = 1, *arguments: str, timeout: float = 120
) -> subprocess.CompletedProcess[str]:
    """``drivetrain train`` with these settings as a file, in processes of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "run.yaml"
    file.write_text(json.dumps(settings), encoding="utf-8")
    command = [sys.executable, "-m", "drivetrain", "train", str(file), "--nproc-per-node", str(processes), *arguments]
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def read_figures(folder: Path) -> list[dict[str, float]]:
    """What the tracker ``jsonl`` has written."""
    path = folder / "run" / "figures.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- the plain loop --------------------------------------------------------------------------------------------------


def plain_documents(model: Path, data: Path) -> list[tuple[list[int], list[int]]]:
    """Token ids and targets of each conversation, by the words of the tiny model's chat template alone."""
    backend = FolderCheckpoint(model).tokenizer().backend
    documents = []
    for line in data.read_text(encoding="utf-8").splitlines():
        user, answer = (message["content"] for message in json.loads(line)["messages"])
        asked = backend.encode(f"<s>user: {user}</s><s>assistant: ", add_special_tokens=False).ids
        whole = backend.encode(f"<s>user: {user}</s><s>assistant: {answer}</s>", add_special_tokens=False).ids
        assert whole[0] == BOS
        assert whole[-1] == EOS
        is_answer = [index >= len(asked) for index in range(len(whole))]
        targets = [whole[i + 1] if is_answer[i + 1] else -100 for i in range(len(whole) - 1)]
        documents.append((whole, [*targets, -100]))
    return documents


def plain_rows(documents: Sequence[tuple[list[int], list[int]]], length: int) -> list[list[int]]:
    """Numbers of the documents in each row: each goes to the first row that has room."""
    rows: list[list[int]] = []
    room: list[int] = []
    for number, (ids, _) in enumerate(documents):
        row = next((r for r in range(len(rows)) if room[r] >= len(ids)), None)
        if row is None:
            rows.append([])
            room.append(length)
            row = len(rows) - 1
        rows[row].append(number)
        room[row] -= len(ids)
    return rows


def plain_losses(
    model: Path, data: Path, *, steps: int, batch: int, lr: float, decay: float, warmup: int, clip: float
) -> list[float]:
    """Fine-tuning with transformers' model, torch's AdamW and nothing else: one document at a time, the whole step's
    loss as one sum, and one backward."""
    import math

    import transformers

    network: Any = transformers.AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    documents = plain_documents(model, data)
    rows = plain_rows(documents, LENGTH)
    order = SampleOrder(len(rows), 0)
    decayed = [p for p in network.parameters() if p.dim() >= 2]
    others = [p for p in network.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr)
    losses = []
    for step in range(steps):
        positions = StepShape(batch, 1, 1).positions(step * batch, 0, 0)
        chosen = [documents[number] for position in positions for number in rows[order.index(position)]]
        total = torch.zeros(())
        for ids, targets in chosen:
            logits = network(input_ids=torch.tensor([ids])).logits[0].float()
            total = total + functional.cross_entropy(logits, torch.tensor(targets), reduction="sum")
        loss = total / sum(target != -100 for _, targets in chosen for target in targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), clip)
        rising = step < warmup
        factor = (step + 1) / (warmup + 1) if rising else 0.0
        if not rising:
            factor = (1 + math.cos(math.pi * (step - warmup) / (steps - 1 - warmup))) / 2
        for group in optimizer.param_groups:
            group["lr"] = lr * factor
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses
