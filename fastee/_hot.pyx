# cython: language_level=3, boundscheck=False, wraparound=False, freethreading_compatible=False
"""The short way from Python into the C ABI: no argument parsing, no boxing, results that make their tensors on first access.

A tensor reaches C through torch's DLPack exchange table (``torch.Tensor.__dlpack_c_exchange_api__``, torch >= 2.10): one C call
that fills a DLTensor on the stack. An older torch is read through ``data_ptr()`` and ``stride()``, some 2 us slower.
"""
cimport cython
from cpython.buffer cimport PyBUF_ND
from cpython.pycapsule cimport PyCapsule_CheckExact, PyCapsule_GetPointer, PyCapsule_IsValid
from cpython.ref cimport Py_DECREF, PyObject
from libc.stdint cimport int8_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

import os

import numpy
import torch

from fastee.reference import RowStats

cdef extern from "fastee/fastee.h" nogil:
    ctypedef struct DLDevice:
        int32_t device_type
        int32_t device_id
    ctypedef struct DLDataType:
        uint8_t code
        uint8_t bits
        uint16_t lanes
    ctypedef struct DLTensor:
        void* data
        DLDevice device
        int32_t ndim
        DLDataType dtype
        int64_t* shape
        int64_t* strides
        uint64_t byte_offset
    ctypedef int fastee_status
    ctypedef int fastee_pool_kind
    ctypedef int fastee_norm_kind
    ctypedef int fastee_measure
    ctypedef struct fastee_row_stats_out:
        int64_t* label
        float* max_prob
        float* margin
        float* entropy
        float* lse
        float* entropy_p2
    ctypedef struct fastee_head:
        fastee_pool_kind pool
        fastee_norm_kind norm
        fastee_measure measure
        float norm_eps
        float temperature
        float threshold
        const DLTensor* weight
        const DLTensor* bias
        const DLTensor* norm_weight
        const DLTensor* norm_bias
        const DLTensor* mask
        const DLTensor* weight_scale
    ctypedef struct fastee_head_out:
        fastee_row_stats_out stats
        float* confidence
        uint8_t* exits
        float* logits
        int64_t* index
        int64_t* count
    int32_t FASTEE_ABI_VERSION
    int32_t fastee_abi_version()
    const char* fastee_last_error()
    const char* fastee_isa()
    const char* fastee_isas()
    fastee_status fastee_select_isa(const char*)
    int32_t fastee_get_num_threads()
    fastee_status fastee_set_num_threads(int32_t)
    fastee_status fastee_pool(const DLTensor*, fastee_pool_kind, const DLTensor*, const DLTensor*, void*)
    fastee_status fastee_row_stats(const DLTensor*, float, const fastee_row_stats_out*, void*)
    fastee_status fastee_mean_entropy(const DLTensor*, const DLTensor*, float, float*, void*)
    fastee_status fastee_feature_delta(const DLTensor*, const DLTensor*, float*, void*)
    fastee_status fastee_exit_head(const DLTensor*, const fastee_head*, const fastee_head_out*, void*)
    fastee_status fastee_compact(const DLTensor*, int64_t*, int64_t*, void*)
    fastee_status fastee_gather_rows(const DLTensor*, const DLTensor*, const DLTensor*, void*)
    fastee_status fastee_scatter_rows(const DLTensor*, const DLTensor*, const DLTensor*, void*)
    ctypedef int fastee_format
    fastee_status fastee_quantize_rows(const DLTensor*, fastee_format, int64_t, const DLTensor*, const DLTensor*, void*)
    fastee_status fastee_dequantize_rows(const DLTensor*, const DLTensor*, fastee_format, int64_t, const DLTensor*, void*)
    fastee_status fastee_exit_pack(const DLTensor*, const fastee_head*, fastee_format, int64_t, const fastee_head_out*, void*, int64_t, int64_t*, int64_t*, void*)
    int64_t fastee_pack_planes_bound(int64_t, int64_t)
    fastee_status fastee_pack_planes(const DLTensor*, void*, int64_t, int64_t*, void*)
    fastee_status fastee_planes_info(const void*, int64_t, DLDataType*, int64_t*)
    fastee_status fastee_unpack_planes(const void*, int64_t, int64_t, const DLTensor*, void*)

# Memory that results and their tensors share, counted without Python: a tensor may die on any thread, or after the interpreter.
cdef extern from *:
    """
    #include <stdint.h>
    #include <stdlib.h>
    typedef struct { void* base; size_t size; long users; } fastee_shared;
    #define FASTEE_SHARED(data) ((fastee_shared*) ((char*) (data) - sizeof(fastee_shared)))
    /* The last large result that died, for the next of about its size: between two calls torch's temporaries make malloc give freed pages back
       to the system, and taking them again costs exit_pack's 2 MB of 64x64x32x32 0.4 ms beside 0.9 ms of work (Zen 4, a virtual machine). */
    #define FASTEE_KEPT_LEAST ((size_t) 64 << 10)
    #define FASTEE_KEPT_MOST ((size_t) 16 << 20)
    static char* fastee_kept;
    static char* fastee_shared_new(size_t size) {  /* 64-byte aligned, as torch's own; aligned_alloc goes past malloc's thread cache */
      char* data = size < FASTEE_KEPT_LEAST ? NULL : __atomic_exchange_n(&fastee_kept, NULL, __ATOMIC_ACQUIRE);
      if (data && (FASTEE_SHARED(data)->size < size || FASTEE_SHARED(data)->size / 2 > size)) {
        free(FASTEE_SHARED(data)->base);
        data = NULL;
      }
      if (!data) {
        void* base = malloc(size + sizeof(fastee_shared) + 64);
        if (!base) return NULL;
        data = (char*) (((uintptr_t) base + sizeof(fastee_shared) + 63) & ~(uintptr_t) 63);
        FASTEE_SHARED(data)->base = base;
        FASTEE_SHARED(data)->size = size;
      }
      FASTEE_SHARED(data)->users = 1;
      return data;
    }
    static void fastee_shared_keep(char* data) {
      if (data) __atomic_fetch_add(&FASTEE_SHARED(data)->users, 1, __ATOMIC_RELAXED);
    }
    static void fastee_shared_drop(char* data) {
      if (!data || __atomic_fetch_sub(&FASTEE_SHARED(data)->users, 1, __ATOMIC_ACQ_REL) != 1) return;
      const size_t size = FASTEE_SHARED(data)->size;
      if (size >= FASTEE_KEPT_LEAST && size <= FASTEE_KEPT_MOST) data = __atomic_exchange_n(&fastee_kept, data, __ATOMIC_ACQ_REL);
      if (data) free(FASTEE_SHARED(data)->base);
    }
    """
    char* fastee_shared_new(size_t) nogil
    void fastee_shared_keep(char*) nogil
    void fastee_shared_drop(char*) noexcept nogil

cdef struct ManagedTensor:
    uint32_t major
    uint32_t minor
    void* context
    void (*deleter)(ManagedTensor*) noexcept nogil
    uint64_t flags
    DLTensor t

# torch's exchange table, DLPack 1.3: the layout up to the entries that are used here.
ctypedef int (*FromPython)(void*, DLTensor*) noexcept
ctypedef int (*ToPython)(ManagedTensor*, void**) noexcept
cdef struct ExchangeTable:
    uint32_t major
    uint32_t minor
    void* previous
    void* allocate
    void* managed_from_python
    ToPython to_python
    FromPython tensor_from_python
    void* current_stream

cdef ExchangeTable* table = NULL


def use_exchange_table(bint wanted):
    """Go through torch's exchange table, or past it as with an older torch; returns whether it is now in use."""
    global table
    cdef ExchangeTable* found
    table = NULL
    capsule = getattr(torch.Tensor, "__dlpack_c_exchange_api__", None)
    if wanted and capsule is not None:
        found = <ExchangeTable*> PyCapsule_GetPointer(capsule, "dlpack_exchange_api")
        if found.major == 1 and found.tensor_from_python != NULL and found.to_python != NULL:
            table = found
    return table != NULL


use_exchange_table(True)

if fastee_abi_version() != FASTEE_ABI_VERSION:
    raise ImportError(f"libfastee has ABI {fastee_abi_version()}, this module needs {FASTEE_ABI_VERSION}: rebuild with `make build`")
if os.environ.get("FASTEE_CPU_ISA") and fastee_select_isa(os.environ["FASTEE_CPU_ISA"].encode()):
    raise ValueError(fastee_last_error().decode())

if os.environ.get("FASTEE_NUM_THREADS") and os.environ["FASTEE_NUM_THREADS"] != str(fastee_get_num_threads()):
    raise ValueError(f"FASTEE_NUM_THREADS must be a number from 1 to 1024, got {os.environ['FASTEE_NUM_THREADS']!r}")

cdef extern from *:
    """
    static PyObject* fastee_native_first(PyObject* native, PyObject* checked, PyObject* const* args, size_t n, PyObject* names) {
      PyObject* result = PyObject_Vectorcall(native, args, n, names);
      if (result && result != Py_None) return result;
      if (result) Py_DECREF(result);
      else if (PyErr_ExceptionMatches(PyExc_TypeError)) PyErr_Clear();  /* names or numbers of arguments that do not fit */
      else return NULL;
      return PyObject_Vectorcall(checked, args, n, names);
    }
    static void fastee_call_by_vector(PyObject* o, void* call) {  /* a class with a __call__ of its own does not inherit this */
      Py_TYPE(o)->tp_vectorcall_offset = (char*) call - (char*) o;
      Py_TYPE(o)->tp_flags |= Py_TPFLAGS_HAVE_VECTORCALL;
    }
    """
    ctypedef object (*Call "vectorcallfunc")(object, PyObject* const*, size_t, PyObject*)
    object fastee_native_first(object, object, PyObject* const*, size_t, PyObject*)
    void fastee_call_by_vector(object, void*)


cdef object native_first(object call, PyObject* const* args, size_t n, PyObject* names):
    return fastee_native_first((<NativeFirst> call).native, (<NativeFirst> call).checked, args, n, names)


cdef class NativeFirst:
    """Call `native`; where that gives None or does not take such arguments, call `checked` with the same ones.

    A class made from this one may have a ``__call__`` in Python, which Dynamo traces: the interpreter goes past it.
    """
    cdef Call call
    cdef object native, checked

    def __cinit__(self, native, checked):
        self.call, self.native, self.checked = native_first, native, checked
        fastee_call_by_vector(self, &self.call)


cdef object Tensor = torch.Tensor
cdef object Parameter = torch.nn.Parameter
cdef object INT64 = torch.int64
cdef object FLOAT32 = torch.float32
cdef object BOOL = torch.bool
cdef object UINT8 = torch.uint8
cdef object BFLOAT16 = torch.bfloat16
cdef object FLOAT16 = torch.float16

cdef dict _CODES = {
    torch.float32: (2, 32), torch.float64: (2, 64), torch.float16: (2, 16), torch.bfloat16: (4, 16), torch.int8: (0, 8),
    torch.int16: (0, 16), torch.int32: (0, 32), torch.int64: (0, 64), torch.uint8: (1, 8), torch.bool: (6, 8),
    torch.complex64: (5, 64), torch.complex128: (5, 128), torch.float8_e4m3fn: (10, 8),
}
cdef dict _POOLS = {"mean": 0, "mean_tokens": 1, "cls": 2, "last": 3, "none": 4}
cdef dict _NORMS = {"layer": 1, "rms": 2, "affine": 3}
cdef dict _MEASURES = {"max_prob": 0, "margin": 1, "entropy": 2, "energy": 3}
cdef dict _FORMATS = {"int8": 0, "int4": 1, "fp8_e4m3": 2, "bf16": 3}
DEF MAX_DIMS = 16


cdef inline bint plain(object o):
    return type(o) is Tensor or type(o) is Parameter


cdef struct View:
    DLTensor t
    int64_t sizes[2 * MAX_DIMS]  # shape and strides of a tensor that came without the table


cdef int view_slow(object o, View* v) except -1:
    cdef int i, n = o.dim()
    code = _CODES.get(o.dtype)
    if n > MAX_DIMS or code is None or o.device.type != "cpu":
        raise TypeError("a dense CPU tensor of a plain dtype and at most 16 dimensions is needed")
    for i in range(n):
        v.sizes[i] = o.shape[i]
        v.sizes[MAX_DIMS + i] = o.stride(i)
    v.t.data = <void*> <size_t> o.data_ptr()
    v.t.device.device_type, v.t.device.device_id = 1, 0
    v.t.ndim = n
    v.t.dtype.code, v.t.dtype.bits, v.t.dtype.lanes = code[0], code[1], 1
    v.t.shape = v.sizes
    v.t.strides = v.sizes + MAX_DIMS
    v.t.byte_offset = 0
    return 0


# DLPack's capsule of a managed tensor, of either version; nothing is taken over, its own destructor gives the memory back.
cdef int view_capsule(object o, View* v) except -1:
    if PyCapsule_IsValid(o, "dltensor"):
        v.t = (<DLTensor*> PyCapsule_GetPointer(o, "dltensor"))[0]
    else:
        v.t = (<ManagedTensor*> PyCapsule_GetPointer(o, "dltensor_versioned")).t
    return 0


cdef inline int view(object o, View* v) except -1:
    if PyCapsule_CheckExact(o):
        return view_capsule(o, v)
    if table != NULL:
        if table.tensor_from_python(<void*> o, &v.t) == 0:
            return 0
        return -1  # the table has set the Python error
    return view_slow(o, v)


cdef const DLTensor* view_or_null(object o, View* v) except? NULL:
    if o is None:
        return NULL
    view(o, v)
    return &v.t


# An array as its DLPack capsule, which must live as long as its memory is read; anything without one as it is. NumPy takes 50 ns for it, where
# torch.from_numpy takes 600; the newer form, slower, is the one that lends memory that may not be written.
cdef object lent(object o):
    if o is None or plain(o) or not hasattr(type(o), "__dlpack__"):
        return o
    try:
        return o.__dlpack__()
    except BufferError:
        return o.__dlpack__(max_version=(1, 0))


cdef inline bint readable(object o, object make):
    return plain(o) or make is not None and PyCapsule_CheckExact(o)


cdef int check(fastee_status status) except -1:
    if status == 0:
        return 0
    text = fastee_last_error().decode()
    if status == 2:
        raise TypeError(text)
    if status == 4:
        raise MemoryError(text)
    raise ValueError(text)


def last_error():
    return fastee_last_error().decode()


def isa():
    return fastee_isa().decode()


def isas():
    return fastee_isas().decode().split(",")


def select_isa(str name):
    """Lower the instruction set of the CPU kernels to `name` ("" = the best); raises ValueError for one that cannot run."""
    check(fastee_select_isa(name.encode()))


def get_num_threads():
    return fastee_get_num_threads()


def set_num_threads(int32_t count):
    check(fastee_set_num_threads(count))


cdef char* allocate(Py_ssize_t size) except NULL:
    cdef char* data = fastee_shared_new(size)
    if data == NULL:
        raise MemoryError(f"{size} bytes for a result")
    return data


cdef class _Bytes:
    """Part of a result's memory as a buffer, for torch.frombuffer."""
    cdef char* memory
    cdef Py_ssize_t offset, shape[1]

    def __dealloc__(self):
        fastee_shared_drop(self.memory)

    def __getbuffer__(self, Py_buffer* buffer, int flags):
        buffer.buf = self.memory + self.offset
        buffer.obj = self
        buffer.len = self.shape[0]
        buffer.itemsize = 1
        buffer.readonly = 0
        buffer.format = NULL  # unsigned bytes
        buffer.ndim = 1
        buffer.shape = self.shape if flags & PyBUF_ND else NULL
        buffer.strides = NULL
        buffer.suboffsets = NULL
        buffer.internal = NULL


cdef struct Lent:
    ManagedTensor m
    int64_t sizes[2 * MAX_DIMS]


cdef void give_back(ManagedTensor* m) noexcept nogil:
    fastee_shared_drop(<char*> m.context)
    free(m)


cdef _Bytes bytes_at(char* memory, Py_ssize_t offset, int ndim, const int64_t* shape, Py_ssize_t itemsize):
    cdef _Bytes part = _Bytes.__new__(_Bytes)
    cdef int i
    part.offset, part.shape[0] = offset, itemsize
    for i in range(ndim):
        part.shape[0] *= shape[i]
    fastee_shared_keep(memory)
    part.memory = memory
    return part


cdef object tensor_of_bytes(char* memory, Py_ssize_t offset, int ndim, const int64_t* shape, object dtype):
    sizes = tuple([shape[i] for i in range(ndim)])
    part = bytes_at(memory, offset, ndim, shape, dtype.itemsize)
    if part.shape[0] == 0:
        return torch.empty(sizes, dtype=dtype)
    return torch.frombuffer(part, dtype=torch.uint8).view(dtype).view(sizes)


# A contiguous tensor over part of `memory`: through the exchange table in 0.4 us, where torch.frombuffer and view take 1.2.
cdef object shaped_tensor(char* memory, Py_ssize_t offset, int ndim, const int64_t* shape, object dtype):
    cdef int64_t count = 1
    cdef int i
    cdef void* made = NULL
    cdef Lent* lent
    if table == NULL or ndim > MAX_DIMS:
        return tensor_of_bytes(memory, offset, ndim, shape, dtype)
    lent = <Lent*> malloc(sizeof(Lent))
    if lent == NULL:
        raise MemoryError()
    lent.m.major, lent.m.minor, lent.m.context, lent.m.deleter, lent.m.flags = 1, table.minor, memory, give_back, 0
    lent.m.t.data = memory + offset
    lent.m.t.device.device_type, lent.m.t.device.device_id = 1, 0
    lent.m.t.ndim = ndim
    code, bits = <tuple> _CODES[dtype]
    lent.m.t.dtype.code, lent.m.t.dtype.bits, lent.m.t.dtype.lanes = code, bits, 1
    for i in range(ndim - 1, -1, -1):
        lent.sizes[i], lent.sizes[MAX_DIMS + i] = shape[i], count
        count *= shape[i]
    lent.m.t.shape, lent.m.t.strides, lent.m.t.byte_offset = lent.sizes, lent.sizes + MAX_DIMS, 0
    fastee_shared_keep(memory)
    if table.to_python(&lent.m, &made):
        give_back(&lent.m)
        return None  # the table has set the Python error
    tensor = <object> made
    Py_DECREF(tensor)  # the table's reference is now ours
    return tensor


cdef object tensor_at(char* memory, Py_ssize_t offset, Py_ssize_t count, object dtype):
    cdef int64_t shape[1]
    shape[0] = count
    return shaped_tensor(memory, offset, 1, shape, dtype)


cdef object AS_NUMPY = torch.Tensor.numpy
cdef dict _NUMPY = {torch.int64: numpy.dtype("int64"), torch.float32: numpy.dtype("float32"), torch.bool: numpy.dtype("bool")}


# Part of `memory` as the caller's kind of array: `make` gives it for a tensor, None keeps the tensor. NumPy's arrays, the common ones, are made
# without a tensor between, in 0.5 instead of 1.5 us.
cdef object array_at(object make, char* memory, Py_ssize_t offset, int ndim, const int64_t* shape, object dtype):
    cdef int i
    if make is AS_NUMPY:
        kind = _NUMPY[dtype]
        return numpy.ndarray(tuple([shape[i] for i in range(ndim)]), kind, bytes_at(memory, offset, ndim, shape, kind.itemsize))
    tensor = shaped_tensor(memory, offset, ndim, shape, dtype)
    return tensor if make is None else make(tensor)


cdef tuple STATS = RowStats._fields


cdef class Stats:
    """`RowStats` whose tensors are made on first access: the same names, order and length."""
    cdef char* memory
    cdef Py_ssize_t rows, at
    cdef bint second
    cdef list _made
    cdef object make
    _fields = STATS

    def __dealloc__(self):
        fastee_shared_drop(self.memory)

    def __getattr__(self, str name):
        # reached for the six field names only: everything else is found the usual way first
        try:
            return self[STATS.index(name)]
        except ValueError:
            raise AttributeError(f"row statistics have {', '.join(STATS)}, not {name!r}") from None

    def __getitem__(self, at):
        if isinstance(at, slice):
            return tuple(self)[at]
        cdef Py_ssize_t i = at
        if i < 0:
            i += 6
        if i < 0 or i > 5:
            raise IndexError("row statistics have 6 fields")
        if i == 5 and not self.second:
            return None
        if self._made is None:
            self._made = [None] * 6
        cdef int64_t shape[1]
        if self._made[i] is None:
            shape[0] = self.rows
            if i == 0:
                self._made[0] = array_at(self.make, self.memory, 0, 1, shape, INT64)
            else:
                self._made[i] = array_at(self.make, self.memory, self.at + 4 * self.rows * (i - 1), 1, shape, FLOAT32)
        return self._made[i]

    def __len__(self):
        return 6

    def __iter__(self):
        return (self[i] for i in range(6))

    def __repr__(self):
        return repr(RowStats(*self))


# Takes over one share of `memory`.
cdef Stats stats_at(char* memory, Py_ssize_t rows, Py_ssize_t at, bint second):
    cdef Stats s = Stats.__new__(Stats)
    s.memory, s.rows, s.at, s.second = memory, rows, at, second
    return s


# Both decorators save time on the way of an exit at batch 1: no list of the collector (what a result holds, its own tensors, does not
# point back at it), and the memory of the last results is taken again.
@cython.no_gc
@cython.freelist(8)
cdef class HeadResult:
    """What exit_head and exit_step found: ``.label .confidence .exits .stats .logits`` (and ``.index .count``).

    Tensors are made on first access and share this object's memory; ``label_at(i)``, ``exits_at(i)`` and
    ``confidence_at(i)`` read plain numbers without making any.
    """
    cdef char* memory
    cdef Py_ssize_t rows, classes, at_confidence, at_stats, at_exits, at_logits, at_index
    cdef int64_t kept
    cdef list _made
    cdef object make  # what turns a tensor into the caller's kind of array; None: tensors

    def __dealloc__(self):
        fastee_shared_drop(self.memory)

    cdef object made(self, int field, Py_ssize_t at, object dtype, Py_ssize_t columns=-1):
        cdef int64_t shape[2]
        if self._made is None:
            self._made = [None] * 6
        if self._made[field] is None:
            shape[0], shape[1] = self.rows, columns
            self._made[field] = array_at(self.make, self.memory, at, 1 if columns < 0 else 2, shape, dtype)
        return self._made[field]

    @property
    def label(self):
        return self.made(0, 0, INT64)

    @property
    def confidence(self):
        return self.made(1, self.at_confidence, FLOAT32)

    @property
    def exits(self):
        return self.made(2, self.at_exits, BOOL)

    @property
    def index(self):
        if self.at_index < 0:
            raise AttributeError("exit_head has no index; exit_step has")
        return self.made(3, self.at_index, INT64)

    @property
    def count(self):
        return None if self.at_index < 0 else self.kept

    @property
    def stats(self):
        cdef Stats stats
        if self._made is None:
            self._made = [None] * 6
        if self._made[4] is None:
            fastee_shared_keep(self.memory)
            self._made[4] = stats = stats_at(self.memory, self.rows, self.at_stats, False)
            stats.make = self.make
        return self._made[4]

    @property
    def logits(self):
        return None if self.at_logits < 0 else self.made(5, self.at_logits, FLOAT32, self.classes)

    cdef Py_ssize_t row(self, Py_ssize_t i) except -1:
        if i < 0 or i >= self.rows:
            raise IndexError(f"row must lie in [0, {self.rows}), got {i}")
        return i

    def label_at(self, Py_ssize_t i):
        return (<int64_t*> self.memory)[self.row(i)]

    def confidence_at(self, Py_ssize_t i):
        return (<float*> (self.memory + self.at_confidence))[self.row(i)]

    def exits_at(self, Py_ssize_t i):
        return (<uint8_t*> (self.memory + self.at_exits))[self.row(i)] != 0

    def __len__(self):
        return self.rows

    def __repr__(self):
        tail = "" if self.at_index < 0 else f", index={self.index}, count={self.count}"
        return f"HeadResult(label={self.label}, confidence={self.confidence}, exits={self.exits}{tail})"


cdef dict _WIRE_DTYPES = {"int8": torch.int8, "int4": torch.uint8, "fp8_e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}
cdef tuple ROWS = ("data", "scale", "format", "group", "shape")


cdef class Rows:
    """`QuantizedRows` whose tensors are made on first access: the same names, order and length."""
    cdef char* memory
    cdef Py_ssize_t at_data, at_scale
    cdef int ndim, code
    cdef int64_t size[MAX_DIMS]  # of the source
    cdef int64_t row, chunk  # elements of a row; of a group, 0 = the row
    cdef readonly str format
    cdef object _data, _scale
    _fields = ROWS

    def __dealloc__(self):
        fastee_shared_drop(self.memory)

    cdef int64_t groups(self):
        return 0 if self.code == 3 else self.row // self.chunk if self.chunk and self.row else 1

    cdef int64_t row_bytes(self):
        return (self.row + 1) // 2 if self.code == 1 else 2 * self.row if self.code == 3 else self.row

    @property
    def data(self):
        cdef int64_t flat[2]
        if self._data is None:
            if self.code == 1:
                flat[0], flat[1] = self.size[0], self.row_bytes()
                self._data = shaped_tensor(self.memory, self.at_data, 2, flat, UINT8)
            else:
                self._data = shaped_tensor(self.memory, self.at_data, self.ndim, self.size, _WIRE_DTYPES[self.format])
        return self._data

    @property
    def scale(self):
        cdef int64_t shape[2]
        if self._scale is None:
            shape[0], shape[1] = 0 if self.code == 3 else self.size[0], self.groups()
            self._scale = shaped_tensor(self.memory, self.at_scale, 2 if self.chunk else 1, shape, FLOAT32)
        return self._scale

    @property
    def group(self):
        return self.chunk or None

    @property
    def shape(self):
        return tuple([self.size[i] for i in range(self.ndim)])

    @property
    def nbytes(self):
        """Bytes of the payload and its scales."""
        return self.size[0] * (self.row_bytes() + 4 * self.groups())

    def __len__(self):
        return 5

    def __getitem__(self, at):
        return getattr(self, ROWS[at]) if isinstance(at, int) else tuple(self)[at]

    def __iter__(self):
        return iter((self.data, self.scale, self.format, self.group, self.shape))

    def _as_tuple(self):
        from fastee.ops import QuantizedRows
        return QuantizedRows(*self)

    def _replace(self, **changes):
        return self._as_tuple()._replace(**changes)

    def __reduce__(self):
        return type(self._as_tuple()), tuple(self)

    def __repr__(self):
        return repr(self._as_tuple())


# Rows like those of x [B, ...], with no memory yet; None when format or group do not fit.
cdef Rows rows_like(const DLTensor* x, format, group):
    cdef Rows q
    cdef int i
    if type(format) is not str or format not in _FORMATS or x.ndim < 1 or x.ndim > MAX_DIMS or not (group is None or type(group) is int):
        return None
    q = Rows.__new__(Rows)
    q.format, q.code, q.ndim, q.row, q.chunk = format, _FORMATS[format], x.ndim, 1, 0
    for i in range(x.ndim):
        q.size[i] = x.shape[i]
        q.row *= x.shape[i] if i else 1
    if group is not None:
        if not 0 < group <= q.row or q.row % group or q.code == 3:
            return None
        q.chunk = group
    return q


cdef class PackResult(HeadResult):
    """`HeadResult` of exit_pack: ``.packed``, the rows that stay, and ``.wire`` uint8 [nbytes], the same bytes: their scales and then their data."""
    cdef readonly Rows packed
    cdef object _wire

    @property
    def wire(self):
        if self._wire is None:
            self._wire = tensor_at(self.packed.memory, self.packed.at_scale, self.packed.nbytes, UINT8)
        return self._wire


def exit_pack(x, weight, bias, pool, norm, measure, threshold, temperature, mask, bint logits, format, group):
    """Run one exit and pack who stays into one buffer; None when the C ABI refuses the arguments."""
    return head(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, True, (format, group))


# The ops' own signatures: what fastee.ops calls first.
@cython.binding(False)
def direct_exit_head(x, weight, bias=None, pool="mean", norm=None, measure="max_prob", threshold=0.9, *, temperature=1.0, mask=None, logits=False, backend=None):
    return head(x, weight, bias, pool, norm, measure, threshold, temperature, None, logits, False) if backend is None and mask is None else None


@cython.binding(False)
def direct_exit_step(x, weight, bias=None, pool="mean", norm=None, measure="max_prob", threshold=0.9, *, temperature=1.0, mask=None, logits=False, backend=None):
    return head(x, weight, bias, pool, norm, measure, threshold, temperature, None, logits, True) if backend is None and mask is None else None


def exit_head(x, weight, bias, pool, norm, measure, threshold, temperature, mask, bint logits, bint step, make=None):
    """Run one exit; None when the C ABI refuses the arguments (the caller then checks them and says why).

    With `make`, which gives the caller's kind of array for a tensor, x, weight, bias and mask may be whatever has DLPack.
    """
    return head(x, weight, bias, pool, norm, measure, threshold, temperature, mask, logits, step, None, make)


cdef object head(x, weight, bias, pool, norm, measure, threshold, temperature, mask, bint logits, bint step, tuple packing=None, make=None):
    cdef Rows kept
    cdef int64_t capacity, offset = 0, nbytes = 0
    cdef View vx, vw, vb, vnw, vnb, vm, vs
    cdef fastee_head args
    cdef fastee_head_out out
    cdef int64_t work, elements = 1
    cdef int at
    cdef int64_t count = 0
    cdef HeadResult r
    cdef Py_ssize_t rows, size
    cdef fastee_status status
    scale = None
    if make is not None:
        try:
            x, weight, bias, mask = lent(x), lent(weight), lent(bias), lent(mask)
            if norm is not None:
                norm = norm._replace(weight=lent(norm.weight), bias=lent(norm.bias))
        except Exception:
            return None
    if not readable(weight, make):
        if getattr(weight, "format", None) != "int8" or weight.group is not None:
            return None
        weight, scale = weight.data, weight.scale  # a QuantizedRows
    if not readable(x, make) or not readable(weight, make):
        return None  # fakes, functional wrappers and DTensors hold no memory of their own
    try:
        args.weight_scale = view_or_null(scale, &vs)
        args.pool = 0 if pool is "mean" else _POOLS[pool]  # literals are one object: the usual words need no look-up
        args.measure = 0 if measure is "max_prob" else _MEASURES[measure]
        view(x, &vx)
        view(weight, &vw)
        args.bias = view_or_null(bias, &vb)
        args.mask = view_or_null(mask, &vm)
        args.norm, args.norm_weight, args.norm_bias, args.norm_eps = 0, NULL, NULL, 0.0
        if norm is not None:
            args.norm = _NORMS[norm.kind]
            args.norm_weight = view_or_null(norm.weight, &vnw)
            args.norm_bias = view_or_null(norm.bias, &vnb)
            args.norm_eps = norm.eps
        args.threshold = threshold
        args.temperature = temperature
    except Exception:
        return None
    if vx.t.ndim < 2 or vw.t.ndim != 2:
        return None
    args.weight = &vw.t
    rows = vx.t.shape[0]
    r = HeadResult.__new__(HeadResult) if packing is None else PackResult.__new__(PackResult)
    r.rows, r.classes, r.make = rows, vw.t.shape[0], make
    # int64 label, int64 index, 5 x float, logits, uint8 exits
    size = 8 * rows
    r.at_index = -1
    if step:
        r.at_index, size = size, size + 8 * rows
    r.at_confidence, r.at_stats, size = size, size + 4 * rows, size + 20 * rows
    r.at_logits = -1
    if logits:
        r.at_logits, size = size, size + 4 * rows * r.classes
    r.at_exits, size = size, size + rows
    cdef char* p = allocate(size)
    r.memory = p
    out.stats.label = <int64_t*> p
    out.confidence = <float*> (p + r.at_confidence)
    out.stats.max_prob = <float*> (p + r.at_stats)
    out.stats.margin = <float*> (p + r.at_stats + 4 * rows)
    out.stats.entropy = <float*> (p + r.at_stats + 8 * rows)
    out.stats.lse = <float*> (p + r.at_stats + 12 * rows)
    out.stats.entropy_p2 = NULL
    out.logits = <float*> (p + r.at_logits) if logits else NULL
    out.exits = <uint8_t*> (p + r.at_exits)
    out.index = <int64_t*> (p + r.at_index) if step else NULL
    out.count = &count if step else NULL
    if packing is not None:
        kept = rows_like(&vx.t, packing[0], packing[1])
        if kept is None:
            return None
        capacity = rows * (4 * kept.groups() + kept.row_bytes())
        kept.memory = allocate(capacity)
        if rows * (kept.row + vw.t.shape[0] * vw.t.shape[1]) > 50000:
            with nogil:
                status = fastee_exit_pack(&vx.t, &args, kept.code, kept.chunk, &out, kept.memory, capacity, &offset, &nbytes, NULL)
        else:
            status = fastee_exit_pack(&vx.t, &args, kept.code, kept.chunk, &out, kept.memory, capacity, &offset, &nbytes, NULL)
        if status != 0:
            return None
        kept.size[0], kept.at_scale, kept.at_data = count, offset, offset + 4 * kept.groups() * count
        (<PackResult> r).packed, r.kept = kept, count
        return r
    # Taking and releasing the GIL costs about 60 ns: not worth it below some 5 us of multiply-adds and elements to pool.
    work = rows * vw.t.shape[0] * vw.t.shape[1]
    for at in range(vx.t.ndim):
        elements *= vx.t.shape[at]
    if work + elements > 200000:
        with nogil:
            status = fastee_exit_head(&vx.t, &args, &out, NULL)
    else:
        status = fastee_exit_head(&vx.t, &args, &out, NULL)
    if status != 0:
        return None
    r.kept = count
    return r


# Statistics of `rows` rows that are still to be computed, and where they go.
cdef Stats new_stats(fastee_row_stats_out* out, Py_ssize_t rows, bint second):
    cdef Stats s = stats_at(allocate(28 * rows), rows, 8 * rows, second)
    out.label = <int64_t*> s.memory
    out.max_prob = <float*> (s.memory + 8 * rows)
    out.margin, out.entropy, out.lse = out.max_prob + rows, out.max_prob + 2 * rows, out.max_prob + 3 * rows
    out.entropy_p2 = out.max_prob + 4 * rows if second else NULL
    return s


def row_stats(logits, double temperature, bint second_moment):
    cdef View v
    cdef fastee_row_stats_out out
    cdef fastee_status status
    view(logits, &v)
    s = new_stats(&out, v.t.shape[0], second_moment)
    with nogil:
        status = fastee_row_stats(&v.t, temperature, &out, NULL)
    check(status)
    return s


def linear_stats(x, weight, bias, double temperature, bint second_moment):
    cdef View vx, vw, vb
    cdef fastee_head head
    cdef fastee_head_out out
    cdef fastee_status status
    view(x, &vx)
    view(weight, &vw)
    memset(&head, 0, sizeof(head))
    memset(&out, 0, sizeof(out))
    head.pool, head.temperature, head.weight, head.bias = 4, temperature, &vw.t, view_or_null(bias, &vb)
    s = new_stats(&out.stats, vx.t.shape[0], second_moment)
    with nogil:
        status = fastee_exit_head(&vx.t, &head, &out, NULL)
    check(status)
    return s


def mean_entropy(logits, mask, double temperature, out):
    cdef View vl, vm, vo
    cdef fastee_status status
    view(logits, &vl)
    view(out, &vo)
    cdef const DLTensor* m = view_or_null(mask, &vm)
    with nogil:
        status = fastee_mean_entropy(&vl.t, m, temperature, <float*> vo.t.data, NULL)
    check(status)


def feature_delta(a, b, out):
    cdef View va, vb, vo
    cdef fastee_status status
    view(a, &va)
    view(b, &vb)
    view(out, &vo)
    with nogil:
        status = fastee_feature_delta(&va.t, &vb.t, <float*> vo.t.data, NULL)
    check(status)


def pool(x, str kind, mask, out):
    cdef View vx, vm, vo
    cdef fastee_status status
    view(x, &vx)
    view(out, &vo)
    cdef const DLTensor* m = view_or_null(mask, &vm)
    cdef int code = _POOLS[kind]
    with nogil:
        status = fastee_pool(&vx.t, code, m, &vo.t, NULL)
    check(status)


def compact(mask, index):
    """Fill `index` and return the number of survivors."""
    cdef View vm, vi
    cdef int64_t count = 0
    cdef fastee_status status
    view(mask, &vm)
    view(index, &vi)
    with nogil:
        status = fastee_compact(&vm.t, <int64_t*> vi.t.data, &count, NULL)
    check(status)
    return count


def gather_rows(x, index, out):
    cdef View vx, vi, vo
    cdef fastee_status status
    view(x, &vx)
    view(index, &vi)
    view(out, &vo)
    with nogil:
        status = fastee_gather_rows(&vx.t, &vi.t, &vo.t, NULL)
    check(status)


def scatter_rows(out, index, rows):
    cdef View vr, vi, vo
    cdef fastee_status status
    view(rows, &vr)
    view(index, &vi)
    view(out, &vo)
    with nogil:
        status = fastee_scatter_rows(&vo.t, &vi.t, &vr.t, NULL)
    check(status)


def quantize_rows(x, str format, int64_t group, data, scale):
    cdef View vx, vd, vs
    cdef fastee_status status
    cdef int code = _FORMATS[format]
    view(x, &vx)
    view(data, &vd)
    view(scale, &vs)
    with nogil:
        status = fastee_quantize_rows(&vx.t, code, group, &vd.t, &vs.t, NULL)
    check(status)


def dequantize_rows(data, scale, str format, int64_t group, out):
    cdef View vd, vs, vo
    cdef fastee_status status
    cdef int code = _FORMATS[format]
    view(data, &vd)
    view(scale, &vs)
    view(out, &vo)
    with nogil:
        status = fastee_dequantize_rows(&vd.t, &vs.t, code, group, &vo.t, NULL)
    check(status)


# The packed bytes of a contiguous tensor as uint8 [n]; None with a status when the C ABI refuses it.
cdef object packed_planes(object h, fastee_status* status):
    cdef View v
    cdef int64_t capacity, nbytes = 0, count = 1
    cdef int i
    view(h, &v)
    for i in range(v.t.ndim):
        count *= v.t.shape[i]
    capacity = fastee_pack_planes_bound(count, v.t.dtype.bits // 8)
    cdef char* m = allocate(capacity)
    try:
        if count > 10000:
            with nogil:
                status[0] = fastee_pack_planes(&v.t, m, capacity, &nbytes, NULL)
        else:
            status[0] = fastee_pack_planes(&v.t, m, capacity, &nbytes, NULL)
        return None if status[0] else tensor_at(m, 0, nbytes, UINT8)
    finally:
        fastee_shared_drop(m)


# Values [first, stop) of packed bytes (stop < 0: to the end), in `shape` where they are all of them; None with a status when the C ABI refuses
# the bytes, None with status 0 when shape and range do not fit them.
cdef object unpacked_planes(object data, object shape, int64_t first, int64_t stop, fastee_status* status):
    cdef View v
    cdef DLTensor out
    cdef int64_t size[MAX_DIMS]
    cdef int64_t total = 0, count = 1
    cdef int i
    view(data, &v)
    status[0] = 0
    if not is_kind(&v.t, 1, 8) or v.t.ndim != 1 or (v.t.shape[0] > 1 and v.t.strides != NULL and v.t.strides[0] != 1):
        return None
    cdef const char* packed = <const char*> v.t.data + v.t.byte_offset
    memset(&out, 0, sizeof(out))
    status[0] = fastee_planes_info(packed, v.t.shape[0], &out.dtype, &total)
    if status[0]:
        return None
    if stop < 0:
        stop = total
    if shape is not None:
        if len(shape) > MAX_DIMS:
            return None
        for i, n in enumerate(shape):
            size[i] = n
            if size[i] < 0 or size[i] > 0 and count > total // size[i]:
                return None
            count *= size[i]
        if count != total:
            return None
    if not 0 <= first <= stop <= total:
        return None
    out.ndim, out.shape, out.device.device_type, count = len(shape) if shape is not None else 1, size, 1, stop - first
    if shape is None or count != total:
        out.ndim, size[0] = 1, count
    cdef char* m = allocate(count * (out.dtype.bits // 8))
    out.data = m
    try:
        if count > 20000:
            with nogil:
                status[0] = fastee_unpack_planes(packed, v.t.shape[0], first, &out, NULL)
        else:
            status[0] = fastee_unpack_planes(packed, v.t.shape[0], first, &out, NULL)
        if status[0]:
            return None
        return shaped_tensor(m, 0, out.ndim, size, FLOAT32 if out.dtype.bits == 32 else BFLOAT16 if out.dtype.code == 4 else FLOAT16)
    finally:
        fastee_shared_drop(m)


def pack_planes(h):
    """Return the packed bytes of a contiguous tensor as uint8 [n]."""
    cdef fastee_status status = 0
    data = packed_planes(h, &status)
    check(status)
    return data


def planes_info(data):
    """Return (bits, bfloat, count) of packed bytes; raises ValueError for anything else."""
    cdef View v
    cdef DLDataType dtype
    cdef int64_t count = 0
    view(data, &v)
    check(fastee_planes_info(<char*> v.t.data + v.t.byte_offset, v.t.shape[0], &dtype, &count))
    return dtype.bits, dtype.code == 4, count


def unpack_planes(data, int64_t first, int64_t stop):
    """Return values [first, stop) of packed bytes (uint8 [n], contiguous), flat; they lie among those that the bytes hold."""
    cdef fastee_status status = 0
    out = unpacked_planes(data, None, first, stop, &status)
    check(status)
    return out


# The direct forms: arguments as the user gave them, a result or None (the op then checks, chooses a backend, and says why).

cdef inline bint is_kind(const DLTensor* t, uint8_t code, uint8_t bits):
    return t.dtype.code == code and t.dtype.bits == bits and t.device.device_type == 1


def direct_row_stats(logits, temperature, bint second_moment):
    cdef View v
    cdef fastee_row_stats_out out
    cdef float divisor
    if not plain(logits):
        return None
    try:
        view(logits, &v)
        divisor = temperature
    except Exception:
        return None
    if v.t.ndim != 2:
        return None
    s = new_stats(&out, v.t.shape[0], second_moment)
    cdef fastee_status status
    if v.t.shape[0] * v.t.shape[1] > 20000:
        with nogil:
            status = fastee_row_stats(&v.t, divisor, &out, NULL)
    else:
        status = fastee_row_stats(&v.t, divisor, &out, NULL)
    return None if status else s


def direct_compact(mask):
    cdef View vm
    cdef int64_t count = 0
    if not plain(mask):
        return None
    try:
        view(mask, &vm)
    except Exception:
        return None
    if vm.t.ndim != 1 or not (is_kind(&vm.t, 6, 8) or is_kind(&vm.t, 1, 8)):
        return None
    cdef char* m = allocate(8 * vm.t.shape[0])
    try:
        if fastee_compact(&vm.t, <int64_t*> m, &count, NULL):
            return None
        return tensor_at(m, 0, vm.t.shape[0], INT64), count
    finally:
        fastee_shared_drop(m)


def direct_pack_planes(h):
    cdef fastee_status status = 0
    if not plain(h):
        return None
    try:
        return packed_planes(h, &status)
    except Exception:
        return None


def direct_unpack_planes(data, shape, start, stop):
    cdef fastee_status status = 0
    cdef int64_t last = -1
    if not plain(data) or type(start) is not int or not (shape is None or type(shape) is tuple):
        return None
    try:
        if stop is not None:
            last = stop if type(stop) is int else -1
            if last < 0:
                return None
        return unpacked_planes(data, shape, start, last, &status)
    except Exception:
        return None


# What the C ABI takes for Rows that lie in `memory`.
cdef struct RowViews:
    DLTensor data
    DLTensor scale
    int64_t data_shape[2]
    int64_t scale_shape[2]


cdef void describe(Rows q, RowViews* v) noexcept:
    memset(v, 0, sizeof(RowViews))
    v.data.data, v.data.shape, v.data.ndim = q.memory + q.at_data, q.size, q.ndim
    v.data.dtype.code, v.data.dtype.bits, v.data.dtype.lanes = 0 if q.code == 0 else 4 if q.code == 3 else 1, 16 if q.code == 3 else 8, 1
    if q.code == 1:
        v.data_shape[0], v.data_shape[1] = q.size[0], q.row_bytes()
        v.data.shape, v.data.ndim = v.data_shape, 2
    v.scale_shape[0], v.scale_shape[1] = q.size[0], q.groups()
    v.scale.data, v.scale.shape, v.scale.ndim = q.memory + q.at_scale, v.scale_shape, 2
    v.scale.dtype.code, v.scale.dtype.bits, v.scale.dtype.lanes = 2, 32, 1
    v.data.device.device_type = v.scale.device.device_type = 1


def direct_quantize(x, format, group):
    cdef View vx
    cdef RowViews v
    cdef fastee_status status
    if not plain(x):
        return None
    try:
        view(x, &vx)
    except Exception:
        return None
    cdef Rows q = rows_like(&vx.t, format, group)
    if q is None:
        return None
    q.at_scale = q.size[0] * q.row_bytes() + 3 & ~3
    q.memory = allocate(q.at_scale + 4 * q.groups() * q.size[0])
    describe(q, &v)
    if q.size[0] * q.row > 50000:
        with nogil:
            status = fastee_quantize_rows(&vx.t, q.code, q.chunk, &v.data, &v.scale, NULL)
    else:
        status = fastee_quantize_rows(&vx.t, q.code, q.chunk, &v.data, &v.scale, NULL)
    return None if status else q


def direct_dequantize(q):
    """Take Rows, or the tuple (data, scale, format, group, shape)."""
    cdef RowViews v
    cdef View vd, vs
    cdef Rows own
    cdef DLTensor out
    cdef int64_t size[MAX_DIMS]
    cdef int64_t group, count = 1
    cdef int code, i
    cdef fastee_status status
    memset(&out, 0, sizeof(out))
    if type(q) is Rows:
        own = q
        describe(own, &v)
        code, group, out.ndim, out.shape = own.code, own.chunk, own.ndim, own.size
    else:
        data, scale, format, wanted, shape = q
        if not (plain(data) and plain(scale)) or format not in _FORMATS or data.dtype is not _WIRE_DTYPES[format]:
            return None
        try:
            view(data, &vd)
            view(scale, &vs)
            code, group = _FORMATS[format], 0 if wanted is None else wanted
        except Exception:
            return None
        if not is_kind(&vs.t, 2, 32) or vs.t.ndim != (1 if wanted is None else 2) or group < 0 or (code == 3 and vs.t.shape[0]):
            return None
        v.data, v.scale = vd.t, vs.t
        if code == 2:
            v.data.dtype.code = 1  # e4m3 codes are bytes to the C ABI
        if shape is not None and (type(shape) is tuple or type(shape) is torch.Size) and 0 < len(shape) <= MAX_DIMS:
            for i, n in enumerate(shape):
                size[i] = n
            out.ndim, out.shape = len(shape), size
        elif shape is None and code != 1:
            out.ndim, out.shape = vd.t.ndim, vd.t.shape
        else:
            return None
    for i in range(out.ndim):
        count *= out.shape[i]
    if count < 0:
        return None
    cdef char* m = allocate(4 * count)
    out.data, out.device.device_type = m, 1
    out.dtype.code, out.dtype.bits, out.dtype.lanes = 2, 32, 1
    try:
        if count > 50000:
            with nogil:
                status = fastee_dequantize_rows(&v.data, &v.scale, code, group, &out, NULL)
        else:
            status = fastee_dequantize_rows(&v.data, &v.scale, code, group, &out, NULL)
        return None if status else shaped_tensor(m, 0, out.ndim, out.shape, FLOAT32)
    finally:
        fastee_shared_drop(m)
