"""A classifier and its data."""

import torch


def network(seed=0, dropout=0.1):
    """Of 16 numbers into 5 classes; with dropout runs depend on the random generator too."""
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(16, 32),
        torch.nn.LayerNorm(32),
        torch.nn.Tanh(),
        torch.nn.Dropout(dropout),
        torch.nn.Linear(32, 5),
    )


def samples(count):
    """Inputs, and the classes that a line divides them into."""
    made = torch.Generator().manual_seed(1)
    inputs = torch.randn(count, 16, generator=made)
    return inputs, (inputs @ torch.randn(16, 5, generator=made)).argmax(1)


def loader(batches, size=8):
    """Batches, always in the same order."""
    data = torch.utils.data.TensorDataset(*samples(batches * size))
    return torch.utils.data.DataLoader(data, batch_size=size)
