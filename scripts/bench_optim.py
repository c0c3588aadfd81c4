"""PyTorch's optimisers on the shapes of benches/optim.rs: prints the least time of a few steps.

    cargo bench --bench optim; python scripts/bench_optim.py
"""

import time

import torch

shapes = []
for _ in range(2):
    shapes += [(256, 256)] * 8 + [(1536, 256), (256, 768)] * 2
for _ in range(4):
    shapes += [(2304, 256), (256, 1024)]
shapes += [(1536, 256), (1536, 256), (768, 256)]
for _ in range(4):
    shapes += [(128, 128)] * 4 + [(384, 128)] * 2 + [(128, 384)]

params = [torch.nn.Parameter(torch.randn(shape)) for shape in shapes]
for param in params:
    param.grad = torch.randn_like(param)
average = [param.detach().clone() for param in params]


def least(name, f):
    times = []
    for _ in range(10):
        start = time.perf_counter()
        f()
        times.append(time.perf_counter() - start)
    print(f"{name}: {min(times) * 1e3:.1f} ms")


def step(optimizer):
    torch.nn.utils.clip_grad_norm_(params, 1.0)
    optimizer.step()


print(f"{len(params)} matrices, {sum(p.numel() for p in params) / 1e6:.2f} M parameters, {torch.get_num_threads()} threads")
adamw = torch.optim.AdamW(params, lr=1e-9, betas=(0.9, 0.95), weight_decay=0.01)
least("AdamW with clipping", lambda: step(adamw))
fused = torch.optim.AdamW(params, lr=1e-9, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
least("fused AdamW with clipping", lambda: step(fused))
muon = torch.optim.Muon(params, lr=1e-9, adjust_lr_fn="match_rms_adamw")
least("Muon (bfloat16) with clipping", lambda: step(muon))


class Float32Torch:
    """The torch module, but its bfloat16 is float32."""

    bfloat16 = torch.float32

    def __getattr__(self, name):
        return getattr(torch, name)


torch.optim._muon.torch = Float32Torch()
least("Muon (float32) with clipping", lambda: step(muon))
least("moving average", lambda: torch._foreach_lerp_(average, [p.detach() for p in params], 1e-3))
