"""A page's program in several processes of one group: as a script, one of these processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import torch

from gradpost.torch import RemoteOptimizer
from tests.integrations import pages, tiny
from tests.integrations.pages import ROOT

BATCHES, SIZE = 20, 16


def run(page, name, url, *kinds, ranks=2):
    """Runs the program in so many processes, once for each kind; returns their models, by kind."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    env = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(ROOT / "client" / "src"), str(ROOT))),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(ranks),
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, page, name, url, *kinds],
            env={**env, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(ranks)
    ]
    try:
        assert [process.wait(timeout=120) for process in processes] == [0] * ranks
    finally:
        for process in processes:
            process.kill()
    return [[loaded(f"{kind}-{rank}.pt") for rank in range(ranks)] for kind in kinds]


def loaded(path):
    model = tiny.network()
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def main(page, name, url, *kinds):
    """Of the whole batches this rank takes its share; its model begins with values of its own."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    code = pages.program(page, name, url)
    code = code.replace("Trainer(max", f"Trainer(devices={ranks}, strategy='ddp', max")  # Lightning
    share = slice(rank * SIZE // ranks, (rank + 1) * SIZE // ranks)
    for kind in kinds:
        net = tiny.network(seed=rank).eval()
        if page == "ddp":
            loader = [(x[share], y[share]) for x, y in tiny.loader(BATCHES, SIZE)]
        else:  # shares the batches out by itself
            loader = tiny.loader(ranks * 2 * BATCHES)
        optimizer = {"Local": pages.Local, "Remote": RemoteOptimizer}[kind]
        pages.run(code, optimizer, net=net, model=net, loader=loader)
        torch.save(net.state_dict(), Path(f"{kind}-{rank}.pt"))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
