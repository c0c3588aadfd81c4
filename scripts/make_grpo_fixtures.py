"""Makes tests/fixtures/grpo.json: GRPO's losses, their gradients, and whole training steps of a PEFT adapter as PyTorch
computes them, for src/train/grpo.rs.

    pip install -r scripts/requirements-fixtures.txt
    python scripts/make_grpo_fixtures.py tests/fixtures/grpo.json
"""

import json
import pathlib
import sys

import torch
from peft import LoraConfig, get_peft_model

ADVANTAGES = torch.tensor([1.2, -0.7, 0.3, -1.5])
TOKEN_LOSSES = [
    ("grpo", 0.2, 0.2, 0.04),
    ("bnpo", 0.2, 0.2, 0.0),
    ("dr_grpo", 0.2, 0.2, 0.0),
    ("dapo", 0.2, 0.28, 0.1),
    ("cispo", 0.2, 0.25, 0.0),
    ("gspo", 0.05, 0.06, 0.0),
]


def advantages():
    rewards = torch.tensor([[0.25, 0.5, 1.0, 0.75], [0.5, 0.5, 0.5, 0.5], [0.0, 0.1, 0.0, 1.0]], dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    return {
        "rewards": rewards.flatten().tolist(),
        "group": (centred / (rewards.std(1, keepdim=True) + 1e-4)).flatten().tolist(),
        "batch": (centred / (rewards.std() + 1e-4)).flatten().tolist(),
        "none": centred.flatten().tolist(),
        "reward_std": rewards.std(1).mean().item(),
    }


def token_loss(kind, low, high, beta, log_probs, old, reference, mask, max_length=9, active=30.0):
    a = ADVANTAGES[:, None]
    log_ratio = log_probs - old
    lengths = mask.sum(1, keepdim=True)
    if kind == "gspo":
        log_ratio = ((log_ratio * mask).sum(1, keepdim=True) / lengths).expand_as(mask)
    ratio = log_ratio.exp()
    if kind == "cispo":
        cost = -ratio.detach().clamp(max=1 + high) * a * log_probs
    else:
        cost = torch.maximum(-a * ratio, -a * ratio.clamp(1 - low, 1 + high))
    difference = reference - log_probs
    kl = difference.exp() - difference - 1
    cost = (cost + beta * kl) * mask
    if kind in ("grpo", "gspo"):
        loss = (cost.sum(1, keepdim=True) / lengths).mean()
    elif kind == "bnpo":
        loss = cost.sum() / mask.sum()
    elif kind == "dr_grpo":
        loss = cost.sum() / (len(a) * max_length)
    else:
        loss = cost.sum() / active
    return loss, (kl * mask).sum() / mask.sum()


def case(loss, leaf):
    leaf.grad = None
    loss.backward()
    return {"loss": loss.item(), "grad": leaf.grad.flatten().tolist()}


def tokens():
    shape = (4, 6)
    old = -torch.rand(shape) * 3
    log_probs = (old + 0.3 * torch.randn(shape)).requires_grad_()
    reference = log_probs.detach() + 0.4 * torch.randn(shape)
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]).float()
    cases = {}
    for kind, low, high, beta in TOKEN_LOSSES:
        loss, kl = token_loss(kind, low, high, beta, log_probs, old, reference, mask)
        cases[kind] = {"eps": [low, high], "beta": beta, "kl": kl.item()} | case(loss, log_probs)
    named = dict(log_probs=log_probs.detach(), old=old, reference=reference, mask=mask)
    return {name: tensor.flatten().tolist() for name, tensor in named.items()} | {"cases": cases}


class Policy(torch.nn.Module):
    def __init__(self, inner, out):
        super().__init__()
        self.lin = torch.nn.Linear(inner, out, bias=False)

    def forward(self, x):
        return self.lin(x)


def adapted(inner, out):
    """A linear layer with an adapter that already does something."""
    model = get_peft_model(Policy(inner, out), LoraConfig(r=2, lora_alpha=4, target_modules=["lin"]))
    for name, param in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(param, std=0.4)
    return model


def factors(model, of):
    named = {name: param for name, param in model.named_parameters() if "lora_" in name}
    return {key: of(next(p for name, p in named.items() if key in name)) for key in ("lora_A", "lora_B")}


def updates(model, loss, count=3):
    """Some training steps on one batch of rollouts; the model is left as it was."""
    start = {name: value.clone() for name, value in model.state_dict().items()}
    trained = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
    case = factors(model, lambda p: p.tolist()) | {"weight": model.base_model.model.lin.weight.tolist(), "updates": []}
    for _ in range(count):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        gradients = factors(model, lambda p: p.grad.flatten().tolist())
        torch.nn.utils.clip_grad_norm_(trained, 0.05)
        optimizer.step()
        weights = factors(model, lambda p: p.flatten().tolist())
        case["updates"].append({"loss": value.item(), "gradients": gradients, "weights": weights})
    model.load_state_dict(start)
    return case


def token_steps():
    model, x, ids = adapted(5, 7), torch.randn(4, 6, 5), torch.randint(0, 7, (4, 6))
    mask = (torch.arange(6) < torch.tensor([6, 3, 5, 1])[:, None]).float()

    def log_probs():
        return model(x).log_softmax(-1).gather(-1, ids[..., None])[..., 0]

    with torch.no_grad():
        old = log_probs()
        reference = old + 0.4 * torch.randn(4, 6)
    cases = {}
    for kind, low, high, beta in TOKEN_LOSSES:
        # A narrow clip, so that the later updates meet it.
        low, high = low / 10, high / 10
        case = updates(model, lambda: token_loss(kind, low, high, beta, log_probs(), old, reference, mask)[0])
        cases[kind] = {"eps": [low, high], "beta": beta} | case
    named = dict(x=x, ids=ids, old=old, reference=reference, mask=mask)
    return {name: tensor.flatten().tolist() for name, tensor in named.items()} | {"cases": cases}


def flow_steps():
    model, x, x0 = adapted(5, 5), torch.randn(4, 3, 5), torch.randn(4, 3, 5)
    sigma, length, eps, beta = 0.7, 0.1, 1e-3, 0.8
    level = 0.9 * (sigma / (1 - sigma)) ** 0.5
    std, pull = level * length**0.5, level**2 * length / (2 * sigma)
    t = torch.tensor([0.9, 0.6, 0.3, 0.1])

    def mean(v):
        return x - length * v - pull * (x + (1 - sigma) * v)

    with torch.no_grad():
        old_v = model(x)
        old_means = mean(old_v)
        following = old_means + std * torch.randn(4, 3, 5)

    def log_prob(means):
        return torch.distributions.Normal(means, std).log_prob(following).mean((1, 2))

    def clipped(ratio):
        return torch.maximum(-ADVANTAGES * ratio, -ADVANTAGES * ratio.clamp(1 - eps, 1 + eps)).mean()

    def guard():
        means = mean(model(x))
        shift = ((means - old_means) ** 2).mean((1, 2)) / (2 * std**2)
        return clipped(((log_prob(means) - log_prob(old_means) + shift) * std).exp()) / length

    def nft():
        v, r = model(x), (ADVANTAGES / 5).clamp(-1, 1) / 2 + 0.5

        def fit(v):
            error = x - t[:, None, None] * v - x0
            return (error**2).mean((1, 2)) / error.detach().abs().mean((1, 2)).clamp(min=1e-5)

        return ((r * fit(beta * v + (1 - beta) * old_v) + (1 - r) * fit((1 + beta) * old_v - beta * v)) / beta).mean()

    cases = {
        "grpo": updates(model, lambda: clipped((log_prob(mean(model(x))) - log_prob(old_means)).exp())),
        "guard": updates(model, guard),
        "nft": updates(model, nft),
    }
    named = dict(x=x, x0=x0, next=following, old_means=old_means, old_v=old_v, t=t)
    named = {name: tensor.flatten().tolist() for name, tensor in named.items()}
    return named | {"eps": eps, "nft_beta": beta, "cases": cases}


def flow():
    shape, std, length, eps = (4, 3, 2), 0.3, 0.1, 0.002
    x_next, old_means = torch.randn(shape), torch.randn(shape)
    means = (old_means + 0.05 * torch.randn(shape)).requires_grad_()

    def log_prob(mean):
        return torch.distributions.Normal(mean, std).log_prob(x_next).mean((1, 2))

    def clipped(ratio):
        return torch.maximum(-ADVANTAGES * ratio, -ADVANTAGES * ratio.clamp(1 - eps, 1 + eps)).mean()

    log_ratio = log_prob(means) - log_prob(old_means)
    shift = ((means - old_means) ** 2).mean((1, 2)) / (2 * std**2)
    cases = {
        "grpo": case(clipped(log_ratio.exp()), means),
        "guard": case(clipped(((log_prob(means) - log_prob(old_means) + shift) * std).exp()) / length, means),
        "kl": case(0.7 * ((means - old_means) ** 2).mean(), means),
    }
    beta, t = 0.8, torch.tensor([0.9, 0.6, 0.3, 0.1])
    v, old, x0 = torch.randn(shape).requires_grad_(), torch.randn(shape), torch.randn(shape)
    x_t = torch.randn(shape)
    r = (ADVANTAGES / 5).clamp(-1, 1) / 2 + 0.5

    def fit(v):
        error = x_t - t[:, None, None] * v - x0
        return (error**2).mean((1, 2)) / error.detach().abs().mean((1, 2)).clamp(min=1e-5)

    loss = (r * fit(beta * v + (1 - beta) * old) + (1 - r) * fit((1 + beta) * old - beta * v)) / beta
    cases["nft"] = case(loss.mean(), v)
    named = dict(next=x_next, old_means=old_means, means=means.detach(), v=v.detach(), old=old, x0=x0, x_t=x_t, t=t)
    named = {name: tensor.flatten().tolist() for name, tensor in named.items()}
    return named | {"std": std, "length": length, "eps": eps, "nft_beta": beta, "cases": cases}


def main(out):
    torch.manual_seed(0)
    fixture = {"sample_advantages": ADVANTAGES.tolist(), "advantages": advantages(), "tokens": tokens(), "flow": flow()}
    fixture |= {"token_steps": token_steps(), "flow_steps": flow_steps()}
    pathlib.Path(out).write_text(json.dumps(fixture, indent=None) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
