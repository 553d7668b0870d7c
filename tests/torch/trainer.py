"""One of several processes that train one model: `trainer.py URL SESSION SEED STEPS`."""

import sys

import torch

from gradpost.torch import RemoteOptimizer


def main(url: str, session: str, seed: str, steps: str) -> None:
    """Trains a line on data of its own and prints how far it came."""
    torch.manual_seed(int(seed))
    torch.set_num_threads(1)
    model = torch.nn.Linear(4, 1)
    inputs = torch.randn(64, 4)
    targets = inputs @ torch.tensor([[1.0], [2.0], [3.0], [4.0]]) + 5.0
    with RemoteOptimizer(model, url, session, rule="adam", lr=0.05) as optimizer:
        for _ in range(int(steps)):
            optimizer.zero_grad()
            loss = torch.nn.functional.mse_loss(model(inputs), targets)
            loss.backward()
            optimizer.step(loss=loss)
        print(optimizer.dropped, loss.item())


if __name__ == "__main__":
    main(*sys.argv[1:])
