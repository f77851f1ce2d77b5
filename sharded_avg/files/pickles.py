"""What a pickle says, without doing what it says.

    ClassName   a class or dtype that a pickle names; it was not looked up
    Inert       an object that a pickle makes: the class's name, the arguments, the state; nothing was called
    load_inert  plain values, with an Inert for each object of an admitted class; everything else is refused

A pickle is a program, and opening a checkpoint must not run it. The classes that torch's files are made of become
Inerts, so that no constructor and no `__setstate__` runs, and a hostile file cannot reach into real ones. The opcodes
are interpreted by Python's own reference implementation: unlike the C one, it allocates nothing on the word of the
file (a memo index of 2^31 is one entry of a dict).
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from ..errors import CheckpointError

# Protocols 2 to 5 as torch writes them: plain values, containers, and the building of objects.
_OPCODES = (
    b"PROTO FRAME STOP MARK POP POP_MARK MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE NEWTRUE NEWFALSE "
    b"BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE BINUNICODE8 BINBYTES SHORT_BINBYTES BINSTRING "
    b"SHORT_BINSTRING EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 EMPTY_LIST APPEND APPENDS LIST EMPTY_DICT DICT SETITEM "
    b"SETITEMS EMPTY_SET ADDITEMS GLOBAL STACK_GLOBAL REDUCE NEWOBJ BUILD BINPERSID"
)
_CODES = {getattr(pickle, name.decode())[0] for name in _OPCODES.split()}
_ATOMS = (str, int, float, bytes, type(None))


@dataclass(slots=True, eq=False)
class Inert:
    """An object that was described and not made. `state` is what `__setstate__` or `__dict__` would have got."""

    kind: str  # "module.Class"
    args: tuple[Any, ...] = ()
    state: Any = None

    def get(self, name: str, default: Any = None) -> Any:
        """One attribute, if the state is a dict of attributes."""
        return self.state.get(name, default) if isinstance(self.state, dict) else default


@dataclass(frozen=True, slots=True)
class ClassName:
    """A class or dtype that a pickle names."""

    kind: str  # "module.Name"


def load_inert(
    data: bytes, admits: Callable[[str, str], bool], *, what: str, persistent: Callable[[Any], Any] | None = None
) -> Any:
    """Read a pickle. `admits(module, name)` says which classes may appear; `persistent` resolves persistent ids.

    `what` names the file in errors. Raises `CheckpointError` for a class that is not admitted and for anything else
    that torch would not have written.
    """
    try:
        return _Unpickler(data, admits, persistent).load()
    except _Refused as refusal:
        raise CheckpointError(
            f"{what} asks for {refusal}, which no file of weights needs: it was not opened, and nothing in it was run. "
            "If you trust the file, load it in a process of its own and save its tensors alone"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # bytes that are no pickle can raise anything
        raise CheckpointError(f"{what} is damaged: it cannot be read ({type(error).__name__}: {error})") from error


class _Refused(Exception):
    pass


class _Unpickler(pickle._Unpickler):
    """Every opcode that makes or changes objects is replaced; the rest builds plain values."""

    stack: list[Any]
    read: Callable[[int], bytes]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(
        self, data: bytes, admits: Callable[[str, str], bool], persistent: Callable[[Any], Any] | None
    ) -> None:
        super().__init__(io.BytesIO(data))
        self._data = data
        self._admits = admits
        self._persistent = persistent

    def load(self) -> Any:
        """As Python's, reading straight from memory: its way through frames is a third of the time of an index."""
        stream = io.BytesIO(self._data)
        read = self.read = stream.read
        self.readline, self.readinto = stream.readline, stream.readinto
        self.metastack: list[list[Any]] = []
        self.stack = []
        self.append = self.stack.append
        self.proto = 0
        dispatch = self.dispatch
        try:
            while code := read(1):
                dispatch[code[0]](self)
        except pickle._Stop as stop:  # type: ignore[attr-defined]
            return stop.value
        raise EOFError

    def _skip_frame(self) -> None:
        self.read(8)  # its length; all of it is in memory

    def find_class(self, module: str, name: str) -> Any:
        if not self._admits(module, name):
            raise _Refused(f"{module}.{name}")
        return ClassName(f"{module}.{name}")

    def persistent_load(self, pid: Any) -> Any:
        if self._persistent is None:
            raise _Refused("an object outside itself")
        return self._persistent(pid)

    def _make(self) -> None:
        args, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, ClassName) or not isinstance(args, tuple):
            raise _Refused(f"a call of {type(cls).__name__}")
        self.append({} if cls.kind == "collections.OrderedDict" and not args else Inert(cls.kind, args))

    def _build(self) -> None:
        state = self.stack.pop()
        made = self.stack[-1]
        if isinstance(made, Inert):
            made.state = state
        elif not isinstance(made, dict):  # an OrderedDict's attributes, such as a state dict's _metadata, are dropped
            raise _Refused(f"a change of {type(made).__name__}")

    def _set_item(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._put(dict, "an item", [key, value])

    def _set_items(self) -> None:
        items = self.pop_mark()
        self._put(dict, "an item", items)

    def _make_dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._put(dict, "an item", items)

    def _append_to_list(self) -> None:
        value = self.stack.pop()
        self._put(list, "an appending", [value])

    def _append_many(self) -> None:
        values = self.pop_mark()
        self._put(list, "an appending", values)

    def _add_to_set(self) -> None:
        values = self.pop_mark()
        self._put(set, "an adding", values)

    def _put(self, kind: type, what: str, values: list[Any]) -> None:
        """Into the container on top of the stack, which must be a plain one: keys and values in turn for a dict."""
        if type(self.stack[-1]) is not kind:
            raise _Refused(f"{what} of {type(self.stack[-1]).__name__}")
        target: Any = self.stack[-1]
        if kind is list:
            target.extend(values)
        elif kind is set:
            target.update(map(_checked_key, values))
        else:
            keys = values[::2]
            if {*map(type, keys)} != {str}:  # most are all of strings
                keys = list(map(_checked_key, keys))
            target.update(zip(keys, values[1::2], strict=True))

    dispatch: ClassVar[Any] = {
        **{code: handler for code, handler in pickle._Unpickler.dispatch.items() if code in _CODES},
        pickle.FRAME[0]: _skip_frame,
        pickle.REDUCE[0]: _make,
        pickle.NEWOBJ[0]: _make,
        pickle.BUILD[0]: _build,
        pickle.SETITEM[0]: _set_item,
        pickle.SETITEMS[0]: _set_items,
        pickle.DICT[0]: _make_dict,
        pickle.APPEND[0]: _append_to_list,
        pickle.APPENDS[0]: _append_many,
        pickle.ADDITEMS[0]: _add_to_set,
    }


def _checked_key(key: Any) -> Any:
    """A key that hashes in no time: a tuple of tuples of tuples, each twice the one before, would take for ever."""
    flat = isinstance(key, tuple) and all(isinstance(part, _ATOMS) for part in key)
    if not flat and not isinstance(key, (*_ATOMS, Inert)):
        raise _Refused(f"a key of type {type(key).__name__}")
    return key
