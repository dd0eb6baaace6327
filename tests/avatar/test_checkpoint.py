import os

import pytest
import torch

from avatar.checkpoint import (
    KEPT,
    Checkpoint,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    pack_optimizer,
    save_checkpoint,
    unpack_optimizer,
)
from avatar.errors import AvatarError


def checkpoint(step):
    tensors = {"a": torch.full((3,), float(step)), "b": torch.arange(4) > 1, "c": torch.rand(2, 2).double()}
    return Checkpoint("fit", step, tensors, {"radius": 0.1 + 0.2, "list": [1, None], "name": "x"})


def test_round_trip_is_exact(tmp_path):
    written = checkpoint(7)
    read = load_checkpoint(save_checkpoint(tmp_path, written))
    assert (read.stage, read.step, read.values) == ("fit", 7, written.values)
    assert read.tensors.keys() == written.tensors.keys()
    for name, tensor in written.tensors.items():
        assert torch.equal(read.tensors[name], tensor)
        assert read.tensors[name].dtype == tensor.dtype


def test_keeps_the_last_few_and_finds_the_newest(tmp_path):
    assert latest_checkpoint(tmp_path, "fit") is None
    for step in (1, 2, 10, 20, 100):
        save_checkpoint(tmp_path, checkpoint(step))
    assert len(list_checkpoints(tmp_path, "fit")) == KEPT
    assert latest_checkpoint(tmp_path, "fit").step == 100
    assert latest_checkpoint(tmp_path, "other") is None


def test_a_write_that_fails_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def broken(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(tmp_path, checkpoint(2))
    monkeypatch.undo()
    assert latest_checkpoint(tmp_path, "fit").step == 1


def test_a_half_written_file_is_not_taken_for_a_checkpoint(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / ".fit-0000002.safetensors.part").write_bytes(path.read_bytes()[:100])
    assert latest_checkpoint(tmp_path, "fit").step == 1


def test_rejects_a_damaged_file(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1))
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(AvatarError, match="not a readable checkpoint"):
        latest_checkpoint(tmp_path, "fit")


@pytest.mark.parametrize("sparse", [False, True])
def test_optimizer_state_round_trip(sparse):
    def build():
        table = torch.nn.Embedding(4, 2, sparse=sparse)
        torch.nn.init.ones_(table.weight)
        kind = torch.optim.SparseAdam if sparse else torch.optim.Adam
        return table, kind(list(table.parameters()), lr=0.1)

    def step(table, optimizer):
        optimizer.zero_grad()
        (table(torch.tensor([1, 3])) ** 2).sum().backward()
        optimizer.step()

    table, optimizer = build()
    step(table, optimizer)
    copy, copied = build()
    copy.load_state_dict(table.state_dict())
    unpack_optimizer("o", copied, *pack_optimizer("o", optimizer))
    for _ in range(2):
        step(table, optimizer)
        step(copy, copied)
    assert torch.equal(table.weight, copy.weight)
