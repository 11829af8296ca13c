"""
OpenAI's checkpoints without TensorFlow: every block's and every tensor's checksum verified, the tensors memory-mapped.

    for name, array in read_openai('model.ckpt.index'): ...     # GPT's names, OpenAI's shapes

They are TensorFlow's bundles: files of raw floats, and an index, a LevelDB table of protobuf messages. See
github.com/google/leveldb/blob/main/doc/table_format.md and tensorflow/core/protobuf/tensor_bundle.proto.
"""
import math
import re

import numpy as np

from config import UserError
from files import unreadable


def masked_crc(data):
    try:
        from google_crc32c import value
    except ImportError as error:
        raise UserError("OpenAI's files need google-crc32c for their checksums: pip install google-crc32c") from error
    crc = value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def varint(data, at):
    """Seven bits a byte, low first, the eighth says that more follow -> (number, where it ends)."""
    number = shift = 0
    while data[at] > 127:
        number |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return number | data[at] << shift, at + 1


def message(data):
    """A protobuf message -> {field: its values}: numbers for varints and fixed32, bytes for what has a length."""
    fields, at = {}, 0
    while at < len(data):
        tag, at = varint(data, at)
        if tag & 7 == 0:
            value, at = varint(data, at)
        elif tag & 7 == 2:
            size, at = varint(data, at)
            value, at = data[at:at + size], at + size
        elif tag & 7 == 5:
            value, at = int.from_bytes(data[at:at + 4], 'little'), at + 4
        else:
            raise ValueError(f'it has a field of wire type {tag & 7}')
        fields.setdefault(tag >> 3, []).append(value)
    if at > len(data):
        raise ValueError('it has a field that is cut')
    return fields


def read_block(data, handle):
    """A table and the handle (varints offset, size) of a block in it -> yields the block's (key, value). ValueError."""
    offset, at = varint(handle, 0)
    size, _ = varint(handle, at)
    end = offset + size
    kind, crc = data[end], int.from_bytes(data[end + 1:end + 5], 'little')
    if masked_crc(data[offset:end + 1]) != crc:
        raise ValueError(f'the checksum of the block at {offset} differs')
    if kind:
        raise ValueError(f'the block at {offset} is compressed (type {kind})')
    block = data[offset:end]
    stop = size - 4 - 4 * int.from_bytes(block[-4:], 'little')  # beyond it is what serves binary search
    key, at = b'', 0
    while at < stop:
        shared, at = varint(block, at)
        unshared, at = varint(block, at)
        length, at = varint(block, at)
        key, at = key[:shared] + block[at:at + unshared], at + unshared + length
        if at <= stop and len(key) == shared + unshared:
            yield key, block[at - length:at]
    if at != stop or stop < 0:
        raise ValueError(f'an entry ends outside the block at {offset}')


def read_index(path):
    """-> ({variable: its BundleEntryProto, field 2 made the list of dimensions}, the number of data files)."""
    try:
        data, entries = path.read_bytes(), {}
        if len(data) < 48 or data[-8:] != 0xDB4775248B80FB57.to_bytes(8, 'little'):
            raise ValueError('it does not end as an index does')
        _, at = varint(data, len(data) - 48)
        _, at = varint(data, at)  # offset and size of the metaindex, which is empty
        for _, handle in read_block(data, data[at:]):
            entries |= {key.decode(): message(value) for key, value in read_block(data, handle)}
        header = entries.pop('', {})
        if 1 not in header or 2 in header:
            raise ValueError('it has no header, or a big-endian one')
        for name, entry in entries.items():
            if 7 in entry:
                raise ValueError(f'{name} is stored in slices')
            if entry.get(1) != [1]:
                raise ValueError(f'{name} is of type {entry.get(1)}, not float32')
            dimensions = message(entry[2][0]).get(2, []) if 2 in entry else []
            entry[2] = [message(dimension).get(1, [0])[0] for dimension in dimensions]
    except (OSError, ValueError, IndexError, TypeError) as error:
        raise unreadable(path, error) from error
    return entries, header[1][0]


def read_openai(path):
    """
    OpenAI's model.ckpt.index, the data files beside it -> yields (name, array): GPT's name, the layers (in, out), float32,
    memory-mapped, the checksum verified. Raises UserError naming the file and the tensor.
    """
    entries, shards = read_index(path)
    for variable, entry in entries.items():
        shape, shard, offset, size, crc = entry[2], *(entry.get(field, [0])[0] for field in (3, 4, 5, 6))
        file = path.with_name(f'{path.stem}.data-{shard:05d}-of-{shards:05d}')
        try:  # mapped anew for each tensor, so that memory does not keep the pages of those that are done
            array = np.memmap(file, np.uint8, 'c')[offset:offset + size]
            if not len(array) == size == 4 * math.prod(shape):
                raise ValueError(f'{variable} {shape} has {size} bytes, of which {len(array)} are there')
            if masked_crc(array) != crc:
                raise ValueError(f'the checksum of {variable} differs')
        except (OSError, ValueError) as error:
            raise unreadable(file, error) from error
        array = np.require(array.view('<f4'), requirements='A')  # offsets need not be multiples of 4
        # model/h0/ln_1/g is h.0.ln_1.weight; layers are (1, in, out), for convolutions of width 1
        stem, dot, last = re.sub(r'^h(\d)', r'h.\1', variable.removeprefix('model/')).replace('/', '.').rpartition('.')
        last = {'w': 'weight', 'g': 'weight', 'b': 'bias', 'wte': 'wte.weight', 'wpe': 'wpe.weight'}.get(last, last)
        yield stem + dot + last, array.reshape(shape[-2:] if shape[:1] == [1] else shape)
