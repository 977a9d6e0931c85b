"""ONNX files written field by field: the tests need no exporter, and can write what an exporter never would."""

import struct

import numpy as np

FLOAT, INT64, STRING = 1, 7, 8


def varint(value):
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def field(number, value):
    """A field: an int as a varint, a float as 32 bits, the rest as bytes."""
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def message(*fields):
    return b"".join(field(number, value) for number, value in fields)


def tensor(name, array, *more):
    kind = {"float32": FLOAT, "int64": INT64}[array.dtype.name]
    return message(*[(1, int(size)) for size in array.shape], (2, kind), (8, name), (9, array.tobytes()), *more)


def external(name, shape, location):
    """A tensor whose data are in a file beside the model."""
    entry = message((1, "location"), (2, location))
    return message(*[(1, size) for size in shape], (2, FLOAT), (8, name), (13, entry), (14, 1))


def value_info(name, shape, kind=FLOAT):
    """A str in a shape is a size that is open."""
    sizes = [(1, message((2, size) if isinstance(size, str) else (1, size))) for size in shape]
    return message((1, name), (2, message((1, message((1, kind), (2, message(*sizes)))))))


def node(kind, inputs, outputs, **attributes):
    fields = [(5, message((1, name), (3, value), (20, 2))) for name, value in attributes.items()]
    return message(*[(1, name) for name in inputs], *[(2, name) for name in outputs], (4, kind), *fields)


def model(nodes, inputs, outputs, initializers=()):
    graph = message(*[(1, one) for one in nodes], (2, "graph"), *[(5, one) for one in initializers],
                    *[(11, one) for one in inputs], *[(12, one) for one in outputs])
    return message((1, 7), (8, message((2, 12))), (7, graph))


def tiny_onnx(module, records="n"):
    """The handler tests' tiny module: convolution, ReLU, linear; `records` an int fixes their number."""
    state = {name: np.ascontiguousarray(value.numpy()) for name, value in module.state_dict().items()}
    nodes = [
        node("Conv", ["image", "0.weight", "0.bias"], ["a"]),
        node("Relu", ["a"], ["b"]),
        node("Flatten", ["b"], ["c"], axis=1),
        node("Gemm", ["c", "3.weight", "3.bias"], ["logits"], transB=1),
    ]
    weights = [tensor(name, array) for name, array in state.items()]
    return model(nodes, [value_info("image", [records, 1, 6, 6])], [value_info("logits", [records, 3])], weights)
