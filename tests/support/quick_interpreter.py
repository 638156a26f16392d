"""Makes Triton's interpreter quicker: at each operation it works out anew what types come out, which takes longer than the
arithmetic.

Types do not change once they are made, so one of each is enough, and what follows from two of them is worked out once.
"""

from __future__ import annotations

from math import copysign
from types import SimpleNamespace

import numpy as np
from triton import language
from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

NUMBERS = frozenset((int, bool, float))
EXACT = {"add": np.add, "sub": np.subtract, "mul": np.multiply}
INTEGERS = (np.int8, np.int16, np.int32, np.uint8, np.uint16, np.uint32)
LIMITS = {np.dtype(kind): (np.iinfo(kind).min, np.iinfo(kind).max) for kind in INTEGERS}


def install() -> None:
    """For the rest of the process."""
    block_init, tensor_init, tuple_equal = core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__
    np_dtype, broadcast, operands = (
        interpreter._get_np_dtype,
        TritonSemantic.broadcast_impl_value,
        TritonSemantic.binary_op_type_checking_impl,
    )
    check_overflow, patch_lang = TritonSemantic.binary_op_sanitize_overflow_impl, interpreter._patch_lang
    dtype_equal, convert_float = core.dtype.__eq__, interpreter._convert_float
    unwrap, tensor = core._unwrap_if_constexpr, core.tensor
    whole = NUMBERS | {tensor, str, type(None)}  # that nothing is wrapped in
    blocks: dict[tuple, core.block_type] = {}
    shapes: dict[tuple, core.tuple] = {}
    changes: list[tuple] = []
    running: list = []
    # the keys are ids, so the types are kept too
    np_dtypes: dict[int, tuple] = {}
    of_type: dict[int, tuple] = {}
    shapes_of: dict[int, tuple[int, ...]] = {}
    with_elements: dict[tuple, tuple] = {}
    of_types: dict[tuple, tuple] = {}
    constants: dict[tuple, tuple] = {}

    def new_block(cls, element_ty, shape):
        key = (str(element_ty), *[getattr(size, "value", size) for size in shape])
        if key not in blocks:
            blocks[key] = object.__new__(cls)
        return blocks[key]

    def init_block(self, element_ty, shape):
        if not hasattr(self, "name"):
            block_init(self, element_ty, shape)

    def init_tensor(self, handle, type):
        known = of_type.get(id(type))
        if known is None:
            tensor_init(self, handle, type)
            self.shape = shapes.setdefault(tuple(size.value for size in self.shape), self.shape)
            of_type[id(type)] = self.shape, self.numel, self.dtype, type
            shapes_of[id(type)] = tuple(size.value for size in self.shape)
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype, _ = known

    def init_handle(self, data, dtype, attr=None):
        self.data, self.dtype, self.attr = data, dtype, {} if attr is None else attr

    def cached_np_dtype(type):
        known = np_dtypes.get(id(type))
        if known is None:
            known = np_dtypes[id(type)] = np_dtype(type), type
        return known[0]

    def equal_tuples(self, other):
        return core.constexpr(self.values == other) if isinstance(other, list) else tuple_equal(self, other)

    def unwrap_if_constexpr(o):
        return o if o.__class__ in whole else unwrap(o)

    def equal_dtypes(self, other):
        return self is other or (self.name == other.name if other.__class__ is core.dtype else dtype_equal(self, other))

    def patch_attr(obj, name, member, builder, scope):
        inner, semantic = getattr(member, "__wrapped__", member), TritonSemantic(builder)

        def new_member(*args, **kwargs):
            kwargs["_semantic"] = semantic
            return inner(*args, **kwargs)

        scope.set_attr(obj, name, new_member)

    class Scope(interpreter._LangPatchScope):
        """What a launch has changed in the language, until it ends."""

        def restore(self):
            super().restore()
            running.clear()

    def quick_patch_lang(fn):
        """The interpreter looks through the whole language at every call of a function. What it changes is always the same, and
        the first function of a launch changes it for all that are called inside."""
        if running:
            return interpreter._LangPatchScope()
        scope = Scope()
        if not changes:
            found = patch_lang(SimpleNamespace(__globals__={"tl": language, "core": core}))
            changes.extend((owner, name, vars(owner)[name]) for owner, name, _ in found._changes)
            found.restore()
        for change in changes:
            scope.set_attr(*change)
        running.append(scope)
        return scope

    def with_element_ty(self, scalar_ty):
        key = id(self), id(scalar_ty)
        known = with_elements.get(key)
        if known is None:
            known = with_elements[key] = core.block_type(scalar_ty, self.shape), self, scalar_ty
        return known[0]

    def quick_convert_float(input, input_dtype, output_dtype, rounding_mode):
        if input_dtype is core.bfloat16 and output_dtype is core.float32:
            return input.astype(np.uint32) << 16  # the bits of both
        return convert_float(input, input_dtype, output_dtype, rounding_mode)

    def spread(value, to):
        """The tensor `value` as one of the block type `to`, of the same elements."""
        if value.type is to:
            return value
        data = np.empty(shapes_of[id(to)], value.handle.data.dtype)
        data[...] = value.handle.data
        return tensor(interpreter.TensorHandle(data, value.handle.dtype), to)

    def broadcast_impl_value(self, lhs, rhs):
        if lhs.shape is rhs.shape:
            return lhs, rhs
        key = id(lhs.type), id(rhs.type)
        known = of_types.get(key)
        if known is None:
            both = broadcast(self, lhs, rhs)
            of_types[key] = both[0].type, both[1].type, lhs.type, rhs.type
            return both
        return spread(lhs, known[0]), spread(rhs, known[1])

    def binary_op_type_checking_impl(self, lhs, rhs, *flags, **named):
        """The operands of a binary operation, cast and broadcast."""
        left, right = lhs.__class__ is tensor, rhs.__class__ is tensor
        if left and right:
            key = (id(lhs.type), id(rhs.type), *flags, *named.items())
            known = of_types.get(key)
            if known is None:
                both = operands(self, lhs, rhs, *flags, **named)
                alike = both[0].dtype is lhs.dtype and both[1].dtype is rhs.dtype  # nothing was cast
                of_types[key] = *((each.type if alike else None) for each in both), lhs.type, rhs.type
                return both
            if known[0] is not None:
                return spread(lhs, known[0]), spread(rhs, known[1])
        elif left != right:
            value, other = (rhs, lhs) if left else (lhs, rhs)
            if value.__class__ in NUMBERS and value == value:
                sign = copysign(1, value) if value.__class__ is float else 0
                key = (value.__class__, value, sign, id(other.type), left, *flags, *named.items())
                known = constants.get(key)
                if known is None:
                    both = operands(self, lhs, rhs, *flags, **named)
                    cast, constant = both if left else both[::-1]
                    constants[key] = constant if cast is other else None, other.type
                    return both
                if known[0] is not None:
                    return (lhs, known[0]) if left else (known[0], rhs)
        return operands(self, lhs, rhs, *flags, **named)

    def quick_check_overflow(self, lhs, rhs, binary_op):
        """The interpreter computes the result in int64 by eight operations of its own; NumPy does so by three."""
        type = lhs.type.scalar
        if type.int_bitwidth >= 64 or not self.builder.options.sanitize_overflow:
            return
        if type.int_bitwidth > 1:
            exact = EXACT[binary_op.__name__](lhs.handle.data, rhs.handle.data, dtype=np.int64)
            low, high = LIMITS[lhs.handle.data.dtype]
            if not exact.size or (exact.min() >= low and exact.max() <= high):
                return
        check_overflow(self, lhs, rhs, binary_op)  # which says what overflowed

    core.block_type.__new__ = staticmethod(new_block)
    core.block_type.__init__ = init_block
    core.block_type.with_element_ty = with_element_ty
    core.tensor.__init__ = init_tensor
    interpreter.TensorHandle.__init__ = init_handle
    core.tuple.__eq__ = equal_tuples
    core.dtype.__eq__ = equal_dtypes
    interpreter._convert_float = quick_convert_float
    interpreter._patch_attr = patch_attr
    interpreter._patch_lang = quick_patch_lang
    core._unwrap_if_constexpr = unwrap_if_constexpr
    interpreter._get_np_dtype = cached_np_dtype
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
    TritonSemantic.binary_op_sanitize_overflow_impl = quick_check_overflow
    TritonSemantic.binary_op_type_checking_impl = binary_op_type_checking_impl
