"""Evaluation first, then training on batches that two forked DataLoader workers make; says what it sees of Python."""

from __future__ import annotations

import sys

import torch
from net import Net, batch, loss_of, report, train
from torch.utils.data import DataLoader, Dataset

STEPS = 12


class Seen(Dataset):
    """Each item says what of ours its worker has loaded."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return sum(name.startswith("entropy") for name in sys.modules)


if __name__ == "__main__":
    torch.manual_seed(0)
    model = Net()
    with torch.no_grad():
        loss_of(model, batch())
    loaded = [int(count) for counts in DataLoader(Seen(), num_workers=2) for count in counts]
    losses = train(model, STEPS)
    chained = getattr(sys.modules.get("sitecustomize"), "MARK", None)
    path = [entry for entry in sys.path if "launch/site" in entry]
    report(losses=losses, loaded=loaded, chained=chained, path=path, arguments=sys.argv[1:])
