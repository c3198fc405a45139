"""TensorBoard's files read back by their record format: length, checksum, protobuf, checksum."""

from __future__ import annotations

import io
import pathlib
import struct
from typing import Any

import numpy as np
from PIL import Image
from tensorboardX.proto.event_pb2 import Event


def _crc32c(data: bytes) -> int:
    """Castagnoli's, masked as TensorFlow does."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 & -(crc & 1))
    crc ^= 0xFFFFFFFF
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(folder: pathlib.Path) -> list[Any]:
    """The events of all files of a folder, in the order of their names."""
    found = []
    for path in sorted(folder.glob("events.*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,), (of_length,) = struct.unpack_from("<Q", data, at), struct.unpack_from("<I", data, at + 8)
            body = data[at + 12 : at + 12 + length]
            (of_body,) = struct.unpack_from("<I", data, at + 12 + length)
            assert (_crc32c(data[at : at + 8]), _crc32c(body)) == (of_length, of_body), f"{path} at {at}"
            found.append(Event.FromString(body))
            at += 16 + length
    return found


def scalars(events: list[Any]) -> dict[tuple[str, int], float]:
    """{(name, step): value}"""
    return {(v.tag, e.step): v.simple_value for e in events for v in e.summary.value if v.HasField("simple_value")}


def pictures(events: list[Any]) -> dict[tuple[str, int], np.ndarray]:
    """{(name, step): uint8 (height, width, channels)}"""
    out = {}
    for e in events:
        for v in e.summary.value:
            if v.HasField("image"):
                pixels = np.asarray(Image.open(io.BytesIO(v.image.encoded_image_string)))
                assert pixels.shape[:2] == (v.image.height, v.image.width)
                out[v.tag, e.step] = pixels.reshape(*pixels.shape[:2], -1)
    return out
