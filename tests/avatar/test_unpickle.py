import pickle

import numpy as np
import pytest

from avatar.unpickle import read_pickled_arrays


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
