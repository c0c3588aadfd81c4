"""Reference outputs and gradients of AutoencoderKLFlux2, for tests/parity_autoencoder.rs.

Run with torch 2.15, diffusers 0.42.1: python scripts/make_vae_fixtures.py
"""

from pathlib import Path

import torch
from diffusers import AutoencoderKLFlux2, Flux2KleinPipeline
from safetensors.torch import save_file

OUT = Path(__file__).parent.parent / "tests" / "fixtures" / "vae"
CONFIGS = {
    "plain": dict(block_out_channels=(8, 16), norm_num_groups=4),
    "bare": dict(
        block_out_channels=(4, 4, 8),
        decoder_block_out_channels=(4, 8, 8),
        norm_num_groups=2,
        layers_per_block=2,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
}


def main():
    for name, extra in CONFIGS.items():
        torch.manual_seed(0)
        levels = len(extra["block_out_channels"])
        model = AutoencoderKLFlux2(
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            latent_channels=3,
            sample_size=24,
            **({"layers_per_block": 1} | extra),
        )
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
            if parameter.ndim == 1:
                parameter.data += 0.5
        model.bn.running_mean.normal_()
        model.bn.running_var.uniform_(0.5, 2)
        model.eval()
        model.save_pretrained(OUT / name)

        x = (torch.rand(2, 3, 16, 24) * 2 - 1).requires_grad_()
        posterior = model.encode(x).latent_dist
        mean, logvar = posterior.mean, posterior.logvar
        z = torch.randn_like(mean).requires_grad_()
        y = model.decode(z).sample

        # As Flux2KleinPipeline encodes a picture and decodes what the transformer gives.
        bn_mean = model.bn.running_mean.view(1, -1, 1, 1)
        bn_std = torch.sqrt(model.bn.running_var.view(1, -1, 1, 1) + model.config.batch_norm_eps)
        latents = (Flux2KleinPipeline._patchify_latents(mean) - bn_mean) / bn_std
        tokens = torch.randn_like(latents)
        pixels = model.decode(Flux2KleinPipeline._unpatchify_latents(tokens * bn_std + bn_mean)).sample

        directions = {k: torch.randn_like(v) for k, v in dict(mean=mean, logvar=logvar, y=y).items()}
        sum((d * dict(mean=mean, logvar=logvar, y=y)[k]).sum() for k, d in directions.items()).backward()
        golden = dict(x=x, z=z, mean=mean, logvar=logvar, y=y, latents=latents, tokens=tokens, pixels=pixels)
        golden |= {f"direction.{k}": d for k, d in directions.items()}
        golden |= {"grad.x": x.grad, "grad.z": z.grad}
        golden |= {f"grad.{n}": p.grad for n, p in model.named_parameters()}
        save_file({k: v.detach().contiguous() for k, v in golden.items()}, OUT / name / "golden.safetensors")

    # The shipped weights, stored in half precision and computed with in single precision.
    torch.manual_seed(1)
    model = AutoencoderKLFlux2.from_pretrained(OUT.parents[2] / "weights" / "tabletop" / "vae", torch_dtype=torch.float32)
    z = torch.randn(1, model.config.latent_channels, 4, 6)
    with torch.no_grad():
        save_file(dict(z=z, y=model.decode(z).sample), OUT / "shipped.safetensors")


if __name__ == "__main__":
    main()
