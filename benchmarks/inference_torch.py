"""Times a dense MLP in PyTorch whenever it is asked; needs PyTorch and NumPy, and nothing of ours.

python benchmarks/inference_torch.py NETWORK.npz     as `inference.py` starts it, in .venv-torch

The file holds `x` and, for each layer, `kernel_0` (in, out), `bias_0`, .... The first line that it
prints is JSON: PyTorch's version, and the outputs. Then each line that it reads is a number of
calls, and it answers with the seconds of each, as JSON.
"""

import json
import os
import sys
import time

import numpy as np
import torch


def main() -> None:
    """Answers until its input ends."""
    torch.set_num_threads(os.cpu_count() or 1)
    with np.load(sys.argv[1]) as file:
        arrays = dict(file)
    parts: list[torch.nn.Module] = []
    for i in range(sum(name.startswith("kernel_") for name in arrays)):
        kernel = arrays[f"kernel_{i}"]
        linear = torch.nn.Linear(*kernel.shape)
        linear.weight.data = torch.from_numpy(np.ascontiguousarray(kernel.T))
        linear.bias.data = torch.from_numpy(arrays[f"bias_{i}"])
        parts += [torch.nn.ReLU(), linear] if i else [linear]
    network, batch = torch.nn.Sequential(*parts).eval(), torch.from_numpy(arrays["x"])
    with torch.inference_mode():
        print(json.dumps([torch.__version__, network(batch).numpy().tolist()]), flush=True)
        for line in sys.stdin:
            seconds = []
            for _ in range(int(line)):
                began = time.perf_counter()
                network(batch)
                seconds.append(time.perf_counter() - began)
            print(json.dumps(seconds), flush=True)


if __name__ == "__main__":
    main()
