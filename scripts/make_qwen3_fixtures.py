"""Makes the golden files of tests/parity_qwen3.rs: small random Qwen3 models and what transformers computes with them.

    pip install -r scripts/requirements-fixtures.txt
    python scripts/make_qwen3_fixtures.py tests/fixtures/qwen3
"""

import pathlib
import sys

import torch
from safetensors.torch import save_file
from transformers import Qwen3Config, Qwen3ForCausalLM

BASE = dict(
    vocab_size=61,
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    head_dim=8,
    initializer_range=0.3,
    max_position_embeddings=256,
)
CASES = {
    # every head its own key head, a head of its own
    "plain": {},
    # grouped queries, tied embeddings, heads wider than hidden / heads
    "grouped": dict(num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, rope_theta=1e6),
    # one key head, biases, in shards
    "biased": dict(num_key_value_heads=1, attention_bias=True, num_hidden_layers=2),
}


def left_padded(ids, mask):
    """The same rows with their padding in front."""
    rows, lengths = zip(*((row[keep.bool()], int(keep.sum())) for row, keep in zip(ids, mask)))
    width = ids.shape[1]
    ids = torch.stack([torch.cat([torch.zeros(width - n, dtype=row.dtype), row]) for row, n in zip(rows, lengths)])
    mask = torch.stack([torch.cat([torch.zeros(width - n), torch.ones(n)]) for n in lengths]).long()
    return ids, mask


def main(out):
    for seed, (name, changes) in enumerate(CASES.items()):
        torch.manual_seed(seed)
        model = Qwen3ForCausalLM(Qwen3Config(**BASE | changes)).eval()
        for parameter in model.parameters():  # norms of one and biases of zero would hide mistakes
            if parameter.dim() == 1:
                parameter.data += 0.2 * torch.randn_like(parameter)
        ids = torch.randint(1, BASE["vocab_size"], (3, 11))
        lengths = torch.tensor([11, 4, 7])
        mask = (torch.arange(11) < lengths[:, None]).long()
        ids = ids * mask
        output = model(input_ids=ids, attention_mask=mask, output_hidden_states=True, use_cache=False)
        weight = torch.randn_like(output.logits)
        (output.logits * weight).mean().backward()
        generated = model.generate(
            **dict(zip(("input_ids", "attention_mask"), left_padded(ids, mask))),
            max_new_tokens=64,
            min_new_tokens=64,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        golden = {
            "ids": ids.int(),
            "lengths": lengths.int(),
            "logits": output.logits,
            "weight": weight,
            "generated": generated[:, -64:].int(),
        }
        golden |= {f"hidden.{i}": state for i, state in enumerate(output.hidden_states)}
        golden |= {f"grad.{key}": parameter.grad for key, parameter in model.named_parameters()}
        folder = pathlib.Path(out) / name
        model.save_pretrained(folder, max_shard_size="20KB" if name == "biased" else "1GB")
        save_file({key: value.detach().contiguous() for key, value in golden.items()}, folder / "golden.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
