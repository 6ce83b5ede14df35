"""A training script that knows nothing of entropy-monitor: trains until a file appears, then says what came of it."""

import hashlib
import json
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

torch.set_num_threads(1)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(width), nn.Dropout(0.1)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.dropout(self.down(F.gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    def __init__(self, width=32, depth=4):
        super().__init__()
        self.embed, self.head = nn.Embedding(256, width), nn.Linear(width, 256)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))

    def forward(self, tokens):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def dictionaries(model, optimizer):
    """Everything of modules and optimizer that hooks could be left in."""
    places = [*model.modules(), optimizer]
    found = [{key: str(value) for key, value in vars(place).items() if "hook" in key} for place in places]
    return [found, str(torch.autograd.backward)]


def main(report, stop, steps):
    torch.manual_seed(0)
    model = Net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    untouched = dictionaries(model, optimizer)
    losses, longest, last = [], 0.0, None
    print("training", flush=True)
    while len(losses) < steps if steps else not stop.exists():
        tokens = torch.randint(0, 256, (4, 64), generator=generator)
        loss = F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        now = time.perf_counter()
        longest, last = max(longest, now - last if last else 0.0), now
    parameters = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    found = {
        "steps": len(losses),
        "losses": hashlib.sha256(json.dumps(losses).encode()).hexdigest(),
        "parameters": hashlib.sha256(parameters.numpy().tobytes()).hexdigest(),
        "random": hashlib.sha256(torch.get_rng_state().numpy().tobytes()).hexdigest(),
        "untouched": dictionaries(model, optimizer) == untouched,
        "main": sorted(name for name in vars(sys.modules["__main__"]) if not name.startswith("__")),
        "longest_step_s": longest,
    }
    report.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 0)
