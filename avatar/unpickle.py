"""Reading of pickled arrays, without importing or calling anything that the pickle names.

Every global of a pickle is looked up in ALLOWED, a table of inert stand-ins of this module: they hold what the
pickle says of numpy arrays, scipy's compressed sparse columns and chumpy's arrays, and build plain numpy arrays
from it on demand. Neither scipy nor chumpy needs to be installed.
"""

import pickle
from io import BytesIO
from typing import Any

import numpy as np

MAX_DENSE = 2**24


class _StandIn:
    """Base of all that a pickle may construct.

    It always has a __setstate__: without one, unpickling would set attributes as the pickle says, on the
    instance or on the class itself.
    """

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError(f"{type(self).__name__} takes no state")

    def to_array(self) -> np.ndarray:
        raise pickle.UnpicklingError("an object that holds no array")


class _Ignored(_StandIn):
    """Stands for objects that hold no array, such as the sets in which chumpy notes its dependencies."""

    def __init__(self, *arguments: object):
        pass

    def __setstate__(self, state: object) -> None:
        pass


class _PickledBytes(_StandIn):
    """Stands for _codecs.encode and bytes, with which Python 3 writes bytes for Python 2."""

    def __new__(cls, text: str = "", codec: str = "latin1") -> bytes:
        if codec != "latin1":
            raise pickle.UnpicklingError(f"bytes encoded as {codec!r} are not read")
        return text.encode("latin1")


class _PickledDtype(_StandIn):
    """Stands for numpy.dtype: a plain number type and its byte order."""

    def __init__(self, code: str, align: bool = False, copy: bool = False):
        if code not in ("f2", "f4", "f8", "i4", "i8", "u4", "u8"):
            raise pickle.UnpicklingError(f"arrays of dtype {code!r} are not read")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _PickledArray(_StandIn):
    """Stands for numpy.ndarray and its constructor: numpy's own unpickling never runs."""

    def __init__(self, subtype: type, shape: tuple, code: bytes):
        self.array = None

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran_order, content = state
        # Python 2's strings of bytes arrive as text
        content = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(content, dtype.dtype)
        # a view: a pickle may name the same bytes any number of times
        self.array = flat.reshape(shape, order="F" if fortran_order else "C")

    def to_array(self) -> np.ndarray:
        if self.array is None:
            raise pickle.UnpicklingError("an array without content")
        return self.array.astype(self.array.dtype.newbyteorder("="))


class _PickledState(_StandIn):
    """Base of stand-ins for objects that are pickled as a dict of attributes."""

    label = ""

    def __setstate__(self, state: dict) -> None:
        self.state = dict(state)

    def attribute(self, name: str) -> Any:
        if name not in self.state:
            raise pickle.UnpicklingError(f"a {self.label} that holds no {name!r}")
        return self.state[name]


class _PickledCscMatrix(_PickledState):
    """Stands for scipy.sparse.csc_matrix."""

    label = "scipy.sparse.csc_matrix"

    def to_array(self) -> np.ndarray:
        rows, columns = self.attribute("_shape")
        data, indices, ends = (as_array(self.attribute(name)) for name in ("data", "indices", "indptr"))
        counts = np.diff(ends.astype(np.int64))
        if len(counts) != columns or ends[0] != 0 or ends[-1] != len(data) or (counts < 0).any():
            raise pickle.UnpicklingError(f"a {self.label} whose indptr does not fit its shape and data")
        if data.shape != indices.shape or (indices < 0).any() or (indices >= rows).any():
            raise pickle.UnpicklingError(f"a {self.label} whose indices do not fit its shape and data")
        if rows * columns > MAX_DENSE:
            raise pickle.UnpicklingError(
                f"a {self.label} of {rows} x {columns}, wants at most {MAX_DENSE} entries"
            )
        dense = np.zeros((rows, columns), data.dtype)
        np.add.at(dense, (indices, np.repeat(np.arange(columns), counts)), data)
        return dense


class _PickledCh(_PickledState):
    """Stands for chumpy.ch.Ch: an array under the name x."""

    label = "chumpy.ch.Ch"

    def to_array(self) -> np.ndarray:
        return as_array(self.attribute("x"))


class _PickledSelect(_PickledState):
    """Stands for chumpy.reordering.Select: entries of another array, chumpy's form of indexing."""

    label = "chumpy.reordering.Select"

    def to_array(self) -> np.ndarray:
        chosen = as_array(self.attribute("a")).ravel()[as_array(self.attribute("idxs"))]
        return chosen.reshape(self.state.get("preferred_shape", chosen.shape))


class _Reconstructor(_StandIn):
    """Stands for copyreg._reconstructor, with which protocols 0 and 1 make an object without its state."""

    def __new__(cls, kind: type, base: type, state: object) -> _PickledState:
        if not (isinstance(kind, type) and issubclass(kind, _PickledState)):
            raise pickle.UnpicklingError("an object of this kind is not read")
        return kind()


ALLOWED: dict[tuple[str, str], type[_StandIn]] = {
    ("numpy", "dtype"): _PickledDtype,
    ("numpy", "ndarray"): _PickledArray,
    ("numpy.core.multiarray", "_reconstruct"): _PickledArray,
    ("numpy._core.multiarray", "_reconstruct"): _PickledArray,
    ("scipy.sparse.csc", "csc_matrix"): _PickledCscMatrix,
    ("scipy.sparse._csc", "csc_matrix"): _PickledCscMatrix,
    ("chumpy.ch", "Ch"): _PickledCh,
    ("chumpy.reordering", "Select"): _PickledSelect,
    ("copy_reg", "_reconstructor"): _Reconstructor,
    ("copyreg", "_reconstructor"): _Reconstructor,
    ("_codecs", "encode"): _PickledBytes,
    ("__builtin__", "bytes"): _PickledBytes,
    ("__builtin__", "object"): _Ignored,
    ("builtins", "object"): _Ignored,
    ("__builtin__", "set"): _Ignored,
    ("builtins", "set"): _Ignored,
}


class _Reader(BytesIO):
    """A pickle's content, in which reading past the end is an error."""

    def read(self, size: int) -> bytes:
        content = super().read(size)
        if len(content) < size:
            raise EOFError("it is truncated")
        return content


# The unpickler written in C would take what another pickle's extension codes stood for from a cache, unasked.
class _Unpickler(pickle._Unpickler):
    def find_class(self, module: str, name: str) -> type[_StandIn]:
        if (module, name) not in ALLOWED:
            raise pickle.UnpicklingError(f"refused {module}.{name}: only numpy arrays are read")
        return ALLOWED[module, name]

    def get_extension(self, code: int) -> None:
        raise pickle.UnpicklingError(f"refused extension code {code}: only numpy arrays are read")

    def persistent_load(self, identity: object) -> None:
        raise pickle.UnpicklingError("refused a persistent id: only numpy arrays are read")


def unpickle(content: bytes) -> object:
    """Plain values out of a pickle: dicts, lists, text, numbers, and stand-ins for arrays (see as_array).

    Strings of Python 2 are read as Latin-1.

    Raises:
        pickle.UnpicklingError: it is damaged, or names anything that holds no array.
    """
    try:
        return _Unpickler(_Reader(content), encoding="latin1").load()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        # a damaged or hostile stream fails in the unpickler with almost any type of error
        raise pickle.UnpicklingError(f"not a pickle of number arrays: {_describe(error)}") from error


def as_array(value: object) -> np.ndarray:
    """The numbers behind a stand-in of `unpickle`; sparse matrices become dense.

    Raises:
        pickle.UnpicklingError: it holds no array, or the parts of one that do not fit.
    """
    if not isinstance(value, _StandIn):
        raise pickle.UnpicklingError(f"found {type(value).__name__}, wants an array")
    try:
        return value.to_array()
    except pickle.UnpicklingError:
        raise
    except Exception as error:
        raise pickle.UnpicklingError(f"not the parts of an array: {_describe(error)}") from error


def read_pickled_arrays(content: bytes) -> dict:
    """Nested dicts of number arrays out of a pickle, without calling anything that the pickle names.

    Args:
        content: the pickle; dicts, strings and numpy arrays of numbers.

    Returns:
        The same nesting, with string keys and numpy arrays at its leaves.

    Raises:
        pickle.UnpicklingError: it is damaged, or holds or calls anything else.
    """
    root = unpickle(content)
    try:
        return _plain_arrays(root)
    except RecursionError:
        raise pickle.UnpicklingError("dicts are nested too deeply") from None


def _plain_arrays(node: object) -> dict | np.ndarray:
    if isinstance(node, dict) and all(isinstance(key, str) for key in node):
        return {key: _plain_arrays(value) for key, value in node.items()}
    if isinstance(node, _PickledArray):
        return node.to_array()
    raise pickle.UnpicklingError(f"found {type(node).__name__}: only dicts of numpy arrays are read")


def _describe(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
