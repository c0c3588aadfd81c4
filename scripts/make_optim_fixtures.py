"""Makes tests/fixtures/optim.json: torch.optim.AdamW and torch.optim.Muon on small tensors, several steps.

    python scripts/make_optim_fixtures.py        (torch 2.15)

torch's Muon iterates in bfloat16; here in float32, as rlrig does, so that both can be compared to rounding.
"""

import json
import pathlib

import torch
from torch.optim import _muon


class Float32Torch:
    """The torch module, but its bfloat16 is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


_muon.torch = Float32Torch()

STEPS = 6


def run(make, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(shape, generator=generator)
    gradients = torch.randn((STEPS, *shape), generator=generator) * torch.logspace(-2, 1, STEPS).reshape(-1, 1, 1)
    param = torch.nn.Parameter(start.clone())
    optimizer = make([param])
    weights = []
    for gradient in gradients:
        param.grad = gradient.clone()
        optimizer.step()
        weights.append(param.detach().flatten().tolist())
    return {
        "shape": list(shape),
        "start": start.flatten().tolist(),
        "gradients": gradients.flatten(1).tolist(),
        "weights": weights,
    }


def adamw(params):
    return torch.optim.AdamW(params, lr=3e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)


def muon(params):
    return torch.optim.Muon(params, lr=3e-2, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


fixture = {
    "adamw": run(adamw, (3, 4), 0),
    "muon_wide": run(muon, (3, 7), 1),
    "muon_tall": run(muon, (8, 2), 2),
}
path = pathlib.Path(__file__).parent.parent / "tests" / "fixtures" / "optim.json"
with open(path, "w") as file:
    json.dump(fixture, file)
    file.write("\n")
