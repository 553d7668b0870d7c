"""What a training loop does around `step`: closures, hooks, clipping, parameters of every kind."""

import copy
import pickle

import numpy as np
import pytest
import torch
from torch.nn.utils import clip_grad_norm_

from gradpost import ClosedError
from gradpost.errors import Nonfinite
from gradpost.torch import RemoteOptimizer
from tests.torch import twins


def network(seed=0):
    torch.manual_seed(seed)
    layers = torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers)


def batch(seed=0):
    return torch.randn(16, 4, generator=torch.Generator().manual_seed(seed))


def test_it_is_one_of_torchs_optimizers(remote):
    optimizer = remote(network())
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert repr(optimizer).startswith("RemoteOptimizer (\nParameter Group 0\n    amsgrad: False")


def test_a_loop_with_accumulation_clipping_and_both_kinds_of_zero_grad(remote):
    theirs, ours = network(), network()
    pairs = [(theirs, torch.optim.AdamW(theirs.parameters(), lr=0.01))]
    pairs += [(ours, remote(ours.named_parameters(), "adamw", lr=0.01))]
    for step in range(12):
        norms = []
        for model, optimizer in pairs:
            for part in range(2):
                model(batch(2 * step + part)).square().mean().backward()
            norms.append(clip_grad_norm_(model.parameters(), 0.05))
            optimizer.step()
            optimizer.zero_grad(set_to_none=bool(step % 2))
        assert norms[0] == pytest.approx(norms[1].item(), rel=1e-4)
    twins.assert_close(ours.parameters(), theirs.parameters(), 1e-5)


@pytest.mark.parametrize(
    "given",
    [
        lambda model: model,
        lambda model: model.named_parameters(),
        lambda model: list(model.named_parameters()),
        lambda model: [{"params": model.named_parameters()}],
    ],
    ids=["module", "generator", "list", "group"],
)
def test_names_are_the_models_own(remote, given):
    model = network()
    optimizer = remote(given(model))
    names = [entry["name"] for entry in optimizer.session.info()["layout"]]
    assert names == [name for name, _ in model.named_parameters()]


def test_bare_parameters_are_named_by_their_place(remote):
    one, two, three = twins.params((1,), (2,), (3,))
    optimizer = remote([{"params": [one]}, {"params": iter([two, three])}])
    layout = optimizer.session.info()["layout"]
    assert [(e["name"], e["group"]) for e in layout] == [
        ("param.0", "default"),
        ("param.1", "group-1"),
        ("param.2", "group-1"),
    ]


def test_a_closure_gives_the_loss_which_is_reported(remote):
    theirs, ours = network(), network()
    pairs = [(theirs, torch.optim.SGD(theirs.parameters())), (ours, remote(ours, "sgd"))]
    for seed in range(3):
        losses = []
        for model, optimizer in pairs:

            def closure(model=model, optimizer=optimizer, seed=seed):
                optimizer.zero_grad()
                loss = model(batch(seed)).square().mean()
                loss.backward()
                return loss

            with torch.no_grad():
                losses.append(optimizer.step(closure))
        assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)
    session = pairs[1][1].session
    assert session.history()[-1]["loss"] == pytest.approx(losses[1].item())
    twins.assert_close(ours.parameters(), theirs.parameters())


def test_a_loss_can_be_reported_without_a_closure(remote):
    (param,) = twins.params((2,))
    optimizer = remote([param])
    for loss in (torch.tensor(1.5), float("nan")):  # the history takes no NaN
        twins.feed([param])
        optimizer.step(loss=loss)
    assert [row["loss"] for row in optimizer.session.history()] == [1.5, None]


def test_hooks_run_before_and_after(remote):
    theirs, ours = twins.twice()
    local, optimizer = torch.optim.Adam(theirs), remote(ours)
    seen = []

    def halve(one, args, kwargs):
        for group in one.param_groups:
            for param in group["params"]:
                param.grad *= 0.5

    for one in (local, optimizer):
        one.register_step_pre_hook(halve)
        one.register_step_post_hook(lambda one, args, kwargs: seen.append(one))
    twins.feed(theirs, ours)
    local.step()
    optimizer.step()
    assert seen == [local, optimizer]
    twins.assert_close(ours, theirs)


def test_parameters_without_a_gradient_stay_to_the_bit(remote):
    theirs, ours = twins.twice()
    start = [param.detach().clone() for param in ours]
    local, optimizer = torch.optim.Adam(theirs), remote(ours)
    for seed, absent in enumerate([{0, 2}, {0}, {0, 1, 3}, {0, 3}, {0}]):
        before = [param.detach().clone() for param in ours]
        twins.feed(theirs, ours, seed=seed, absent=absent)
        local.step()
        optimizer.step()
        for at in absent:
            assert torch.equal(ours[at], before[at])
        twins.assert_close(ours, theirs)
    assert torch.equal(ours[0], start[0])
    counts = optimizer.session.state().counts
    assert counts == {f"param.{at}": n for at, n in enumerate([0, 4, 4, 3, 5])}


def test_nothing_to_push_is_nothing_done(remote):
    params = twins.params()
    optimizer = remote(params)
    recorder = optimizer.session._calls._transport = twins.Recorder(
        optimizer.session._calls._transport
    )
    assert optimizer.step() is None
    assert optimizer.step(blocking=False).result() is None
    assert not recorder.calls
    assert optimizer.summary is None


def test_tied_parameters_have_one_name_and_stay_tied(remote):
    class Tied(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.encode = torch.nn.Embedding(6, 4)
            self.decode = torch.nn.Linear(4, 6)
            self.decode.weight = self.encode.weight

        def forward(self, x):
            return self.decode(self.encode(x))

    theirs, ours = Tied(), Tied()
    flat = ours.decode.weight.data.view(-1)  # a view of the same memory
    pairs = [(theirs, torch.optim.Adam(theirs.parameters(), lr=0.1)), (ours, remote(ours, lr=0.1))]
    for _ in range(5):
        for model, optimizer in pairs:
            model(torch.arange(6)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert ours.decode.weight is ours.encode.weight
    assert torch.equal(flat, ours.encode.weight.view(-1))
    twins.assert_close(ours.parameters(), theirs.parameters(), 1e-5)
    names = [entry["name"] for entry in pairs[1][1].session.info()["layout"]]
    assert names == ["encode.weight", "decode.bias"]
    with pytest.warns(UserWarning, match="duplicate parameters"):
        twice = remote(list(Tied().named_parameters(remove_duplicate=False)))
    assert [e["name"] for e in twice.session.info()["layout"]] == names


def test_buffers_are_not_synchronised(remote):
    model = torch.nn.BatchNorm1d(4)
    optimizer = remote(model)
    model(batch()).square().sum().backward()
    mean = model.running_mean.clone()
    optimizer.step()
    assert torch.equal(model.running_mean, mean)
    assert [e["name"] for e in optimizer.session.info()["layout"]] == ["weight", "bias"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [3, 40_000])  # copied by torch, and by NumPy
def test_backward_through_overwritten_parameters_is_noticed_as_in_torch(remote, size, dtype):
    weight = torch.nn.Parameter(torch.ones(size, dtype=dtype))
    optimizer = remote([weight], "sgd", lr=0.5)
    loss = weight.square().sum()
    weight.grad = torch.ones(size, dtype=dtype)
    optimizer.step()
    assert torch.equal(weight, torch.full((size,), 0.5, dtype=dtype))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("scale", [1, 40])
def test_strided_parameters_and_gradients(remote, scale):
    theirs, ours = twins.twice((6 * scale, 5 * scale), (2, 3, 4 * scale, 4 * scale))
    for pair in (theirs, ours):
        pair[0].data = pair[0].data.t()
        pair[1].data = pair[1].data.to(memory_format=torch.channels_last)
    local, optimizer = torch.optim.Adam(theirs), remote(ours)
    for seed in range(3):
        twins.feed(theirs, ours, seed=seed)
        ours[0].grad = ours[0].grad.t().contiguous().t()
        local.step()
        optimizer.step()
    assert ours[1].is_contiguous(memory_format=torch.channels_last)
    twins.assert_close(ours, theirs)


def test_edits_of_the_model_reach_the_server(remote):
    theirs, ours = network(), network()
    local = torch.optim.Adam(theirs.parameters(), lr=0.01)
    optimizer = remote(ours, lr=0.01)
    other = network(seed=9).state_dict()
    for step in range(6):
        for model, one in ((theirs, local), (ours, optimizer)):
            if step == 2:
                model.load_state_dict(other)
            if step == 4:
                with torch.no_grad():
                    model[0].weight.clamp_(-0.1, 0.1)
            model(batch(step)).square().mean().backward()
            one.step()
            one.zero_grad()
    twins.assert_close(ours.parameters(), theirs.parameters(), 1e-5)
    assert optimizer.session.info()["epoch"] == 3
    for param in ours.parameters():
        param.data.mul_(0.5)  # not counted by torch
    optimizer.upload()
    half = {name: param.detach().numpy().copy() for name, param in ours.named_parameters()}
    found = optimizer.session.pull()
    assert all(np.array_equal(found[name], value) for name, value in half.items())


def test_values_that_came_back_are_not_sent_again(remote):
    params = twins.params()
    optimizer = remote(params)
    twins.feed(params)
    optimizer.step()
    kept = [param.detach().clone() for param in params]
    with torch.no_grad():
        for param, value in zip(params, kept, strict=True):
            param.zero_()  # as an evaluation with averaged weights does
            param.copy_(value)
    optimizer.step()
    assert optimizer.session.info()["epoch"] == 1


def test_pull_takes_what_the_server_has(remote):
    ours, others = twins.twice()
    optimizer = remote(ours, id="pulled")
    second = remote(others, id="pulled")
    twins.feed(ours)
    optimizer.step()
    second.pull()
    twins.assert_same(others, ours)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_models_have_float32_masters(remote, dtype):
    params = twins.params(dtype=dtype)
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    local, optimizer = torch.optim.Adam(masters, lr=1e-4), remote(params, lr=1e-4)
    recorder = optimizer.session._calls._transport = twins.Recorder(
        optimizer.session._calls._transport
    )
    for seed in range(20):
        twins.feed(params, seed=seed)
        for master, param in zip(masters, params, strict=True):
            master.grad = param.grad.float()
        local.step()
        optimizer.step()
    for master, param in zip(masters, params, strict=True):
        torch.testing.assert_close(param, master.detach().to(dtype), rtol=1e-2, atol=1e-3)
    found = optimizer.session.pull()  # far closer than the model's dtype
    for at, master in enumerate(masters):
        value = master.detach().numpy()
        np.testing.assert_allclose(found[f"param.{at}"], value, rtol=0, atol=3e-6 * 4)
    for _, path, body in recorder.pushes():
        assert sum(map(len, body[1:])) == 2 * sum(param.numel() for param in params)
        assert f"dtype={'F16' if dtype == torch.float16 else 'BF16'}" in path


def test_mixed_dtypes_go_as_float32(remote):
    whole, half = twins.params((4, 3)), twins.params((5,), dtype=torch.bfloat16)
    params = [*whole, *half]
    masters = [torch.nn.Parameter(param.detach().float()) for param in params]
    local, optimizer = torch.optim.Adam(masters), remote(params)
    for seed in range(5):
        twins.feed(params, seed=seed)
        for master, param in zip(masters, params, strict=True):
            master.grad = param.grad.float()
        local.step()
        optimizer.step()
    assert [param.dtype for param in params] == [torch.float32, torch.bfloat16]
    twins.assert_close(whole, masters[:1])
    torch.testing.assert_close(half[0], masters[1].detach().bfloat16(), rtol=1e-2, atol=1e-3)


def test_float64_parameters_in_a_float32_session_if_asked(remote):
    params = twins.params((4,), dtype=torch.float64)
    optimizer = remote(params, dtype="F32")
    twins.feed(params)
    optimizer.step()
    assert optimizer.session.info()["dtype"] == "F32"
    assert params[0].dtype == torch.float64
    assert torch.equal(params[0], params[0].float().double())


@pytest.mark.parametrize(
    ("made", "match"),
    [
        (lambda: torch.nn.Linear(2, 2, device="meta"), "'weight' is on the meta device"),
        (lambda: [torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))], "complex64"),
        (lambda: [torch.ones(2, 2).to_sparse().requires_grad_()], "dense parameters"),
        (lambda: [torch.ones(2)], "No parameter requires a gradient"),
        (lambda: [], "empty parameter list"),
    ],
)
def test_parameters_that_no_session_holds(server, made, match):
    with pytest.raises(ValueError, match=match):
        RemoteOptimizer(made(), server, rule="adam")


def test_a_sparse_gradient_is_refused_by_name(remote):
    model = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = remote(model)
    model(torch.tensor([1, 1, 3])).sum().backward()
    with pytest.raises(RuntimeError, match="'weight' is sparse"):
        optimizer.step()
    model.weight.grad = model.weight.grad.to_dense()
    optimizer.step()


def test_a_gradient_that_is_not_finite_is_refused_or_skipped(remote):
    params = twins.params((3,))
    optimizer = remote(params)
    params[0].grad = torch.tensor([0.0, float("nan"), 0.0])
    with pytest.raises(Nonfinite, match=r"'param\.0' is not finite at flat index 1"):
        optimizer.step()
    skipping = remote(twins.params((3,)), on_nonfinite="skip")
    skipping.param_groups[0]["params"][0].grad = params[0].grad
    skipping.step()
    assert skipping.summary.skipped == "nonfinite"


# Memory


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_gradients_are_sent_from_where_they_lie(remote, server, dtype):
    recorder = twins.Recorder(server)
    params = twins.params((64, 32), (7,), (), dtype=dtype)
    optimizer = remote(params, transport=recorder)
    twins.feed(params)
    optimizer.step()
    (_, _, body) = recorder.pushes()[-1]
    for part, param in zip(body[1:], params, strict=True):
        bits = param.grad.view(-1).view(torch.uint8).numpy()
        assert np.shares_memory(np.frombuffer(part, np.uint8), bits)


def test_parameters_are_received_into_the_same_memory_and_written_in_place(remote):
    params = twins.params((64, 32), (7,))
    where = [param.data_ptr() for param in params]
    optimizer = remote(params)
    buffer = optimizer._link.mirror.buffer
    flat = buffer.flat
    for seed in range(3):
        twins.feed(params, seed=seed)
        optimizer.step()
        assert buffer.flat is flat
    assert [param.data_ptr() for param in params] == where
    assert not np.shares_memory(flat, params[0].detach().numpy())


# Its life


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, pickle.dumps])
def test_it_is_neither_copied_nor_pickled(remote, copied):
    with pytest.raises(TypeError, match="owns a connection"):
        copied(remote(twins.params()))


def test_closing(server):
    params = twins.params((3,))
    with RemoteOptimizer(params, server, rule="adam") as optimizer:
        twins.feed(params)
        optimizer.step()
        before = params[0].detach().clone()
        optimizer.step(blocking=False)
    assert not torch.equal(params[0], before)  # the last step was finished
    with pytest.raises(ClosedError):
        optimizer.step()
    with (
        pytest.raises(ZeroDivisionError),
        RemoteOptimizer(params, server, optimizer.session.id, rule="adam") as again,
    ):
        raise ZeroDivisionError
    with pytest.raises(ClosedError):
        again.step()


# Steps that do not block


def test_a_step_that_does_not_block_writes_in_synchronize_only(remote):
    theirs, ours = twins.twice()
    local, optimizer = torch.optim.Adam(theirs), remote(ours)
    for seed in range(5):
        before = [param.detach().clone() for param in ours]
        twins.feed(theirs, ours, seed=seed)
        local.step()
        pending = optimizer.step(blocking=False)
        for param in ours:  # what happens to the gradients now is of no matter
            param.grad.zero_()
        assert pending.result(60).step == seed + 1
        assert pending.done()
        twins.assert_same(ours, before)
        optimizer.synchronize()
        assert optimizer.summary.step == seed + 1
        twins.assert_close(ours, theirs)


def test_a_gradient_counts_as_computed_where_the_model_stood(remote):
    params = twins.params((3,))
    optimizer = remote(params)
    for seed in range(3):
        twins.feed(params, seed=seed)
        optimizer.step(blocking=False)
    optimizer.synchronize()
    rows = optimizer.session.history()
    assert [row["staleness"] for row in rows] == [0, 1, 1]


def test_the_failure_of_a_step_that_does_not_block_comes_with_the_next(remote):
    params = twins.params((3,))
    optimizer = remote(params)
    params[0].grad = torch.full((3,), float("inf"))
    pending = optimizer.step(blocking=False)
    with pytest.raises(Nonfinite):
        pending.result(60)
    twins.feed(params)
    with pytest.raises(Nonfinite):
        optimizer.step()
    optimizer.step()
    assert optimizer.summary.step == 1


def test_a_closure_sees_the_parameters_of_the_step_before(remote):
    params = twins.params((3,))
    optimizer = remote(params, "sgd", lr=1.0)
    params[0].grad = torch.ones(3)
    start = params[0].detach().clone()
    optimizer.step(blocking=False)

    def closure():
        torch.testing.assert_close(params[0].detach(), start - 1)
        return params[0].sum()

    assert optimizer.step(closure, blocking=False).loss.item() == params[0].sum().item()
