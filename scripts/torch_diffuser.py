"""What the benches do with the shipped Diffuser in PyTorch, on any device: drawing, and a training step."""

import copy
import json
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
WEIGHTS = ROOT / "weights" / "tabletop"
PROMPT = "a small red ball to the left of a large blue cube"
STEPS, GUIDANCE = 20, 3.0


def drawing(pipeline, count):
    """A function that draws `count` pictures at once."""
    embedding = json.loads((WEIGHTS / "text_encoder" / "config.json").read_text())["prompt_embedding"]
    pipeline.set_progress_bar_config(disable=True)
    return lambda: pipeline(
        prompt=[PROMPT] * count,
        height=128,
        width=128,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=embedding["max_length"],
        text_encoder_out_layers=tuple(embedding["layers"]),
    )


def training(pipeline, dtype, batch, length, **adamw):
    """A function that makes a training step of a copy of the Diffuser, as rlrig takes it: latents of `batch` pictures, text
    encoder over `length` tokens, transformer, Muon and AdamW. Below f32 by autocast."""
    device = pipeline.transformer.device
    transformer, text = copy.deepcopy(pipeline.transformer).train(), copy.deepcopy(pipeline.text_encoder).train()
    for module in (transformer, text):
        module.requires_grad_(True)
    named = [*transformer.named_parameters(), *text.named_parameters()]
    hidden = {n for n, p in named if p.ndim == 2 and not any(o in n for o in ("embed", "lm_head", "proj_out"))}
    optimizers = [
        torch.optim.Muon([p for n, p in named if n in hidden], lr=1e-4),
        torch.optim.AdamW([p for n, p in named if n not in hidden], lr=1e-4, **adamw),
    ]
    layers = text.config.num_hidden_layers
    ids = torch.randint(0, text.config.vocab_size, (batch, length), device=device)
    image = torch.rand(batch, 3, 128, 128, device=device)
    positions = torch.tensor([[0, y, x, 0] for y in range(8) for x in range(8)], device=device).expand(batch, -1, -1)
    words = torch.tensor([[0, 0, 0, i] for i in range(length)], device=device).expand(batch, -1, -1)

    def step():
        with torch.no_grad():
            latents = pipeline.vae.encode(image).latent_dist.mode()
            latents = torch.nn.functional.pixel_unshuffle(latents, 2).flatten(2).transpose(1, 2)
        noise, t = torch.randn_like(latents), torch.rand(batch, device=device)
        x = torch.lerp(latents, noise, t[:, None, None])
        with torch.autocast(device.type, dtype=dtype, enabled=dtype != torch.float32):
            states = text.model(ids, output_hidden_states=True).hidden_states
            states = torch.cat([states[i] for i in range(1, layers + 1)], -1)
            given = {"encoder_hidden_states": states, "img_ids": positions, "txt_ids": words, "guidance": None}
            velocity = transformer(hidden_states=x, timestep=t, **given).sample
        ((velocity.float() - (noise - latents)) ** 2).mean().backward()
        torch.nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    return step
