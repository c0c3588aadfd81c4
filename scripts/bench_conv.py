"""Times PyTorch's conv2d on the shapes of benches/conv.rs: python scripts/bench_conv.py [threads]"""

import sys
import time

import torch

SHAPES = [
    (4, 64, 64, 64, 3, 1),
    (16, 12, 12, 128, 3, 1),
    (16, 24, 24, 64, 3, 1),
    (16, 64, 64, 16, 3, 1),
    (16, 16, 16, 128, 3, 2),
    (16, 24, 12, 128, 1, 1),
]


def main():
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else torch.get_num_threads())
    for batch, inner, out, side, kernel, stride in SHAPES:
        x = torch.randn(batch, inner, side, side, requires_grad=True)
        conv = torch.nn.Conv2d(inner, out, kernel, stride, kernel // 2)
        forward = backward = float("inf")
        for _ in range(10):
            start = time.perf_counter()
            y = conv(x)
            middle = time.perf_counter()
            y.backward(torch.ones_like(y))
            forward, backward = min(forward, middle - start), min(backward, time.perf_counter() - middle)
            x.grad = conv.weight.grad = conv.bias.grad = None
        work = 2e-9 * batch * inner * out * (side // stride) ** 2 * kernel**2
        print(
            f"{batch}x{inner}->{out}, {side}x{side}, kernel {kernel}, stride {stride}: "
            f"forward {forward * 1e3:.2f} ms ({work / forward:.0f} GF/s), "
            f"backward {backward * 1e3:.2f} ms ({2 * work / backward:.0f} GF/s)"
        )


if __name__ == "__main__":
    main()
