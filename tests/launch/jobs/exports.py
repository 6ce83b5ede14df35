"""A training whose model is saved whole, copied, traced, scripted and handed to another process at its end."""

from __future__ import annotations

import copy
import io
import multiprocessing

import torch
from net import Net, batch, report, train_with


def apply(model: torch.nn.Module, tokens: torch.Tensor, answer: multiprocessing.SimpleQueue) -> None:
    with torch.no_grad():
        answer.put(model(tokens).numpy())


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = train_with(optimizer, model, 6)
    model.eval()
    tokens = batch()
    with torch.no_grad():
        expected = model(tokens)
    file = io.BytesIO()
    torch.save((model, optimizer), file)
    file.seek(0)
    twins = {
        "saved": torch.load(file, weights_only=False)[0],
        "copied": copy.deepcopy(model),
        "averaged": torch.optim.swa_utils.AveragedModel(model),
        "traced": torch.jit.trace(model, tokens),
        "scripted": torch.jit.script(model),
    }
    with torch.no_grad():
        same = {name: torch.equal(twin(tokens), expected) for name, twin in twins.items()}
    context = multiprocessing.get_context("spawn")
    answer = context.SimpleQueue()
    process = context.Process(target=apply, args=(model, tokens, answer))
    process.start()
    same["spawned"] = bool((answer.get() == expected.numpy()).all())
    process.join()
    report(losses=losses, same=same, file=len(file.getvalue()))
