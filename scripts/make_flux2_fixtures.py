"""Reference outputs and gradients of Flux2Transformer2DModel, for tests/parity_flux2.rs.

Run with torch 2.15, diffusers 0.42.1: python scripts/make_flux2_fixtures.py
"""

from pathlib import Path

import torch
from diffusers import Flux2Transformer2DModel
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "tests" / "fixtures" / "flux2"
CONFIGS = {
    "plain": dict(num_layers=2, num_single_layers=2, guidance_embeds=False),
    "guided": dict(num_layers=1, num_single_layers=1, guidance_embeds=True, out_channels=6, mlp_ratio=2.5),
}


def main():
    for name, extra in CONFIGS.items():
        torch.manual_seed(0)
        model = Flux2Transformer2DModel(
            in_channels=8,
            attention_head_dim=16,
            num_attention_heads=2,
            joint_attention_dim=24,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            rope_theta=2000,
            **extra,
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            if parameter.ndim == 1:
                parameter.data += 1
        model.save_pretrained(OUT / name)

        h, w, length = 3, 2, 5
        image = torch.randn(2, 2 * h * w, 8)  # the picture and one reference
        text = torch.randn(2, length, 24)
        sigma = torch.tensor([0.3, 0.9])
        guidance = torch.tensor([4.0, 1.5]) if extra["guidance_embeds"] else None
        grid = lambda t: torch.cartesian_prod(torch.tensor([t]), torch.arange(h), torch.arange(w), torch.arange(1))
        image_ids = torch.cat([grid(0), grid(10)])
        text_ids = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(length))

        image.requires_grad_()
        text.requires_grad_()
        out = model(
            hidden_states=image,
            encoder_hidden_states=text,
            timestep=sigma,
            img_ids=image_ids,
            txt_ids=text_ids,
            guidance=guidance,
            return_dict=False,
        )[0]
        direction = torch.randn_like(out)
        (out * direction).sum().backward()
        golden = dict(image=image, text=text, sigma=sigma, out=out, direction=direction)
        if guidance is not None:
            golden["guidance"] = guidance
        golden |= {"grad.image": image.grad, "grad.text": text.grad}
        golden |= {f"grad.{n}": p.grad for n, p in model.named_parameters()}
        save_file({k: v.detach().contiguous() for k, v in golden.items()}, OUT / name / "golden.safetensors")


if __name__ == "__main__":
    main()
