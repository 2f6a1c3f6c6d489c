"""Parses and writes `tf.train.Example` messages, the records of TFDS, without TensorFlow."""

from typing import Any

from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FieldDescriptorProto as Field
from google.protobuf.message import DecodeError


def image_and_label(record: bytes, image: str = "image", label: str = "label") -> tuple[bytes, int]:
    """Parses an example and returns its encoded image and its label.

    Args:
      record: A serialized `tf.train.Example`.
      image: Name of the feature that is the image.
      label: Name of the feature that is the label.

    Raises:
      ValueError: If the record is no example, or has not exactly one image and one label.

    Examples:
      >>> image_and_label(serialize({"image": b"a photo", "label": 7}))
      (b'a photo', 7)
    """
    example = _Example()
    try:
        example.ParseFromString(record)
    except DecodeError as error:
        raise ValueError(f"not a tf.train.Example ({error})") from error
    features = example.features.feature
    images = features[image].bytes_list.value
    labels = features[label].int64_list.value
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"an example with {len(images)} images and {len(labels)} labels, not one of each"
        )
    return images[0], labels[0]


def serialize(features: dict[str, bytes | int]) -> bytes:
    """Returns the record of an example with these features."""
    example = _Example()
    for name, value in features.items():
        if isinstance(value, bytes):
            example.features.feature[name].bytes_list.value.append(value)
        else:
            example.features.feature[name].int64_list.value.append(value)
    return bytes(example.SerializeToString(deterministic=True))


def _example_type() -> Any:
    """Declares the messages of tensorflow/core/example/*.proto, as far as images need them.

    They have a pool and a package name of their own, so that TensorFlow, which registers the same
    messages, can be loaded in the same process.
    """
    package = "rigl_optax.example"
    file = descriptor_pb2.FileDescriptorProto(
        name="rigl_optax/example.proto", package=package, syntax="proto3"
    )

    def message(parent: Any, name: str, *fields: tuple[str, int, int, int, str]) -> Any:
        added = parent.add(name=name)
        for field, number, label, kind, of in fields:
            made = added.field.add(name=field, number=number, label=label, type=kind)
            if of:
                made.type_name = f".{package}.{of}"
        return added

    one, many = Field.LABEL_OPTIONAL, Field.LABEL_REPEATED
    types = file.message_type
    message(types, "BytesList", ("value", 1, many, Field.TYPE_BYTES, ""))
    message(types, "Int64List", ("value", 1, many, Field.TYPE_INT64, ""))
    message(
        types,
        "Feature",
        ("bytes_list", 1, one, Field.TYPE_MESSAGE, "BytesList"),
        ("int64_list", 3, one, Field.TYPE_MESSAGE, "Int64List"),
    )
    entry = "Features.FeatureEntry"
    features = message(types, "Features", ("feature", 1, many, Field.TYPE_MESSAGE, entry))
    pair = message(
        features.nested_type,
        "FeatureEntry",
        ("key", 1, one, Field.TYPE_STRING, ""),
        ("value", 2, one, Field.TYPE_MESSAGE, "Feature"),
    )
    pair.options.map_entry = True
    message(types, "Example", ("features", 1, one, Field.TYPE_MESSAGE, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Example"))


_Example = _example_type()
