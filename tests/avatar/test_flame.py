"""FLAME's model file, in files of its layout that the tests write; the licensed one is not needed."""

import copyreg
import pickle
import struct
import sys
import types

import numpy as np
import pytest
import torch
from conftest import TINY
from scipy.sparse import csc_matrix
from scipy.spatial.transform import Rotation

from avatar import cli
from avatar.errors import AvatarError
from avatar.head import HeadModel, load_head
from avatar.head.flame import read_flame
from avatar.head.model import ASSET
from avatar.run import Run, read_config

VERTICES = 60
PARENTS = (-1, 0, 1, 1, 1)
CHUMPY = ("v_template", "shapedirs")


def flame_arrays(seed=0, identity=300, expressions=100):
    """Random arrays under the names and of the sizes of FLAME 2020, on fewer vertices."""
    random = np.random.default_rng(seed)
    directions = random.normal(size=(VERTICES, 3))
    weights = random.random((VERTICES, 5)) ** 4
    regressor = random.random((5, VERTICES)) * (random.random((5, VERTICES)) < 0.2) + 1e-3 * np.eye(
        5, VERTICES
    )
    return {
        "v_template": 0.1 * directions / np.linalg.norm(directions, axis=1, keepdims=True),
        "shapedirs": random.normal(size=(VERTICES, 3, identity + expressions)) * 0.002,
        "posedirs": random.normal(size=(VERTICES, 3, 36)) * 0.005,
        "J_regressor": regressor / regressor.sum(1, keepdims=True),
        "weights": weights / weights.sum(1, keepdims=True),
        "f": random.integers(0, VERTICES, (90, 3)).astype(np.uint32),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], range(5)]).astype(np.uint32),
        "J": random.normal(size=(5, 3)),
    }


def write_python3(path, arrays, monkeypatch, protocol=2):
    """Write as Python 3 would, with chumpy and scipy at hand; chumpy is gone afterwards."""
    package, module = types.ModuleType("chumpy"), types.ModuleType("chumpy.ch")
    module.Ch = type("Ch", (), {"__module__": "chumpy.ch"})
    content = {**arrays, "J_regressor": csc_matrix(arrays["J_regressor"]), "bs_type": "lrotmin"}
    for name in CHUMPY:
        content[name] = module.Ch()
        vars(content[name]).update(x=arrays[name], _dirty_vars={"x"}, _depends_on_deps={}, _itr=None)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "chumpy", package)
        patch.setitem(sys.modules, "chumpy.ch", module)
        path.write_bytes(pickle.dumps(content, protocol=protocol))
    assert "chumpy" not in sys.modules
    return path


class Python2Pickler:
    """Writes the opcodes of Python 2's pickle module, where text is bytes and modules have their old names."""

    def __init__(self, protocol):
        self.protocol = protocol

    def dumps(self, value):
        return (b"\x80\x02" if self.protocol == 2 else b"") + self.save(value) + b"."

    def save(self, value):
        if value is None:
            return b"N"
        if isinstance(value, int | bool):
            return b"I%d\n" % value
        if isinstance(value, str):
            value = value.encode("latin1")
        if isinstance(value, bytes):
            written = b"S" + repr(value)[1:].encode() + b"\n"
            return written if self.protocol == 0 else b"T" + struct.pack("<i", len(value)) + value
        if isinstance(value, tuple | list):
            return b"(" + b"".join(map(self.save, value)) + (b"t" if isinstance(value, tuple) else b"l")
        if isinstance(value, dict):
            return b"(" + b"".join(self.save(key) + self.save(item) for key, item in value.items()) + b"d"
        if isinstance(value, set):
            return b"c__builtin__\nset\n" + self.save((sorted(value),)) + b"R"
        if isinstance(value, np.dtype):
            state = (3, "<", None, None, None, -1, -1, 0)
            return b"cnumpy\ndtype\n" + self.save((value.str[1:], 0, 1)) + b"R" + self.save(state) + b"b"
        if isinstance(value, np.ndarray):
            made = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n" + self.save((0,)) + b"S'b'\ntR"
            return made + self.save((1, value.shape, value.dtype, 0, value.tobytes())) + b"b"
        assert isinstance(value, Python2Object), value
        name = b"c" + value.name.replace(" ", "\n").encode() + b"\n"
        made = name + b")\x81"
        if self.protocol < 2:
            made = b"ccopy_reg\n_reconstructor\n(" + name + b"c__builtin__\nobject\nNtR"
        return made + self.save(value.state) + b"b"


class Python2Object:
    def __init__(self, name, **state):
        self.name, self.state = name, state


def write_python2(path, arrays, protocol=2, **changes):
    """Write as Python 2 would, which is how FLAME's files were made."""
    sparse = csc_matrix(arrays["J_regressor"])
    parts = {name: getattr(sparse, name) for name in ("data", "indices", "indptr")}
    content = {**arrays, "bs_style": "lbs", "bs_type": "lrotmin"}
    content["J_regressor"] = Python2Object(
        "scipy.sparse.csc csc_matrix", _shape=sparse.shape, maxprint=50, **parts
    )
    for name in CHUMPY:
        content[name] = Python2Object(
            "chumpy.ch Ch", x=arrays[name], _dirty_vars={"x"}, _itr=None, _depends_on_deps={}
        )
    content = {name: value for name, value in {**content, **changes}.items() if value is not None}
    path.write_bytes(Python2Pickler(protocol).dumps(content))
    return path


def posed_vertices(arrays, shape, expression, pose):
    """FLAME in float64, term by term: Li et al. 2017, eq. 2 to 5, with the joints of the shaped template."""
    shaped = arrays["v_template"].copy()
    for number, coefficient in enumerate(shape):
        shaped += coefficient * arrays["shapedirs"][:, :, number]
    for number, coefficient in enumerate(expression):
        shaped += coefficient * arrays["shapedirs"][:, :, 300 + number]
    joints = arrays["J_regressor"] @ shaped
    rotations = Rotation.from_rotvec(pose.reshape(5, 3)).as_matrix()
    feature = (rotations[1:] - np.eye(3)).reshape(36)
    corrected = shaped + arrays["posedirs"] @ feature
    world = []
    for joint, parent in enumerate(PARENTS):
        local = np.eye(4)
        local[:3, :3] = rotations[joint]
        local[:3, 3] = joints[joint] - (joints[parent] if joint else 0)
        world.append(world[parent] @ local if joint else local)
    posed = np.zeros_like(corrected)
    for vertex, point in enumerate(corrected):
        for joint in range(5):
            moved = world[joint] @ np.append(point - joints[joint], 1)
            posed[vertex] += arrays["weights"][vertex, joint] * moved[:3]
    return posed


@pytest.fixture(scope="module")
def arrays():
    return flame_arrays()


def assert_reads(path, arrays):
    found = read_flame(path)
    assert set(found) == {
        *("v_template", "shapedirs", "expressions", "posedirs", "J", "J_shapedirs", "J_expressions"),
        *("weights", "faces", "parents"),
    }
    for name in ("v_template", "posedirs", "weights"):
        np.testing.assert_array_equal(found[name], arrays[name])
    np.testing.assert_array_equal(found["faces"], arrays["f"])
    np.testing.assert_array_equal(found["shapedirs"], arrays["shapedirs"][:, :, :100])
    np.testing.assert_array_equal(found["expressions"], arrays["shapedirs"][:, :, 300:350])
    np.testing.assert_allclose(found["J"], arrays["J_regressor"] @ arrays["v_template"], atol=1e-15)
    assert found["parents"].tolist() == list(PARENTS)


@pytest.mark.parametrize("protocol", [0, 1, 2])
def test_reads_what_python_2_wrote(protocol, arrays, tmp_path):
    assert_reads(write_python2(tmp_path / "generic_model.pkl", arrays, protocol), arrays)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_reads_what_python_3_wrote_without_chumpy(protocol, arrays, tmp_path, monkeypatch):
    assert_reads(write_python3(tmp_path / "model.pkl", arrays, monkeypatch, protocol), arrays)


@pytest.mark.parametrize("write", ["python 2", "python 3"])
def test_poses_as_flame_does(write, arrays, tmp_path, monkeypatch):
    path = tmp_path / "generic_model.pkl"
    if write == "python 2":
        write_python2(path, arrays)
    else:
        write_python3(path, arrays, monkeypatch)
    head = load_head(path)
    assert isinstance(head, HeadModel)
    assert (head.num_expressions, head.num_pose_features, head.parent_list) == (50, 36, list(PARENTS))
    random = np.random.default_rng(1)
    shape = random.normal(size=100)
    expression, pose = random.normal(size=(3, 50)), random.normal(size=(3, 15)) * 0.5
    posed = head.with_shape(torch.tensor(shape).float())(
        torch.tensor(expression).float(), torch.tensor(pose).float()
    )
    uncorrected = {**arrays, "posedirs": 0 * arrays["posedirs"]}
    for row in range(3):
        wanted = 4 * posed_vertices(arrays, shape, expression[row], pose[row])
        np.testing.assert_allclose(posed[row].numpy(), wanted, atol=5e-6)
        without = 4 * posed_vertices(uncorrected, shape, expression[row], pose[row])
        assert np.abs(wanted - without).max() > 0.01


def test_the_suffix_does_not_matter_where_the_content_is_plain(arrays, tmp_path, head):
    renamed = tmp_path / "head.bin"
    renamed.write_bytes(ASSET.read_bytes())
    assert torch.equal(load_head(renamed).template, head.template)
    assert load_head(write_python2(tmp_path / "flame", arrays)).num_pose_features == 36


def test_bases_beyond_those_used_may_be_missing(tmp_path):
    arrays = flame_arrays(expressions=50)
    assert_reads(write_python2(tmp_path / "short.pkl", arrays), arrays)
    path = write_python2(tmp_path / "shorter.pkl", flame_arrays(expressions=49))
    message = (
        r"shorter\.pkl: shapedirs has shape \(60, 3, 349\), wants \(60, 3, 350\) \(300 of identity, then"
    )
    with pytest.raises(AvatarError, match=message):
        load_head(path)


@pytest.mark.parametrize("root", [-1, 2**32 - 1])
def test_the_root_has_no_parent_in_either_sign(root, arrays, tmp_path):
    table = np.array([[root, 0, 1, 1, 1], range(5)], np.int64)
    path = write_python2(tmp_path / "model.pkl", {**arrays, "kintree_table": table})
    assert read_flame(path)["parents"].tolist() == list(PARENTS)


def test_indexed_chumpy_arrays_are_read(arrays, tmp_path):
    template = arrays["v_template"]
    order = np.random.default_rng(0).permutation(template.size)
    shuffled = np.empty(template.size)
    shuffled[order] = template.ravel()
    source = Python2Object("chumpy.ch Ch", x=shuffled)
    select = Python2Object(
        "chumpy.reordering Select", a=source, idxs=order.astype(np.int64), preferred_shape=template.shape
    )
    assert_reads(write_python2(tmp_path / "model.pkl", arrays, v_template=select), arrays)


WRONG = {
    "missing": ({"posedirs": None, "f": None}, "lacks posedirs, f"),
    "template": ({"v_template": np.zeros(3)}, r"v_template has shape \(3,\), wants \(3, 3\)"),
    "scalar": ({"v_template": np.zeros(())}, r"v_template has shape \(\), wants \(0, 3\)"),
    "no bases": ({"shapedirs": np.zeros(())}, r"shapedirs has shape \(\), wants \(60, 3, 350\)"),
    "empty": ({"f": np.zeros((0, 3), np.uint32)}, r"f has shape \(0, 3\)"),
    "pose bases": (
        {"posedirs": np.zeros((60, 3, 9))},
        r"posedirs has shape \(60, 3, 9\), wants \(60, 3, 36\)",
    ),
    "joints": ({"weights": np.zeros((60, 24))}, r"weights has shape \(60, 24\), wants \(60, 5\)"),
    "vertex": ({"f": np.array([[0, 1, 60]])}, "f names vertices 0 to 60, of 60"),
    "parents": (
        {"kintree_table": np.array([[-1, 2, 1, 1, 1], range(5)])},
        r"kintree_table has parents \[-1, 2, 1, 1, 1\]",
    ),
    "no root": ({"kintree_table": np.array([[0, 0, 1, 1, 1], range(5)])}, r"parents \[0, 0, 1, 1, 1\]"),
    "nan": ({"weights": np.full((60, 5), np.nan)}, "weights holds numbers that are not finite"),
    "text": ({"weights": "lbs"}, "weights cannot be had .found str, wants an array"),
    "no x": (
        {"shapedirs": Python2Object("chumpy.ch Ch", a=np.zeros(3))},
        "shapedirs cannot be had .a chumpy.ch.Ch that holds no 'x'",
    ),
    "expression": (
        {"shapedirs": Python2Object("chumpy.ch_ops add", a=np.zeros(3))},
        "not a readable head model .refused chumpy.ch_ops.add",
    ),
    "index": (
        {"v_template": Python2Object("chumpy.reordering Select", a=np.zeros(3), idxs=np.array([7]))},
        "v_template cannot be had .not the parts of an array: IndexError",
    ),
    "set": ({"weights": {"a"}}, "weights cannot be had .an object that holds no array"),
    "array of text": ({"weights": np.array([0], "S3")}, "arrays of dtype 'S3' are not read"),
}


@pytest.mark.parametrize("case", WRONG)
def test_names_the_file_and_what_is_wrong_with_it(case, arrays, tmp_path):
    changes, message = WRONG[case]
    path = write_python2(tmp_path / "model.pkl", arrays, **changes)
    with pytest.raises(AvatarError, match=rf"model\.pkl: .*{message}"):
        load_head(path)


def test_sparse_matrices_must_fit_together(arrays, tmp_path):
    sparse = csc_matrix(arrays["J_regressor"])
    good = {name: getattr(sparse, name) for name in ("data", "indices", "indptr")} | {"_shape": sparse.shape}
    unsigned = sparse.indptr.astype(np.uint32)
    unsigned[1] = 2**32 - 9
    for changes, message in (
        ({"indices": sparse.indices + 5}, "whose indices do not fit"),
        ({"indices": sparse.indices - 1}, "whose indices do not fit"),
        ({"data": sparse.data[1:]}, "whose indptr does not fit"),
        ({"indptr": sparse.indptr[:-1]}, "whose indptr does not fit"),
        ({"indptr": sparse.indptr[::-1].copy()}, "whose indptr does not fit"),
        ({"indptr": unsigned}, "whose indptr does not fit"),
        ({"_shape": (10**9, VERTICES)}, "of 1000000000 x 60, wants at most"),
        ({"_shape": (5,)}, "not the parts of an array"),
        ({"_shape": (5, 10**12)}, "whose indptr does not fit"),
    ):
        regressor = Python2Object("scipy.sparse.csc csc_matrix", **{**good, **changes})
        path = write_python2(tmp_path / "model.pkl", arrays, J_regressor=regressor)
        with pytest.raises(AvatarError, match=f"J_regressor cannot be had .*{message}"):
            load_head(path)


def text(value):
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def stack_global(module, name):
    return b"\x80\x04" + text(module) + text(name) + b"\x93"


# Each makes an empty file "witness" in the working folder when plain pickle loads it.
RUNNING = {
    "reduce": b"cos\nsystem\n(Vtouch witness\ntR.",
    "reduce in the model": b"(S'v_template'\ncos\nsystem\n(Vtouch witness\ntRd.",
    "eval": b"cbuiltins\neval\n(Vopen('witness', 'w').close()\ntR.",
    "python 2 eval": b"c__builtin__\neval\n(Vopen('witness', 'w').close()\ntR.",
    "instance": b"(Vtouch witness\nios\nsystem\n.",
    "object": b"(cos\nsystem\nVtouch witness\no.",
    "stack global": stack_global("os", "system") + text("touch witness") + b"\x85R.",
    "dotted name": stack_global("shutil", "os.system") + text("touch witness") + b"\x85R.",
    "extension code": b"\x80\x02\x82\xf0(Vtouch witness\ntR.",
}
REFUSED = {
    "import": b"cantigravity\nfly\n.",
    "new object": b"\x80\x02csubprocess\nPopen\n(Vtouch witness\nt\x81.",
    "new object with names": b"\x80\x04cos\nsystem\n(Vtouch witness\nt}\x92.",
    "getattr": b"cbuiltins\ngetattr\n(cos\nV_exit\ntR.",
    "import of the stand-ins": b"cavatar.unpickle\npickle\n.",
    "dotted numpy": stack_global("numpy.core.multiarray", "_reconstruct.__class__") + b".",
    "dotted stand-in": stack_global("chumpy.ch", "Ch.__setstate__.__globals__") + b".",
    "attributes of a class": b"cchumpy.ch\nCh\n(N(S'to_array'\nNdtb.",
    "attributes of an array class": b"cnumpy\nndarray\n(N(S'to_array'\nNdtb.",
    "attributes of a function": b"ccopy_reg\n_reconstructor\n(N(S'__defaults__'\nNdtb.",
    "attributes of bytes": b"c_codecs\nencode\n(N(S'__new__'\nNdtb.",
    "reconstructor of text": b"ccopy_reg\n_reconstructor\n(S'a'\nS'b'\nNtR.",
    "reconstructor of itself": b"ccopy_reg\n_reconstructor\n(ccopy_reg\n_reconstructor\nNNtR.",
    "call of an instance": b"\x80\x02cchumpy.ch\nCh\n)\x81)R.",
    "other codec": b"c_codecs\nencode\n(Va\nVzip\ntR.",
    "persistent id": b"Pwitness\n.",
    "binary persistent id": b"Vwitness\nQ.",
    "unknown extension code": b"\x80\x02\x83\xf1\xf1.",
    "out of band buffer": b"\x80\x05\x97.",
    "shape": b"cnumpy\nndarray\n(NNNtR(I1\n(I9\ntcnumpy\ndtype\n(S'f8'\ntRI00\nS'abc'\ntb.",
    "huge size": b"\x80\x04\x8e" + struct.pack("<Q", 2**60) + b"a.",
    "huge frame": b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"a.",
    "huge memo": b"\x80\x02Nr\xff\xff\xff\xff",
}


@pytest.fixture
def extension():
    """A dangerous extension code, used before, so that it is also in the unpickler's cache."""
    copyreg.add_extension("os", "system", 0xF0)
    pickle.loads(b"\x80\x02\x82\xf0.")
    yield
    copyreg.remove_extension("os", "system", 0xF0)


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("case", [*RUNNING, *REFUSED])
def test_a_hostile_pickle_is_an_error_and_runs_nothing(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "model.pkl"
    path.write_bytes((RUNNING | REFUSED)[case])
    with pytest.raises(AvatarError, match=r"model\.pkl: not a readable head model") as caught:
        load_head(path)
    assert len(str(caught.value).splitlines()) == 1
    assert not (tmp_path / "witness").exists()
    assert "antigravity" not in sys.modules


@pytest.mark.usefixtures("extension")
@pytest.mark.parametrize("case", RUNNING)
def test_the_hostile_pickles_do_run_under_plain_pickle(case, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(RUNNING[case])
    assert (tmp_path / "witness").exists()


def test_attributes_named_by_a_pickle_stay_data(arrays, tmp_path):
    hostile = {"__class__": "a", "__setstate__": "b", "to_array": "c", "attribute": "d", "state": "e"}
    changed = Python2Object("chumpy.ch Ch", x=arrays["shapedirs"], **hostile)
    assert_reads(write_python2(tmp_path / "model.pkl", arrays, shapedirs=changed), arrays)


@pytest.mark.parametrize("protocol", [0, 2])
def test_a_truncated_file_is_an_error(protocol, arrays, tmp_path):
    path = tmp_path / "model.pkl"
    content = write_python2(path, arrays, protocol).read_bytes()
    for length in (0, 1, 2, 100, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:length])
        with pytest.raises(AvatarError, match=r"model\.pkl: not a readable head model"):
            load_head(path)


@pytest.mark.parametrize("content", [b"no pickle", b"\x89PNG\r\n\x1a\n", b"PK\x03\x04", b"\xff" * 100])
@pytest.mark.parametrize("name", ["model.pkl", "model.npz"])
def test_a_file_of_another_kind_is_an_error(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(AvatarError, match=rf"{name}: not a readable head model"):
        load_head(tmp_path / name)


def test_a_missing_file_and_a_pickle_of_something_else_are_errors(tmp_path):
    with pytest.raises(AvatarError, match=r"none\.pkl: No such file"):
        load_head(tmp_path / "none.pkl")
    (tmp_path / "list.pkl").write_bytes(pickle.dumps([1, 2]))
    with pytest.raises(AvatarError, match=r"list\.pkl: not a FLAME model \(a pickled list, wants a dict\)"):
        load_head(tmp_path / "list.pkl")


def test_an_avatar_trains_on_flame(arrays, dataset, tmp_path, capsys):
    path = write_python2(tmp_path / "generic_model.pkl", arrays)
    options = ("--set", *TINY, "fit.epochs=1", "point_avatar.points=100", f"head={path}")
    status = cli.main(["train", str(dataset), "--out", str(tmp_path / "run"), "--stages", "fit", *options])
    assert status == 0, capsys.readouterr().err
    head = Run(tmp_path / "run", read_config(tmp_path / "run"), torch.device("cpu")).head()
    assert head.template.shape == (VERTICES, 3)
    assert head.num_pose_features == 36
