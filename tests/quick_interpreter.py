"""Makes Triton's interpreter quicker: at each operation it builds its types anew, which takes longer than the arithmetic.

Types do not change once they are made, so one of each is enough.
"""

from __future__ import annotations

from triton.language import core
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter


def install() -> None:
    """For the rest of the process."""
    block_init, tensor_init, tuple_equal = core.block_type.__init__, core.tensor.__init__, core.tuple.__eq__
    np_dtype, broadcast = interpreter._get_np_dtype, TritonSemantic.broadcast_impl_value
    blocks: dict[tuple, core.block_type] = {}
    shapes: dict[tuple, core.tuple] = {}
    # the keys are ids, so the types are kept too
    np_dtypes: dict[int, tuple] = {}
    of_type: dict[int, tuple] = {}

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
        else:
            self.handle, self.type = handle, type
            self.shape, self.numel, self.dtype, _ = known

    def cached_np_dtype(type):
        known = np_dtypes.get(id(type))
        if known is None:
            known = np_dtypes[id(type)] = np_dtype(type), type
        return known[0]

    def equal_tuples(self, other):
        return core.constexpr(self.values == other) if isinstance(other, list) else tuple_equal(self, other)

    def broadcast_impl_value(self, lhs, rhs):
        return (lhs, rhs) if lhs.shape is rhs.shape else broadcast(self, lhs, rhs)

    core.block_type.__new__ = staticmethod(new_block)
    core.block_type.__init__ = init_block
    core.tensor.__init__ = init_tensor
    core.tuple.__eq__ = equal_tuples
    interpreter._get_np_dtype = cached_np_dtype
    TritonSemantic.broadcast_impl_value = broadcast_impl_value
