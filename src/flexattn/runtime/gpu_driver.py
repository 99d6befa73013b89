"""Loading and launching machine code through the GPU's driver, by ctypes: no compiler of launch
stubs, no Triton.

In: a compile_triton.Binary, a device, a grid and the values of its parameters. Out: a launch on a
stream. Rejects: code the driver refuses (RuntimeError with the driver's words).
"""

from __future__ import annotations

import ctypes
import re
import struct
from collections.abc import Sequence
from ctypes import byref, c_char_p, c_int, c_size_t, c_uint, c_void_p
from functools import cache
from threading import Lock
from typing import Any

import torch

from flexattn.compile_triton import Binary, Target

# Of a launch, as the driver takes it: grid, block, bytes of shared memory; stream; attributes.
_CONFIG = struct.Struct("<7I4xQQI4x")
# An attribute of a launch, of 72 bytes: its number (programmatic stream serialization) and 1.
_PROGRAMMATIC = ctypes.create_string_buffer(struct.pack("<I4xI60x", 6, 1), 72)
_SHARED_WITHOUT_ASKING = 48 * 1024
_LOCAL_BYTES, _REGISTERS = 3, 4  # attributes of a function
_MAX_DYNAMIC_SHARED, _CARVEOUT = 8, 9  # the latter: percent of what it shares with the cache


class _Driver:
    """The entry points that CUDA and HIP have in common, by CUDA's names."""

    def __init__(self) -> None:
        hip = torch.version.hip is not None
        library = ctypes.CDLL("libamdhip64.so" if hip else "libcuda.so.1")
        prefix = "hip" if hip else "cu"
        self.load_module = self._entry(library, f"{prefix}ModuleLoadData", c_void_p, c_char_p)
        self.get_function = self._entry(library, f"{prefix}ModuleGetFunction", c_void_p, c_void_p,
                                        c_char_p)
        self.set_attribute = self._entry(library, f"{prefix}FuncSetAttribute", c_void_p, c_int,
                                         c_int)
        self.get_attribute = self._entry(library, f"{prefix}FuncGetAttribute", c_void_p, c_int,
                                         c_void_p)
        self.launch = self._module_launch(library) if hip else self._entry(
            library, "cuLaunchKernelEx", *[c_void_p] * 4)  # few parameters: they cost time
        self.allocate = self._entry(library, "hipMalloc" if hip else "cuMemAlloc_v2", c_void_p,
                                    c_size_t)
        self.set_bytes = self._entry(library, "hipMemset" if hip else "cuMemsetD8_v2", c_void_p,
                                     c_int, c_size_t)
        self._text = (library.hipDrvGetErrorString if hip else library.cuGetErrorString)

    def _entry(self, library: Any, name: str, *types: Any) -> Any:
        function = getattr(library, name)
        function.argtypes, function.restype = types, c_int
        return function

    def _module_launch(self, library: Any) -> Any:
        """HIP's launch, called as CUDA's is."""
        entry = self._entry(library, "hipModuleLaunchKernel", c_void_p, *[c_uint] * 7, c_void_p,
                            c_void_p, c_void_p)

        def launch(config: Any, handle: Any, values: Any, extra: Any) -> int:
            *sizes, stream, _, _ = _CONFIG.unpack(config)
            return entry(handle, *sizes, stream, values, extra)

        return launch

    def check(self, code: int, what: str) -> None:
        if code:
            text = c_char_p()
            self._text(code, byref(text))
            raise RuntimeError(f"{what}: {(text.value or b'?').decode()} (driver's code {code})")


@cache
def driver() -> _Driver:
    return _Driver()


@cache
def target(device: int) -> Target:
    """The architecture to compile for."""
    facts = torch.cuda.get_device_properties(device)
    if torch.version.hip is not None:
        return Target("hip", facts.gcnArchName.split(":")[0], facts.warp_size)
    return Target("cuda", facts.major * 10 + facts.minor, 32)


@cache
def shared_limit(device: int) -> int:
    """Bytes of shared memory that one program may have."""
    facts = torch.cuda.get_device_properties(device)
    return getattr(facts, "shared_memory_per_block_optin", 64 * 1024)


@cache
def multiprocessors(device: int) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def lasting_zeros(size: int) -> int:
    """Address of bytes of the current device, zero, that are never freed. They are in no pool of
    torch's: one of a CUDA graph's, which may be in force, has to get back all that it gave."""
    address, known = c_void_p(), driver()
    known.check(known.allocate(byref(address), size), "allocating memory of the GPU")
    known.check(known.set_bytes(address, 0, size), "zeroing memory of the GPU")
    torch.cuda.synchronize()
    assert address.value is not None
    return address.value


def _offsets(layout: str) -> list[int]:
    """Of the values of a struct format of items like "q", "128s" and padding "4x"."""
    items = list(re.finditer(r"\d*[a-zA-Z]", layout))
    return [struct.calcsize("<" + layout[1:item.start()]) for item in items
            if not item[0].endswith("x")]


class Function:
    """A binary loaded on one device."""

    def __init__(self, binary: Binary, device: int) -> None:
        self.binary, self._driver = binary, driver()
        module, self._handle = c_void_p(), c_void_p()
        with torch.cuda.device(device):
            torch.cuda.current_stream().query()  # the device's context exists now
            self._check(self._driver.load_module(byref(module), binary.code), "loading")
            self._check(self._driver.get_function(byref(self._handle), module,
                                                  binary.name.encode()), "finding")
            asks = _SHARED_WITHOUT_ASKING < binary.shared <= shared_limit(device)
            if asks and torch.version.hip is None:  # what does not fit is never launched
                self._set(_MAX_DYNAMIC_SHARED, binary.shared)
        self._struct = struct.Struct(binary.layout)
        self._block = ctypes.create_string_buffer(self._struct.size)
        places = _offsets(binary.layout)
        self.parameters = len(places)
        # The driver is told where each value lies, because only it knows where a kernel wants it
        # (Hopper's TMA descriptors begin at 64 bytes of its constant bank, not of the block).
        start = ctypes.addressof(self._block)
        self._values = (c_void_p * len(places))(*(start + place for place in places))
        self._config = ctypes.create_string_buffer(_CONFIG.size)
        self._lock = Lock()

    def _check(self, code: int, what: str) -> None:
        self._driver.check(code, f"{what} the kernel {self.binary.name}")

    def _set(self, attribute: int, value: int) -> None:
        self._check(self._driver.set_attribute(self._handle, attribute, value),
                    "shared memory for")

    def share(self) -> None:
        """As many programs as shared memory holds are to run on a multiprocessor: it takes the
        cache's room."""
        self._set(_CARVEOUT, 100)

    def launch(self, grid: tuple[int, int, int], values: Sequence[Any], stream: int,
               early: bool = False) -> None:
        """values: one for each parameter; pointers as integers. early: programs may start while the
        stream's last kernel still runs, for which they wait themselves (CUDA's programmatic
        dependent launch)."""
        attributes = (ctypes.addressof(_PROGRAMMATIC), 1) if early else (0, 0)
        with self._lock:  # the driver copies the block before it returns
            self._struct.pack_into(self._block, 0, *values)
            _CONFIG.pack_into(self._config, 0, *grid, self.binary.threads, 1, 1,
                              self.binary.shared, stream, *attributes)
            code = self._driver.launch(self._config, self._handle, self._values, None)
        if code:
            self._check(code, "launching")

    def _attribute(self, number: int) -> int:
        value = c_int()
        self._check(self._driver.get_attribute(byref(value), number, self._handle), "asking about")
        return value.value

    @property
    def registers(self) -> int:
        return self._attribute(_REGISTERS)

    @property
    def spilled_bytes(self) -> int:
        """Local memory of each thread."""
        return self._attribute(_LOCAL_BYTES)
